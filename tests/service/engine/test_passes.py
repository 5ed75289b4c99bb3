"""Whole documents, read several times."""

import asyncio
import random

import numpy as np
import pytest

from gma.service.engine.places import SHORT_SHARE
from gma.service.errors import Overloaded, StepFailed, TooLong, UnknownDocument
from tests.service.engine.counting import (
    CHUNK,
    FULL,
    NO_TOKENS,
    OVERFLOWS,
    RAISES,
    ROWS,
    PassingRunner,
    marked,
    marks,
    tokens_of,
    used,
)
from tests.service.engine.reading import (
    Witness,
    check,
    cut,
    exchange,
    opening,
    read,
    rest,
    running,
    settle,
)

pytestmark = pytest.mark.anyio

PASSES = PassingRunner.passes


@pytest.mark.parametrize("seed", range(5))
async def test_any_documents_beside_any_others(seed: int) -> None:
    """More than fit into the pages at the same time, of lengths around those of chunk and step."""
    rng = random.Random(seed)
    lengths = [
        1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        FULL,
        FULL + 1,
        *(rng.randrange(1, 200) for _ in "many"),
    ]
    documents = [tokens_of(length, seed) for length in lengths]
    witness = Witness()
    async with running(PassingRunner(pages=50, slots=5), witness) as engine:
        told = await asyncio.gather(*(read(engine, *cut(each, rng)) for each in documents))
    for progress, tokens in zip(told, documents, strict=True):
        check(progress, tokens)
    assert witness.tokens == pytest.approx(sum(lengths))


async def test_nothing_is_read_before_the_end_has_come() -> None:
    runner, witness = PassingRunner(pages=9), Witness()
    async with running(runner, witness) as engine:
        document = engine.open(opening(tokens_of(2 * CHUNK), last=False))
        await document.feed(tokens_of(CHUNK), last=False)
        await settle()
        assert not runner.steps
        assert (witness.waiting, witness.slots, witness.pages) == (1, 0, 0)
        await document.feed(NO_TOKENS, last=True)
        check(await rest(document), np.concatenate([tokens_of(2 * CHUNK), tokens_of(CHUNK)]))


async def test_a_document_takes_a_page_for_each_chunk_and_one_slot() -> None:
    for length in (1, CHUNK, CHUNK + 1, 10 * CHUNK, 40 * CHUNK - 1):
        runner, witness = PassingRunner(pages=50), Witness()
        async with running(runner, witness) as engine:
            runner.pause()
            document = engine.open(opening(tokens_of(length)))
            assert (witness.slots, witness.pages) == (1, -(-length // CHUNK))
            runner.resume()
            check(await rest(document), tokens_of(length))


async def test_progress_is_what_the_passes_amount_to_and_says_nothing_before_the_last() -> None:
    async with running(PassingRunner(pages=9)) as engine:
        progress = await read(engine, tokens_of(2 * FULL))
    assert [each.tokens for each in progress] == [
        step * FULL // PASSES for step in range(1, 2 * PASSES + 1)
    ]
    assert [each.shares is None for each in progress] == [True] * 4 + [False] * 2
    assert [each.logits.size for each in progress] == [0] * 4 + [2] * 2
    check(progress, tokens_of(2 * FULL))


@pytest.mark.parametrize("chunks", [1, 2, ROWS - 1])
async def test_a_short_document_beside_a_long_one_is_done_after_one_step(chunks: int) -> None:
    runner, witness = PassingRunner(pages=10 * SHORT_SHARE), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        long = engine.open(opening(marked(1, 100)))
        await runner.until_in_step()
        short = engine.open(opening(marked(2, chunks)))
        runner.resume()
        check(await rest(short), marked(2, chunks))
        check(await rest(long), marked(1, 100))
    assert [marks(batch).count(2) for batch in runner.steps][:3] == [0, chunks, 0]
    assert witness.tokens == pytest.approx((100 + chunks) * CHUNK)


async def test_short_documents_that_come_together_are_read_together() -> None:
    runner = PassingRunner(pages=2 * SHORT_SHARE)
    async with running(runner) as engine:
        runner.pause()
        documents = [engine.open(opening(tokens_of(2 * CHUNK - i, i))) for i in range(2)]
        runner.resume()
        for i, document in enumerate(documents):
            check(await rest(document), tokens_of(2 * CHUNK - i, i))
    assert [batch.passes_of(1) for batch in runner.steps] == [range(PASSES)]


@pytest.mark.parametrize(("rows", "steps"), [(ROWS, 1), (ROWS + 1, 2 * PASSES)])
async def test_one_that_fills_the_grid_takes_a_step_and_a_longer_one_its_passes(
    rows: int, steps: int
) -> None:
    for length in (rows * CHUNK - CHUNK + 1, rows * CHUNK):
        runner, witness = PassingRunner(pages=60), Witness()
        async with running(runner, witness) as engine:
            document = engine.open(opening(tokens_of(length), components=True))
            progress = await rest(document)
            check(progress, tokens_of(length))
            usage = progress[-1].usage
            assert usage is not None
            assert usage[0, 0].tolist() == used(tokens_of(length))
        assert len(runner.steps) == steps
        assert witness.tokens == pytest.approx(length)


async def test_what_waits_is_counted_once_whatever_the_passes() -> None:
    runner = PassingRunner(pages=60)
    async with running(runner, inbox_tokens=FULL) as engine:
        runner.pause()
        short = engine.open(opening(tokens_of(CHUNK)))
        await runner.until_in_step()
        assert engine.queue().tokens == 0, "all passes are in the step"
        arriving = engine.open(opening(tokens_of(3), last=False))
        assert engine.queue().tokens == 3
        arriving.close()
        long = engine.open(opening(tokens_of(2 * FULL)))
        assert engine.queue().tokens == FULL, "no more than an inbox holds"
        runner.resume()
        await rest(short)
        waited = [engine.queue().tokens async for _ in long]
    assert sorted(waited, reverse=True) == waited
    assert waited[-1] == 0


async def test_one_that_finds_no_room_for_all_its_rows_waits_for_the_next_step() -> None:
    runner = PassingRunner(pages=60)
    async with running(runner) as engine:
        runner.pause()
        first = engine.open(opening(tokens_of(1)))
        await runner.until_in_step()
        others = [engine.open(opening(tokens_of(CHUNK, i))) for i in range(ROWS - 1)]
        full = engine.open(opening(marked(7, ROWS)))
        runner.resume()
        for document in (first, *others):
            await rest(document)
        check(await rest(full), marked(7, ROWS))
    assert [marks(batch).count(7) for batch in runner.steps] == [0, 0, ROWS]
    assert runner.steps[2].passes_of(0) == range(PASSES)


async def test_more_short_documents_than_rows_take_as_many_steps_as_their_rows_fill() -> None:
    runner = PassingRunner(pages=2 * SHORT_SHARE)
    async with running(runner) as engine:
        runner.pause()
        documents = [engine.open(opening(tokens_of(2 * CHUNK, i))) for i in range(2 * ROWS)]
        runner.resume()
        for i, document in enumerate(documents):
            check(await rest(document), tokens_of(2 * CHUNK, i))
    assert len(runner.steps) == 4


async def test_short_documents_pass_one_that_waits_for_pages_which_gets_them() -> None:
    runner, witness = PassingRunner(pages=2 * SHORT_SHARE, slots=8), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        first = engine.open(opening(tokens_of(150 * CHUNK)))
        second = engine.open(opening(tokens_of(151 * CHUNK)))
        third = engine.open(opening(tokens_of(100 * CHUNK)))
        short = engine.open(opening(tokens_of(2)))
        assert (witness.waiting, witness.slots, witness.pages) == (2, 2, 151)
        runner.resume()
        check(await rest(short), tokens_of(2))
        for document, chunks in ((first, 150), (second, 151), (third, 100)):
            check(await rest(document), tokens_of(chunks * CHUNK))


async def test_what_never_fits_is_refused_as_soon_as_that_is_known() -> None:
    witness = Witness()
    async with running(PassingRunner(pages=9), witness) as engine:
        assert engine.most_tokens == 9 * CHUNK
        with pytest.raises(TooLong, match=f"more than {9 * CHUNK} tokens"):
            engine.open(opening(tokens_of(9 * CHUNK + 1)))
        document = engine.open(opening(tokens_of(9 * CHUNK), last=False))
        with pytest.raises(TooLong):
            await document.feed(tokens_of(1), last=False)
        with pytest.raises(TooLong):
            await rest(document)
        with pytest.raises(TooLong):
            await document.feed(tokens_of(1), last=True)
        assert (witness.waiting, witness.ended) == (0, [("failed", 0)])
        check(await read(engine, tokens_of(9 * CHUNK)), tokens_of(9 * CHUNK))


async def test_those_that_find_no_pages_wait_and_too_many_are_turned_away() -> None:
    runner, witness = PassingRunner(pages=9), Witness()
    async with running(runner, witness, max_waiting=1) as engine:
        runner.pause()
        documents = [engine.open(opening(tokens_of(9 * CHUNK, i))) for i in range(2)]
        with pytest.raises(Overloaded):
            engine.open(opening(tokens_of(1)))
        assert (witness.waiting, witness.slots, witness.pages) == (1, 1, 9)
        runner.resume()
        for i, document in enumerate(documents):
            check(await rest(document), tokens_of(9 * CHUNK, i))


@pytest.mark.parametrize("steps", range(1, 2 * PASSES))
async def test_closed_in_any_pass_it_keeps_its_place_until_the_step_ends(steps: int) -> None:
    runner, witness = PassingRunner(pages=2 * ROWS, slots=1), Witness()
    async with running(runner, witness) as engine:
        document = engine.open(opening(tokens_of(2 * FULL)))
        for _ in range(steps - 1):
            await witness.step_ended()
        runner.pause()
        await runner.until_in_step()
        following = engine.open(opening(tokens_of(2 * FULL, 1)))
        document.close()
        assert (witness.waiting, witness.slots, witness.pages) == (1, 1, 2 * ROWS)
        runner.resume()
        check(await rest(following), tokens_of(2 * FULL, 1))
        with pytest.raises(UnknownDocument):
            await rest(document)
    assert {how for how, _ in witness.ended} == {"aborted", "done"}


async def test_one_that_is_no_number_fails_alone_and_in_its_first_pass() -> None:
    runner, witness = PassingRunner(pages=60), Witness()
    bad = tokens_of(3 * FULL)
    bad[5] = OVERFLOWS
    async with running(runner, witness) as engine:
        results = await asyncio.gather(
            read(engine, tokens_of(99)), read(engine, bad), return_exceptions=True
        )
        assert isinstance(results[1], StepFailed)
        assert not isinstance(results[0], BaseException)
        check(results[0], tokens_of(99))
        assert witness.spoilt == 1
        check(await read(engine, tokens_of(200)), tokens_of(200))


async def test_of_short_ones_in_one_step_one_that_is_no_number_fails_alone() -> None:
    runner, witness = PassingRunner(pages=60), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        first = engine.open(opening(tokens_of(1)))
        await runner.until_in_step()
        documents = [engine.open(opening(tokens_of(CHUNK, i))) for i in range(2)]
        bad = engine.open(opening(np.full(CHUNK, OVERFLOWS, np.int32)))
        runner.resume()
        await rest(first)
        for i, document in enumerate(documents):
            check(await rest(document), tokens_of(CHUNK, i))
        with pytest.raises(StepFailed):
            await rest(bad)
    assert len(runner.steps) == 2
    assert witness.spoilt == 1


async def test_closed_in_the_step_of_all_its_passes_it_keeps_its_place_until_that_ends() -> None:
    runner, witness = PassingRunner(pages=ROWS, slots=1), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        document = engine.open(opening(tokens_of(FULL)))
        await runner.until_in_step()
        following = engine.open(opening(tokens_of(FULL, 1)))
        document.close()
        assert (witness.waiting, witness.slots, witness.pages) == (1, 1, ROWS)
        runner.resume()
        check(await rest(following), tokens_of(FULL, 1))
        with pytest.raises(UnknownDocument):
            await rest(document)
    assert [how for how, _ in witness.ended] == ["aborted", "done"]


async def test_a_step_that_raises_gives_all_places_back() -> None:
    witness = Witness()
    async with running(PassingRunner(pages=60), witness) as engine:
        with pytest.raises(StepFailed):
            await read(engine, np.full(30, RAISES, np.int32))
        assert (witness.slots, witness.pages, witness.failures) == (0, 0, 1)
        check(await read(engine, tokens_of(200)), tokens_of(200))


async def test_one_whose_evidence_is_not_taken_is_held_in_its_last_pass() -> None:
    runner, witness = PassingRunner(pages=60), Witness()
    async with running(runner, witness, max_unread_rows=ROWS) as engine:
        document = engine.open(opening(tokens_of(3 * FULL)))
        for _ in range(3 * (PASSES - 1) + 1):
            await witness.step_ended()
        await settle()
        check(await read(engine, tokens_of(9)), tokens_of(9))
        check(await exchange(document, []), tokens_of(3 * FULL))
