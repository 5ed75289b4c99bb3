"""Pretraining: texts in, a base out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from gma.model.tokenizer import Tokenizer
from gma.model.training import together
from gma.model.training.errors import TrainingError
from gma.model.training.folder import LOG, check_folder
from gma.model.training.labelled import TEXT_ALONE
from gma.model.training.mix import sample
from gma.model.training.pretraining import Pretraining, read_config
from gma.model.training.progress import on_stderr
from gma.model.training.splits import TRAIN, VALID, Splits
from gma.model.training.texts import Texts

PREPARED = "prepared"
"""Folder of a run: the tokenizer, and the token ids of both splits."""

SOURCE = "source.json"
"""File of it that says what it was made of."""

LEARNED_FROM = 64e6
"""Bytes of text that a tokenizer is learned from, at most."""


class Prepared(NamedTuple):
    """What pretraining reads."""

    tokenizer: Tokenizer
    train: Texts
    valid: Texts

    @classmethod
    def load(cls, folder: Path) -> Prepared:
        """Map what ``prepare`` left in a folder."""
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        train, valid = (Texts.load(tokenizer, _file(folder, split)) for split in (TRAIN, VALID))
        return cls(tokenizer, train, valid)


def pretrain(
    data: Path,
    out: Path,
    config: Path | None = None,
    *,
    tokenizer: Path | None = None,
    text: str = "text",
    resume: bool = False,
    prepare_only: bool = False,
) -> Path:
    """Train a base and return the folder of its best checkpoint.

    ``data`` is as ``prepare`` takes it; ``config`` is a TOML file (``read_config``). ``out`` gets
    the prepared tokens, a log, and the checkpoint that was best on valid; with ``resume`` an
    interrupted run in ``out`` goes on, and ``data`` is not read. With ``prepare_only`` nothing is
    trained, and the folder of prepared tokens is returned, which elsewhere may be ``data``. Seeds
    torch's global generator.

    Raises TrainingError or CorpusError before anything is trained, TrainingError if it diverges.
    """
    model, training = read_config(config)
    check_folder(out, resume=resume)
    with together.processes(), on_stderr() as progress:
        if resume and not _is_prepared(data):
            prepared = Prepared.load(out / PREPARED)
        else:
            vocabulary = Tokenizer.load(tokenizer) if tokenizer else model.vocab_size
            if together.first():
                prepare(data, out / PREPARED, vocabulary, text, progress)
            together.wait()
            prepared = Prepared.load(data if _is_prepared(data) else out / PREPARED)
        if prepare_only:
            return out / PREPARED
        fitting = {"vocab_size": prepared.tokenizer.vocab_size}
        out.mkdir(parents=True, exist_ok=True)
        run = Pretraining(
            prepared.train,
            prepared.valid,
            prepared.tokenizer,
            out,
            model.model_copy(update=fitting),
            training,
        )
        if resume:
            run.resume()
        elif together.first():
            (out / LOG).unlink(missing_ok=True)  # of a run that ended before its first evaluation
        run.train(progress)
        progress.console.print(f"On valid, bits per byte: {-run.best:.4f}")
    return out / "checkpoint"


def prepare(
    data: Path, out: Path, tokenizer: int | Tokenizer, text: str, progress: Progress
) -> Prepared:
    """Tokenize the texts of a data folder (``Splits``), whose labels do not count, into ``out``.

    ``tokenizer`` is one, or how many tokens that may have which is learned from some of the train
    split. What is in ``out`` already is taken if it was made of the same texts, and with the same
    tokenizer or for the same size. ``data`` may also be what this left in another folder: that is
    mapped as it is. Raises CorpusError for the first document that is none, and TrainingError for a
    tokenizer that is not the one of prepared ``data``.
    """
    given = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if _is_prepared(data):
        prepared = Prepared.load(data)
        if given and given.fingerprint != prepared.tokenizer.fingerprint:
            raise TrainingError(f"{data} was prepared with another tokenizer")
        return prepared
    splits = Splits(data, TEXT_ALONE._replace(text=text))
    made = given.fingerprint if given else tokenizer
    digests = {split: _digest(splits, split, progress) for split in (TRAIN, VALID)}
    source = json.dumps({"tokenizer": made, "texts": digests}, indent=2)
    complete = out / SOURCE
    if complete.is_file() and complete.read_text() == source:
        return Prepared.load(out)
    complete.unlink(missing_ok=True)
    if not isinstance(tokenizer, Tokenizer):
        size = min(LEARNED_FROM, digests[TRAIN][1])
        tokenizer = Tokenizer.train(sample(splits, size, progress), tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    for split in VALID, TRAIN:
        texts = _read(splits, split, f"tokenizing {split}, MB", digests[split][1], progress)
        Texts.encode(texts, tokenizer, _file(out, split))
    tokenizer.save(out / "tokenizer.json")
    complete.write_text(source)
    return Prepared.load(out)


def _digest(splits: Splits, split: str, progress: Progress) -> tuple[str, int]:
    """Tell all texts of a split from others, and how many bytes they have."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    bar = progress.add_task(f"reading {split}, MB", total=None)
    for document in splits.read(split):
        digest.update(document.digest)
        size += len(document.text.encode())
        progress.update(bar, completed=round(size / 1e6, 1))
    progress.update(bar, total=round(size / 1e6, 1))
    return digest.hexdigest(), size


def _read(splits: Splits, split: str, title: str, size: int, progress: Progress) -> Iterator[str]:
    bar = progress.add_task(title, total=round(size / 1e6, 1))
    read = 0
    for document in splits.read(split):
        yield document.text
        read += len(document.text.encode())
        progress.update(bar, completed=round(read / 1e6, 1))


def _is_prepared(data: Path) -> bool:
    return (data / SOURCE).is_file() and _file(data, TRAIN).is_file()


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.tokens"
