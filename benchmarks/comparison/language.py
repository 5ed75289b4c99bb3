"""Language model: bits per byte of books and prose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.comparison.backbone import Backbone, Batch
from benchmarks.comparison.task import Recipe, Task
from benchmarks.comparison.texts import Texts
from benchmarks.comparison.trainer import Trainer, narrow, next_tokens

CONTEXTS = 2048, 16384
SHORT_SHARE = 0.75
"""Of the steps, that are at the short context."""


class Language(Task):
    """Trained at a short and then at a long context, and told at both."""

    lower = True

    def __init__(
        self,
        recipe: Recipe,
        train: Sequence[Texts],
        held_out: dict[str, dict[str, Texts]],
        byte_lengths: Tensor,
        device: torch.device,
        contexts: tuple[int, int] = CONTEXTS,
        judged: int = 64,
    ) -> None:
        """held_out: by split, and by what it is called. byte_lengths (vocabulary,): of tokens.
        `judged`: documents that models are judged by, each as long as the long context."""
        named = dict.fromkeys(name for texts in held_out.values() for name in texts)
        columns = (_column(name, context) for name in named for context in contexts)
        super().__init__(recipe, tuple(columns), device)
        self.contexts = contexts
        self.byte_lengths = byte_lengths.to(device)
        together = np.concatenate([texts.tokens for texts in train]).astype(np.int32)
        self.stream = torch.from_numpy(together).to(device)
        self.held_out = {
            split: {name: self._long(each, judged) for name, each in texts.items()}
            for split, texts in held_out.items()
        }

    def _long(self, texts: Texts, most: int) -> Tensor:
        """Return the beginnings of documents that are long enough, (documents, N)."""
        long = self.contexts[1]
        starts = texts.starts[texts.lengths >= long][:most]
        if not len(starts):
            raise ValueError(f"no document has {long} tokens")
        each = np.stack([texts.tokens[start : start + long] for start in starts])
        return torch.from_numpy(each.astype(np.int64)).to(self.device)

    def batch(self, seed: int, step: int) -> Batch:
        context = self.contexts[step >= SHORT_SHARE * self.recipe.steps]
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(self.stream) - context, self.recipe.tokens // context)
        at = torch.from_numpy(starts).to(self.device)[:, None]
        tokens = self.stream[at + torch.arange(context, device=self.device)].long()
        return _asked(tokens)

    def examples(self, split: str) -> Iterator[tuple[str, Batch]]:
        for name, documents in self.held_out[split].items():
            for context in self.contexts:
                for some in documents.split(max(1, self.recipe.tokens // self.contexts[1])):
                    yield _column(name, context), _asked(some.view(-1, context))

    @torch.no_grad()
    def evaluate(self, model: Backbone, split: str, trainer: Trainer) -> dict[str, float]:
        """Return bits per byte of what has a context. Raises OutOfTime."""
        model.eval()
        nats: dict[str, Tensor] = {}
        size: dict[str, Tensor] = {}
        for column, batch in self.examples(split):
            trainer.check_time()
            with narrow(self.device):
                nats[column] = nats.get(column, 0) + model.token_losses(batch)
            size[column] = size.get(column, 0) + self.byte_lengths[batch.tokens[:, 1:]].sum()
        return {c: float(nats[c]) / float(size[c]) / math.log(2.0) for c in nats}


def _column(name: str, context: int) -> str:
    return f"{name}, {context:,}"


def _asked(tokens: Tensor) -> Batch:
    lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return Batch(tokens, lengths, next_tokens(tokens, lengths))
