"""The rivals, each with the projections, convolutions, norms and gates of its published layer.

Shapes: B documents of N tokens, W width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.comparison.libraries import LIBRARIES
from benchmarks.comparison.parts import TAPS, Norm, Rates, Taps
from benchmarks.comparison.recurrences import PLAIN, Recurrences
from benchmarks.comparison.sizes import HEAD, Size
from gma.model.ops.chunked import Rows

FLOAT = 4
"""Bytes of each number of a state."""


class Mixer(nn.Module):
    """Takes what a layer has of its tokens, (B, N, W), to an update of the same shape."""

    causal = True

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.recurrences: Recurrences = PLAIN
        self.norm = nn.RMSNorm(size.width, eps=1e-6)

    def choose(self, fast: bool) -> None:
        """Use the libraries' kernels, which need a GPU, or the plain definitions."""
        self.recurrences = LIBRARIES if fast else PLAIN

    def state_bytes(self, tokens: int) -> int:
        """What a layer has to keep of a document of so many tokens to read on."""
        raise NotImplementedError

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x (B, N, W), each row a document of rows.lengths (B,) tokens -> update (B, N, W)."""
        raise NotImplementedError

    def heads_of(self, x: Tensor, width: int = HEAD) -> Tensor:
        """(B, N, H * width) -> (B, N, H, width)."""
        return x.unflatten(-1, (-1, width))


class Nothing(Mixer):
    """Leaves tokens alone but for the backbone's own short convolution."""

    def state_bytes(self, tokens: int) -> int:
        return 0

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        return torch.zeros_like(x)


class Softmax(Mixer):
    """Softmax attention with rotary positions (arXiv:2104.09864), by PyTorch's own kernels."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.project = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return 2 * self.size.width * tokens * 2  # keys and values in bfloat16

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        q, k, val = (self.heads_of(part) for part in self.project(self.norm(x)).chunk(3, -1))
        q, k = rotated(q).to(val.dtype), rotated(k).to(val.dtype)
        mask = None if self.causal else rows.valid[:, None, None]
        read = functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, val)),
            attn_mask=mask,
            is_causal=self.causal,
        )
        update: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return update


class SoftmaxBothWays(Softmax):
    causal = False


def rotated(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn pairs of directions of x (B, N, H, d) by angles that grow with the token's place."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class LinearAttention(Mixer):
    """Linear attention with features elu + 1, divided by its mass (arXiv:2006.16236)."""

    features = HEAD

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.project = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return self.size.heads * self.features * (HEAD + 1) * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        q, k, val = (self.heads_of(part) for part in self.project(self.norm(x)).chunk(3, -1))
        # The mass is the reading of ones; 16 of them, since kernels take no less.
        both = functional.pad(val, (0, 16), value=1.0)
        read = self.recurrences.linear(self.of_queries(q), self.of_keys(k), both)
        out = read[..., :HEAD] / (read[..., HEAD:][..., :1] + 1e-6)
        update: Tensor = self.out(out.to(val.dtype).flatten(2))
        return update

    def of_queries(self, q: Tensor) -> Tensor:
        return functional.elu(q) + 1

    def of_keys(self, k: Tensor) -> Tensor:
        return functional.elu(k) + 1


class Performer(LinearAttention):
    """Linear attention with FAVOR+'s positive orthogonal random features (arXiv:2009.14794).

    The features are drawn once. Keys' are not divided by their greatest, which only later tokens
    may have: a feature is at most exp(|w|^2 / 2), which float32 holds.
    """

    features = 256

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.directions: Tensor
        blocks = [torch.linalg.qr(torch.randn(HEAD, HEAD))[0] for _ in range(self.features // HEAD)]
        lengths = torch.randn(self.features, HEAD).norm(dim=1, keepdim=True)
        self.register_buffer("directions", torch.cat(blocks) * lengths)

    def of_queries(self, q: Tensor) -> Tensor:
        exponents = self.exponents(q)
        return self.positive(exponents - exponents.detach().amax(-1, keepdim=True)).to(q.dtype)

    def of_keys(self, k: Tensor) -> Tensor:
        return self.positive(self.exponents(k)).to(k.dtype)

    def exponents(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.directions.dtype) * HEAD**-0.25
            return x @ self.directions.mT - x.square().sum(-1, keepdim=True) / 2

    def positive(self, exponents: Tensor) -> Tensor:
        return (exponents.exp() + 1e-4) * self.features**-0.5


class Mamba2(Mixer):
    """Mamba-2's layer (arXiv:2405.21060): twice as wide inside, heads of 64, state 128; x, keys and
    queries are convolved, its output skipped to, gated and normalised."""

    state = 128

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.inner = 2 * size.width
        heads = self.inner // HEAD
        self.parts = [self.inner, self.inner + 2 * self.state, heads]
        self.project = nn.Linear(size.width, sum(self.parts), bias=False)
        self.convolution = Taps(self.parts[1])
        self.rates = Rates(heads)
        self.skip = nn.Parameter(torch.ones(heads))
        self.out_norm = Norm(self.inner, eps=1e-5)
        self.out = nn.Linear(self.inner, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return (self.inner * self.state + (TAPS - 1) * self.parts[1]) * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        gate, convolved, raw = self.project(self.norm(x)).split(self.parts, -1)
        convolved = functional.silu(self.convolution(convolved))
        val, key, query = convolved.split([self.inner, self.state, self.state], -1)
        val, step, rate = self.heads_of(val), *self.rates(raw)
        read = self.recurrences.scan(val, step, rate, key[:, :, None], query[:, :, None])
        read = (read + self.skip[:, None] * val).to(val.dtype).flatten(2)
        update: Tensor = self.out(self.out_norm(read * functional.silu(gate)))
        return update


class GatedDeltaNet(Mixer):
    """Gated DeltaNet's layer (arXiv:2412.06464): queries, keys and values are convolved, keys and
    queries of length 1, its output normalised by head and gated. Keys of 64, values of 128, as many
    heads as make keys 3/4 as wide as the model."""

    key, value = HEAD, 2 * HEAD

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.heads = max(1, size.width * 3 // 4 // self.key)
        keys, values = self.heads * self.key, self.heads * self.value
        self.widths = [keys, keys, values]
        self.parts = [sum(self.widths), values, self.heads, self.heads]
        self.project = nn.Linear(size.width, sum(self.parts), bias=False)
        self.convolution = Taps(self.parts[0])
        self.rates = Rates(self.heads)
        self.out_norm = Norm(self.value, eps=1e-5)
        self.out = nn.Linear(values, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return (self.heads * self.key * self.value + (TAPS - 1) * self.parts[0]) * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        convolved, gate, raw, share = self.project(self.norm(x)).split(self.parts, -1)
        convolved = functional.silu(self.convolution(convolved))
        q, k, val = convolved.split(self.widths, -1)
        q, k = (functional.normalize(self.heads_of(part), dim=-1).to(q.dtype) for part in (q, k))
        step, rate = self.rates(raw)
        val = self.heads_of(val, self.value)
        read = self.recurrences.delta(q, k, val, step * rate, share.sigmoid())
        read = self.out_norm(read.to(val.dtype)).flatten(2)
        update: Tensor = self.out(read * functional.silu(gate))
        return update


class GatedLinear(Mixer):
    """GLA's layer (arXiv:2312.06635): keys half as wide as the model, decays by a projection of
    rank 16, its output normalised by head and gated; no convolution of its own."""

    key, rank, calm = HEAD // 2, 16, 16

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        keys, values = size.heads * self.key, size.width
        self.parts = [keys, keys, values, values, self.rank]
        self.project = nn.Linear(size.width, sum(self.parts), bias=False)
        self.decay = nn.Linear(self.rank, keys)
        self.out_norm = Norm(HEAD, eps=1e-5)
        self.out = nn.Linear(values, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return self.size.heads * self.key * HEAD * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        q, k, val, gate, low = self.project(self.norm(x)).split(self.parts, -1)
        raw = self.decay(low).to(self.decay.weight.dtype)
        decay = self.heads_of(functional.logsigmoid(raw) / self.calm, self.key)
        q, k = self.heads_of(q, self.key) * self.key**-0.5, self.heads_of(k, self.key)
        read = self.recurrences.gated(q, k, self.heads_of(val), decay)
        read = self.out_norm(read.to(val.dtype)).flatten(2)
        update: Tensor = self.out(read * functional.silu(gate))
        return update


class GatedSlots(Mixer):
    """GSA's layer (arXiv:2409.07146): as many slots as keys have directions, SiLU before and after,
    and its output normalised; no convolution and no gate of its own."""

    calm = 8

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.project = nn.Linear(size.width, 4 * size.width, bias=False)
        self.out_norm = Norm(size.width, eps=1e-5)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def state_bytes(self, tokens: int) -> int:
        return self.size.heads * 2 * HEAD * HEAD * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        q, k, val, raw = (self.heads_of(part) for part in self.project(self.norm(x)).chunk(4, -1))
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        decay = functional.logsigmoid(wide) / self.calm
        q, k, val = functional.silu(q), functional.silu(k), functional.silu(val)
        read = self.recurrences.slots(q, k, val, -decay.expm1(), decay)
        update: Tensor = self.out(self.out_norm(functional.silu(read.to(val.dtype)).flatten(2)))
        return update
