"""One training run: its steps, its evaluations, and how it goes on after an interruption."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig, Place, dotted
from gma.model.training import factors, stacking, thresholds, token_scores
from gma.model.training.card import card_of
from gma.model.training.config import TrainingConfig
from gma.model.training.crops import Crops
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import Fit, measure_tokens
from gma.model.training.losses import Losses
from gma.model.training.prepared import Prepared

LOG = "log.jsonl"
RESUME = "resume.safetensors"
"""Files of a run: a line for each report, and all that it takes to go on."""

LOG_EVERY = 20
"""Steps whose mean losses make a line of the log."""


class Run:
    """One training run and its folder: ``log.jsonl``, ``resume.safetensors``, ``checkpoint/``.

    A step draws all that is random from the seed and its own number, so a resumed run ends where an
    uninterrupted one does.
    """

    def __init__(
        self, prepared: Prepared, out: Path, model: ModelConfig, config: TrainingConfig
    ) -> None:
        self.prepared, self.out, self.model, self.config = prepared, out, model, config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(config.seed)
        self.classifier = Classifier(model).to(self.device)
        self.classifier.choose_mixers()
        self.classifier.pooling.token.weight.requires_grad_(False)
        self.average = copy.deepcopy(self.classifier).requires_grad_(False).eval()
        self.crops = Crops(
            prepared.train,
            config.start_fraction,
            self.device,
            balance=config.balance,
            label_weights=self._label_weights(),
            spans=model.pooling == "any" and config.span_weight > 0,
        )
        rates = self.crops.rates
        losses = Losses(
            self.classifier,
            config,
            None if rates is None else torch.from_numpy(rates).float().to(self.device),
        )
        self.losses = torch.compile(losses, dynamic=False) if config.compile else losses
        self.optimizer = torch.optim.AdamW(
            self._groups(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.rare = self._rare() if config.rare_dropout else None
        self.step = 0
        self.best, self.since_best = -math.inf, 0

    @property
    def _fit(self) -> Fit | None:
        """What chooses thresholds, if the model is to have any."""
        if self.model.multi_label:
            return thresholds.best_f1
        share = self.config.none_below
        return None if share is None else partial(thresholds.keeping, lost=share)

    @property
    def stopped(self) -> bool:
        """Whether valid has not improved for ``patience`` evaluations."""
        return 0 < self.config.patience <= self.since_best

    def _label_weights(self) -> dict[int, float]:
        """Look the labels up that the configuration weighs."""
        index = {label: i for i, label in enumerate(self.prepared.labels)}
        for label in self.config.label_weights:
            if label not in index:
                raise TrainingError(f"label_weights: no document of train has the label {label!r}")
        return {index[label]: weight for label, weight in self.config.label_weights.items()}

    def _groups(self) -> list[dict[str, object]]:
        """Group what is trained: matrices decay, norms, biases and mixtures do not."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.classifier.named_parameters():
            if not parameter.requires_grad:
                continue
            (others if parameter.ndim < 2 or ".mixture." in name else matrices).append(parameter)
        return [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def _rare(self) -> Tensor:
        """Find the tokens that few training documents use, names above all: (vocab,) bool."""
        train = self.prepared.train
        used = train.document_frequency(self.model.vocab_size)
        return torch.from_numpy(used <= self.config.rare_documents * len(train)).to(self.device)

    def fit_token_scores(self, progress: Progress) -> None:
        """Fit the linear part first: what it leaves open is for the deep scores."""
        fitted = token_scores.fit(
            self.crops, self.prepared.train, self.model, self.config.token_scores, progress
        )
        if not fitted.isfinite().all():
            raise TrainingError("the tokens' own scores diverged: lower their learning_rate")
        for classifier in self.classifier, self.average:
            classifier.pooling.token.weight.data.copy_(fitted)

    def train(self, progress: Progress) -> None:
        """Train to the last step, or until valid has not improved for ``patience`` evaluations.

        Raises TrainingError if a loss is not finite.
        """
        bar = progress.add_task("training", total=self.config.steps, completed=self.step)
        started = time.monotonic()
        losses: list[Tensor] = []
        tokens: list[Tensor] = []
        while self.step < self.config.steps and not self.stopped:
            loss, read = self._train_step()
            losses.append(loss)
            tokens.append(read)
            self.step += 1
            progress.update(bar, advance=1)
            evaluating = self.step % self.config.evaluate_every == 0
            evaluating |= self.step == self.config.steps
            if evaluating or self.step % LOG_EVERY == 0:
                label, language, spans = self._finite(losses)
                progress.update(bar, description=f"training, loss {label:.3f}")
                self.log(
                    label_loss=label,
                    language_loss=language,
                    **({"span_loss": spans} if self.model.pooling == "any" else {}),
                    tokens_per_second=round(
                        torch.stack(tokens).sum().item() / (time.monotonic() - started)
                    ),
                    length=self._length(self.step - 1),
                )
                losses.clear()
                tokens.clear()
                if evaluating:
                    progress.update(bar, description="training, measuring valid")
                    self._evaluate()
                    self._save_resume()
                started = time.monotonic()
        if self.stopped:
            self.log(stopped=f"no better for {self.since_best} evaluations")

    def _finite(self, losses: list[Tensor]) -> list[float]:
        """Return the mean label, next-token and span loss of the last steps, if they are finite."""
        label, language, spans = torch.stack(losses).mean(0).tolist()
        if not math.isfinite(label + language + spans):
            raise TrainingError(
                f"the loss is no longer finite after {self.step} steps (label {label}, next token "
                f"{language}, spans {spans}): lower learning_rate or gradient_clip and start "
                "another run"
            )
        return [label, language, spans]

    def _length(self, step: int) -> int:
        """Return how long a crop is: as the curriculum says, as far as documents are."""
        prefix = self.config.prefix
        return min(self.config.length_at(step), -(-self.crops.longest // prefix) * prefix)

    def _train_step(self) -> tuple[Tensor, Tensor]:
        """Do a step; return label, next-token and span loss (3,), and the tokens read ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        seeds = np.random.SeedSequence([self.config.seed, self.step])
        # For the hidden tokens and dropout.
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        length = self._length(self.step)
        rows = max(1, self.config.tokens_per_step // length)
        drawn = self.crops.draw(np.random.default_rng(seeds), rows, length)
        keep = self._kept(drawn.tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses: Tensor = self.losses(drawn, keep)
        weights = [
            self.config.class_weight,
            self.config.language_weight_at(self.step),
            self.config.span_weight,
        ]
        torch.autograd.backward(losses @ losses.new_tensor(weights))
        nn.utils.clip_grad_norm_(self.classifier.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Early on the average follows closely, or it would remember the random start.
        decay = min(self.config.average, (self.step + 1) / (self.step + 10))
        averaged: list[Tensor] = [*self.average.parameters()]
        with torch.no_grad():
            torch._foreach_lerp_(
                averaged,
                [*self.classifier.parameters()],
                1.0 - decay if self.config.average else 1.0,
            )
        return losses.detach(), drawn.lengths.sum()

    def _kept(self, tokens: Tensor) -> Tensor:
        """Draw what is hidden, (B, N) float: 0 where a token is; each crop draws its own share."""
        low, high = self.config.token_dropout
        share = low + (high - low) * torch.rand(len(tokens), 1, device=self.device)
        if self.rare is not None:
            share = torch.where(self.rare[tokens], self.config.rare_dropout, share)
        return (torch.rand(tokens.shape, device=self.device) >= share).float()

    def _evaluate(self) -> None:
        """Stack and measure the averaged weights; keep them if no evaluation so far was better."""
        candidate = copy.deepcopy(self.average)
        valid = self.prepared.valid
        calibrated = self._calibrate(candidate)
        measured = measure_tokens(candidate, valid, self.prepared.tokenizer, self._fit)
        chosen = {"thresholds": measured.thresholds}
        candidate.config = candidate.config.model_copy(update=chosen)
        score = measured.score(self.config.choose_by)
        kept = score > self.best
        self.log(valid=measured.as_dict(), **calibrated, kept=kept)
        if not kept:
            self.since_best += 1
            return
        self.best, self.since_best = score, 0
        card = card_of(candidate.config, self.config, measured, self.step)
        weights.save(self.out / "checkpoint", candidate, self.prepared.tokenizer, card=card)

    def _calibrate(self, candidate: Classifier) -> dict[str, object]:
        """Make the scores mean something on valid; return what the log tells of it."""
        if self.model.pooling == "any":
            fitted = factors.fit(candidate, self.prepared.valid)
            factors.apply(candidate, fitted)
            return {"factors": fitted}
        stacked = stacking.fit(candidate, self.prepared.valid)
        stacking.apply(candidate, stacked)
        return {"stacking": stacked._asdict()}

    def log(self, **line: object) -> None:
        """Add a line to the log, with the step it is at."""
        with (self.out / LOG).open("a") as file:
            file.write(json.dumps({"step": self.step, **line}) + "\n")

    def _resumable(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of all that a run consists of beside its counters."""
        for name, parameter in self.classifier.named_parameters():
            yield f"model/{name}", parameter.data
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value
        for name, parameter in self.average.named_parameters():
            yield f"average/{name}", parameter.data

    def _save_resume(self) -> None:
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._resumable()}
        tensors["run"] = torch.tensor([self.step, self.best, self.since_best], dtype=torch.float64)
        partial = self.out / f"{RESUME}.partial"
        save_file(tensors, partial, metadata={"config": self._described()})
        partial.replace(self.out / RESUME)

    def _described(self) -> str:
        """Describe what a run can't change on its way."""
        fixed = self.config.model_dump(mode="json", exclude={"compile", "patience"})
        return json.dumps({"model": self.model.model_dump(mode="json"), "training": fixed})

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
        if changed := _changed(json.loads(described or "{}"), json.loads(self._described())):
            raise TrainingError(
                f"{file} is of a run with another configuration: {'; '.join(changed)}"
            )
        for parameter in filter(lambda p: p.requires_grad, self.classifier.parameters()):
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


def _changed(old: Any, new: Any, place: Place = ()) -> list[str]:
    """Say which fields of nested tables differ, with what was and what is."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [x for name in names for x in _changed(old.get(name), new.get(name), (*place, name))]
    return [] if old == new else [f"{dotted(place)} was {json.dumps(old)}, not {json.dumps(new)}"]
