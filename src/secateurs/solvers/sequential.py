"""One layer after the other, in the order of the forward pass: each is solved for the inputs that the solved ones give.

Memory is that of one level: the layers that read one tensor, such as the query, key and value of an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Call, call, device_of, leaves, move, run, split
from ..core.errors import DataError, ModelError
from .gram import Gram, is_hf_conv1d
from .stacks import Products, layer_of, parts_of, plain_experts, stack_at

__all__ = ["call_levels", "grams_of", "recorded", "solve_in_order"]

Visitor = Callable[[str, nn.Module, Tensor], None]
Solve = Callable[[str, nn.Module, Gram], None]


def solve_in_order(model: nn.Module, data: Iterable[Any], names: Sequence[str], solve: Solve) -> None:
    """Calls `solve(name, module, gram)` once for each layer named; it changes the layer's weight in place.

    The data is run once for each level, through the layers as they are by then, in evaluation mode.

    Args:
        model: a copy that may be changed.
        data: batches as in `core.batch`, gone through several times; labels are not needed.
        names: of modules whose inputs have a `Gram`.
        solve: gets the second moments of the layer's inputs.

    Raises:
        DataError: there is no batch.
        ModelError: a layer is never called on this data.
    """
    for level in call_levels(model, data, names):
        for name, gram in grams_of(model, data, level)[0].items():
            solve(name, model.get_submodule(name), gram)


def grams_of(
    model: nn.Module,
    data: Iterable[Any],
    names: Sequence[str],
    *,
    full: bool = True,
    dtype: torch.dtype = torch.float64,
    seen: Sequence[Tensor | None] | None = None,
    outputs: bool = False,
) -> tuple[dict[str, Gram], list[Any]]:
    """The `Gram` of each layer named over one run of the data, and the outputs of the model if they are wanted.

    Of a layer that is a stack each part has one of its own, by the names that `parts_of` gives.

    Args:
        model, data, names: see `solve_in_order`.
        full, dtype: see `Gram`.
        seen: per batch the bool mask [samples, tokens] of what counts, None for all; where the input of a layer has
            these axes first, what is padding is left out, and of what an expert is given where its tokens are known.
        outputs: whether the second result is made; it holds as much as the model returns on all batches.
    """
    shared = _Shared(lambda: Gram(full=full, dtype=dtype))
    counts: Tensor | None = None

    def gather(name: str, module: nn.Module, given: Tensor) -> None:
        kept = given
        if counts is not None and given.shape[: counts.dim()] == counts.shape and given.dim() > counts.dim():
            kept = given[counts.to(given.device)]
        shared.add(name, module, given, kept)

    made: list[Any] = []
    with torch.no_grad(), _looking(model, dict.fromkeys(names, gather)) as products:
        for number, batch in enumerate(data):
            counts = None if seen is None else seen[number]
            if products is not None:
                products.next_batch(None if counts is None else counts.flatten())
            output = run(model, move(split(batch)[0], device_of(model)))
            shared.next_batch()
            if outputs:
                made.append(output)
    every = [part for name in names for part in parts_of(model, name)]
    return {part: shared.grams.get(part) or Gram(full=full, dtype=dtype) for part in every}, made


def recorded(model: nn.Module, name: str, data: Iterable[Any]) -> list[Call]:
    """What the module called `name` is given on each batch: one call after the other; "" is the model itself."""
    found: list[Call] = []

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(Call(args, kwargs))

    handle = model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in data:
                call(model, move(split(batch)[0], device_of(model)))
    finally:
        handle.remove()
    return found


class _Shared:
    """The `Gram` of each layer, one for all linear layers that are given the same tensor on every batch."""

    def __init__(self, make: Callable[[], Gram]) -> None:
        self._make = make
        self.grams: dict[str, Gram] = {}
        # The tensors of this batch, held so that no later one has the identity of one that is gone.
        self._given: list[tuple[Tensor, str]] = []
        self._first = True
        self._leader: dict[str, str] = {}

    def next_batch(self) -> None:
        """None; the next call is of another batch."""
        self._given.clear()
        self._first = False

    def add(self, name: str, module: nn.Module, given: Tensor, kept: Tensor) -> None:
        """None; `kept`, of what the layer is given, is in its `Gram`."""
        if self._first and name not in self._leader:
            same = (leader for tensor, leader in self._given if tensor is given) if _rowwise(module) else iter(())
            self._leader[name] = next(same, name)
        leader = self._leader.setdefault(name, name)
        if leader == name:
            self.grams.setdefault(name, self._make()).add(module, kept)
            self._given.append((given, name))
        elif any(tensor is given for tensor, other in self._given if other == leader):
            self.grams[name] = self.grams[leader]
        else:
            raise ModelError(
                f"{name} and {leader} read one tensor on the first batch and two on a later one: solve them apart, "
                "with scope=."
            )


def _rowwise(module: nn.Module) -> bool:
    """Whether the columns of the module's input are those of any other such module."""
    return isinstance(module, nn.Linear) or is_hf_conv1d(module)


def call_levels(model: nn.Module, data: Iterable[Any], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers named in the order of their first call; those that are called next on the same tensor stand together.

    Args:
        model, data, names: see `solve_in_order`; batches are read until each layer was called.

    Raises:
        DataError, ModelError: see `solve_in_order`.
    """
    levels: list[list[str]] = []
    unseen = dict.fromkeys(names)
    last: list[Tensor] = []
    empty = True

    def note(name: str, module: nn.Module, given: Tensor) -> None:
        name = name if name in names else layer_of(name)
        if name not in unseen:
            return
        del unseen[name]
        if last and last[-1] is given:
            levels[-1].append(name)
        else:
            levels.append([name])
        # Held, so that no later tensor can have its identity.
        last[:] = [given]

    for number, batch in enumerate(data):
        if number and not unseen:
            break
        empty = False
        _run(model, [batch], dict.fromkeys(tuple(unseen), note))
    if empty:
        raise DataError("the calibration data is empty: at least one batch is needed.")
    if unseen:
        raise ModelError(
            f"no call of {', '.join(list(unseen)[:3])} was seen on the calibration data, so there is nothing to solve "
            "by: give more data, or leave these layers out with ignore=."
        )
    return [tuple(level) for level in levels]


@torch.no_grad()
def _run(model: nn.Module, data: Iterable[Any], visitors: Mapping[str, Visitor]) -> None:
    with _looking(model, visitors):
        for batch in data:
            call(model, move(split(batch)[0], device_of(model)))


@contextmanager
def _looking(model: nn.Module, visitors: Mapping[str, Visitor]) -> Iterator[Products | None]:
    """Inside, each visitor is shown the first input tensor of every call of its layer, or of a part of it.

    Yields what watches the stacks among them.
    """
    model.eval()
    stacks = {name: visitor for name, visitor in visitors.items() if stack_at(model, name) is not None}
    with ExitStack() as hooks:
        for name, visitor in visitors.items():
            if name in stacks:
                continue

            def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name, visitor: Visitor = visitor) -> None:
                given = next(leaves((args, kwargs)), None)
                if given is not None:
                    visitor(name, module, given)

            handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        if not stacks:
            yield None
            return
        hooks.enter_context(plain_experts(model))
        products = Products(model, stacks, lambda part, *seen: stacks[layer_of(part)](part, *seen))
        with products:
            yield products
