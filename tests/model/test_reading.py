from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.reading import CHUNK, ROWS, Reader, Span
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


def read(checkpoint: Checkpoint, data: bytes, size: int = 1000) -> list[Span]:
    pieces = (data[start : start + size] for start in range(0, len(data), size))
    return list(Reader(checkpoint).read(pieces))


def logits(spans: list[Span]) -> np.ndarray:
    evidence = np.sum([span.evidence for span in spans], axis=0, dtype=np.float64)
    return np.asarray(evidence / sum(span.weight for span in spans))


@pytest.mark.parametrize(
    "tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, ROWS * CHUNK, ROWS * CHUNK + 1, 3 * ROWS * CHUNK - 7]
)
def test_equals_the_whole_document_in_one_piece(checkpoint: Checkpoint, tokens: int) -> None:
    data = b"\x00" * tokens  # a token each
    (whole,) = checkpoint.classifier.read([torch.from_numpy(checkpoint.tokenizer.encode(data))])
    spans = read(checkpoint, data)
    np.testing.assert_allclose(logits(spans), whole.logits.numpy(), rtol=1e-4, atol=1e-5)
    assert sum(span.tokens for span in spans) == tokens


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_spans_tile_the_document_however_it_comes(checkpoint: Checkpoint, size: int) -> None:
    data = (TEXT * 20).encode()
    spans = read(checkpoint, data, size)
    assert sum(span.bytes for span in spans) == len(data)
    assert [span.tokens for span in spans[:-1]] == [CHUNK] * (len(spans) - 1)
    np.testing.assert_allclose(logits(spans), logits(read(checkpoint, data)), rtol=1e-6)


def test_max_tokens_reads_the_first_ones(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint, max_tokens=CHUNK + 1)
    spans = list(reader.read([b"\x00" * 5000]))
    assert reader.truncated
    assert sum(span.tokens for span in spans) == CHUNK + 1


def test_max_tokens_that_suffice_truncate_nothing(checkpoint: Checkpoint) -> None:
    reader = Reader(checkpoint, max_tokens=500)
    assert sum(span.tokens for span in reader.read([b"\x00" * 500])) == 500
    assert not reader.truncated


def test_max_tokens_stops_taking_pieces() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"\x00" * 100

    reader = Reader(small_checkpoint(causal=True), max_tokens=1000)
    assert sum(span.tokens for span in reader.read(endless())) == 1000


def test_spans_come_while_the_document_does() -> None:
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"\x00" * CHUNK

    spans = Reader(small_checkpoint(causal=True)).read(pieces())
    next(spans)
    assert taken <= ROWS + 1


def test_nothing_is_read_of_nothing(checkpoint: Checkpoint) -> None:
    assert read(checkpoint, b"") == []


def test_not_utf8(checkpoint: Checkpoint) -> None:
    with pytest.raises(NotUtf8) as caught:
        read(checkpoint, b"a" * 3000 + b"\xff")
    assert caught.value.offset == 3000
