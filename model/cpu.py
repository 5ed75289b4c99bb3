"""What a causal model's layers do on a CPU, in kernels of our own.

Shapes: R rows of C tokens, of which n are there; D documents, W width, H heads, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.model.config import BackboneConfig
from gma.model.layers import Layer, Pooling
from gma.model.mixers import ForgettingMixer
from gma.model.ops.chunked import Coefficients, Rows
from gma.model.ops.cpu.library import Library
from gma.model.products import PRODUCTS, Float32, Precision, Product, Scratch
from gma.model.state import State

EPSILON = 1e-6
"""Of every norm in a layer."""

LINE = 16
"""Numbers of a cache line: rows that begin within one take longer to write."""

Made = TypeVar("Made")


class Weights(NamedTuple):
    """A layer's weights as kernels take them. Scales of norms are in the products behind them."""

    scale: Tensor | None  # (W,) of the convolution's norm
    taps: Tensor | None  # (T + 1, W)
    project: Product  # W to what is projected, and zeros up to whole LINEs
    mixture: Coefficients
    keep_bias: Tensor | None
    out: Product  # H * v to W
    up: Product  # W to m
    down: Product  # m to W

    @classmethod
    def of(cls, layer: Layer, precision: Precision, library: Library) -> Weights:
        convolution, mixer, mlp = layer.convolution, layer.mixer, layer.mlp

        product = partial(PRODUCTS[precision], library=library)

        def plain(x: Tensor) -> Tensor:
            return x.to(torch.float32).contiguous()

        project = plain(mixer.project.weight * mixer.norm.weight)
        return cls(
            None if convolution is None else plain(convolution.norm.weight),
            None if convolution is None else plain(convolution.weight),
            product(functional.pad(project, (0, 0, 0, -len(project) % LINE))),
            Coefficients(*map(plain, mixer.mixture.coefficients())),
            plain(mixer.keep_bias) if isinstance(mixer, ForgettingMixer) else None,
            product(plain(mixer.out.weight)),
            product(plain(mlp.up.weight * mlp.norm.weight)),
            product(plain(mlp.down.weight)),
        )


class Buffers(NamedTuple):
    """What a step of up to N tokens works in: allocating it anew takes as long as a kernel."""

    normal: Tensor  # (N, W)
    routed: Tensor  # (N, what is projected)
    out: Tensor  # (N, H * v)
    hidden: Tensor  # (N, m)
    scratch: Scratch

    @classmethod
    def of(cls, weights: Weights, precision: Precision, tokens: int) -> Buffers:
        products = weights.project, weights.out, weights.up, weights.down
        make = partial(torch.empty, dtype=torch.float32, device="cpu")
        return cls(
            make(tokens, weights.project.inputs),
            make(tokens, weights.project.outputs),
            make(tokens, weights.out.inputs),
            make(tokens, weights.up.outputs),
            PRODUCTS[precision].scratch(
                tokens,
                max(each.inputs for each in products),
                max(each.outputs for each in products),
            ),
        )


class Packing(NamedTuple):
    """Which tokens of a step are there: those that are not cost nothing once x is packed."""

    shape: tuple[int, int, int]  # R, C, W
    there: Tensor | None  # (n,) places in R * C, or None if all are

    @classmethod
    def of(cls, rows: Rows, width: int) -> Packing:
        shape = (*rows.valid.shape, width)
        there = rows.valid.flatten().nonzero()[:, 0]
        return cls(shape, None if len(there) == rows.valid.numel() else there)

    def packed(self, x: Tensor) -> Tensor:
        """Take x (R, C, W) to (n, W), memory of its own."""
        taken = self.taken(x)
        return taken.clone(memory_format=torch.contiguous_format) if self.there is None else taken

    def taken(self, x: Tensor) -> Tensor:
        """Take x (R, C, ...) to the n tokens, (n, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.there is None else flat.index_select(0, self.there)

    def unpacked(self, x: Tensor) -> Tensor:
        """Take x (n, W) back to (R, C, W)."""
        if self.there is not None:
            x = x.new_zeros(self.shape).flatten(0, 1).index_copy_(0, self.there, x)
        return x.view(self.shape)


class CpuLayers:
    """The layers of a causal float32 model, whose weights may change between steps, with matrix
    products in a precision.

    Not noticed, until `Backbone.choose_mixers` is called again: what goes past PyTorch's count of a
    tensor's changes (``.data``, NumPy, fused optimizers), and other modules in place of these.
    Modules' hooks are not called.

    Steps may be run by several threads at once. A document's answer does not depend on the others
    of a step, be they NaN.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        config: BackboneConfig,
        library: Library,
        precision: Precision = "float32",
    ) -> None:
        self._layers, self._config, self.library = layers, config, library
        self.precision = precision
        make = partial(Weights.of, precision=precision, library=library)
        self._weights = [Prepared(layer, partial(make, layer)) for layer in layers]
        self._free: list[Buffers] = []  # several threads may be in a step

    @property
    def name(self) -> str:
        """Which kernels they are."""
        return f"C++ for {self.library.instructions}"

    def __reduce__(self) -> tuple[Any, ...]:
        return CpuLayers, (self._layers, self._config, self.library, self.precision)

    def take(self, x: Tensor) -> bool:
        """Whether they take embedded tokens x: they know no gradients, and one type."""
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
        plain = x.device.type == "cpu" and x.dtype == torch.float32
        return plain and not (watched or torch.is_autocast_enabled("cpu"))

    def hidden(
        self, x: Tensor, rows: Rows, states: State, usage: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Backbone.hidden`. What x has where no token is does not matter; zeros are there."""
        self._check(states)
        rows = rows._replace(
            lengths=rows.lengths.long().contiguous(), document=rows.document.long().contiguous()
        )
        before = [part.contiguous() for part in (states.memory, states.mass, states.tail)]
        after = [torch.empty_like(part) for part in before]
        packing = Packing.of(rows, x.shape[-1])
        x = packing.packed(x)
        y = torch.empty_like(x)
        of_layers = [weights() for weights in self._weights]
        make = partial(Buffers.of, of_layers[0], self.precision)
        buffers = self._free.pop() if self._free else make(0)
        if len(buffers.normal) < len(x):
            buffers = make(len(x))
        for index, (layer, weights) in enumerate(zip(self._layers, of_layers, strict=True)):
            own = States(*(part[:, index] for part in (*before, *after)))
            x, y = self._convolve(weights, x, y, own, rows, buffers.normal)
            if usage is not None and weights.keep_bias is None:
                usage.append(layer.mixer.usage(packing.unpacked(x), rows))
            counted = self._mix(weights, x, own, rows, buffers)
            if usage is not None and counted is not None:
                usage.append(counted)
            self._widen(weights, x, buffers)
        self._free.append(buffers)
        memory, mass, tail = after
        return packing.unpacked(x), memory, mass, tail

    def _check(self, states: State) -> None:
        """Raises ValueError for states of another model, of another type, or of too few documents:
        kernels would not notice."""
        documents = len(states.weight)
        expected = State.zeros(self._config, 0).tensors()
        for (name, none), (_, part) in zip(expected, states.tensors(), strict=True):
            shape = (documents, *none.shape[1:])
            if (part.shape, part.dtype, part.device) != (shape, none.dtype, none.device):
                raise ValueError(
                    f"{name} is {part.dtype} {tuple(part.shape)}, not {none.dtype} {shape}"
                )

    def _convolve(
        self,
        weights: Weights,
        x: Tensor,
        y: Tensor,
        states: States,
        rows: Rows,
        normal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return convolved x, which is normalised too, and what the next may write to."""
        if weights.taps is None or weights.scale is None:
            self.library.normalize(x, normal[: len(x)], EPSILON)
            return x, y
        self.library.convolve(
            x,
            weights.scale,
            weights.taps,
            (states.tail, states.tail_after),
            rows,
            y,
            normal[: len(x)],
            EPSILON,
        )
        return y, x

    def _mix(
        self, weights: Weights, x: Tensor, states: States, rows: Rows, buffers: Buffers
    ) -> Tensor | None:
        """Add what the mixer gives for normalised x to it; return usage if it forgets."""
        normal, routed, out = (each[: len(x)] for each in buffers[:3])
        counted = None
        if weights.keep_bias is not None:
            counted = x.new_empty(len(rows.lengths), *states.mass.shape[1:])
        weights.project.put(normal, routed, buffers.scratch)
        self.library.mix(
            routed,
            (states.memory, states.mass),
            weights.mixture,
            weights.keep_bias,
            rows,
            self._config,
            out,
            (states.memory_after, states.mass_after),
            counted,
        )
        weights.out.add(out, x, buffers.scratch)
        return counted

    def _widen(self, weights: Weights, x: Tensor, buffers: Buffers) -> None:
        """Add what the MLP gives for x to it."""
        normal, hidden = buffers.normal[: len(x)], buffers.hidden[: len(x)]
        self.library.normalize(x, normal, EPSILON)
        weights.up.put(normal, hidden, buffers.scratch, gelu=True)
        weights.down.add(hidden, x, buffers.scratch)


class CpuPooling:
    """The pooling of a float32 model, likewise."""

    def __init__(self, pooling: Pooling, library: Library) -> None:
        self._pooling, self._library = pooling, library
        self._product = Prepared(pooling, self._made)

    def __reduce__(self) -> tuple[Any, ...]:
        return CpuPooling, (self._pooling, self._library)

    def evidence(self, x: Tensor, tokens: Tensor, rows: Rows) -> Tensor:
        """Sum the scores of hidden x (R, C, W) and tokens (R, C) by rows: (R, labels)."""
        packing = Packing.of(rows, x.shape[-1])
        x, tokens = packing.packed(x), packing.taken(tokens).long().contiguous()
        self._library.normalize(x, x, EPSILON)
        product, pooling = self._product(), self._pooling
        read = x.new_empty(len(x), product.outputs)
        product.put(x, read, product.scratch(0, 0, 0))
        table = pooling.token.weight
        evidence = x.new_empty(len(rows.lengths), table.shape[1])
        self._library.score(
            read,
            table.contiguous(),
            pooling.deep.bias,
            pooling.factor if pooling.any else None,
            tokens,
            rows.lengths.long().contiguous(),
            evidence,
        )
        return evidence

    def _made(self) -> Product:
        return Float32(self._pooling.deep.weight * self._pooling.norm.weight, self._library)


class Prepared(Generic[Made]):
    """What is made of a module's weights, and made again when they have changed."""

    def __init__(self, module: nn.Module, make: Callable[[], Made]) -> None:
        # PyTorch's own dictionaries: they stay where weights are replaced, and to look into them
        # takes a tenth of what `parameters()` does.
        self._parameters = [each._parameters for each in module.modules()]
        self._make = make
        self._made: tuple[list[Seen], Made] | None = None

    def __call__(self) -> Made:
        seen = [Seen.of(x) for each in self._parameters for x in each.values() if x is not None]
        if self._made is None or not _same(seen, self._made[0]):
            with torch.inference_mode():
                self._made = seen, self._make()
        return self._made[1]


class Seen(NamedTuple):
    """A tensor as it was: kept, so that no other can be where it is."""

    tensor: Tensor
    address: int
    changes: int

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        return cls(x, x.data_ptr(), 0 if x.is_inference() else x._version)


def _same(some: Sequence[Seen], others: Sequence[Seen]) -> bool:
    return len(some) == len(others) and all(
        a.tensor is b.tensor and a[1:] == b[1:] for a, b in zip(some, others, strict=True)
    )


class States(NamedTuple):
    """A layer's states of all documents, before a step and after it."""

    memory: Tensor  # (D, H, K, v), of which documents lie apart
    mass: Tensor  # (D, H, K)
    tail: Tensor  # (D, T, W)
    memory_after: Tensor
    mass_after: Tensor
    tail_after: Tensor
