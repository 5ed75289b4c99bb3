"""How many workers there should be, by the tokens that wait for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

METRIC = "queued_tokens"
"""What each worker reports to Serve: tokens that have come, and are in no step yet."""


class QueuedTokens:
    """A Serve autoscaling policy: a worker for every so many tokens that wait.

    It does not count requests, of which one may be a tweet and the next a library. Serve averages
    the metric, waits for `upscale_delay_s` or `downscale_delay_s`, and keeps to the replicas that
    are allowed.
    """

    def __init__(self, tokens_per_worker: int) -> None:
        """Raises ValueError if `tokens_per_worker` is less than 1. It should be GMA_INBOX_TOKENS at
        least, or one long document asks for more workers than can read it."""
        if tokens_per_worker < 1:
            raise ValueError("tokens_per_worker must be at least 1")
        self._tokens_per_worker = tokens_per_worker

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and no state."""
        queued = sum((context.aggregated_metrics or {}).get(METRIC, {}).values())
        wanted = math.ceil(queued / self._tokens_per_worker)
        # Down by one at a time: an empty queue says that there are enough, not how many too many.
        return max(wanted, context.target_num_replicas - 1), {}
