"""What of an ONNX graph is known without data: constants, shapes that the file declares, and arithmetic on both.

Exporters spell sizes out as small graphs (`Shape`, `Gather`, `Mul`, `Concat`). They are no part of the model's work: a
node that uses their result works it out for itself, from constants of its own, and where the file declares a size, that
number stands in the node too. So each of these integers can follow a cut.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import MissingExtraError, ModelError
from .module import Constant, Recipe, Step
from .ops.table import Array, dtype_of

__all__ = ["SIZES", "Facts", "needed", "op_of"]

# Arithmetic of sizes, as exporters write it: what a node may work out for itself.
_HOST = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
    "Greater", "Identity", "Less", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal",
    "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Split", "Sqrt",
    "Squeeze", "Sub", "Unsqueeze", "Where",
})  # fmt: skip
# Inputs by their names in ONNX's schemas: those that tell sizes, and those that are read as plain numbers.
SIZES = frozenset({"shape", "split", "starts", "ends", "pads", "repeats", "length", "limit", "start"})
_PLAIN = frozenset({"scales", "roi", "sizes", "values", "constant_value", "min", "max", "ratio"}) | SIZES
_SIZE_OPS = frozenset({"Reshape", "Split", "Slice", "Pad", "Tile", "Expand", "ConstantOfShape", "Range"})
_POSITIONS = frozenset({"indices", "axes", "axis", "steps", "starts", "ends", "shape"})
# Ops of which each entry of the result depends on few entries of the input, so that some may be known and some not.
_ENTRYWISE = frozenset({
    "Add", "Cast", "Concat", "Div", "Gather", "Identity", "Max", "Min", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
    "Unsqueeze",
})  # fmt: skip
_ARITHMETIC = frozenset({"Add", "Div", "Max", "Min", "Mod", "Mul", "Sub"})
# The most entries of a vector of integers that counts as small.
_SMALL = 64


def needed(name: str) -> Any:
    """The imported package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(name.partition(".")[0], "onnx") from error


def op_of(node: Any) -> str:
    """The name of a node's op in the table."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


class Facts:
    """What is known of a graph without data.

    Args:
        model: an `onnx_ir.Model` whose constants are initializers.
    """

    def __init__(self, model: Any) -> None:
        self._imports = model.opset_imports
        self.nodes = list(model.graph)
        self.initializers = {name: _tensor(value) for name, value in model.graph.initializers.items()}
        self.formals = [_formals(node, self._version(node)) for node in self.nodes]
        # Which node makes a value out of shapes and constants; and shapes, which any of them may start from.
        self.host: dict[str, int] = {}
        self.sources: set[str] = set()
        self._full: dict[str, Array] = {}
        self._partial: dict[str, Array] = {}
        self._find_host()

    def step(self, i: int) -> Step:
        """Node `i` with its attributes as plain values."""
        node = self.nodes[i]
        values: dict[str, Any] = {}
        for attribute in node.attributes.values():
            values.update(_plain(attribute, node))
        inputs = tuple(v.name if v is not None else "" for v in node.inputs)
        return Step(op_of(node), inputs, tuple(v.name for v in node.outputs), values, self._version(node), i)

    def recipe(self, name: str, formal: str, op: str, held: dict[str, Any]) -> Recipe:
        """How a node's input is found; its constants are added to `held`, under the attributes that hold them."""
        steps: list[Step] = []
        constants: dict[str, Constant] = {}
        sizes = formal in SIZES and op in _SIZE_OPS
        role = formal or "value"

        def visit(value: str, movable: bool) -> None:
            known = self._value(value)
            if known is not None and value in self._full:
                if value not in constants:
                    constants[value] = _held(known, role, movable, held)
            elif value in self.host and all(s.place != self.host[value] for s in steps):
                step = self.step(self.host[value])
                for inner in step.inputs:
                    if inner:
                        visit(inner, sizes and step.op in _ARITHMETIC)
                steps.append(step)

        visit(name, sizes)
        known = self._partial.get(name)
        if not sizes or known is None or known.ndim != 1 or np.isnan(known).all():
            return Recipe(name, tuple(steps), constants)
        fixed = Constant(_unused(role, held), "int64", tuple(None if np.isnan(n) else int(n) for n in known))
        held[fixed.attribute] = fixed.value
        return Recipe(name, tuple(steps), constants, fixed)

    def shapes_in(self, recipe: Recipe) -> list[str]:
        """The shapes that a recipe starts from."""
        used = [recipe.result, *(n for s in recipe.steps for n in s.inputs)]
        return [n for n in used if n in self.sources and n not in recipe.constants]

    def _find_host(self) -> None:
        for i, node in enumerate(self.nodes):
            names = [v.name for v in node.inputs if v is not None]
            if node.op_type in ("Shape", "Size") and not self._known(names[0], ""):
                self.sources.add(node.outputs[0].name)
                self._declare(i)
            elif node.op_type in _HOST and not node.domain and self._all_known(i) and _small(node):
                self.host.update({v.name: i for v in node.outputs})
                self._evaluate(i)

    def _declare(self, i: int) -> None:
        """Note what the file declares of a shape."""
        node = self.nodes[i]
        if node.inputs[0].shape is not None:
            sizes = np.array([n if isinstance(n, int) else np.nan for n in node.inputs[0].shape], dtype=np.float64)
            values = self.step(i).values
            found = sizes[values.get("start", 0) : values.get("end")] if node.op_type == "Shape" else sizes.prod()
            self._note(node.outputs[0].name, np.asarray(found))

    def _evaluate(self, i: int) -> None:
        """Note what can be known of arithmetic on shapes and constants, entry by entry."""
        step = self.step(i)
        given = {n: v for n in step.inputs if n and (v := self._value(n)) is not None}
        positions = {n for n, formal in zip(step.inputs, self.formals[i], strict=False) if n and formal in _POSITIONS}
        names = {n for n in step.inputs if n}
        if all(n in self._full for n in names):
            self._full.update(step.run(given))
        elif step.op in _ENTRYWISE and names == given.keys() and all(n in self._full for n in positions):
            numbers = {n: v if n in positions else v.astype(np.float64) for n, v in given.items()}
            if step.op == "Cast":
                made = numbers[step.inputs[0]]
            else:
                made = step.run(numbers)[step.outputs[0]]
            self._note(step.outputs[0], np.trunc(made))

    def _value(self, name: str) -> Array | None:
        """What is known of a small value, NaN where an entry is not."""
        if name in self.initializers:
            self._full.setdefault(name, _array(self.initializers[name]))
        return self._full.get(name, self._partial.get(name))

    def _note(self, name: str, found: Array) -> None:
        if np.isnan(found).any():
            self._partial[name] = found
        else:
            self._full[name] = found.astype(np.int64)

    def _all_known(self, i: int) -> bool:
        pairs = zip(self.nodes[i].inputs, self.formals[i], strict=False)
        return all(v is None or self._known(v.name, formal) for v, formal in pairs)

    def _known(self, name: str, formal: str) -> bool:
        return name in self.host or name in self.sources or self.is_constant(name, formal)

    def is_constant(self, name: str, formal: str) -> bool:
        """Whether an initializer is a few plain numbers at this input, of which each node has its own copy."""
        found = self.initializers.get(name)
        if found is None:
            return False
        if found.dim() == 0 or found.numel() == 0 or (formal in _PLAIN and found.dim() <= 1):
            return True
        return not found.is_floating_point() and found.dim() == 1 and found.numel() <= _SMALL

    def is_host(self, i: int) -> bool:
        """Whether node `i` is left to those who use its result."""
        return self.host.get(self.nodes[i].outputs[0].name) == i

    def _version(self, node: Any) -> int:
        imports = self._imports
        return int(node.version or imports.get(node.domain, imports.get("", 1)))


def _tensor(value: Any) -> Tensor:
    """A copy of an initializer."""
    known = value.const_value
    kind, shape = dtype_of(int(known.dtype)), list(known.shape.numpy())
    data = bytearray(known.tobytes())
    return torch.frombuffer(data, dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)


def _held(value: Array, role: str, movable: bool, held: dict[str, Any]) -> Constant:
    """A constant in an attribute of its own, out of sight where it cannot be a size."""
    plain = value.tolist()
    plain = tuple(plain) if isinstance(plain, list) else plain
    made = Constant(_unused(role if movable else f"_own_{role}", held), str(value.dtype), plain)
    held[made.attribute] = plain
    return made


def _unused(attribute: str, held: dict[str, Any]) -> str:
    number, name = 1, attribute
    while name in held:
        number += 1
        name = f"{attribute}_{number}"
    return name


def _array(value: Tensor) -> Array:
    """Numbers for NumPy, which has no bfloat16."""
    found: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return found


def _formals(node: Any, version: int) -> list[str]:
    """The names of a node's inputs in ONNX's schema; the last one again and again where it takes any number."""
    onnx = needed("onnx")
    try:
        names = [i.name for i in onnx.defs.get_schema(node.op_type, version, node.domain).inputs]
    except onnx.defs.SchemaError:
        names = []
    count = len(node.inputs)
    if node.op_type == "ConstantOfShape":
        return ["length"]
    return (names + [names[-1] if names else ""] * count)[:count]


def _small(node: Any) -> bool:
    return all(v.shape is not None and len(v.shape) <= 1 for v in node.outputs)


def _plain(attribute: Any, node: Any) -> dict[str, Any]:
    """An attribute as plain values, under the name by which the ops know it."""
    name, value = attribute.name, attribute.value
    kind = attribute.type.name
    if kind == "TENSOR":
        array = value.numpy()
        return {name: array.reshape(-1)[0].item(), f"{name}_dtype": int(value.dtype)}
    if kind in ("GRAPH", "GRAPHS") or attribute.is_ref():
        raise ModelError(f"{op_of(node)} {node.name!r} holds a graph of its own, which is not supported.")
    plain = tuple(value) if isinstance(value, (list, tuple)) else value
    return {"groups" if name == "group" else name: plain}
