"""Reads records with an engine, so many at once that its steps are full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from gma.model.tokenizer import Tokenizer
from gma.service.batch.manifest import Options
from gma.service.batch.records import Record
from gma.service.engine.engine import Engine
from gma.service.engine.observer import Observer
from gma.service.engine.opening import Opening
from gma.service.errors import Empty, NotUtf8, StepFailed, TooLong
from gma.service.gateway import contract
from gma.service.gateway.document import Document
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.link.client import OpenDocument, WorkerInfo
from gma.service.model_folder import ModelFolder
from gma.service.runners.loading import Loaded
from gma.service.settings import Settings

T = TypeVar("T")

ROUNDS = 4
"""Documents that are open for each row of a step, if there are slots: while some are in a step,
others are tokenized."""

FOR_EVER_S = 1e9
"""Nobody waits for an answer, and inputs may be slow."""


class BatchError(ValueError):
    """A batch that can't go on; what is done is kept."""


class _Steps(Observer):
    """Remembers that a step raised."""

    failed = False

    def step_failed(self) -> None:
        self.failed = True


class Reader:
    """A model in this process, and the engine that reads with it. Of one event loop."""

    def __init__(self, settings: Settings, loaded: Loaded) -> None:
        """Raises ValueError for a folder that holds no model."""
        runner, rows = loaded.runner, loaded.runner.grids[-1].rows
        at_once = min(runner.slots, ROUNDS * rows)
        self._steps = _Steps()
        self._engine = Engine(
            runner,
            max_waiting=at_once,
            inbox_tokens=settings.inbox_tokens,
            idle_timeout_s=FOR_EVER_S,
            interval_s=FOR_EVER_S,
            observer=self._steps,
        )
        folder = ModelFolder.of(settings)
        self._model = Model(folder.config, Tokenizer.load(folder.tokenizer), _Here(self._engine))
        self._gateway = Gateway(settings, Models(self._model))
        self._places = asyncio.Semaphore(at_once)
        self._turn = asyncio.Lock()
        self._disk = ThreadPoolExecutor(4, thread_name_prefix="read")

    async def __aenter__(self) -> Self:
        await self._engine.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._engine.stop()
        self._disk.shutdown(wait=False)

    async def read(
        self,
        records: Iterator[Record],
        options: Options,
        moved: Callable[[int], None] = lambda size: None,
    ) -> list[dict[str, Any]]:
        """The answers to some records, in their order.

        Records of another call are begun when all of this one's are, so the two share steps.
        `moved` is told of every piece, how many bytes of text it has. A document that can't be read
        has an error for an answer. Raises BatchError if a step failed, and whatever `records`
        raises.
        """
        answers: list[dict[str, Any]] = []

        async def one(record: Record, index: int) -> None:
            try:
                answers[index] = await self._answer(record, options, moved)
            finally:
                self._places.release()

        try:
            async with asyncio.TaskGroup() as tasks, self._turn:
                while (record := await self._in_thread(lambda: next(records, None))) is not None:
                    await self._places.acquire()
                    tasks.create_task(one(record, len(answers)))
                    answers.append({})
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return answers

    async def _answer(
        self, record: Record, options: Options, moved: Callable[[int], None]
    ) -> dict[str, Any]:
        if record.error:
            return _unread(record, options, record.error)
        text = _Text(self, record, moved)
        wanted = contract.Options(top_k=options.top_k, evidence=options.evidence)
        document = Document(self._gateway, self._model, record.id, wanted)
        try:
            finding = await document.classify(text.pieces(), began=0.0, stages=[])
        except (Empty, NotUtf8, TooLong, FileNotFoundError, PermissionError) as error:
            return _unread(record, options, f"{record.where}: {_reason(error)}")
        except StepFailed as error:
            if self._steps.failed:
                raise BatchError(
                    "a step of the model failed; parts that are done stay, and the same command "
                    "goes on"
                ) from error
            return _unread(record, options, f"{record.where}: {error}")
        if text.blank:
            return _unread(record, options, f"{record.where}: the text is blank")
        usage = finding["usage"]
        return {
            "id": record.id,
            **record.kept,
            **_said(finding),
            **({"evidence": [*map(_span, finding["evidence"])]} if options.evidence else {}),
            "bytes": usage["bytes"],
            "tokens": usage["tokens"],
            "error": None,
        }

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, function)


class _Text:
    """A record's text while it is read."""

    def __init__(self, reader: Reader, record: Record, moved: Callable[[int], None]) -> None:
        self._reader, self._record, self._moved = reader, record, moved
        self.blank = True

    async def pieces(self) -> AsyncIterator[tuple[bytes, bool]]:
        """As a gateway's document takes them."""
        pieces = self._record.pieces
        piece = await self._next(pieces)
        while True:
            following = await self._next(pieces) if piece else b""
            self.blank = self.blank and not piece.strip()
            self._moved(len(piece))
            yield piece, not following
            if not following:
                return
            piece = following

    async def _next(self, pieces: Iterator[bytes]) -> bytes:
        if isinstance(self._record.text, bytes):
            return next(pieces, b"")
        return await self._reader._in_thread(lambda: next(pieces, b""))


class _Here:
    """The engine of this process, as a gateway sees workers: a `WorkerClient`."""

    count = 1

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def open(self, opening: Opening) -> OpenDocument:
        return self._engine.open(opening)

    async def info(self) -> WorkerInfo:
        raise NotImplementedError("nobody asks")


def _said(finding: contract.Finding | contract.EvidenceSpan) -> dict[str, Any]:
    """The label, the labels and the scores, whatever the model says of them."""
    label = finding.get("label")
    labels = finding.get("labels", [] if label is None else [label])
    return {
        "label": labels[0] if labels else None,
        "labels": labels,
        "scores": finding["scores"],
    }


def _span(span: contract.EvidenceSpan) -> dict[str, Any]:
    where = {name: span[name] for name in ("start", "end", "tokens", "weight")}
    return where | _said(span)


def _unread(record: Record, options: Options, error: str) -> dict[str, Any]:
    columns = ("label", "labels", "scores", *(["evidence"] if options.evidence else []))
    nothing = dict.fromkeys((*columns, "bytes", "tokens"))
    return {"id": record.id, **record.kept, **nothing, "error": error}


def _reason(error: Exception) -> str:
    match error:
        case Empty():
            return "the text is empty"
        case NotUtf8():
            where = "" if error.offset is None else f": byte {error.offset}"
            return f"not UTF-8{where}"
        case OSError():
            return error.strerror or "can't be opened"
        case _:
            return str(error)
