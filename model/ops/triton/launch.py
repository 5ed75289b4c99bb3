"""How Triton's kernels are launched: by the names of their parameters, where their tensors are.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients
from gma.model.ops.triton import forward, scans
from gma.model.ops.triton.units import convert

ENOUGH = 8 * 132
"""Programs that keep a large device busy."""

GROUPLESS = {(16, 32), (32, 16), (64, 16), (64, 32), (128, 16), (128, 32)}
"""r and K for which products of a whole group of warps read memory that is not theirs, in Triton
3.6 with ptxas 12.8: they are left to two warps, which are no group."""

TILE, DEPTH = 64, 32
"""Entries of a state, and segments, that a program sums at once."""

DOCUMENTS = 16
"""Programs that share a step's documents: most have few segments, and a program takes time to
start."""

STRIDES = {
    f"{prefix}_{axis}": (tensor, dimension)
    for tensor, prefix, axes in (
        ("q", "q", ("row", "token", "head")),
        ("k", "k", ("row", "token", "head")),
        ("val", "v", ("row", "token", "head")),
        ("x", "x", ("row", "token", "head")),
        ("open_gate", "o", ("row", "token", "head")),
        ("memory", "memory", ("document", "head", "component")),
        ("mass", "mass", ("document", "head")),
        ("memory_after", "after", ("document", "head", "component")),
        ("mass_after", "mass_after", ("document", "head")),
        ("usage", "usage", ("row",)),
        ("tail", "tail", ("slot",)),
        ("deep", "deep", ("stride",)),
    )
    for dimension, axis in enumerate(axes)
}
"""Parameters that are a stride: the tensor that has it, and along which dimension."""


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Run a kernel with these arguments and options.

    Strides that it takes are those of the tensors given, 0 of one that is None.
    """
    for name in _strides_among(tuple(kernel.arg_names)):
        tensor, dimension = STRIDES[name]
        x = arguments[tensor]
        arguments[name] = 0 if x is None else x.stride(dimension)
    # Triton launches on the current device.
    with torch.cuda.device_of(  # type: ignore[no-untyped-call]
        next(x for x in arguments.values() if isinstance(x, Tensor))
    ):
        kernel[grid](**arguments)


@cache  # a launch's time on the host is that of a small kernel
def _strides_among(parameters: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in parameters if name in STRIDES)


def at_most(registers: int) -> dict[str, int]:
    """Return the option for so many registers a thread at most; 0 leaves it to the compiler."""
    return {"maxnreg": registers} if registers else {}


class Shape(NamedTuple):
    """The numbers that a mixer's tensors are shaped by."""

    R: int
    C: int
    H: int
    r: int
    K: int
    v: int


class Cut(NamedTuple):
    """How a shape is cut, and what the kernels are launched with."""

    segment: int  # tokens
    block: int = 64  # tokens
    warps: int = 4
    stages: int = 3
    sum_registers: int = 0  # a thread, at most, see `at_most`
    read_registers: int = 0  # where no gate is, whose numbers are held too

    @classmethod
    def of(cls, shape: Shape, *, wide: bool = False) -> Cut:
        """Cut for speed: long segments save memory traffic, many keep the device busy. `wide`:
        tokens are of float32."""
        R, C, H, r, K, v = shape
        tokens = min(1024, max(64, triton.next_power_of_2(C)))
        while tokens > 64 and R * H * -(-C // tokens) < ENOUGH:
            tokens //= 2
        if (r, K) in GROUPLESS:
            return cls(tokens, warps=2, stages=1)
        # What a program has to hold.
        held = K * max(r, v)
        if held > 4096 or max(r, K, v) > 64:
            # All three of 128 leave no room for 64 tokens.
            return cls(tokens, block=32 if min(r, K, v) > 64 else 64, warps=8, stages=1)
        if held > 2048:
            return cls(tokens, warps=8, stages=1 if wide else 2)
        if wide:
            return cls(tokens, stages=1)
        # One more program on a multiprocessor, four and three, hides more of the others' waits.
        return cls(tokens, sum_registers=128, read_registers=168)


class Kept(NamedTuple):
    """What is kept of the segments' sums for their outputs, see `forward.sum_segments`."""

    gammas: Tensor
    masses: Tensor


class Sums(NamedTuple):
    """What segments do to a state, see `forward.sum_segments`; or, in its place, the states."""

    sums: Tensor  # (G, H, v + 1, K) float32
    decays: Tensor | None  # (G, H) float32: None if nothing is forgotten

    @property
    def arguments(self) -> dict[str, Any]:
        """Return them as kernels take them."""
        return {**self._asdict(), "FORGET": self.decays is not None}


class Units(NamedTuple):
    """What blocks are computed in, see `units.convert`: float32, None if nothing is forgotten."""

    grown: Tensor | None = None  # (R, H, C)
    left: Tensor | None = None  # (R, H, blocks)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return them as kernels take them."""
        return {**self._asdict(), "FORGET": self.left is not None}


class Launcher(NamedTuple):
    """Launches a mixer's kernels over the segments and documents of a step."""

    shape: Shape
    cut: Cut
    normalize: bool

    @classmethod
    def of(
        cls, x: Tensor, components: int, value_dim: int, normalize: bool, cut: Sequence[int] | None
    ) -> Launcher:
        """Make it for tokens x (R, C, H, r), cut as `cut` says, or for speed."""
        R, C, H, r = x.shape
        shape = Shape(R, C, H, r, components, value_dim)
        if cut:
            return cls(shape, Cut(*cut), normalize)
        return cls(shape, Cut.of(shape, wide=x.itemsize > 2), normalize)

    @property
    def segments(self) -> int:
        """How many segments a row has."""
        return -(-self.shape.C // self.cut.segment)

    @property
    def sums_shape(self) -> tuple[int, int, int, int]:
        """The shape of the segments' sums, (G, H, v + 1, K), which are float32."""
        R, _, H, _, K, v = self.shape
        return R * self.segments, H, v + 1, K

    @property
    def blocks(self) -> int:
        """How many blocks a row has."""
        return -(-self.shape.C // self.cut.block)

    def units(self, log_keep: Tensor | None, lengths: Tensor) -> Units:
        """Return the units of blocks whose tokens keep so much, (R, C, H), contiguous."""
        if log_keep is None:
            return Units()
        R, C, H, *_ = self.shape
        units = Units(log_keep.new_empty((R, H, C)), log_keep.new_empty((R, H, self.blocks)))
        launch(
            convert, (R * self.blocks,), log_keep=log_keep, lengths=lengths, **units._asdict(),
            C=C, H=H, HEADS=triton.next_power_of_2(H), BLOCK=self.cut.block,
        )  # fmt: skip
        return units

    def new_sums(self, units: Units, like: Tensor) -> Sums:
        """Make room for the segments' sums, where a tensor is."""
        sums = like.new_empty(self.sums_shape, dtype=torch.float32)
        return Sums(sums, None if units.left is None else sums.new_empty(self.sums_shape[:2]))

    @property
    def gammas_shape(self) -> tuple[int, int, int, int]:
        """The shape of `Kept.gammas`, which are of the values' dtype."""
        R, C, H, _, K, _ = self.shape
        return R, H, C, K

    @property
    def masses_shape(self) -> tuple[int, int, int, int]:
        """The shape of `Kept.masses`, which are float32."""
        R, _, H, _, K, _ = self.shape
        return R * self.segments, H, self.cut.segment // self.cut.block, K

    @property
    def tuned(self) -> dict[str, Any]:
        """What every kernel over blocks of tokens is launched with."""
        return {
            "BLOCK": self.cut.block,
            "NORMALIZE": self.normalize,
            "EPSILON": ROUTING_EPSILON,
            "STAGES": self.cut.stages,
            "num_warps": self.cut.warps,
        }

    def over_segments(self, kernel: Any, /, **arguments: Any) -> None:
        """Launch a program for each head of each segment."""
        R, C, H, r, K, v = self.shape
        launch(
            kernel, (R * self.segments * H,), C=C, segments=self.segments, H=H, R=r, K=K, V=v,
            SEGMENT=self.cut.segment, **self.tuned, **arguments,
        )  # fmt: skip

    def over_documents(self, kernel: Any, programs: int, /, **arguments: Any) -> None:
        """Launch programs that take some entries of a head's states, of one or some documents."""
        _, _, H, _, K, v = self.shape
        tiles = -(-((v + 1) * K) // TILE)
        launch(
            kernel, (tiles, H, programs), segments=self.segments, H=H, K=K, V=v,
            TILE=TILE, DEPTH=DEPTH, **arguments,
        )  # fmt: skip

    def sum_segments(
        self,
        k: Tensor,
        val: Tensor,
        units: Units,
        mixture: Coefficients,
        lengths: Tensor,
        sums: Sums,
        kept: Kept | None,
    ) -> None:
        """Put what each segment writes into `sums`, what its outputs need of it into `kept`."""
        gammas, masses = kept or (sums.sums, sums.sums)
        self.over_segments(
            forward.sum_segments, k=k, val=val, **units.arguments, **mixture._asdict(),
            lengths=lengths, sums=sums.sums, decays=sums.decays, gammas=gammas, masses=masses,
            KEEP=kept is not None, **at_most(self.cut.sum_registers),
        )  # fmt: skip

    def prefix(
        self,
        sums: Sums,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
        first: Tensor,
        count: Tensor,
        *,
        slots: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> None:
        """Put the states before the segments in the place of their `sums`.

        before and after: memory and mass of the documents, (D, H, K, v) and (D, H, K), or of slots.
        first and count (D,): where a document's rows stand. slots and fresh: see `scans.prefix`.
        """
        documents = len(first)
        self.over_documents(
            scans.prefix, min(DOCUMENTS, documents), **sums.arguments, memory=before[0],
            mass=before[1],
            memory_after=after[0], mass_after=after[1], first_row=first, row_count=count,
            slots=first if slots is None else slots, fresh=first if fresh is None else fresh,
            documents=documents, SLOTS=slots is not None, FRESH=fresh is not None,
        )  # fmt: skip

    def states_before(
        self,
        k: Tensor,
        val: Tensor,
        units: Units,
        memory: Tensor,
        mass: Tensor,
        mixture: Coefficients,
        lengths: Tensor,
        first: Tensor,
        count: Tensor,
        kept: Kept | None = None,
    ) -> tuple[Sums, Tensor, Tensor]:
        """Return the states before the segments (G, H, v + 1, K), and memory and mass after all."""
        sums = self.new_sums(units, k)
        self.sum_segments(k, val, units, mixture, lengths, sums, kept)
        after = memory.new_empty(memory.shape), mass.new_empty(mass.shape)
        self.prefix(sums, (memory, mass), after, first, count)
        return sums, *after

    def read_segments(
        self,
        q: Tensor,
        val: Tensor,
        units: Units,
        mixture: Coefficients,
        lengths: Tensor,
        before: Tensor,
        kept: Kept,
        out: Tensor,
        *,
        epsilon: float,
        open_gate: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Put each token's mean into `out` (R, C, H, v), from the states before the segments.

        With open_gate (R, C, H, v) it goes through the gate. `scale` multiplies all.
        """
        self.over_segments(
            forward.read_segments, q=q, val=val, **units.arguments, **mixture._asdict(),
            lengths=lengths, before=before, **kept._asdict(), out=out, epsilon=epsilon,
            scale=scale, open_gate=open_gate, OPEN=open_gate is not None,
            **at_most(0 if open_gate is not None else self.cut.read_registers),
        )  # fmt: skip
