"""The classifier's step for a GPU: the same numbers with few passes over memory, states in slots.

Where `gma.model.layers` says what a layer is, this says how it is computed fast: weights are
prepared once, every buffer is allocated once, normalisation is a factor of the product that follows
it, GELU and the residual are the end of the product before them, and states are read and written
where they lie. Documents meet nowhere, so that what is not finite in one stays there.

Shapes: R rows of C tokens, N = R * C, D = R documents, S slots, L layers, W width, H heads,
r routing_dim, K components, v value_dim, T tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.grid import Grid
from gma.model.layers import Layer
from gma.model.ops import kernels, tokens
from gma.model.ops.choice import LARGEST, TAPS, Precision, obstacle
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients
from gma.model.ops.products import multiply
from gma.model.ops.triton import DEPTH, DOCUMENTS, TILE, Plan, at_most
from gma.model.state import State

FLOAT8 = torch.float8_e4m3fn
NORM_EPSILON = 1e-6
SCORES = 4096
"""Entries of a tile of scores."""

STRIP = 8
"""Tokens that a program takes one after the other."""


class Weight(NamedTuple):
    """A product's weight (O, I), and the factor that undoes its scaling."""

    matrix: Tensor
    alpha: float


class LayerWeights(NamedTuple):
    project: Weight
    out: Tensor  # (W, H * v) bfloat16
    up: Weight
    down: Weight
    mixture: Coefficients
    taps: Tensor  # (4, W) bfloat16, times conv_norm
    tail_taps: Tensor  # (4, W) float32, zeros before the convolution's
    conv_norm: Tensor  # (W,) float32


@dataclass(frozen=True)
class Inputs:
    """A step's input, see `Classifier.step`, in memory that stays where it is.

    Slots of distinct documents are distinct, but for documents without rows. first_row and
    row_count of a document tell where its rows stand; a document without rows has none.
    """

    tokens: Tensor  # (R, C) int32: ids of the vocabulary, where no token is too
    lengths: Tensor  # (R,) int32
    document: Tensor  # (R,) int32
    slots: Tensor  # (D,) int32
    fresh: Tensor  # (D,) int32: 1 where the document begins here, whatever lies in its slot
    first_row: Tensor  # (D,) int32
    row_count: Tensor  # (D,) int32
    whole: Tensor  # (R * (C + 6),) int32: all of it, in one piece

    @classmethod
    def empty(
        cls, grid: tuple[int, int], device: torch.device | str, *, pinned: bool = False
    ) -> Inputs:
        """No document has rows; `pinned`: in memory that a GPU copies from by itself."""
        rows, chunk = grid
        size = rows * (chunk + 6)
        whole = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned)
        ids, rest = whole[: rows * chunk], whole[rows * chunk :].view(6, rows)
        return cls(ids.view(rows, chunk), *rest, whole)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Outputs:
    """What a step answers, in memory that the next step overwrites.

    Rows and documents that were not used hold anything.
    """

    evidence: Tensor  # (R, labels) float32: sum of the scores of the row's tokens
    logits: Tensor  # (D, labels) float64, over all that was read of the document
    whole: Tensor  # (bytes,) uint8: both, in one piece

    @classmethod
    def empty(
        cls, rows: int, labels: int, device: torch.device | str, *, pinned: bool = False
    ) -> Outputs:
        """Zeros."""
        size = rows * labels
        whole = torch.zeros(size * 12, dtype=torch.uint8, device=device, pin_memory=pinned)
        logits, evidence = whole[: size * 8], whole[size * 8 :]
        return cls(
            evidence.view(torch.float32).view(rows, labels),
            logits.view(torch.float64).view(rows, labels),
            whole,
        )


class FusedStep:
    """Steps of a causal classifier in bfloat16, or with fp8 matrix products; see `Classifier`.

    Scores, sums and states are float32, pooled sums float64.
    """

    def __init__(
        self, classifier: Classifier, *, rows: int, chunk: int, precision: Precision = "bfloat16"
    ) -> None:
        """For grids of up to `rows` rows of `chunk` tokens.

        Raises ValueError if there is an `obstacle`.
        """
        config = classifier.config
        reason = obstacle(classifier, precision)
        if reason:
            raise ValueError(f"{config.name} has no fused step in {precision}: {reason}")
        if chunk < max(1, config.tail):
            raise ValueError(f"rows of {chunk} tokens: at least {max(1, config.tail)}")
        self.config = config
        self.precision = precision
        self.largest = Grid(rows, chunk)
        self.device = classifier.embedding.weight.device
        self._multiprocessors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else 4
        )
        self._wide = triton.next_power_of_2(config.width)
        self._table = classifier.embedding.weight.to(torch.bfloat16)
        self._layers = [self._prepared(layer) for layer in classifier.layers]
        pooling = classifier.pooling
        deep = pooling.deep.weight.float() * pooling.norm.weight.float()
        self._labels = len(config.labels)
        # A row of a multiple of 16 bytes.
        self._deep = deep.new_zeros(-(-(self._labels + 1) // 8) * 8, config.width)
        self._deep[: self._labels + 1] = deep
        self._deep = self._deep.to(torch.bfloat16)
        self._deep_bias = pooling.deep.bias.float()
        self._own_scores = pooling.token.weight.float()
        self._allocate(rows, chunk)

    def _prepared(self, layer: object) -> LayerWeights:
        assert isinstance(layer, Layer)
        config, mixer, mlp = self.config, layer.mixer, layer.mlp
        project = mixer.project.weight.float() * mixer.norm.weight.float()
        up = mlp.up.weight.float() * mlp.norm.weight.float()
        convolution = layer.convolution
        norm, taps = torch.ones(config.width), torch.zeros(TAPS, config.width)
        if convolution:
            norm = convolution.norm.weight.float()
            taps[TAPS - config.conv_kernel :] = convolution.weight
        norm, taps = norm.to(self.device), taps.to(self.device)
        return LayerWeights(
            project=self._weight(project),
            out=mixer.out.weight.to(torch.bfloat16),
            up=self._weight(up),
            down=self._weight(mlp.down.weight.float()),
            mixture=Coefficients(*(x.contiguous() for x in mixer.mixture.coefficients())),
            # As narrow as the rows: a warp then holds both alike.
            taps=(taps * norm).to(torch.bfloat16),
            tail_taps=taps,
            conv_norm=norm,
        )

    def _weight(self, matrix: Tensor) -> Weight:
        if self.precision == "bfloat16":
            return Weight(matrix.to(torch.bfloat16).contiguous(), 1.0)
        scale = LARGEST["fp8"] / float(matrix.abs().max().clamp_min(1e-12))
        return Weight((matrix * scale).to(FLOAT8).contiguous(), 1.0 / scale)

    def _allocate(self, rows: int, chunk: int) -> None:
        config, count = self.config, rows * chunk
        read = config.heads * config.value_dim
        routed = 2 * config.heads * config.routing_dim + read
        narrow = FLOAT8 if self.precision == "fp8" else torch.bfloat16

        def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self._x = buffer(count, config.width)
        self._spare = buffer(count, config.width)
        self._normal = buffer(count, config.width, dtype=narrow)
        self._routed = buffer(count, routed)
        self._gammas = buffer(count * config.heads * config.num_components)
        self._read = buffer(count, read)
        self._hidden = buffer(count, config.mlp_width, dtype=narrow)
        self._last = buffer(count, config.width) if narrow == FLOAT8 else self._normal
        self._deep_out = buffer(count, len(self._deep), dtype=torch.float32)
        self._inverse = buffer(count, dtype=torch.float32)
        plans = [(r, self._plan(Grid(r, chunk))) for r in range(1, rows + 1)]
        segments = max(r * -(-chunk // plan.segment) for r, plan in plans)
        blocks = max(
            r * -(-chunk // plan.segment) * (plan.segment // plan.block) for r, plan in plans
        )
        state = config.heads * config.num_components * (config.value_dim + 1)
        self._sums = buffer(segments * state, dtype=torch.float32)
        self._masses = buffer(blocks * config.heads * config.num_components, dtype=torch.float32)
        self._label_width = triton.next_power_of_2(self._labels)
        self._scored = max(1, min(64, SCORES // self._label_width))
        self._shares = buffer(rows * -(-chunk // self._scored), self._labels, dtype=torch.float32)

    def _plan(self, grid: Grid) -> Plan:
        config = self.config
        sizes = config.routing_dim, config.num_components, config.value_dim
        return Plan.of(grid.rows, grid.chunk, config.heads, *sizes)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, states: State, outputs: Outputs) -> None:
        """Read a step's rows on top of the states in their slots, and leave the new ones there.

        Nothing is allocated and nothing waits for the device: it can be captured in a CUDA graph.
        Raises ValueError for a grid that the buffers were not made for.
        """
        grid = Grid(*inputs.tokens.shape)
        if grid.rows > self.largest.rows or grid.chunk != self.largest.chunk:
            raise ValueError(
                f"a grid of {grid.rows} x {grid.chunk} in buffers that were made for grids of up "
                f"to {self.largest.rows} rows of {self.largest.chunk} tokens"
            )
        count = grid.rows * grid.chunk
        config, wide = self.config, self._wide
        x, spare = self._x[:count], self._spare[:count]
        each = max(1, 4096 // wide)
        tokens.embed[(-(-count // each),)](
            inputs.tokens, self._table, x, config.width, count, WIDTH=wide, TOKENS=each
        )
        for index, layer in enumerate(self._layers):
            self._layer(x, spare, layer, inputs, grid, states, index)
            x, spare = spare, x
        normal = self._last[:count]
        self._normalize(x, normal=normal)
        deep = self._deep_out[:count]
        multiply(normal, self._deep, deep, multiprocessors=self._multiprocessors)
        blocks = -(-grid.chunk // self._scored)
        tokens.score[(grid.rows * blocks,)](
            deep, self._deep_bias, inputs.tokens, self._own_scores, inputs.lengths, self._shares,
            grid.chunk, self._labels, deep.stride(0),
            LABELS=self._label_width, TOKENS=self._scored,
        )  # fmt: skip
        tokens.add_shares[(grid.rows,)](
            self._shares, outputs.evidence, blocks, self._labels,
            BLOCKS=min(self._scored, triton.next_power_of_2(blocks)),
            LABELS=self._label_width,
        )  # fmt: skip
        tokens.pool[(grid.rows,)](
            outputs.evidence, inputs.lengths, inputs.first_row, inputs.row_count, inputs.slots,
            inputs.fresh, states.evidence, states.weight, outputs.logits, self._labels,
            config.prior_tokens, ROWS=32, LABELS=self._label_width,
        )  # fmt: skip

    def _layer(
        self,
        x: Tensor,
        y: Tensor,
        weights: LayerWeights,
        inputs: Inputs,
        grid: Grid,
        states: State,
        index: int,
    ) -> None:
        """One layer: x (N, W) -> y (N, W)."""
        count = len(x)
        normal, inverse = self._normal[:count], self._inverse[:count]
        routed, read, hidden = self._routed[:count], self._read[:count], self._hidden[:count]
        self._convolve(x, y, inverse, normal, weights, inputs, grid, states.tail[:, index])
        memory, mass = states.memory[:, index], states.mass[:, index]
        if self.precision == "fp8":
            self._multiply(normal, weights.project, routed)
            self._mix(routed, read, weights, inputs, grid, memory, mass)
            y.addmm_(read, weights.out.T)
            self._normalize(y, normal=normal)
            self._multiply(normal, weights.up, hidden, gelu=True)
            self._multiply(hidden, weights.down, y, add=True)
        else:
            self._multiply(y, weights.project, routed, factor=inverse)
            self._mix(routed, read, weights, inputs, grid, memory, mass)
            y.addmm_(read, weights.out.T)
            self._normalize(y, inverse=inverse)
            self._multiply(y, weights.up, hidden, factor=inverse, gelu=True)
            y.addmm_(hidden, weights.down.matrix.T)

    def _convolve(
        self,
        x: Tensor,
        y: Tensor,
        inverse: Tensor,
        normal: Tensor,
        weights: LayerWeights,
        inputs: Inputs,
        grid: Grid,
        tail: Tensor,
    ) -> None:
        width, depth = self.config.width, self.config.tail
        of_documents = inputs.first_row, inputs.slots, inputs.fresh
        tokens.convolve[(grid.rows * -(-grid.chunk // STRIP),)](
            x, tail, weights.taps, weights.tail_taps, inputs.lengths, inputs.document,
            *of_documents, y, inverse, normal, grid.chunk, width, NORM_EPSILON, tail.stride(0),
            T=depth, KNOWN=width, WIDTH=self._wide, STRIP=STRIP, NORMAL=self.precision == "fp8",
            SLOTS=True, num_warps=tokens.warps(self._wide), **at_most(tokens.REGISTERS),
        )  # fmt: skip
        if depth:
            tokens.remember[(grid.rows,)](
                x, tail, tail, weights.conv_norm, inputs.lengths, inputs.row_count, *of_documents,
                grid.chunk, width, NORM_EPSILON, tail.stride(0), T=depth,
                DEPTH=triton.next_power_of_2(depth), WIDTH=self._wide, SLOTS=True,
            )  # fmt: skip

    def _mix(
        self,
        routed: Tensor,
        read: Tensor,
        weights: LayerWeights,
        inputs: Inputs,
        grid: Grid,
        memory: Tensor,
        mass: Tensor,
    ) -> None:
        """The causal mixer: routed (N, H * (2r + v)) -> read (N, H * v), states in their slots."""
        config, plan, mixture = self.config, self._plan(grid), weights.mixture
        heads, components = config.heads, config.num_components
        value, routing = config.value_dim, config.routing_dim
        widths = [heads * routing, heads * routing, heads * value]
        q, k, val = (part.view(*grid, heads, -1) for part in torch.split(routed, widths, dim=-1))
        segments = -(-grid.chunk // plan.segment)
        sizes = {"H": heads, "K": components, "V": value}
        cut = {
            "R": routing, "SEGMENT": plan.segment, "BLOCK": plan.block, "STAGES": plan.stages,
            "NORMALIZE": config.normalize_routing, "EPSILON": ROUTING_EPSILON,
            "num_warps": plan.warps,
        }  # fmt: skip
        kernels._sum_segments[(grid.rows * segments * heads,)](
            k, val, *mixture, inputs.lengths, self._sums, self._gammas, self._masses,
            *k.stride()[:3], *val.stride()[:3], grid.chunk, segments, KEEP=True,
            **sizes, **cut, **at_most(plan.sum_registers),
        )  # fmt: skip
        entries = (value + 1) * components
        kernels._prefix[(-(-entries // TILE), heads, min(DOCUMENTS, grid.rows))](
            self._sums, memory, mass, memory, mass, inputs.first_row, inputs.row_count,
            inputs.slots, inputs.fresh, grid.rows, *memory.stride()[:3], *mass.stride()[:2],
            *memory.stride()[:3], *mass.stride()[:2], segments, **sizes,
            TILE=TILE, DEPTH=DEPTH, FRESH=True, SLOTS=True,
        )  # fmt: skip
        kernels._read_segments[(grid.rows * segments * heads,)](
            q, self._gammas, self._masses, val, *mixture, inputs.lengths, self._sums, read,
            *q.stride()[:3], *val.stride()[:3], grid.chunk, segments, config.epsilon,
            **sizes, **cut, **at_most(plan.read_registers),
        )  # fmt: skip

    def _multiply(self, a: Tensor, weight: Weight, out: Tensor, **how: object) -> None:
        multiply(
            a, weight.matrix, out, alpha=weight.alpha, multiprocessors=self._multiprocessors,
            **how,  # type: ignore[arg-type]
        )  # fmt: skip

    def _normalize(
        self, x: Tensor, *, inverse: Tensor | None = None, normal: Tensor | None = None
    ) -> None:
        count, width = x.shape
        tokens.normalize[(-(-count // STRIP),)](
            x, x if inverse is None else inverse, x if normal is None else normal, width,
            NORM_EPSILON, count, KNOWN=width, WIDTH=self._wide, STRIP=STRIP,
            NORMAL=normal is not None, num_warps=tokens.warps(self._wide),
        )  # fmt: skip
