"""What is sent: documents of a JSON Lines file, excerpts of them, or made-up text."""

from __future__ import annotations

import io
import json
import random
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import zstandard

from gma.loadtest.lengths import Lengths, lengths

MADE_UP_BYTES = 1 << 20
VOCABULARY = 5_000
BETWEEN = b"\n\n"


class Corpus:
    """Documents by number. The same number, seed and source are the same document anywhere."""

    def __init__(self, texts: list[bytes], drawn: Lengths | None, seed: int = 0) -> None:
        """Excerpts have the lengths `drawn`, and run on into the next text; None sends texts whole.

        Raises ValueError if there is no text.
        """
        if not any(texts):
            raise ValueError("the corpus has no text")
        self._texts = [text for text in texts if text]
        self._joined = b"" if drawn is None else BETWEEN.join(self._texts) + BETWEEN
        self._lengths = drawn
        self._seed = seed

    @classmethod
    def load(cls, file: Path | None, form: str | None, seed: int = 0) -> Corpus:
        """Read a .jsonl or .jsonl.zst with a `text` in each line; without a file, make text up.

        `form` says the lengths of excerpts, as `gma.loadtest.lengths` takes it. Raises OSError, and
        ValueError for a file of another kind, or for made-up text without lengths.
        """
        drawn = None if form is None else lengths(form)
        if file is None:
            if drawn is None:
                raise ValueError("made-up documents need lengths, for example --lengths mixed")
            return cls([made_up(MADE_UP_BYTES, random.Random(seed))], drawn, seed)  # noqa: S311
        return cls(list(read(file)), drawn, seed)

    def document(self, number: int) -> bytes:
        """UTF-8 that is never empty; up to 3 bytes longer than drawn, to end with a character."""
        rng = random.Random(f"{self._seed} {number}")  # noqa: S311
        if self._lengths is None:
            return self._texts[number % len(self._texts)]
        size = self._lengths(rng)
        start = self._joined.find(b" ", rng.randrange(len(self._joined))) + 1
        return self._cut(start, size)

    def _cut(self, start: int, size: int) -> bytes:
        """Text from a character's beginning, over the corpus's end as often as it takes."""
        whole = len(self._joined)
        rounds = (start + size + 3) // whole + 1
        around = self._joined if rounds == 1 else self._joined * rounds
        end = start + size
        while around[end] & 0xC0 == 0x80:  # inside a character
            end += 1
        return around[start:end]


def read(file: Path) -> Iterator[bytes]:
    """Yield the texts of a JSON Lines file. Raises OSError, and ValueError naming the line."""
    with file.open("rb") as opened:
        zipped = file.suffix == ".zst"
        stream = zstandard.ZstdDecompressor().stream_reader(opened) if zipped else opened
        for number, line in enumerate(_lines(stream, file), 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{file}, line {number}: no JSON object with a "text"')
            yield text.encode()


def _lines(stream: BinaryIO, file: Path) -> Iterator[str]:
    try:
        yield from io.TextIOWrapper(stream, "utf-8")
    except (UnicodeDecodeError, zstandard.ZstdError) as error:
        raise ValueError(f"{file}: {error}") from error


def made_up(size: int, rng: random.Random) -> bytes:
    """About `size` bytes of words that don't exist, few of them often and most of them seldom."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(VOCABULARY)]
    cumulative = list(accumulate(1 / (rank + 1) for rank in range(VOCABULARY)))
    parts: list[str] = []
    length = 0
    while length < size:
        word = words[bisect(cumulative, rng.random() * cumulative[-1])]
        parts.append(word)
        length += len(word) + 1
    return " ".join(parts).encode()
