"""What gateways and workers say to each other, as bytes: MessagePack, arrays as they lie in memory.

No pickle: whoever reaches a worker's port must not be able to make it run code.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import msgpack
import numpy as np

from gma.service import errors
from gma.service.engine.document import Progress, Span
from gma.service.errors import ServiceError
from gma.service.link.client import Tokens

# Little-endian, whatever the machine.
IDS = np.dtype(np.int32).newbyteorder("<")
FLOATS = np.dtype(np.float32).newbyteorder("<")
DOUBLES = np.dtype(np.float64).newbyteorder("<")


class Open(NamedTuple):
    """A new document with its first tokens, (n,) ids; see `WorkerClient.open`."""

    document: str
    tokens: Tokens
    last: bool
    evidence: bool
    running: bool

    def pack(self) -> bytes:
        document, tokens, *rest = self
        return _pack((document, _bytes(tokens, IDS), *rest))

    @classmethod
    def unpack(cls, message: bytes) -> Open:
        document, tokens, *rest = msgpack.unpackb(message)
        return cls(document, np.frombuffer(tokens, IDS), *rest)


class Feed(NamedTuple):
    """More tokens of a document, (n,) ids; see `Reading.feed`."""

    document: str
    offset: int
    tokens: Tokens
    last: bool

    def pack(self) -> bytes:
        return _pack((self.document, self.offset, _bytes(self.tokens, IDS), self.last))

    @classmethod
    def unpack(cls, message: bytes) -> Feed:
        document, offset, tokens, last = msgpack.unpackb(message)
        return cls(document, offset, np.frombuffer(tokens, IDS), last)


def pack_progress(progress: Progress) -> bytes:
    spans = progress.spans
    evidence = np.stack([span.evidence for span in spans]) if spans else np.zeros(0)
    return _pack(
        (
            progress.tokens,
            progress.chunks,
            _bytes(progress.logits, DOUBLES),
            _bytes([span.tokens for span in spans], IDS),
            _bytes([span.weight for span in spans], DOUBLES),
            _bytes(evidence, FLOATS),
            progress.wait_s,
            progress.queue_s,
            progress.compute_s,
            progress.done,
        )
    )


def unpack_progress(message: bytes) -> Progress:
    tokens, chunks, logits, lengths, weights, evidence, *rest = msgpack.unpackb(message)
    answer = np.frombuffer(logits, DOUBLES)
    shares = np.frombuffer(evidence, FLOATS).reshape(-1, len(answer))
    each = zip(np.frombuffer(lengths, IDS), np.frombuffer(weights, DOUBLES), shares, strict=True)
    spans = [Span(int(length), float(weight), share) for length, weight, share in each]
    return Progress(tokens, chunks, answer, spans, *rest)


def pack_error(error: ServiceError) -> bytes:
    return _pack((type(error).__name__, error.args))


def unpack_error(message: bytes) -> ServiceError:
    """Raises ValueError for what is no error of the service."""
    name, args = msgpack.unpackb(message)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ServiceError)):
        raise ValueError(f"{name} is not an error of the service")
    return kind(*args)


def _pack(values: tuple[object, ...]) -> bytes:
    return cast("bytes", msgpack.packb(values))


def _bytes(values: Any, dtype: np.dtype[Any]) -> bytes:
    return np.asarray(values, dtype).tobytes()
