"""Every document of a split through a running service: how many are right, and how fast.

    GMA_CHECKPOINT=model/checkpoints/books make serve
    python -m benchmarks.books --data BOOKS

Each body is sent chunked, in pieces that end anywhere. Prints one line.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from gma.model.training.labelled import LabelledText
from gma.model.training.splits import Splits

PIECE_BYTES = 10_007


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


async def is_right(client: httpx.AsyncClient, url: str, document: LabelledText) -> bool:
    """Whether the answer is the document's label.

    Raises ValueError, or httpx's HTTPError, unless all of the document was read.
    """
    body = document.text.encode()
    headers = {"Content-Type": "text/plain"}
    response = await client.post(url, content=pieces(body), headers=headers, params={"top_k": 1})
    answer = response.raise_for_status().json()
    if answer["usage"]["bytes"] != len(body):
        raise ValueError(f"{document.where}: {answer['usage']} of {len(body)} bytes")
    return bool(answer["label"] == document.label)


async def run(documents: list[LabelledText], url: str, at_once: int) -> None:
    """Send the documents, so many at a time, and print what came of it."""
    places = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(document: LabelledText) -> bool:
            async with places:
                return await is_right(client, url, document)

        began = time.monotonic()
        right = sum(await asyncio.gather(*map(one, documents)))
        seconds = time.monotonic() - began
    size = sum(len(document.text.encode()) for document in documents)
    print(
        f"{right} of {len(documents)} right ({right / len(documents):.3f}); "
        f"{size / 1e6:.1f} MB, {at_once} documents at a time: {size / 1e3 / seconds:.0f} KB/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--documents", type=int, help="so many only, the first")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1/documents")
    arguments = parser.parse_args()
    documents = list(Splits(arguments.data).read(arguments.split))[: arguments.documents]
    asyncio.run(run(documents, arguments.url, arguments.at_once))


if __name__ == "__main__":
    main()
