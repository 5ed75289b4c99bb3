"""The runner of the fused step: interpreted where no GPU is, without CUDA graphs then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.fused.obstacles import FusedPrecision
from gma.service.runners.torch import TorchRunner
from tests.service.conformance import (
    assert_close,
    batch_of,
    check_all,
    check_bits,
    poison,
    reference,
    tokens_of,
)

pytest.importorskip("triton")

import triton

from gma.service.runners.fused import FusedRunner
from tests.interpreting import DEVICE, KERNELS

pytestmark = KERNELS

ROWS, SLOTS = 3, 4
# The interpreter's time grows with a step's tokens, and longer chunks are tested without a runner.
CHUNK = 64 if DEVICE == "cuda" else 16
TOLERANCES: dict[FusedPrecision, float] = {"bfloat16": 1e-2, "fp8": 3e-2}
"""Of logits, relative to the largest."""

TOLERANCE = TOLERANCES["bfloat16"]
CONFIG = ModelConfig(
    name="tiny",
    labels=("a", "b", "c"),
    vocab_size=50,
    width=32,
    layers=1,
    heads=2,
    routing_dim=16,
    value_dim=16,
    num_components=16,
    mlp_width=48,
    prior_tokens=20.0,
)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """Its own scores do not cancel, for errors are told relative to their mean."""
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval().to(DEVICE)
    classifier.pooling.token.weight.normal_(1.0)
    return classifier


def make(
    classifier: Classifier,
    *,
    slots: int = SLOTS,
    rows: int = ROWS,
    precision: FusedPrecision = "bfloat16",
) -> FusedRunner:
    return FusedRunner(classifier, slots=slots, rows=rows, chunk=CHUNK, precision=precision)


@pytest.fixture(scope="module")
def runner(classifier: Classifier) -> FusedRunner:
    """Warm."""
    runner = make(classifier)
    runner.warm_up()
    return runner


def test_any_mix_and_any_cut_give_the_exact_answer(classifier: Classifier) -> None:
    """Documents of one row and of several, more than there are slots; every slot, the unused rows'
    too, holds NaN before."""
    runner = make(classifier, slots=2, rows=2)
    poison(runner)
    lengths = [1, CHUNK + 1, 2 * CHUNK + 3]
    check_all(runner, classifier, seed=0, tolerance=TOLERANCE, lengths=lengths)


@pytest.mark.long
@pytest.mark.parametrize(
    "precision",
    # That a step in fp8 is right is shown without a runner, and the interpreter is slow.
    ["bfloat16", pytest.param("fp8", marks=pytest.mark.gpu)],
)
def test_documents_around_the_sizes_of_chunk_and_step(
    classifier: Classifier, precision: FusedPrecision
) -> None:
    runner = make(classifier, precision=precision)
    poison(runner)
    lengths = [1, CHUNK - 1, CHUNK, CHUNK + 1, 63, 300, 2, ROWS * CHUNK]
    check_all(runner, classifier, seed=0, tolerance=TOLERANCES[precision], lengths=lengths)


def test_what_shares_a_step_changes_no_bit(runner: FusedRunner) -> None:
    check_bits(runner)


def test_steps_in_flight_take_effect_in_their_order(
    runner: FusedRunner, classifier: Classifier
) -> None:
    """A document goes on in a step that is launched before the outcome of its last one is taken."""
    tokens, other = tokens_of(runner, 3 * CHUNK), tokens_of(runner, CHUNK + 7)
    poison(runner)
    first = runner.launch(batch_of(runner, [(2, True, tokens[:CHUNK]), (0, True, other[:CHUNK])]))
    second = runner.launch(
        batch_of(runner, [(0, False, other[CHUNK:]), (2, False, tokens[CHUNK:])])
    )
    begun, ended = first.outcome(), second.outcome()
    assert_close(begun.logits[0], reference(classifier, tokens[:CHUNK]), TOLERANCE)
    assert_close(begun.logits[1], reference(classifier, other[:CHUNK]), TOLERANCE)
    assert_close(ended.logits[0], reference(classifier, other), TOLERANCE)
    assert_close(ended.logits[1], reference(classifier, tokens), TOLERANCE)
    assert ended.weight.tolist() == [7, CHUNK, CHUNK]


def test_a_launch_that_raises_leaves_the_step_in_flight_alone(
    runner: FusedRunner, classifier: Classifier
) -> None:
    pieces = [tokens_of(runner, 9, seed) for seed in range(2)]
    batches = [batch_of(runner, [(slot, True, piece)]) for slot, piece in enumerate(pieces)]
    first = runner.launch(batches[0])
    with pytest.raises(ValueError, match="broadcast"):
        runner.launch(replace(batches[1], fresh=np.ones(ROWS + 1, np.bool_)))
    for step, piece in zip((first, runner.launch(batches[1])), pieces, strict=True):
        assert_close(step.outcome().logits[0], reference(classifier, piece), TOLERANCE)


def test_outcomes_stay_as_they_are(runner: FusedRunner) -> None:
    """The batch may be filled anew, and steps run over the same grid, as many as are in flight."""
    batch = batch_of(runner, [(1, True, tokens_of(runner, 5))])
    outcome = runner.step(batch)
    kept = copy.deepcopy(outcome)
    for seed in range(1, 1 + runner.depth):
        batch.tokens[0, :CHUNK] = tokens_of(runner, CHUNK, seed)
        batch.lengths[0] = CHUNK
        other = runner.step(batch)
        assert not np.array_equal(other.evidence, kept.evidence)
    assert np.array_equal(outcome.evidence, kept.evidence)
    assert np.array_equal(outcome.logits, kept.logits)
    assert outcome.weight.tolist() == [5]


def test_a_document_whose_numbers_overflow_spoils_no_other(runner: FusedRunner) -> None:
    """The other's answer is not near what it would be: it is the same."""
    pieces = [tokens_of(runner, length) for length in (CHUNK, CHUNK - 5)]
    runner.step(batch_of(runner, [(i, True, piece) for i, piece in enumerate(pieces)]))
    states = [runner.snapshot(slot)() for slot in range(2)]

    def read_on() -> tuple[list[bool], list[Any]]:
        poison(runner)
        for slot, state in enumerate(states):
            runner.restore(slot, state)
        outcome = runner.step(
            batch_of(runner, [(i, False, piece) for i, piece in enumerate(pieces)])
        )
        other = runner.snapshot(1)().values()
        return outcome.finite.tolist(), [outcome.evidence[1], outcome.logits[1], *other]

    finite, clean = read_on()
    states[0]["memory"][0, 0, 1, 2, 3] = np.nan
    finite_beside, beside = read_on()
    assert (finite, finite_beside) == ([True, True], [False, True])
    for expected, found in zip(clean, beside, strict=True):
        assert np.array_equal(expected, found)


def test_a_document_goes_on_in_another_runner(runner: FusedRunner, classifier: Classifier) -> None:
    """In another slot, and in float32 too: a snapshot says nothing of what it came from."""
    tokens = tokens_of(runner, 2 * CHUNK + 5)
    runner.step(batch_of(runner, [(1, True, tokens[:CHUNK])]))
    snapshot = runner.snapshot(1)()
    poison(runner)
    exact = TorchRunner(classifier, slots=9, rows=ROWS, chunk=CHUNK)
    for there, slot in ((runner, 3), (exact, 7)):
        there.restore(slot, snapshot)
        outcome = there.step(batch_of(there, [(slot, False, tokens[CHUNK:])]))
        assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)


@pytest.mark.parametrize(("rows", "grids"), [(1, [1]), (6, [1, 2, 4, 6])])
def test_grids_double_up_to_the_full_one(
    classifier: Classifier, rows: int, grids: list[int]
) -> None:
    runner = make(classifier, rows=rows)
    assert [tuple(grid) for grid in runner.grids] == [(rows, CHUNK) for rows in grids]


def test_weights_that_are_no_numbers_fail_the_warm_up(classifier: Classifier) -> None:
    broken = copy.deepcopy(classifier)
    broken.embedding.weight[3, 3] = float("nan")
    message = f"a step of 1 x {CHUNK} tokens gives what is not finite"
    with pytest.raises(RuntimeError, match=message):
        make(broken).warm_up()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "tiny has no fused step in fp8: it is bidirectional"),
        ({"num_components": 6}, "tiny has no fused step in fp8: .*6"),
        ({"mlp_width": 40}, "multiples of 16"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes: dict[str, object], reason: str) -> None:
    classifier = Classifier(CONFIG.model_copy(update=changes))
    with pytest.raises(ValueError, match=reason):
        make(classifier, precision="fp8")


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_what_it_tells_of_itself(classifier: Classifier, precision: FusedPrecision) -> None:
    runner = make(classifier, precision=precision)
    assert (runner.backend, runner.dtype, runner.depth) == ("torch", precision, 2)
    assert runner.counts
    assert runner.kernels == "fused Triton kernels, CUDA graphs"
    assert runner.device == str(classifier.embedding.weight.device)
    assert runner.vocab_size == CONFIG.vocab_size
    memory = runner.memory()
    assert 0 < memory.resident <= memory.resident_peak
    assert (memory.device > 0) == (DEVICE == "cuda")


def _nothing(out):  # type: ignore[no-untyped-def]  # a kernel
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_once_warm_it_neither_compiles_nor_allocates(
    classifier: Classifier, precision: FusedPrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: list[str] = []  # kernels that were compiled, or found in the cache on disk

    def hook(*, repr: str, **_: object) -> None:
        ready.append(repr)

    def allocations() -> int:
        count: int = torch.cuda.memory_stats()["allocation.all.allocated"]
        return count

    def counted(run: Callable[[], object]) -> tuple[int, int]:
        """How many kernels were made ready, and how often memory was allocated."""
        before = len(ready), allocations()
        run()
        return len(ready) - before[0], allocations() - before[1]

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    out = torch.zeros(1, device=DEVICE)
    assert counted(lambda: triton.jit(_nothing)[(1,)](out)) == (1, 0)
    assert counted(lambda: torch.zeros(1, device=DEVICE)) == (0, 1)

    runner = make(classifier, slots=9, rows=8, precision=precision)
    runner.warm_up()
    rng = np.random.default_rng(0)

    def steps() -> None:
        for _ in range(50):
            documents = rng.permutation(9)[: rng.integers(1, 5)]
            tokens = [tokens_of(runner, n) for n in rng.integers(1, 2 * CHUNK + 1, len(documents))]
            fresh = rng.random(len(documents)) < 0.5
            batch = batch_of(runner, list(zip(documents, fresh, tokens, strict=True)))
            batch = replace(batch, count=bool(rng.random() < 0.5))
            outcome = runner.launch(batch).outcome()
            assert outcome.finite[batch.lengths > 0].all()
            grids.add(batch.tokens.shape)

    grids: set[tuple[int, ...]] = set()
    assert counted(steps) == (0, 0)
    assert grids == set(runner.grids)
