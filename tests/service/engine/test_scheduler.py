"""The policy, on plain numbers: fair, work-conserving, starving nobody."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gma.service.engine.scheduler import schedule

CHUNK = 4


@dataclass
class Backlog:
    name: str
    queued: int
    complete: bool = True
    served: int = -1
    at_once: bool = False
    steady: bool = False


def plan(backlogs: list[Backlog], rows: int) -> list[tuple[str, int]]:
    return [(backlog.name, tokens) for backlog, tokens in schedule(backlogs, rows, CHUNK)]


def rows_of(tokens: int) -> int:
    return -(-tokens // CHUNK)


def random_cases(seed: int, count: int = 300) -> Iterator[tuple[list[Backlog], int]]:
    rng = random.Random(seed)
    for _ in range(count):
        backlogs = [
            Backlog(str(i), rng.randrange(0, 40), rng.random() < 0.5, rng.randrange(5))
            for i in range(rng.randrange(0, 12))
        ]
        for backlog in backlogs:
            backlog.at_once = backlog.complete and rng.random() < 0.5
        yield backlogs, rng.randrange(1, 10)


def ready(backlog: Backlog) -> int:
    return rows_of(backlog.queued) if backlog.complete else backlog.queued // CHUNK


def test_a_lone_document_fills_the_grid() -> None:
    assert plan([Backlog("a", 100)], rows=8) == [("a", 32)]


def test_only_a_finished_documents_last_chunk_is_partial() -> None:
    assert plan([Backlog("a", 10, complete=True)], rows=8) == [("a", 10)]
    assert plan([Backlog("a", 10, complete=False)], rows=8) == [("a", 8)]
    assert plan([Backlog("a", 3, complete=False)], rows=8) == []


def test_nothing_waiting_is_nothing_to_do() -> None:
    assert plan([], rows=8) == []
    assert plan([Backlog("a", 0, complete=True)], rows=8) == []


def test_everyone_has_a_row_before_anyone_has_two() -> None:
    assert plan([Backlog("long", 1000), Backlog("short", 2)], rows=4) == [
        ("long", 12),
        ("short", 2),
    ]


def test_rows_left_level_the_longest_backlogs() -> None:
    backlogs = [Backlog("a", 40), Backlog("b", 20), Backlog("c", 8)]
    assert plan(backlogs, rows=3 + 5) == [("a", 24), ("b", 4), ("c", 4)]
    assert plan(backlogs, rows=3 + 7) == [("a", 28), ("b", 8), ("c", 4)]


def test_one_that_is_best_read_at_once_gets_all_its_rows_or_waits() -> None:
    backlogs = [
        Backlog("long", 1000, at_once=True),
        Backlog("middle", 19, at_once=True),
        Backlog("short", 7, at_once=True),
    ]
    assert plan(backlogs, rows=3 + 6) == [("long", 8), ("middle", 19), ("short", 7)]
    assert plan(backlogs, rows=3 + 4) == [("long", 8), ("middle", 19)]
    assert plan(backlogs, rows=3) == [("long", 8), ("middle", 4)]
    assert plan(backlogs[1:], rows=7) == [("middle", 19), ("short", 7)]


def test_as_many_that_are_read_at_once_as_rows_are_read_one_after_the_other() -> None:
    backlogs = [Backlog(str(i), 2 * CHUNK, at_once=True) for i in range(8)]
    for step in range(2):
        for backlog, tokens in schedule(backlogs, 8, CHUNK):
            assert tokens == 2 * CHUNK
            backlog.queued, backlog.served = 0, step
    assert not any(backlog.queued for backlog in backlogs)


def test_with_too_few_rows_those_served_longest_ago_come_first() -> None:
    backlogs = [Backlog("a", 9, served=3), Backlog("b", 9, served=1), Backlog("c", 9, served=2)]
    assert plan(backlogs, rows=2) == [("b", 4), ("c", 4)]


def test_ties_keep_the_order_given() -> None:
    assert plan([Backlog("a", 9), Backlog("b", 9), Backlog("c", 9)], rows=2) == [("a", 4), ("b", 4)]


@pytest.mark.parametrize("seed", range(5))
def test_plans_are_valid_and_fair_and_leave_rows_empty_only_for_who_needs_more(seed: int) -> None:
    for backlogs, rows in random_cases(seed):
        granted = {b.name: rows_of(tokens) for b, tokens in schedule(backlogs, rows, CHUNK)}
        runnable = {b.name: ready(b) for b in backlogs if ready(b)}
        assert granted.keys() <= runnable.keys()
        assert all(1 <= granted[name] <= runnable[name] for name in granted)
        left = rows - sum(granted.values())
        whole = {b.name for b in backlogs if b.at_once and ready(b) <= rows}
        passed_over = runnable.keys() - granted.keys()
        assert left >= 0
        assert all(granted[name] == runnable[name] for name in granted.keys() & whole)
        assert not left or all(granted[name] == runnable[name] for name in granted), "no row idle"
        assert not left or all(name in whole and runnable[name] > left for name in passed_over)
        if not whole:
            assert len(granted) == min(rows, len(runnable)), "a row for each before a second"


@pytest.mark.parametrize("seed", range(5))
def test_all_rows_are_full_but_a_finished_documents_last(seed: int) -> None:
    for backlogs, rows in random_cases(seed):
        for backlog, tokens in schedule(backlogs, rows, CHUNK):
            assert tokens % CHUNK == 0 or (backlog.complete and tokens == backlog.queued)


@pytest.mark.parametrize("seed", range(5))
def test_a_second_row_goes_to_no_shorter_backlog(seed: int) -> None:
    for backlogs, rows in random_cases(seed):
        granted = schedule(backlogs, rows, CHUNK)
        for taker, tokens in granted:
            if tokens <= CHUNK or (taker.at_once and tokens == taker.queued):
                continue
            before_its_last_row = taker.queued - (rows_of(tokens) - 1) * CHUNK
            for other, others in granted:
                if rows_of(others) < ready(other):
                    assert other.queued - others <= before_its_last_row


@pytest.mark.parametrize(("documents", "rows"), [(3, 2), (9, 8), (8, 8), (20, 3), (5, 1)])
def test_each_of_n_documents_has_its_turn_within_n_over_r_steps(documents: int, rows: int) -> None:
    rng = random.Random(documents)
    backlogs = [Backlog(str(i), rng.randrange(1000, 9000)) for i in range(documents)]
    turn = -(-documents // rows)
    for step in range(40):
        for backlog, tokens in schedule(backlogs, rows, CHUNK):
            backlog.queued -= tokens
            backlog.served = step
        if step >= turn:
            assert all(step - backlog.served <= turn for backlog in backlogs)


def test_a_stream_of_new_documents_starves_no_old_one() -> None:
    book = Backlog("book", 4000)
    backlogs = [book]
    slots, rows = 16, 2
    waits = []
    for step in range(200):
        arrivals = [Backlog(f"{step}.{i}", CHUNK, served=step - 2) for i in range(3)]
        backlogs += arrivals[: slots - len(backlogs)]
        for backlog, tokens in schedule(backlogs, rows, CHUNK):
            if backlog is book:
                waits.append(step - book.served)
            backlog.queued -= tokens
            backlog.served = step
        backlogs = [backlog for backlog in backlogs if backlog.queued]
    assert waits
    assert max(waits) <= slots // rows + 1
