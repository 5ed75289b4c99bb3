"""Function bodies of standard ONNX operators, written as Python expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, helper

OPSET = 20
"""Version of the standard operators that bodies are made of."""

FIELDS = {int: "value_int", float: "value_float", list: "value_ints", str: "value_string"}
"""Attribute of a Constant for each Python type that may stand for a value."""


@dataclass(frozen=True)
class Value:
    """What a node gives. Arithmetic on it adds nodes to its body."""

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
        """Elementwise; ``==`` compares Python's objects."""
        return self.body.add("Equal", self, other)


class Body:
    """Nodes in the order in which they were written: ``body.Softmax(x, axis=-1)`` adds one.

    Where a node takes a value, an int or ints stand for an int64 constant, a float for a float32.
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
        """One more node of one output."""
        return self._node(op_type, inputs, 1, attributes)[0]

    def split(self, x: Value, sizes: Value, axis: int) -> tuple[Value, Value]:
        """Two parts of x, their ``sizes`` (2,) along one dimension."""
        first, second = self._node("Split", (x, sizes), 2, {"axis": axis})
        return first, second

    def inputs(self, names: Sequence[str]) -> list[Value]:
        """The function's own inputs."""
        return [Value(name, self) for name in names]

    def attribute(self, name: str, kind: str) -> Value:
        """The value of the function's attribute, of kind INT, FLOAT or STRING, as a scalar."""
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
        """``then`` if the scalar holds, else ``otherwise``; each writes into its own branch."""
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
        """The function that has this body; ``outputs`` are its outputs by name."""
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
            field = {
                int: "value_int",
                float: "value_float",
                list: "value_ints",
                str: "value_string",
            }
            self._constants[key] = self.add("Constant", **{field[type(operand)]: operand})
        return self._constants[key]

    def _name(self, op_type: str) -> str:
        self._names.append(op_type)
        return f"{op_type.lower()}_{len(self._names)}"
