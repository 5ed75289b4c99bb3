"""States in their slots."""

import pytest
import torch

from gma.model.config import ModelConfig
from gma.model.state import State
from gma.service.engine.snapshot import Part
from gma.service.runners.pool import StatePool

CONFIG = ModelConfig(
    name="tiny",
    labels=("a", "b", "c"),
    vocab_size=50,
    width=8,
    layers=2,
    heads=2,
    routing_dim=3,
    value_dim=4,
    num_components=5,
    mlp_width=16,
)


def state_of(value: float, documents: int = 1) -> State:
    state = State.zeros(CONFIG, documents)
    for _, tensor in state.tensors():
        tensor.fill_(value)
    return state


def values(state: State) -> list[set[float]]:
    """What each document's tensors hold."""
    documents = len(state.weight)
    return [
        {value for _, tensor in state.tensors() for value in tensor[document].flatten().tolist()}
        for document in range(documents)
    ]


def test_a_fresh_slot_shows_nothing_of_the_past_even_if_that_was_not_a_number() -> None:
    pool = StatePool(CONFIG, 3)
    pool.scatter(torch.tensor([0, 1, 2, 3]), state_of(float("nan"), 4))
    pool.scatter(torch.tensor([1]), state_of(7))
    slots, fresh = torch.tensor([2, 1, 3]), torch.tensor([True, False, True])
    assert values(pool.gather(slots, fresh)) == [{0}, {7}, {0}]


def test_states_are_scattered_to_their_slots_only() -> None:
    pool = StatePool(CONFIG, 3)
    pool.scatter(torch.tensor([2, 0]), state_of(5, 2))
    everything = pool.gather(torch.arange(4), torch.zeros(4, dtype=torch.bool))
    assert values(everything) == [{5}, {0}, {5}, {0}]


def test_a_snapshot_is_a_copy_that_another_pool_can_take() -> None:
    here, there = StatePool(CONFIG, 2), StatePool(CONFIG, 5)
    here.scatter(torch.tensor([1]), state_of(3))
    snapshot = here.snapshot(1)()
    here.scatter(torch.tensor([1]), state_of(4))
    there.restore(4, snapshot)
    found = [
        {value for x in taken.values() for value in x.flatten().tolist()}
        for taken in (snapshot, there.snapshot(4)(), here.snapshot(1)(), there.snapshot(3)())
    ]
    assert found == [{3}, {3}, {4}, {0}]
    assert {name: Part(x.shape[1:], x.dtype) for name, x in snapshot.items()} == here.parts


def test_the_scratch_slot_has_no_snapshot() -> None:
    pool = StatePool(CONFIG, 2)
    for slot in (pool.count, -1):
        with pytest.raises(ValueError, match="not one of 2"):
            pool.snapshot(slot)


def test_states_keep_the_models_precision() -> None:
    assert StatePool(CONFIG, 2, dtype=torch.float64).states.memory.dtype == torch.float64
