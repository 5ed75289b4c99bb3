"""Memory that goes back to the system."""

from __future__ import annotations

import gc
import weakref

from gma.service import heap


class Node:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_only_refers_to_itself_is_freed() -> None:
    gc.disable()
    try:
        before = Node()
        heap.settle()
        gone = weakref.ref(Node())
        assert gone()
        heap.give_back()
        assert not gone()
        assert before.itself is before
    finally:
        gc.unfreeze()
        gc.enable()
