"""Data that teach a model what has none of its labels.

    python -m benchmarks.with_prose CONTRACTS PROSE OUT BOOKS

OUT gets the documents of CONTRACTS, and some of PROSE with an empty list of labels: a passage of
each of so many books to train on, and other books, whole, for the choices that valid decides.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from gma.model.training.splits import TRAIN, VALID, Splits

PASSAGE = 128 << 10
"""Bytes of a book to train on, of its second third: a crop is of a book as often as of a contract,
so more would add nothing."""


def main(contracts: Path, prose: Path, out: Path, count: int) -> None:
    shutil.copytree(contracts, out)
    books = [document.text for document in Splits(prose).read(TRAIN)]
    valid = [document.text for document in Splits(prose).read(VALID)]
    write(out / f"{TRAIN}-0.jsonl", map(passage, books[::4][:count]))
    write(out / f"{VALID}-0.jsonl", [*books[2::24], *valid])


def passage(book: str) -> str:
    text = book.encode()
    return text[len(text) // 3 :][:PASSAGE].decode(errors="ignore")


def write(file: Path, texts: Iterable[str]) -> None:
    lines = (json.dumps({"text": text, "labels": []}) + "\n" for text in texts)
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    contracts, prose, out, count = sys.argv[1:]
    main(Path(contracts), Path(prose), Path(out), int(count))
