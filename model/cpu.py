"""What a causal model's layers do on a CPU, in kernels of our own.

Shapes: R rows of C tokens, D documents, W width, H heads, K components.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gma.model.config import BackboneConfig
from gma.model.layers import Layer
from gma.model.mixers import ForgettingMixer
from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.cpu.library import Library
from gma.model.state import State

EPSILON = 1e-6
"""Of every norm in a layer."""

Version: TypeAlias = tuple[tuple[int, int], ...]


class Weights(NamedTuple):
    """A layer's weights as kernels take them. Scales of norms are in the products behind them."""

    scale: Tensor | None  # (W,) of the convolution's norm
    taps: Tensor | None  # (T + 1, W)
    project: Tensor  # (W, n)
    mixture: Coefficients
    keep_bias: Tensor | None
    out: Tensor  # (H * v, W)
    up: Tensor  # (W, m)
    down: Tensor  # (m, W)

    @classmethod
    def of(cls, layer: Layer) -> Weights:
        convolution, mixer, mlp = layer.convolution, layer.mixer, layer.mlp
        return cls(
            None if convolution is None else convolution.norm.weight.contiguous(),
            None if convolution is None else convolution.weight.contiguous(),
            (mixer.project.weight * mixer.norm.weight).t().contiguous(),
            Coefficients(*(x.contiguous() for x in mixer.mixture.coefficients())),
            mixer.keep_bias.contiguous() if isinstance(mixer, ForgettingMixer) else None,
            mixer.out.weight.t().contiguous(),
            (mlp.up.weight * mlp.norm.weight).t().contiguous(),
            mlp.down.weight.t().contiguous(),
        )


class Buffers(NamedTuple):
    """What a step of n tokens works in. Allocating it anew would cost more than some kernels do."""

    normal: Tensor  # (n, W)
    routed: Tensor  # (n, what is projected)
    out: Tensor  # (n, H * v)
    hidden: Tensor  # (n, m)


class CpuLayers:
    """The layers of a causal float32 model, which may change between steps.

    Steps may be run by several threads at once. A document's answer does not depend on the others
    of a step, be they NaN.
    """

    def __init__(self, layers: Sequence[Layer], config: BackboneConfig, library: Library) -> None:
        self._layers, self._config, self._library = layers, config, library
        # PyTorch's own dictionaries: they stay where weights are replaced, and to look into them
        # takes a tenth of what `parameters()` does.
        self._parameters = [[each._parameters for each in layer.modules()] for layer in layers]
        self._of: list[tuple[Version, Weights]] = []
        self._free: defaultdict[int, list[Buffers]] = defaultdict(list)

    @property
    def name(self) -> str:
        """Which kernels they are."""
        return f"C++ for {self._library.instructions}"

    def take(self, x: Tensor) -> bool:
        """Whether they take embedded tokens x: they know no gradients, and one type."""
        plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        return plain and x.device.type == "cpu" and x.dtype == torch.float32

    def hidden(
        self, x: Tensor, rows: Rows, states: State, usage: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Backbone.hidden`. What lies in x where no token is may be anything."""
        rows = rows._replace(lengths=rows.lengths.long(), document=rows.document.contiguous())
        before = [part.contiguous() for part in (states.memory, states.mass, states.tail)]
        after = [torch.empty_like(part) for part in before]
        x, y = x.contiguous(), torch.empty(x.shape)
        buffers = self._buffers(x.shape[0] * x.shape[1])
        for index, (layer, weights) in enumerate(zip(self._layers, self._weights(), strict=True)):
            own = States(*(part[:, index] for part in (*before, *after)))
            x, y = self._layer(weights, x, y, own, rows, buffers, layer, usage)
        self._free[len(buffers.normal)].append(buffers)
        memory, mass, tail = after
        return x, memory, mass, tail

    def _layer(
        self,
        weights: Weights,
        x: Tensor,
        y: Tensor,
        states: States,
        rows: Rows,
        buffers: Buffers,
        layer: Layer,
        usage: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Read x, and write y or both: what the layer gives, and what the next may write."""
        library, (normal, routed, out, hidden) = self._library, buffers
        if weights.taps is None or weights.scale is None:
            y, x = x, y
            library.normalize(y.flatten(0, 1), normal, EPSILON)
        else:
            tails = states.tail, states.tail_after
            library.convolve(x, weights.scale, weights.taps, tails, rows, y, normal, EPSILON)
        torch.mm(normal, weights.project, out=routed)
        counted = None
        if weights.keep_bias is not None:
            counted = torch.empty(len(rows.lengths), *states.mass.shape[1:])
        elif usage is not None:
            counted = layer.mixer.usage(y, rows)
        library.mix(
            routed.view(*y.shape[:2], -1),
            (states.memory, states.mass),
            weights.mixture,
            weights.keep_bias,
            rows,
            self._config,
            out,
            (states.memory_after, states.mass_after),
            None if weights.keep_bias is None else counted,
        )
        if usage is not None and counted is not None:
            usage.append(counted)
        flat = y.flatten(0, 1)
        flat.addmm_(out, weights.out)
        library.normalize(flat, normal, EPSILON)
        torch.mm(normal, weights.up, out=hidden)
        library.gelu_(hidden)
        flat.addmm_(hidden, weights.down)
        return y, x

    def _buffers(self, tokens: int) -> Buffers:
        """Those of a step that has ended, or new ones: several threads may be in a step."""
        try:
            return self._free[tokens].pop()
        except IndexError:
            config, project = self._config, self._weights()[0].project
            widths = (
                config.width,
                project.shape[1],
                config.heads * config.value_dim,
                config.mlp_width,
            )
            return Buffers(*(torch.empty(tokens, width) for width in widths))

    def _weights(self) -> list[Weights]:
        """Those of the layers, made again if they have changed."""
        versions = [*map(_version, self._parameters)]
        if versions != [version for version, _ in self._of]:
            with torch.inference_mode():
                self._of = [*zip(versions, map(Weights.of, self._layers), strict=True)]
        return [weights for _, weights in self._of]


class States(NamedTuple):
    """A layer's states of all documents, before a step and after it."""

    memory: Tensor  # (D, H, K, v), of which documents lie apart
    mass: Tensor  # (D, H, K)
    tail: Tensor  # (D, T, W)
    memory_after: Tensor
    mass_after: Tensor
    tail_after: Tensor


def _version(parameters: Sequence[Mapping[str, Tensor | None]]) -> Version:
    """What changes whenever one of them does, or is another."""
    return tuple(
        (x.data_ptr(), 0 if x.is_inference() else x._version)
        for of_module in parameters
        for x in of_module.values()
        if x is not None
    )
