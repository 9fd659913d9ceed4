"""The allocation rules by name: how large a share of each group stays, or how scores compare across groups.

There are three kinds. A *density* rule says which share of each group stays, from shapes (uniform, uniform+, er, erk,
erk+) or from figures of the caller (given, sigmoid, owl). A *score* rule puts the scores of all groups on one scale
(global, lamp). A *count* rule says from a group's scores how many of its units it needs (pq-index). None meets a total:
that is the work of `allocate`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .budget import nearest_sparsity
from .densities import outlier_densities, sigmoid_densities
from .errors import BudgetError, OptionError, unknown_name
from .pq import adaptive_keep
from .units import normalized

__all__ = ["Allocation", "Shapes", "allocation", "allocations", "get_allocation", "lamp_scores"]

Kind = Literal["densities", "scores", "counts"]
Shapes = Mapping[str, tuple[int, ...]]
Rule = TypeVar("Rule", bound=Callable[..., Any])


@dataclass(frozen=True)
class Allocation:
    """A named rule and what it needs.

    Args:
        name: as in `allocate(name, …)`.
        rule: for kind "densities" `(shapes, density, **options) -> {group: density}`; for kind "scores"
            `(scores of one group, **options) -> scores that compare across groups`, of the same order within the group;
            for kind "counts" `(scores of one group, **options) -> units that it needs`.
        kind: what the rule returns.
        needs_shapes: whether the rule looks at weight shapes, not at sizes alone; channels and heads have none.
    """

    name: str
    rule: Callable[..., Any]
    kind: Kind
    needs_shapes: bool = False

    @property
    def needs_scores(self) -> bool:
        """Whether the counts depend on scores; otherwise sizes do."""
        return self.kind != "densities"

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that the rule takes."""
        taken = inspect.signature(self.rule).parameters
        return tuple(taken)[2 if self.kind == "densities" else 1 :]


_ALLOCATIONS: dict[str, Allocation] = {}


def allocation(name: str, *, kind: Kind = "densities", needs_shapes: bool = False) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule as allocation `name`; see `Allocation` for what the rule is called with.

    Raises:
        OptionError: there is an allocation of that name already.
    """

    def register(rule: Rule) -> Rule:
        if name in _ALLOCATIONS:
            raise OptionError(f"allocation {name!r} is defined twice; choose another name.")
        _ALLOCATIONS[name] = Allocation(name, rule, kind, needs_shapes)
        return rule

    return register


def get_allocation(name: str) -> Allocation:
    """The allocation called `name`.

    Raises:
        OptionError: there is no such allocation; names the nearest three.
    """
    if name not in _ALLOCATIONS:
        raise unknown_name("allocation", name, _ALLOCATIONS)
    return _ALLOCATIONS[name]


def allocations() -> tuple[Allocation, ...]:
    """All registered allocations, by name."""
    return tuple(_ALLOCATIONS[name] for name in sorted(_ALLOCATIONS))


def lamp_scores(scores: Tensor) -> Tensor:
    """LAMP scores: each squared magnitude over the sum of it and all larger ones, float64 [units].

    Lee et al., arXiv 2010.07611, equation 2: `score(u) = w_u² / Σ_{v ≥ u} w_v²`, with the weights in ascending order.
    The largest of a group has score 1, whatever its scale. Among equals the earlier index gets the higher score.

    Raises:
        OptionError: a negative score: LAMP is defined for magnitudes.
    """
    if bool(((scores < 0) | scores.isinf()).any()):
        raise OptionError("lamp is defined for finite magnitudes, got negative or infinite scores; use global.")
    ordered, order = scores.sort(descending=True, stable=True)
    squares = ordered.double().square()
    ranked = squares / squares.cumsum(0)
    # Units of magnitude 0 in a group that is 0 up to there: 0/0 is "worth nothing".
    return torch.empty_like(ranked).scatter_(0, order, ranked.nan_to_num(0.0))


@allocation("uniform")
def _uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density everywhere."""
    return dict.fromkeys(shapes, density)


@allocation("uniform+")
def _uniform_plus(
    shapes: Shapes,
    density: float,
    first: str | None = None,
    classifier: str | None = None,
    dense_first: bool = True,
) -> dict[str, float]:
    """Uniform, with the first weight dense and the classifier at 0.2 or more (arXiv 2202.02643; Gale et al. 2019).

    With `dense_first=False` the first weight is one of the others (GraNet's uniform variant, arXiv 2106.10404).
    All others share what is left, so that the mean is met: `D' = (D·T − N_first − 0.2·N_fc)/(T − N_first − N_fc)`. The
    published code divides by T instead. From density 0.2 on the classifier is one of the others.
    """
    held = {_member(shapes, first, 0, "first"): 1.0} if dense_first else {}
    last = _member(shapes, classifier, -1, "classifier")
    if density < 0.2 and last not in held and len(shapes) > len(held) + 1:
        held[last] = 0.2
    sizes = _sizes(shapes)
    rest = _rest_density("uniform+", sizes, density, held)
    return {name: held.get(name, rest) for name in shapes}


@allocation("er", needs_shapes=True)
def _er(shapes: Shapes, density: float, power: float = 1.0) -> dict[str, float]:
    """Erdős–Rényi: density in proportion to `((out + in)/(out·in))^power`, the first two axes (Mocanu et al. 2018)."""
    return _clipped(_sizes(shapes), density, {name: _sparseness(shape[:2], power) for name, shape in shapes.items()})


@allocation("erk", needs_shapes=True)
def _erk(shapes: Shapes, density: float, power: float = 1.0) -> dict[str, float]:
    """Erdős–Rényi with the kernel: the same over all axes (Evci et al. 2020, RigL)."""
    return _clipped(_sizes(shapes), density, {name: _sparseness(shape, power) for name, shape in shapes.items()})


@allocation("erk+", needs_shapes=True)
def _erk_plus(
    shapes: Shapes, density: float, power: float = 1.0, fc_density: float = 1.0, classifier: str | None = None
) -> dict[str, float]:
    """ERK over all weights but the classifier (default: the last), which has `fc_density` (arXiv 2202.02643)."""
    if not 0 <= fc_density <= 1:
        raise OptionError(f"fc_density must lie in [0, 1], got {fc_density}.")
    last = _member(shapes, classifier, -1, "classifier")
    sizes = _sizes(shapes)
    rest = _rest_density("erk+", sizes, density, {last: fc_density})
    others = {name: shape for name, shape in shapes.items() if name != last}
    # Where even dense others do not reach the target, the classifier has to.
    rest = min(rest, 1.0)
    own = density * sum(sizes.values()) - rest * (sum(sizes.values()) - sizes[last])
    return {**_erk(others, rest, power), last: own / sizes[last]} if others else {last: density}


@allocation("given")
def _given(shapes: Shapes, density: float, densities: Mapping[str, float]) -> dict[str, float]:
    """Densities from the caller, for every group; their proportions hold, their level follows the total."""
    faults = [f"{kind} {', '.join(names)}" for kind, names in _name_faults(shapes, densities).items() if names]
    wrong = {name: value for name, value in densities.items() if not 0 <= value <= 1}
    faults += [f"a density of {value} for {name}, outside [0, 1]" for name, value in wrong.items()]
    if faults:
        raise OptionError(f"the given densities do not fit the model: {'; '.join(faults)}.")
    return {name: densities[name] for name in shapes}


@allocation("sigmoid")
def _sigmoid(
    shapes: Shapes, density: float, importance: Mapping[str, float], strength: float = 13.1072
) -> dict[str, float]:
    """More for the groups of greater `importance`, a number for each: see `densities.sigmoid_densities`."""
    return sigmoid_densities(importance, _sizes(shapes), density, strength)


@allocation("owl")
def _owl(shapes: Shapes, density: float, outliers: Mapping[str, float], spread: float = 0.08) -> dict[str, float]:
    """More for the groups with more `outliers`, a share for each: see `densities.outlier_densities`."""
    return outlier_densities(outliers, _sizes(shapes), density, spread)


@allocation("global", kind="scores")
def _global(scores: Tensor, normalize: str = "none") -> Tensor:
    """Scores as they are, or normalized within the group first (`units.normalized`)."""
    return normalized(scores if scores.is_floating_point() else scores.double(), normalize)


@allocation("lamp", kind="scores")
def _lamp(scores: Tensor) -> Tensor:
    """See `lamp_scores`."""
    return lamp_scores(scores.flatten())


@allocation("pq-index", kind="counts")
def _pq_index(
    scores: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9
) -> int:
    """In proportion to what one round of SAP would leave of each group (`core.pq`; Diao et al., arXiv 2302.05601).

    Scores of 0 or minus infinity are taken for units that went before: zeros would raise the index by their number.
    """
    values = scores.flatten()
    if bool(((values < 0) & values.isfinite()).any()):
        raise OptionError("pq-index is defined for magnitudes, got negative scores; use global.")
    left = values > 0
    return int(adaptive_keep(values.where(left, 0), p, q, keep=left, eta=eta, gamma=gamma, beta=beta))


def _clipped(sizes: Mapping[str, int], density: float, raw: Mapping[str, float]) -> dict[str, float]:
    """Densities `min(1, ε·raw)` whose mean over all weights is `density`; ε is solved with the dense ones taken out."""
    dense: set[str] = set()
    while len(dense) < len(sizes):
        room = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        open_raw = {name: value for name, value in raw.items() if name not in dense}
        scale = room / math.fsum(value * sizes[name] for name, value in open_raw.items())
        highest = max(open_raw.values())
        if highest * scale <= 1:
            break
        dense |= {name for name, value in open_raw.items() if value == highest}
    return {name: 1.0 if name in dense else scale * raw[name] for name in sizes}


def _sparseness(shape: Iterable[int], power: float) -> float:
    axes = tuple(shape)
    return math.pow(sum(axes) / math.prod(axes), power) if axes else 1.0


def _rest_density(rule: str, sizes: Mapping[str, int], density: float, held: Mapping[str, float]) -> float:
    """The density of all weights that are not held at a density of their own; may exceed 1."""
    total = sum(sizes.values())
    taken = math.fsum(held[name] * sizes[name] for name in held)
    others = total - sum(sizes[name] for name in held)
    if density * total < taken - 1e-9 * taken:
        holds = " and ".join(f"{name} at density {value:g}" for name, value in held.items())
        raise BudgetError(
            f"{rule} holds {holds}, which is {taken:g} weights, but only {density * total:g} may stay.",
            nearest=str(nearest_sparsity(math.ceil(taken), total)),
        )
    return max(density * total - taken, 0.0) / others if others else 0.0


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _member(shapes: Shapes, name: str | None, default: int, role: str) -> str:
    if name is None:
        return list(shapes)[default]
    if name not in shapes:
        raise OptionError(f"there is no {role} {name!r}; the groups are {', '.join(shapes)}.")
    return name


def _name_faults(wanted: Iterable[str], got: Iterable[str]) -> dict[str, list[str]]:
    known, given = list(wanted), list(got)
    return {"missing are": [n for n in known if n not in given], "unknown are": [n for n in given if n not in known]}
