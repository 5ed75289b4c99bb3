"""The operators of the domain ``ai.gma``: their schemas, and functions that are their bodies.

A function is what runs where no library of kernels takes its place.

Shapes: R rows of C tokens, D documents, W width, H heads, r routing_dim, K components, v value_dim,
T tail of the convolution, I and O a product's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from onnx import FunctionProto
from onnx.defs import OpSchema, has, register_schema

from gma.export import bodies, forgetting
from gma.export.body import Body, Value

DOMAIN = "ai.gma"
VERSION = 1

Documented: TypeAlias = dict[str, tuple[str, str]]
"""The type of each thing by its name, and what it is."""

TYPES = {
    "T0": ("tensor(float)", "tensor(float16)", "tensor(bfloat16)"),
    "F": ("tensor(float)",),
    "I": ("tensor(int64)",),
    "B": ("tensor(bool)",),
}
"""What a tensor may be, by a letter; all of a node's T0 are the same."""

INPUTS: Documented = {
    "routed": (
        "T0",
        (
            "(R, C, H * (2r + v)): every head's q, then every k, then every value; where heads "
            "forget, behind them (H * v) gates of the output, and the rates of the F heads that "
            "do, the last ones; what follows is passed over"
        ),
    ),
    "memory": ("F", "(D, H, K, v), the documents' sums of values"),
    "mass": ("F", "(D, H, K), the documents' sums of responsibilities"),
    "linear": ("F", "(H, K, r), the mixture's mu / var"),
    "quadratic": ("F", "(H, K, r), its -1 / (2 var)"),
    "bias": ("F", "(H, K), its constant part of the score"),
    "lengths": ("I", "(R,), tokens of each row; 0: the row is not used"),
    "document_of_row": (
        "I",
        "(R,), 0 to D - 1. Rows of one document stand together, in order, all but its last full",
    ),
    "fresh": ("B", "(D,), whatever the document's state holds, NaN too, counts as zeros"),
    "keep_bias": ("F", "(F,), added to the rates"),
    "x": ("T0", "(R, C, W)"),
    "tail": ("F", "(D, T, W), the convolution's last inputs"),
    "scale": ("F", "(W,), weight of the normalisation before the convolution"),
    "taps": ("F", "(T + 1, W), the oldest token's first"),
    "weight": ("T0", "(I, O)"),
    "residual": ("T0", "(..., O), added to the product"),
}
OUTPUTS: Documented = {
    "out": ("T0", "(R, C, H * v), 0 where no token is"),
    "memory_after": ("F", "(D, H, K, v)"),
    "mass_after": ("F", "(D, H, K)"),
    "usage": ("F", "(R, H, K), sums of the responsibilities of the rows' keys"),
    "y": ("T0", "like x"),
    "normal": ("T0", "like x, of mean square one"),
    "tail_after": ("F", "(D, T, W)"),
}
ATTRIBUTES: Documented = {
    "normalize": ("INT", "1: queries and keys are RMS-normalised before the mixture scores them"),
    "epsilon": ("FLOAT", "added to the mass, or to the mean square, that is divided by"),
    "routing_epsilon": ("FLOAT", "added to the mean square of a query or key"),
    "most_forgotten": ("FLOAT", "the largest rate, at most 1/4"),
    "activation": ("STRING", "of the product: none, or gelu in its tanh form"),
}


@dataclass(frozen=True)
class Operator:
    """Everything about an operator but its kernels."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    doc: str
    write: Callable[..., dict[str, Value]] = field(repr=False)
    optional: str = ""
    """The input that may be left out, the last; the function without it has no overload."""

    def schema(self) -> OpSchema:
        """Make what onnx checks a node of it against."""
        used = {INPUTS[name][0] for name in self.inputs}
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            self.doc,
            inputs=[
                OpSchema.FormalParameter(
                    name,
                    *INPUTS[name],
                    param_option=OpSchema.FormalParameterOption.Optional
                    if name == self.optional
                    else OpSchema.FormalParameterOption.Single,
                )
                for name in self.inputs
            ],
            outputs=[OpSchema.FormalParameter(name, *OUTPUTS[name]) for name in self.outputs],
            type_constraints=[
                (letter, list(types), "") for letter, types in TYPES.items() if letter in used
            ],
            attributes=[
                OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind), doc, required=True)
                for name, (kind, doc) in ((name, ATTRIBUTES[name]) for name in self.attributes)
            ],
        )

    def overload(self, inputs: int) -> str:
        """Name the overload that a node of so many inputs calls."""
        return self.optional if inputs == len(self.inputs) else ""

    def functions(self) -> list[FunctionProto]:
        """Make its function, or two if an input is optional.

        A function can't tell whether an input is there, so the overload named as the optional
        input is the one that has it.
        """
        shorter = [self.inputs[:-1]] if self.optional else []
        return [self._function(inputs) for inputs in [*shorter, self.inputs]]

    def _function(self, inputs: Sequence[str]) -> FunctionProto:
        body = Body()
        return body.function(
            DOMAIN,
            self.name,
            inputs=inputs,
            outputs=self.write(body, *body.inputs(inputs)),
            attributes=self.attributes,
            overload=self.overload(len(inputs)),
            doc=self.doc,
        )


MIXER = (
    "routed",
    "memory",
    "mass",
    "linear",
    "quadratic",
    "bias",
    "lengths",
    "document_of_row",
    "fresh",
)
"""The inputs of every mixer, the first ones."""

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "CausalGMA",
            MIXER,
            ("out", "memory_after", "mass_after"),
            ("normalize", "epsilon", "routing_epsilon"),
            "Gaussian Mixture Attention: each token's mean over what it and its document's earlier "
            "tokens wrote, in this step and in its state.",
            bodies.causal,
        ),
        Operator(
            "ForgettingGMA",
            (*MIXER, "keep_bias"),
            ("out", "memory_after", "mass_after", "usage"),
            ("normalize", "epsilon", "routing_epsilon", "most_forgotten"),
            "Gaussian Mixture Attention that forgets: exp(-min(softplus(rate), most_forgotten)) of "
            "a head's memory is kept by each token. What it reads is multiplied by the sigmoid of "
            "the output's gate.",
            forgetting.forgetting,
        ),
        Operator(
            "ShortConvolution",
            ("x", "tail", "scale", "taps", "lengths", "document_of_row", "fresh"),
            ("y", "normal", "tail_after"),
            ("epsilon",),
            "y = x + the causal depthwise convolution of the normalised x; normal is y normalised.",
            bodies.convolve,
        ),
        Operator(
            "Normalize",
            ("x",),
            ("normal",),
            ("epsilon",),
            "x divided by the root of its mean square over the last dimension.",
            bodies.normalize,
        ),
        Operator(
            "Linear",
            ("x", "weight", "residual"),
            ("y",),
            ("activation",),
            "activation(x @ weight) + residual, summed in float32.",
            bodies.multiply,
            optional="residual",
        ),
    )
}


def register() -> None:
    """Make the schemas known to onnx, if they are not yet."""
    for operator in OPERATORS.values():
        if not has(operator.name, VERSION, DOMAIN):
            register_schema(operator.schema())


def functions() -> list[FunctionProto]:
    """Make the functions of all operators, for a model that may run without kernels of them."""
    return [function for operator in OPERATORS.values() for function in operator.functions()]
