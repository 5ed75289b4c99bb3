"""The workers as a gateway sees them, wherever they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, NamedTuple, Protocol

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress


class WorkerInfo(TypedDict):
    """Where the model runs."""

    backend: str
    device: str
    dtype: Annotated[str, Field(description="what matrix products are computed in")]
    kernels: Annotated[str, Field(description="which code computes a step")]
    fingerprint: Annotated[str, Field(description="SHA-256 of the checkpoint")]
    rows: Annotated[int, Field(description="chunks that one step reads")]
    chunk_tokens: int
    slots: Annotated[int, Field(description="documents that a worker reads at the same time")]
    components: Annotated[bool, Field(description="whether it can count what components take")]
    sessions: Annotated[bool, Field(description="whether documents can be kept open here")]
    max_document_tokens: Annotated[
        int | None, Field(description="of a document that is kept whole; null if none is")
    ]
    versions: dict[str, str]


class ModelFiles(NamedTuple):
    """What a gateway has to know of a model, as the worker that runs it has read it."""

    config: bytes
    """See `gma.model.config.ModelConfig`, as JSON."""

    tokenizer: bytes
    """A `tokenizer.json`."""


NO_FILES = ModelFiles(b"", b"")


class OpenDocument(Protocol):
    """A document that a worker reads."""

    async def feed(self, tokens: Tokens, last: bool) -> None:
        """Add tokens, at most 2**18, which is 1 MiB. Waits while too many of them are unread.

        Raises ServiceError.
        """

    def __aiter__(self) -> AsyncIterator[Progress]:
        """Tell how far it is read, the last time with `done`. Raises ServiceError."""

    def close(self) -> None:
        """Read it no further. Nothing happens if it is closed already."""


class WorkerClient(Protocol):
    """Opens documents on workers."""

    @property
    def count(self) -> int:
        """How many workers are known now."""

    async def open(self, opening: Opening) -> OpenDocument:
        """Give a new document to a worker, which reads it until it is closed.

        Raises ServiceError: NotReady without a worker, Overloaded if none has room.
        """

    async def info(self) -> WorkerInfo:
        """What the workers run. Raises NotReady if there is none."""
