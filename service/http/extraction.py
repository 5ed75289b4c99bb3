"""What a process does that reads one file: the file comes by standard input, and its text leaves by
standard output. `gma.service.http.files` starts it, and bounds come first.

    python -m gma.service.http.extraction KIND CHARSET

Nothing of the service is imported here: it would take longer than to read most files.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from io import BytesIO

MEMORY_BYTES = 2**30
SECONDS = 60
"""Of a core. Whoever takes more of either is ended."""

BROKEN, ENCRYPTED, TOO_MUCH = 3, 4, 5
"""Exit statuses, for a file that can't be read, one that has a password, and one that takes more
than MEMORY_BYTES."""


def html(file: bytes, charset: str | None) -> Iterator[str]:
    """The text that a browser would show, roughly as it would lay it out."""
    from inscriptis import Inscriptis
    from lxml.etree import ParserError
    from lxml.html import HTMLParser, fromstring

    encoding: str | None = "utf-8"
    try:
        file = file.decode(charset or "utf-8").encode()
    except UnicodeDecodeError:
        if charset:
            raise
        encoding = None  # as it says itself
    try:
        tree = fromstring(file, parser=HTMLParser(encoding=encoding, huge_tree=True))
    except ParserError:  # there is nothing in it
        return
    yield Inscriptis(tree).get_text()


def pdf(file: bytes, charset: str | None) -> Iterator[str]:
    """The text of each page, in the order in which it was drawn."""
    from pypdf import PdfReader

    reader = PdfReader(BytesIO(file))
    if reader.is_encrypted and not reader.decrypt(""):
        sys.exit(ENCRYPTED)
    for page in reader.pages:
        yield page.extract_text() + "\n"


def word(file: bytes, charset: str | None) -> Iterator[str]:
    """Paragraphs and tables; not what stands in headers, footers, notes and comments."""
    from docx import Document
    from docx.table import Table

    ahead = [Document(BytesIO(file)).iter_inner_content()]
    while ahead:
        block = next(ahead[-1], None)
        if block is None:
            ahead.pop()
        elif isinstance(block, Table):
            ahead += [cell.iter_inner_content() for row in block.rows for cell in row.cells][::-1]
        else:
            yield block.text + "\n"


READERS = {
    "text/html": html,
    "application/pdf": pdf,
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": word,
}


def main(kind: str, charset: str) -> None:
    """The process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    try:
        for text in READERS[kind](sys.stdin.buffer.read(), charset or None):
            sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.buffer.flush()
    except MemoryError:
        sys.exit(TOO_MUCH)
    except BrokenPipeError:  # nobody wants it any more
        sys.exit(1)
    except Exception:  # whatever a reader makes of what is no file of its kind
        sys.exit(BROKEN)


if __name__ == "__main__":
    main(*sys.argv[1:])
