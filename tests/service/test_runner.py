"""PyTorch's runner: any mix of documents, cut anyhow, gives the float64 model's answer."""

import asyncio
import copy
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.classifier import Classifier
from model.config import ModelConfig
from service.engine import Engine, Progress
from service.runner import Batch, Outcome, TorchRunner, fitting

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

Tokens = NDArray[np.int32]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval()
    classifier.pooling.token.weight.normal_()
    return classifier


@pytest.fixture
def runner(classifier: Classifier) -> TorchRunner:
    return TorchRunner(classifier, slots=SLOTS, rows=ROWS, chunk=CHUNK)


def tokens_of(length: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng([seed, length])
    return rng.integers(0, CONFIG.vocab_size, length, dtype=np.int32)


def reference(classifier: Classifier, tokens: Tokens) -> NDArray[np.float64]:
    """The logits of a document read at once, in float64."""
    exact = copy.deepcopy(classifier).cpu().double()
    (reading,) = exact.read([torch.from_numpy(tokens)], chunk=len(tokens))
    return reading.logits.numpy()


def assert_close(logits: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()


def batch_of(runner: TorchRunner, documents: Sequence[tuple[int, bool, Tokens]]) -> Batch:
    """One step of documents: slot, fresh, tokens."""
    rows = sum(-(-len(tokens) // CHUNK) for _, _, tokens in documents)
    batch = Batch.blank(fitting(runner.grids, rows), runner.pool.scratch)
    row = 0
    for index, (slot, fresh, tokens) in enumerate(documents):
        batch.slot_of_document[index], batch.fresh[index] = slot, fresh
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            batch.tokens[row, : len(chunk)] = chunk
            batch.lengths[row] = len(chunk)
            batch.document_of_row[row] = index
            row += 1
    return batch


def poison(runner: TorchRunner) -> None:
    for _, tensor in runner.pool.states.tensors():
        tensor.fill_(float("nan"))


def read_all(runner: TorchRunner, documents: Sequence[Tokens], seed: int = 0) -> list[Progress]:
    """All documents at once through an engine, fed in random pieces; the final answers."""

    async def read(engine: Engine, name: str, tokens: Tokens, rng: random.Random) -> Progress:
        cuts = sorted(rng.choices(range(len(tokens) + 1), k=3))
        first, *others = np.split(tokens, cuts)
        reading = engine.read(name, first, last=False)
        following = asyncio.ensure_future(anext(reading))
        await asyncio.sleep(0)
        offset = len(first)
        for i, piece in enumerate(others, 1):
            await engine.feed(name, offset, piece, last=i == len(others))
            offset += len(piece)
        progress = await following
        async for following_progress in reading:
            spans = progress.spans + following_progress.spans
            progress = following_progress
            progress.spans[:] = spans
        return progress

    async def test() -> list[Progress]:
        engine = Engine(runner, max_waiting=99, inbox_tokens=1000, idle_timeout_s=60)
        await engine.start()
        rng = random.Random(seed)
        try:
            return await asyncio.gather(
                *(read(engine, str(i), tokens, rng) for i, tokens in enumerate(documents))
            )
        finally:
            await engine.stop()

    return asyncio.run(asyncio.wait_for(test(), 60))


def check_all(runner: TorchRunner, classifier: Classifier, seed: int) -> None:
    lengths = [1, CHUNK - 1, CHUNK, CHUNK + 1, 63, 1000, 2, ROWS * CHUNK]
    documents = [tokens_of(length, seed) for length in lengths]
    for tokens, progress in zip(documents, read_all(runner, documents, seed), strict=True):
        expected = reference(classifier, tokens)
        assert_close(progress.logits, expected)
        evidence = np.sum([span.evidence.astype(float) for span in progress.spans], axis=0)
        weight = sum(span.weight for span in progress.spans)
        assert_close(evidence / (weight + CONFIG.prior_tokens), expected)
        assert sum(span.tokens for span in progress.spans) == len(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_and_any_cut_give_the_exact_answer(
    runner: TorchRunner, classifier: Classifier, seed: int
) -> None:
    check_all(runner, classifier, seed)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 63, 1000])
def test_a_lone_document_in_one_piece(
    runner: TorchRunner, classifier: Classifier, length: int
) -> None:
    (progress,) = read_all(runner, [tokens_of(length)])
    assert_close(progress.logits, reference(classifier, tokens_of(length)))


def test_nothing_of_the_past_is_left_in_a_slot(runner: TorchRunner, classifier: Classifier) -> None:
    """Every slot, the unused rows' too, holds NaN before."""
    poison(runner)
    check_all(runner, classifier, seed=0)


def test_a_step_touches_the_slots_of_its_documents_only(runner: TorchRunner) -> None:
    poison(runner)
    runner.step(batch_of(runner, [(2, True, tokens_of(20)), (4, True, tokens_of(3))]))
    finite = [
        bool(torch.isfinite(runner.pool.snapshot(slot).memory).all()) for slot in range(SLOTS)
    ]
    assert finite == [False, False, True, False, True, False]


def test_a_document_whose_numbers_overflow_spoils_no_other(
    runner: TorchRunner, classifier: Classifier
) -> None:
    tokens = tokens_of(2 * CHUNK)
    runner.step(batch_of(runner, [(0, True, tokens[:CHUNK])]))
    broken = runner.pool.snapshot(0)
    broken.memory.fill_(float("nan"))
    runner.pool.restore(1, broken)
    batch = batch_of(
        runner,
        [(0, False, tokens[CHUNK:]), (1, False, tokens[CHUNK:]), (2, True, tokens_of(CHUNK + 3))],
    )
    outcome = runner.step(batch)
    assert outcome.finite[batch.lengths > 0].tolist() == [True, False, True, True]
    assert_close(outcome.logits[0], reference(classifier, tokens))
    assert_close(outcome.logits[2], reference(classifier, tokens_of(CHUNK + 3)))
    after = runner.step(batch_of(runner, [(0, False, tokens)])).logits[0]
    assert_close(after, reference(classifier, np.concatenate([tokens, tokens])))


def test_a_document_goes_on_in_another_runner(classifier: Classifier) -> None:
    here, there = (
        TorchRunner(classifier, slots=slots, rows=rows, chunk=CHUNK)
        for slots, rows in ((2, 4), (9, 3))
    )
    tokens = tokens_of(2 * CHUNK + 5)
    here.step(batch_of(here, [(1, True, tokens[:CHUNK])]))
    there.pool.restore(7, here.pool.snapshot(1))
    outcome = there.step(batch_of(there, [(7, False, tokens[CHUNK:])]))
    assert_close(outcome.logits[0], reference(classifier, tokens))


@pytest.mark.parametrize(
    ("rows", "grids"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_grids_double_up_to_the_full_one(
    classifier: Classifier, rows: int, grids: list[int]
) -> None:
    runner = TorchRunner(classifier, slots=1, rows=rows, chunk=CHUNK)
    assert [tuple(grid) for grid in runner.grids] == [(rows, CHUNK) for rows in grids]
    runner.warm_up()


@pytest.mark.parametrize(("rows", "chunk"), [(0, CHUNK), (ROWS, CONFIG.tail - 1)])
def test_a_grid_that_cannot_work_is_refused(classifier: Classifier, rows: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="a grid of"):
        TorchRunner(classifier, slots=1, rows=rows, chunk=chunk)


def test_a_bidirectional_model_is_refused() -> None:
    classifier = Classifier(CONFIG.model_copy(update={"causal": False}))
    with pytest.raises(ValueError, match="only a causal model"):
        TorchRunner(classifier, slots=1)


def test_weights_that_are_no_numbers_fail_the_warm_up(classifier: Classifier) -> None:
    broken = copy.deepcopy(classifier)
    broken.embedding.weight[3, 3] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        TorchRunner(broken, slots=1, rows=ROWS, chunk=CHUNK).warm_up()


def test_what_it_tells_of_itself(runner: TorchRunner) -> None:
    assert (runner.backend, runner.device, runner.labels) == ("torch", "cpu", CONFIG.labels)
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
    check_all(runner, classifier, seed=0)
    assert 0 < runner.memory().device <= runner.memory().device_peak
