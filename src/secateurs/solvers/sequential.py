"""One layer after the other, in the order of the forward pass: each is solved for the inputs that the solved ones give.

Memory is that of one level: the layers that read one tensor, such as the query, key and value of an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, device_of, leaves, move, split
from ..core.errors import DataError, ModelError
from .gram import Gram

__all__ = ["call_levels", "grams_of", "solve_in_order"]

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

    Args:
        model, data, names: see `solve_in_order`.
        full, dtype: see `Gram`.
        seen: per batch the bool mask [samples, tokens] of what counts, None for all; where the input of a layer has
            these axes first, what is padding is left out.
        outputs: whether the second result is made; it holds as much as the model returns on all batches.
    """
    grams = {name: Gram(full=full, dtype=dtype) for name in names}
    counts: Tensor | None = None

    def gather(name: str, module: nn.Module, given: Tensor) -> None:
        if counts is not None and given.shape[: counts.dim()] == counts.shape and given.dim() > counts.dim():
            given = given[counts.to(given.device)]
        grams[name].add(module, given)

    made: list[Any] = []
    with torch.no_grad(), _looking(model, dict.fromkeys(names, gather)):
        for number, batch in enumerate(data):
            counts = None if seen is None else seen[number]
            output = call(model, move(split(batch)[0], device_of(model)))
            if outputs:
                made.append(output)
    return grams, made


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
def _looking(model: nn.Module, visitors: Mapping[str, Visitor]) -> Iterator[None]:
    """Inside, each visitor is shown the first input tensor of every call of its layer."""
    model.eval()
    with ExitStack() as hooks:
        for name, visitor in visitors.items():

            def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name, visitor: Visitor = visitor) -> None:
                given = next(leaves((args, kwargs)), None)
                if given is not None:
                    visitor(name, module, given)

            handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield
