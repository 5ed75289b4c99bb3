"""Does a run: makes the model, checks its kernels, trains it and judges it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.comparison import agreement, speed
from benchmarks.comparison.backbone import Backbone, parameters
from benchmarks.comparison.gaussian import MIXERS
from benchmarks.comparison.runs import SPEED, Result, Run
from benchmarks.comparison.suite import RECIPES, tiny
from benchmarks.comparison.task import Task
from benchmarks.comparison.trainer import Trainer
from benchmarks.timing import machine

PRETRAINING = 1 << 20
"""The first step of pretraining, so that its batches are others than those of training."""


class Bench(NamedTuple):
    """Does runs on one device, one after the other, until a deadline of the monotonic clock."""

    texts: Path
    device: torch.device
    deadline: float = math.inf
    compiled: bool = False
    quick: bool = False

    def perform(self, run: Run, task: Callable[[str], Task]) -> Result:
        """Return what came of a run; `task` makes a task by its name.

        Raises OutOfTime, and Disagreement if a kernel is not what it is taken for.
        """
        began = time.monotonic()
        torch.manual_seed(run.seed)
        recipe = RECIPES["language" if run.task == SPEED else run.task]
        size = (tiny(recipe) if self.quick else recipe).size
        fast = self.device.type == "cuda"
        errors = agreement.check(MIXERS[run.mixer], size, self.device) if fast else {}
        torch.manual_seed(run.seed)
        model = Backbone(size, MIXERS[run.mixer]).to(self.device)
        model.choose(fast)
        if self.compiled:
            for layer in model.layers:
                layer.compile()
        trainer = Trainer(model, run.rate, self.deadline)
        found = self._timed(model) if run.task == SPEED else _trained(run, task, trainer)
        return {
            **found,
            "parameters": parameters(model),
            "kernel_errors": errors,
            "seconds": round(time.monotonic() - began, 1),
            "machine": {**machine(self.device), "compiled": self.compiled},
        }

    def _timed(self, model: Backbone) -> Result:
        return speed.measured(model, *((256, (64,), (64, 128)) if self.quick else ()))


def _trained(run: Run, task: Callable[[str], Task], trainer: Trainer) -> Result:
    made = task(run.task)
    recipe, model = made.recipe, trainer.model
    losses = []
    if run.pretrained and recipe.pretraining:
        text = trainer.pretrain(
            lambda step: made.batch(run.seed, PRETRAINING + step), recipe.pretraining
        )
        losses.append(float(text[-1]))
    after = trainer.train(lambda step: made.batch(run.seed, step), recipe.steps)
    losses.append(float(torch.stack(after[-16:]).mean()))
    valid = made.evaluate(model, "valid", trainer)
    return {
        "tokens": (recipe.steps + (recipe.pretraining if run.pretrained else 0)) * recipe.tokens,
        "losses": losses,
        "valid": valid,
        "test": made.evaluate(model, "test", trainer),
        "score": made.score(valid),
        "lower": made.lower,
    }
