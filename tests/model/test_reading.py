from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.reading import CHUNK, ROWS, Reader, Share, read
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
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    return list(Reader(checkpoint).read(pieces))


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
    shares = list(reader.read([b"\x00" * 5000]))
    assert reader.truncated
    assert sum(share.tokens for share in shares) == CHUNK + 1


def test_max_tokens_that_suffice_truncate_nothing(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint, max_tokens=500)
    assert sum(share.tokens for share in reader.read([b"\x00" * 500])) == 500
    assert not reader.truncated


def test_max_tokens_stops_taking_pieces() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"\x00" * 100

    reader = Reader(small_checkpoint(causal=True), max_tokens=1000)
    assert sum(share.tokens for share in reader.read(endless())) == 1000


def test_shares_come_while_the_document_does() -> None:
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"\x00" * CHUNK

    shares = Reader(small_checkpoint(causal=True)).read(pieces())
    next(shares)
    assert taken <= ROWS + 1


def test_nothing_is_read_of_nothing(checkpoint: Checkpoint) -> None:
    assert shares_of(checkpoint, b"") == []


def test_not_utf8(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotUtf8) as caught:
        shares_of(checkpoint, b"a" * 3000 + b"\xff")
    assert caught.value.offset == 3000
