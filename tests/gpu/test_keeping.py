"""States that are taken out of a GPU's slots while steps are in flight, and go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.fused.obstacles import FusedPrecision
from gma.service.engine.engine import Engine
from gma.service.engine.opening import NO_TOKENS, Opening, Past, Tokens
from gma.service.engine.progress import Progress
from gma.service.engine.step import Runner
from gma.service.runners.torch import TorchRunner
from tests.service.conformance import assert_close, reference

pytestmark = pytest.mark.gpu

CHUNK, ROWS = 64, 4
PATIENCE_S = 120.0
MODEL = "m"
CONFIG = ModelConfig(
    name="tiny",
    labels=("a", "b", "c"),
    vocab_size=50,
    width=64,
    layers=2,
    heads=2,
    routing_dim=32,
    value_dim=32,
    num_components=16,
    mlp_width=96,
)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(CONFIG).requires_grad_(False).eval().to("cuda")
    classifier.pooling.token.weight.normal_(1.0)
    return classifier


def fused(classifier: Classifier, precision: FusedPrecision = "bfloat16") -> Runner:
    from gma.service.runners.fused import FusedRunner

    return FusedRunner(classifier, slots=3, rows=ROWS, chunk=CHUNK, precision=precision)


def compiled(classifier: Classifier) -> Runner:
    return TorchRunner(classifier, slots=3, rows=ROWS, chunk=CHUNK, compile=True)


MAKERS = pytest.mark.parametrize(
    ("make", "tolerance"),
    [(fused, 1e-2), (partial(fused, precision="float32"), 1e-4), (compiled, 1e-4)],
    ids=["fused", "fused float32", "compiled"],
)


def tokens_of(length: int, seed: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 50, length, dtype=np.int32)


async def read(
    engine: Engine, tokens: Tokens, *, past: Past | None = None, **changes: object
) -> list[Progress]:
    """All Progress of a document that comes chunk by chunk."""
    opening = Opening("name", NO_TOKENS, False, False, True, past=past)._replace(**changes)  # type: ignore[arg-type]
    with closing(engine.open(opening)) as document:

        async def feed() -> None:
            for begin in range(0, len(tokens), CHUNK):
                await document.feed(tokens[begin : begin + CHUNK], last=False)
            await document.feed(NO_TOKENS, last=True)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            return [progress async for progress in document]


def with_engine(
    runner: Runner, test: Callable[[Engine], object], inbox_tokens: int = 8 * CHUNK
) -> None:
    async def run() -> None:
        engine = Engine(
            runner, max_waiting=99, inbox_tokens=inbox_tokens, idle_timeout_s=60, model=MODEL
        )
        await engine.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await test(engine)  # type: ignore[misc]
        finally:
            await engine.stop()

    asyncio.run(run())


@MAKERS
def test_documents_go_on_from_every_state_that_was_kept(
    classifier: Classifier, make: Callable[[Classifier], Runner], tolerance: float
) -> None:
    """Many at once, more than there are slots, in the same engine and in another one's."""
    texts = [tokens_of(length, length) for length in (700, 641, 512, 130, 64, 1)]
    expected = [reference(classifier, text) for text in texts]
    kept: list[tuple[int, Progress]] = []

    async def here(engine: Engine) -> None:
        reading = (read(engine, text, keep_tokens=2 * CHUNK) for text in texts)
        for index, found in enumerate(await asyncio.gather(*reading)):
            assert_close(found[-1].logits, expected[index], tolerance)
            kept.extend((index, progress) for progress in found if progress.kept)

    async def there(engine: Engine) -> None:
        rests: Sequence[tuple[int, Tokens, Past]] = [
            (index, texts[index][progress.kept.tokens :], progress.kept.past)
            for index, progress in kept
            if progress.kept
        ]
        reading = (read(engine, rest, past=past) for _, rest, past in rests)
        for (index, _, _), found in zip(rests, await asyncio.gather(*reading), strict=True):
            assert_close(found[-1].logits, expected[index], tolerance)

    with_engine(make(classifier), here)
    assert len({index for index, _ in kept}) >= 4
    with_engine(make(classifier), there)


@MAKERS
def test_a_steady_document_is_the_same_to_the_last_bit_however_it_is_cut(
    classifier: Classifier, make: Callable[[Classifier], Runner], tolerance: float
) -> None:
    text = tokens_of(5 * CHUNK + 7, 1)

    async def test(engine: Engine) -> None:
        found = []
        for cuts in ([], [CHUNK], [1, 2, 100], [3 * CHUNK, 3 * CHUNK + 1, 4 * CHUNK]):
            past, begin, progress = Past(MODEL, b""), 0, None
            for cut in [*cuts, len(text)]:
                certain = text[begin:cut]
                progress = (await read(engine, certain, past=past, keep_tokens=1, steady=True))[-1]
                if progress.kept:
                    begin, past = begin + progress.kept.tokens, progress.kept.past
            assert progress
            found.append(progress.logits.tolist())
        assert_close(np.array(found[0]), reference(classifier, text), tolerance)
        assert found.count(found[0]) == len(found)
        # Beside others, and with several rows in a step.
        whole, *_ = await asyncio.gather(*(read(engine, other) for other in (text, text[:99])))
        if make is not compiled:
            assert whole[-1].logits.tolist() == found[0]

    with_engine(make(classifier), test)
