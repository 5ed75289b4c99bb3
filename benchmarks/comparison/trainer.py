"""The one trainer: AdamW, a warm-up and a cosine, and the same for every mixer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.comparison.backbone import Backbone, Batch
from gma.model.training.config import TrainingConfig

HIDDEN = 0.15
"""Share of the tokens that a model which reads both ways has to find, where others find the
next."""

CHECKED = 16
"""Steps between looks at the clock: the device is waited for, so that it can't fall behind."""


class OutOfTime(Exception):
    """The budget ended before the run did."""


class Trainer:
    """Trains one model by batches, and stops at a deadline."""

    def __init__(self, model: Backbone, rate: float, deadline: float = math.inf) -> None:
        """`deadline`: of the monotonic clock, in seconds."""
        self.model, self.rate, self.deadline = model, rate, deadline
        self.device = model.embedding.weight.device
        self.generator = torch.Generator(self.device).manual_seed(0)

    def train(self, batch: Callable[[int], Batch], steps: int) -> list[Tensor]:
        """Make the loss of batch(0), batch(1), ... small; return the losses.

        Raises OutOfTime.
        """
        config = TrainingConfig(steps=steps, learning_rate=self.rate)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = self._optimizer(parameters)
        self.model.train()
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            with narrow(self.device):
                loss = self.model.loss(batch(step))
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if step % CHECKED == 0:
                self.check_time()
        return losses

    def pretrain(self, batch: Callable[[int], Batch], steps: int) -> list[Tensor]:
        """Train on the text of batches alone: for next tokens, or hidden ones."""
        return self.train(lambda step: self.text(batch(step)), steps)

    def text(self, batch: Batch) -> Batch:
        """Return the batch with its own tokens as targets."""
        if self.model.causal:
            return batch._replace(targets=next_tokens(batch.tokens, batch.lengths))
        drawn = torch.rand(batch.tokens.shape, device=self.device, generator=self.generator)
        hidden = (drawn < HIDDEN) & there(batch.tokens, batch.lengths)
        return batch._replace(
            tokens=batch.tokens.masked_fill(hidden, self.model.size.vocabulary),
            targets=batch.tokens.masked_fill(~hidden, -100),
        )

    def check_time(self) -> None:
        """Raise OutOfTime if the deadline has passed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches while there is time. Raises OutOfTime."""
        for batch in batches:
            self.check_time()
            yield batch

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )


def narrow(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def there(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Which of tokens (B, N) are the documents', of lengths (B,): (B, N) bool."""
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def next_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """What follows each of tokens (B, N), -100 where nothing does: (B, N)."""
    return tokens.roll(-1, 1).masked_fill(~there(tokens, lengths - 1), -100)
