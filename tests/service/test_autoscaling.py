"""How many workers there should be: the policy, and what a worker tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gma.service.app.autoscaling import METRIC, QueuedTokens
from tests.service.asgi import TEXT, Exchange, Service


def wanted(queued: list[float], *, now: int, per_worker: int = 100) -> int:
    metrics = {METRIC: {f"replica {i}": tokens for i, tokens in enumerate(queued)}}
    context: Any = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=now)
    replicas, state = QueuedTokens(per_worker)(context)
    assert state == {}
    return replicas


@pytest.mark.parametrize(
    ("queued", "now", "replicas"),
    [
        ([], 0, 0),
        ([0], 1, 0),  # Serve keeps at least min_replicas
        ([100], 1, 1),
        ([101], 1, 2),
        ([100, 100], 1, 2),
        ([1000], 1, 10),
        ([150, 0, 0], 3, 2),
        ([0, 0, 0, 0], 4, 3),
    ],
)
def test_up_to_what_is_needed_and_down_by_one(queued: list[float], now: int, replicas: int) -> None:
    assert wanted(queued, now=now) == replicas


def test_workers_that_have_not_reported_count_nothing() -> None:
    context: Any = SimpleNamespace(aggregated_metrics=None, target_num_replicas=1)
    assert QueuedTokens(100)(context) == (0, {})


def test_a_policy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_worker"):
        QueuedTokens(0)


@pytest.mark.anyio
async def test_a_worker_counts_what_waits_and_not_what_is_read(service: Service) -> None:
    assert service.worker.queued_tokens == 0
    service.runner.go.clear()
    headers = {"content-type": "text/plain", "accept": "application/x-ndjson"}
    async with Exchange(service.app, "/v1/documents", headers) as exchange:
        exchange.send(TEXT.encode(), last=True)
        await service.runner.step_begun()
        grid = service.runner.grids[-1]
        total = len(service.tokenizer.encode(TEXT))
        assert service.worker.queued_tokens >= total - 2 * grid.rows * grid.chunk
        assert service.worker.queued_tokens < total
        service.runner.go.set()
        await exchange.head()
        await exchange.events()
    assert service.worker.queued_tokens == 0
