"""A classifier's step as it is exported: weights prepared once, all documents' states in and out.

R rows of C tokens, D documents, W width, L layers, H heads, r routing_dim, K components,
v value_dim, T tail, G labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from gma.export.body import OPSET
from gma.export.operators import DOMAIN, OPERATORS, VERSION, functions, register
from gma.model.classifier import Classifier
from gma.model.layers import Layer
from gma.model.ops.chunked import ROUTING_EPSILON
from gma.model.state import State

EXAMPLE = 2, 3
"""Rows and documents that are traced; both are dynamic."""

EPSILON = 1e-6
"""Of every RMSNorm in `gma.model.layers`."""


class Inputs(NamedTuple):
    """What the exported model takes, in this order."""

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
    """What the exported model gives, in this order."""

    row_evidence: Tensor  # (R, G) float32
    logits: Tensor  # (D, G) float64
    memory_after: Tensor
    mass_after: Tensor
    tail_after: Tensor
    evidence_after: Tensor
    weight_after: Tensor


class PreparedLayer(nn.Module):
    """One layer's weights: norms folded into the products they precede, matrices (in, out)."""

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
        self.project = _constant((mixer.project.weight * mixer.norm.weight).T, dtype)
        self.out = _constant(mixer.out.weight.T, dtype)
        self.up = _constant((mlp.up.weight * mlp.norm.weight).T, dtype)
        self.down = _constant(mlp.down.weight.T, dtype)
        linear, quadratic, bias = mixer.mixture.coefficients()
        self.linear, self.quadratic = _constant(linear), _constant(quadratic)
        self.bias = _constant(bias)

    def forward(self, x: Tensor, states: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
        """x (R, C, W), states memory, mass, tail of this layer -> x and the states after."""
        memory, mass, tail = states
        if self.convolves:
            y, normal, tail = gma.short_convolution(
                x, tail, self.scale, self.taps, *rows, epsilon=EPSILON
            )
        else:
            y, normal = x, gma.normalize(x, epsilon=EPSILON)
        routed = _product(normal, self.project)
        read, memory, mass = gma.causal(
            routed, memory, mass, self.linear, self.quadratic, self.bias, *rows, **self.routing
        )
        z = _product(read, self.out, residual=y)
        hidden = _product(gma.normalize(z, epsilon=EPSILON), self.up, activation="gelu")
        return [_product(hidden, self.down, residual=z), memory, mass, tail]


class PreparedStep(nn.Module):
    """`Classifier.step` with the states of all D documents in and out."""

    def __init__(self, classifier: Classifier, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` of the activations and of the matrices; the classifier best in float64.

        Raises ValueError for a bidirectional classifier: it has no step.
        """
        super().__init__()
        if not classifier.config.causal:
            raise ValueError(
                "a bidirectional model has no step to export: it reads whole documents"
            )
        self.prior = classifier.config.prior_tokens
        pooling = classifier.pooling
        self.embedding = _constant(classifier.embedding.weight, dtype)
        # float32 in every precision: what a token says is added up over a whole book.
        self.token = _constant(pooling.token.weight)
        self.deep = _constant((pooling.deep.weight * pooling.norm.weight).T)
        self.deep_bias = _constant(pooling.deep.bias)
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
    ) -> Outputs:
        """`Inputs` -> `Outputs`."""
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens = tokens.masked_fill(~valid, 0)
        rows = [lengths, document_of_row, fresh]
        x = functional.embedding(tokens, self.embedding)
        after = []
        for index, layer in enumerate(self.layers):
            x, *states = layer(x, [part[:, index] for part in (memory, mass, tail)], rows)
            after.append(states)
        row_evidence = torch.where(valid[..., None], self._scores(x, tokens), 0.0).sum(1)
        belongs = torch.arange(fresh.shape[0])[:, None] == document_of_row
        belongs = (belongs & (lengths > 0)).double()
        # A row that is not finite would reach every document through 0 * NaN.
        bad = ~row_evidence.isfinite().all(1, keepdim=True)
        added = belongs @ row_evidence.double().masked_fill(bad, 0.0)
        added = added.masked_fill(belongs @ bad.double() > 0, torch.nan)
        evidence = evidence.masked_fill(fresh[:, None], 0.0) + added
        weight = weight.masked_fill(fresh, 0.0) + belongs @ lengths.double()
        memory, mass, tail = (torch.stack(parts, 1) for parts in zip(*after, strict=True))
        logits = evidence / (weight[:, None] + self.prior)
        return Outputs(row_evidence, logits, memory, mass, tail, evidence, weight)

    def _scores(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Each token's score per label, in float32: `gma.model.layers.Pooling`."""
        both = gma.normalize(x, epsilon=EPSILON).float() @ self.deep + self.deep_bias
        deep: Tensor = both[..., :-1] * functional.softplus(both[..., -1:])
        return deep + functional.embedding(tokens, self.token)


def _layers(classifier: Classifier) -> list[Layer]:
    return [layer for layer in classifier.layers if isinstance(layer, Layer)]


def _constant(x: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(x.detach().to(dtype).contiguous(), requires_grad=False)


def _product(
    x: Tensor, weight: Tensor, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """activation(x @ weight) + residual: standard operators in float32, which every provider has
    the best kernels of and which can be quantised."""
    if x.dtype != torch.float32:
        product: Tensor = gma.linear(x, weight, residual, activation=activation)
        return product
    product = x @ weight
    if activation == "gelu":
        product = functional.gelu(product, approximate="tanh")
    return product if residual is None else residual + product


# What torch traces in place of the operators. They have shapes only: they are exported, never run.

gma = torch.ops.gma_exported  # `gma` has the kernels of `gma.model.ops.triton`
_library = torch.library.Library("gma_exported", "DEF")  # type: ignore[no-untyped-call]
_ROWS = "Tensor lengths, Tensor document_of_row, Tensor fresh"


def _traced(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines a torch operator; the decorated function tells what it gives by shapes alone."""

    def define(shapes: Callable[..., Any]) -> Callable[..., Any]:
        name = _library.define(schema)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"gma_exported::{name}", shapes)
        return shapes

    return define


@_traced(
    "causal(Tensor routed, Tensor memory, Tensor mass, Tensor linear, Tensor quadratic, "
    f"Tensor bias, {_ROWS}, *, int normalize, float epsilon, float routing_epsilon) "
    "-> (Tensor, Tensor, Tensor)"
)
def _causal_shapes(
    routed: Tensor, memory: Tensor, mass: Tensor, *_: Tensor, **__: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = routed.new_empty(*routed.shape[:2], memory.shape[1] * memory.shape[3])
    return out, torch.empty_like(memory), torch.empty_like(mass)


@_traced(
    "short_convolution(Tensor x, Tensor tail, Tensor scale, Tensor taps, "
    f"{_ROWS}, *, float epsilon) -> (Tensor, Tensor, Tensor)"
)
def _convolution_shapes(
    x: Tensor, tail: Tensor, *_: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(tail)


@_traced("normalize(Tensor x, *, float epsilon) -> Tensor")
def _normalize_shapes(x: Tensor, *, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@_traced("linear(Tensor x, Tensor weight, Tensor? residual, *, str activation) -> Tensor")
def _linear_shapes(
    x: Tensor, weight: Tensor, residual: Tensor | None, *, activation: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


def traced(classifier: Classifier, dtype: torch.dtype, chunk: int) -> onnx.ModelProto:
    """The step as a model of rows of ``chunk`` tokens, with its operators' bodies."""
    register()
    rows, documents = EXAMPLE
    states = [x for _, x in State.zeros(classifier.config, documents).tensors()]
    example = Inputs(
        torch.zeros(rows, chunk, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(documents, dtype=torch.bool),
        *states,
    )
    of_rows, of_documents = {0: torch.export.Dim("R")}, {0: torch.export.Dim("D")}
    step = PreparedStep(classifier, dtype).eval()
    weights = {name: x.detach().clone() for name, x in step.named_parameters()}
    # The exporter makes one weight of two that are equal, as norms' are before any training.
    with torch.no_grad():
        for number, x in enumerate(step.parameters()):
            x.fill_(number)
    program = torch.onnx.export(
        step,
        tuple(example),
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=_translations(),
        input_names=Inputs._fields,
        output_names=Outputs._fields,
        dynamic_shapes=(*[of_rows] * 3, *[of_documents] * (len(example) - 3)),
        verbose=False,
    )
    assert program is not None
    model = _finished(program.model_proto)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            _fill(initializer, weights[initializer.name])
    return model


def _fill(initializer: onnx.TensorProto, x: Tensor) -> None:
    whole = x.contiguous().view(torch.uint8).numpy().tobytes()
    assert len(whole) == len(initializer.raw_data), initializer.name
    initializer.raw_data = whole


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its operators, and without what tells of its making."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del graph.value_info[:]
    model.producer_name, model.producer_version = "gma", ""
    for node in graph.node:
        if node.domain == DOMAIN:
            node.overload = OPERATORS[node.op_type].overload(len(node.input))
    used = {(node.op_type, node.overload) for node in graph.node if node.domain == DOMAIN}
    model.functions.extend(x for x in functions() if (x.name, x.overload) in used)
    return model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export`: the operator of ``ai.gma`` that each traced one stands for."""
    from onnxscript.values import Opset

    domain = Opset(DOMAIN, VERSION)
    return {
        gma.causal.default: domain.CausalGMA,
        gma.short_convolution.default: domain.ShortConvolution,
        gma.normalize.default: domain.Normalize,
        gma.linear.default: domain.Linear,
    }
