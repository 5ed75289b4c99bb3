"""What gateways and workers say to each other, as bytes.

A message is one byte, the version of all messages, then MessagePack; arrays are sent as they lie in
memory. No pickle: whoever reaches a worker's port must not be able to make it run code.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np

from gma.service import errors
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress
from gma.service.errors import ServiceError, VersionMismatch
from gma.service.link.client import ModelFiles, WorkerInfo

VERSION = 4
"""Raised by any change of what is sent, or of what it means."""

T = TypeVar("T")


class Feed(NamedTuple):
    """More tokens of the document that was opened before."""

    tokens: Tokens
    last: bool


class Codec(Generic[T]):
    """One kind of message."""

    def __init__(self, kind: type[T]) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_array)
        self._decoder = msgspec.msgpack.Decoder(kind, dec_hook=_parsed_array)

    def encode(self, message: T) -> bytes:
        return HELLO + self._encoder.encode(message)

    def decode(self, data: bytes) -> T:
        """Raises VersionMismatch, and msgspec.DecodeError for what is no such message."""
        check_version(data)
        return self._decoder.decode(memoryview(data)[1:])


HELLO = bytes([VERSION])
"""A message that says nothing."""


def check_version(data: bytes) -> None:
    """Raises VersionMismatch unless a message is of this version."""
    if data[:1] != HELLO:
        theirs = str(data[0]) if data else "none"
        raise VersionMismatch(
            f"gateway and worker are of different releases: one sends messages of version {theirs},"
            f" this one reads version {VERSION}"
        )


def encode_error(error: ServiceError) -> bytes:
    return msgspec.msgpack.encode((type(error).__name__, error.args))


def decode_error(data: bytes) -> ServiceError:
    """Raises ValueError for what is no error of the service."""
    name, args = msgspec.msgpack.decode(data)
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ServiceError)):
        raise ValueError(f"{name} is not an error of the service")
    return kind(*args)


def _array(value: object) -> tuple[tuple[int, ...], memoryview]:
    """An array's shape, and its items in little-endian bytes."""
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value)} is not sent")
    items = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return value.shape, items.reshape(-1).view(np.uint8).data


def _parsed_array(kind: type, value: Any) -> Any:
    """An array of the item type that `kind`, an NDArray, says."""
    shape, items = value
    (item,) = get_args(get_args(kind)[1])
    return np.frombuffer(items, np.dtype(item).newbyteorder("<")).reshape(shape)


OPENING = Codec(Opening)
FEED = Codec(Feed)
PROGRESS = Codec(Progress)
INFO = Codec(WorkerInfo)
FILES = Codec(ModelFiles)
