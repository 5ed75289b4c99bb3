"""Which slots are taken."""

from __future__ import annotations


class Slots:
    """Which of a fixed number of slots are taken. One thread, the event loop's, takes and gives."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} slots: at least one document must fit")
        self.count = count
        self._free = list(range(count))[::-1]

    @property
    def scratch(self) -> int:
        """The slot beyond the others, for a step's unused rows."""
        return self.count

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def in_use(self) -> int:
        return self.count - len(self._free)

    @property
    def state_bytes(self) -> int:
        """Memory of all slots, the scratch slot's too."""
        return 0

    def take(self) -> int:
        """A free slot. What lies in it is another document's: its first step is to be `fresh`."""
        if not self._free:
            raise IndexError("all slots are taken")
        return self._free.pop()

    def give(self, slot: int) -> None:
        if slot in self._free or not 0 <= slot < self.count:
            raise ValueError(f"slot {slot} is not taken")
        self._free.append(slot)
