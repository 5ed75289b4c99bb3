"""What a run reads: documents as token ids, with the tokenizer that was trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from gma.model.tokenizer import Tokenizer
from gma.model.training import found
from gma.model.training.corpus import Corpus
from gma.model.training.labelled import LabelledText
from gma.model.training.splits import TRAIN, VALID, Splits
from gma.model.training.survey import Survey


@dataclass(frozen=True)
class Prepared:
    """What training reads: made once from the documents, kept in the run's folder."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    train: Corpus
    valid: Corpus

    @classmethod
    def make(
        cls,
        splits: Splits,
        survey: Survey,
        out: Path,
        tokenizer: int | Tokenizer,
        progress: Progress,
        find_spans: int = 0,
    ) -> Prepared:
        """Encode both splits and keep them in ``out``.

        ``tokenizer`` is one, or how many tokens that may have which is trained on the train split.
        With ``find_spans`` train has the spans that so many rounds of ``found.find`` find, in place
        of those given.
        Documents of valid whose text train has are left out. What is in ``out`` already is taken if
        it was made of the same documents, and with the same tokenizer or for the same size.
        """
        surveyed = {split: survey.surveyed[split].digest for split in (TRAIN, VALID)}
        made: dict[str, object] = {"vocab_size": tokenizer}
        if isinstance(tokenizer, Tokenizer):
            made = {"tokenizer": tokenizer.fingerprint}
        if find_spans:
            made["find_spans"] = find_spans
        source = json.dumps({**made, "documents": surveyed}, indent=2)
        complete = out / "source.json"
        if complete.is_file() and complete.read_text() == source:
            return cls.load(out)
        complete.unlink(missing_ok=True)
        labels = tuple(sorted(survey.labels))

        def read(split: str, title: str) -> Iterator[LabelledText]:
            return _watched(splits.read(split), title, survey.surveyed[split].bytes, progress)

        if not isinstance(tokenizer, Tokenizer):
            texts = (document.text for document in read(TRAIN, "making the tokenizer, MB"))
            tokenizer = Tokenizer.train(texts, tokenizer)
        # Valid first: it is the smaller, and a label that it alone has is an error.
        kept = (d for d in read(VALID, "tokenizing valid, MB") if not survey.in_train(d))
        valid = Corpus.encode(kept, tokenizer, labels)
        learned = read(TRAIN, "tokenizing train, MB")
        if find_spans:
            learned = iter(found.find(list(learned), find_spans, progress))
        train = Corpus.encode(learned, tokenizer, labels)
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


def _watched(
    documents: Iterable[LabelledText], title: str, size: int, progress: Progress
) -> Iterator[LabelledText]:
    """The same documents, with a bar of the megabytes of their texts, of ``size`` bytes."""
    bar = progress.add_task(title, total=round(size / 1e6, 1))
    read = 0
    for document in documents:
        yield document
        read += len(document.text.encode())
        progress.update(bar, completed=round(read / 1e6, 1))
