"""What opens a document: one object, from the gateway to the engine."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[np.int32]
"""(n,) ids of the vocabulary."""


class Opening(NamedTuple):
    """A new document."""

    name: str
    """For logs; unique among all gateways."""

    tokens: Tokens
    """The first of the document's tokens."""

    last: bool
    """Nothing follows them."""

    evidence: bool
    """What each row says is wanted, not only what all of them do."""

    running: bool
    """The answer so far is wanted as steps read the document. Without, little more than the final
    answer is told: every message costs its worker time."""

    components: bool = False
    """How much of the document each component takes is wanted, with the final answer."""
