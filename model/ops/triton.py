"""Gaussian Mixture Attention over the rows of a step, in Triton.

Source: arXiv:2606.18283. Signatures, shapes and meaning are those of `gma.model.ops.chunked`, with
tokens in bfloat16 or float32, mixture and states in float32, and outputs in the tokens'
dtype. Each function is an operator of `torch.library`: one node to autograd and torch.compile.

Shapes: R rows of C tokens, D documents, H heads, r routing_dim, K components, v value_dim, G
segments. r, K and v are powers of two from 16 to 128. A document's rows stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gma.model.ops import gradients, kernels
from gma.model.ops.choice import MIXTURE, SIZES
from gma.model.ops.chunked import ROUTING_EPSILON, Coefficients, Rows

DTYPES = torch.bfloat16, torch.float32
INTERPRETED = bool(kernels.INTERPRETED.value)

ENOUGH = 8 * 132
"""Programs that keep a large device busy."""


TILE, DEPTH = 64, 32
"""Entries of a state, and segments, that a program sums at once."""

DOCUMENTS = 16
"""Programs that share a step's documents: most have few segments, and a program takes time to
start."""


class Plan(NamedTuple):
    """How a shape is cut, and what the kernels are launched with: backward too, if one is given."""

    segment: int
    block: int = 64
    warps: int = 4
    stages: int = 3
    sum_registers: int = 0
    read_registers: int = 0
    """Of a thread, at most; 0 leaves it to the compiler."""

    @classmethod
    def of(cls, rows: int, chunk: int, heads: int, *sizes: int) -> Plan:
        """Long segments save memory traffic, many keep the device busy.

        sizes: routing_dim, num_components and value_dim, which decide what a program has to hold.
        """
        tokens = min(1024, max(64, triton.next_power_of_2(chunk)))
        while tokens > 64 and rows * heads * -(-chunk // tokens) < ENOUGH:
            tokens //= 2
        routing, components, value = sizes
        held = components * max(routing, value)
        if held > 4096 or max(sizes) > 64:
            return cls(tokens, warps=8, stages=1)
        if held > 2048:
            return cls(tokens, warps=8, stages=2)
        # One more program on a multiprocessor, four and three, hides more of the others' waits.
        return cls(tokens, sum_registers=128, read_registers=168)


def at_most(registers: int) -> dict[str, int]:
    """The option that holds a kernel to so many registers."""
    return {"maxnreg": registers} if registers else {}


def causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `gma.model.ops.chunked.causal`. Raises ValueError for what the kernels can't take."""
    out, memory, mass = _causal(
        q, k, val, memory, mass, *mixture, rows.lengths, rows.first, rows.count,
        normalize, epsilon, plan,
    )  # fmt: skip
    return out, memory, mass


def write(
    k: Tensor,
    val: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gma.model.ops.chunked.write`. Raises ValueError for what the kernels can't take."""
    memory, mass = _write(
        k, val, *mixture, rows.lengths, rows.document, rows.first, rows.count, normalize, plan
    )
    return memory, mass


def read(
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    mixture: Coefficients,
    rows: Rows,
    *,
    normalize: bool,
    epsilon: float,
    plan: Plan | None = None,
) -> Tensor:
    """See `gma.model.ops.chunked.read`. Raises ValueError for what the kernels can't take."""
    out: Tensor = _read(
        q, memory, mass, *mixture, rows.lengths, rows.document, rows.first, rows.count,
        normalize, epsilon, plan,
    )  # fmt: skip
    return out


class _Call:
    """How a call's tokens (R, C, H, r) are cut, and what kernels over them are launched with."""

    def __init__(
        self, x: Tensor, components: int, value_dim: int, normalize: bool, plan: Plan
    ) -> None:
        self.x, self.plan = x, plan
        self.segments = -(-x.shape[1] // plan.segment)
        self.state = {"H": x.shape[2], "K": components, "V": value_dim}
        self.tuned = {
            "BLOCK": plan.block,
            "NORMALIZE": normalize,
            "EPSILON": ROUTING_EPSILON,
            "STAGES": plan.stages,
            "num_warps": plan.warps,
        }

    def over_segments(self, kernel: Any, *args: object, **more: object) -> None:
        R, C, H, r = self.x.shape
        with _device_of(self.x):
            kernel[(R * self.segments * H,)](
                *args, C=C, segments=self.segments, R=r, SEGMENT=self.plan.segment,
                **self.state, **self.tuned, **more,
            )  # fmt: skip

    def over_documents(
        self, kernel: Any, sums: Tensor, *args: object, programs: int, **more: object
    ) -> None:
        """Each program takes some of the entries of a head's states, of one or some documents."""
        grid = -(-sums[0, 0].numel() // TILE), self.x.shape[2], programs
        with _device_of(self.x):
            kernel[grid](
                sums, *args, segments=self.segments, TILE=TILE, DEPTH=DEPTH, **self.state, **more
            )  # fmt: skip

    def prefixes(
        self,
        k: Tensor,
        val: Tensor,
        memory: Tensor,
        mass: Tensor,
        mixture: Coefficients,
        lengths: Tensor,
        first: Tensor,
        count: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The states before the segments (G, H, v + 1, K), and the memory and mass after all.

        kept: where to put gammas and masses, see `kernels._sum_segments`.
        """
        sums = self.new_sums()
        self.over_segments(
            kernels._sum_segments, k, val, *mixture, lengths, sums, *(kept or (sums, sums)),
            *_strides(k, val), KEEP=kept is not None, **at_most(self.plan.sum_registers),
        )  # fmt: skip
        memory_after, mass_after = _new_state(memory)
        self.over_documents(
            kernels._prefix, sums, memory, mass, memory_after, mass_after, first, count,
            first, first, len(first), *memory.stride()[:3], *mass.stride()[:2],
            *memory_after.stride()[:3], *mass_after.stride()[:2],
            programs=min(DOCUMENTS, len(first)), FRESH=False, SLOTS=False,
        )  # fmt: skip
        return sums, memory_after, mass_after

    def new_sums(self) -> Tensor:
        H, K, v = self.state.values()
        shape = len(self.x) * self.segments, H, v + 1, K
        return self.x.new_empty(shape, dtype=torch.float32)

    def new_kept(self) -> tuple[Tensor, Tensor]:
        """Room for gammas and masses, see `kernels._sum_segments`."""
        R, C, H, _ = self.x.shape
        K, blocks = self.state["K"], self.plan.segment // self.plan.block
        masses = self.x.new_empty((R * self.segments, H, blocks, K), dtype=torch.float32)
        return self.x.new_empty((R, H, C, K)), masses

    def suffixes(self, sums: Tensor, after: Tensor, first: Tensor, count: Tensor) -> Tensor:
        """Segments' sums become, in place, what is after each; after and the answer: (D, ...)."""
        before = torch.empty_like(after)
        self.over_documents(
            gradients._suffix, sums, after, before, first, count, programs=len(first)
        )
        return before

    def of_queries(
        self,
        q: Tensor,
        k: Tensor | None,
        val: Tensor | None,
        mixture: Coefficients,
        lengths: Tensor,
        document: Tensor | None,
        states: Tensor,
        d_out: Tensor,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `gradients._query_gradients`; causal if no documents are given."""
        d_scores = self.new_scores()
        inverse, pull = q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
        sums = self.new_sums()
        self.over_segments(
            gradients._query_gradients, q, k, val, *mixture, lengths, document, states, d_out,
            d_scores, inverse, pull, sums, *_strides(q, k, val),
            epsilon=epsilon, CAUSAL=document is None,
        )  # fmt: skip
        return d_scores, inverse, pull, sums

    def of_keys(
        self,
        q: Tensor | None,
        k: Tensor,
        val: Tensor,
        mixture: Coefficients,
        lengths: Tensor,
        document: Tensor | None,
        d_states: Tensor,
        d_out: Tensor | None,
        inverse: Tensor | None,
        pull: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See `gradients._key_gradients`; causal if no documents are given."""
        d_scores = self.new_scores()
        d_val = val.new_empty(val.shape)
        self.over_segments(
            gradients._key_gradients, q, k, val, *mixture, lengths, document, d_states, d_out,
            inverse, pull, d_scores, d_val, *_strides(q, k, val), CAUSAL=document is None,
        )  # fmt: skip
        return d_scores, d_val

    def new_scores(self) -> Tensor:
        """Room for gradients of scores: float16 would lose small ones."""
        x = self.x
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        return x.new_empty((*x.shape[:3], self.state["K"]), dtype=dtype)

    def of_scores(
        self, mixture: Coefficients, lengths: Tensor, *scored: tuple[Tensor, Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Pairs of tokens and gradients of their scores -> gradients of the tokens, the mixture."""
        R, C, H, r = self.x.shape
        K = self.state["K"]
        row_blocks = -(-C // self.plan.block)
        # Each program's share of the mixture's gradients, summed in an order that never changes.
        programs = min(R * row_blocks, -(-ENOUGH // H))
        shares = self.x.new_empty((len(scored), programs, H, 2 * r + 1, K), dtype=torch.float32)
        found = []
        for (x, d_scores), own in zip(scored, shares, strict=True):
            d_x = x.new_empty(x.shape)
            with _device_of(x):
                gradients._score_gradients[programs, H](
                    x, d_scores, mixture.linear, mixture.quadratic, lengths, d_x, own,
                    *_strides(x), C=C, blocks=R * row_blocks, row_blocks=row_blocks,
                    H=H, R=r, K=K, **self.tuned,
                )  # fmt: skip
            found.append(d_x)
        total = shares.sum((0, 1))
        linear, quadratic = total[:, :r].mT.contiguous(), total[:, r : 2 * r].mT.contiguous()
        return found, (linear, quadratic, _compact(total[:, 2 * r]))


@torch.library.custom_op("gma::causal", mutates_args=())
def _causal(
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    _check(
        q=q, k=k, val=val, memory=memory, mass=mass, **mixture._asdict(),
        lengths=lengths, first=first, count=count,
    )  # fmt: skip
    q, k, val, memory, mass = _unit_stride(q, k, val, memory, mass)
    K, v = bias.shape[1], val.shape[3]
    call = _Call(q, K, v, normalize, _planned(plan, q, K, v))
    kept = call.new_kept()
    before, memory, mass = call.prefixes(k, val, memory, mass, mixture, lengths, first, count, kept)
    out = val.new_empty(val.shape)
    call.over_segments(
        kernels._read_segments, q, *kept, val, *mixture, lengths, before, out, *_strides(q, val),
        epsilon=epsilon, **at_most(call.plan.read_registers),
    )  # fmt: skip
    return out, memory, mass


@_causal.register_fake
def _(
    q: Tensor, k: Tensor, val: Tensor, memory: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return val.new_empty(val.shape), *_new_state(memory)


@torch.library.custom_op("gma::causal_backward", mutates_args=())
def _causal_backward(
    d_out: Tensor,
    d_memory: Tensor,
    d_mass: Tensor,
    q: Tensor,
    k: Tensor,
    val: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    q, k, val, memory, mass = _unit_stride(q, k, val, memory, mass)
    d_out = d_out.contiguous()
    K, v = memory.shape[2:]
    # Summed again rather than kept from forward until now.
    before, _, _ = _Call(q, K, v, normalize, _planned(plan, q, K, v)).prefixes(
        k, val, memory, mass, mixture, lengths, first, count
    )
    call = _Call(q, K, v, normalize, _gradients_planned(plan, q, K, v))
    q_scores, inverse, pull, sums = call.of_queries(
        q, k, val, mixture, lengths, None, before, d_out, epsilon
    )
    d_before = call.suffixes(sums, _packed(d_memory, d_mass), first, count)
    k_scores, d_val = call.of_keys(q, k, val, mixture, lengths, None, sums, d_out, inverse, pull)
    (d_q, d_k), d_mixture = call.of_scores(mixture, lengths, (q, q_scores), (k, k_scores))
    d_memory, d_mass = _unpacked(d_before)
    return d_q, d_k, d_val, d_memory, d_mass, *d_mixture


@_causal_backward.register_fake
def _(d_out: Tensor, d_memory: Tensor, d_mass: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return _like(*saved[:8])


@torch.library.custom_op("gma::write", mutates_args=())
def _write(
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    _check(
        k=k, val=val, **mixture._asdict(),
        lengths=lengths, document=document, first=first, count=count,
    )  # fmt: skip
    k, val = _unit_stride(k, val)
    D, (H, K), v = len(first), bias.shape, val.shape[3]
    call = _Call(k, K, v, normalize, _planned(plan, k, K, v))
    nothing = k.new_zeros(max(K, v), dtype=torch.float32)
    memory, mass = nothing[:v].expand(D, H, K, v), nothing[:K].expand(D, H, K)
    _, memory, mass = call.prefixes(k, val, memory, mass, mixture, lengths, first, count)
    return memory, mass


@_write.register_fake
def _(
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    shape = first.shape[0], *bias.shape
    return bias.new_empty((*shape, val.shape[3])), bias.new_empty(shape)


@torch.library.custom_op("gma::write_backward", mutates_args=())
def _write_backward(
    d_memory: Tensor,
    d_mass: Tensor,
    k: Tensor,
    val: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    normalize: bool,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    k, val = _unit_stride(k, val)
    K, v = d_memory.shape[2:]
    call = _Call(k, K, v, normalize, _gradients_planned(plan, k, K, v))
    k_scores, d_val = call.of_keys(
        None, k, val, mixture, lengths, document, _packed(d_memory, d_mass), None, None, None
    )
    (d_k,), d_mixture = call.of_scores(mixture, lengths, (k, k_scores))
    return d_k, d_val, *d_mixture


@_write_backward.register_fake
def _(d_memory: Tensor, d_mass: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return _like(*saved[:5])


@torch.library.custom_op("gma::read", mutates_args=())
def _read(
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> Tensor:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    _check(
        q=q, memory=memory, mass=mass, **mixture._asdict(),
        lengths=lengths, document=document, first=first, count=count,
    )  # fmt: skip
    (q,) = _unit_stride(q)
    K, v = memory.shape[2:]
    call = _Call(q, K, v, normalize, _planned(plan, q, K, v))
    out = q.new_empty((*q.shape[:3], v))
    call.over_segments(
        kernels._read_states, q, *mixture, lengths, document, _packed(memory, mass), out,
        *_strides(q), epsilon=epsilon,
    )  # fmt: skip
    return out


@_read.register_fake
def _(q: Tensor, memory: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:3], memory.shape[3]))


@torch.library.custom_op("gma::read_backward", mutates_args=())
def _read_backward(
    d_out: Tensor,
    q: Tensor,
    memory: Tensor,
    mass: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    bias: Tensor,
    lengths: Tensor,
    document: Tensor,
    first: Tensor,
    count: Tensor,
    normalize: bool,
    epsilon: float,
    plan: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mixture = Coefficients(linear.contiguous(), quadratic.contiguous(), bias.contiguous())
    (q,) = _unit_stride(q)
    K, v = memory.shape[2:]
    call = _Call(q, K, v, normalize, _gradients_planned(plan, q, K, v))
    states = _packed(memory, mass)
    q_scores, _, _, sums = call.of_queries(
        q, None, None, mixture, lengths, document, states, d_out.contiguous(), epsilon
    )
    d_states = call.suffixes(sums, torch.zeros_like(states), first, count)
    (d_q,), d_mixture = call.of_scores(mixture, lengths, (q, q_scores))
    d_memory, d_mass = _unpacked(d_states)
    return d_q, d_memory, d_mass, *d_mixture


@_read_backward.register_fake
def _(d_out: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    return _like(*saved[:6])


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.settings = inputs[11:]


def _save_write(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[9:]


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.settings = inputs[10:]


def _backward_of(operator: Any, inputs: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The operator gives the first inputs' gradients; the others have none."""

    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        found = operator(*d_outputs, *ctx.saved_tensors, *ctx.settings)
        return (*found, *[None] * (inputs - len(found)))

    return backward


def _refuse(ctx: object, *_: object) -> None:
    raise RuntimeError("the operation in Triton can be differentiated once, not twice")


_causal.register_autograd(_backward_of(_causal_backward, 14), setup_context=_save_causal)
_write.register_autograd(_backward_of(_write_backward, 11), setup_context=_save_write)
_read.register_autograd(_backward_of(_read_backward, 13), setup_context=_save_read)
_causal_backward.register_autograd(_refuse)
_write_backward.register_autograd(_refuse)
_read_backward.register_autograd(_refuse)


SHAPES = {
    "q": "RCHr",
    "k": "RCHr",
    "val": "RCHv",
    "memory": "DHKv",
    "mass": "DHK",
    "linear": "HKr",
    "quadratic": "HKr",
    "bias": "HK",
    "lengths": "R",
    "document": "R",
    "first": "D",
    "count": "D",
}
"""Letters as in the head of this file."""


def _check(**tensors: Tensor) -> None:
    """Raises ValueError for what the kernels can't take."""
    sizes: dict[str, int] = {}
    for name, x in tensors.items():
        expected = [sizes.setdefault(*pair) for pair in zip(SHAPES[name], x.shape, strict=False)]
        if x.ndim != len(SHAPES[name]) or list(x.shape) != expected:
            raise ValueError(f"{name} is {tuple(x.shape)}, not {SHAPES[name]} with {sizes}")
    if not {sizes[name] for name in "rKv" if name in sizes} <= SIZES:
        raise ValueError(f"r, K and v must be of {sorted(SIZES)}, not {sizes}")
    tokens = [tensors[name] for name in ("q", "k", "val") if name in tensors]
    device, dtype = tokens[0].device, tokens[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in tokens):
        raise ValueError(f"q, k and val must be of one dtype of {DTYPES}")
    if dtype == torch.float32 and sizes["r"] * sizes["K"] > MIXTURE:
        raise ValueError(f"in float32 r * K must be at most {MIXTURE}, not {sizes}")
    state_and_mixture = {"memory", "mass", *Coefficients._fields} & tensors.keys()
    if any(tensors[name].dtype != torch.float32 for name in state_and_mixture):
        raise ValueError("memory, mass and mixture must be float32")
    if not all(x.is_contiguous() for x in tensors.values() if x.ndim == 1):
        raise ValueError("lengths, document, first and count must be contiguous")
    if any(x.device != device for x in tensors.values()):
        raise ValueError("all tensors must be on one device")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"Triton's kernels need a CUDA device, not {device.type}: use model.ops.chunked, "
            "or set TRITON_INTERPRET=1 before triton is imported"
        )


def _planned(plan: Sequence[int] | None, x: Tensor, *sizes: int) -> Plan:
    """The plan that was asked for, or that of x (R, C, H, r) and the other `sizes` of a head."""
    if plan:
        return Plan(*plan)
    R, C, H, r = x.shape
    planned = Plan.of(R, C, H, r, *sizes)
    return (
        planned
        if x.itemsize == 2
        else planned._replace(stages=1, sum_registers=0, read_registers=0)
    )


def _gradients_planned(plan: Sequence[int] | None, x: Tensor, *sizes: int) -> Plan:
    """The forward's segments; smaller blocks, for a program has more to hold."""
    if plan:
        return Plan(*plan)
    block = (64 if x.dtype == torch.bfloat16 else 32) * 64 // max(x.shape[3], *sizes)
    return _planned(plan, x, *sizes)._replace(
        block=min(block, 64), stages=1, sum_registers=0, read_registers=0
    )


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _unit_stride(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Strided as they are, but for the last dimension, which kernels take to be contiguous."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of row, token and head, of each."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _packed(memory: Tensor, mass: Tensor) -> Tensor:
    """(D, H, K, v) and (D, H, K) -> (D, H, v + 1, K), as kernels hold states."""
    return torch.cat([memory, mass[..., None]], -1).mT.contiguous()


def _unpacked(states: Tensor) -> tuple[Tensor, Tensor]:
    return states[:, :, :-1].mT.contiguous(), _compact(states[:, :, -1])


def _compact(x: Tensor) -> Tensor:
    """Never a view: operators may not return one."""
    return x.clone(memory_format=torch.contiguous_format)


def _new_state(memory: Tensor) -> tuple[Tensor, Tensor]:
    return memory.new_empty(memory.shape), memory.new_empty(memory.shape[:3])


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)
