"""Experts that are modules, watched while a model runs: how many tokens each is given, and what it adds to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.batch import call, device_of, double, leaves, move, split
from ..core.experts import ExpertGroup
from .preserve import preserved

__all__ = ["Watched", "watch"]


@dataclass
class Watched:
    """Of each expert the tokens given to it, and what it added to them: float64 [experts].

    Args:
        total: all tokens that the router saw.
        weighed: of how many outputs of experts the product with their weights was seen, and of how many not.
    """

    tokens: Tensor
    added: Tensor
    total: int = 0
    weighed: list[bool] = field(default_factory=list)


def watch(model: nn.Module, groups: Sequence[ExpertGroup], data: Sequence[Any], seed: int) -> dict[str, Watched]:
    """What is seen of the experts of each group, by its name, while `model` runs on `data`."""
    watcher = _Watcher(model, groups)
    with preserved(model, seed=seed), torch.no_grad(), ExitStack() as hooks:
        for group in groups:
            for number, block in enumerate(group.blocks):
                handle = model.get_submodule(block).register_forward_hook(watcher.left(group.name, number))
                hooks.callback(handle.remove)
        for batch in data:
            with watcher:
                call(model, move(split(batch)[0], device_of(model)))
            watcher.settle()
    return watcher.found


@dataclass(frozen=True)
class _Made:
    """What an expert made, not yet weighed."""

    group: str
    number: int
    output: Tensor


class _Watcher(TorchDispatchMode):
    """Counts the router's tokens, and looks for the product of what each expert makes with one weight a token."""

    def __init__(self, model: nn.Module, groups: Sequence[ExpertGroup]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self._routers = {_memory(model.get_parameter(g.router)): g for g in groups}
        self._open: dict[int, _Made] = {}
        zeros = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
        self.found = {name: Watched(each, each.clone()) for name, each in zeros.items()}

    def left(self, group: str, number: int) -> Callable[..., None]:
        """A forward hook of an expert."""

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            made = next(leaves(output))
            self.found[group].tokens[number] += made[..., 0].numel()
            self._open[_memory(made)] = _Made(group, number, made)

        return look

    def settle(self) -> None:
        """After a run: what has not been weighed will not be."""
        for made in self._open.values():
            self.found[made.group].weighed.append(not made.output.numel())
        self._open.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            for tensor in leaves(args):
                self._count(tensor, result)
        if func.overloadpacket is torch.ops.aten.mul and all(isinstance(a, Tensor) for a in args[:2]):
            self._weigh(args[0], args[1], result)
        return result

    def _count(self, tensor: Tensor, made: Tensor) -> None:
        group = self._routers.get(_memory(tensor))
        if group is not None and _memory(made) != _memory(tensor) and made.dim() and made.shape[-1] == group.size:
            self.found[group.name].total += made[..., 0].numel()

    def _weigh(self, one: Tensor, other: Tensor, product: Tensor) -> None:
        for output, weight in ((one, other), (other, one)):
            made = self._open.get(_memory(output))
            # A weight may be that of a single token; one of several numbers for a token is none.
            if made is not None and output.shape == product.shape and (not weight.dim() or weight.shape[-1] == 1):
                del self._open[_memory(output)]
                found = self.found[made.group]
                found.weighed.append(True)
                found.added[made.number] += float(double(product).norm(dim=-1).sum())
                return


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
