"""What each part of the scores contributes, and whether the scores can be trusted, at any length.

    python -m benchmarks.parts --data BOOKS

On prefixes of every document of a split: how often the answer is right, the mean score of the
answered label, the same score without the prior, and how often the tokens' own scores and the deep
reading would be right alone. Prints Markdown, each line as soon as it is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoints import BOOKS
from gma.model import weights
from gma.model.reading import read
from gma.model.training.splits import Splits

PREFIXES = (32, 64, 128, 256, 512, 1 << 10, 4 << 10, 16 << 10, 64 << 10, None)
"""Bytes of a document; None for all of it."""

ROWS = 8


def name(prefix: int | None) -> str:
    """How the table calls a prefix."""
    if prefix is None:
        return "whole"
    return f"{prefix} B" if prefix < 1024 else f"{prefix >> 10} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=BOOKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    checkpoint = weights.load(arguments.checkpoint)
    classifier, config = checkpoint.classifier, checkpoint.config
    documents = sorted(
        Splits(arguments.data).read(arguments.split), key=lambda document: len(document.text)
    )
    labels = torch.tensor([config.labels.index(document.label) for document in documents])

    def right(logits: Tensor) -> str:
        return f"{(logits.argmax(1) == labels).float().mean():.3f}"

    def score(logits: Tensor) -> str:
        return f"{logits.softmax(1).max(1).values.mean():.3f}"

    print(f"| prefix ({len(documents)} documents) | right | score | without the prior | ", end="")
    print("own scores alone right | deep reading alone right |\n|---|---|---|---|---|---|")
    for prefix in PREFIXES:
        heads = [d.text.encode()[:prefix].decode(errors="ignore") for d in documents]
        tokens = [torch.from_numpy(checkpoint.tokenizer.encode(head)) for head in heads]
        readings = read(classifier, tokens, rows=ROWS)
        logits = torch.stack([reading.logits for reading in readings])
        counts = torch.tensor([len(each) for each in tokens], dtype=torch.float64)[:, None]
        total = logits * (counts + config.prior_tokens)
        table = classifier.pooling.token.weight.double()
        own = torch.stack([table[each.long()].sum(0) for each in tokens])
        figures = (
            right(logits),
            score(logits),
            score(total / counts),
            right(own),
            right(total - own),
        )
        print(f"| {name(prefix)} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
