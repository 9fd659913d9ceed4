"""Experts stacked in one parameter: each is a matrix of its own, and its inputs are the tokens that are routed to it.

Mixtures hold their experts as [experts, outputs, inputs] or [experts, inputs, outputs], and no module is called for one
of them. A stack is a layer that is called by the name of its parameter; its parts, one an expert, are linear layers
whose weights are views of it. What they multiply is seen by watching the products of a running model: of one matrix
after the other, of all of them at once, or of rows that are grouped by expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import ModelError
from .blocks import weight_of

__all__ = [
    "Products",
    "input_axis",
    "is_stack",
    "joined",
    "layer_of",
    "parts_of",
    "plain_experts",
    "stack_at",
    "tensor_of",
    "whole",
]

# Which arguments of an op are the factors; what follows those of a grouped product are the ends of its groups.
_FACTORS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,
}
_CHOOSING = ("aten::index", "aten::index_select")
# Ways in which transformers multiplies by the stacks themselves; the others copy matrices, or leave PyTorch.
_PLAIN = (None, "eager", "grouped_mm")

Visit = Callable[[str, nn.Module, Tensor], None]


def is_stack(parameter: Tensor) -> bool:
    """Whether the parameter, which is no weight of a layer, has the shape of a stack of matrices."""
    return not nn.parameter.is_lazy(parameter) and parameter.dim() == 3 and min(parameter.shape) > 1


def stack_at(model: nn.Module, layer: str) -> nn.Parameter | None:
    """The parameter called `layer`; None if that is the name of a module."""
    path, _, leaf = layer.rpartition(".")
    try:
        return model.get_submodule(path)._parameters.get(leaf)
    except AttributeError:
        return None


def tensor_of(model: nn.Module, layer: str) -> str:
    """The name of the weight of `layer`: its own if it is a stack, see `weight_of` if it is a module."""
    return weight_of(layer) if stack_at(model, layer) is None else layer


def input_axis(model: nn.Module, stack: str) -> int:
    """The axis of the stack that inputs multiply: 2, or 1 where `is_transposed` of its module says so.

    Without a word from the module, of two stacks one of which takes what the other gives, the axis that is twice as
    long as the other's inputs holds a gate beside the values, and so is the axis of outputs. What is not told is 2.
    """
    owner = model.get_submodule(stack.rpartition(".")[0])
    declared = getattr(owner, "is_transposed", None)
    if isinstance(declared, bool):
        return 1 if declared else 2
    shapes = [tuple(p.shape) for p in owner._parameters.values() if p is not None and is_stack(p)]
    return 1 if _gated(shapes, 1) and not _gated(shapes, 2) else 2


def parts_of(model: nn.Module, layer: str) -> dict[str, nn.Module]:
    """Of a stack called `layer` the experts, as linear layers on views of it; of a module itself, under its name."""
    stack = stack_at(model, layer)
    if stack is None:
        return {layer: model.get_submodule(layer)}
    turned = input_axis(model, layer) == 1
    matrices = stack.detach().mT if turned else stack.detach()
    return {f"{layer}[{number}]": _linear(matrix) for number, matrix in enumerate(matrices)}


def layer_of(part: str) -> str:
    """The name of the stack that has a part of this name."""
    return re.sub(r"\[\d+\]$", "", part)


def whole(model: nn.Module, layer: str) -> nn.Module:
    """The module called `layer`; of a stack one that has it as its weight."""
    stack = stack_at(model, layer)
    if stack is None:
        return model.get_submodule(layer)
    made = nn.Module()
    made.register_parameter("weight", stack)
    return made


def joined(model: nn.Module, layer: str, masks: Sequence[Tensor]) -> Tensor:
    """The mask of the weight of `layer`, in its shape, from those of its parts."""
    if stack_at(model, layer) is None:
        return masks[0]
    together = torch.stack(list(masks))
    return together.mT.contiguous() if input_axis(model, layer) == 1 else together


class Products(TorchDispatchMode):
    """Inside, `visit(part, module, rows)` is called for each product of the model with the matrix of an expert.

    Args:
        model: that has the stacks.
        stacks: their names.
        visit: rows are [observations, inputs], without those that are exactly zero where all experts are given as many
            rows: such is a token that another expert has.

    Raises:
        ModelError: a stack is multiplied along its other axis.
    """

    def __init__(self, model: nn.Module, stacks: Iterable[str], visit: Visit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visit = visit
        self._parts = {name: list(parts_of(model, name).items()) for name in stacks}
        self._stacks = {name: model.get_parameter(name).detach() for name in stacks}
        self._axes = {name: input_axis(model, name) for name in stacks}
        self._counting: Tensor | None = None
        self._rows: Tensor | None = None

    def next_batch(self, counting: Tensor | None) -> None:
        """None; what follows is of another batch, of whose tokens those count that `counting` [tokens] says, or all.

        Rows are those tokens if the model has just picked as many of them, or if there are as many.
        """
        self._counting, self._rows = counting, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _FACTORS:
            left, right, *others = args[_FACTORS[name] :]
            ends = (kwargs or {}).get("offs", others[0] if others else None)
            self._look(left, right, ends if "grouped" in name else None)
        elif self._counting is not None and name in _CHOOSING:
            self._note_choice(args)
        return func(*args, **(kwargs or {}))

    def _look(self, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
        for name, stack in self._stacks.items():
            for given, factor in ((left, right), (right.mT, left.mT)):
                found = _place(factor, stack)
                if found is not None:
                    self._check_axis(name, found[1])
                    self._show(name, found[0], given, ends, factor.shape[0] if factor.dim() == 3 else 1)
                    return

    def _show(self, name: str, first: int, given: Tensor, ends: Tensor | None, matrices: int) -> None:
        if ends is not None:
            kept = self._kept(given)
            stops = ends.tolist()
            for number, (start, stop) in enumerate(zip([0, *stops], stops, strict=False), first):
                self._visit_rows(name, number, given[start:stop], kept if kept is None else kept[start:stop])
            return
        each = given if given.dim() == 3 else given[None]
        for number, rows in enumerate(each, first):
            kept = self._kept(rows)
            if matrices > 1:
                real = (rows != 0).any(1)
                kept = real if kept is None else kept & real
            # As it is, so that two stacks that are given one tensor can share what is known of it.
            self._visit_rows(name, number, given if given.dim() == 2 else rows, kept)

    def _visit_rows(self, name: str, number: int, rows: Tensor, kept: Tensor | None) -> None:
        rows = rows if kept is None or bool(kept.all()) else rows[kept]
        if len(rows):
            self._visit(*self._parts[name][number], rows)

    def _kept(self, rows: Tensor) -> Tensor | None:
        """Which of the rows count; None for all, also where it is not known which tokens they are."""
        if self._counting is None:
            return None
        counting = self._counting.to(rows.device)
        if self._rows is not None and len(self._rows) == len(rows):
            return counting[self._rows]
        return counting if len(counting) == len(rows) else None

    def _note_choice(self, args: Any) -> None:
        """None; remembers which tokens the model picks."""
        assert self._counting is not None
        table, chosen = args[0], args[-1]
        chosen = [one for one in chosen if one is not None] if isinstance(chosen, (list, tuple)) else [chosen]
        first = chosen[0]
        if len(chosen) == 1 and first.dim() == 1 and table.dim() == 2 and len(table) == len(self._counting):
            self._rows = first.nonzero()[:, 0] if first.dtype == torch.bool else first

    def _check_axis(self, name: str, axis: int) -> None:
        if axis == self._axes[name]:
            return
        told = "is_transposed = True" if axis == 1 else "is_transposed = False"
        raise ModelError(
            f"the inputs of {name} multiply its axis {axis}, not {self._axes[name]}: set {told} on the module that "
            "holds it, or leave it out with ignore=."
        )


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Inside, mixtures of transformers multiply by their stacks themselves, one expert after the other or grouped."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    copying = [config for config, way in before if way not in _PLAIN]
    try:
        for config in copying:
            config._experts_implementation = "eager"
        yield
    finally:
        # A config sets those inside it, too, which come after it.
        for config, way in before if copying else ():
            config._experts_implementation = way


def _gated(shapes: Sequence[tuple[int, ...]], inputs: int) -> bool:
    outputs = 3 - inputs
    return any(a[inputs] == b[outputs] and a[outputs] == 2 * b[inputs] for a in shapes for b in shapes)


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def _place(factor: Tensor, stack: Tensor) -> tuple[int, int] | None:
    """The first expert of which `factor`, [inputs, outputs] or a batch of such, is the matrix, and its axis of inputs.

    None if the factor is something else, or a part of a matrix.
    """
    offset = factor.data_ptr() - stack.data_ptr()
    if not 0 <= offset < stack.nbytes or factor.dtype != stack.dtype:
        return None
    expert, rest = divmod(offset // stack.itemsize, stack.stride(0))
    apart = factor.dim() == 3 and len(factor) > 1 and factor.stride(0) != stack.stride(0)
    if rest or apart:
        return None
    shape, strides = tuple(factor.shape[-2:]), tuple(factor.stride()[-2:])
    for inputs, outputs in ((2, 1), (1, 2)):
        same = shape == (stack.shape[inputs], stack.shape[outputs])
        if same and strides == (stack.stride(inputs), stack.stride(outputs)):
            return expert, inputs
    return None
