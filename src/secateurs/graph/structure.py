"""What of a model can go, as data: coupled groups, costs, and the integers to mend after a cut."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..core.cost import CostModel
from ..core.dims import Atom, Dim, Fixed, atoms, kept, parse, substitute
from ..core.errors import FileError
from ..core.units import ChannelGroup, Group, Member
from .records import Doubted
from .twin import named_tensors

__all__ = ["Frozen", "Structure", "fingerprint", "long_names", "short_names", "substituted"]


@dataclass(frozen=True)
class Frozen:
    """A width that stays as it is.

    Args:
        tensor, axis: where it was met first.
        size: number of positions.
        reason: why it stays, with the op and the module that decided it.
    """

    tensor: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Structure:
    """The shape algebra's result: data, independent of the model object.

    Args:
        groups: what can go, in the order of the forward pass.
        tensors: for each parameter and buffer that a cut can change, what each axis is made of.
        edits: for each module integer (`path.attribute` or `path.attribute[i]`) the dimension it must equal.
        costs: parameters, MACs (for the example inputs) and bytes as functions of the units kept.
        frozen: the widths that stay, and why.
        unknown: ops without a rule and a module that calls each.
        fingerprint: of the model's tensor names and shapes.
        doubted: the ops that a proof runs on what is kept, since zeroing is not removing there.
        recorded: for modules that a cut replaces by a recording of their code, by path: see `traced.TracedForward`.
        numbers: for attributes that hold ids of rows of an embedding, as `path.attribute`, the group of those rows.
        outputs: of outputs of the model that have such rows along an axis, what their axes are made of, by number.
    """

    groups: tuple[ChannelGroup, ...]
    tensors: Mapping[str, tuple[Dim, ...]]
    edits: Mapping[str, Dim]
    costs: CostModel
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    fingerprint: str
    doubted: tuple[Doubted, ...] = ()
    recorded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[int, tuple[Dim, ...]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units of each group."""
        return {g.name: g.size for g in self.groups}

    def kept_ids(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ids that a decision keeps, by the place of the inputs that hold them: int64, ascending.

        Args:
            keep: bool [units] for each group; a group without one stays whole.
        """
        cut = {g.name: keep[g.name].cpu() for g in self.groups if g.inputs and g.name in keep}
        return {p: cut[g.name].nonzero().flatten() for g in self.groups if g.name in cut for p in g.inputs}

    def with_staying(self, ids: Iterable[int]) -> Structure:
        """The structure in which these rows of every embedding that has as many stay, too."""
        wanted = set(ids)

        def staying(group: ChannelGroup) -> ChannelGroup:
            stays = tuple(sorted({*group.stays, *(i for i in wanted if 0 <= i < group.size)}))
            return replace(group, stays=stays, least=max(group.least, len(stays)))

        return replace(self, groups=tuple(staying(g) if wanted and g.kind == "embedding" else g for g in self.groups))

    def kept_outputs(self, keep: Mapping[str, Tensor]) -> dict[int, list[Tensor]]:
        """Of outputs with such rows along an axis, by number, bool masks of what a decision keeps, one an axis."""
        return {number: [kept(dim, keep) for dim in dims] for number, dims in self.outputs.items()}

    def restricted(self, names: Iterable[str]) -> Structure:
        """The structure in which only the named groups can go."""
        live = set(names)
        known = self._with({g.name: Fixed(g.size) for g in self.groups if g.name not in live})
        left_out = tuple(
            Frozen(g.members[0].tensor, g.members[0].axis, g.size, "left out by scope or ignore")
            for g in self.groups
            if g.name not in live
        )
        return replace(
            known,
            groups=tuple(g for g in known.groups if g.name in live),
            tensors={n: dims for n, dims in known.tensors.items() if any(True for d in dims for _ in atoms(d))},
            edits={k: d for k, d in known.edits.items() if any(True for _ in atoms(d))},
            frozen=self.frozen + left_out,
            doubted=tuple(op for op in known.doubted if op.live),
            numbers={key: name for key, name in known.numbers.items() if name in live},
            outputs={n: dims for n, dims in known.outputs.items() if any(True for d in dims for _ in atoms(d))},
        )

    def _with(self, known: Mapping[str, Dim]) -> Structure:
        """The structure with dimensions in the place of atoms, by name."""
        return replace(
            self,
            groups=tuple(
                replace(g, members=tuple(replace(m, dim=substitute(m.dim, known)) for m in g.members))
                for g in self.groups
            ),
            tensors={name: tuple(substitute(d, known) for d in dims) for name, dims in self.tensors.items()},
            edits={key: substitute(dim, known) for key, dim in self.edits.items()},
            costs=substituted(self.costs, known),
            doubted=tuple(op.mapped(lambda dim: substitute(dim, known)) for op in self.doubted),
            outputs={n: tuple(substitute(d, known) for d in dims) for n, dims in self.outputs.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The structure as plain JSON values; dimension types in their notation, the groups in them as `g0`, `g1` …"""
        short = self._with(short_names(self.groups))
        return {
            "fingerprint": self.fingerprint,
            "doubted": [_doubted_to_list(op) for op in short.doubted],
            "recorded": dict(self.recorded),
            "numbers": dict(self.numbers),
            "outputs": {str(n): [str(d) for d in dims] for n, dims in short.outputs.items()},
            "groups": [_group_to_dict(g) for g in short.groups],
            "tensors": {name: [str(d) for d in dims] for name, dims in short.tensors.items()},
            "edits": {key: str(dim) for key, dim in short.edits.items()},
            "costs": short.costs.to_dict(),
            "frozen": [[f.tensor, f.axis, f.size, f.reason] for f in self.frozen],
            "unknown": dict(self.unknown),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Structure:
        """The structure that `to_dict` wrote.

        Raises:
            FileError: a field is missing or of the wrong form.
        """
        try:
            sizes = {f"g{i}": g["size"] for i, g in enumerate(data["groups"])}
            short = cls(
                groups=tuple(_group_from_dict(g, sizes) for g in data["groups"]),
                tensors={n: tuple(parse(d, sizes) for d in dims) for n, dims in data["tensors"].items()},
                edits={k: parse(d, sizes) for k, d in data["edits"].items()},
                costs=CostModel.from_dict(data["costs"], sizes),
                frozen=tuple(Frozen(*f) for f in data["frozen"]),
                unknown=dict(data["unknown"]),
                fingerprint=data["fingerprint"],
                doubted=tuple(_doubted_from_list(op, sizes) for op in data.get("doubted", ())),
                recorded=data.get("recorded", {}),
                numbers=data.get("numbers", {}),
                outputs={int(n): tuple(parse(d, sizes) for d in dims) for n, dims in data.get("outputs", {}).items()},
            )
            return short._with(long_names(short.groups))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"the structure of this plan cannot be read: {error}.") from error


def short_names(groups: Sequence[Group]) -> dict[str, Dim]:
    """For each group's name an atom that can be told from a number and an operator in the notation of dimensions."""
    return {g.name: Atom(f"g{i}", g.size) for i, g in enumerate(groups)}


def long_names(groups: Sequence[Group]) -> dict[str, Dim]:
    """The inverse of `short_names`."""
    return {f"g{i}": Atom(g.name, g.size) for i, g in enumerate(groups)}


def substituted(costs: CostModel, known: Mapping[str, Dim]) -> CostModel:
    """`costs` with dimensions in the place of atoms, by name."""
    return CostModel(
        {
            metric: tuple(replace(m, dims=tuple(substitute(d, known) for d in m.dims)) for m in monomials)
            for metric, monomials in costs.metrics.items()
        }
    )


def _doubted_to_list(op: Doubted) -> list[Any]:
    sides = [[[str(dim) for dim in dims] for dims in side] for side in (op.inputs, op.outputs)]
    into = [[None if dim is None else str(dim) for dim in op.into]] if op.into else []
    return [op.module, op.name, op.nth, *sides, *into]


def _doubted_from_list(data: Sequence[Any], sizes: Mapping[str, int]) -> Doubted:
    module, name, nth, inputs, outputs, *more = data
    given, made = (tuple(tuple(parse(d, sizes) for d in dims) for dims in side) for side in (inputs, outputs))
    into = tuple(None if d is None else parse(d, sizes) for d in (more[0] if more else ()))
    return Doubted(module, name, nth, given, made, into)


def _group_to_dict(group: ChannelGroup) -> dict[str, Any]:
    members = [[m.tensor, m.axis, str(m.dim), m.rank, m.role] for m in group.members]
    data = {"name": group.name, "size": group.size, "kind": group.kind, "members": members}
    given = {"multiple": group.multiple, "least": group.least}
    lists = {"stays": list(group.stays), "inputs": list(group.inputs)}
    return data | {key: number for key, number in given.items() if number != 1} | {k: v for k, v in lists.items() if v}


def _group_from_dict(data: Mapping[str, Any], sizes: Mapping[str, int]) -> ChannelGroup:
    members = tuple(Member(t, a, parse(d, sizes), rank, role) for t, a, d, rank, role in data["members"])
    limits = {key: data[key] for key in ("multiple", "least") if key in data}
    limits |= {key: tuple(data[key]) for key in ("stays", "inputs") if key in data}
    return ChannelGroup(data["name"], data["size"], data["kind"], members, **limits)


def fingerprint(model: nn.Module, without: Container[str] = ()) -> str:
    """A digest of the names and shapes of a model's parameters and buffers: equal for models a plan fits.

    Args:
        without: names of those that are left out.
    """
    text = ";".join(sorted(f"{name}{tuple(t.shape)}" for name, t in named_tensors(model) if name not in without))
    return hashlib.sha256(text.encode()).hexdigest()
