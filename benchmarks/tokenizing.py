"""How fast one core tokenizes, beside `tokenizers`, the library whose format the vocabulary has.

    python -m benchmarks.tokenizing --data BOOKS --data CONTRACTS

Documents of each folder's test split, 2 MB of it by default, and texts that are hard to split come
in pieces as the network brings them. Both sides take turns in one process, on one core, timed by
what the process computed, so that what else the machine does matters little. All tokens are
compared. Prints Markdown: medians.
"""

from __future__ import annotations

import argparse
import os

# Read when the library first encodes.
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import tokenizers as hf

from gma.model.config import DEFAULT_CHECKPOINT
from gma.model.tokenizer import Tokenizer, Tokens
from gma.model.training.splits import Splits

Encode = Callable[[str], Tokens]

HARD = {
    "one letter": "a" * 500_000,
    "one space": " " * 500_000,
    "letters without a space": "".join(random.Random(1).choices("etaoinshrdlu", k=500_000)),
    "ideographs, punctuation, no space": "你好。世界。这是一个没有空格的文本。" * 10_000,
    "emoji": "👩\u200d👩\u200d👧🏳️\u200d🌈👍🏽" * 10_000,
    "ASCII at random": "".join(random.Random(2).choices([*map(chr, range(128))], k=500_000)),
}


def streamed(tokenizer: Tokenizer, size: int) -> Encode:
    """What a document's pieces of so many bytes are tokenized by."""

    def encode(text: str) -> Tokens:
        data, stream = text.encode(), tokenizer.stream()
        pieces = (data[start : start + size] for start in range(0, len(data), size))
        return np.concatenate([*map(stream.feed, pieces), stream.finish()])

    return encode


def by_library(library: hf.Tokenizer, size: int) -> Encode:
    """The same by the library, which is spared deciding what is certain: it gets whole words."""

    def encode(text: str) -> Tokens:
        found, start = [np.empty(0, np.int32)], 0
        while start < len(text):
            end = start + size if len(text) - start > size else len(text)
            end = text.rfind(" ", start + 1, end) if end < len(text) else end
            piece = text[start : end if end > start else start + size]
            encoding = library.encode_batch_fast([piece], add_special_tokens=False)[0]
            found.append(np.array(encoding.ids, np.int32))
            start += len(piece)
        return np.concatenate(found)

    return encode


def some(folder: Path, most: float) -> Iterator[str]:
    """Documents of a folder's test split up to so many megabytes."""
    read = 0
    for document in Splits(folder).read("test"):
        if read >= most * 1e6:
            return
        yield document.text
        read += len(document.text.encode())


def rates(sides: Sequence[Encode], texts: Sequence[str], rounds: int) -> list[float]:
    """Bytes a second of each side: the median of so many turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for encode, taken in zip(sides, seconds, strict=True):
            began = time.process_time()
            for text in texts:
                encode(text)
            taken.append(time.process_time() - began)
    size = sum(len(text.encode()) for text in texts)
    return [size / median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_CHECKPOINT / "tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--piece", type=int, default=65_536, help="bytes of a piece")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.tokenizer)
    library = hf.Tokenizer.from_file(str(arguments.tokenizer))
    sides = by_library(library, arguments.piece), streamed(tokenizer, arguments.piece)
    found = {folder.name: [*some(folder, arguments.megabytes)] for folder in arguments.data}
    print("| MB/s a core | `tokenizers` | here | ratio | same tokens |\n|---|---|---|---|---|")
    characters = int(arguments.megabytes * 250_000)
    hard = {name: [text[:characters]] for name, text in HARD.items()}
    for name, texts in (found | hard).items():
        same = all(
            np.array_equal(sides[1](text), library.encode(text, add_special_tokens=False).ids)
            for text in texts
        )
        before, after = rates(sides, texts, arguments.rounds)
        ratio = f"{after / before:.1f}"
        print(f"| {name} | {before / 1e6:.2f} | {after / 1e6:.2f} | {ratio} | {same} |", flush=True)


if __name__ == "__main__":
    main()
