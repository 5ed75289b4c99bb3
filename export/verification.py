"""How far an exported model's answers are from its checkpoint's in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from gma.export import operators
from gma.export.artifact import Artifact
from gma.export.precision import Precision
from gma.model.classifier import Classifier, Step
from gma.model.state import State
from gma.model.weights import Checkpoint

Array: TypeAlias = NDArray[Any]
Piece: TypeAlias = tuple[int, Array]
"""The number of a document, and some of its tokens."""


class Tolerance(NamedTuple):
    """The largest errors that are allowed, each relative to the largest value of its document."""

    logits: float
    states: float


TOLERANCES: dict[Precision, Tolerance] = {
    "float32": Tolerance(1e-5, 1e-5),
    # A state of few tokens is as coarse as their responsibilities, which sums then smooth.
    "float16": Tolerance(1e-2, 1e-2),
    "bfloat16": Tolerance(2e-2, 5e-2),
    "int8": Tolerance(2e-2, 5e-2),
}

BEFORE = 37
"""Tokens that were read before, of a document that is not new."""


@dataclass(frozen=True)
class Check:
    """The errors of documents that were read in one way."""

    operators: str
    """What computed the operators: their bodies, or the library."""
    documents: str
    """Whether the documents were new, or begun."""
    reading: str
    """How the documents were cut into rows and steps."""
    logits: float
    states: float
    """The largest error of a state, or of how much components took if the model tells it."""
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        """Whether the errors are within the tolerance; one that is not a number is not."""
        return self.logits <= self.tolerance.logits and self.states <= self.tolerance.states


@dataclass(frozen=True)
class Documents:
    """Documents to be read, and their states and logits by the checkpoint."""

    tokens: list[Array]
    before: State
    after: State
    logits: Array  # (documents, labels)
    usage: Array  # (documents, layers, heads, components)
    fresh: bool

    @classmethod
    def of(cls, classifier: Classifier, lengths: Sequence[int], *, fresh: bool) -> Documents:
        """Make random documents of these lengths, and read them; ``classifier`` in float64."""
        config = classifier.config
        rng = np.random.default_rng(0)
        tokens = [rng.integers(0, config.vocab_size, n) for n in lengths]
        before = classifier.new_states(len(lengths))
        if not fresh:
            read = [rng.integers(0, config.vocab_size, BEFORE) for _ in lengths]
            before = _read(classifier, read, before).states
        step = _read(classifier, tokens, before)
        logits = classifier.logits(step.states.evidence, step.states.weight).numpy()
        assert step.usage is not None
        return cls(tokens, before, step.states, logits, step.usage.numpy(), fresh)


def installed_library() -> Path | None:
    """Find the kernels of the package gma-ops, if it is installed."""
    if find_spec("gma_ops") is None:
        return None
    path: Path = import_module("gma_ops").library()
    return path


def verify(
    artifact: Artifact, checkpoint: Checkpoint, library: Path | None = None
) -> Iterator[Check]:
    """Check the model's form, then its answers, without the library of kernels and with it.

    ``checkpoint`` is read in float64. Documents of 0 to 1000 tokens, some about as long as a row,
    are read side by side and piece by piece, from nothing and after others, always beside a
    document that is not finite. Raises ValueError for a malformed model, and for one of another
    checkpoint.
    """
    if artifact.manifest.checkpoint != checkpoint.fingerprint:
        raise ValueError(f"{artifact.folder} was exported from another checkpoint")
    operators.register()
    try:
        onnx.checker.check_model(artifact.model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"{artifact.model}: {error}") from error
    chunk = artifact.manifest.chunk
    lengths = sorted({0, 1, max(chunk - 1, 0), chunk, chunk + 1, 63, 1000})
    tolerance = TOLERANCES[artifact.manifest.precision]
    documents = [
        Documents.of(checkpoint.classifier, lengths, fresh=fresh) for fresh in (True, False)
    ]
    sources = {"bodies": None} | ({"library": library} if library else {})
    for source, path in sources.items():
        model = Model(artifact, path)
        for each in documents:
            for reading, steps in _readings(each.tokens, chunk).items():
                errors = _errors(model, each, steps)
                start = "new" if each.fresh else "begun"
                yield Check(source, start, reading, *errors, tolerance)


class Model:
    """A session of an exported model on the CPU."""

    def __init__(self, artifact: Artifact, library: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        if library is not None:
            options.register_custom_ops_library(str(library))
        self.chunk, self.config = artifact.manifest.chunk, artifact.config
        self._session = onnxruntime.InferenceSession(
            artifact.model, options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def step(
        self, pieces: Sequence[Piece], fresh: Array, states: dict[str, Array]
    ) -> dict[str, Array]:
        """Read one piece in each row, beside a row that is not used, and give the outputs by name.

        ``fresh`` (D,) bool; ``states`` (D, ...) by the names of their inputs.
        """
        lengths = [len(tokens) for _, tokens in pieces]
        grid = np.zeros((len(pieces) + 1, self.chunk), np.int32)
        for row, (_, tokens) in zip(grid, pieces, strict=False):
            row[: len(tokens)] = tokens
        inputs = {
            "tokens": grid,
            "lengths": np.array([*lengths, 0], np.int64),
            "document_of_row": np.array([*(document for document, _ in pieces), 0], np.int64),
            "fresh": fresh,
            **states,
        }
        return dict(zip(self._outputs, self._session.run(None, inputs), strict=True))


def _readings(tokens: Sequence[Array], chunk: int) -> dict[str, list[list[Piece]]]:
    """Cut the same documents in several ways: the pieces of each step, by what they are called."""

    def rows(size: int) -> list[list[Piece]]:
        return [
            [(i, document[start : start + size]) for start in range(0, len(document), size)]
            for i, document in enumerate(tokens)
        ]

    def in_turn(size: int) -> list[list[Piece]]:
        longest = max(map(len, rows(size)))
        return [[each[i] for each in rows(size) if i < len(each)] for i in range(longest)]

    odd = min(chunk, 63)
    return {
        "side by side": [[piece for each in rows(chunk) for piece in each]],
        "row by row": in_turn(chunk),
        f"{odd} tokens a step": in_turn(odd),
    }


def _errors(
    model: Model, documents: Documents, steps: Sequence[Sequence[Piece]]
) -> tuple[float, float]:
    """Find the largest error of the logits, and that of the states and the usage."""
    count = len(documents.tokens)
    states: dict[str, Array] = {}
    for name, x in documents.before.tensors():
        before = x.to(torch.float64 if name in ("evidence", "weight") else torch.float32).numpy()
        # Beside them one more document that is not finite, which nobody may notice.
        states[name] = np.concatenate([before, np.full_like(before[:1], np.nan)])
        if documents.fresh:
            states[name][:] = np.nan
    fresh = np.array([documents.fresh] * count + [False])
    evidence = documents.before.evidence.numpy().copy()
    usage = np.zeros_like(documents.usage)
    found: dict[str, Array] = {}
    for pieces in steps:
        found = model.step([*pieces, (count, np.zeros(1, np.int64))], fresh, states)
        states = {name: found[f"{name}_after"] for name in states}
        fresh = np.zeros_like(fresh)
        for row, (document, _) in enumerate(pieces):
            evidence[document] += found["row_evidence"][row]
            if "usage" in found:
                usage[document] += found["usage"][row]
    expected = dict(documents.after.tensors())
    shares = _worst(evidence, documents.after.evidence.numpy())
    logits = max(_worst(found["logits"], documents.logits), shares, key=_order)
    worst = [_worst(states[name], x.numpy()) for name, x in expected.items()]
    if "usage" in found:
        worst.append(_worst(usage, documents.usage))
    return logits, max(worst, key=_order)


def _order(error: float) -> tuple[bool, float]:
    """Order errors; what is not a number is worse than any."""
    return error != error, error


def _worst(found: Array, expected: Array) -> float:
    """Find the largest difference relative to its document's largest value.

    It is nan if something is found to be nan, but where it should be: without a prior, the mean of
    no tokens is 0 / 0.
    """
    flat = expected.reshape(len(expected), -1)
    if not flat.size:
        return 0.0
    mine, unanswered = found[: len(expected)].reshape(flat.shape), np.isnan(flat)
    difference = np.where(unanswered & np.isnan(mine), 0.0, np.abs(mine - flat)).max(1)
    largest = np.where(unanswered, 0.0, np.abs(flat)).max(1)
    return float((difference / np.maximum(largest, 1e-30)).max())


def _read(classifier: Classifier, documents: Sequence[Array], states: State) -> Step:
    """Read whole documents, each in one row."""
    lengths = torch.tensor([len(tokens) for tokens in documents])
    rows = torch.zeros(len(documents), max(int(lengths.max()), classifier.config.tail, 1))
    rows = rows.long()
    for row, tokens in zip(rows, documents, strict=True):
        row[: len(tokens)] = torch.from_numpy(tokens)
    with torch.inference_mode():
        return classifier.step(rows, lengths, torch.arange(len(documents)), states, count=True)
