"""First-order criteria: what the loss would do, as its gradient sees it. They need labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batch import Loss
from ..core.errors import OptionError
from ..core.units import Cache, Group
from .evidence import Per, RunningMean, each_gradient, gradients, values
from .lifting import Lift, select
from .registry import criterion

__all__ = ["fisher", "snip", "taylor", "taylor_signed"]


@criterion("snip", needs=("data", "labels"), paper="Lee et al. 2019, arXiv 1810.02340")
def snip(
    model: nn.Module, names: Sequence[str], *, data: Sequence[Any], loss: Loss | None, seed: int, train: bool = False
) -> dict[str, Tensor]:
    """|w·g|, with g the gradient over all of the data; equal to |dL/dm| for a mask m of ones on w.

    The paper divides by the total, a common factor that no ranking sees.

    Args:
        model, names, data, loss, seed: see `evidence.each_gradient`.
        train: batch statistics and dropout while the gradient is taken (the authors' code); default eval mode.
    """
    return {n: p.abs() for n, p in _products(model, names, data, loss, seed, train).items()}


@criterion("taylor-signed", needs=("data", "labels"), signed=True, paper="Molchanov et al. 2019, arXiv 1906.10771")
def taylor_signed(
    model: nn.Module, names: Sequence[str], *, data: Sequence[Any], loss: Loss | None, seed: int, train: bool = False
) -> dict[str, Tensor]:
    """-w·g: by how much the loss rises, to first order, when w becomes zero; negative where removal lowers it.

    Args:
        model, names, data, loss, seed, train: see `snip`.
    """
    return {n: -p for n, p in _products(model, names, data, loss, seed, train).items()}


@criterion("fisher", needs=("data", "labels"), paper="LeCun et al. 1990 (OBD), with the empirical Fisher")
def fisher(
    model: nn.Module,
    names: Sequence[str],
    *,
    data: Sequence[Any],
    loss: Loss | None,
    seed: int,
    per: Per = "sample",
    train: bool = False,
) -> dict[str, Tensor]:
    """w^2·F/2, with F the diagonal of the empirical Fisher matrix: the mean over samples of g^2.

    Args:
        model, names, data, loss, seed, train: see `snip`.
        per: "sample" (the definition; one backward pass a sample) or "batch" (the mean over batches of the squared
            gradient of the batch's loss: as many times faster as a batch has samples, and smaller by about as much).
    """
    mean = RunningMean()
    each_gradient(
        model,
        data,
        lambda count, gradient: mean.add({n: g.square() for n, g in gradient.items()}),
        names=names,
        loss=loss,
        per=per,
        train=train,
        seed=seed,
    )
    curvature = mean.value
    return {n: w.square() * curvature[n] / 2 for n, w in values(model, names).items()}


@criterion("taylor", kind="unit", needs=("data", "labels"), paper="Molchanov et al. 2019, arXiv 1906.10771")
def taylor(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    data: Sequence[Any],
    loss: Loss | None,
    seed: int,
    power: Literal["square", "abs"] = "square",
    average: Literal["scores", "gradients"] = "scores",
    per: Per = "batch",
    members: Literal["out", "all"] = "out",
    tensors: Literal["all", "weights"] = "all",
    train: bool = False,
) -> dict[str, Tensor]:
    """The squared (or absolute) derivative of the loss by a gate on the unit: (sum over the unit of w·g)^2.

    The sum comes first and the square after it, so entries may cancel as they do in the network; the sum of
    |w·g| is `snip`. On single weights with power="abs" and average="gradients" the two are equal.

    Args:
        model, data, loss, seed, train: see `snip`.
        groups: channel or weight groups.
        power: "square" (default, the paper's) or "abs".
        average: "scores": the mean over batches of each batch's score (default, the paper's); "gradients": the score
            of the mean gradient, near zero for a trained model.
        per: "batch" or "sample": what `average` runs over.
        members: tensor axes that count: those that produce the unit ("out", default) or "all" that carry it.
        tensors: "all" parameters of the unit (default: its biases and scales too) or "weights" only.
    """
    if power not in ("square", "abs"):
        raise OptionError(f"power must be square or abs, got {power!r}.")
    if average not in ("scores", "gradients"):
        raise OptionError(f"average must be scores or gradients, got {average!r}.")
    parts = [select(group, model, Lift(members=members, tensors=tensors)) for group in groups]
    names = tuple(dict.fromkeys(name for part in parts for name in part.tensors))
    weights = values(model, names)
    mean = RunningMean()

    def visit(count: int, gradient: dict[str, Tensor]) -> None:
        gates = _gates(parts, {n: w * gradient[n] for n, w in weights.items()})
        # Batches weigh by their samples in a mean of gradients, and alike in a mean of scores.
        if average == "gradients":
            mean.add(gates, count)
        else:
            mean.add({n: _power(g, power) for n, g in gates.items()})

    each_gradient(model, data, visit, names=names, loss=loss, per=per, train=train, seed=seed)
    return mean.value if average == "scores" else {n: _power(g, power) for n, g in mean.value.items()}


def _products(
    model: nn.Module, names: Sequence[str], data: Sequence[Any], loss: Loss | None, seed: int, train: bool
) -> dict[str, Tensor]:
    """w·g per entry."""
    gradient = gradients(model, data, loss, names=names, train=train, seed=seed)
    return {n: w * gradient[n] for n, w in values(model, names).items()}


def _gates(groups: Sequence[Group], products: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per group the sum of `products` over each unit: float [size], on the CPU, as a group may span devices."""
    cache: Cache = {}
    lifted = {group.name: group.lift(products, "sum", cache).values() for group in groups}
    return {name: reduce(torch.add, [p.cpu() for p in parts]) for name, parts in lifted.items()}


def _power(gates: Tensor, power: str) -> Tensor:
    return gates.square() if power == "square" else gates.abs()
