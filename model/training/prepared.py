"""What a run reads: documents as token ids, with the tokenizer that was trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gma.model.tokenizer import Tokenizer
from gma.model.training import corpus
from gma.model.training.corpus import Corpus
from gma.model.training.errors import TrainingError

SPLITS = "train", "valid"


@dataclass(frozen=True)
class Prepared:
    """What training reads: made once from the documents, kept in the run's folder."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    train: Corpus
    valid: Corpus

    @classmethod
    def make(cls, data: Path, out: Path, vocab_size: int) -> Prepared:
        """Train a tokenizer on the train split, encode both splits, and keep them in ``out``.

        What is there already is taken if it was made of the same files and for the same size.
        """
        splits = {split: corpus.files_of(data, split) for split in SPLITS}
        files = {file.name: file.stat().st_size for found in splits.values() for file in found}
        source = json.dumps({"vocab_size": vocab_size, "bytes": files}, indent=2)
        complete = out / "source.json"
        if complete.is_file() and complete.read_text() == source:
            return cls.load(out)
        complete.unlink(missing_ok=True)
        labels = tuple(sorted({document.label for document in corpus.read(data, "train")}))
        if len(labels) < 2:
            raise TrainingError(f"{data}: the train split has no label but {labels[0]!r}")
        tokenizer = Tokenizer.train((d.text for d in corpus.read(data, "train")), vocab_size)
        # Valid first: it is the smaller, and a label that it alone has is an error.
        valid = Corpus.encode(corpus.read(data, "valid"), tokenizer, labels)
        train = Corpus.encode(corpus.read(data, "train"), tokenizer, labels)
        out.mkdir(parents=True, exist_ok=True)
        train.save(out / "train.npz")
        valid.save(out / "valid.npz")
        tokenizer.save(out / "tokenizer.json")
        (out / "labels.json").write_text(json.dumps(labels))
        complete.write_text(source)
        return cls(tokenizer, labels, train, valid)

    @classmethod
    def load(cls, out: Path) -> Prepared:
        """Read what ``make`` left in ``out``."""
        return cls(
            Tokenizer.load(out / "tokenizer.json"),
            tuple(json.loads((out / "labels.json").read_text())),
            Corpus.load(out / "train.npz"),
            Corpus.load(out / "valid.npz"),
        )
