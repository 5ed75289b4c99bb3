"""A session: a document that is kept open, as it lies in a store and as its snapshot is sent."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from gma.service.engine.opening import Tokens
from gma.service.engine.snapshot import Snapshot, encoded
from gma.service.errors import BadSnapshot

FORMAT = "gma-session-1"

STATE = "state."
"""What names of tensors begin with that are a state's parts; the others are a session's own."""

CHECKSUM = "checksum"

Facts: TypeAlias = Mapping[str, str]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Session(NamedTuple):
    """All that a document's answer, and its future, need of what has come of it.

    Its state is that after the last full chunk of tokens that no later text can change, for so a
    document is read that comes at once; what has come since is kept as tokens and as bytes.
    """

    model: str
    """Fingerprint of the model, whose state and tokens these are."""

    name: str = ""
    """Of that model, where several are served."""

    offset: int = 0
    """Bytes that have come."""

    pending: bytes = b""
    """The last of them, which are in no token yet: see `TokenStream.pending`."""

    tail: Tokens = np.zeros(0, np.int32)
    """The tokens before those, (n,), that are not in the state; less than a chunk."""

    kept_tokens: int = 0
    """Tokens in the state."""

    kept_chunks: int = 0

    state: bytes = b""
    """See `Past.snapshot`."""

    logits: NDArray[np.float64] = np.zeros(0)
    """(labels,) of the answer so far; empty while there is no token."""

    read_bytes: int = 0
    """What the answer so far has read."""

    tokens: int = 0
    chunks: int = 0


COUNTS = ("offset", "kept_tokens", "kept_chunks", "read_bytes", "tokens", "chunks")


def snapshot_of(session: Session, secret: bytes) -> bytes:
    """The session as safetensors, with a checksum that only who knows `secret` can make."""
    arrays: dict[str, NDArray[Any]] = {
        "pending": np.frombuffer(session.pending, np.uint8),
        "tail": session.tail,
        "logits": session.logits,
    }
    if session.state:
        parts = safetensors.load(session.state)
        arrays |= {STATE + name: x for name, x in parts.items()}
    facts = {"format": FORMAT, "model": session.model, "name": session.name}
    facts |= {name: str(getattr(session, name)) for name in COUNTS}
    facts[CHECKSUM] = _checksum(facts, arrays, secret)
    return safetensors.save(arrays, facts)


def session_of(snapshot: bytes, secret: bytes) -> Session:
    """What `snapshot_of` made a snapshot of, with the same secret. Raises BadSnapshot for anything
    else, however little of it was changed."""
    try:
        arrays = safetensors.load(snapshot)
        facts = _facts(snapshot)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError):
        raise BadSnapshot("this is no session's snapshot, or only a part of one") from None
    told = facts.pop(CHECKSUM, "")
    if not hmac.compare_digest(told.encode(), _checksum(facts, arrays, secret).encode()):
        raise BadSnapshot(
            "the snapshot is damaged, or was not made by this service: send one as it was got here"
        )
    if facts["format"] != FORMAT:
        raise BadSnapshot("the snapshot is of another release: read the document again")
    state = {name.removeprefix(STATE): x for name, x in arrays.items() if name.startswith(STATE)}
    return Session(
        model=facts["model"],
        name=facts.get("name", ""),  # earlier releases wrote none
        pending=arrays["pending"].tobytes(),
        tail=arrays["tail"],
        state=encoded(state) if state else b"",
        logits=arrays["logits"],
        **{name: int(facts[name]) for name in COUNTS},
    )


def sums_of(state: bytes) -> tuple[NDArray[np.float64], float]:
    """Evidence (labels,) and weight of all that a state has read."""
    parts: Snapshot = safetensors.load(state)
    return parts["evidence"][0], float(parts["weight"][0])


def _facts(snapshot: bytes) -> dict[str, str]:
    """The metadata of safetensors that could be read."""
    size = int.from_bytes(snapshot[:8], "little")
    facts: dict[str, str] = json.loads(snapshot[8 : 8 + size])["__metadata__"]
    return dict(facts)


def _checksum(facts: Facts, arrays: Arrays, secret: bytes) -> str:
    """HMAC-SHA256 of all that a snapshot says; each array's size is told before it."""
    mac = hmac.new(secret, digestmod="sha256")
    mac.update(json.dumps(sorted(facts.items())).encode() + b"\n")
    for name in sorted(arrays):
        x = arrays[name]
        mac.update(json.dumps([name, x.dtype.str, x.shape]).encode() + b"\n")
        mac.update(x.tobytes())
    return mac.hexdigest()
