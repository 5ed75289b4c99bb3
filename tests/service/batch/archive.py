"""Archives of made-up texts, and the answers to them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from tests.service.asgi import TEXT

PART_BYTES = 4000
"""So small that an archive has several parts."""


def texts(count: int) -> list[str]:
    """Texts of which each is another; short ones, and a few that are long."""
    return [f"{n}. {TEXT * (60 if n % 11 == 5 else 1 + n % 3)}" for n in range(count)]


def write_jsonl(file: Path, rows: Iterable[object]) -> Path:
    """Objects; bytes are lines as they are."""
    lines = (
        x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode() for x in rows
    )
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened, delimiter="\t" if file.suffix == ".tsv" else ",")
        table.writerows([header, *rows])
    return file


def answers(out: Path) -> list[dict[str, Any]]:
    """All rows, part by part."""
    found: list[dict[str, Any]] = []
    for part in sorted(out.glob("part-*")):
        if part.suffix == ".jsonl":
            found += map(json.loads, part.read_text(encoding="utf-8").splitlines())
        else:
            found += parquet.read_table(part).to_pylist()
    return found


def by_id(out: Path) -> dict[str, dict[str, Any]]:
    """All rows by id. Raises AssertionError if two have the same."""
    rows = answers(out)
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found
