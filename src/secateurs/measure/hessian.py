"""How sharp the loss is at a network: the largest eigenvalue of its Hessian and its trace, masks respected.

Power iteration from a normal vector and Hutchinson's estimate with random signs need only products Hv, which cost two
backward passes (Pearlmutter 1994). Both stop when a step changes the figure by less than a share, as in PyHessian (Yao
et al., arXiv 1912.07145), at 10⁻³ and after 100 products at most. Of a pruned network the Hessian is that of the
weights that are left: with the mask M, v and Hv are multiplied by M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.batch import Loss, take
from ..core.derivatives import hessian_product, loss_of, samples_in
from ..core.errors import ModelError, OptionError, unknown_name
from ._run import evaluating

__all__ = ["Estimate", "Sharpness", "hessian_operator", "hutchinson_trace", "sharpness", "top_eigenvalue"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A figure found step by step.

    Args:
        value: the last one.
        steps: products Hv that it took.
        settled: whether the last step changed it by less than the tolerance; a trace near 0 may never settle.
    """

    value: float
    steps: int
    settled: bool

    def __str__(self) -> str:
        return f"{self.value:.4g} after {self.steps} products" + ("" if self.settled else ", not settled")


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue by modulus, which may be negative, and the trace of a Hessian."""

    eigenvalue: Estimate
    trace: Estimate

    def __str__(self) -> str:
        return f"largest eigenvalue {self.eigenvalue}; trace {self.trace}"


def top_eigenvalue(product: Product, start: Tensor, *, tolerance: float = 1e-3, limit: int = 100) -> Estimate:
    """The eigenvalue of largest modulus, by power iteration; it may be negative.

    Args:
        product: v to Hv, for a symmetric H.
        start: float [n], any vector that is not orthogonal to the eigenvector.
        tolerance: stops when a step changes the value by less than this share of it.
        limit: products at most.

    Raises:
        OptionError: a tolerance or a limit that is not positive.
    """
    _check(tolerance, limit)
    vector = _unit(start)
    value = 0.0
    for step in range(1, limit + 1):
        moved = product(vector)
        before, value = value, torch.dot(vector, moved).item()
        # The vector is zero where H is: no smallest number is added to its norm, which would distort small ones.
        if (step > 1 and abs(value - before) <= tolerance * abs(before)) or not bool(moved.any()):
            return Estimate(value, step, True)
        vector = _unit(moved)
    return Estimate(value, limit, False)


def hutchinson_trace(
    product: Product,
    like: Tensor,
    *,
    keep: Tensor | None = None,
    tolerance: float = 1e-3,
    limit: int = 100,
    generator: torch.Generator | None = None,
) -> Estimate:
    """The trace, by Hutchinson's mean of vᵀHv over random signs v.

    Args:
        product: v to Hv.
        like: float [n], gives v its size, dtype and device.
        keep: bool or 0/1 [n], zero where v is to be zero; None for nowhere.
        tolerance: stops when a sample changes the mean by less than this share of it.
        limit: samples at most.
        generator: of the signs, on the CPU; None for PyTorch's own.

    Raises:
        OptionError: a tolerance or a limit that is not positive.
    """
    _check(tolerance, limit)
    total = mean = 0.0
    for step in range(1, limit + 1):
        signs = (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like)
        signs = signs if keep is None else signs * keep
        total += torch.dot(signs, product(signs)).item()
        before, mean = mean, total / step
        if step > 1 and abs(mean - before) <= tolerance * abs(before):
            return Estimate(mean, step, True)
    return Estimate(mean, limit, False)


def sharpness(
    model: nn.Module,
    data: Sequence[Any],
    loss: Loss | None = None,
    *,
    names: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tolerance: float = 1e-3,
    limit: int = 100,
    seed: int = 0,
) -> Sharpness:
    """The `Sharpness` of the loss of `model` on `data`; the model stays as it is.

    Args:
        model: in evaluation mode meanwhile.
        data: batches with labels, read once for each product Hv; they count by their size.
        loss: `(output, target) -> scalar`, smooth; default: `core.batch.default_loss`.
        names: parameters to differentiate by; None for all floating-point ones.
        masks: per parameter a bool mask that broadcasts to it, True for weights that are left; the others are no
            variables.
        tolerance, limit: of both figures (10⁻³ and 100, PyHessian).
        seed: of the random vectors.

    Raises:
        DataError: no data, no labels.
        ModelError: the loss is not finite, or no weight is left.
        OptionError: an unknown name, a tolerance or limit that is not positive.
    """
    _check(tolerance, limit)
    generator = torch.Generator().manual_seed(seed)
    with hessian_operator(model, data, loss, names=names, masks=masks) as (product, keep):
        start = torch.randn(keep.shape, generator=generator).to(keep) * keep
        top = top_eigenvalue(product, start, tolerance=tolerance, limit=limit)
        trace = hutchinson_trace(product, keep, keep=keep, tolerance=tolerance, limit=limit, generator=generator)
    return Sharpness(top, trace)


@contextmanager
def hessian_operator(
    model: nn.Module,
    data: Sequence[Any],
    loss: Loss | None = None,
    *,
    names: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Product, Tensor]]:
    """A context with the product v to M·H·M·v for the loss on all of `data`, and M: float [n], 1 for what is left.

    v lists the entries of all parameters one after the other, in the order of `names`, in float32 or wider.

    Args:
        model, data, loss, names, masks: see `sharpness`.
    """
    parameters = _chosen(model, names)
    for name in masks or {}:
        if name not in dict(model.named_parameters()):
            raise unknown_name("masked parameter", name, parameters)
    keep = _flat([_mask(name, p, masks or {}) for name, p in parameters.items()])
    if not bool(keep.any()):
        raise ModelError("no weight is left by the masks, so that the loss has no Hessian.")
    chosen = take(data, what="data")

    def product(vector: Tensor) -> Tensor:
        pieces = dict(zip(parameters, _shaped(vector * keep, parameters), strict=True))
        total, weight = torch.zeros_like(keep), 0
        for batch in chosen:
            found = hessian_product(loss_of(model, batch, loss), parameters, pieces)
            total += samples_in(batch) * _flat([_known(found[name], p) for name, p in parameters.items()])
            weight += samples_in(batch)
        return total * keep / weight

    # The fused attention kernels have no second derivative.
    with evaluating(model), _differentiable(parameters), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield product, keep


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    known = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    for name in names or ():
        if name not in known:
            raise unknown_name("parameter", name, known)
    return known if names is None else {name: known[name] for name in names}


def _mask(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    if name not in masks:
        return torch.ones_like(parameter)
    return masks[name].to(parameter).expand_as(parameter)


def _known(product: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if product is None else product


@contextmanager
def _differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in parameters.values()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    wide = [t.detach().to(torch.promote_types(t.dtype, torch.float32)).flatten() for t in tensors]
    return torch.cat(wide) if wide else torch.zeros(0)


def _shaped(vector: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    sizes = [p.numel() for p in parameters.values()]
    return [part.view_as(p) for part, p in zip(vector.split(sizes), parameters.values(), strict=True)]


def _unit(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def _check(tolerance: float, limit: int) -> None:
    if not tolerance > 0 or limit < 1:
        raise OptionError(f"tolerance must be positive and limit at least 1, got {tolerance} and {limit}.")
