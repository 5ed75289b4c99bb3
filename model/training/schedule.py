"""What every training is told: how long, on what crops, and how fast."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]


class Schedule(BaseModel):
    """How long to train, on crops of which lengths, and how fast. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(gt=0)] = 1000
    tokens_per_step: Annotated[int, Field(gt=0)] = 65536
    lengths: Annotated[
        tuple[Annotated[tuple[Fraction, Annotated[int, Field(gt=0)]], Field(strict=False)], ...],
        Field(
            strict=False,
            description="curriculum: (share of the steps done, tokens of a crop from there on)",
        ),
    ] = ((0.0, 1024), (0.3, 4096))
    start_fraction: Annotated[
        Fraction, Field(description="crops that begin where their document begins")
    ] = 0.15
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    final_learning_rate: Annotated[Fraction, Field(description="as a share of learning_rate")] = (
        0.05
    )
    mixture_learning_rate: Annotated[
        float,
        Field(
            ge=0,
            description="of the mixtures, as a share of learning_rate: as fast as all else, their "
            "components collapse",
        ),
    ] = 0.1
    warmup: Annotated[Fraction, Field(description="share of the steps")] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    average: Annotated[
        float,
        Field(ge=0, lt=1, description="decay a step of the averaged weights; 0: no averaging"),
    ] = 0.995
    evaluate_every: Annotated[int, Field(gt=0, description="steps")] = 200
    patience: Annotated[
        int, Field(ge=0, description="evaluations without a better one before stopping; 0: never")
    ] = 0
    compile: Annotated[bool, Field(description="torch.compile; pays on a GPU")] = False

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        shares = [share for share, _ in self.lengths]
        if not shares or shares[0] != 0.0 or shares != sorted(shares):
            raise ValueError("lengths must begin at 0.0 and ascend")
        return self

    def length_at(self, step: int) -> int:
        """Return how many tokens a crop has at this step."""
        return [length for share, length in self.lengths if step >= share * self.steps][-1]

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at this step: a linear warm-up, then a cosine."""
        warmup = self.warmup * self.steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        floor = self.final_learning_rate
        return self.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
