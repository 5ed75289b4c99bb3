"""The mixers that are compared: how each is called, on what, and what it must give.

All inputs are bfloat16 but those that a mixer wants in float32, random, of one document. Shapes: N
tokens, H heads, r routing_dim, K components, v value_dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import definitions
from benchmarks.mixtures import (
    EPSILON,
    Ours,
    Problem,
    Size,
    by_rows,
    chunks,
    compiled,
    cumulative,
    forgetting_rows,
    fused,
    gammas_of,
    random,
)


class Contender(NamedTuple):
    name: str
    build: Callable[[int, Size, torch.device], Problem]
    module: str = ""  # what must be there, if it is not PyTorch alone
    distribution: str = ""
    gpu: bool = True  # needs one
    tolerance: float = 2e-2  # relative error of each tensor, by norms
    causal: bool = True
    power: int = 1  # of N, by which the time grows
    longest: int = 1 << 62
    note: str = ""

    def missing(self, device: torch.device) -> str:
        """Why it can't run here; empty if it can."""
        interpreted = self.module == OPERATORS and os.getenv("TRITON_INTERPRET") == "1"
        if self.gpu and device.type != "cuda" and not interpreted:
            return "skipped: needs a GPU"
        if self.module:
            try:
                import_module(self.module)
            except ImportError as error:
                return f"not installed ({error}): pip install {self.distribution or 'triton'}"
            except Exception as error:
                return f"does not import: {error}"
        return ""

    def source(self) -> str:
        """What was compared, for the table of checks."""
        if not self.distribution:
            return self.note
        try:
            return f"{self.distribution} {version(self.distribution)}: {self.note}"
        except PackageNotFoundError:
            return f"{self.distribution}: {self.note}"


def fla_linear(*, compute: bool) -> Callable[[int, Size, torch.device], Problem]:
    """fla's linear attention on our responsibilities, which are given, or computed with it.

    Nothing is divided by the mass.
    """

    def build(tokens: int, size: Size, device: torch.device) -> Problem:
        chunk_linear_attn = import_module("fla.ops.linear_attn").chunk_linear_attn
        given = Ours.of(tokens, size, device)
        mixture = given.mixture
        val = given.val.contiguous()

        def rounded(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.to(q.dtype).contiguous() for x in gammas_of(q, k, mixture))

        gammas = compiled(rounded, device)
        inputs = given.q, given.k, val
        if not compute:
            inputs = *gammas(given.q, given.k), val

        def run(q: Tensor, k: Tensor, val: Tensor) -> tuple[Tensor, ...]:
            if compute:
                q, k = gammas(q, k)
            out, memory = chunk_linear_attn(
                q, k, val, scale=1.0, normalize=False, output_final_state=True
            )
            return out, memory[0]

        def expected() -> tuple[Tensor, ...]:
            gamma_q, gamma_k = given.gammas() if compute else (x[0].double() for x in inputs[:2])
            _, memory, _ = definitions.mixture_attention(gamma_q, gamma_k, val[0], EPSILON)
            return definitions.linear_attention(gamma_q, gamma_k, val[0]), memory

        return Problem(run, inputs, expected)

    return build


def sdpa(backend: SDPBackend, *, causal: bool) -> Callable[[int, Size, torch.device], Problem]:
    """Softmax attention as PyTorch's own function computes it by one backend."""

    def build(tokens: int, size: Size, device: torch.device) -> Problem:
        inputs = tuple(random(1, tokens, size.heads, size.value, device=device) for _ in range(3))

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                q, k, val = (x.transpose(1, 2) for x in inputs)
                out = functional.scaled_dot_product_attention(q, k, val, is_causal=causal)
            return (out.transpose(1, 2),)

        def expected() -> tuple[Tensor, ...]:
            return (definitions.softmax_attention(*(x[0] for x in inputs), causal=causal),)

        return Problem(run, inputs, expected)

    return build


def gla(tokens: int, size: Size, device: torch.device) -> Problem:
    """Gated linear attention of fla, with a decay for each of a key's directions."""
    chunk_gla = import_module("fla.ops.gla").chunk_gla
    q, k = (random(1, tokens, size.heads, size.routing, device=device) for _ in range(2))
    val = random(1, tokens, size.heads, size.value, device=device)
    gate = functional.logsigmoid(torch.randn_like(q)) / 16  # as its layer does

    def run(q: Tensor, k: Tensor, val: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        out, _ = chunk_gla(q, k, val, gate, output_final_state=True)
        return (out,)

    def expected() -> tuple[Tensor, ...]:
        scaled = q[0].double() * size.routing**-0.5
        return (definitions.linear_attention(scaled, k[0], val[0], gate[0]),)

    return Problem(run, (q, k, val, gate), expected)


def gated_slots(tokens: int, size: Size, device: torch.device) -> Problem:
    """Gated slot attention of fla, with as many slots as ours has components."""
    chunk_gsa = import_module("fla.ops.gsa").chunk_gsa
    q, k = (random(1, tokens, size.heads, size.routing, device=device) for _ in range(2))
    val = random(1, tokens, size.heads, size.value, device=device)
    gate = random(1, tokens, size.heads, size.components, device=device).float()
    decay = functional.logsigmoid(gate) / 8  # as its layer does
    strength = (1 - decay.exp()).to(q.dtype)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, _ = chunk_gsa(*inputs, output_final_state=True)
        return (out,)

    def expected() -> tuple[Tensor, ...]:
        return (definitions.gated_slots(q[0], k[0], val[0], strength[0], decay[0]),)

    return Problem(run, (q, k, val, strength, decay), expected)


def gated_delta(tokens: int, size: Size, device: torch.device) -> Problem:
    """Gated DeltaNet of fla."""
    rule = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    q, k = (
        functional.normalize(random(1, tokens, size.heads, size.routing, device=device), dim=-1)
        for _ in range(2)
    )
    val = random(1, tokens, size.heads, size.value, device=device)
    decay = functional.logsigmoid(random(1, tokens, size.heads, device=device).float() + 3)
    beta = torch.sigmoid(random(1, tokens, size.heads, device=device))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, _ = rule(*inputs, scale=1.0, output_final_state=True)
        return (out,)

    def expected() -> tuple[Tensor, ...]:
        return (definitions.gated_delta(q[0], k[0], val[0], decay[0], beta[0]),)

    return Problem(run, (q, k, val, decay, beta), expected)


MAMBA_STATE = 128


def _steps(tokens: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba's dt (1, N, heads) before its bias and softplus, that bias, and A (heads,)."""
    least = torch.empty(heads, device=device).uniform_(-6.9, -2.3).exp()  # 0.001 to 0.1
    rate = -torch.empty(heads, device=device).uniform_(1, 16)
    return random(1, tokens, heads, device=device), least.expm1().log(), rate


def mamba2(tokens: int, size: Size, device: torch.device) -> Problem:
    """Mamba-2's scan, with one key and one query for all heads."""
    scan = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    heads = 2 * size.heads
    x = random(1, tokens, heads, 64, device=device)
    key, query = (random(1, tokens, 1, MAMBA_STATE, device=device) for _ in range(2))
    dt, bias, rate = _steps(tokens, heads, device)

    def run(x: Tensor, dt: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        out, _ = scan(
            x, dt, rate, key, query, chunk_size=256,
            dt_bias=bias, dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        return (out,)

    def expected() -> tuple[Tensor, ...]:
        step = functional.softplus(dt[0].double() + bias)
        keys = key[0].double() * step[..., None]
        queries = query[0].expand(-1, heads, -1)
        return (definitions.linear_attention(queries, keys, x[0], step * rate),)

    return Problem(run, (x, dt, key, query), expected)


def mamba3(tokens: int, size: Size, device: torch.device) -> Problem:
    """Mamba-3's scan: as Mamba-2's, with rotated keys and the trapezoidal rule."""
    module = import_module("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined")
    heads, ones = 2 * size.heads, torch.ones(2 * size.heads, MAMBA_STATE, device=device)
    x = random(1, tokens, heads, 64, device=device)
    # As its layer has them, queries and keys are RMS-normalised, and then get a bias of ones.
    key, query = (random(1, tokens, 1, MAMBA_STATE, device=device) for _ in range(2))
    raw, bias, rate = _steps(tokens, heads, device)
    angle = random(1, tokens, 1, MAMBA_STATE // 4, device=device)
    # These lie head by head.
    step = functional.softplus(raw.float() + bias).mT.contiguous().mT
    decay = step * rate
    trapezoid = random(1, heads, tokens, device=device).mT

    def run(
        x: Tensor, key: Tensor, query: Tensor, angle: Tensor, decay: Tensor, step: Tensor,
        trapezoid: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, *_ = module.mamba3_siso_combined(
            query, key, x, decay.mT, step.mT, trapezoid.mT, ones, ones,
            angle.expand(-1, -1, heads, -1), chunk_size=64, return_final_states=True,
        )  # fmt: skip
        return (out,)

    def expected() -> tuple[Tensor, ...]:
        dt, mix, kept = (y[0].double() for y in (step, trapezoid.sigmoid(), decay))
        angles = (angle[0].double().tanh() * torch.pi * dt[..., None]).cumsum(0)
        q, k = (definitions.rotated(y[0] + ones, angles) for y in (query, key))
        now = dt * mix  # trapezoidal rule: a part of a write waits for the next token
        later = now + functional.pad((dt * (1 - mix))[1:], (0, 0, 0, 1))
        out = definitions.linear_attention(q, k * later[..., None], x[0], kept)
        return (out - ((later - now) * (q * k).sum(-1))[..., None] * x[0],)

    return Problem(run, (x, key, query, angle, decay, step, trapezoid), expected)


FLA, MAMBA = "fla.ops", "mamba_ssm.ops.triton."
OPERATORS = "gma.model.ops.triton.operators"
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION

OURS, SOFTMAX, SSD = "GMA, ours", "FlashAttention, causal", "Mamba-2 SSD"

CONTENDERS = (
    Contender(OURS, by_rows(fused), OPERATORS, tolerance=1e-2,
              note="`gma.model.ops.triton`"),
    Contender("GMA that forgets, ours", forgetting_rows, OPERATORS, tolerance=1e-2,
              note="`gma.model.ops.triton`, with decays, given in float32"),
    Contender("GMA, PyTorch in chunks", by_rows(chunks), gpu=False, tolerance=1e-2,
              note="`gma.model.ops.chunked`, torch.compile"),
    Contender("GMA, cumulative sum", cumulative, gpu=False, tolerance=1e-2, longest=1 << 18,
              note="the published form, eager: torch.compile fails to split its scan"),
    Contender(SOFTMAX, sdpa(FLASH, causal=True), power=2,
              note="PyTorch's SDPA, flash backend; heads of 64"),
    Contender("cuDNN attention, causal", sdpa(CUDNN, causal=True), power=2,
              note="PyTorch's SDPA, cuDNN backend; heads of 64"),
    Contender("FlashAttention, not causal", sdpa(FLASH, causal=False), power=2, causal=False,
              note="PyTorch's SDPA, flash backend; heads of 64"),
    Contender("fla linear attention", fla_linear(compute=False), FLA, "fla-core", tolerance=1e-2,
              note="`chunk_linear_attn` on our responsibilities, given in bfloat16; no division"),
    Contender("fla linear attention + responsibilities", fla_linear(compute=True), FLA, "fla-core",
              tolerance=1e-2, note="the same, computing them by torch.compile; no division"),
    Contender("fla GLA", gla, FLA, "fla-core", note="`chunk_gla`, keys of 32, values of 64"),
    Contender("fla GSA", gated_slots, FLA, "fla-core",
              note="`chunk_gsa`, keys of 32, 32 slots, values of 64"),
    Contender("fla Gated DeltaNet", gated_delta, FLA, "fla-core",
              note="`chunk_gated_delta_rule`, keys of 32, values of 64"),
    Contender(SSD, mamba2, MAMBA + "ssd_combined", "mamba-ssm",
              note="twice the heads, of 64, state 128: a layer of the same width expands by 2"),
    Contender("Mamba-3 SISO", mamba3, MAMBA + "mamba3.mamba3_siso_combined", "mamba-ssm",
              note="as Mamba-2; its kernel walks a head's sequence in one program"),
)  # fmt: skip
