"""A batch from its inputs to its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from gma.service.batch.files import found
from gma.service.batch.manifest import Manifest, Options
from gma.service.batch.output import MANIFEST, SUCCESS, Output, check, left
from gma.service.batch.parts import cut
from gma.service.batch.reader import Reader
from gma.service.batch.work import Done, Work
from gma.service.model_folder import ModelFolder, exported_for
from gma.service.runners.loading import load
from gma.service.settings import Settings

Moved: TypeAlias = Callable[[int, int | None], None]
"""Is told how many bytes are done, and how many there are."""


class Report(NamedTuple):
    """What a run did."""

    done: Done
    parts: int
    """That it read."""
    before: int
    """That were there."""


class Batch:
    """What is to be read, with what, and where answers go."""

    def __init__(
        self, inputs: Sequence[str], out: str, settings: Settings, options: Options
    ) -> None:
        """Begin, or find what was begun.

        Raises ValueError for what can't be read, for an output that holds something else or was
        begun otherwise, and OSError.
        """
        check(options)
        self.settings, self.output = settings, Output(out)
        folder, fingerprint = ModelFolder.of(settings), fingerprint_of(settings)
        files = found(inputs, out)
        there = self.output.names()
        if MANIFEST in there:
            self.manifest = manifest_of(self.output)
            self.manifest.check(fingerprint, options, files, out)
        elif any(not name.startswith(".") for name in there):
            raise ValueError(f"{out} holds other files: give a folder that is empty, or not there")
        else:
            self.manifest = Manifest(
                folder.config.name, fingerprint, options, tuple(files), cut(files, options)
            )
            self.output.put(MANIFEST, self.manifest.encoded())
        self.left = left(self.manifest, there)
        self.complete = SUCCESS in there and not self.left

    def run(self, moved: Moved = lambda done, size: None) -> Report:
        """Read what is left, here. Raises BatchError, ValueError and OSError; parts that are done
        stay."""
        if self.complete:
            return self.report(Done())

        async def here() -> Done:
            async with Reader(self.settings, load(self.settings)) as reader:
                return await self.read(reader, moved)

        return self.finish(asyncio.run(here()))

    async def read(self, reader: Reader, moved: Moved = lambda done, size: None) -> Done:
        """Read what is left with a reader, and raise what `run` does."""
        done, total = self.progress()
        moved(done, total)

        def more(size: int) -> None:
            nonlocal done
            done += size
            moved(min(done, total), total)

        return await Work(self.manifest, self.output, reader).parts(self.left, more)

    def progress(self) -> tuple[int, int]:
        """Bytes of the parts that are there, and of all."""
        sizes = [part.size for part in self.manifest.parts]
        missing = left(self.manifest, self.output.names())
        return sum(sizes) - sum(sizes[number] for number in missing), sum(sizes)

    def finish(self, done: Done) -> Report:
        """Say that all is there. Raises ValueError if it is not."""
        if lost := left(self.manifest, self.output.names()):
            raise ValueError(
                f"{self.output.place}: {len(lost)} parts that were read are not there: every "
                "machine has to write to the same folder"
            )
        self.output.finish()
        return self.report(done)

    def report(self, done: Done) -> Report:
        """What a run that read so much did."""
        return Report(done, len(self.left), len(self.manifest.parts) - len(self.left))


def manifest_of(output: Output) -> Manifest:
    """What was begun there. Raises ValueError and OSError."""
    return Manifest.decoded(output.get(MANIFEST), f"{output.place}/{MANIFEST}")


def fingerprint_of(settings: Settings) -> str:
    """SHA-256 of the checkpoint, or of what was exported of it. Raises ValueError."""
    if settings.runtime == "onnx":
        return exported_for(settings).fingerprint
    from gma.model import weights

    return weights.load(settings.checkpoint).fingerprint
