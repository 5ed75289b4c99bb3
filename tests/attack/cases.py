"""What is sent, byte by byte, and what has to come of it."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field

import zstandard

from gma.service.http.connection import Limits
from tests.attack.honest import DOCUMENT, HONEST, KEY, PROBE, SIZE, head

CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = f"{len(DOCUMENT):x}\r\n".encode() + DOCUMENT + b"\r\n0\r\n"
MEGABYTE = b"x" * 2**20
EXPECTS = "Expect: 100-continue"
QUICK = Limits(head_s=0.2)
OPEN_HEAD = head()[:-2]  # a head to which more can be added


@dataclass(frozen=True)
class Case:
    """What is sent, each segment when the one before has been read, and the answers' statuses.

    Answers of 200 to documents have to be the right ones. A connection that is not closed has to
    answer one more honest document.
    """

    name: str
    segments: tuple[bytes, ...]
    answers: tuple[int, ...]
    error: str = ""  # the last answer's error_type
    closed: bool = False
    ends: bool = False  # the client then closes its sending side
    limits: Limits = field(default_factory=Limits)


def refused(name: str, *segments: bytes, status: int, error: str, before: int = 0) -> Case:
    """A case whose last answer is this error, after so many of 200."""
    return Case(name, segments, (*[200] * before, status), error, closed=True)


SIZES = [
    refused("target without end", b"GET /", *[MEGABYTE] * 4, status=414, error="TargetTooLong"),
    refused(
        "target too long",
        head(path="/" + "a" * 40_000),
        status=414,
        error="TargetTooLong",
    ),
    refused(
        "header without end", OPEN_HEAD + b"A: ", *[MEGABYTE] * 4, status=431, error="HeadTooLarge"
    ),
    refused(
        "header without end, for HEAD",
        b"HEAD / HTTP/1.1\r\nA: ",
        *[MEGABYTE] * 4,
        status=431,
        error="HeadTooLarge",
    ),
    refused(
        "small headers without end",
        OPEN_HEAD,
        *[b"a: b\r\n" * 100_000] * 4,
        status=431,
        error="HeadTooLarge",
    ),
    refused(
        "small headers in one segment",
        head(*["a: b"] * 20_000),
        status=431,
        error="HeadTooLarge",
    ),
    refused("many headers", head(*["a: b"] * 200), status=431, error="HeadTooLarge"),
    Case(
        "a document of many lines",
        (head("Content-Length: 1001") + b"a\n" * 500 + b"\xff",),
        (400,),
        "NotUtf8",
    ),
    refused(
        "trailer without end",
        head(CHUNKED) + CHUNKS + b"a: ",
        *[MEGABYTE] * 4,
        status=431,
        error="HeadTooLarge",
    ),
    refused(
        "trailers in one segment",
        head(CHUNKED) + CHUNKS + b"a: b\r\n" * 20_000 + b"\r\n",
        status=431,
        error="HeadTooLarge",
    ),
    refused(
        "line before a chunk without end",
        head(CHUNKED) + b"1;",
        *[MEGABYTE] * 4,
        status=431,
        error="HeadTooLarge",
    ),
    Case("head of 30 KB", (head(SIZE, "a: " + "b" * 30_000) + DOCUMENT,), (200,)),
    Case(
        "chunks of one byte",
        (head(CHUNKED), b"".join(b"1\r\n%c\r\n" % byte for byte in DOCUMENT), b"0\r\n\r\n"),
        (200,),
    ),
]

FRAMING = [
    refused(
        "length of 5,001 digits", head(f"Content-Length: {'9' * 5001}"), status=400, error="NotHttp"
    ),
    refused("length below none", head("Content-Length: -1"), status=400, error="NotHttp"),
    refused("two lengths", head(SIZE, "Content-Length: 1"), status=400, error="NotHttp"),
    refused("equal lengths", head(SIZE, SIZE) + DOCUMENT, status=400, error="NotHttp"),
    refused("equal lengths in one line", head(f"{SIZE}, 81"), status=400, error="NotHttp"),
    refused("a length that goes on", head(SIZE, " , 1"), status=400, error="NotHttp"),
    Case("length within a value", (head(SIZE, "a: content-length: 1") + DOCUMENT,), (200,)),
    refused(
        "chunks of HTTP/1.0",
        head(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNKS + b"\r\n",
        status=400,
        error="NotHttp",
    ),
    refused("length and chunks", head(SIZE, CHUNKED), status=400, error="NotHttp"),
    refused("chunk size that is none", head(CHUNKED) + b"z\r\n", status=400, error="NotHttp"),
    refused("chunk without its end", head(CHUNKED) + b"1\r\nab", status=400, error="NotHttp"),
    refused(
        "gzip, chunked",
        head("Transfer-Encoding: gzip, chunked"),
        status=501,
        error="UnknownTransferCoding",
    ),
    refused("no host", b"GET /health HTTP/1.1\r\n\r\n", status=400, error="NotHttp"),
    refused("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", status=400, error="NotHttp"),
    refused("TLS", bytes.fromhex("16030100c8010000c40303"), status=400, error="NotHttp"),
    refused(
        "malformed after a request",
        HONEST + b"\x00\xff\r\n\r\n",
        status=400,
        error="NotHttp",
        before=1,
    ),
    refused(
        "malformed in a segment after it",
        HONEST,
        b"{}\r\n\r\n",
        status=400,
        error="NotHttp",
        before=1,
    ),
    Case("two requests in one segment", (HONEST + HONEST,), (200, 200)),
    Case(
        "two requests cut anywhere",
        (*(HONEST[n : n + 1] for n in range(200)), HONEST[200:] + HONEST),
        (200, 200),
    ),
    Case("empty line before a request", (b"\r\n" + HONEST,), (200,)),
    Case("empty line between requests", (HONEST + b"\r\n" + HONEST,), (200, 200)),
    Case("empty line in a segment of its own", (HONEST, b"\r\n", HONEST), (200, 200)),
    Case(
        "target as proxies have it",
        (head(SIZE, path="http://service/v1/documents") + DOCUMENT,),
        (200,),
    ),
]

UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
UPGRADES = [
    Case(f"upgrade to {to}, the body {when}", segments, (200,))
    for to in ("h2c", "foo", "websocket")
    for when, segments in {
        "at once": (head(*UPGRADE, f"Upgrade: {to}", SIZE) + DOCUMENT,),
        "later": (head(*UPGRADE, f"Upgrade: {to}", SIZE), DOCUMENT),
        "in chunks": (head(*UPGRADE, f"Upgrade: {to}", CHUNKED), CHUNKS + b"\r\n"),
    }.items()
] + [
    Case(
        "upgrade, then a request",
        (head(*UPGRADE, "Upgrade: h2c", SIZE) + DOCUMENT + HONEST,),
        (200, 200),
    ),
    Case("connect", (head(method="CONNECT", path="a:1"),), (404,), "NotFound"),
]

TRAILERS = [
    Case(
        "key in a trailer",
        (head(CHUNKED, key=False), CHUNKS + f"Authorization: Bearer {KEY}\r\n\r\n".encode()),
        (401,),
        "Unauthorized",
        closed=True,
    ),
    Case(
        "trailers",
        (head(CHUNKED), CHUNKS + b"x-request-id: other\r\ncontent-type: a/b\r\n\r\n"),
        (200,),
    ),
    *(
        Case(f"trailer {trailer}", (head(CHUNKED), CHUNKS + f"{trailer}\r\n\r\n".encode()), (200,))
        for trailer in (
            "Transfer-Encoding: gzip",
            "Transfer-Encoding: chunked",
            "Content-Length: -1",
            f"{SIZE}\r\nContent-Length: 1",
            "Host: a\r\nHost: b",
        )
    ),
    refused(
        "trailer that is none",
        head(CHUNKED) + CHUNKS + b"POST / HTTP/1.1\r\n\r\n",
        status=400,
        error="NotHttp",
    ),
]

JSON_HEAD = head("Content-Length: 60000000").replace(b"text/plain", b"application/json")
JSONS = [
    refused(f"JSON with {what}", JSON_HEAD, body, status=status, error=error)
    for what, body, status, error in (
        ("an unknown key", b'{"a": 1, ', 422, "Validation"),
        ("a long key", b'{"' + b"a" * 99, 422, "Validation"),
        ("a key twice", b'{"top_k": 1, "top_k": ', 422, "Validation"),
        ("a text twice", b'{"text": "a", "text": "', 422, "Validation"),
        ("an option of another type", b'{"top_k": "' + b"1" * 99, 422, "Validation"),
        ("an option out of range", b'{"top_k": 0, "text": "a', 422, "Validation"),
        ("a text that is a number", b'{"text": 1e400, ', 422, "Validation"),
        ("a list for its text", b'{"text": [', 422, "Validation"),
        ("a list for the object", b"[", 422, "Validation"),
        ("a number without end", b'{"top_k": ' + b"1" * 99, 422, "Validation"),
        ("an escape that is none", b'{"text": "abc\\x', 400, "NotJson"),
        ("half a character", b'{"text": "abc\xc3"', 400, "NotUtf8"),
        ("something behind it", b'{"text": "abc"} {', 400, "NotJson"),
    )
]

UNREAD = [
    Case(f"{error} {how}", (head(*lines, key=key, path=path), *sent), (status,), error, closed=True)
    for status, error, key, path, size in (
        (401, "Unauthorized", False, "/v1/documents", len(DOCUMENT)),
        (404, "NotFound", True, "/nothing", len(DOCUMENT)),
        (413, "TooLarge", True, "/v1/documents", 2**40),
    )
    for how, lines, sent in (
        ("when a body is announced", (f"Content-Length: {size}", EXPECTS), ()),
        ("while a body is sent", (f"Content-Length: {size}",), (DOCUMENT[:9],)),
        ("before a large body", (f"Content-Length: {max(size, 2**23)}",), (MEGABYTE * 8,)),
    )
] + [
    *(
        Case(
            f"{method} of a probe without a key",
            (head(method=method, path="/health", key=False),),
            (405,),
            "MethodNotAllowed",
        )
        for method in ("POST", "DELETE")
    ),
    Case("a body that was asked for", (head(SIZE, EXPECTS), DOCUMENT), (200,)),
]

HALF_CLOSED = [
    Case("request, then no more", (HONEST,), (200,), closed=True, ends=True),
    Case("chunks, then no more", (head(CHUNKED), CHUNKS + b"\r\n"), (200,), closed=True, ends=True),
    Case("requests, then no more", (HONEST * 3,), (200,) * 3, closed=True, ends=True),
    Case("probe, then no more", (PROBE,), (200,), closed=True, ends=True),
    Case(
        "a request and half a body, then no more",
        (HONEST + head(SIZE, key=False) + DOCUMENT[:9],),
        (200,),
        closed=True,
        ends=True,
    ),
    Case("half a body, then no more", (HONEST[:-1],), (), closed=True, ends=True),
    Case("half a head, then no more", (HONEST[:40],), (), closed=True, ends=True),
    Case("nothing, and no more", (), (), closed=True, ends=True),
]

SLOW = [
    Case("nothing", (), (), closed=True, limits=QUICK),
    Case("half a line", (b"POST /v1",), (408,), "Stalled", closed=True, limits=QUICK),
    Case("half a header", (HONEST[:60],), (408,), "Stalled", closed=True, limits=QUICK),
    Case(
        "half a line after a request",
        (PROBE, b"POST"),
        (200, 408),
        "Stalled",
        closed=True,
        limits=QUICK,
    ),
    Case(
        "half a line behind a request",
        (PROBE + b"POST",),
        (200, 408),
        "Stalled",
        closed=True,
        limits=QUICK,
    ),
]

PACKED = gzip.compress(DOCUMENT)
BOMB = zstandard.compress(bytes(70_000_000))
GZIP, ZSTD, LONG = "Content-Encoding: gzip", "Content-Encoding: zstd", "Content-Length: 60000000"
LINE = json.dumps({"text": DOCUMENT.decode()}).encode() + b"\n"


def batch(*lines: str) -> bytes:
    """The head of a batch."""
    return head(*lines, path="/v1/documents:batch").replace(b"text/plain", b"application/x-ndjson")


CODED = [
    Case("gzip", (head(f"Content-Length: {len(PACKED)}", GZIP) + PACKED,), (200,)),
    Case(
        "gzip in chunks of one byte",
        (head(CHUNKED, GZIP), b"".join(b"1\r\n%c\r\n" % byte for byte in PACKED), b"0\r\n\r\n"),
        (200,),
    ),
    Case(
        "gzip that is cut off",
        (head(f"Content-Length: {len(PACKED) - 3}", GZIP) + PACKED[:-3],),
        (400,),
        "Undecodable",
    ),
    refused("a bomb", head(LONG, ZSTD), BOMB, status=413, error="TooLarge"),
    refused("a text for gzip", head(LONG, GZIP), MEGABYTE, status=400, error="Undecodable"),
]

BATCHES = [
    Case("a line", (batch(f"Content-Length: {len(LINE)}") + LINE,), (200,)),
    Case(
        "a line cut anywhere, behind many that are empty",
        (
            batch(CHUNKED),
            *(
                b"1\r\n\n\r\n" * 999,
                *(
                    b"%x\r\n%b\r\n" % (len(each), each)
                    for each in (LINE[:1], LINE[1:99], LINE[99:])
                ),
            ),
            b"0\r\n\r\n",
        ),
        (200,),
    ),
    refused(
        "a line for a text",
        head(LONG, path="/v1/documents:batch"),
        status=415,
        error="UnsupportedContent",
    ),
    refused(
        "a batch that is no gzip", batch(LONG, GZIP), MEGABYTE, status=400, error="Undecodable"
    ),
    refused(
        "a batch and half a head",
        batch(f"Content-Length: {len(LINE)}") + LINE + b"{}\r\n\r\n",
        status=400,
        error="NotHttp",
        before=1,
    ),
]

CASES = [
    *(*SIZES, *FRAMING, *UPGRADES, *TRAILERS, *JSONS, *UNREAD, *HALF_CLOSED, *SLOW),
    *(*CODED, *BATCHES),
]
