"""The classifier's step for a GPU: the same numbers with few passes over memory, states in slots.

Where `gma.model.layers` says what a layer is, this says how it is computed fast: weights are
prepared once, every buffer is allocated once, normalisation is a factor of the product that follows
it, GELU and the residual are the end of the product before them, and states are read and written
where they lie. Documents meet nowhere, so that what is not finite in one stays there.

Shapes: R rows of C tokens, N = R * C, D = R documents, S slots, L layers, W width, H heads,
r routing_dim, K components, v value_dim, T tail.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.config import LASTING
from gma.model.fused import tokens
from gma.model.fused.buffers import Activations, Inputs, Outputs
from gma.model.fused.obstacles import SIZES, FusedPrecision, obstacle
from gma.model.fused.parameters import ACTIVATIONS, Keep, LayerParameters, Matrix, Parameters
from gma.model.fused.products import multiply
from gma.model.fused.tokens import STRIP
from gma.model.grid import Grid
from gma.model.ops.forgetting import MOST_FORGOTTEN
from gma.model.ops.triton.launch import Cut, Kept, Launcher, Shape, Sums, Units, at_most, launch
from gma.model.ops.triton.usage import count
from gma.model.scores import LEAST
from gma.model.state import State

NORM_EPSILON = 1e-6

SCORES = 4096
"""How many entries a tile of scores has."""

EMBEDDED = 4096
"""How many entries a tile of embeddings has."""


class FusedStep:
    """Steps of a causal classifier in float32, in bfloat16, or with fp8 matrix products; see
    `Classifier`.

    Scores, sums and states are float32, pooled sums float64. What a document's rows give does not
    depend, to the last bit, on the grid, on the step that each is in, or on what else is there.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        rows: int,
        chunk: int,
        precision: FusedPrecision = "bfloat16",
    ) -> None:
        """Prepare for grids of up to `rows` rows of `chunk` tokens.

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
        self._narrow = precision == "fp8"  # products take rows that are normalised already
        self.largest = Grid(rows, chunk)
        self.device = classifier.embedding.weight.device
        self._multiprocessors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else 4
        )
        self._wide = triton.next_power_of_2(config.width)
        self._labels = len(config.labels)
        self._label_width = triton.next_power_of_2(self._labels)
        self._scored = max(1, min(64, SCORES // self._label_width))
        self._parameters = Parameters.of(classifier, precision)
        self._launchers = [self._launcher(some) for some in range(1, rows + 1)]
        self._allocate()

    def _launcher(self, rows: int) -> Launcher:
        """That of grids of so many rows. All are cut alike, so that it tells nothing of a row's
        numbers which of them it is in."""
        config = self.config
        sizes = config.routing_dim, config.num_components, config.value_dim
        whole = Shape(*self.largest, config.heads, *sizes)
        cut = Cut.of(whole, wide=self.precision == "float32")
        return Launcher(whole._replace(R=rows), cut, config.normalize_routing)

    def _allocate(self) -> None:
        rows, chunk = self.largest
        largest = self._launchers[-1]
        forgets = self.config.form == "forgetting"

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self._activations = Activations.empty(
            self.config,
            rows * chunk,
            len(self._parameters.layers[0].project.weight),
            len(self._parameters.deep),
            self.precision,
            self.device,
        )
        self._sums = Sums(
            buffer(*largest.sums_shape), buffer(*largest.sums_shape[:2]) if forgets else None
        )
        heads = self.config.heads if forgets else 0
        self._units = buffer(rows, heads, chunk), buffer(rows, heads, largest.blocks)
        self._kept = Kept(
            gammas=buffer(*largest.gammas_shape, dtype=ACTIVATIONS[self.precision]),
            masses=buffer(*largest.masses_shape),
        )
        self._before = buffer(rows, self.config.tail, self.config.width)
        self._shares = buffer(rows * -(-chunk // self._scored), self._labels)

    @torch.no_grad()
    def __call__(
        self, inputs: Inputs, states: State, outputs: Outputs, usage: Tensor | None = None
    ) -> None:
        """Read a step's rows on top of the states in their slots, and leave the new ones there.

        `usage` (R, L, H, K) float32 gets that of the rows, see `gma.model.ops.chunked.usage`.
        Nothing is allocated and nothing waits for the device: it can be captured in a CUDA graph.
        Raises ValueError for a grid that the buffers were not made for.
        """
        grid = Grid(*inputs.tokens.shape)
        if grid.rows > self.largest.rows or grid.chunk != self.largest.chunk:
            raise ValueError(
                f"a grid of {grid.rows} x {grid.chunk} in buffers that were made for grids of up "
                f"to {self.largest.rows} rows of {self.largest.chunk} tokens"
            )
        between = self._activations.first(grid.rows * grid.chunk)
        self._embed(inputs, between.x)
        for index, layer in enumerate(self._parameters.layers):
            self._layer(layer, inputs, between, states, index)
            if usage is not None:
                self._count(layer, inputs, between, usage[:, index])
            between = between._replace(x=between.y, y=between.x)
        self._normalize(between.x, normal=between.last)
        self._multiply(between.last, Matrix(self._parameters.deep, 1.0), between.deep)
        self._pool(inputs, between.deep, states, outputs)

    def _embed(self, inputs: Inputs, x: Tensor) -> None:
        """Put the tokens' embeddings into x (N, W)."""
        count, width = x.shape
        each = max(1, EMBEDDED // self._wide)
        launch(
            tokens.embed, (-(-count // each),), tokens=inputs.tokens, table=self._parameters.table,
            x=x, width=width, count=count, WIDTH=self._wide, TOKENS=each,
        )  # fmt: skip

    def _layer(
        self,
        parameters: LayerParameters,
        inputs: Inputs,
        between: Activations,
        states: State,
        index: int,
    ) -> None:
        """Do one layer: x (N, W) -> y (N, W), its states in their slots."""
        y, hidden = between.y, between.hidden
        taken, factor = (between.normal, None) if self._narrow else (y, between.inverse)
        self._convolve(parameters, inputs, between, states.tail[:, index])
        self._multiply(taken, parameters.project, between.routed, factor=factor)
        self._mix(parameters, inputs, between, states, index)
        self._add(between.read, parameters.out, y)
        if self._narrow:
            self._normalize(y, normal=between.normal)
        else:
            self._normalize(y, inverse=between.inverse)
        self._multiply(taken, parameters.up, hidden, factor=factor, gelu=True)
        self._add(hidden, parameters.down, y)

    def _convolve(
        self, parameters: LayerParameters, inputs: Inputs, between: Activations, tail: Tensor
    ) -> None:
        """Add the short convolution to x, into y, and normalise y; tails in their slots."""
        rows, chunk = inputs.tokens.shape
        width, depth = self.config.width, self.config.tail
        given = {
            "x": between.x, "before": self._before, "C": chunk, "width": width,
            "epsilon": NORM_EPSILON, "T": depth, "WIDTH": self._wide,
            "num_warps": tokens.warps(self._wide, between.x.element_size()),
        }  # fmt: skip
        if depth:
            launch(
                tokens.remember, (rows,), **given, tail=tail, tail_after=tail,
                norm=parameters.conv_norm, lengths=inputs.lengths, document=inputs.document,
                row_count=inputs.row_count, first_row=inputs.first_row, slots=inputs.slots,
                fresh=inputs.fresh, rows=rows, documents=rows, SLOTS=True,
            )  # fmt: skip
        launch(
            tokens.convolve, (rows * -(-chunk // STRIP),), **given,
            taps=parameters.taps, tail_taps=parameters.tail_taps, y=between.y,
            inverse=between.inverse, normal=between.normal, KNOWN=width, STRIP=STRIP,
            NORMAL=self._narrow,
            **at_most(0 if self.precision == "float32" else tokens.REGISTERS),
        )  # fmt: skip

    def _mix(
        self,
        parameters: LayerParameters,
        inputs: Inputs,
        between: Activations,
        states: State,
        index: int,
    ) -> None:
        """Do the causal mixer: routed -> read, its states in their slots."""
        rows, chunk = inputs.tokens.shape
        launcher = self._launchers[rows - 1]
        heads, routing, value = self.config.heads, self.config.routing_dim, self.config.value_dim
        widths = [heads * routing] * 2 + [heads * value] * (1 if parameters.keep is None else 2)
        parts = torch.split(between.routed, widths, dim=-1)
        q, k, val, *gates = (part.view(rows, chunk, heads, -1) for part in parts)
        units = Units()
        if parameters.keep is not None:
            units = self._forget(parameters.keep, inputs, between)
        mixture, lengths, kept = parameters.mixture, inputs.lengths, self._kept
        state = states.memory[:, index], states.mass[:, index]
        sums = self._sums
        launcher.sum_segments(k, val, units, mixture, lengths, sums, kept)
        launcher.prefix(
            sums, state, state, inputs.first_row, inputs.row_count,
            slots=inputs.slots, fresh=inputs.fresh,
        )  # fmt: skip
        launcher.read_segments(
            q, val, units, mixture, lengths, sums.sums, kept, between.read,
            epsilon=self.config.epsilon, open_gate=next(iter(gates), None),
            scale=parameters.read_scale,
        )  # fmt: skip

    def _count(
        self, parameters: LayerParameters, inputs: Inputs, between: Activations, usage: Tensor
    ) -> None:
        """Put what a layer's rows take of its components into usage (R, H, K)."""
        rows, chunk = inputs.tokens.shape
        heads, routing = self.config.heads, self.config.routing_dim
        k = between.routed[:, heads * routing : 2 * heads * routing]
        launch(
            count, (rows * heads,), k=k.view(rows, chunk, heads, routing), usage=usage,
            **parameters.mixture._asdict(), lengths=inputs.lengths, H=heads, R=routing,
            K=self.config.num_components, **self._launchers[rows - 1].tuned,
        )  # fmt: skip

    def _forget(self, keep: Keep, inputs: Inputs, between: Activations) -> Units:
        """Compute the units of blocks from the layer's convolved rows."""
        rows, chunk = inputs.tokens.shape
        launcher = self._launchers[rows - 1]
        units = Units(*(x[:rows] for x in self._units))
        narrow = self._narrow
        launch(
            tokens.project_rates, (rows * launcher.blocks,),
            x=between.normal if narrow else between.y, factor=between.inverse, keep=keep.weight,
            keep_bias=keep.bias, lengths=inputs.lengths, **units._asdict(), C=chunk,
            width=self.config.width, most=MOST_FORGOTTEN, H=self.config.heads,
            LASTING=LASTING, HEADS=len(keep.bias),
            BLOCK=launcher.cut.block, DEPTH=128 // SIZES[self.precision], FACTOR=not narrow,
        )  # fmt: skip
        return units

    def _pool(self, inputs: Inputs, deep: Tensor, states: State, outputs: Outputs) -> None:
        """Sum the tokens' scores to each row's evidence, and to each document's sums and logits."""
        rows, chunk = inputs.tokens.shape
        blocks = -(-chunk // self._scored)
        labels = {"labels": self._labels, "LABELS": self._label_width}
        bias, factor = self._parameters.deep_bias, self._parameters.factor
        launch(
            tokens.score, (rows * blocks,), deep=deep, bias=bias,
            factor=bias if factor is None else factor, ANY=factor is not None,
            tokens=inputs.tokens, table=self._parameters.own_scores, lengths=inputs.lengths,
            shares=self._shares, C=chunk, TOKENS=self._scored, **labels,
        )  # fmt: skip
        launch(
            tokens.add_shares, (rows,), shares=self._shares, evidence=outputs.evidence,
            blocks=blocks, BLOCKS=min(self._scored, triton.next_power_of_2(blocks)), **labels,
        )  # fmt: skip
        launch(
            tokens.pool, (rows,), row_evidence=outputs.evidence, lengths=inputs.lengths,
            first_row=inputs.first_row, row_count=inputs.row_count, slots=inputs.slots,
            fresh=inputs.fresh, evidence=states.evidence, weight=states.weight,
            logits=outputs.logits, prior=self.config.prior_tokens, AHEAD=4, LEAST=LEAST,
            ANY=factor is not None, **labels,
        )  # fmt: skip

    def _multiply(
        self,
        a: Tensor,
        matrix: Matrix,
        out: Tensor,
        *,
        factor: Tensor | None = None,
        gelu: bool = False,
        add: bool = False,
    ) -> None:
        multiply(
            a, matrix.weight, out, multiprocessors=self._multiprocessors, alpha=matrix.alpha,
            factor=factor, gelu=gelu, add=add,
        )  # fmt: skip

    def _add(self, a: Tensor, matrix: Matrix, out: Tensor) -> None:
        """Add a product to `out`: cuBLAS does this best in bfloat16, and the same for every row."""
        if self.precision == "bfloat16":
            out.addmm_(a, matrix.weight.T)
        else:
            self._multiply(a, matrix, out, add=True)

    def _normalize(
        self, x: Tensor, *, inverse: Tensor | None = None, normal: Tensor | None = None
    ) -> None:
        """Put one over the root mean squares of x into inverse, or x normalised into normal."""
        count, width = x.shape
        launch(
            tokens.normalize, (-(-count // STRIP),), x=x, inverse=x if inverse is None else inverse,
            normal=x if normal is None else normal, width=width, epsilon=NORM_EPSILON, count=count,
            KNOWN=width, WIDTH=self._wide, STRIP=STRIP, NORMAL=normal is not None,
            num_warps=tokens.warps(self._wide, self._activations.x.element_size()),
        )  # fmt: skip
