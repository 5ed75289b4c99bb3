"""PyTorch's runner: any mix of documents, cut anyhow, gives the float64 model's answer."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.service.engine.step import Outcome
from gma.service.runners.torch import TorchRunner
from tests.model.small import ANY, small
from tests.service.conformance import (
    assert_close,
    batch_of,
    check_all,
    check_bits,
    poison,
    read_all,
    reference,
    tokens_of,
)

ROWS, CHUNK, SLOTS = 4, 16, 6
TOLERANCE = 1e-5  # relative, in float32
CONFIG = ModelConfig(
    name="tiny",
    labels=("a", "b", "c"),
    vocab_size=50,
    width=16,
    layers=3,
    heads=2,
    routing_dim=4,
    value_dim=8,
    num_components=6,
    mlp_width=32,
    prior_tokens=20.0,
)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval()
    classifier.pooling.token.weight.normal_()
    return classifier


@pytest.fixture
def runner(classifier: Classifier) -> TorchRunner:
    return TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK)


SEEDS = [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_mix_and_any_cut_give_the_exact_answer(
    runner: TorchRunner, classifier: Classifier, seed: int
) -> None:
    """Nothing of the past is left in a slot: each, the unused rows' too, holds NaN before."""
    poison(runner)
    check_all(runner, classifier, seed, tolerance=TOLERANCE)


def test_whatever_the_pooling() -> None:
    classifier = small(**ANY)
    runner = TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK)
    poison(runner)
    check_all(runner, classifier, 0, tolerance=TOLERANCE)


@pytest.mark.parametrize("changes", [{"form": "forgetting"}, ANY], ids=["forgetting", "any"])
def test_what_shares_a_step_changes_no_bit(changes: dict[str, Any]) -> None:
    classifier = small(**changes)
    classifier.choose_mixers()
    assert classifier.mixers.startswith("C++")
    check_bits(TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK))


@pytest.mark.parametrize("length", [1, 1000])
def test_a_lone_document_in_one_piece(
    runner: TorchRunner, classifier: Classifier, length: int
) -> None:
    (progress,) = read_all(runner, [tokens_of(runner, length)])
    assert_close(progress.logits, reference(classifier, tokens_of(runner, length)), TOLERANCE)


def test_a_step_touches_the_slots_of_its_documents_only(runner: TorchRunner) -> None:
    poison(runner)
    runner.step(
        batch_of(runner, [(2, True, tokens_of(runner, 20)), (4, True, tokens_of(runner, 3))])
    )
    finite = [bool(np.isfinite(runner.snapshot(slot)()["memory"]).all()) for slot in range(SLOTS)]
    assert finite == [False, False, True, False, True, False]


def test_a_document_whose_numbers_overflow_spoils_no_other(
    runner: TorchRunner, classifier: Classifier
) -> None:
    tokens = tokens_of(runner, 2 * CHUNK)
    runner.step(batch_of(runner, [(0, True, tokens[:CHUNK])]))
    broken = runner.snapshot(0)()
    broken["memory"].fill(np.nan)
    runner.restore(1, broken)
    batch = batch_of(
        runner,
        [
            (0, False, tokens[CHUNK:]),
            (1, False, tokens[CHUNK:]),
            (2, True, tokens_of(runner, CHUNK + 3)),
        ],
    )
    outcome = runner.step(replace(batch, count=True))
    assert outcome.finite[batch.lengths > 0].tolist() == [True, False, True, True]
    assert outcome.usage is not None
    counted = outcome.usage[batch.lengths > 0].sum(-1)
    assert np.allclose(counted[[0, 2, 3]].T, [CHUNK, CHUNK, 3])
    assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)
    assert_close(outcome.logits[2], reference(classifier, tokens_of(runner, CHUNK + 3)), TOLERANCE)
    after = runner.step(batch_of(runner, [(0, False, tokens)])).logits[0]
    assert_close(after, reference(classifier, np.concatenate([tokens, tokens])), TOLERANCE)


def test_a_document_goes_on_in_another_runner(classifier: Classifier) -> None:
    here, there = (
        TorchRunner(classifier, slots=slots, rows=rows, chunk=CHUNK)
        for slots, rows in ((2, 4), (9, 3))
    )
    tokens = tokens_of(here, 2 * CHUNK + 5)
    here.step(batch_of(here, [(1, True, tokens[:CHUNK])]))
    there.restore(7, here.snapshot(1)())
    outcome = there.step(batch_of(there, [(7, False, tokens[CHUNK:])]))
    assert_close(outcome.logits[0], reference(classifier, tokens), TOLERANCE)


@pytest.mark.parametrize(("rows", "grids"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_grids_double_up_to_the_full_one(
    classifier: Classifier, rows: int, grids: list[int]
) -> None:
    runner = TorchRunner(classifier, slots=1, rows=rows, chunk=CHUNK)
    assert [tuple(grid) for grid in runner.grids] == [(rows, CHUNK) for rows in grids]


@pytest.mark.parametrize(("rows", "chunk"), [(0, CHUNK), (ROWS, CONFIG.tail - 1)])
def test_a_grid_that_cannot_work_is_refused(classifier: Classifier, rows: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="a grid of"):
        TorchRunner(classifier, slots=1, rows=rows, chunk=chunk)


def test_a_bidirectional_model_is_refused() -> None:
    classifier = Classifier(CONFIG.model_copy(update={"causal": False}))
    with pytest.raises(ValueError, match="it is read in passes"):
        TorchRunner(classifier, slots=1)


def test_weights_that_are_no_numbers_fail_the_warm_up(classifier: Classifier) -> None:
    broken = copy.deepcopy(classifier)
    broken.embedding.weight[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        TorchRunner(broken, slots=1, rows=ROWS, chunk=CHUNK).warm_up()


def test_what_it_tells_of_itself(runner: TorchRunner) -> None:
    assert (runner.backend, runner.device, runner.counts) == ("torch", "cpu", True)
    assert runner.vocab_size == CONFIG.vocab_size
    memory = runner.memory()
    assert 0 < memory.resident <= memory.resident_peak
    assert (memory.device, memory.device_peak) == (0, 0)


def test_an_outcome_knows_which_rows_are_numbers() -> None:
    nan = float("nan")
    evidence = np.array([[0, 1], [nan, 0], [0, 0], [0, np.inf]], np.float32)
    outcome = Outcome(evidence, np.array([1, 1, nan, 1], np.float32), np.zeros((4, 2)))
    assert outcome.finite.tolist() == [True, False, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(classifier: Classifier, compiled: bool) -> None:
    on_gpu = copy.deepcopy(classifier).cuda()
    runner = TorchRunner(on_gpu, slots=SLOTS, rows=ROWS, chunk=CHUNK, compile=compiled)
    runner.warm_up()
    poison(runner)
    check_all(runner, classifier, seed=0, tolerance=TOLERANCE)
    assert 0 < runner.memory().device <= runner.memory().device_peak
