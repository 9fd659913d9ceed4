"""Which whole experts of a model can go where Python walks through them one by one, found from runs of it.

What Python does with a router's choice cannot be followed op by op. So experts are looked for where they may be
(modules of one kind in a list or dictionary, or matrices [experts, …, …], beside a router with as many rows), some are
removed, and the model must then compute what the original does when its router has never known those. What does not
is left alone, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batch import call, device_of, move
from ...core.cost import CostModel, Monomial
from ...core.dims import Atom
from ...core.errors import ProofError
from ...core.experts import ExpertGroup
from ...core.units import Member
from ..compact import Reference, as_is
from ..cut import prove
from ..depth.counted import numbering
from ..depth.layers import original_paths
from ..mend import matching_attributes
from ..run import output_tensors, running
from ..structure import Frozen, fingerprint
from ..twin import named_tensors, shared_twin
from .cut import ExpertStructure, Mixture, never_known, without_experts

__all__ = ["infer_experts"]

# Numbers beside experts that are none of all experts.
_OTHERS = ("tok", "top", "shared", "active", "select", "capacity")
_NO_ROUTER = "no tensor beside them has a row for each, as a router's has"
_NO_EFFECT = "nothing that the model computes on these inputs depends on which of them the router knows"
# Sets of attributes that are tried as counts of experts.
_MOST_TRIES = 12
# Where the text of a failed proof goes on with what it means for a cut.
_ALLOWED = " (allowed"


def infer_experts(model: nn.Module, example_inputs: Any, macs: Callable[[nn.Module], float]) -> ExpertStructure:
    """Which experts of `model` can go; the model is not changed.

    Args:
        model: any module whose forward runs on the example inputs, with values.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        macs: those of a model on these inputs.
    """
    waiting = list(_candidates(model))
    found: list[Mixture] = []
    reasons: dict[str, Frozen] = {}
    bench = _Bench(model, example_inputs)
    while waiting:
        inner = [c for c in waiting if not any(_around(c, other) for other in waiting if other is not c)]
        kept, why = bench.tried(inner)
        found += kept
        # Lists of modules without a router are many, and few are of experts.
        told = [c for c in inner if c.name in why and (why[c.name] != _NO_ROUTER or "expert" in c.name)]
        reasons.update({c.name: Frozen(c.name, 0, c.size, why[c.name]) for c in told})
        names = {m.group.name for m in found}
        waiting = [c for c in waiting if c not in inner and not any(_inside(n, c.path) for n in names)]
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    found.sort(key=lambda m: order.get(m.group.name, -1))
    costs = _costs(model, found, macs)
    return ExpertStructure(tuple(found), costs, tuple(reasons.values()), fingerprint(model))


# -- where experts may be ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """What may be experts: their modules, or `stacks` [experts, …, …], and around them what may be routers."""

    path: str
    size: int
    blocks: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    routers: tuple[tuple[Member, ...], ...] = ()
    around: str = ""
    number: int = 1

    @property
    def name(self) -> str:
        """That of the group; one path may have stacks for mixtures of several sizes."""
        return (self.path or "model") + (f"#{self.number}" if self.number > 1 else "")


def _around(outer: _Candidate, inner: _Candidate) -> bool:
    return outer.path != inner.path and _inside(inner.path, outer.path)


def _inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _chain(path: str) -> Iterator[str]:
    """The path, and those of the modules around it, nearest first; the model is the last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    for path, module in model.named_modules():
        full = {f"{path}.{name}": m for name, m in module.named_children() if next(m.parameters(), None) is not None}
        if path and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _alike(list(full.values())):
            blocks = tuple(full)
            yield _with_routers(model, _Candidate(path, len(blocks), blocks))
    stacks: dict[tuple[str, int], list[str]] = {}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        if parameter.dim() == 3 and parameter.shape[0] > 1 and not _of_torch(model.get_submodule(path)):
            around = next((p for p in _chain(path) if _routers(model, p, parameter.shape[0], ())), None)
            if around is not None:
                stacks.setdefault((around, parameter.shape[0]), []).append(name)
    numbers: Counter[str] = Counter()
    for (path, size), names in stacks.items():
        numbers[path] += 1
        yield _with_routers(model, _Candidate(path, size, stacks=tuple(names), number=numbers[path]))


def _alike(modules: Sequence[nn.Module]) -> bool:
    """Whether there are several modules of one class with parameters of the same names and shapes."""
    forms = [(type(m), [(name, p.shape) for name, p in m.named_parameters()]) for m in modules]
    return len(modules) > 1 and all(form == forms[0] for form in forms)


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _with_routers(model: nn.Module, candidate: _Candidate) -> _Candidate:
    """The candidate with what may be its router in the nearest module around it that has any."""
    for around in _chain(candidate.path):
        if found := _routers(model, around, candidate.size, (*candidate.blocks, *candidate.stacks)):
            return replace(candidate, routers=found, around=around)
    return candidate


def _routers(model: nn.Module, around: str, size: int, without: Sequence[str]) -> tuple[tuple[Member, ...], ...]:
    """What may be a router's: for each module with a matrix for it, and for all of them, the axes of that size."""
    members: dict[str, list[Member]] = {}
    for name, tensor in named_tensors(model.get_submodule(around)):
        name = f"{around}.{name}" if around else name
        if tensor.is_floating_point() and not any(_inside(name, path) for path in without):
            owner = name.rpartition(".")[0]
            axis = _axis(tensor, size, own=not _of_torch(model.get_submodule(owner)))
            if axis is not None:
                members.setdefault(owner, []).append(Member(name, axis, Atom("", size), tensor.dim()))
    each = [tuple(m) for m in members.values() if any(member.rank == 2 for member in m)]
    return tuple(each) if len(each) < 2 else (*each, tuple(member for m in each for member in m))


def _axis(tensor: Tensor, size: int, own: bool) -> int | None:
    """The axis of a router's tensor that runs over the experts; matrices of a module's own may be [inputs, experts]."""
    if tensor.dim() in (1, 2) and tensor.shape[0] == size:
        return 0
    return 1 if own and tensor.dim() == 2 and tensor.shape[1] == size else None


# -- trying ------------------------------------------------------------------------------------------------------------


class _Bench:
    """A model on which experts are removed for a trial."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model = model
        self._inputs = example_inputs
        self._held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def tried(self, candidates: Sequence[_Candidate]) -> tuple[list[Mixture], dict[str, str]]:
        """The candidates that are experts, and why the others stay: all at once or, where that fails, singly."""
        reasons = {c.name: why for c in candidates if (why := self._obstacle(c))}
        possible = [c for c in candidates if c.name not in reasons]
        if len(possible) > 1:
            together = self._settled([self._variants(c)[0] for c in possible])
            if not isinstance(together, str):
                return together, reasons
        kept: list[Mixture] = []
        for candidate in possible:
            found = self._single(candidate)
            if isinstance(found, str):
                reasons[candidate.name] = found
            else:
                kept.append(found)
        return kept, reasons

    def _obstacle(self, candidate: _Candidate) -> str:
        if not candidate.routers:
            return _NO_ROUTER
        if any(t.is_meta for _, t in named_tensors(self._model)):
            return "the model has no values to try it with"
        owned = [p for block in candidate.blocks for p in self._model.get_submodule(block).parameters()]
        return "other modules share their parameters" if any(self._held[id(p)] > 1 for p in owned) else ""

    def _single(self, candidate: _Candidate) -> Mixture | str:
        reason = ""
        for variant in self._variants(candidate)[:_MOST_TRIES]:
            settled = self._settled([variant])
            if not isinstance(settled, str):
                return settled[0]
            reason = reason or settled
        return reason

    def _settled(self, mixtures: Sequence[Mixture]) -> list[Mixture] | str:
        """The mixtures with the fewest experts that each must keep, or why they are none."""
        if why := self._difference(mixtures, _all_but_first(mixtures)):
            return why
        most = max(m.group.size for m in mixtures) - 1
        least = next((n for n in range(1, most) if not self._difference(mixtures, _last(mixtures, n))), most)
        every_other = {m.group.name: _every_other(m.group.size, least) for m in mixtures}
        if why := self._difference(mixtures, every_other):
            return why
        whole = self._outputs(as_is)
        trials = (_last(mixtures, least), _all_but_first(mixtures), every_other)
        if not all(any(self._matters(m, keep, whole) for keep in trials) for m in mixtures):
            return _NO_EFFECT
        return [replace(m, group=replace(m.group, least=min(least, m.group.size - 1))) for m in mixtures]

    def _matters(self, mixture: Mixture, keep: Mapping[str, Tensor], whole: Sequence[Tensor]) -> bool:
        """Whether it makes a difference that the router does not know some; else they may not have run at all."""
        some = self._outputs(never_known([mixture], keep))
        return len(some) != len(whole) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(whole, some, strict=True)
        )

    def _outputs(self, reference: Reference) -> list[Tensor]:
        model = shared_twin(self._model)
        with running(model) as module, reference(model, module), torch.random.fork_rng([]):
            torch.manual_seed(0)
            return [t.clone() for t in output_tensors(call(model, move(self._inputs, device_of(model))))]

    def _difference(self, mixtures: Sequence[Mixture], keep: Mapping[str, Tensor]) -> str:
        """In what a model without some experts differs from one whose routers never knew them; empty if it does not."""
        gone = [block for m in mixtures for block in m.group.gone(keep[m.group.name])]
        try:
            smaller = without_experts(self._model, mixtures, keep)
            reference, original = never_known(mixtures, keep), original_paths(self._model, gone)
            prove(self._model, smaller, self._inputs, reference, original)
        except ProofError as error:
            return _words(error)
        except Exception as error:  # noqa: BLE001  (the model's code may raise anything at logits without a number)
            return f"the router cannot do without one: {type(error).__name__}: {_line(error)}"
        return ""

    def _variants(self, candidate: _Candidate) -> list[Mixture]:
        """What may follow, likeliest first: which tensors are the router's, which others and which numbers go along.

        Where tensors of the modules around have a place for each expert, these go along, also those that only training
        looks at, such as a count of the tokens.
        """
        named = self._numbers(candidate, named=True)
        every = self._numbers(candidate, named=False)
        counts = list(dict.fromkeys([named, *((*named, key) for key in every if key not in named), every]))
        return [
            self._mixture(candidate, rows, along, numbers)
            for numbers in counts
            for rows in candidate.routers
            for along in dict.fromkeys((self._beside(candidate, rows), ()))
        ]

    def _beside(self, candidate: _Candidate, rows: Sequence[Member]) -> tuple[Member, ...]:
        """The tensors with a place for each, but for `rows`, of the modules that hold the experts or the router."""
        known = {*(r.tensor for r in rows), *candidate.stacks}
        found: dict[str, Member] = {}
        for path in dict.fromkeys((candidate.around, candidate.path, *(r.tensor.rpartition(".")[0] for r in rows))):
            module = self._model.get_submodule(path)
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                key = f"{path}.{name}" if path else name
                if key not in known and tensor.dim() and tensor.shape[0] == candidate.size:
                    found[key] = Member(key, 0, Atom(candidate.name, candidate.size), tensor.dim())
        return tuple(found.values())

    def _mixture(
        self, candidate: _Candidate, rows: Sequence[Member], along: Sequence[Member], numbers: tuple[str, ...]
    ) -> Mixture:
        atom = Atom(candidate.name, candidate.size)
        own = [Member(name, 0, atom, 3) for name in candidate.stacks]
        owned = tuple(
            tuple(f"{block}.{name}" for name, _ in self._model.get_submodule(block).named_parameters())
            for block in candidate.blocks
        )
        rows = [replace(row, dim=atom) for row in rows]
        learnt = {name for name, _ in self._model.named_parameters()}
        group = ExpertGroup(
            candidate.name, candidate.size, candidate.blocks, owned,
            tuple(r for r in (*rows, *own, *along) if r.tensor in learnt),
        )  # fmt: skip
        buffers = tuple(r for r in (*rows, *along) if r.tensor not in learnt)
        lists = [self._model.get_submodule(candidate.path)] if candidate.blocks else []
        places = tuple(name for container in lists for name in numbering(container))
        # PyTorch's own layers do not look at these, but they must not lie.
        leaves = [key for r in rows if r.rank == 2 for key in self._sizes(r, candidate.size)]
        counts = tuple(dict.fromkeys((*numbers, *leaves)))
        return Mixture(group, tuple(r.tensor for r in rows), counts, places, buffers)

    def _sizes(self, row: Member, size: int) -> list[str]:
        path = row.tensor.rpartition(".")[0]
        module = self._model.get_submodule(path)
        name = "out_features" if row.axis == 0 else "in_features"
        return [f"{path}.{name}" if path else name] if getattr(module, name, None) == size else []

    def _numbers(self, candidate: _Candidate, named: bool) -> tuple[str, ...]:
        """Attributes that may count the experts: of the modules around them that are no experts and not PyTorch's."""
        found: list[str] = []
        for path, module in self._model.named_modules():
            beside = _inside(path, candidate.around) and not any(_inside(path, b) for b in candidate.blocks)
            if beside and (path == candidate.path or not _of_torch(module)):
                names = matching_attributes(module, candidate.size)
                wanted = [n for n in names if n.isidentifier() and (not named or _says_experts(n))]
                found += [f"{path}.{n}" if path else n for n in wanted]
        return tuple(found)


def _says_experts(name: str) -> bool:
    return "expert" in name and not any(word in name for word in _OTHERS)


def _all_but_first(mixtures: Iterable[Mixture]) -> dict[str, Tensor]:
    return {m.group.name: torch.arange(m.group.size) > 0 for m in mixtures}


def _last(mixtures: Iterable[Mixture], count: int) -> dict[str, Tensor]:
    return {m.group.name: torch.arange(m.group.size) >= m.group.size - count for m in mixtures}


def _every_other(size: int, least: int) -> Tensor:
    """Every other expert stays, and as many more as must: bool [size]."""
    keep = torch.arange(size) % 2 == 0
    keep[: max(0, min(least, size))] |= int(keep.sum()) < least
    return keep


def _words(error: ProofError) -> str:
    return f"removing one is not as if its router had never known it: {_line(error).partition(_ALLOWED)[0]}"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


# -- what they cost ----------------------------------------------------------------------------------------------------


def _costs(model: nn.Module, mixtures: Sequence[Mixture], macs: Callable[[nn.Module], float]) -> CostModel:
    tensors = dict(named_tensors(model))
    whole = {
        "params": float(sum(p.numel() for p in model.parameters())),
        "macs": macs(model) if mixtures else 0.0,
        "bytes": float(sum(t.numel() * t.element_size() for t in tensors.values())),
    }
    each = [_cost(model, tensors, mixture, whole["macs"], macs) for mixture in mixtures]
    metrics = {}
    for metric, total in whole.items():
        units = [
            Monomial(cost[metric], (Atom(m.group.name, m.group.size),), m.group.name)
            for m, cost in zip(mixtures, each, strict=True)
        ]
        rest = total - sum(cost[metric] * m.group.size for m, cost in zip(mixtures, each, strict=True))
        metrics[metric] = (*units, Monomial(rest, (), "the rest"))
    return CostModel(metrics)


def _cost(
    model: nn.Module, tensors: Mapping[str, Tensor], mixture: Mixture, whole: float, macs: Callable[[nn.Module], float]
) -> dict[str, float]:
    """What goes with one expert. MACs are counted: fewer experts are given as many tokens, unless each is given all."""
    group = mixture.group
    rows = [tensors[row.tensor] for row in (*group.rows, *mixture.buffers)]
    own = [model.get_parameter(name) for name in (group.owned[0] if group.owned else ())]
    buffers = [b for block in group.blocks[:1] for b in model.get_submodule(block).buffers()]
    parameters = [(t, group.size) for t in rows if isinstance(t, nn.Parameter)] + [(p, 1) for p in own]
    stored = [*((t, group.size) for t in rows), *((t, 1) for t in (*own, *buffers))]
    less = macs(without_experts(model, [mixture], _all_but_first([mixture])))
    return {
        "params": sum(t.numel() / n for t, n in parameters),
        "macs": max(0.0, whole - less),
        "bytes": sum(t.numel() * t.element_size() / n for t, n in stored),
    }
