"""Gaussian Mixture Attention as the product has it, behind the rivals' interface."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import ablation
from benchmarks.comparison.mixers import (
    FLOAT,
    GatedDeltaNet,
    GatedLinear,
    GatedSlots,
    LinearAttention,
    Mamba2,
    Mixer,
    Nothing,
    Performer,
    Softmax,
    SoftmaxBothWays,
)
from benchmarks.comparison.sizes import HEAD, Size
from gma.model import mixers
from gma.model.ops.choice import CHUNKED, choose
from gma.model.ops.chunked import Rows

FAST = 8.0, 1.0
SLOW = 8.0, 10.0
NARROW = 2.0, 10.0
"""A component's variance at first, and how many times as slowly as all else a mixture learns."""


class Mixture(mixers.Mixture):
    """A mixture that begins otherwise, and learns more slowly: its parameters are stored so many
    times as large, and AdamW's steps do not grow with them."""

    def __init__(self, made: mixers.Mixture, variance: float, slower: float) -> None:
        nn.Module.__init__(self)
        self.floor, self.slower = made.floor, slower
        self.mu, self.omega, self.alpha = made.mu, made.omega, made.alpha
        with torch.no_grad():
            self.omega.fill_(variance + math.log(-math.expm1(-variance)))
            for parameter in self.parameters():
                parameter.mul_(slower)

    def distribution(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(self.mu.dtype, torch.float32)
        mu, omega, alpha = (x.to(dtype) / self.slower for x in (self.mu, self.omega, self.alpha))
        return mu, functional.softplus(omega) + self.floor, torch.log_softmax(alpha, dim=-1)


class Gaussian(Mixer):
    """GMA in the paper's form (arXiv:2606.18283)."""

    form: ClassVar = "paper"
    components = 0
    """Of a head; 0: as many as the size says."""
    wider = 1
    """How many times as many heads as the size says."""
    mixture: ClassVar = FAST
    mixer: ClassVar[type[mixers.Mixer]] = mixers.Mixer

    def __init__(self, size: Size) -> None:
        if self.components:
            size = size._replace(components=self.components)
        super().__init__(size)
        del self.norm  # it has its own
        config = size.config(form=self.form, causal=self.causal)
        self.config = config.model_copy(update={"heads": self.wider * size.heads})
        self.inner = self.mixer(self.config)
        self.inner.mixture = Mixture(self.inner.mixture, *self.mixture)

    def choose(self, fast: bool) -> None:
        """Use Triton's kernels, or PyTorch."""
        self.inner.operation = choose(self.config, self.inner.out.weight) if fast else CHUNKED

    def state_bytes(self, tokens: int) -> int:
        return self.config.heads * self.config.num_components * (HEAD + 1) * FLOAT

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if not self.causal:
            return self.inner.read(x, *self.inner.write(x, rows), rows)
        wide = torch.promote_types(self.inner.out.weight.dtype, torch.float32)
        shape = len(x), self.config.heads, self.config.num_components, HEAD
        memory = torch.zeros(shape, device=x.device, dtype=wide)
        update, _, _ = self.inner.causal(x, memory, memory[..., 0].contiguous(), rows)
        return update


class Forgetting(Gaussian):
    """GMA that forgets (docs/adr/0011-forgetting.md)."""

    form: ClassVar = "forgetting"
    mixer = mixers.ForgettingMixer


class ManyComponents(Forgetting):
    components = 128


class Wide(Forgetting):
    """As wide inside as Mamba-2."""

    wider = 2


class SlowForgetting(Forgetting):
    """As the product is trained (docs/adr/0015-slow-mixtures.md)."""

    mixture = SLOW


class SlowGaussian(Gaussian):
    mixture = SLOW


class SlowJoined(SlowForgetting):
    mixer = ablation.Joined


class NarrowForgetting(Forgetting):
    mixture = NARROW


class NarrowGaussian(Gaussian):
    mixture = NARROW


class NarrowWide(Wide):
    mixture = NARROW


class GaussianBothWays(Gaussian):
    causal = False


class ForgettingBothWays(Forgetting):
    """The paper's form with an output gate: what is read only once it is finished forgets
    nothing."""

    causal = False


MIXERS: dict[str, type[Mixer]] = {
    "GMA (forgetting)": Forgetting,
    "softmax": Softmax,
    "Mamba-2": Mamba2,
    "Gated DeltaNet": GatedDeltaNet,
    "GMA (paper)": Gaussian,
    "none": Nothing,
    "linear attention": LinearAttention,
    "GLA": GatedLinear,
    "GSA": GatedSlots,
    "Performer": Performer,
    "GMA (forgetting), twice as wide inside": Wide,
    "GMA (forgetting), 128 components": ManyComponents,
    "GMA (forgetting), slow mixture": SlowForgetting,
    "GMA (forgetting), slow narrow mixture": NarrowForgetting,
    "GMA (forgetting), slow mixture, own value and SiLU": SlowJoined,
    "GMA (paper), slow mixture": SlowGaussian,
    "GMA (paper), slow narrow mixture": NarrowGaussian,
    "GMA (forgetting), slow narrow mixture, twice as wide inside": NarrowWide,
    "GMA (paper), both ways": GaussianBothWays,
    "GMA (forgetting), both ways": ForgettingBothWays,
    "softmax, both ways": SoftmaxBothWays,
}
"""The most telling first. Those both ways read documents whole, so no next token is asked of
them."""
