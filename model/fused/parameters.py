"""A classifier's weights as the fused step takes them: norms folded in, narrow, and prepared once.

Shapes: V vocabulary, W width, H heads, v value_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gma.model.classifier import Classifier
from gma.model.fused.obstacles import LARGEST, TAPS, FusedPrecision
from gma.model.layers import Layer
from gma.model.mixers import ForgettingMixer
from gma.model.ops.chunked import Coefficients

FLOAT8 = torch.float8_e4m3fn

ACTIVATIONS: dict[FusedPrecision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""What activations are kept in where no product takes them narrower."""


class Matrix(NamedTuple):
    """What a product multiplies by, (O, I), and the factor that undoes its scaling."""

    weight: Tensor
    alpha: float

    @classmethod
    def of(cls, weight: Tensor, precision: FusedPrecision) -> Matrix:
        """Prepare a weight (O, I) float32."""
        if precision != "fp8":
            return cls(weight.to(ACTIVATIONS[precision]).contiguous(), 1.0)
        scale = LARGEST["fp8"] / float(weight.abs().max().clamp_min(1e-12))
        return cls((weight * scale).to(FLOAT8).contiguous(), 1.0 / scale)


class Keep(NamedTuple):
    """What the rates are projected with at which heads forget, a power of two of them."""

    weight: Tensor  # (16 or more, W), as activations
    bias: Tensor  # (16 or more,) float32

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, heads: int, dtype: torch.dtype) -> Keep:
        """Prepare those of the last heads (H - lasting, W), (H - lasting,)."""
        most = max(16, 1 << (heads - 1).bit_length())
        first = heads - len(bias)
        filled = 0, 0, first, most - heads
        return cls(
            weight=functional.pad(weight, filled).to(dtype).contiguous(),
            bias=functional.pad(bias.float(), filled[2:]),
        )


class LayerParameters(NamedTuple):
    """The weights of one layer."""

    project: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    mixture: Coefficients
    keep: Keep | None  # None if nothing is forgotten
    read_scale: float  # what the mixer reads is multiplied by, to be as products take it
    taps: Tensor  # (4, W) as activations, times conv_norm
    tail_taps: Tensor  # (4, W) float32, zeros before the convolution's
    conv_norm: Tensor  # (W,) float32

    @classmethod
    def of(cls, layer: Layer, precision: FusedPrecision) -> LayerParameters:
        """Prepare the weights of a layer, where they are."""
        mixer, mlp, activations = layer.mixer, layer.mlp, ACTIVATIONS[precision]
        project = mixer.project.weight.float() * mixer.norm.weight.float()
        keep = None
        if isinstance(mixer, ForgettingMixer):
            forgetting = len(mixer.keep_bias)
            project, rates = torch.split(project, [len(project) - forgetting, forgetting])
            keep = Keep.of(rates, mixer.keep_bias, mixer.config.heads, activations)
        out, scale = Matrix.of(mixer.out.weight.float(), precision), 1.0
        if precision == "fp8":
            # A normalised row is no longer than the root of its width, so no value is larger than
            # this but for rounding, no mean of values, and no gated one.
            values = project[mixer.values].norm(dim=1) * mixer.config.width**0.5
            scale = LARGEST["fp8"] / float(values.max().clamp_min(1e-12))
        up = mlp.up.weight.float() * mlp.norm.weight.float()
        width, device = mixer.config.width, mixer.out.weight.device
        norm, taps = torch.ones(width), torch.zeros(TAPS, width)
        if layer.convolution:
            norm = layer.convolution.norm.weight.float()
            taps[TAPS - mixer.config.conv_kernel :] = layer.convolution.weight
        norm, taps = norm.to(device), taps.to(device)
        return cls(
            project=Matrix.of(project, precision),
            out=out._replace(alpha=out.alpha / scale),
            read_scale=scale,
            up=Matrix.of(up, precision),
            down=Matrix.of(mlp.down.weight.float(), precision),
            keep=keep,
            mixture=Coefficients(*(x.contiguous() for x in mixer.mixture.coefficients())),
            # As narrow as the rows: a warp then holds both alike.
            taps=(taps * norm).to(activations),
            tail_taps=taps,
            conv_norm=norm,
        )


class Parameters(NamedTuple):
    """All weights of a classifier."""

    table: Tensor  # (V, W) as activations
    layers: list[LayerParameters]
    deep: Tensor  # (labels + 1 and more, W) as activations: zeros fill up 16 bytes of an output
    deep_bias: Tensor  # (labels + 1,) float32, or (labels,) if the pooling is "any"
    own_scores: Tensor  # (V, labels) float32
    factor: Tensor | None  # (labels,) float32, if the pooling is "any"

    @classmethod
    def of(cls, classifier: Classifier, precision: FusedPrecision) -> Parameters:
        """Prepare the weights of a classifier, where they are."""
        pooling = classifier.pooling
        scores = pooling.deep.weight.float() * pooling.norm.weight.float()
        deep = scores.new_zeros(-(-len(scores) // 8) * 8, scores.shape[1])
        deep[: len(scores)] = scores
        layers = []
        for layer in classifier.layers:
            assert isinstance(layer, Layer)
            layers.append(LayerParameters.of(layer, precision))
        return cls(
            table=classifier.embedding.weight.to(ACTIVATIONS[precision]),
            layers=layers,
            deep=deep.to(ACTIVATIONS[precision]),
            deep_bias=pooling.deep.bias.float(),
            own_scores=pooling.token.weight.float(),
            factor=pooling.factor.float() if pooling.any else None,
        )
