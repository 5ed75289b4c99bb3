"""Function bodies of standard ONNX operators, written as Python expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, helper

OPSET = 20
"""The version of the standard operators that bodies are made of."""

FIELDS = {int: "value_int", float: "value_float", list: "value_ints", str: "value_string"}
"""The attribute of a Constant by the Python type of what it holds."""


@dataclass(frozen=True)
class Value:
    """The output of a node. Arithmetic on it adds nodes to its body."""

    name: str
    body: Body

    def __add__(self, other: Any) -> Value:
        return self.body.add("Add", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.body.add("Sub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.body.add("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.body.add("Div", self, other)

    def __matmul__(self, other: Any) -> Value:
        return self.body.add("MatMul", self, other)

    def __lt__(self, other: Any) -> Value:
        return self.body.add("Less", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.body.add("Greater", self, other)

    def __and__(self, other: Any) -> Value:
        return self.body.add("And", self, other)

    def __invert__(self) -> Value:
        return self.body.add("Not", self)

    def equals(self, other: Any) -> Value:
        """Compare elementwise, for ``==`` compares Python's objects."""
        return self.body.add("Equal", self, other)


class Body:
    """Nodes in the order in which they were written: ``body.Softmax(x, axis=-1)`` adds one.

    Where a node takes a value, an int or a list of ints stands for an int64 constant, a float for
    one in float32, a str for a string.
    """

    def __init__(self, enclosing: Body | None = None) -> None:
        self.nodes: list[NodeProto] = []
        self._names: list[str] = enclosing._names if enclosing else []
        self._constants: dict[Any, Value] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.add(op_type, *inputs, **attributes)

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> Value:
        """Add a node of one output."""
        return self._node(op_type, inputs, 1, attributes)[0]

    def split(self, x: Value, sizes: Value, axis: int) -> tuple[Value, Value]:
        """Cut x in two along one dimension; ``sizes`` (2,) int64 are the parts' sizes there."""
        first, second = self._node("Split", (x, sizes), 2, {"axis": axis})
        return first, second

    def size(self, x: Value, axis: int) -> Value:
        """The size of one dimension, (1,) int64."""
        return self.add("Shape", x, start=axis, **({"end": axis + 1} if axis != -1 else {}))

    def count(self, x: Value, axis: int) -> Value:
        """The size of one dimension, () int64."""
        return self.add("Squeeze", self.size(x, axis))

    def spread(self, each: Value, like: Value) -> Value:
        """Reshape (R,) to (R, 1, ..., 1), of as many dimensions as ``like``."""
        ones = self.Expand(1, self.Shape(self.Shape(like, start=1)))
        return self.Reshape(each, self.Concat([-1], ones, axis=0))

    def inputs(self, names: Sequence[str]) -> list[Value]:
        """The inputs of the function that has this body."""
        return [Value(name, self) for name in names]

    def attribute(self, name: str, kind: str) -> Value:
        """A scalar that holds the function's attribute, which is of kind INT, FLOAT or STRING."""
        value = self.add("Constant")
        reference = AttributeProto(
            name=f"value_{kind.lower()}",
            ref_attr_name=name,
            type=AttributeProto.AttributeType.Value(kind),
        )
        self.nodes[-1].attribute.append(reference)
        return value

    def choose(
        self,
        condition: Value,
        then: Callable[[Body], Value],
        otherwise: Callable[[Body], Value],
    ) -> Value:
        """Give what ``then`` writes if the scalar holds, else what ``otherwise`` writes."""
        branches = []
        for name, write in (("then", then), ("otherwise", otherwise)):
            branch = Body(enclosing=self)
            output = helper.make_empty_tensor_value_info(write(branch).name)
            branches.append(helper.make_graph(branch.nodes, name, [], [output]))
        return self.add("If", condition, then_branch=branches[0], else_branch=branches[1])

    def function(
        self,
        domain: str,
        name: str,
        *,
        inputs: Sequence[str],
        outputs: dict[str, Value],
        attributes: Sequence[str] = (),
        overload: str = "",
        doc: str = "",
    ) -> FunctionProto:
        """Make the function that has this body and gives ``outputs`` under these names."""
        exits = [
            helper.make_node("Identity", [value.name], [output])
            for output, value in outputs.items()
        ]
        return helper.make_function(
            domain,
            name,
            inputs,
            list(outputs),
            [*self.nodes, *exits],
            [helper.make_opsetid("", OPSET)],
            attributes,
            doc_string=doc,
            overload=overload,
        )

    def _node(
        self, op_type: str, inputs: Sequence[Any], outputs: int, attributes: dict[str, Any]
    ) -> list[Value]:
        names = [self._operand(each).name for each in inputs]
        values = [Value(self._name(op_type), self) for _ in range(outputs)]
        node = helper.make_node(op_type, names, [value.name for value in values], **attributes)
        self.nodes.append(node)
        return values

    def _operand(self, operand: Any) -> Value:
        if isinstance(operand, Value):
            return operand
        key = (type(operand), tuple(operand) if isinstance(operand, list) else operand)
        if key not in self._constants:
            self._constants[key] = self.add("Constant", **{FIELDS[type(operand)]: operand})
        return self._constants[key]

    def _name(self, op_type: str) -> str:
        self._names.append(op_type)
        return f"{op_type.lower()}_{len(self._names)}"
