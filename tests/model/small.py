"""Small classifiers with weights that leave nothing at its neutral value, and the same by hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gma.model.classifier import Classifier
from gma.model.config import ModelConfig
from gma.model.layers import Layer
from gma.model.mixers import ForgettingMixer
from gma.model.ops import reference
from gma.model.state import State

SMALL = ModelConfig(
    name="small",
    labels=("a", "b", "c"),
    vocab_size=50,
    width=16,
    layers=2,
    heads=2,
    routing_dim=4,
    value_dim=6,
    num_components=4,
    mlp_width=24,
    prior_tokens=5.0,
)

FITTING = SMALL.model_copy(
    update={
        "width": 48,
        "routing_dim": 16,
        "value_dim": 128,
        "num_components": 32,
        "mlp_width": 80,
    }
)
"""One that Triton's kernels and the fused step can compute."""

ANY: dict[str, object] = {"pooling": "any", "multi_label": True, "prior_tokens": 0.0}
"""Changes that make a model's pooling "any"."""


def small(**changes: object) -> Classifier:
    """Always the same weights; ``changes`` to the configuration."""
    torch.manual_seed(0)
    classifier = Classifier(SMALL.model_copy(update=changes)).requires_grad_(False).eval()
    classifier.pooling.token.weight.normal_()
    for name, parameter in classifier.named_parameters():
        if name.endswith(("alpha", "omega", "norm.weight", "bias")):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if classifier.pooling.any:  # some tokens loud, most as quiet as they begin
        classifier.pooling.token.weight.mul_(4.0)
        classifier.pooling.factor.mul_(torch.rand_like(classifier.pooling.factor) + 0.5)
    return classifier


class ByHand(NamedTuple):
    scores: Tensor  # (N, labels), each token's
    logits: Tensor  # (labels,)
    memory: Tensor  # (L, H, K, v)
    mass: Tensor  # (L, H, K)
    tail: Tensor  # (L, T, W)
    gamma: Tensor  # (L, N, H, K), of the keys

    @property
    def usage(self) -> Tensor:
        """(L, H, K)."""
        return self.gamma.sum(1)


def by_hand(classifier: Classifier, tokens: Tensor, state: State) -> ByHand:
    """One document in one piece, token by token where that matters, after the state of one."""
    config = classifier.config
    x = classifier.embedding(tokens)
    memories, masses, tails, gammas = [], [], [], []
    for index, layer in enumerate(classifier.layers):
        assert isinstance(layer, Layer)
        tail = state.tail[0, index]
        if layer.convolution is not None:
            seen = torch.cat([tail, layer.convolution.norm(x)])
            taps = layer.convolution.weight
            update = [(seen[i : i + len(taps)] * taps).sum(0) for i in range(len(x))]
            x, tail = x + torch.stack(update), seen[-config.tail :]
        mixer = layer.mixer
        routed, *others = mixer.project(mixer.norm(x)).split(
            [sum(mixer.widths), mixer.project.out_features - sum(mixer.widths)], -1
        )
        log_keep = open_ = None
        if isinstance(mixer, ForgettingMixer):
            open_, keep = others[0].split(mixer.parts[1:], -1)
            rates = torch.log1p((keep + mixer.keep_bias).exp()).clamp(max=0.25)
            log_keep = x.new_zeros(len(x), config.heads)
            log_keep[:, config.heads - rates.shape[1] :] = -rates
        q, k, val = (
            part.unflatten(-1, (config.heads, -1)) for part in routed.split(mixer.widths, -1)
        )
        if config.normalize_routing:
            q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        gamma_q, gamma_k = (
            reference.responsibilities(part, *mixer.mixture.distribution()) for part in (q, k)
        )
        gammas.append(gamma_k)
        epsilon, before = config.epsilon, (state.memory[0, index], state.mass[0, index])
        if not config.causal:
            out = reference.bidirectional(gamma_q, gamma_k, val, epsilon=epsilon)
            memory, mass = torch.einsum("nhk,nhv->hkv", gamma_k, val), gamma_k.sum(0)
        elif log_keep is None:
            out, memory, mass = reference.causal(gamma_q, gamma_k, val, *before, epsilon=epsilon)
        else:
            out, memory, mass = reference.forgetting(
                gamma_q, gamma_k, val, log_keep, *before, epsilon=epsilon
            )
        if open_ is not None:
            out = out * open_.sigmoid().unflatten(-1, (config.heads, -1))
        x = x + mixer.out(out.flatten(1))
        x = x + layer.mlp(x)
        memories.append(memory)
        masses.append(mass)
        tails.append(tail)
    if config.pooling == "any":
        pooling = classifier.pooling
        reading = pooling.deep(pooling.norm(x)) + pooling.token(tokens)
        scores = torch.logaddexp(torch.zeros_like(reading), reading) * pooling.factor
        logits = torch.log(torch.expm1(scores.sum(0)))
    else:
        scores = classifier.pooling(x[None], tokens[None])[0]
        silent = scores.new_zeros(int(config.prior_tokens), scores.shape[1])
        logits = torch.cat([silent, scores]).mean(0)
    states = (torch.stack(parts) for parts in (memories, masses, tails, gammas))
    return ByHand(scores, logits, *states)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-30)).item()
