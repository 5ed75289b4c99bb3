from __future__ import annotations

from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import repeat

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.reader import CHUNK, ROWS, Reader, Share, Text, side_by_side
from gma.model.reading import read
from gma.model.tokenizer import NotUtf8, Tokenizer
from gma.model.weights import Checkpoint

TEXT = "The quick brown fox, é 你好 👍, jumps over the lazy dog.\n"


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "bidirectional"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return small_checkpoint(causal=request.param)


def small_checkpoint(*, causal: bool) -> Checkpoint:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(iter([TEXT]), vocab_size=300)
    config = ModelConfig(
        name="small",
        labels=("a", "b", "c"),
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=2,
        heads=2,
        routing_dim=4,
        value_dim=8,
        num_components=4,
        mlp_width=32,
        causal=causal,
    )
    return Checkpoint(config, Classifier(config).eval(), tokenizer, fingerprint="")


def shares_of(checkpoint: Checkpoint, data: bytes, size: int = 1000) -> list[Share]:
    return list(pushed(Reader(checkpoint), cut(data, size)))


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def pushed(reader: Reader, pieces: Iterable[bytes]) -> Iterator[Share]:
    for piece in pieces:
        yield from reader.feed(piece)
    yield from reader.finish()


def logits(shares: list[Share]) -> np.ndarray:
    evidence = np.sum([share.evidence for share in shares], axis=0, dtype=np.float64)
    return np.asarray(evidence / sum(share.weight for share in shares))


@pytest.mark.parametrize(
    "tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, ROWS * CHUNK, ROWS * CHUNK + 1, 3 * ROWS * CHUNK - 7]
)
def test_equals_the_whole_document_in_one_piece(checkpoint: Checkpoint, tokens: int) -> None:
    data = b"\x00" * tokens  # a token each
    (whole,) = read(checkpoint.classifier, [torch.from_numpy(checkpoint.tokenizer.encode(data))])
    shares = shares_of(checkpoint, data)
    np.testing.assert_allclose(logits(shares), whole.logits.numpy(), rtol=1e-4, atol=1e-5)
    assert sum(share.tokens for share in shares) == tokens


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_shares_tile_the_document_however_it_comes(checkpoint: Checkpoint, size: int) -> None:
    data = (TEXT * 20).encode()
    shares = shares_of(checkpoint, data, size)
    assert sum(share.bytes for share in shares) == len(data)
    assert [share.tokens for share in shares[:-1]] == [CHUNK] * (len(shares) - 1)
    np.testing.assert_allclose(logits(shares), logits(shares_of(checkpoint, data)), rtol=1e-6)


def test_max_tokens_reads_the_first_ones(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint, max_tokens=CHUNK + 1)
    shares = list(pushed(reader, [b"\x00" * 5000, b"\x00", b"\xff"]))  # the last is not looked at
    assert reader.text.truncated
    assert sum(share.tokens for share in shares) == CHUNK + 1


def test_max_tokens_that_suffice_truncate_nothing(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint, max_tokens=500)
    assert sum(share.tokens for share in pushed(reader, [b"\x00" * 500])) == 500
    assert not reader.text.truncated


def test_max_tokens_stops_taking_pieces() -> None:
    text = Text(small_checkpoint(causal=True).tokenizer, max_tokens=1000)
    assert sum(map(len, text.rows(repeat(b"\x00" * 100)))) == 1000
    assert text.truncated


def test_shares_come_while_the_document_does() -> None:
    reader = Reader(small_checkpoint(causal=True))
    found = [reader.feed(b"\x00" * CHUNK) for _ in range(ROWS + 1)]
    assert any(found)


def test_what_is_held_back_is_told_and_the_document_goes_on(checkpoint: Checkpoint) -> None:
    data = (TEXT * 60).encode()
    reader, found = Reader(checkpoint), list[Share]()
    for end, piece in enumerate(cut(data, 700), 1):
        found += reader.feed(piece)
        whole = data[: end * 700].decode(errors="ignore").encode()
        so_far = [*found, *reader.rest()]
        assert sum(share.bytes for share in so_far) == len(whole)
        np.testing.assert_allclose(logits(so_far), logits(shares_of(checkpoint, whole)), rtol=1e-5)
    found += reader.finish()
    assert sum(share.bytes for share in found) == len(data)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_byte_order_mark_is_no_text(checkpoint: Checkpoint, size: int) -> None:
    reader = Reader(checkpoint)
    found = list(pushed(reader, cut(BOM_UTF8 + TEXT.encode(), size)))
    np.testing.assert_allclose(logits(found), logits(shares_of(checkpoint, TEXT.encode())))
    assert (reader.text.mark, sum(share.bytes for share in found)) == (3, len(TEXT.encode()))


def test_wrong_bytes_after_a_byte_order_mark(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotUtf8) as caught:
        shares_of(checkpoint, BOM_UTF8 + b"abc\xff")
    assert caught.value.offset == 6


def test_half_a_byte_order_mark(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint)
    assert reader.feed(BOM_UTF8[:2]) == reader.rest() == []
    with pytest.raises(NotUtf8):
        reader.finish()


def test_side_by_side_is_each_alone(checkpoint: Checkpoint) -> None:
    """Lengths from nothing to many steps, more documents than places."""
    lengths = [0, 1, CHUNK, 5 * ROWS * CHUNK + 3, 63, CHUNK + 1, 1000, 2, 3000, 1, 0, 700, 255]
    texts = [(TEXT * (n // 20 + 1)).encode()[:n].decode(errors="ignore").encode() for n in lengths]
    documents = [Text(checkpoint.tokenizer).rows(cut(text, 999)) for text in texts]
    found: dict[int, list[Share]] = defaultdict(list)
    for index, share in side_by_side(checkpoint, documents, count=True):
        found[index].append(share)
    for index, text in enumerate(texts):
        alone = list(pushed(Reader(checkpoint, count=True), [text]))
        assert [share.bytes for share in found[index]] == [share.bytes for share in alone]
        for mine, other in zip(found[index], alone, strict=True):
            np.testing.assert_allclose(mine.evidence, other.evidence, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(mine.usage, other.usage, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_side_by_side_takes_no_more_of_a_document_than_it_reads() -> None:
    checkpoint = small_checkpoint(causal=True)
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"\x00" * CHUNK

    documents = [Text(checkpoint.tokenizer).rows(endless()) for _ in range(3)]
    read = side_by_side(checkpoint, documents)
    for _ in range(4 * ROWS):
        next(read)
    assert taken <= 4 * ROWS + 3 * 2


def test_nothing_is_read_of_nothing(checkpoint: Checkpoint) -> None:
    assert shares_of(checkpoint, b"") == []


def test_not_utf8(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotUtf8) as caught:
        shares_of(checkpoint, b"a" * 3000 + b"\xff")
    assert caught.value.offset == 3000
