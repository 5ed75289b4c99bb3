"""The training of a classifier: what it draws, what it makes small, and what it keeps."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from gma.model import weights
from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.training import thresholds, token_scores
from gma.model.training.calibration import calibrate
from gma.model.training.card import card_of
from gma.model.training.config import TrainingConfig
from gma.model.training.crops import Crops
from gma.model.training.errors import TrainingError
from gma.model.training.evaluation import Fit, measure_tokens
from gma.model.training.loop import Loop
from gma.model.training.losses import Losses
from gma.model.training.measured import TITLES
from gma.model.training.prepared import Prepared
from gma.model.weights import POOLING, Base

SCORES = "valid.npy"
"""File of a run: the scores of valid's documents, (documents, labels) float32, by the weights that
were kept."""

PREPARED, CHECKPOINT = "prepared", "checkpoint"
"""Folders of a run: tokens of both splits with the tokenizer, and the weights that were kept."""


class Run(Loop[Classifier, TrainingConfig]):
    """The training of a classifier."""

    losses_of = "label_loss", "language_loss", "span_loss"

    def __init__(
        self,
        prepared: Prepared,
        out: Path,
        model: ModelConfig,
        config: TrainingConfig,
        base: Base | None = None,
    ) -> None:
        """Begin from ``base``'s backbone, if there is one, and from new weights."""
        self.prepared, self.model, self.base = prepared, model, base
        torch.manual_seed(config.seed)
        classifier = Classifier(model)
        classifier.pooling.token.weight.requires_grad_(False)
        if base:
            classifier.load_state_dict(base.backbone.state_dict(), strict=False)
        super().__init__(out, classifier, config)
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
            self.trained,
            config,
            None if rates is None else torch.from_numpy(rates).float().to(self.device),
        )
        self.losses = torch.compile(losses, dynamic=False) if config.compile else losses
        self.rare = self._rare() if config.rare_dropout else None

    @property
    def _fit(self) -> Fit | None:
        """What chooses thresholds, if the model is to have any."""
        if self.model.multi_label:
            return thresholds.best_f1
        share = self.config.none_below
        return None if share is None else partial(thresholds.keeping, lost=share)

    def _label_weights(self) -> dict[int, float]:
        """Look the labels up that the configuration weighs."""
        index = {label: i for i, label in enumerate(self.prepared.labels)}
        for label in self.config.label_weights:
            if label not in index:
                raise TrainingError(f"label_weights: no document of train has the label {label!r}")
        return {index[label]: weight for label, weight in self.config.label_weights.items()}

    def _rare(self) -> Tensor:
        """Find the tokens that few training documents use, names above all: (vocab,) bool."""
        train = self.prepared.train
        used = train.document_frequency(self.model.vocab_size)
        return torch.from_numpy(used <= self.config.rare_documents * len(train)).to(self.device)

    def fit_token_scores(self, progress: Progress) -> None:
        """Fit the linear part first: what it leaves open is for the deep scores."""
        config = self.config.token_scores
        if not config.steps:
            return
        train, valid = self.prepared.train, self.prepared.valid
        fitted = token_scores.fit(self.crops, train, valid, self.model, config, progress)
        if not fitted.scores.isfinite().all():
            raise TrainingError("the tokens' own scores diverged: lower their learning_rate")
        self.log(token_scores={name: part._asdict() for name, part in fitted.parts.items()})
        for classifier in self.trained, self.average:
            classifier.pooling.token.weight.data.copy_(fitted.scores)

    @property
    def longest(self) -> int:
        """Tokens that the longest crop has, at most: a multiple of ``prefix``."""
        prefix = self.config.prefix
        return -(-self.crops.longest // prefix) * prefix

    @property
    def loss_weights(self) -> list[float]:
        """How much each loss counts in this step."""
        return [
            self.config.class_weight,
            self.config.language_weight_at(self.step),
            self.config.span_weight,
        ]

    def rate_of(self, name: str) -> float:
        """See `Loop.rate_of`: what a base began may learn slower."""
        began = self.base is not None and not name.startswith(POOLING)
        return super().rate_of(name) * (self.config.backbone_learning_rate if began else 1.0)

    @property
    def described(self) -> dict[str, Any]:
        """What a run can't change on its way."""
        fixed = super().described
        fixed["model"] = self.model.model_dump(mode="json")
        return {**fixed, "base": self.base.fingerprint} if self.base else fixed

    def losses_at(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return label, next-token and span loss (3,) of crops, and the tokens read ()."""
        drawn = self.crops.draw(rng, rows, length)
        kept = self._kept(drawn.tokens)
        read = drawn.lengths.sum()
        if self.config.compile:  # which is for one shape
            losses: Tensor = self.losses(drawn, kept)
            return losses, read
        total = torch.zeros(len(self.losses_of), device=self.device)
        for which, part in drawn.trimmed(self.config.prefix):
            share = torch.full_like(total, len(which) / rows)
            # It counts tokens alike, the others crops.
            share[self.losses_of.index("language_loss")] = part.lengths.sum() / read
            total = total + share * self.losses(part, kept[which, : part.tokens.shape[1]])
        return total, read

    def _kept(self, tokens: Tensor) -> Tensor:
        """Draw what is hidden, (B, N) float: 0 where a token is; each crop draws its own share."""
        low, high = self.config.token_dropout
        share = low + (high - low) * torch.rand(len(tokens), 1, device=self.device)
        if self.rare is not None:
            share = torch.where(self.rare[tokens], self.config.rare_dropout, share)
        return (torch.rand(tokens.shape, device=self.device) >= share).float()

    @property
    def tokens_of_evaluation(self) -> int:
        """See `Loop.tokens_of_evaluation`: views, whole and short, and windows that are stacked."""
        return 4 * len(self.prepared.valid.tokens)

    def told(self, score: float) -> str:
        """See `Loop.told`."""
        return f"{TITLES[self.config.choose_by]} on valid {score:.3f}"

    def evaluate(self) -> float:
        """Stack and measure the averaged weights; keep them if no evaluation so far was better."""
        candidate = copy.deepcopy(self.average)
        valid = self.prepared.valid
        calibrated = calibrate(candidate, valid)
        measured = measure_tokens(candidate, valid, self.prepared.tokenizer, self._fit)
        chosen = {"thresholds": measured.thresholds}
        candidate.config = candidate.config.model_copy(update=chosen)
        score = measured.score(self.config.choose_by)
        kept = self.better(score)
        self.log(valid=measured.as_dict(), **calibrated, kept=kept)
        if not kept:
            return score
        card = card_of(candidate.config, self.config, measured, self.step)
        np.save(self.out / SCORES, measured.scores.astype(np.float32))
        weights.save(self.out / CHECKPOINT, candidate, self.prepared.tokenizer, card=card)
        return score
