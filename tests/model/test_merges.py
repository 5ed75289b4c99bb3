"""The same tokens as the library whose file format this is, for any vocabulary and any text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from gma.model.config import DEFAULT_CHECKPOINT
from gma.model.tokenizer import Tokenizer
from tests.model.test_tokenizer import CHARACTERS, HOSTILE, RUNS, WORDS, every, stream

SHIPPED = DEFAULT_CHECKPOINT / "tokenizer.json"
LARGE = {
    "one letter": "a" * 100_000,
    "one space": " " * 100_000,
    "nul": "\x00" * 50_000,
    "no spaces": "".join(random.Random(1).choices("etaoinshrdlu", k=50_000)),
    "very long words": " ".join("ab" * 5_000 for _ in range(5)),
    "chinese": "".join(map(chr, range(0x4E00, 0x9000))),
    "ideographs and punctuation": "你好，世界。这是一个没有空格的文本！" * 1_000,
    "right to left": "שלום עולם مرحبا بالعالم، ١٢٣ " * 1_000,
    "line ends": "one\r\n\r\n\n\ttwo \r\n" * 2_000,
    "control characters": "".join(random.Random(2).choices([*map(chr, range(128))], k=50_000)),
    "mixed scripts": "".join(map(chr, random.Random(3).choices(range(0x20, 0x3000), k=50_000))),
    "beyond the first plane": "".join(
        map(chr, random.Random(4).choices(range(0x1F000, 0x20100), k=20_000))
    ),
}


class Both:
    """One vocabulary as the service has it, and as the library has it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.library = hf.Tokenizer.from_str(json.dumps(spec))
        self.tokenizer = Tokenizer(hf.Tokenizer.from_str(json.dumps(spec)))

    def assert_same(self, text: str) -> None:
        expected = self.library.encode(text, add_special_tokens=False).ids
        np.testing.assert_array_equal(self.tokenizer.encode(text), expected)


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(json.loads(SHIPPED.read_text()))


@pytest.fixture(scope="module")
def shipped(spec: dict[str, Any]) -> Both:
    return Both(spec)


def merged(spec: dict[str, Any], merges: list[tuple[str, str]], seed: int = 0) -> Both:
    """The single bytes with these merges, ids in any order."""
    letters = [token for token in spec["model"]["vocab"] if len(token) == 1]
    tokens = [*dict.fromkeys([*letters, *map("".join, merges)])]
    random.Random(seed).shuffle(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Both(spec | {"model": spec["model"] | {"vocab": vocabulary, "merges": merges}})


@pytest.mark.parametrize("text", (HOSTILE | LARGE).values(), ids=(HOSTILE | LARGE).keys())
def test_hostile_texts(shipped: Both, text: str) -> None:
    shipped.assert_same(text)
    data = text.encode()
    expected = shipped.tokenizer.encode(data)
    for size in (1_000, 65_536):
        np.testing.assert_array_equal(stream(shipped.tokenizer, every(data, size)), expected)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "docs/training.md", "model/tokenizer.py"])
def test_prose_and_code(shipped: Both, name: str) -> None:
    shipped.assert_same((Path(__file__).parents[2] / name).read_text())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(CHARACTERS + WORDS), st.sampled_from(RUNS))))
def test_any_runs(shipped: Both, runs: list[tuple[str, int]]) -> None:
    shipped.assert_same("".join(character * count for character, count in runs))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text())
def test_any_text(shipped: Both, text: str) -> None:
    shipped.assert_same(text)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    picks=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=5, max_size=40),
    texts=st.lists(st.text("ab", min_size=8, max_size=32), min_size=4, max_size=8),
    seed=st.integers(0, 1 << 16),
)
def test_any_merges(
    spec: dict[str, Any], picks: list[tuple[int, int]], texts: list[str], seed: int
) -> None:
    """Tokens with several merges, some that never come about, and some older than their parts."""
    tokens, merges = ["a", "b"], []
    for left, right in picks:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        if len("".join(pair)) <= 8:
            merges.append(pair)
            tokens.append("".join(pair))
    merges = [*dict.fromkeys(merges)]
    random.Random(seed).shuffle(merges)
    both = merged(spec, merges, seed)
    both.assert_same(" ".join(texts))


def test_a_token_of_two_merges_has_the_rank_of_the_one_that_makes_it(spec: dict[str, Any]) -> None:
    """Alone, abc is always (a, bc); that (ab, c) comes first must not put it before ca."""
    both = merged(spec, [("b", "c"), ("ab", "c"), ("c", "a"), ("bc", "a"), ("a", "bc"), ("a", "b")])
    for text in ("abc", "abca", "aabca", "abcabc", "cabc"):
        both.assert_same(text)


def test_a_token_that_never_comes_about(spec: dict[str, Any]) -> None:
    """Alone, abc is a and bc, though there is a token for it."""
    both = merged(spec, [("b", "c"), ("a", "b"), ("ab", "c")])
    assert len(both.tokenizer.encode("abc")) == 2
    both.assert_same("abc")


def test_every_character_is_of_the_same_kind(spec: dict[str, Any]) -> None:
    """A token for each of four kinds with any next byte: it is there if both are in one word."""
    letters = [token for token in spec["model"]["vocab"] if len(token) == 1]
    both = merged(spec, [(first, second) for first in ("a", "1", ".", "Ċ") for second in letters])
    dense = [
        *range(0x3400),
        *range(0xA000, 0xD800),
        *range(0xF900, 0x17000),
        *range(0x1AFF0, 0x20000),
    ]
    blocks = [
        *range(0x3400, 0xA000, 64),
        *range(0x17000, 0x1AFF0, 16),
        *range(0x20000, 0x110000, 64),
    ]
    looked_at = dense + blocks
    for start in range(0, len(looked_at), 1 << 14):
        few = map(chr, looked_at[start : start + (1 << 14)])
        both.assert_same("".join(f"a{one}\n1{one}\n.{one}\n\n{one}\n" for one in few))


@pytest.mark.parametrize(
    "text",
    ["你好，世界。a1!?", WORDS, "e\u0301👩‍👩‍👧 \r\n\x00\x1c.,;:", "123456a--------=\u3000\n\n  b"],
)
def test_a_stream_cut_anywhere(shipped: Both, text: str) -> None:
    data = (text * 40).encode()
    expected = shipped.tokenizer.encode(data)
    for cut in range(0, len(data), 7):
        pieces = [data[:cut], data[cut:]]
        np.testing.assert_array_equal(stream(shipped.tokenizer, pieces), expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from(CHARACTERS.replace(" ", "")), st.sampled_from(RUNS)),
        min_size=20,
        max_size=60,
    ),
    size=st.sampled_from([300, 700, 5_000]),
)
def test_a_stream_without_spaces(shipped: Both, runs: list[tuple[str, int]], size: int) -> None:
    data = "".join(character * count for character, count in runs).encode()
    expected = shipped.tokenizer.encode(data)
    np.testing.assert_array_equal(stream(shipped.tokenizer, every(data, size)), expected)
