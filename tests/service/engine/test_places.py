"""Who gets slots and pages. No engine, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gma.service.engine.places import NO_SLOT, SHORT_SHARE, SHORTS, Places

PAGES = 2 * SHORT_SHARE
SHORT = 2
LONG = PAGES - SHORTS * SHORT


@dataclass(eq=False)
class Guest:
    needs: int
    slot: int = NO_SLOT
    pages: list[int] = field(default_factory=list)


def admitted(places: Places, guests: list[Guest]) -> list[Guest]:
    return list(places.admit(guests))


def test_a_place_is_a_slot_and_all_pages_that_nobody_else_has() -> None:
    places = Places(9, PAGES)
    guests = [Guest(needs) for needs in (1, 50, SHORT, 3)]
    assert admitted(places, guests) == guests
    assert [len(guest.pages) for guest in guests] == [1, 50, SHORT, 3]
    assert len({page for guest in guests for page in guest.pages}) == 54 + SHORT
    assert len({guest.slot for guest in guests} - {NO_SLOT}) == 4
    assert places.in_use == (4, 54 + SHORT)
    for guest in guests:
        places.leave(guest)
        assert (guest.slot, guest.pages) == (NO_SLOT, [])
    assert places.in_use == (0, 0)


def test_the_longest_fits_and_leaves_short_ones_their_pages() -> None:
    places = Places(99, PAGES)
    assert places.longest == LONG
    long, shorts = Guest(LONG), [Guest(SHORT) for _ in range(SHORTS + 1)]
    assert admitted(places, [long, *shorts]) == [long, *shorts[:-1]]
    assert places.in_use == (SHORTS + 1, PAGES)


def test_short_ones_pass_a_long_one_and_no_long_one_does() -> None:
    places = Places(9, PAGES)
    (first,) = admitted(places, [Guest(100)])
    second, third, short = Guest(LONG - 99), Guest(SHORT + 1), Guest(1)
    assert admitted(places, [second, third, short]) == [short]
    places.leave(first)
    assert admitted(places, [second, third]) == [second, third]


def test_short_ones_never_take_what_a_long_one_waits_for() -> None:
    places = Places(999, PAGES)
    shorts = admitted(places, [Guest(SHORT) for _ in range(200)])
    assert len(shorts) == SHORTS
    assert len(admitted(places, [Guest(LONG)])) == 1


def test_without_a_slot_nobody_gets_pages() -> None:
    places = Places(1, PAGES)
    first, second = Guest(5), Guest(6)
    assert admitted(places, [first, second]) == [first]
    assert places.in_use == (1, 5)
    places.leave(first)
    assert admitted(places, [second]) == [second]


def test_who_needs_no_pages_needs_a_slot_alone() -> None:
    places = Places(2, 0)
    guests = [Guest(0) for _ in range(3)]
    assert admitted(places, guests) == guests[:2]


@pytest.mark.parametrize("pages", [1, SHORT_SHARE - 1])
def test_too_few_pages_for_a_share_are_for_all(pages: int) -> None:
    places = Places(2, pages)
    assert places.longest == pages
    assert len(admitted(places, [Guest(pages)])) == 1
    assert not admitted(places, [Guest(1)])
