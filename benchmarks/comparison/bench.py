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
from benchmarks.comparison.mixers import Mixer
from benchmarks.comparison.runs import SPEED, Result, Run
from benchmarks.comparison.sizes import Size
from benchmarks.comparison.suite import RECIPES, tiny
from benchmarks.comparison.task import Task
from benchmarks.comparison.trainer import Trainer
from benchmarks.timing import first_line, machine

PRETRAINING = 1 << 20
"""The first step of pretraining, so that its batches are others than those of training."""


class Kernels(NamedTuple):
    """Whether a library's kernels are used, and why not, if they were to be had."""

    fast: bool
    errors: dict[str, float]
    why: str


class Bench(NamedTuple):
    """Does runs on one device, one after the other, until a deadline of the monotonic clock."""

    texts: Path
    device: torch.device
    deadline: float = math.inf
    compiled: bool = False
    quick: bool = False

    def perform(self, run: Run, task: Callable[[str], Task]) -> Result:
        """Return what came of a run; `task` makes a task by its name. Raises OutOfTime."""
        began = time.monotonic()
        recipe = RECIPES["language" if run.task == SPEED else run.task]
        size, mixer = (tiny(recipe) if self.quick else recipe).size, MIXERS[run.mixer]
        kernels = self._kernels(mixer, size)
        torch.manual_seed(run.seed)
        model = Backbone(size, mixer).to(self.device)
        model.choose(kernels.fast)
        if self.compiled:
            for layer in model.layers:
                layer.compile()
        trainer = Trainer(model, run.rate, self.deadline)
        found = self._timed(model) if run.task == SPEED else _trained(run, task, trainer)
        return {
            **found,
            "parameters": parameters(model),
            "kernels": kernels._asdict(),
            "seconds": round(time.monotonic() - began, 1),
            "machine": {**machine(self.device), "compiled": self.compiled},
        }

    def _kernels(self, mixer: type[Mixer], size: Size) -> Kernels:
        """Choose a library's kernels if they are right here; plain definitions are, but slow."""
        if self.device.type != "cuda":
            return Kernels(False, {}, "")
        try:
            return Kernels(True, agreement.check(mixer, size, self.device), "")
        except Exception as error:
            if "CUDA error" in str(error):  # nothing runs on the device after it
                raise
            return Kernels(False, {}, first_line(error))

    def _timed(self, model: Backbone) -> Result:
        return speed.measured(model, *((256, (64,), (64, 128)) if self.quick else ()))


def _trained(run: Run, task: Callable[[str], Task], trainer: Trainer) -> Result:
    began = time.monotonic()
    made = task(run.task)
    recipe, model = made.recipe, trainer.model
    prepared = time.monotonic()
    losses = []
    if run.pretrained and recipe.pretraining:
        text = trainer.pretrain(
            lambda step: made.batch(run.seed, PRETRAINING + step), recipe.pretraining
        )
        losses.append(float(text[-1]))
    after = trainer.train(lambda step: made.batch(run.seed, step), recipe.steps)
    losses.append(float(torch.stack(after[-16:]).mean()))
    trained = time.monotonic()
    valid = made.evaluate(model, "valid", trainer)
    test = made.evaluate(model, "test", trainer)
    ended = time.monotonic()
    return {
        "steps": recipe.steps,
        "tokens": (recipe.steps + (recipe.pretraining if run.pretrained else 0)) * recipe.tokens,
        "losses": losses,
        "valid": valid,
        "test": test,
        "score": made.score(valid),
        "lower": made.lower,
        "spent": {
            "preparing": round(prepared - began, 1),
            "training": round(trained - prepared, 1),
            "judging": round(ended - trained, 1),
        },
    }
