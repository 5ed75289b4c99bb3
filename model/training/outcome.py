"""What came of a run, as it is told at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gma.model.training.evaluation import MULTI_LABEL, ONE_LABEL
from gma.model.training.measured import TITLES

LEARNED = 0.02
"""Share of the loss of guessing that the deep label loss falls by at least if it learns anything:
the mean of some steps differs from it by less than half as much where nothing is learned."""


@dataclass(frozen=True)
class Outcome:
    """Figures of the best checkpoint, read off a run's log."""

    best: dict[str, Any]  # the evaluation of the weights that were kept
    step: int  # of it
    test: dict[str, Any] | None
    baseline: dict[str, Any]
    label_loss: float  # of the deep reading, where the run ended
    guess: float  # `Crops.guess`

    @classmethod
    def of(cls, lines: Sequence[dict[str, Any]]) -> Self:
        """Read the lines of a log."""
        last = {name: line for line in lines for name in line}
        kept = [line for line in lines if line.get("kept")][-1]
        return cls(
            best=kept["valid"],
            step=kept["step"],
            test=last["test"]["test"] if "test" in last else None,
            baseline=last["baseline"]["baseline"] if "baseline" in last else {},
            label_loss=last["label_loss"]["label_loss"],
            guess=last["guess"]["guess"],
        )

    @property
    def learned(self) -> bool:
        """Whether the deep reading tells labels apart better than a guess, where it was trained."""
        return self.label_loss < (1 - LEARNED) * self.guess

    @property
    def names(self) -> tuple[str, ...]:
        """The figures that are told."""
        multi_label = "micro_f1" in self.best["views"][-1]
        return MULTI_LABEL if multi_label else ONE_LABEL

    def told(self) -> Iterator[str]:
        """Yield lines for people: how good the model is, beside the baseline."""
        *some, last = (TITLES[name] for name in self.names)
        told = f"{', '.join(some)} and {last}"
        yield f"On whole documents, {told} (the weights of step {self.step}):"
        for split, measured in (("valid", self.best), ("test", self.test)):
            if measured:
                yield self._row(split, measured["documents"], "this model", measured["views"][-1])
            if split in self.baseline:
                rival = self.baseline[split]
                yield self._row(split, rival["documents"], "linear baseline", rival)
        yield from self._placing()
        if (fitted := self.baseline.get("documents", 0)) < self.baseline.get("of", 0):
            yield f"  (the baseline was fitted to {fitted:,} documents of {self.baseline['of']:,})"
        yield from (f"warning: {warning}" for warning in self.warnings())

    def warnings(self) -> Iterator[str]:
        """Yield what speaks against the model, a sentence or two each."""
        if missing := self.baseline.get("missing"):
            yield f"there is no linear baseline to compare with: it lacks {missing}"
        own, rival = self.best["views"][-1], self.baseline.get("valid")
        if rival and all(own[name] < rival[name] for name in self.names):
            yield "the linear baseline is better than this model"
        if not self.learned:
            yield (
                "the deep reading learned nothing: its label loss is "
                f"{self.label_loss:.3f}, and guessing has {self.guess:.3f}. What the model knows, "
                "single tokens say: try more steps, another learning_rate, or longer crops"
            )

    def _placing(self) -> Iterator[str]:
        for split, measured in (("valid", self.best), ("test", self.test)):
            if placing := (measured or {}).get("placing"):
                yield (
                    f"  {split}, windows of 1,000 bytes by their evidence ({placing['pairs']:,} "
                    f"labels that have spans): the best is right {placing['hit_at_1']:.3f}, one of "
                    f"three {placing['hit_at_3']:.3f}, average precision "
                    f"{placing['average_precision']:.3f}"
                )

    def _row(self, split: str, documents: int, who: str, figures: dict[str, float]) -> str:
        shown = "  ".join(f"{figures[name]:.3f}" for name in self.names)
        return f"  {split} ({documents:,} documents)  {who:<16} {shown}"
