"""What a run without a configuration trains: sizes that follow from the data and the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gma.model.training.splits import TRAIN
from gma.model.training.survey import Survey

CHOSEN = "training.toml"
"""File of a run: the configuration that was chosen for it."""

BYTES_PER_TOKEN = 4
"""Of English; other text has more tokens, and its documents are cropped a little sooner."""

SHORTEST = 128
"""Tokens of a crop at least, and of a prefix after which the loss is taken."""

EVALUATIONS = 4


@dataclass(frozen=True)
class Machine:
    """How much a machine is asked to do."""

    name: str
    longest: int  # tokens of a crop
    step: int  # tokens of a step
    most: int  # tokens that are trained on
    least: int  # the same, where documents are few
    compile: bool


CPU = Machine("the CPU", longest=1024, step=8192, most=2_000_000, least=400_000, compile=False)
GPU = Machine("a GPU", longest=4096, step=65536, most=200_000_000, least=6_000_000, compile=False)

EPOCHS = 3
"""How often every token is read, as far as the machine allows: more teaches documents by heart."""


@dataclass(frozen=True)
class Chosen:
    """Sizes of a run that begins from a base."""

    name: str  # of the model
    documents: int
    bytes: int  # of their text
    labels: int
    machine: Machine
    length: int  # tokens of a crop
    steps: int
    tokens_per_step: int
    epochs: float  # how often each token is read, about

    @classmethod
    def of(cls, name: str, survey: Survey, machine: Machine) -> Self:
        """Choose by what was seen of all documents; ``name`` is that of the run's folder."""
        train = survey.surveyed[TRAIN]
        tokens = np.maximum(np.array(train.sizes) / BYTES_PER_TOKEN, 1)
        # Three documents of four fit into a crop, if the machine can hold one as long.
        length = _power_of_two(np.quantile(tokens, 0.75), SHORTEST, machine.longest)
        read = float(np.minimum(tokens, length).mean())  # of a crop
        total = min(max(EPOCHS * tokens.sum(), machine.least), machine.most)
        rows = max(1, round(machine.step / length))
        steps = max(EVALUATIONS, round(total / (rows * read)))
        return cls(
            name=re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "mine",
            documents=train.documents,
            bytes=train.bytes,
            labels=len(survey.labels),
            machine=machine,
            length=length,
            steps=steps,
            tokens_per_step=rows * length,
            epochs=float(steps * rows * read / tokens.sum()),
        )

    @property
    def training(self) -> dict[str, Any]:
        """The table ``[training]``."""
        return {
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "lengths": [[0.0, self.length]],
            "prefix": min(self.length, 256),
            "start_fraction": 0.3,
            "learning_rate": 1e-3,
            "warmup": 0.1,
            "average": min(0.995, round(1 - 5 / self.steps, 3)),
            "dropout": 0.2,
            "language_weight": [0.0, 0.0],
            "evaluate_every": -(-self.steps // EVALUATIONS),
            "compile": self.machine.compile,
        }

    def toml(self) -> str:
        """Write the configuration."""
        model = ["", "[model]", f"name = {json.dumps(self.name)}", ""]
        lines = [f"{name} = {json.dumps(value)}" for name, value in self.training.items()]
        return "\n".join([*(f"# {line}" for line in self.told()), *model, "[training]", *lines, ""])

    def told(self) -> Iterator[str]:
        """Yield lines for people: what was chosen, and why."""
        yield (
            f"no configuration: chosen by {self.documents:,} documents of {self.bytes / 1e6:,.1f} "
            f"MB and {self.labels:,} labels, for {self.machine.name}:"
        )
        yield (
            f"  {self.steps:,} steps of {self.tokens_per_step:,} tokens, crops of {self.length:,}: "
            f"each document is read about {self.epochs:.1f} times"
        )


def _power_of_two(x: float, least: int, most: int) -> int:
    """Return the least power of two that x is not above, within bounds that are such."""
    return int(min(max(2 ** int(np.ceil(np.log2(x))), least), most))
