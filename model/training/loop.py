"""What every training does: its steps, its evaluations, and going on after an interruption."""

from __future__ import annotations

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gma.model.backbone import Backbone
from gma.model.training import together
from gma.model.training.board import Board
from gma.model.training.errors import TrainingError
from gma.model.training.folder import LOG, RESUME, changed_fields
from gma.model.training.pace import Pace
from gma.model.training.schedule import Schedule

LOG_EVERY = 20
"""Steps whose mean losses make a line of the log."""

MIXTURE = ".mixture."
"""In the names of a mixture's parameters."""

Trained = TypeVar("Trained", bound=Backbone)
Config = TypeVar("Config", bound=Schedule)


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Let a GPU multiply float32 matrices as TF32 meanwhile, and exactly again afterwards."""
    before = torch.get_float32_matmul_precision()
    if together.device().type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Loop(ABC, Generic[Trained, Config]):
    """One run and its folder: ``log.jsonl``, ``resume.safetensors``, ``checkpoint/``.

    A step draws all that is random from the seed and its own number, so a resumed run ends where an
    uninterrupted one does. Several processes (``together``) share a step's crops.
    """

    losses_of: ClassVar[tuple[str, ...]]
    """What the log calls the losses of a step; the first is shown."""

    def __init__(self, out: Path, model: Trained, config: Config) -> None:
        self.out, self.config = out, config
        self.device = together.device()
        self.trained: Trained = model.to(self.device)
        self.trained.choose_mixers()
        self.average = copy.deepcopy(self.trained).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.best, self.since_best = -math.inf, 0
        self.board: Board | None = None

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens that a crop has at most, whatever the curriculum says."""

    @property
    @abstractmethod
    def loss_weights(self) -> list[float]:
        """How much each loss counts in this step."""

    @abstractmethod
    def losses_at(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Draw so many crops of a length; return their losses, and the tokens read ()."""

    @property
    @abstractmethod
    def tokens_of_evaluation(self) -> int:
        """How many tokens an evaluation reads, about."""

    @abstractmethod
    def evaluate(self) -> float:
        """Measure the averaged weights on valid; keep them if they are ``better``. Return the
        score that says so."""

    @abstractmethod
    def told(self, score: float) -> str:
        """Say a score of ``evaluate`` in words."""

    def rate_of(self, name: str) -> float:
        """Say which share of the learning rate a parameter has."""
        return self.config.mixture_learning_rate if MIXTURE in name else 1.0

    @property
    def described(self) -> dict[str, Any]:
        """What a run can't change on its way."""
        fixed = self.config.model_dump(mode="json", exclude={"compile", "patience"})
        return {"model": self.trained.config.model_dump(mode="json"), "training": fixed}

    @property
    def stopped(self) -> bool:
        """Whether valid has not improved for ``patience`` evaluations."""
        return 0 < self.config.patience <= self.since_best

    def better(self, score: float) -> bool:
        """Take note of an evaluation; say whether none so far was as good."""
        if score <= self.best:
            self.since_best += 1
            return False
        self.best, self.since_best = score, 0
        return True

    def _groups(self) -> list[dict[str, Any]]:
        """Group what is trained: matrices decay, norms, biases and mixtures do not."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained.named_parameters():
            if not parameter.requires_grad:
                continue
            lasts = parameter.ndim < 2 or MIXTURE in name
            decay = 0.0 if lasts else self.config.weight_decay
            groups.setdefault((self.rate_of(name), decay), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": decay, "rate": rate}
            for (rate, decay), parameters in groups.items()
        ]

    @_rounded_products()
    def train(self, progress: Progress) -> None:
        """Train to the last step, or until valid has not improved for ``patience`` evaluations.

        Raises TrainingError if a loss is not finite.
        """
        together.spread([*self.trained.parameters(), *self.average.parameters()])
        bar = progress.add_task("training", total=self.config.steps, completed=self.step)
        if together.first():
            self.board = Board(self.out, self.step + 1 if self.step else 0)
        pace = Pace(self.config, self.step, self.tokens_of_evaluation)
        started = time.monotonic()
        losses: list[Tensor] = []
        tokens: list[Tensor] = []
        while self.step < self.config.steps and not self.stopped:
            loss, read = self._train_step()
            losses.append(loss)
            tokens.append(read)
            self.step += 1
            progress.update(bar, advance=1)
            if self.step <= pace.probed:
                read.item()  # waits for the device
            pace.stepped(self.step)
            if self.step == pace.probed:
                left = pace.left(self.step, read.item())
                progress.console.print(f"training: {self.config.steps:,} steps, {left}")
            evaluating = self.step % self.config.evaluate_every == 0
            evaluating |= self.step == self.config.steps
            if evaluating or self.step % LOG_EVERY == 0:
                means = self._finite(losses)
                progress.update(bar, description=f"training, loss {means[self.losses_of[0]]:.3f}")
                self.log(
                    **means,
                    tokens_per_second=round(
                        together.total(torch.stack(tokens).sum()).item()
                        / (time.monotonic() - started)
                    ),
                    length=self._length(self.step - 1),
                )
                losses.clear()
                tokens.clear()
                if evaluating:
                    progress.update(bar, description="training, measuring valid")
                    score = self._evaluate()
                    pace.evaluated()
                    told = f"step {self.step:,} of {self.config.steps:,}: {self.told(score)}"
                    if self.step < self.config.steps:
                        told += f"; {pace.left(self.step, read.item())} to go"
                    progress.console.print(told)
                started = time.monotonic()
        if self.stopped:
            self.log(stopped=f"no better for {self.since_best} evaluations")

    def _evaluate(self) -> float:
        """Evaluate and save in the first process, and tell the others what came of it."""
        score = math.nan
        if together.first():
            score = self.evaluate()
            self._save_resume()
        found = torch.tensor([self.best, self.since_best], dtype=torch.float64, device=self.device)
        together.spread([found])
        self.best, self.since_best = found[0].item(), int(found[1])
        return score

    def _finite(self, losses: list[Tensor]) -> dict[str, float]:
        """Return the mean losses of the last steps, if they are finite."""
        mean = together.total(torch.stack(losses).mean(0)) / together.size()
        means = dict(zip(self.losses_of, mean.tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            told = ", ".join(f"{name} {mean}" for name, mean in means.items())
            raise TrainingError(
                f"the loss is no longer finite after {self.step} steps ({told}): lower "
                "learning_rate or gradient_clip and start another run"
            )
        return means

    def _length(self, step: int) -> int:
        """Return how long a crop is: as the curriculum says, as far as documents are."""
        return min(self.config.length_at(step), self.longest)

    def _train_step(self) -> tuple[Tensor, Tensor]:
        """Do a step; return its losses, and the tokens read ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step) * group["rate"]
        own = [together.rank()] if together.size() > 1 else []
        seeds = np.random.SeedSequence([self.config.seed, self.step, *own])
        # For the hidden tokens and dropout.
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        length = self._length(self.step)
        rows = max(1, self.config.tokens_per_step // (length * together.size()))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses, read = self.losses_at(np.random.default_rng(seeds), rows, length)
        torch.autograd.backward(losses @ losses.new_tensor(self.loss_weights))
        together.average_gradients(self.trained.parameters())
        nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Early on the average follows closely, or it would remember the random start.
        decay = min(self.config.average, (self.step + 1) / (self.step + 10))
        averaged: list[Tensor] = [*self.average.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(
                averaged,
                [*self.trained.parameters()],
                1.0 - decay if self.config.average else 1.0,
            )
        return losses.detach(), read

    def log(self, **line: object) -> None:
        """Add a line to the log, with the step it is at."""
        if not together.first():
            return
        with (self.out / LOG).open("a") as file:
            file.write(json.dumps({"step": self.step, **line}) + "\n")
        if self.board:
            self.board.add(self.step, line)

    def _resumable(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of all that a run consists of beside its counters."""
        for name, parameter in self.trained.named_parameters():
            yield f"model/{name}", parameter.data
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value
        for name, parameter in self.average.named_parameters():
            yield f"average/{name}", parameter.data

    def _save_resume(self) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._resumable()}
        tensors["run"] = torch.tensor([self.step, self.best, self.since_best], dtype=torch.float64)
        partial = self.out / f"{RESUME}.partial"
        save_file(tensors, partial, metadata={"config": json.dumps(self.described)})
        partial.replace(self.out / RESUME)

    def resume(self) -> None:
        """Go on where the last evaluation of an interrupted run left off.

        Raises TrainingError if that run can't be read, or was another configuration's.
        """
        file = self.out / RESUME
        try:
            with safe_open(file, "pt") as opened:
                described = (opened.metadata() or {}).get("config")
            tensors = load_file(file, device=str(self.device))
        except SafetensorError as error:
            raise TrainingError(f"{file}: {error}") from error
        if changed := changed_fields(
            json.loads(described or "{}"), json.loads(json.dumps(self.described))
        ):
            raise TrainingError(
                f"{file} is of a run with another configuration: {'; '.join(changed)}"
            )
        for parameter in filter(lambda p: p.requires_grad, self.trained.parameters()):
            on_gpu = self.device.type == "cuda"
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        for name, tensor in self._resumable():
            tensor.copy_(tensors[name])
        step, self.best, since_best = tensors["run"].tolist()
        self.step, self.since_best = int(step), int(since_best)
        if together.first():
            self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Take those lines off the log that this run is about to write again."""
        log = self.out / LOG
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if self._is_past(line)))

    def _is_past(self, line: str) -> bool:
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except json.JSONDecodeError:  # half a line, when the run was interrupted
            return False
