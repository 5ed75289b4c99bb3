"""How fast models are, what memory they take, and what they have to keep of a document."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.comparison.backbone import Backbone, Batch, parameters
from benchmarks.comparison.trainer import narrow, next_tokens
from benchmarks.timing import elapsed, peak, tokens_name

CONTEXTS = 2048, 16384
LENGTHS = tuple(1024 << shift for shift in range(0, 11, 2))
"""Tokens of one document that is read: 1k to 1M."""

REPEATS, LONG_S = 5, 1.0
"""How often a call is timed, unless it takes so long."""


def measured(
    model: Backbone,
    tokens: int = 65536,
    contexts: tuple[int, ...] = CONTEXTS,
    lengths: tuple[int, ...] = LENGTHS,
) -> dict[str, Any]:
    """Return tokens a second, peak memory in bytes, and bytes of state, by length.

    Training is in steps of `tokens`, for the next token; reading is of one document, whole, without
    its logits. A length that the memory does not hold is left out.
    """
    device = model.embedding.weight.device
    found: dict[str, Any] = {
        "parameters": parameters(model),
        "training": {},
        "training_memory": {},
        "reading": {},
        "reading_memory": {},
        "state": {
            str(n): len(model.mixers) * model.mixers[0].state_bytes(n) for n in lengths
        },
    }  # fmt: skip

    def note(what: str, length: int, count: int, call: Any) -> None:
        taken: list[float] = []
        try:
            call()
            once = peak(lambda: taken.append(elapsed(call, device)), device)
            if taken[0] < LONG_S:
                taken.append(elapsed(call, device, REPEATS))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return
        found[f"{what}_memory"][str(length)] = once
        found[what][str(length)] = round(count / taken[-1])

    for length in contexts if model.causal else ():
        batch = _random(model, tokens // length, length)
        note("training", length, tokens, lambda batch=batch: _trained(model, batch))
    model.eval()
    for length in lengths:
        batch = _random(model, 1, length)
        note("reading", length, length, lambda batch=batch: _read(model, batch))
    return found


def _random(model: Backbone, rows: int, length: int) -> Batch:
    device = model.embedding.weight.device
    tokens = torch.randint(model.size.vocabulary, (rows, length), device=device)
    lengths = torch.full((rows,), length, device=device)
    return Batch(tokens, lengths, next_tokens(tokens, lengths))


def _trained(model: Backbone, batch: Batch) -> None:
    with narrow(batch.tokens.device):
        loss = model.loss(batch)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def _read(model: Backbone, batch: Batch) -> None:
    with narrow(batch.tokens.device):
        model.hidden(batch.tokens, batch.lengths)


def names(lengths: Any) -> list[str]:
    """What lengths are called in a table."""
    return [tokens_name(int(length)) for length in lengths]
