"""An ONNX graph as an ordinary module: a submodule a node, which owns its weights and the integers it uses.

Integers that may be sizes (a target of a reshape, sizes of a split, a number of groups) are attributes of the node that
uses them, also where the file shares one constant among several nodes or works it out from other constants: so a cut
can change them for one node alone. What is worked out from shapes and constants only is not run as tensor ops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..core.errors import OptionError
from .ops import OPS, Attributes
from .ops.table import Array, tensor

__all__ = ["Constant", "Input", "Node", "OnnxModule", "Recipe", "Step", "example_inputs"]

# Tokens, pixels …: how many along an input's axis of unknown size. With one only, what mixes them could not be seen.
_FREE = 8


@dataclass(frozen=True)
class Input:
    """An input that the graph declares.

    Args:
        name: in the file.
        dtype: of its entries.
        shape: sizes; a name, or None, for an axis of any size.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]


class _Shared:
    """What never changes, so that copies of a module, of which pruning makes many, hold the same."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@dataclass(frozen=True)
class Constant(_Shared):
    """A small constant that a node has its own copy of: the attribute with it, its NumPy type, its first value."""

    attribute: str
    dtype: str
    value: Any


@dataclass(frozen=True)
class Step(_Shared):
    """A node of the graph that another works out for itself, since its inputs are shapes and constants."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Any]
    version: int
    place: int

    def run(self, known: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name."""
        given = [known[name] if name else None for name in self.inputs]
        # Arithmetic of sizes is no part of the model's own work: nobody who watches its ops is to see it.
        with _disable_current_modes():
            made = OPS[self.op](Attributes(self.op, self.values, self.version, len(self.outputs)), *given)
            values = made if isinstance(made, tuple) else (made,)
            return {n: np.array(tensor(v)) for n, v in zip(self.outputs, values, strict=False)}


@dataclass(frozen=True)
class Recipe(_Shared):
    """How a node finds an input that is known without data.

    Args:
        result: its name, to be found after the steps.
        steps: in order.
        constants: what the steps start from beside shapes, by name.
        fixed: where the file declares some of the sizes that make up the result: a constant that holds those, and None
            for the others.
    """

    result: str
    steps: tuple[Step, ...]
    constants: Mapping[str, Constant]
    fixed: Constant | None = None


class Node(nn.Module):
    """One node of the graph.

    Args:
        step: its op, names of inputs and outputs, and attributes.
        needs: names of the values that it is called with.
        recipes: for inputs that it works out, by name.
        name: in the file, for errors.
    """

    def __init__(self, step: Step, needs: Sequence[str], recipes: Mapping[str, Recipe], name: str) -> None:
        super().__init__()
        self._step = step
        self._needs = tuple(needs)
        self._recipes = dict(recipes)
        self._tensors: dict[str, str] = {}
        self._sizes: tuple[str, ...] = ()
        self._name = name
        self._done: tuple[str, ...] = ()

    def forward(self, *values: Any) -> Any:
        """What the op returns."""
        known = dict(zip(self._needs, values, strict=True))
        given = [self._input(name, known) if name else None for name in self._step.inputs]
        return OPS[self._step.op](self._attributes(), *given)

    def extra_repr(self) -> str:
        """The op, and its sizes."""
        return ", ".join(
            [self._step.op, *(f"{n}={v}" for n, v in vars(self).items() if n[0] != "_" and n != "training")]
        )

    def constant(self, known: Constant) -> Array:
        """The node's own copy of a constant."""
        return np.array(getattr(self, known.attribute), dtype=known.dtype)

    def _input(self, name: str, known: Mapping[str, Any]) -> Any:
        if name in self._tensors:
            return getattr(self, self._tensors[name])
        return self._worked_out(self._recipes[name], known) if name in self._recipes else known[name]

    def _worked_out(self, recipe: Recipe, known: Mapping[str, Any]) -> Array:
        values = {**known, **{n: self.constant(c) for n, c in recipe.constants.items()}}
        for step in recipe.steps:
            values.update(step.run(values))
        found = np.array(values[recipe.result])
        for i, size in enumerate(getattr(self, recipe.fixed.attribute) if recipe.fixed else ()):
            found[i] = found[i] if size is None else size
        return found

    def _attributes(self) -> Attributes:
        values = {**self._step.values, **{name: getattr(self, name) for name in self._sizes}}
        step = self._step
        where = f"{step.op} {self._name!r}"
        return Attributes(step.op, values, step.version, len(step.outputs), self.training, where)


class OnnxModule(nn.Module):
    """A graph that runs node by node; made by `read_onnx`, written by `write_onnx`.

    Parameters have the names of the file's initializers where those fit into a module tree.

    Args:
        graph: the file without the parameters, base64.
        inputs: that it declares.
        outputs: names of what it returns.
    """

    # For the search for what a cut must mend: nothing here hides in Python code.
    numbers_are_attributes = True

    def __init__(self, graph: str, inputs: Sequence[Input], outputs: Sequence[str]) -> None:
        super().__init__()
        self._graph = graph
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._order: tuple[str, ...] = ()
        self._tensors: dict[str, str] = {}

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that the file declares."""
        return self._inputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs in the file."""
        return self._outputs

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output, or all of them in a tuple; inputs by position or by their names in the file.

        Raises:
            OptionError: an input is missing, or one is given that the graph does not have.
        """
        known: dict[str, Any] = self._bound(args, kwargs)
        for path in self._order:
            node: Any = self.get_submodule(path)
            made = node(*(known[name] for name in node._needs))
            values = made if isinstance(made, tuple) else (made,)
            known.update({n: v for n, v in zip(node._step.outputs, values, strict=False) if n})
            for name in node._done:
                known.pop(name, None)
        found = tuple(tensor(known[name]) for name in self._outputs)
        return found if len(found) > 1 else found[0]

    def held(self, name: str) -> Tensor:
        """The parameter or buffer that stands for an initializer of the file."""
        holder, _, local = self._tensors[name].rpartition(".")
        found: Tensor = getattr(self.get_submodule(holder), local)
        return found

    def _bound(self, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> dict[str, Any]:
        names = [i.name for i in self._inputs]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        strange = [n for n in kwargs if n not in names]
        missing = [n for n in names if n not in given]
        if strange or missing or len(args) > len(names):
            raise OptionError(
                f"the graph takes {', '.join(names)}; missing: {', '.join(missing) or 'none'}, not known: "
                f"{', '.join(strange) or 'none'}, {len(args)} by position."
            )
        return given


def example_inputs(
    module: OnnxModule, batch: int = 1, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Random inputs by name, as the graph declares them.

    Floating-point entries have mean 0 and variance 1; integers that look rows up are below the number of rows, others
    (as masks) are ones.

    Args:
        batch: size of a first axis that may have any.
        seed: of the numbers.
        sizes: of other such axes, by the names that the file gives them; default 8.

    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for one in module.inputs:
        shape = [n if isinstance(n, int) else (sizes or {}).get(str(n), _FREE) for n in one.shape]
        if one.shape and not isinstance(one.shape[0], int):
            shape[0] = (sizes or {}).get(str(one.shape[0]), batch)
        if one.dtype.is_floating_point:
            made[one.name] = torch.randn(shape, generator=generator).to(one.dtype)
        else:
            rows = _rows(module, one.name)
            made[one.name] = torch.randint(rows, shape, generator=generator) if rows else torch.ones(shape)
            made[one.name] = made[one.name].to(one.dtype)
    return made


def _rows(module: OnnxModule, name: str) -> int:
    """Rows of the smallest table that the input looks up; 0 where it does not."""
    found = [
        getattr(node, node._tensors[node._step.inputs[0]]).shape[0]
        for node in module.modules()
        if isinstance(node, Node) and node._step.op == "Gather" and node._step.inputs[1] == name
        if node._step.inputs[0] in node._tensors and not node._step.values.get("axis", 0)
    ]
    return min(found, default=0)
