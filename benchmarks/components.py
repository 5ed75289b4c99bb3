"""Which mixture components follow which kinds of tokens, in documents that did not choose them.

    python -m benchmarks.components model/checkpoints/contracts --data CONTRACTS

A component takes some of every token, its responsibility for the token's key. Of a kind of tokens,
such as digits, two numbers count: how much of what a component takes is of the kind, and how much
of the kind it takes; F is their harmonic mean. The component with the highest F in one half of the
documents is told with its numbers in the other half, and so is the purest of those that take a
hundredth of all tokens. Beside them: the F of a component drawn at random, and of the best one,
chosen and told in the same way, where the kinds are moved along by half the document, and in a
model that was never trained. Prints Markdown.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.random_models import random_classifier
from benchmarks.timing import markdown
from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.layers import Layer
from gma.model.ops.chunked import Rows, responsibilities
from gma.model.reader import CHUNK
from gma.model.tokenizer import Tokenizer
from gma.model.training.splits import Splits

KINDS = {
    "punctuation": rb"[!-/:-@[-`{-~]+",
    "digits": rb"\d+",
    "capitalised words": rb"\b[A-Z][a-z]+",
    "words in capitals": rb"\b[A-Z]{2,}\b",
    "line breaks": rb"\n+",
    "lines in capitals": rb"(?m)^(?=.{1,80}$)[^a-z\n]*[A-Z]{2}[^a-z\n]*$",
    "section numbers": rb"\b\d+(?:\.\d+)+\b|\((?:[a-z]|[ivx]+|\d+)\)",
    "within quotation marks": rb'"((?:[^"\n]|\n(?!\n))*)(?:"|\n\n)',
    "*shall*": rb"(?i)\bshall\b",
    "*the, a, an, of, to, in, and, or*": rb"(?i)\b(?:the|an?|of|to|in|and|or)\b",
    "*he, she, him, his, her, they, them, their*": rb"(?i)\b(?:s?he|him|his|her|they|them|their)\b",
}
"""Kinds of tokens: those that a match overlaps, or its first group if there is one."""

MOST_TOKENS = 4096
"""Of a document; the first ones."""

LEAST_TAKEN = 0.01
"""Of all tokens, by a component that may be called the purest."""


class Counts(NamedTuple):
    """Sums over tokens of documents. G kinds, A components of all heads and layers."""

    both: NDArray[np.float64]  # (G, A): what components take of each kind
    taken: NDArray[np.float64]  # (A,): what they take of all
    kinds: NDArray[np.float64]  # (G,): tokens of each kind
    tokens: int

    def add(self, other: Counts) -> Counts:
        return Counts(*(mine + more for mine, more in zip(self, other, strict=True)))

    @property
    def purity(self) -> NDArray[np.float64]:
        """(G, A): how much of what a component takes is of the kind."""
        return self.both / np.maximum(self.taken, 1e-9)

    @property
    def cover(self) -> NDArray[np.float64]:
        """(G, A): how much of the kind a component takes."""
        return self.both / np.maximum(self.kinds, 1)[:, None]

    @property
    def f(self) -> NDArray[np.float64]:
        """(G, A): the harmonic mean of both."""
        return 2 * self.both / np.maximum(self.taken + self.kinds[:, None], 1e-9)


def marks(text: bytes, sizes: NDArray[np.integer]) -> NDArray[np.float32]:
    """Which of a text's tokens, of so many bytes each (N,), are of which kind: (G, N)."""
    starts = np.cumsum(sizes) - sizes
    found = np.zeros((len(KINDS), len(sizes)), np.float32)
    for row, pattern in zip(found, KINDS.values(), strict=True):
        matching = re.compile(pattern)
        for match in matching.finditer(text):
            start, end = match.span(matching.groups)
            first = np.searchsorted(starts, start, side="right") - 1
            row[first : np.searchsorted(starts, end, side="left")] = 1
    return found


@torch.inference_mode()
def routed(classifier: Classifier, tokens: Tensor) -> Tensor:
    """What each component takes of each token of a document's beginning, (N,) ids: (N, A)."""
    pieces = torch.split(tokens, CHUNK)
    grid = torch.nn.utils.rnn.pad_sequence([*pieces], batch_first=True)
    lengths = torch.tensor([len(piece) for piece in pieces])
    rows = Rows.of(lengths, torch.zeros_like(lengths), grid.shape[1], classifier.dtype)
    states = classifier.new_states(len(lengths))
    x = classifier.embedding(grid)
    found = []
    for index, layer in enumerate(classifier.layers):
        assert isinstance(layer, Layer)
        tail = states.tail[:, index]
        mixer = layer.mixer
        (keys,) = mixer.projected(layer.convolve(x, tail, rows)[0], mixer.keys)
        gamma = responsibilities(
            keys, mixer.mixture.coefficients(), normalize=classifier.config.normalize_routing
        )
        found.append(gamma.transpose(1, 2)[rows.valid].flatten(1))
        x, *_ = layer(x, states.memory[:, index], states.mass[:, index], tail, rows)
    return torch.cat(found, 1)


def counted(kinds: NDArray[np.float32], gamma: NDArray[np.float32]) -> Counts:
    """The sums of one document's tokens: kinds (G, N), and what components take of each (N, A)."""
    return Counts(
        (kinds @ gamma).astype(np.float64),
        gamma.sum(0, dtype=np.float64),
        kinds.sum(1, dtype=np.float64),
        len(gamma),
    )


class Halves(NamedTuple):
    """Counts of every second document, and of the others."""

    first: Counts
    second: Counts

    @classmethod
    def of(cls, counts: Sequence[Counts]) -> Halves:
        return cls(reduce(Counts.add, counts[::2]), reduce(Counts.add, counts[1::2]))


def halves(
    classifier: Classifier, tokenizer: Tokenizer, texts: Sequence[bytes]
) -> tuple[Halves, Halves]:
    """What components take of the texts' kinds of tokens; and of the same kinds, moved along by
    half of a text's tokens."""
    counts, moved = [], []
    for text in texts:
        tokens = tokenizer.encode(text)[:MOST_TOKENS]
        kinds = marks(text, tokenizer.byte_lengths[tokens])
        gamma = routed(classifier, torch.from_numpy(tokens).long()).numpy()
        counts.append(counted(kinds, gamma))
        moved.append(counted(np.roll(kinds, len(tokens) // 2, axis=1), gamma))
    return Halves.of(counts), Halves.of(moved)


def best(chosen_in: Counts, told_in: Counts) -> NDArray[np.float64]:
    """(G,): F in one half of the components that have the highest in the other."""
    at = chosen_in.f.argmax(1)
    f: NDArray[np.float64] = told_in.f[np.arange(len(at)), at]
    return f


def name_of(component: int, classifier: Classifier) -> str:
    """Layer, head and component, as the page numbers them: from 1 on."""
    heads, components = classifier.config.heads, classifier.config.num_components
    layer, rest = divmod(component, heads * components)
    head, index = divmod(rest, components)
    return f"{layer + 1}.{head + 1}.{index + 1}"


def table(
    classifier: Classifier,
    counts: Halves,
    moved: Halves,
    untrained: Halves,
) -> str:
    """What the components that follow each kind most do, as Markdown."""
    chosen_in, told_in = counts
    at = chosen_in.f.argmax(1)
    taken = chosen_in.taken >= LEAST_TAKEN * chosen_in.tokens
    purest = np.where(taken, chosen_in.purity, 0).argmax(1)
    rows = []
    for kind, name in enumerate(KINDS):
        if not (chosen_in.kinds[kind] and told_in.kinds[kind]):
            continue
        component = at[kind]
        base = told_in.kinds[kind] / told_in.tokens

        def purity(component: int, kind: int = kind, base: float = base) -> str:
            share = told_in.purity[kind, component]
            return f"{share:.0%}, {share / base:.1f} times"

        rows.append(
            [
                name,
                f"{base:.1%}",
                name_of(int(component), classifier),
                f"{told_in.taken[component] / told_in.tokens:.1%}",
                purity(component),
                f"{told_in.cover[kind, component]:.0%}",
                f"{told_in.f[kind, component]:.2f}",
                f"{told_in.f[kind].mean():.2f}",
                f"{best(*moved)[kind]:.2f}",
                f"{best(*untrained)[kind]:.2f}",
                f"{name_of(int(purest[kind]), classifier)}: {purity(purest[kind])}",
            ]
        )
    return markdown(
        [
            "kind",
            "of all tokens",
            "component",
            "takes of all tokens",
            "of what it takes, of the kind",
            "takes of the kind",
            "F",
            "F of any, on average",
            "best, kinds moved",
            "best, untrained",
            "the purest",
        ],
        rows,
    )


def in_use(counts: Halves, classifier: Classifier) -> str:
    """In each head as many components as would be if all took as much, as Markdown."""
    config = classifier.config
    taken = reduce(Counts.add, counts).taken.reshape(config.layers, config.heads, -1)
    shares = np.maximum(taken / taken.sum(-1, keepdims=True), 1e-12)
    effective = np.exp(-(shares * np.log(shares)).sum(-1))
    header = ["in use, of " + str(config.num_components)]
    header += [f"head {head + 1}" for head in range(config.heads)]
    rows = [
        [f"layer {layer + 1}", *(f"{each:.1f}" for each in heads)]
        for layer, heads in enumerate(effective)
    ]
    return markdown(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--documents", type=int, default=60, help="the first so many")
    arguments = parser.parse_args(argv)
    loaded = weights.load(arguments.checkpoint)
    classifier, tokenizer = loaded.classifier, loaded.tokenizer
    read = islice(Splits(arguments.data).read(arguments.split), arguments.documents)
    texts = [document.text.encode() for document in read]
    counts, moved = halves(classifier, tokenizer, texts)
    untrained, _ = halves(random_classifier(loaded.config), tokenizer, texts)
    tokens = sum(half.tokens for half in counts)
    print(f"{loaded.config.name}: {len(texts)} documents of {arguments.split}, {tokens:,} tokens\n")
    print(table(classifier, counts, moved, untrained))
    print(in_use(counts, classifier))


if __name__ == "__main__":
    main()
