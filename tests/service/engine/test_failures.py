"""Steps that fail, and documents whose numbers do."""

import asyncio

import numpy as np
import pytest

from gma.service.errors import StepFailed
from tests.service.engine.counting import (
    OVERFLOWS,
    RAISES,
    ROWS,
    CountingRunner,
    DeviceRunner,
    marked,
    marks,
    tokens_of,
)
from tests.service.engine.reading import Witness, check, opening, read, rest, running

pytestmark = pytest.mark.anyio


async def test_a_failed_step_fails_its_documents_and_no_later_one() -> None:
    runner, witness = CountingRunner(slots=2), Witness()
    async with running(runner, witness) as engine:
        runner.pause()
        doomed = [
            engine.open(opening(np.array(tokens, np.int32))) for tokens in ([1, RAISES], [1, 2])
        ]
        await runner.until_in_step()
        waiting = engine.open(opening(tokens_of(30)))
        runner.resume()
        for document in doomed:
            with pytest.raises(StepFailed, match="failed"):
                await rest(document)
        assert engine.ready
        check(await rest(waiting), tokens_of(30))
        await asyncio.gather(*(read(engine, tokens_of(9)) for _ in range(9)))
    assert (witness.failures, witness.spoilt) == (1, 0)


async def test_steps_that_fail_in_a_row_are_counted() -> None:
    async with running(CountingRunner()) as engine:
        for failures in (1, 2):
            with pytest.raises(StepFailed):
                await read(engine, np.array([RAISES], np.int32))
            assert engine.failed_steps == failures
        await read(engine, tokens_of(3))
        assert engine.failed_steps == 0


async def test_numbers_that_are_not_finite_fail_their_own_document() -> None:
    runner, witness = CountingRunner(), Witness()
    spoilt = tokens_of(40)
    spoilt[30] = OVERFLOWS
    async with running(runner, witness) as engine:
        runner.pause()
        mates = [engine.open(opening(tokens_of(40, i))) for i in range(2)]
        culprit = engine.open(opening(spoilt))
        runner.resume()
        with pytest.raises(StepFailed, match="not finite"):
            await rest(culprit)
        for i, mate in enumerate(mates):
            check(await rest(mate), tokens_of(40, i))
    assert (witness.failures, witness.spoilt) == (0, 1)


@pytest.mark.parametrize(
    ("token", "message"), [(RAISES, "reading the document failed"), (OVERFLOWS, "not finite")]
)
async def test_a_document_fails_once_with_more_of_it_in_flight_and_its_mate_goes_on(
    token: int, message: str
) -> None:
    runner, witness = DeviceRunner(slots=2), Witness()
    tokens = marked(1, ROWS + 2)
    tokens[3] = token
    async with running(runner, witness) as engine:
        culprit = engine.open(opening(tokens))
        await runner.until_launched(1)
        mate = engine.open(opening(marked(2, ROWS - 2)))
        await runner.until_launched(1)
        assert {*marks(runner.steps[1])} == {1, 2}
        runner.end_step()
        await witness.step_ended()
        with pytest.raises(StepFailed, match=message):
            await rest(culprit)
        assert engine.failed_steps == (token == RAISES)
        assert witness.slots == 2, "the next step is in flight, in both slots"
        runner.end_step()
        check(await rest(mate), marked(2, ROWS - 2))
        assert witness.slots == 0
        assert engine.failed_steps == 0
    assert [how for how, _ in witness.ended] == ["failed", "done"]


async def test_a_launch_that_raises_fails_its_step_and_no_other() -> None:
    class Reluctant(CountingRunner):
        def take(self, batch: object) -> None:
            raise RuntimeError("not today")

    runner = Reluctant()
    async with running(runner) as engine:
        with pytest.raises(StepFailed):
            await read(engine, tokens_of(9))
        del Reluctant.take
        check(await read(engine, tokens_of(9)), tokens_of(9))
