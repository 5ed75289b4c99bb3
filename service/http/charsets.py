"""Texts in other charsets, as UTF-8."""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator

from gma.service.errors import Undecodable
from gma.service.gateway.document import PIECE_BYTES, Pieces

# Few names, for Python remembers each that it is asked about; and of what it knows not those that
# are no text, nor those in which an escape changes the rest.
_NAMES = re.compile(
    r"(iso-?8859-?|latin-?)\d{1,2}|(windows-|cp)125\d|koi8-[ru]|utf-16(-?[lb]e)?|"
    r"shift-?jis|sjis|gb2312|gbk|gb18030|big5|euc-(jp|kr)"
)

UTF8 = ("utf-8", "utf8", "us-ascii")

GROWTH = 3
"""Bytes of UTF-8 that one byte of another charset is at most."""


def charset_of(name: str) -> str | None:
    """The charset by the name that Python has for it; None if it is not read here."""
    name = name.lower().replace("_", "-")
    try:
        return codecs.lookup(name).name if _NAMES.fullmatch(name) else None
    except LookupError:  # as of ISO 8859-12, which there is not
        return None


async def transcoded(pieces: Pieces, charset: str) -> AsyncGenerator[tuple[bytes, bool]]:
    """The text of `pieces` in UTF-8, at most PIECE_BYTES at once. Raises Undecodable for what is
    not in the charset."""
    decoder = codecs.getincrementaldecoder(charset)()
    size = PIECE_BYTES // GROWTH
    before = 0  # bytes that were decoded
    async for piece, last in pieces:
        for start in range(0, len(piece) or 1, size):
            part = piece[start : start + size]
            held = len(decoder.getstate()[0])
            ends = last and start + size >= len(piece)
            try:
                text = decoder.decode(part, ends)
            except UnicodeDecodeError as error:
                at = before - held + error.start
                raise Undecodable(f"the text is not {charset} at byte {at}") from None
            except UnicodeError:  # of UTF-16 that may be either
                raise Undecodable(
                    f"the text is {charset} without a byte order mark: send charset=utf-16le or "
                    "utf-16be"
                ) from None
            before += len(part)
            yield text.encode(), ends
            await asyncio.sleep(0)
