"""A mix of texts, and the tokenizer that is learned from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from gma.model.tokenizer import Tokenizer
from gma.model.training.labelled import TEXT_ALONE, LabelledText
from gma.model.training.progress import on_stderr
from gma.model.training.splits import TRAIN, Splits


def learn(
    shares: Sequence[tuple[Path, float]], out: Path, vocab_size: int, text: str = "text"
) -> Path:
    """Write a tokenizer of so many megabytes of each data folder's train split; return its file.

    Raises CorpusError for the first document that is none.
    """
    names = TEXT_ALONE._replace(text=text)
    found = [(Splits(data, names), megabytes * 1e6) for data, megabytes in shares]
    with on_stderr() as progress:
        texts = (text for splits, size in found for text in sample(splits, size, progress))
        tokenizer = Tokenizer.train(texts, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    return out


def sample(splits: Splits, size: float, progress: Progress) -> Iterator[str]:
    """Yield pieces of the train split's texts, about ``size`` bytes in all.

    Every document gives the same share of it, a piece that lies anywhere in it; where there is less
    than ``size``, texts come as often as it takes. The same texts give the same pieces. Raises
    CorpusError for the first document that is none.
    """
    total = sum(len(document.text.encode()) for document in splits.read(TRAIN))
    times, share = divmod(size / total, 1.0)
    bar = progress.add_task(f"sampling {splits.data}, MB", total=round(size / 1e6, 1))
    given = 0
    for document in splits.read(TRAIN):
        for piece in (*[document.text] * int(times), _piece(document, share)):
            yield piece
            given += len(piece.encode())
        progress.update(bar, completed=round(given / 1e6, 1))


def _piece(document: LabelledText, share: float) -> str:
    size = round(len(document.text) * share)
    rng = np.random.default_rng(int.from_bytes(document.digest))
    start = int(rng.integers(len(document.text) - size + 1))
    return document.text[start : start + size]
