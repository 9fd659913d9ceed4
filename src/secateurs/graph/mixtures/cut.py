"""A decision on experts that are modules, or that Python walks through one by one: the cut, and what it must equal.

Removing an expert is not zeroing it: a router chooses among those that are left. So the reference of a proof is the
original in which the router's logits of the others are minus infinity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...core.cost import CostModel
from ...core.dims import Atom, Fixed
from ...core.errors import FileError
from ...core.experts import ExpertGroup
from ...core.units import Member
from ..compact import Reference, taken
from ..depth.layers import Edits, drop, located
from ..ops import base_name
from ..run import tensors_in
from ..structure import Frozen, substituted

__all__ = ["ExpertStructure", "Mixture", "expert_groups", "never_known", "without_experts"]


@dataclass(frozen=True)
class Mixture:
    """Experts, and what follows them.

    Args:
        group: the units.
        routers: those of the group's tensors by which the router computes its logits.
        numbers: integers that count the experts: attributes from the model on, joined with dots.
        numbered: attributes, from an expert on, that hold its place among the others.
        buffers: the axes of buffers that have a position for each.
    """

    group: ExpertGroup
    routers: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    buffers: tuple[Member, ...] = ()


@dataclass(frozen=True)
class ExpertStructure:
    """Which experts of a model can go: data, independent of the model object.

    Args:
        mixtures: the experts that can go, by router.
        costs: parameters, MACs and bytes as functions of the experts kept.
        frozen: what looks like experts and stays, and why.
        fingerprint: of the model's tensor names and shapes.
    """

    mixtures: tuple[Mixture, ...]
    costs: CostModel
    frozen: tuple[Frozen, ...]
    fingerprint: str

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        """The units, router by router."""
        return tuple(mixture.group for mixture in self.mixtures)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units of each group."""
        return {g.name: g.size for g in self.groups}

    @property
    def tensors(self) -> Mapping[str, Any]:
        """No tensor is understood axis by axis."""
        return {}

    @property
    def unknown(self) -> Mapping[str, str]:
        """Nothing that is done with experts needs to be understood for a whole one to go."""
        return {}

    def gone(self, keep: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Paths of the modules that `keep`, bool [units] by group, leaves out."""
        return tuple(block for g in self.groups if g.name in keep for block in g.gone(keep[g.name]))

    def restricted(self, names: Iterable[str]) -> ExpertStructure:
        """The structure in which only experts of the named groups can go."""
        live = set(names)
        out = [g for g in self.groups if g.name not in live]
        return ExpertStructure(
            tuple(m for m in self.mixtures if m.group.name in live),
            substituted(self.costs, {g.name: Fixed(g.size) for g in out}),
            (*self.frozen, *(Frozen(g.router, 0, g.size, "left out by scope or ignore") for g in out)),
            self.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; the costs are kept beside it."""
        return {
            "experts": [
                {
                    **vars(m.group),
                    "rows": _written(m.group.rows),
                    "buffers": _written(m.buffers),
                    "routers": m.routers,
                    "numbers": m.numbers,
                    "numbered": m.numbered,
                }
                for m in self.mixtures
            ],
            "frozen": [[f.tensor, f.axis, f.size, f.reason] for f in self.frozen],
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], costs: CostModel) -> ExpertStructure:
        """The structure that `to_dict` wrote, whose costs a plan keeps.

        Raises:
            FileError: a field is missing or of the wrong form.
        """
        try:
            mixtures = tuple(map(_mixture, data["experts"]))
            frozen = tuple(Frozen(*f) for f in data["frozen"])
            return cls(mixtures, costs, frozen, data["fingerprint"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"the structure of this plan cannot be read: {error}.") from error


def expert_groups(data: Mapping[str, Any]) -> tuple[ExpertGroup, ...]:
    """The groups in what `ExpertStructure.to_dict` wrote."""
    return tuple(_mixture(each).group for each in data["experts"])


def _written(rows: Iterable[Member]) -> list[list[Any]]:
    return [[row.tensor, row.axis, row.rank] for row in rows]


def _mixture(data: Mapping[str, Any]) -> Mixture:
    atom = Atom(data["name"], data["size"])
    rows, buffers = (tuple(Member(t, axis, atom, rank) for t, axis, rank in data[key]) for key in ("rows", "buffers"))
    routers, numbers, numbered = (tuple(data[key]) for key in ("routers", "numbers", "numbered"))
    blocks, owned = tuple(data["blocks"]), tuple(map(tuple, data["owned"]))
    group = ExpertGroup(atom.name, atom.n, blocks, owned, rows, data["least"])
    return Mixture(group, routers, numbers, numbered, buffers)


def without_experts(model: nn.Module, mixtures: Iterable[Mixture], keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` without the removed experts; those behind them move up, and what counts them follows."""
    less = [(m, keep[m.group.name]) for m in mixtures if m.group.name in keep and not bool(keep[m.group.name].all())]
    # What goes is not copied first.
    memo = {id(model.get_submodule(block)): nn.Module() for m, stays in less for block in m.group.gone(stays)}
    smaller = copy.deepcopy(model, memo)
    for mixture, stays in less:
        for row in (*mixture.group.rows, *mixture.buffers):
            _slice(smaller, row, stays)
        for key in mixture.numbers:
            holder, name = located(smaller, key)
            setattr(holder, name, int(stays.sum()))
        gone = mixture.group.gone(stays)
        numbered = {block.rpartition(".")[0]: mixture.numbered for block in gone}
        drop(smaller, Edits(numbered=numbered), gone)
    return smaller


def _slice(model: nn.Module, row: Member, stays: Tensor) -> None:
    path, _, name = row.tensor.rpartition(".")
    module = model.get_submodule(path)
    whole = getattr(module, name)
    keeps = [stays if axis == row.axis else torch.ones(n, dtype=torch.bool) for axis, n in enumerate(whole.shape)]
    less = taken(whole.detach(), keeps).clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(less, requires_grad=whole.requires_grad)
    else:
        module._buffers[name] = less


def never_known(mixtures: Iterable[Mixture], keep: Mapping[str, Tensor]) -> Reference:
    """A reference that runs the original as if no router knew the experts that `keep`, bool by group, leaves out."""
    gone = {name: ~keep[m.group.name] for m in mixtures if m.group.name in keep for name in m.routers}

    @contextmanager
    def running(model: nn.Module, module: Callable[[], str]) -> Iterator[None]:
        tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in gone}
        with _NeverKnown([(tensor, gone[name].to(tensor.device)) for name, tensor in tensors.items()]):
            yield

    def reference(model: nn.Module, module: Callable[[], str]) -> AbstractContextManager[Any]:
        return running(model, module)

    return reference


class _NeverKnown(TorchDispatchMode):
    """Puts minus infinity where a logit of an expert that goes is computed from the router's tensors."""

    def __init__(self, gone: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self._gone = {_memory(tensor): mask for tensor, mask in gone}
        self._alive: list[Tensor] = [tensor for tensor, _ in gone]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = [self._gone[key] for t in tensors_in((*args, *kwargs.values())) if (key := _memory(t)) in self._gone]
        made = func(*args, **kwargs)
        for tensor in tensors_in(made) if masks else ():
            if _memory(tensor) in self._gone:
                continue
            if base_name(func) in _COPIES:
                self._gone[_memory(tensor)] = masks[0]
                self._alive.append(tensor)
            elif tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == len(masks[0]):
                tensor.masked_fill_(masks[0], -torch.inf)
        return made


# Ops that give a tensor of a router in another form, of which logits are then computed.
_COPIES = frozenset({"_to_copy", "clone"})


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
