"""Send the largest bodies that are taken, many at once, and tell what memory gateways take of it.

    python -m tests.attack.bodies

starts `gma serve`; ends with status 1 if gateways have grown by more than a twentieth in the end.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from gma.service.gateway.gateway import GIVE_BACK_S
from tests.attack.kills import serving

BODY_BYTES = 60_000_000
PIECE = 1 << 16
AT_ONCE = 16
MOST_GROWN = 1.05


def gateways(url: str) -> dict[str, int]:
    """The resident bytes of each gateway's process."""
    lines = httpx.get(f"{url}/metrics", timeout=60, trust_env=False).text.splitlines()
    return {
        line.partition('pid="')[2].partition('"')[0]: int(float(line.rsplit(" ", 1)[1]))
        for line in lines
        if line.startswith("gma_resident_memory_bytes{") and 'role="gateway"' in line
    }


def text() -> Iterator[bytes]:
    """A body in chunks, of words."""
    piece = (b"The sea was calm, and nobody thought of it. " * (PIECE // 44 + 1))[:PIECE]
    for _ in range(BODY_BYTES // PIECE):
        yield piece


def escaped() -> Iterator[bytes]:
    """A body in chunks, of JSON whose every character is escaped."""
    yield b'{"max_tokens": 64, "text": "'
    piece = b"\\u0061" * (PIECE // 6)
    for _ in range(BODY_BYTES // len(piece) - 1):
        yield piece
    yield b'"}'


def packed() -> Iterator[bytes]:
    """The first, in gzip: of that there is a hundredth."""
    packing = zlib.compressobj(wbits=31)
    for piece in text():
        yield packing.compress(piece)
    yield packing.flush()


def lines() -> Iterator[bytes]:
    """A batch in chunks, of lines of a megabyte: no more of them than are read without an answer
    being taken."""
    for _ in range(BODY_BYTES // 2**20):
        yield b'{"text": "'
        for _ in range(2**20 // PIECE):
            yield b"a tale. " * (PIECE // 8)
        yield b'"}\n'


def send(url: str, kind: str) -> int:
    """The status of one such document, or batch, of which few tokens are read."""
    body, type_, route = {
        "text": (text, "text/plain", "/v1/documents"),
        "escaped": (escaped, "application/json", "/v1/documents"),
        "packed": (packed, "text/plain", "/v1/documents"),
        "lines": (lines, "application/x-ndjson", "/v1/documents:batch"),
    }[kind]
    headers = {"content-type": type_, **({"content-encoding": "gzip"} if kind == "packed" else {})}
    address = f"{url}{route}" + ("" if kind == "escaped" else "?max_tokens=64")
    try:
        with httpx.Client(timeout=120, trust_env=False) as client:
            return client.post(address, content=body(), headers=headers).status_code
    except httpx.TransportError:
        return 0  # refused before the body was sent, and closed


def watched(url: str, kind: str, count: int) -> tuple[Counter[int], int]:
    """What became of so many documents, and the most that a gateway took meanwhile."""
    most = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sent = [pool.submit(send, url, kind) for _ in range(count)]
        while not all(each.done() for each in sent):
            most = max(most, *gateways(url).values())
            time.sleep(0.5)
    return Counter(each.result() for each in sent), most


def small(url: str, count: int = 200) -> None:
    """So many documents of a few words, on connections of their own."""
    for _ in range(count):
        httpx.post(f"{url}/v1/documents", content="Call me Ishmael.",
                   headers={"content-type": "text/plain"}, timeout=60,
                   trust_env=False).raise_for_status()  # fmt: skip


def main() -> int:
    """The command."""
    with TemporaryDirectory(prefix="b-", dir="/tmp") as temporary, serving(Path(temporary)) as url:
        small(url)
        before = gateways(url)
        report: dict[str, object] = {"before_mb": [x // 10**6 for x in before.values()]}
        for kind, count in (("text", 60), ("escaped", 8), ("packed", 30), ("lines", 30)):
            outcomes, most = watched(url, kind, count)
            report[kind] = {"statuses": dict(outcomes), "most_mb": most // 10**6}
        time.sleep(3 * GIVE_BACK_S)
        after = gateways(url)
        grown = sum(after.values()) / sum(before.values())
        report |= {"after_mb": [x // 10**6 for x in after.values()], "grown": round(grown, 3)}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return int(grown > MOST_GROWN or before.keys() != after.keys())


if __name__ == "__main__":
    sys.exit(main())
