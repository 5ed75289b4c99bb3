"""Classification from Python: `from gma import Classifier`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Self, overload

import torch

from gma.model import weights
from gma.model.config import DEFAULT_CHECKPOINT, ModelConfig
from gma.model.reader import Text, side_by_side
from gma.model.weights import Checkpoint
from gma.service.python.answer import Answer
from gma.service.python.gathered import Gathered
from gma.service.python.stream import PIECE, Stream

SPANS = 1024
"""Pieces of evidence of a document at most, by default; the HTTP service has as many."""


class Classifier:
    """A checkpoint that classifies texts of any length, here and now.

    It answers what `gma classify` and the HTTP service do. Safe to share between threads.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """`checkpoint` as `gma.load` reads it, wherever its weights are."""
        self.checkpoint = checkpoint

    @classmethod
    def load(
        cls, checkpoint: Path | str | None = None, *, device: Literal["auto"] | str = "auto"
    ) -> Self:
        """Load a checkpoint's folder, or one that comes with gma, ``"contracts"`` or ``"books"``.

        Without either it is the former. ``"auto"`` takes a GPU if there is one. Raises
        ValueError that says what is wrong with the folder.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(weights.load(checkpoint or DEFAULT_CHECKPOINT, device=device))

    @property
    def config(self) -> ModelConfig:
        """What the model is: its ``name``, ``labels``, ``multi_label``, ``thresholds``, ..."""
        return self.checkpoint.config

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels that it knows."""
        return self.config.labels

    @overload
    def classify(  # type: ignore[overload-overlap]  # a string is one text
        self,
        text: str,
        /,
        *,
        top_k: int | None = None,
        evidence: bool = False,
        components: bool = False,
        max_tokens: int | None = None,
        spans: int = SPANS,
    ) -> Answer: ...

    @overload
    def classify(
        self,
        texts: Iterable[str],
        /,
        *,
        top_k: int | None = None,
        evidence: bool = False,
        components: bool = False,
        max_tokens: int | None = None,
        spans: int = SPANS,
    ) -> list[Answer]: ...

    def classify(
        self,
        texts: str | Iterable[str],
        /,
        *,
        top_k: int | None = None,
        evidence: bool = False,
        components: bool = False,
        max_tokens: int | None = None,
        spans: int = SPANS,
    ) -> Answer | list[Answer]:
        """Classify one text, or many side by side; answers are in the order of the texts.

        top_k: list the scores of the best so many labels; of all by default.
        evidence: also tell which part of a text speaks for what, in at most ``spans`` spans.
        components: also tell how much of a text each mixture component takes.
        max_tokens: read no more than the first so many; by default nothing is truncated.

        Nothing grows with the length of a text if the model is causal. Raises ValueError for a text
        that is empty, or that UTF-8 can't encode.
        """
        one = isinstance(texts, str)
        given = [texts] if isinstance(texts, str) else list(texts)
        for index, text in enumerate(given):
            if not isinstance(text, str):
                raise TypeError(f"text {index} is no string: write bytes to a stream()")
            if not text:
                raise ValueError("the document is empty" if one else f"text {index} is empty")
        # The longest first: they alone fill steps, and short ones share narrow ones at the end.
        order = sorted(range(len(given)), key=lambda index: -len(given[index]))
        read = [Text(self.checkpoint.tokenizer, max_tokens) for _ in order]
        gathered = [Gathered(self.checkpoint, spans if evidence else 1) for _ in order]
        documents = [read[index].rows(_pieces(given[index])) for index in order]
        for place, share in side_by_side(self.checkpoint, documents, count=components):
            gathered[order[place]].add(share)
        findings = (
            found.finding(text, top_k=top_k, evidence=evidence)
            for text, found in zip(read, gathered, strict=True)
        )
        answers = [*map(Answer.of, findings)]
        return answers[0] if one else answers

    def stream(
        self, *, components: bool = False, max_tokens: int | None = None, spans: int = SPANS
    ) -> Stream:
        """Begin a document that is written piece by piece; options are those of `classify`."""
        return Stream(self.checkpoint, max_tokens=max_tokens, spans=spans, components=components)


def _pieces(text: str) -> Iterator[bytes]:
    return (text[start : start + PIECE].encode() for start in range(0, len(text), PIECE))
