"""What opens a document: one object, from the gateway to the engine."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = NDArray[np.int32]
"""(n,) ids of the vocabulary."""

NO_TOKENS: Tokens = np.zeros(0, np.int32)


class Past(NamedTuple):
    """What a document that goes on was read to before, by a worker with the same model."""

    model: str
    """Fingerprint of the model."""

    snapshot: bytes
    """Its state as safetensors, see `gma.service.engine.snapshot`; empty if none was kept yet."""

    usage: NDArray[np.float64] | None = None
    """(L, H, K) of components up to there, if it is counted."""


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

    past: Past | None = None
    """The document goes on after this."""

    keep_tokens: int = 0
    """What it is read to is kept about every so many tokens, in full chunks, and without the tokens
    that come with the last feed; 0 keeps nothing. Something to read on is left unless it is steady.
    Not every runner can."""

    steady: bool = False
    """It has one row in a step, so that what is read does not depend on how it came. What was kept
    last is told with the end, not before."""
