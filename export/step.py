"""A classifier's step as it is exported: its weights prepared, all documents' states in and out.

R rows of C tokens, D documents, W width, L layers, H heads, r routing_dim, K components,
v value_dim, T tail, G labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.export.inspection import ALIGNED
from gma.export.placeholders import placeholders
from gma.model.classifier import Classifier
from gma.model.layers import Layer
from gma.model.mixers import ForgettingMixer
from gma.model.ops.chunked import ROUTING_EPSILON
from gma.model.ops.forgetting import MOST_FORGOTTEN
from gma.model.scores import LEAST

EPSILON = 1e-6
"""What every RMSNorm in `gma.model.layers` adds to the mean square."""


class Inputs(NamedTuple):
    """The inputs of the exported model, in their order."""

    tokens: Tensor  # (R, C) int32 ids; any id where no token is
    lengths: Tensor  # (R,) int64: tokens of the row, 0: it is not used
    document_of_row: Tensor  # (R,) int64; a document's rows stand together, all but the last full
    fresh: Tensor  # (D,) bool: whatever the document's state holds counts as zeros
    memory: Tensor  # (D, L, H, K, v) float32
    mass: Tensor  # (D, L, H, K) float32
    tail: Tensor  # (D, L, T, W) float32
    evidence: Tensor  # (D, G) float64
    weight: Tensor  # (D,) float64


class Outputs(NamedTuple):
    """The outputs of the exported model, in their order.

    Behind them a model that forgets tells the rows' usage of its components, (R, L, H, K) float32.
    """

    row_evidence: Tensor  # (R, G) float32
    logits: Tensor  # (D, G) float64
    memory_after: Tensor
    mass_after: Tensor
    tail_after: Tensor
    evidence_after: Tensor
    weight_after: Tensor


class PreparedLayer(nn.Module):
    """A layer whose norms are folded into the products they precede; its matrices are (in, out)."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__()
        mixer, mlp, convolution = layer.mixer, layer.mlp, layer.convolution
        config = mixer.config
        self.routing = {
            "normalize": int(config.normalize_routing),
            "epsilon": config.epsilon,
            "routing_epsilon": ROUTING_EPSILON,
        }
        self.convolves = convolution is not None
        if convolution is not None:
            self.scale = _constant(convolution.norm.weight)
            self.taps = _constant(convolution.weight)
        project = mixer.project.weight * mixer.norm.weight
        self.forgets = isinstance(mixer, ForgettingMixer)
        if isinstance(mixer, ForgettingMixer):
            project = functional.pad(project, (0, 0, 0, -len(project) % ALIGNED))
            self.keep_bias = _constant(mixer.keep_bias)
            self.routing["most_forgotten"] = MOST_FORGOTTEN
        self.project = _constant(project.T, dtype)
        self.out = _constant(mixer.out.weight.T, dtype)
        self.up = _constant((mlp.up.weight * mlp.norm.weight).T, dtype)
        self.down = _constant(mlp.down.weight.T, dtype)
        linear, quadratic, bias = mixer.mixture.coefficients()
        self.linear, self.quadratic = _constant(linear), _constant(quadratic)
        self.bias = _constant(bias)

    def forward(self, x: Tensor, states: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
        """Compute x (R, C, W) and the states after this layer, of those before it.

        ``states`` and those returned behind x are memory, mass and tail, with the rows' usage
        behind them where heads forget; ``rows`` are the step's lengths, document_of_row and fresh.
        """
        memory, mass, tail = states
        if self.convolves:
            y, normal, tail = placeholders.short_convolution(
                x, tail, self.scale, self.taps, *rows, epsilon=EPSILON
            )
        else:
            y, normal = x, placeholders.normalize(x, epsilon=EPSILON)
        routed = _product(normal, self.project)
        mixed = [routed, memory, mass, self.linear, self.quadratic, self.bias, *rows]
        usage: list[Tensor] = []
        if self.forgets:
            read, memory, mass, *usage = placeholders.forgetting(
                *mixed, self.keep_bias, **self.routing
            )
        else:
            read, memory, mass = placeholders.causal(*mixed, **self.routing)
        z = _product(read, self.out, residual=y)
        hidden = _product(placeholders.normalize(z, epsilon=EPSILON), self.up, activation="gelu")
        return [_product(hidden, self.down, residual=z), memory, mass, tail, *usage]


class PreparedStep(nn.Module):
    """`Classifier.step` with the states of all D documents in and out."""

    def __init__(self, classifier: Classifier, dtype: torch.dtype) -> None:
        """Prepare a causal classifier, best in float64.

        Activations and matrices will be in ``dtype``.
        """
        super().__init__()
        self.any = classifier.config.pooling == "any"
        self.prior = classifier.config.prior_tokens
        pooling = classifier.pooling
        self.embedding = _constant(classifier.embedding.weight, dtype)
        # float32 in every precision: what a token says is added up over a whole book.
        self.token = _constant(pooling.token.weight)
        self.deep = _constant((pooling.deep.weight * pooling.norm.weight).T)
        self.deep_bias = _constant(pooling.deep.bias)
        self.factor = _constant(pooling.factor) if self.any else None
        self.layers = nn.ModuleList(PreparedLayer(x, dtype) for x in _layers(classifier))

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        document_of_row: Tensor,
        fresh: Tensor,
        memory: Tensor,
        mass: Tensor,
        tail: Tensor,
        evidence: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute `Outputs` of `Inputs`."""
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens = tokens.masked_fill(~valid, 0)
        rows = [lengths, document_of_row, fresh]
        x = functional.embedding(tokens, self.embedding)
        after = []
        for index, layer in enumerate(self.layers):
            x, *states = layer(x, [part[:, index] for part in (memory, mass, tail)], rows)
            after.append(states)
        scores = torch.where(valid[..., None], self._scores(x, tokens), 0.0)
        # A product for each row, as is one below for each document: reductions go through rows in
        # another order if there are more of them.
        row_evidence = (valid[:, None].double() @ scores.double())[:, 0].float()
        documents = torch.arange(fresh.shape[0])
        belongs = ((documents[:, None] == document_of_row) & (lengths > 0)).double()
        # What a document had, then its rows, one after the other.
        old = evidence.masked_fill(fresh[:, None], 0.0)
        said = torch.cat([old, row_evidence.double()])
        of = torch.cat([(documents[:, None] == documents).double(), belongs], 1)
        # What is not finite would reach every document through 0 * NaN.
        bad = ~said.isfinite().all(1, keepdim=True)
        evidence = of @ said.masked_fill(bad, 0.0)
        evidence = evidence.masked_fill(of @ bad.double() > 0, torch.nan)
        weight = weight.masked_fill(fresh, 0.0) + belongs @ lengths.double()
        memory, mass, tail, *usage = (torch.stack(parts, 1) for parts in zip(*after, strict=True))
        logits = _log_odds(evidence) if self.any else evidence / (weight[:, None] + self.prior)
        return *Outputs(row_evidence, logits, memory, mass, tail, evidence, weight), *usage

    def _scores(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Score every token (R, C, W) -> (R, C, G), in float32: `gma.model.layers.Pooling`."""
        both = placeholders.normalize(x, epsilon=EPSILON).float() @ self.deep + self.deep_bias
        own = functional.embedding(tokens, self.token)
        if self.factor is not None:
            return _softplus(both + own) * self.factor
        deep: Tensor = both[..., :-1] * _softplus(both[..., -1:])
        return deep + own


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) as 2 artanh(y / (2 + y)) of y = exp(-|x|), plus x if it is positive.

    These operators keep small results exact on every provider, some of which compute 1 + exp(x) for
    their own, and give a number the same bits wherever it lies, which those of logarithms do not.
    """
    small = x.abs().neg().exp()
    root = small / (2.0 + small)
    square = root * root  # at most 1/9: what is left out is less than a last bit
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    for odd in (11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / odd
    return x.relu() + 2.0 * root * series


def _log_odds(evidence: Tensor) -> Tensor:
    """Compute `gma.model.scores.log_odds`, without an operator that ONNX lacks."""
    x = torch.where(evidence < LEAST, LEAST, evidence)  # which what is NaN stays
    series = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0))))
    return x + torch.where(x < 1e-3, series, 1.0 - x.neg().exp()).log()


def _layers(classifier: Classifier) -> list[Layer]:
    return [layer for layer in classifier.layers if isinstance(layer, Layer)]


def _constant(x: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(x.detach().to(dtype).contiguous(), requires_grad=False)


def _product(
    x: Tensor, weight: Tensor, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """Compute activation(x @ weight) + residual.

    In float32 of standard operators: every provider has its best kernels for them, and they can be
    quantised.
    """
    if x.dtype != torch.float32:
        product: Tensor = placeholders.linear(x, weight, residual, activation=activation)
        return product
    product = x @ weight
    if activation == "gelu":
        product = functional.gelu(product, approximate="tanh")
    return product if residual is None else residual + product
