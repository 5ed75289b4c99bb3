"""What models are trained by, where no kernel is, against each recurrence's definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import definitions
from benchmarks.comparison import recurrences

HEADS, KEY, VALUE, SLOTS = 2, 8, 6, 5

# Alone, within a chunk, and over several; no multiples of any.
LENGTHS = (1, 15, 100, 203)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> bool:
    return definitions.relative_error(found[1], expected) < 1e-10


@pytest.mark.parametrize("tokens", LENGTHS)
class TestDefinitions:
    """The second document of two."""

    def test_linear(self, tokens: int) -> None:
        q, k, val = (random(2, tokens, HEADS, n) for n in (KEY, KEY, VALUE))
        expected = definitions.linear_attention(q[1], k[1], val[1])
        assert close(recurrences.linear(q, k, val), expected)

    def test_scan_that_forgets_more_than_an_exponential_holds(self, tokens: int) -> None:
        x, key, query = (random(2, tokens, n, m) for n, m in ((HEADS, VALUE), (1, KEY), (1, KEY)))
        step = random(2, tokens, HEADS).exp()
        rate = torch.tensor([-0.1, -100.0], dtype=torch.float64)
        expected = definitions.linear_attention(
            query[1].expand(-1, HEADS, -1), key[1] * step[1, ..., None], x[1], step[1] * rate
        )
        assert close(recurrences.scan(x, step, rate, key, query), expected)

    def test_gated(self, tokens: int) -> None:
        q, k, val, raw = (random(2, tokens, HEADS, n) for n in (KEY, KEY, VALUE, KEY))
        decay = functional.logsigmoid(raw) / 4
        expected = definitions.linear_attention(q[1], k[1], val[1], decay[1])
        assert close(recurrences.gated(q, k, val, decay), expected)

    def test_slots(self, tokens: int) -> None:
        q, k, val, raw = (random(2, tokens, HEADS, n) for n in (KEY, KEY, VALUE, SLOTS))
        decay = functional.logsigmoid(raw)
        strength = -decay.expm1()
        expected = definitions.gated_slots(q[1] * KEY**0.5, k[1], val[1], strength[1], decay[1])
        assert close(recurrences.slots(q, k, val, strength, decay), expected)

    def test_delta(self, tokens: int) -> None:
        q, k, val = (random(2, tokens, HEADS, n) for n in (KEY, KEY, VALUE))
        k = functional.normalize(k, dim=-1)
        decay, share = (random(2, tokens, HEADS).sigmoid() for _ in range(2))
        expected = definitions.gated_delta(q[1], k[1], val[1], decay[1].log(), share[1])
        assert close(recurrences.delta(q, k, val, decay.log(), share), expected)
