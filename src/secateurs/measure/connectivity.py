"""Linear mode connectivity: what happens to a network on the straight line between two of its trainings.

Two trainings from one point that end in the same basin are connected: the error along the line stays that of its ends.
With θ(t) = (1-t)·a + t·b and the error E at the points t_j, ends included,

    m = (E(0) + E(1)) / 2,   j* = argmax_j |m - E(t_j)|,   mc = m - E(t_j*)

as in "A Three-regime Model of Network Pruning" (arXiv 2305.18383): below 0 there is a barrier, near 0 the two are well
connected, above 0 the path is better than its ends. Batch-norm statistics are those of no point between the ends, so
they are found anew at every point, at the ends too; without that nearly every path seems to have a barrier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Loss, default_loss
from ..core.errors import ModelError, OptionError
from .quality import evaluate

__all__ = ["Path", "State", "connect", "error_on", "interpolated", "loss_on", "mode_connectivity"]

State = Mapping[str, Any]
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Path:
    """What was measured on the way from one network to another.

    Args:
        positions: t of each point, rising from 0 to 1.
        values: error or loss at each point.
    """

    positions: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def mc(self) -> float:
        """Mode connectivity: see `mode_connectivity`."""
        return mode_connectivity(self.values)

    @property
    def ends(self) -> float:
        """The mean of the two ends."""
        return (self.values[0] + self.values[-1]) / 2

    @property
    def worst(self) -> float:
        """The position at which the path differs most from its ends, in [0, 1]; of equal ones the first."""
        return self.positions[_furthest(self.values)]

    def __str__(self) -> str:
        return f"mc {self.mc:+.4f} at t = {self.worst:.3g}, ends {self.values[0]:.4f} and {self.values[-1]:.4f}"


def mode_connectivity(values: Sequence[float]) -> float:
    """The mean of the ends minus the value that differs most from it: negative for a barrier.

    Args:
        values: error or loss along the path, ends included; of equal deviations the first counts.

    Raises:
        OptionError: fewer than two values.

    >>> round(mode_connectivity([0.1, 0.3, 0.2, 0.0, 0.1]), 9)
    -0.2
    """
    if len(values) < 2:
        raise OptionError(f"a path has at least its two ends, got {len(values)} values.")
    return (values[0] + values[-1]) / 2 - values[_furthest(values)]


def _furthest(values: Sequence[float]) -> int:
    middle = (values[0] + values[-1]) / 2
    return max(range(len(values)), key=lambda i: abs(middle - values[i]))


def connect(
    model: nn.Module,
    a: nn.Module | State,
    b: nn.Module | State,
    score: Score,
    *,
    prepare: Callable[[nn.Module], Any] | None = None,
    points: int = 11,
    refine: int = 0,
    different_masks: bool = False,
) -> Path:
    """The `Path` on the straight line from `a` to `b`.

    Args:
        model: of their architecture; a copy of it is filled with the weights of each point, itself it stays as it is.
        a, b: models or state dicts.
        score: error or loss of a model, always on the same data, as `error_on` makes it.
        prepare: called on the model of every point before `score`, to find its batch-norm statistics: give a function
            that calls `recover.recalibrate_batch_norm` on training data. A model without such statistics needs none.
        points: evenly spaced, ends included (11, arXiv 2305.18383).
        refine: so many times the two gaps beside the point that differs most are halved, since a narrow barrier hides
            between points.
        different_masks: allow weights that are zero in one and not in the other. What the path then says is not about
            the training alone.

    Raises:
        OptionError: fewer than two points, other architectures, different masks, or batch-norm statistics and no
            `prepare`.
        ModelError: the score is not finite at a point.
    """
    if points < 2 or refine < 0:
        raise OptionError(f"a path needs points of at least 2 and refine of at least 0, got {points} and {refine}.")
    first, second = _state(a), _state(b)
    _same_architecture(model.state_dict(), first, second)
    if not different_masks:
        _same_masks(first, second)
    if prepare is None and _has_statistics(model):
        raise OptionError(
            "batch-norm statistics are those of no point between two networks: give prepare=, a function that finds "
            "them anew from training data, as recover.recalibrate_batch_norm does."
        )
    carrier = copy.deepcopy(model)
    found: dict[float, float] = {}

    def visit(t: float) -> None:
        carrier.load_state_dict(interpolated(first, second, t))
        if prepare is not None:
            prepare(carrier)
        found[t] = score(carrier)
        if not math.isfinite(found[t]):
            raise ModelError(f"the score is {found[t]} at t = {t:g}; look at the weights of both ends and at the data.")

    for j in range(points):
        visit(j / (points - 1))
    for _ in range(refine):
        for t in _beside(_path(found)):
            visit(t)
    return _path(found)


def _path(found: Mapping[float, float]) -> Path:
    positions = tuple(sorted(found))
    return Path(positions, tuple(found[t] for t in positions))


def _beside(path: Path) -> list[float]:
    """The middles of the gaps on both sides of the point that differs most; one at an end."""
    at = _furthest(path.values)
    around = path.positions[max(at - 1, 0) : at + 2]
    return [(low + high) / 2 for low, high in pairwise(around)]


def interpolated(a: State, b: State, t: float) -> dict[str, Any]:
    """The state dict a + t·(b - a): exactly `a` where both agree, exactly an end at t of 0 and 1.

    What is no floating-point tensor, as the counter of a batch norm, is that of `a`. A weight that is zero in both
    stays zero.

    Args:
        a, b: state dicts of the same names and shapes; half precision is added up in float32.
        t: position, in [0, 1].
    """
    return {name: _between(value, b[name], t) for name, value in a.items()}


def _between(a: Any, b: Any, t: float) -> Any:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return a
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.lerp(a.detach().to(wide), b.detach().to(a.device, wide), t).to(a.dtype)


def error_on(data: Iterable[Any]) -> Score:
    """The function from a model to its error, 1 - accuracy in [0, 1], on `data`, read once for each point."""
    return lambda model: 1 - evaluate(model, data, ("accuracy",))["accuracy"]


def loss_on(data: Iterable[Any], loss: Loss = default_loss) -> Score:
    """The function from a model to its mean loss on `data`, read once for each point."""
    return lambda model: evaluate(model, data, ("loss",), loss=loss)["loss"]


def _state(given: nn.Module | State) -> State:
    return given.state_dict() if isinstance(given, nn.Module) else given


def _same_architecture(*states: State) -> None:
    shapes = [{name: tuple(getattr(value, "shape", ())) for name, value in state.items()} for state in states]
    for other in shapes[1:]:
        wrong = sorted(name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name))
        if wrong:
            raise OptionError(
                f"there is a line only between networks of one architecture: {', '.join(wrong[:3])} is missing in one "
                "or has another shape."
            )


def _same_masks(a: State, b: State) -> None:
    """Weights of one axis are biases and scales, which may be zero by chance and are not masked."""
    for name, value in a.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        differ = int(((value == 0) != (b[name].to(value.device) == 0)).sum())
        if differ:
            raise OptionError(
                f"the two networks have different masks: {differ} entries of {name} are zero in one alone; train both "
                "under the same mask, or pass different_masks=True."
            )


def _has_statistics(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())
