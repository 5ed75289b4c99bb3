"""Files that have a text in them: HTML, PDF and Word.

Each is read by a process of its own, which is bounded, and whose end harms nobody.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from importlib.util import find_spec

from gma.service.errors import Undecodable, UnsupportedContent
from gma.service.gateway.document import PIECE_BYTES, Pieces
from gma.service.http.extraction import BROKEN, ENCRYPTED, MEMORY_BYTES, SECONDS
from gma.service.http.media import HTML, PDF, WORD

MODULES: Mapping[str, str] = {HTML: "inscriptis", PDF: "pypdf", WORD: "docx"}
"""By media type, what reads it."""


def check_readable(kind: str) -> None:
    """Raises UnsupportedContent for a file for which there is no reader here."""
    if kind in MODULES and not find_spec(MODULES[kind]):
        raise UnsupportedContent(
            f"{kind} is not read here, for gma-service was installed without the extra 'files': "
            "pip install 'gma-service[files]', or send text/plain"
        )


class Files:
    """Reads files, so many at once."""

    def __init__(self, at_once: int) -> None:
        self._places = asyncio.Semaphore(at_once)

    async def text(
        self, pieces: Pieces, kind: str, charset: str | None
    ) -> AsyncGenerator[tuple[bytes, bool]]:
        """The text of a file, in UTF-8, once all of it has come. Raises Undecodable, and what
        `pieces` raise."""
        file = [piece async for piece, _ in pieces]
        async with self._places:
            reader = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "gma.service.http.extraction"),
                *(kind, charset or ""),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
            )
            assert reader.stdin
            assert reader.stdout
            try:
                with suppress(ConnectionError):  # it has ended: its status says why
                    for piece in file:
                        reader.stdin.write(piece)
                        await reader.stdin.drain()
                file.clear()
                reader.stdin.close()
                while text := await reader.stdout.read(PIECE_BYTES):
                    yield text, False
                status = await reader.wait()
            finally:
                with suppress(ProcessLookupError):
                    reader.kill()
                await reader.wait()
        if status:
            raise Undecodable(_told(kind, status))
        yield b"", True


def _told(kind: str, status: int) -> str:
    if status == ENCRYPTED:
        return f"the {kind} has a password: send it without, or its text"
    if status == BROKEN:
        return f"the body is no {kind} that can be read, or damaged: send its text"
    return (
        f"the {kind} can't be read in {SECONDS} s and {MEMORY_BYTES // 2**20} MiB of memory: send "
        "its text"
    )
