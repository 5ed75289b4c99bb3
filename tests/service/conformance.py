"""What every runner is held to: any mix of documents, cut anyhow, gives the float64 answer."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from gma.model.classifier import Classifier
from gma.model.reading import Findings, read
from gma.service.engine.engine import Engine
from gma.service.engine.opening import Opening, Tokens
from gma.service.engine.progress import Progress, RowShares
from gma.service.engine.step import Batch, fitting
from gma.service.runners.passes import PassRunner
from gma.service.runners.pool import StatePool
from gma.service.runners.torch import TorchRunner

if TYPE_CHECKING:
    from gma.service.runners.fused import FusedRunner  # Triton is not installed everywhere
    from gma.service.runners.onnx import OnnxRunner  # nor is ONNX Runtime

Tested: TypeAlias = "TorchRunner | PassRunner | FusedRunner | OnnxRunner"

PATIENCE_S = 300  # for seconds of work, and kernels that are compiled or interpreted


def tokens_of(runner: Tested, length: int, seed: int = 0) -> Tokens:
    """Random ids, (length,), the same for the same length and seed."""
    rng = np.random.default_rng([seed, length])
    return rng.integers(0, runner.vocab_size, length, dtype=np.int32)


def reference(classifier: Classifier, tokens: Tokens) -> NDArray[np.float64]:
    """The logits of a document read at once, in float64."""
    return found(classifier, tokens).logits.numpy()


def found(classifier: Classifier, tokens: Tokens) -> Findings:
    """What a document says, read at once, in float64."""
    exact = copy.deepcopy(classifier).cpu().double()
    exact.choose_mixers()
    (findings,) = read(exact, [torch.from_numpy(tokens)], chunk=len(tokens))
    return findings


def assert_close(
    logits: NDArray[np.float64], expected: NDArray[np.float64], tolerance: float
) -> None:
    """Check that the logits, (labels,), differ by no more than `tolerance` of the largest."""
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()


def batch_of(runner: Tested, documents: Sequence[tuple[int, bool, Tokens]]) -> Batch:
    """One step of documents: slot, fresh, tokens."""
    chunk = runner.grids[-1].chunk
    rows = sum(-(-len(tokens) // chunk) for _, _, tokens in documents)
    batch = Batch.blank(fitting(runner.grids, rows), runner.slots)
    row = 0
    for index, (slot, fresh, tokens) in enumerate(documents):
        batch.slot_of_document[index], batch.fresh[index] = slot, fresh
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            batch.tokens[row, : len(piece)] = piece
            batch.lengths[row] = len(piece)
            batch.document_of_row[row] = index
            row += 1
    return batch


def poison(runner: Tested) -> None:
    """Let every slot, the unused rows' too, and every page hold NaN."""
    if not isinstance(runner.pool, StatePool):
        runner.pool.fill(float("nan"))
        return
    for _, tensor in runner.pool.states.tensors():
        tensor.fill_(float("nan"))
    if isinstance(runner, PassRunner):
        runner.hidden.fill_(float("nan"))
    if runner.pool.states.weight.is_cuda:
        torch.cuda.synchronize()  # steps may run on another stream


def read_all(runner: Tested, documents: Sequence[Tokens], seed: int = 0) -> list[Progress]:
    """All documents at once through an engine, fed in random pieces; the final answers, each with
    all rows' shares, and every other with the usage of components if the runner counts."""

    async def read(engine: Engine, index: int, tokens: Tokens, rng: random.Random) -> Progress:
        cuts = sorted(rng.choices(range(len(tokens) + 1), k=3))
        first, *others = np.split(tokens, cuts)
        components = runner.counts and not index % 2
        document = engine.open(
            Opening(str(index), first, False, evidence=True, running=True, components=components)
        )
        for i, piece in enumerate(others, 1):
            await document.feed(piece, last=i == len(others))
        told = [progress async for progress in document]
        shares = RowShares.joined([progress.shares for progress in told if progress.shares])
        return told[-1]._replace(shares=shares)

    async def test() -> list[Progress]:
        engine = Engine(runner, max_waiting=99, inbox_tokens=1000, idle_timeout_s=60)
        await engine.start()
        rng = random.Random(seed)
        try:
            return await asyncio.gather(
                *(read(engine, i, tokens, rng) for i, tokens in enumerate(documents))
            )
        finally:
            await engine.stop()

    return asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def check_all(
    runner: Tested,
    classifier: Classifier,
    seed: int,
    *,
    tolerance: float,
    lengths: Sequence[int] | None = None,
) -> None:
    """Hold a runner to the exact answers of documents of these lengths, read at the same time.

    By default they are around the sizes of chunk and step, and more than there are slots.
    """
    rows, chunk = runner.grids[-1]
    if lengths is None:
        lengths = [1, chunk - 1, chunk, chunk + 1, 63, 1000, 2, rows * chunk]
    documents = [tokens_of(runner, length, seed) for length in lengths]
    answers = zip(documents, read_all(runner, documents, seed), strict=True)
    for index, (tokens, progress) in enumerate(answers):
        findings = found(classifier, tokens)
        expected = findings.logits.numpy()
        assert_close(progress.logits, expected, tolerance)
        assert progress.shares
        evidence = torch.from_numpy(progress.shares.evidence.sum(0, dtype=np.float64))
        weight = torch.tensor(progress.shares.weight.sum())
        assert_close(classifier.logits(evidence, weight).numpy(), expected, tolerance)
        assert progress.shares.tokens.sum() == len(tokens)
        assert (progress.usage is not None) == (runner.counts and not index % 2)
        if progress.usage is not None:
            assert_close(progress.usage, findings.usage.numpy(), tolerance)
            assert np.abs(progress.usage.sum(-1) / len(tokens) - 1).max() <= 1e-6


def check_bits(runner: Tested) -> None:
    """Hold a runner to answers and states that are the same to the last bit whether documents' rows
    are read together, beside others', or each in a step of its own."""
    rows, chunk = runner.grids[-1]
    texts = [tokens_of(runner, (rows - 2) * chunk + 3), tokens_of(runner, chunk - 1)]
    poison(runner)
    whole = runner.step(batch_of(runner, [(slot, True, text) for slot, text in enumerate(texts)]))
    states = [runner.snapshot(slot)() for slot in range(len(texts))]
    row = 0
    for slot, text in enumerate(texts):
        poison(runner)
        for begin in range(0, len(text), chunk):
            piece = text[begin : begin + chunk]
            alone = runner.step(batch_of(runner, [(slot, begin == 0, piece)]))
            assert np.array_equal(alone.evidence[0], whole.evidence[row])
            row += 1
        assert np.array_equal(alone.logits[0], whole.logits[slot])
        for name, x in runner.snapshot(slot)().items():
            assert np.array_equal(x, states[slot][name]), name
