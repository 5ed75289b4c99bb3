"""The mixers of a classifier: Gaussian Mixture Attention in its two forms, with its projections.

Shapes: R rows of C tokens, D documents, W width, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.config import LASTING, BackboneConfig
from gma.model.ops import chunked
from gma.model.ops.choice import CHUNKED
from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.forgetting import MOST_FORGOTTEN

INITIAL_VARIANCE = 8.0
"""A component's variance at first: narrow ones collapse to nearly one-hot responsibilities, and
rounding of queries and keys counts for more (docs/adr/0015-slow-mixtures.md)."""

HALF_LIVES = 4.0, 2000.0
"""Tokens after which a head has forgotten half, at first: the first that forgets, and the last."""


class Mixture(nn.Module):
    """The Gaussian mixture that queries and keys are scored by, one per head."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        shape = config.heads, config.num_components, config.routing_dim
        self.floor = config.variance_floor
        self.mu = nn.Parameter(nn.init.normal_(torch.empty(shape)))
        # softplus(x) = y  <=>  x = y + log(1 - exp(-y))
        omega = INITIAL_VARIANCE + math.log(-math.expm1(-INITIAL_VARIANCE))
        self.omega = nn.Parameter(torch.full(shape, omega))
        self.alpha = nn.Parameter(torch.zeros(shape[:2]))

    def distribution(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu (H, K, r), var (H, K, r) and log_pi (H, K), in at least float32."""
        dtype = torch.promote_types(self.mu.dtype, torch.float32)
        var = functional.softplus(self.omega.to(dtype)) + self.floor
        return self.mu.to(dtype), var, torch.log_softmax(self.alpha.to(dtype), dim=-1)

    def coefficients(self) -> Coefficients:
        """Return the distribution in the form that scores are computed from."""
        return Coefficients.of(*self.distribution())


class Mixer(nn.Module):
    """Gaussian Mixture Attention with its projections, in the paper's form (arXiv:2606.18283)."""

    def __init__(self, config: BackboneConfig, others: int = 0) -> None:
        """`others`: numbers that are projected beside queries, keys and values."""
        super().__init__()
        self.config = config
        self.operation = CHUNKED
        heads, routing, value = config.heads, config.routing_dim, config.value_dim
        self.widths = [heads * routing, heads * routing, heads * value]
        self.queries, self.keys, self.values = _slices(self.widths)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.project = nn.Linear(config.width, sum(self.widths) + others, bias=False)
        self.mixture = Mixture(config)
        self.out = nn.Linear(heads * value, config.width, bias=False)

    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let every token read what it and its document's earlier tokens wrote.

        x (R, C, W), memory (D, H, K, v), mass (D, H, K) -> update (R, C, W), memory, mass.
        """
        q, k, val = self.parted(self.project(self.norm(x)))
        with torch.autocast(x.device.type, enabled=False):
            out, memory, mass = self.operation.causal(
                q, k, val, memory, mass, self.mixture.coefficients(), rows, **self.settings
            )
        return self.out(out.flatten(2).to(x.dtype)), memory, mass

    def write(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return what rows x (R, C, W) add to memory (D, H, K, v) and mass (D, H, K)."""
        k, val = self.projected(x, self.keys, self.values)
        mixture, normalize = self.mixture.coefficients(), self.config.normalize_routing
        with torch.autocast(x.device.type, enabled=False):
            return self.operation.write(k, val, mixture, rows, normalize=normalize)

    def read(self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows) -> Tensor:
        """Let rows x (R, C, W) read their documents' finished memory: the update (R, C, W)."""
        (q,) = self.projected(x, self.queries)
        update: Tensor = self.out(self.found(q, memory, mass, rows).flatten(2).to(x.dtype))
        return update

    def usage(self, x: Tensor, rows: Rows) -> Tensor:
        """Return how much of rows x (R, C, W) each component takes, (R, H, K); see
        `gma.model.ops.chunked.usage`."""
        (k,) = self.projected(x, self.keys)
        with torch.autocast(x.device.type, enabled=False):
            return chunked.usage(
                k, self.mixture.coefficients(), rows, normalize=self.config.normalize_routing
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What an operation that reads takes beside tensors."""
        return {"normalize": self.config.normalize_routing, "epsilon": self.config.epsilon}

    def projected(self, x: Tensor, *parts: slice) -> list[Tensor]:
        """Project x (R, C, W) to some parts of what `project` gives, each (R, C, H, n)."""
        normal = self.norm(x)
        some = (functional.linear(normal, self.project.weight[part]) for part in parts)
        return [part.view(*part.shape[:-1], self.config.heads, -1) for part in some]

    def parted(self, routed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Part what is projected to q and k (R, C, H, r) and val (R, C, H, v)."""
        parts = torch.split(routed, self.widths, dim=-1)
        q, k, val = (part.view(*part.shape[:-1], self.config.heads, -1) for part in parts)
        return q, k, val

    def found(self, q: Tensor, memory: Tensor, mass: Tensor, rows: Rows) -> Tensor:
        """See `gma.model.ops.chunked.read`."""
        with torch.autocast(q.device.type, enabled=False):
            return self.operation.read(
                q, memory, mass, self.mixture.coefficients(), rows, **self.settings
            )


class ForgettingMixer(Mixer):
    """Gaussian Mixture Attention that forgets.

    Each token says how much of the past its heads keep, and how much of what it reads goes on.
    """

    lasting = LASTING

    def __init__(self, config: BackboneConfig) -> None:
        heads = config.heads
        read = heads * config.value_dim
        # What is read only once it is finished forgets nothing.
        forgetting = max(heads - self.lasting, 0) if config.causal else 0
        super().__init__(config, others=read + forgetting)
        self.parts = [sum(self.widths), read, forgetting]
        _, self.opening, _ = _slices(self.parts)
        least, most = map(math.log, HALF_LIVES)
        rates = math.log(2.0) / torch.linspace(least, most, forgetting).exp()
        # softplus(x) = y  <=>  x = log(exp(y) - 1)
        self.keep_bias = nn.Parameter(rates.expm1().log())

    def causal(
        self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Mixer.causal`."""
        (q, k, val), open_, keep = self.routed(x)
        mixture, log_keep = self.mixture.coefficients(), self.log_keep(keep)
        with torch.autocast(x.device.type, enabled=False):
            out, memory, mass = self.operation.forgetting(
                q, k, val, memory, mass, mixture, log_keep, rows, **self.settings
            )
        return self.update(out, open_), memory, mass

    def read(self, x: Tensor, memory: Tensor, mass: Tensor, rows: Rows) -> Tensor:
        """See `Mixer.read`."""
        q, open_ = self.projected(x, self.queries, self.opening)
        return self.update(self.found(q, memory, mass, rows), torch.sigmoid(open_.flatten(2)))

    def routed(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Project x (R, C, W): q, k and val, the output's gate (R, C, H * v), and of the heads that
        forget how much they keep (R, C, H - lasting)."""
        routed, open_, keep = self.project(self.norm(x)).split(self.parts, dim=-1)
        return self.parted(routed), torch.sigmoid(open_), keep

    def log_keep(self, keep: Tensor) -> Tensor:
        """Return the logarithm of what heads keep, (R, C, H), of what is projected for those that
        forget, (R, C, H - lasting)."""
        wide = keep.to(torch.promote_types(keep.dtype, torch.float32))
        rates = functional.softplus(wide + self.keep_bias).clamp_max(MOST_FORGOTTEN)
        return functional.pad(-rates, (self.config.heads - rates.shape[-1], 0))

    def update(self, out: Tensor, open_: Tensor) -> Tensor:
        """Take the heads' outputs (R, C, H, v), through their gate (R, C, H * v), to an update."""
        update: Tensor = self.out(out.flatten(2).to(open_.dtype) * open_)
        return update


def _slices(widths: Sequence[int]) -> list[slice]:
    """Where parts of these widths lie that stand side by side."""
    ends = list(accumulate(widths, initial=0))
    return [slice(*each) for each in pairwise(ends)]
