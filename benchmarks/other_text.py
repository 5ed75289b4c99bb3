"""Text that is not English prose, for tokenizers to learn from: code, and many languages' messages.

    pip download --no-deps -d wheels django==5.2.19 wagtail==8.0.1 \\
        django-oscar==4.2.1 apache-superset==6.1.0
    python -m benchmarks.other_text --wheels wheels --out other

writes ``other/code/train.jsonl``, the modules of Python's standard library, and
``other/messages/train.jsonl``, translated messages of the wheels, many to a document, which the
packages' licences (BSD, and Apache 2.0 for Superset) let anybody use. What a language has little of
is repeated, `MOST` times at most, so that each counts alike.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sysconfig
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

MESSAGES = re.compile(r"/(?:locale|translations)/(\w+)/LC_MESSAGES/\w+\.mo$")
"""Files of translated messages in a wheel."""

ALIKE = "en", "en_AU", "en_GB"
"""Languages that other texts have enough of."""

LEAST = 200_000
"""Characters that a language has at least, if that takes no more than `MOST` repetitions."""

MOST = 8

TOGETHER = 100
"""Messages of a document: some of every language are left when documents are drawn for valid."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder of wheels")
    parser.add_argument("--out", type=Path, required=True, help="folder for both")
    given = parser.parse_args()
    _write(given.out / "code", code())
    _write(given.out / "messages", messages(sorted(given.wheels.glob("*.whl"))))


def code() -> Iterator[str]:
    """Yield the modules of Python's standard library, but its tests."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts):
            yield file.read_bytes().decode(errors="ignore")


def messages(wheels: Iterable[Path]) -> Iterator[str]:
    """Yield texts in each language that the wheels' messages are translated to."""
    languages: defaultdict[str, list[str]] = defaultdict(list)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            for name in sorted(opened.namelist()):
                found = MESSAGES.search(name)
                if found and found[1] not in ALIKE:
                    languages[found[1]] += translated(opened.read(name))
    for _, lines in sorted(languages.items()):
        distinct = [*dict.fromkeys(lines)]
        times = min(MOST, -(-LEAST // (sum(map(len, distinct)) + 1)))
        for start in range(0, len(distinct), TOGETHER):
            yield from ["\n".join(distinct[start : start + TOGETHER])] * times


def translated(catalog: bytes) -> Iterator[str]:
    """Yield the translations in a GNU ``.mo`` file: its table of lengths and offsets is told in
    https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html."""
    order = "<" if catalog[:4] == b"\xde\x12\x04\x95" else ">"
    count, _, table = struct.unpack_from(f"{order}3I", catalog, 8)
    for index in range(1, count):  # the first is the file's own header
        length, start = struct.unpack_from(f"{order}2I", catalog, table + 8 * index)
        yield from catalog[start : start + length].decode().split("\0")


def _write(folder: Path, texts: Iterable[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as file:
        for text in texts:
            if text.strip():
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
