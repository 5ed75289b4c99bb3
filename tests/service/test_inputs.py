"""What POST /v1/documents reads beside plain UTF-8 and JSON."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from gma.service.errors import Undecodable
from gma.service.gateway.document import PIECE_BYTES
from gma.service.http import extraction, files
from gma.service.http.charsets import charset_of, transcoded
from gma.service.http.codings import unpacked
from gma.service.http.media import HTML, PDF, WORD
from tests.service.answers import JSON, PATH, PLAIN, check_evidence, same
from tests.service.asgi import TEXT, Exchange, Service

pytestmark = pytest.mark.anyio

BATCH = "/v1/documents:batch"
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.compress}
CODINGS = [*PACK]


async def post(
    service: Service, body: bytes, kind: str = "text/plain", coding: str = "", query: str = ""
) -> httpx.Response:
    headers = {"content-type": kind, **({"content-encoding": coding} if coding else {})}
    return await service.http.post(PATH + query, content=body, headers=headers)


async def check_refused(
    response: httpx.Response, status: int, error_type: str, *words: str
) -> None:
    told = response.json()
    assert (response.status_code, told["error_type"]) == (status, error_type), told
    assert len(told["error"]) < 300
    for word in words:
        assert word in told["error"]


async def cut(body: bytes, size: int) -> AsyncIterator[tuple[bytes, bool]]:
    for start in range(0, len(body) or 1, size):
        yield body[start : start + size], start + size >= len(body)


async def whole(pieces: Any) -> bytes:
    found = [each async for each in pieces]
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece) <= PIECE_BYTES for piece, _ in found)
    return b"".join(piece for piece, _ in found)


@pytest.mark.parametrize("coding", CODINGS)
class TestCodings:
    async def test_is_read_as_what_is_in_it(self, service: Service, coding: str) -> None:
        plain = await service.classify(TEXT, evidence=True)
        packed = PACK[coding](TEXT.encode())
        response = await post(service, packed, coding=coding, query="?evidence=true")
        assert same(response.json(), plain)
        check_evidence(response.json(), len(TEXT.encode()))
        object_ = json.dumps({"text": TEXT}).encode()
        response = await post(service, PACK[coding](object_), JSON["content-type"], coding.upper())
        assert same(response.json(), plain)

    async def test_cut_at_every_byte(self, service: Service, coding: str) -> None:
        packed = PACK[coding]("Ça va bien, merci".encode())
        headers = {**PLAIN, "content-encoding": coding}
        async with Exchange(service.app, PATH, headers) as exchange:
            for byte in packed:
                exchange.send(bytes([byte]))
            exchange.send(b"", last=True)
            await exchange.head()
            assert same(await exchange.json(), await service.classify("Ça va bien, merci"))

    @pytest.mark.parametrize("size", [1, 7, 100_000])
    async def test_several_members(self, coding: str, size: int) -> None:
        parts = [TEXT.encode(), b"", b"a" * 1_000_000, b"b"]
        packed = b"".join(map(PACK[coding], parts))
        assert await whole(unpacked(cut(packed, size), coding)) == b"".join(parts)

    async def test_every_end_but_the_last_is_too_early(self, coding: str) -> None:
        packed = PACK[coding](b"The sea was calm.")
        for end in range(1, len(packed)):
            with pytest.raises(Undecodable, match=f"ends before its {coding} does"):
                await whole(unpacked(cut(packed[:end], 5), coding))

    async def test_damage_is_never_read(self, coding: str) -> None:
        text = b"The sea was calm, and nobody spoke."
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(text)
        packed = gzip.compress(text) if coding == "gzip" else packed
        harmless = 10 if coding == "gzip" else 0  # name, time and system of gzip's head
        for at in range(harmless, len(packed)):
            wrong = bytearray(packed)
            wrong[at] ^= 0x10
            try:
                found = await whole(unpacked(cut(bytes(wrong), 1000), coding))
            except Undecodable:
                continue
            assert found == text  # what bits in a head say that nobody asks

    @pytest.mark.parametrize("rest", [b"x", b"\0", b"garbage", TEXT.encode()])
    async def test_something_behind_it(self, service: Service, coding: str, rest: bytes) -> None:
        response = await post(service, PACK[coding](b"a") + rest, coding=coding)
        await check_refused(response, 400, "Undecodable", coding)

    @pytest.mark.parametrize("body", [b"plain text", b"\x1f\x8b\x09", b"\x28\xb5\x2f\xfd\xff" * 9])
    async def test_what_is_not_packed(self, service: Service, coding: str, body: bytes) -> None:
        response = await post(service, body, coding=coding)
        await check_refused(response, 400, "Undecodable")

    @pytest.mark.parametrize("body", [b"", None])
    async def test_nothing(self, service: Service, coding: str, body: bytes | None) -> None:
        response = await post(service, PACK[coding](b"") if body is None else body, coding=coding)
        await check_refused(response, 400, "Empty")

    @pytest.mark.parametrize("kind", ["text/plain", "application/json"])
    async def test_the_limit_is_of_what_is_in_it(
        self, checkpoint: Path, coding: str, kind: str
    ) -> None:
        async with Service(checkpoint, max_document_bytes=1000) as service:
            begin = b'{"text": "' if kind == "application/json" else b""
            bomb = PACK[coding](begin + b"a" * 50_000_000)
            response = await post(service, bomb[: len(bomb) // 2], kind, coding)
            if len(bomb) < 2000:
                await check_refused(response, 413, "TooLarge", "1000 bytes")
            assert service.gateway.admission.bytes == 0
            packed = PACK[coding](b"a" * 1000)
            assert (await post(service, packed, coding=coding)).status_code == 200

    async def test_a_bomb_is_counted_while_it_unpacks(self, coding: str) -> None:
        """However little of it has come, there is no more of it than a piece, and little beside."""
        size = 0
        bomb = PACK[coding](bytes(200_000_000))
        async for piece, _ in unpacked(cut(bomb, len(bomb)), coding):
            assert len(piece) <= PIECE_BYTES
            size += len(piece)
            if size > 10_000_000:
                return
        pytest.fail("it ended")

    async def test_members_of_nothing(self, coding: str) -> None:
        assert await whole(unpacked(cut(PACK[coding](b"") * 5000, 2**16), coding)) == b""

    async def test_bytes_in_flight_are_what_is_in_it(self, checkpoint: Path, coding: str) -> None:
        limits = {"max_bytes_in_flight": 1000, "max_document_bytes": 1000}
        async with Service(checkpoint, **limits) as service:
            with service.gateway.admission.admit(600):
                response = await post(service, PACK[coding](b"a" * 401), coding=coding)
                await check_refused(response, 429, "Overloaded")
                packed = PACK[coding](b"a" * 400)
                assert (await post(service, packed, coding=coding)).status_code == 200

    async def test_the_client_leaves(self, service: Service, coding: str) -> None:
        headers = {**PLAIN, "content-encoding": coding}
        async with Exchange(service.app, PATH, headers) as exchange:
            exchange.send(PACK[coding](TEXT.encode())[:-9])
            exchange.leave()
            await exchange.finished()
        assert service.gateway.admission.documents == service.gateway.admission.bytes == 0

    @pytest.mark.parametrize("size", [1, 50, 10_000])
    async def test_of_a_batch(self, service: Service, coding: str, size: int) -> None:
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("a", TEXT, "b"))
        packed = PACK[coding](lines[:20]) + PACK[coding](lines[20:])
        headers = {"content-type": "application/x-ndjson", "content-encoding": coding}
        async with Exchange(service.app, f"{BATCH}?order=input", headers) as exchange:
            for start in range(0, len(packed), size):
                exchange.send(packed[start : start + size])
            exchange.send(b"", last=True)
            await exchange.head()
            answers = [json.loads((await exchange.message())["body"]) for _ in range(3)]
        for answer, text in zip(answers, ("a", TEXT, "b"), strict=True):
            assert same(answer, await service.classify(text))

    async def test_of_a_batch_that_is_damaged(self, service: Service, coding: str) -> None:
        """What came before it is answered."""
        headers = {"content-type": "application/x-ndjson", "content-encoding": coding}
        body = PACK[coding](b'{"text": "a"}\n') + b"garbage"
        response = await service.http.post(BATCH, content=body, headers=headers)
        good, failure = map(json.loads, response.text.splitlines())
        assert good["label"]
        assert (failure["error_type"], failure["status"]) == ("Undecodable", 400)
        assert "line" not in failure
        assert service.gateway.admission.documents == service.gateway.admission.bytes == 0


async def test_a_frame_that_refers_far_back(service: Service) -> None:
    far = zstandard.ZstdCompressionParameters(window_log=24)
    packer = zstandard.ZstdCompressor(compression_params=far).compressobj()
    packed = packer.compress(b"a" * 100) + packer.flush()
    await check_refused(
        await post(service, packed, coding="zstd"), 400, "Undecodable", "window of more than 8 MiB"
    )


async def test_a_frame_to_skip(service: Service) -> None:
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    response = await post(service, skipped + zstandard.compress(b"a"), coding="zstd")
    assert response.json()["usage"]["bytes"] == 1


@pytest.mark.parametrize("coding", ["br", "deflate", "compress", "gzip, gzip", "gzip, zstd", "*"])
async def test_other_codings(service: Service, coding: str) -> None:
    response = await post(service, zlib.compress(b"a"), coding=coding)
    await check_refused(response, 415, "UnsupportedContent", "gzip, zstd or plain bytes")


async def test_sessions_and_other_servers_clients_take_plain_bytes(service: Service) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    body = gzip.compress(b'{"inputs": "a"}')
    response = await service.http.post("/predict", content=body, headers=headers)
    await check_refused(response, 415, "UnsupportedContent")


class TestCharsets:
    @pytest.mark.parametrize(
        ("charset", "text"),
        [
            ("latin-1", "Ça va bien, merci. £5"),
            ("ISO-8859-15", "5 € für Ärger"),
            ("windows-1252", "“quoted” – 5 €"),
            ("windows-1251", "Море было спокойно"),
            ("koi8-r", "Море было спокойно ─┼─"),
            ("utf-16", "漢字 🚢"),
            ("UTF-16LE", "漢字 🚢"),
            ("utf-16be", "漢字 🚢"),
            ("Shift_JIS", "漢字も読める。"),
            ("gb18030", "汉字 🚢"),
            ("big5", "漢字"),
            ("euc-jp", "漢字も読める。"),
            ("euc-kr", "한국어"),
        ],
    )
    async def test_is_read_as_its_text(self, service: Service, charset: str, text: str) -> None:
        answer = await service.classify(text, evidence=True)
        kind, query = f'text/plain; charset="{charset}"', "?evidence=true"
        response = await post(service, text.encode(charset), kind, query=query)
        assert same(response.json(), answer)
        # Offsets are of the UTF-8.
        assert response.json()["evidence"][-1]["end"] == len(text.encode())

    @pytest.mark.parametrize("charset", ["latin-1", "utf-16", "shift_jis", "gb18030", "koi8-r"])
    @pytest.mark.parametrize("size", [1, 2, 3, 10**6])
    async def test_cut_anywhere(self, charset: str, size: int) -> None:
        text = {"latin-1": "Ça", "koi8-r": "─я"}.get(charset, "漢字 a") * 50
        assert await whole(transcoded(cut(text.encode(charset), size), charset)) == text.encode()

    @pytest.mark.parametrize("size", [1, 2, 7])
    @pytest.mark.parametrize(
        ("charset", "body", "at"),
        [
            ("shift_jis", "漢字".encode("shift_jis") + b"\xff", 4),
            ("utf-16-le", b"a\0b\0\x00\xd8c\0", 4),
            ("cp1252", b"abc\x81", 3),
            ("gb18030", b"abc\x81", 3),
        ],
    )
    async def test_what_is_not_in_it(self, charset: str, body: bytes, at: int, size: int) -> None:
        with pytest.raises(Undecodable, match=f"not {charset} at byte {at}"):
            await whole(transcoded(cut(body, size), charset))

    async def test_utf_16_of_either_order(self, service: Service) -> None:
        response = await post(service, "Ça va".encode("utf-16-le"), "text/plain; charset=utf-16")
        await check_refused(response, 400, "Undecodable", "byte order mark", "charset=utf-16le")

    async def test_a_large_one_is_in_pieces(self) -> None:
        text = "─" * 500_000
        body = text.encode("koi8-r")
        assert await whole(transcoded(cut(body, len(body)), "koi8-r")) == text.encode()

    @pytest.mark.parametrize(
        "charset",
        ["utf-7", "hex", "base64", "rot13", "idna", "punycode", "unicode_escape", "iso-2022-jp",
         "latin-99", "utf-32", "../../etc", "x" * 5000, "cp037", "iso-8859-12", "zip", "mbcs"],
    )  # fmt: skip
    async def test_others(self, service: Service, charset: str) -> None:
        assert charset_of(charset) is None
        response = await post(service, b"a", f"text/plain; charset={charset}")
        await check_refused(response, 415, "UnsupportedContent", "send UTF-8")

    async def test_of_json_there_is_one(self, service: Service) -> None:
        body = '{"text": "Ça"}'.encode("latin-1")
        response = await post(service, body, "application/json; charset=latin-1")
        await check_refused(response, 415, "UnsupportedContent", "latin-1")

    async def test_packed_too(self, service: Service) -> None:
        body = gzip.compress("Ça va".encode("utf-16"))
        response = await post(service, body, "text/markdown; charset=utf-16", "gzip")
        assert same(response.json(), await service.classify("Ça va"))

    async def test_the_limit_is_of_the_text(self, checkpoint: Path) -> None:
        async with Service(checkpoint, max_document_bytes=100) as service:
            kind = "text/plain; charset=latin-1"
            assert (await post(service, b"\xe9" * 50, kind)).status_code == 200
            await check_refused(await post(service, b"\xe9" * 51, kind), 413, "TooLarge")
            assert service.gateway.admission.bytes == 0


async def test_markdown_is_a_text(service: Service) -> None:
    text = "# Title\n\n*All* of it is `read`.\n"
    response = await post(service, text.encode(), "text/markdown; charset=utf-8; variant=GFM")
    assert same(response.json(), await service.classify(text))


def text_of(kind: str, body: bytes, charset: str | None = None) -> str:
    """What the process that reads a file would find in it."""
    return "".join(extraction.READERS[kind](body, charset))


def word_file(*paragraphs: str, **tables: list[str]) -> bytes:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    for each in paragraphs:
        document.add_paragraph(each)
    for cells in tables.values():
        table = document.add_table(1, len(cells))
        for cell, text in zip(table.rows[0].cells, cells, strict=True):
            cell.text = text
    document.add_paragraph("The end.")
    document.save(file := io.BytesIO())
    return file.getvalue()


def pdf_file(*pages: str, password: str = "") -> bytes:
    """Pages of one line each, as small as a PDF may be."""
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    named = DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})
    fonts = DictionaryObject({NameObject("/F1"): named})
    for text in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(file := io.BytesIO())
    return file.getvalue()


class TestFiles:
    async def check(self, service: Service, body: bytes, kind: str, text: str, **more: Any) -> None:
        """Check that a file is answered as the text in it is."""
        response = await post(service, body, kind, **more)
        assert response.status_code == 200, response.text
        assert same(response.json(), await service.classify(text))

    def test_html(self) -> None:
        pytest.importorskip("inscriptis")
        page = (
            "<!doctype html><title>no</title><style>p{}</style><script>alert('no')</script>"
            "<!-- no --><p>Ça <b>v</b>a &amp; bien<p hidden>x</p><ul><li>one<li>two</ul>"
            "<table><tr><td>a<td>b</table>"
        )
        text = text_of(HTML, page.encode())
        assert "Ça va & bien" in text
        assert "no" not in text.split()
        assert [word for word in ("one", "two", "a", "b") if word not in text.split()] == []
        for charset in ("utf-16", "latin-1"):
            assert text_of(HTML, page.encode(charset), charset) == text
        own = b"<meta charset=windows-1251><p>" + "Море".encode("cp1251")
        assert "Море" in text_of(HTML, own)
        assert text_of(HTML, b"") == text_of(HTML, b"<!-- -->") == ""

    def test_html_is_read_to_its_end(self) -> None:
        pytest.importorskip("inscriptis")
        page = b"<p>word</p>" * 20_000 + b"<p>end"
        assert text_of(HTML, page).split() == ["word"] * 20_000 + ["end"]

    def test_word(self) -> None:
        text = text_of(WORD, word_file("One.", "Zwei – drei", table=["a", "b"]))
        assert text.split("\n") == ["One.", "Zwei – drei", "a", "b", "The end.", ""]

    def test_pdf(self) -> None:
        assert text_of(PDF, pdf_file("One page.", "And another.")).split("\n") == [
            "One page.",
            "And another.",
            "",
        ]

    async def test_in_a_process(self, service: Service) -> None:
        pytest.importorskip("inscriptis")
        page = b"<p>The sea was calm.</p>"
        text = text_of(HTML, page)
        await self.check(service, page, HTML, text)
        await self.check(
            service, gzip.compress(page), f"{HTML}; charset=utf-8", text, coding="gzip"
        )
        page = "<p>Ça".encode("latin-1")
        await self.check(service, page, f"{HTML}; charset=latin-1", text_of(HTML, "<p>Ça".encode()))
        assert service.gateway.admission.bytes == 0

    async def test_pdf_and_word_in_one(self, service: Service) -> None:
        await self.check(service, pdf_file("One page."), PDF, "One page.\n")
        await self.check(service, word_file("One."), WORD, "One.\nThe end.\n")

    @pytest.mark.parametrize("kind", [PDF, WORD])
    async def test_what_is_none(self, service: Service, kind: str) -> None:
        pytest.importorskip(files.MODULES[kind])
        for body in (b"nothing", b"%PDF-1.7\n", b"PK\x03\x04" + bytes(100)):
            await check_refused(await post(service, body, kind), 400, "Undecodable", kind)
        await check_refused(await post(service, b"", kind), 400, "Undecodable")

    async def test_what_is_cut_off(self, service: Service) -> None:
        body = word_file("One.")
        for end in (1, len(body) // 2, len(body) - 1):
            await check_refused(await post(service, body[:end], WORD), 400, "Undecodable")

    async def test_one_with_a_password(self, service: Service) -> None:
        body = pdf_file("One page.", password="secret")
        await check_refused(await post(service, body, PDF), 400, "Undecodable", "password")

    @pytest.mark.long
    async def test_a_bomb_in_a_file(self, checkpoint: Path) -> None:
        """Its process ends; this one goes on."""
        bomb = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(word_file("One."))) as honest,
            zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            for name in honest.namelist():
                if name != "word/document.xml":
                    archive.writestr(name, honest.read(name))
            with archive.open("word/document.xml", "w", force_zip64=True) as document:
                for _ in range(100):
                    document.write(bytes(extraction.MEMORY_BYTES // 50))
        async with Service(checkpoint) as service:
            response = await post(service, bomb.getvalue(), WORD)
            await check_refused(response, 400, "Undecodable", "memory")
            assert (await service.classify("a"))["label"]

    async def test_the_limit_is_of_the_text_too(self, checkpoint: Path) -> None:
        body = pdf_file(*["word " * 20] * 20)
        async with Service(checkpoint, max_document_bytes=len(body)) as service:
            assert (await post(service, body, PDF)).status_code == 200
        pytest.importorskip("inscriptis")
        page = b"<table>" + b"<tr><td>a<td>" * 30 + b"</table>"
        found = len(text_of(HTML, page).encode())
        limit = max(len(page), found - 1)
        async with Service(checkpoint, max_document_bytes=limit) as service:
            expected = 413 if found > limit else 200
            assert (await post(service, page, HTML)).status_code == expected

    async def test_the_client_leaves(self, service: Service) -> None:
        pytest.importorskip("inscriptis")
        async with Exchange(service.app, PATH, {"content-type": HTML}) as exchange:
            exchange.send(b"<p>a", last=True)
            exchange.leave()
            await exchange.finished()
        assert service.gateway.admission.documents == service.gateway.admission.bytes == 0

    @pytest.mark.parametrize("kind", [HTML, PDF, WORD])
    async def test_without_the_extra(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(files, "find_spec", lambda name: None)
        response = await post(service, b"<p>a", kind)
        words = ("pip install 'gma-service[files]'",)
        await check_refused(response, 415, "UnsupportedContent", *words)
