"""The training of a base: a backbone that learns to tell the next token of any text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from gma.model import weights
from gma.model.backbone import Backbone
from gma.model.config import BackboneConfig, problems
from gma.model.ops.chunked import Rows
from gma.model.tokenizer import Tokenizer
from gma.model.training.config import read_tables
from gma.model.training.errors import TrainingError
from gma.model.training.loop import Loop
from gma.model.training.next_token import next_token_loss, next_tokens
from gma.model.training.schedule import Schedule
from gma.model.training.texts import Texts

ARCHITECTURE = {
    "name": "base",
    "form": "forgetting",
    "vocab_size": 16384,
    "width": 256,
    "layers": 3,
    "heads": 3,
    "routing_dim": 32,
    "value_dim": 64,
    "num_components": 32,
    "mlp_width": 768,
}
"""A base, where nothing else is said."""

ROUND = 256
"""Crops that are shortened to the longest document keep a multiple of so many tokens."""

MEASURED_AT_ONCE = 1 << 16
"""Tokens of valid that are read at a time."""


class PretrainingConfig(Schedule):
    """How to train a base."""

    valid_tokens: Annotated[
        int, Field(gt=0, description="tokens of valid that are measured, at most")
    ] = 1 << 20


class NextToken(nn.Module):
    """The next-token loss of a batch of crops."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the mean loss in nats, (1,), of tokens (B, N), lengths (B,)."""
        rows = rows_of(tokens, lengths)
        hidden = self.backbone.hidden_alone(self.backbone.embedding(tokens), rows)
        return next_token_loss(hidden, tokens, rows, self.backbone.embedding.weight)[None]


class Pretraining(Loop[Backbone, PretrainingConfig]):
    """One run of it."""

    losses_of = ("language_loss",)

    def __init__(
        self,
        train: Texts,
        valid: Texts,
        tokenizer: Tokenizer,
        out: Path,
        model: BackboneConfig,
        config: PretrainingConfig,
    ) -> None:
        """Begin with new weights. ``model`` is causal, and of the tokenizer's size."""
        self.texts, self.valid, self.tokenizer = train, valid, tokenizer
        torch.manual_seed(config.seed)
        super().__init__(out, Backbone(model), config)
        losses = NextToken(self.trained)
        self.losses = torch.compile(losses, dynamic=False) if config.compile else losses

    @property
    def longest(self) -> int:
        """See `Loop.longest`."""
        return -(-self.texts.longest // ROUND) * ROUND

    @property
    def loss_weights(self) -> list[float]:
        """See `Loop.loss_weights`."""
        return [1.0]

    def losses_at(self, rng: np.random.Generator, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """See `Loop.losses_at`."""
        drawn = self.texts.draw(rng, rows, length, self.config.start_fraction)
        tokens, lengths = (x.to(self.device) for x in drawn)
        losses: Tensor = self.losses(tokens, lengths)
        return losses, lengths.sum()

    @property
    def tokens_of_evaluation(self) -> int:
        """See `Loop.tokens_of_evaluation`."""
        return min(self.config.valid_tokens, int(self.valid.ends[-1]))

    def told(self, score: float) -> str:
        """See `Loop.told`."""
        return f"bits per byte on valid {-score:.4f}"

    def evaluate(self) -> float:
        """See `Loop.evaluate`."""
        bits, read = self.bits_per_byte()
        kept = self.better(-bits)
        self.log(valid={"bits_per_byte": bits, "tokens": read}, kept=kept)
        if kept:
            card = _card(self.average.config, self.config, bits, self.step)
            weights.save(self.out / "checkpoint", self.average, self.tokenizer, card=card)
        return -bits

    @torch.no_grad()
    def bits_per_byte(self) -> tuple[float, int]:
        """Return the averaged weights' loss on windows of valid, and how many tokens those have.

        A window is as long as the last crops are; its first token is not guessed, and not counted.
        """
        nats, size, read = 0.0, 0, 0
        byte_lengths = torch.from_numpy(self.tokenizer.byte_lengths).to(self.device)
        for tokens, lengths in self._windows():
            rows = rows_of(tokens, lengths)
            targets = next_tokens(tokens, rows)
            guessed = targets[targets >= 0]
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                hidden = self.average.hidden_alone(self.average.embedding(tokens), rows)
                loss = next_token_loss(hidden, tokens, rows, self.average.embedding.weight)
            nats += loss.item() * len(guessed)
            size += int(byte_lengths[guessed].sum())
            read += int(lengths.sum())
        return nats / math.log(2) / size, read

    def _windows(self) -> Iterator[tuple[Tensor, Tensor]]:
        length = self._length(self.config.steps - 1)
        starts, lengths = self.valid.windows(length, self.config.valid_tokens)
        rows = max(1, MEASURED_AT_ONCE // length)
        for at in range(0, len(starts), rows):
            crops = self.valid.crops(starts[at : at + rows], lengths[at : at + rows], length)
            yield crops[0].to(self.device), crops[1].to(self.device)


def rows_of(tokens: Tensor, lengths: Tensor) -> Rows:
    """Say that each of the crops (B, N) is a document of one row, with nothing before it."""
    which = torch.arange(len(tokens), device=tokens.device)
    return Rows.of(lengths, which, tokens.shape[1], torch.float32)


def read_config(file: Path | None) -> tuple[BackboneConfig, PretrainingConfig]:
    """Read ``[model]`` and ``[training]`` of a TOML file, or the defaults.

    ``vocab_size`` is how many tokens the tokenizer may have at most. Raises TrainingError that
    names what is wrong.
    """
    tables = read_tables(file) if file else {}
    model, training = tables.pop("model", ARCHITECTURE), tables.pop("training", {})
    if tables or not isinstance(model, dict) or not isinstance(training, dict):
        unknown = f", not {', '.join(sorted(tables))}" if tables else ""
        raise TrainingError(f"{file}: the tables are [model] and [training]{unknown}")
    try:
        table = "model"
        architecture = BackboneConfig.model_validate({"form": "forgetting", **model})
        table = "training"
        config = PretrainingConfig.model_validate(training)
    except ValidationError as error:
        known = PretrainingConfig if table == "training" else BackboneConfig
        raise TrainingError(f"{file}, [{table}]: {problems(error, of=known)}") from error
    if not architecture.causal:
        raise TrainingError(
            f"{file}: a bidirectional model sees the token that it would have to guess, so there "
            "is nothing to pretrain it for: leave causal out"
        )
    return architecture, config


def _card(model: BackboneConfig, config: PretrainingConfig, bits: float, step: int) -> str:
    return f"""# {model.name}

A base without labels: {model.layers} layers of {model.width} of Gaussian Mixture Attention
(arXiv:2606.18283) that learned to tell the next token. `gma train --from` makes a classifier of it.
{bits:.4f} bits per byte on the valid split; step {step} of {config.steps}, averaged weights.

Training configuration:

```json
{config.model_dump_json(indent=2)}
```
"""
