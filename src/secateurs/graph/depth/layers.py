"""A decision on whole layers applied to a model: blocks that pass their input on, or a model without them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.cost import CostModel, Monomial
from ...core.depth import LayerGroup
from ...core.dims import Atom
from ...core.errors import FileError
from ..structure import Frozen
from ..twin import twin
from .stream import passed

__all__ = [
    "Edits",
    "LayerStructure",
    "drop",
    "layer_groups",
    "located",
    "original_paths",
    "pass_on",
    "renumbered",
    "skipped",
    "without",
]


@dataclass(frozen=True)
class Edits:
    """What else of a model follows when blocks go.

    Args:
        counted: for each integer that counts the blocks of a container (attributes from the model on, joined with
            dots, and `[i]` for an item of a list), that container.
        listed: the same for lists with an item for each block.
        numbered: for each container the attributes, from a block on, that hold a block's place among the others.
    """

    counted: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, str] = field(default_factory=dict)
    numbered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def joined(self, other: Edits) -> Edits:
        """Both together."""
        return Edits(
            {**self.counted, **other.counted}, {**self.listed, **other.listed}, {**self.numbered, **other.numbered}
        )


@dataclass(frozen=True)
class LayerStructure:
    """Which whole layers of a model can go: data, independent of the model object.

    Args:
        groups: the blocks that can go.
        passing: for each of them how its output is made of its input; see `stream.passed`.
        edits: what follows them.
        costs: parameters, MACs and bytes as functions of the blocks kept.
        frozen: blocks with a residual stream that stay, and why; the tensor is the path of the block.
        fingerprint: of the model's tensor names and shapes.
    """

    groups: tuple[LayerGroup, ...]
    passing: Mapping[str, Mapping[str, Any]]
    edits: Edits
    costs: CostModel
    frozen: tuple[Frozen, ...]
    fingerprint: str

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units of each group."""
        return {g.name: g.size for g in self.groups}

    @property
    def tensors(self) -> Mapping[str, Any]:
        """No tensor changes its shape."""
        return {}

    @property
    def unknown(self) -> Mapping[str, str]:
        """Nothing in a block needs to be understood for it to go whole."""
        return {}

    def gone(self, keep: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Paths of the blocks that `keep`, bool [units] by group, leaves out."""
        return tuple(block for g in self.groups if g.name in keep for block in g.gone(keep[g.name]))

    def restricted(self, blocks: Collection[str]) -> LayerStructure:
        """The structure in which only the blocks named can go."""
        left_out = [b for g in self.groups for b in g.blocks if b not in blocks]
        # What is left out stays, so that no container of it is empty.
        filled = {block.rpartition(".")[0] for block in left_out}
        groups = tuple(g for g in (_restricted(g, blocks, filled) for g in self.groups) if g.size)
        frozen = tuple(Frozen(block, 0, 1, "left out by scope or ignore") for block in left_out)
        return replace(self, groups=groups, frozen=self.frozen + frozen, costs=_fewer(self.costs, self.groups, groups))

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; the costs are kept beside it."""
        return {
            "depth": [vars(g) for g in self.groups],
            "passing": dict(self.passing),
            "edits": vars(self.edits),
            "frozen": [[f.tensor, f.axis, f.size, f.reason] for f in self.frozen],
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], costs: CostModel) -> LayerStructure:
        """The structure that `to_dict` wrote, whose costs a plan keeps.

        Raises:
            FileError: a field is missing or of the wrong form.
        """
        try:
            edits = data["edits"]
            numbered = {container: tuple(names) for container, names in edits["numbered"].items()}
            return cls(
                groups=layer_groups(data),
                passing=data["passing"],
                edits=Edits(edits["counted"], edits["listed"], numbered),
                costs=costs,
                frozen=tuple(Frozen(*f) for f in data["frozen"]),
                fingerprint=data["fingerprint"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"the structure of this plan cannot be read: {error}.") from error


def _restricted(group: LayerGroup, blocks: Collection[str], filled: Collection[str]) -> LayerGroup:
    """The group with only those of its units that are among `blocks`; all of them may go from `filled` containers."""
    kept = [(b, names) for b, names in zip(group.blocks, group.owned, strict=True) if b in blocks]
    return replace(
        group,
        blocks=tuple(b for b, _ in kept),
        owned=tuple(names for _, names in kept),
        least=0 if group.container in filled else group.least,
    )


def _fewer(costs: CostModel, before: Sequence[LayerGroup], after: Sequence[LayerGroup]) -> CostModel:
    """`costs` with those of the units that are no longer in a group among the rest."""
    atoms = {g.name: Atom(g.name, g.size) for g in after}
    lost = {g.name: g.size - (atoms[g.name].n if g.name in atoms else 0) for g in before}
    metrics = {}
    for metric, monomials in costs.metrics.items():
        each = {m.source: m.coefficient for m in monomials if m.dims}
        rest = sum(m.coefficient for m in monomials if not m.dims) + sum(lost[name] * c for name, c in each.items())
        units = [Monomial(c, (atoms[name],), name) for name, c in each.items() if name in atoms]
        metrics[metric] = (*units, Monomial(rest, (), "the rest"))
    return CostModel(metrics)


def layer_groups(data: Mapping[str, Any]) -> tuple[LayerGroup, ...]:
    """The groups in what `LayerStructure.to_dict` wrote."""
    return tuple(
        LayerGroup(g["name"], g["container"], tuple(g["blocks"]), tuple(map(tuple, g["owned"])), g["least"])
        for g in data["depth"]
    )


def skipped(model: nn.Module, structure: LayerStructure, keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` in which removed blocks pass their input on, and their parameters are zero."""
    gone = set(structure.gone(keep))
    own = dict(model.named_parameters())
    blocks = [pair for g in structure.groups for pair in zip(g.blocks, g.owned, strict=True)]
    owned = [name for block, names in blocks if block in gone for name in names]
    with torch.no_grad():
        masked = twin(model, {name: torch.zeros_like(own[name]) for name in owned})
    return pass_on(masked, structure.passing, gone)


def pass_on(
    model: nn.Module, passing: Mapping[str, Mapping[str, Any]], gone: Iterable[str], unread: Any = None
) -> nn.Module:
    """`model` itself, in which the blocks `gone` pass their input on."""
    for block in gone:
        model.get_submodule(block).forward = partial(passed, passing[block], unread)
    return model


def without(model: nn.Module, structure: LayerStructure, keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` without the removed blocks; those behind them move up, and what counts them follows."""
    gone = structure.gone(keep)
    # What goes is not copied first.
    memo = {id(model.get_submodule(block)): nn.Module() for block in gone}
    return drop(copy.deepcopy(model, memo), structure.edits, gone)


def drop(model: nn.Module, edits: Edits, gone: Collection[str]) -> nn.Module:
    """`model` itself without the blocks `gone`."""
    lost = _by_container(gone)
    containers = {path: model.get_submodule(path) for path in lost}
    for holder, name, value in _changes(model, edits, containers, lost):
        setattr(holder, name, value)
    for path, container in containers.items():
        names = renumbered(list(container._modules), lost[path])
        kept = {new: container._modules[old] for old, new in names.items()}
        container._modules.clear()
        container._modules.update(kept)
    return model


def renumbered(names: Sequence[str], gone: Collection[str]) -> dict[str, str]:
    """For each name that stays the one it has afterwards: where names differ only in a number, they close up.

    >>> renumbered(["stem", "block1", "block2", "block3"], ["block1"])
    {'stem': 'stem', 'block2': 'block1', 'block3': 'block2'}
    """
    series: dict[str, list[str]] = {}
    for name in names:
        series.setdefault(name.rstrip("0123456789"), []).append(name)
    free = {stem: iter(members) for stem, members in series.items()}
    return {name: next(free[name.rstrip("0123456789")]) for name in names if name not in gone}


def original_paths(model: nn.Module, gone: Iterable[str]) -> Callable[[str], str]:
    """A function from a path in `model` without the blocks `gone` to the path of the same module in `model`."""
    before = {
        path: {new: old for old, new in renumbered(list(model.get_submodule(path)._modules), names).items()}
        for path, names in _by_container(gone).items()
    }

    def original(path: str) -> str:
        found = ""
        for name in path.split("."):
            name = before.get(found, {}).get(name, name)
            found = f"{found}.{name}" if found else name
        return found

    return original


def _by_container(blocks: Iterable[str]) -> dict[str, list[str]]:
    """The names of `blocks` by the path of what holds them."""
    names: dict[str, list[str]] = {}
    for block in blocks:
        container, _, name = block.rpartition(".")
        names.setdefault(container, []).append(name)
    return names


def _changes(
    model: nn.Module, edits: Edits, containers: Mapping[str, nn.Module], lost: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Any, str, Any]]:
    """Each object, attribute and new value that follows."""
    for key, path in edits.counted.items():
        if path in lost:
            yield _counted(model, key, len(lost[path]))
    for key, path in edits.listed.items():
        if path in lost:
            holder, name = located(model, key)
            places = zip(getattr(holder, name), containers[path]._modules, strict=True)
            yield holder, name, type(getattr(holder, name))(v for v, child in places if child not in lost[path])
    for path, container in containers.items():
        before = 0
        for name, block in container._modules.items():
            before += name in lost[path]
            if before and name not in lost[path] and block is not None:
                yield from _numbered(block, edits.numbered.get(path, ()), before)


_ITEM = re.compile(r"(.*)\[(\d+)\]")


def _counted(model: nn.Module, key: str, fewer: int) -> tuple[Any, str, Any]:
    if item := _ITEM.fullmatch(key):
        holder, name = located(model, item[1])
        values = list(getattr(holder, name))
        values[int(item[2])] -= fewer
        return holder, name, type(getattr(holder, name))(values)
    holder, name = located(model, key)
    return holder, name, getattr(holder, name) - fewer


def _numbered(block: nn.Module, attributes: Iterable[str], before: int) -> Iterator[tuple[Any, str, Any]]:
    modules = dict(block.named_modules())
    for attribute in attributes:
        path, _, name = attribute.rpartition(".")
        if type(getattr(modules.get(path), name, None)) is int:
            yield modules[path], name, getattr(modules[path], name) - before


def located(model: nn.Module, key: str) -> tuple[Any, str]:
    """What holds the attribute that `key` (attributes from the model on, joined with dots) leads to, and its name."""
    *path, name = key.split(".")
    holder: Any = model
    for part in path:
        holder = getattr(holder, part)
    return holder, name
