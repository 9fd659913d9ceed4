"""Evidence: what a model does on data — gradients, curvature products and statistics of activations.

Everything here runs inside `preserved`, which gives the model back exactly as it was, also when something raises.
Gradients are taken with `torch.autograd.grad`, so nobody's `.grad` is touched; averages are kept in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.batch import Loss, device_of, leaves, move, run, split
from ..core.derivatives import gradients_of, hessian_product, loss_of, samples_in
from ..core.errors import ModelError, OptionError
from ..solvers.layerwise import seen_of
from .lifting import resolve
from .preserve import preserved

__all__ = [
    "Per",
    "RunningMean",
    "Visitor",
    "each_gradient",
    "gradients",
    "hessian_gradient",
    "loss_of",
    "mapped",
    "observe",
    "observing",
    "samples",
    "values",
]

Per = Literal["batch", "sample"]
Visitor = Callable[[nn.Module, Tensor, Tensor], None]


def values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters called `names`, detached, in float32 or wider."""
    return {name: _wide(tensor.detach()) for name, tensor in resolve(model, names).items()}


def each_gradient(
    model: nn.Module,
    data: Iterable[Any],
    visit: Callable[[int, dict[str, Tensor]], None],
    *,
    names: Sequence[str],
    loss: Loss | None = None,
    per: Per = "batch",
    train: bool = False,
    seed: int = 0,
) -> None:
    """Calls `visit(number of samples, {name: gradient})` for each batch, or each sample, of `data`.

    A parameter that the loss does not reach on this data (an expert that no token is routed to) has gradient zero,
    which is what the loss says. If it reaches none of `names` on any batch, something is cut off, and that is an error.

    Args:
        model: in eval mode unless `train`.
        data: batches with labels.
        visit: gets gradients in float32 or wider.
        names: parameters; those that do not require gradients are made to for the time being.
        loss: see `loss_of`.
        per: "batch" (one backward pass each) or "sample" (each batch split along its first axis).
        train: train mode: batch statistics and dropout.
        seed: see `preserved`.

    Raises:
        DataError, ModelError: see `loss_of`; or the loss reaches none of `names`.
    """
    if per not in ("batch", "sample"):
        raise OptionError(f"per must be batch or sample, got {per!r}.")
    parameters = resolve(model, names)
    reached = False
    with _differentiating(model, parameters, train, seed):
        for piece in _pieces(data, per):
            found = gradients_of(loss_of(model, piece, loss), parameters)
            reached = reached or any(g is not None for g in found.values())
            visit(samples_in(piece), {n: _known(g, parameters[n]) for n, g in found.items()})
    if not reached:
        raise ModelError(_unreached(names))


def gradients(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    names: Sequence[str] | None = None,
    train: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The gradient of the loss over all of `data`: per parameter name a tensor of its shape, float32 or wider.

    Batches count by their number of samples, so that a loss that is a mean over samples (the default) gives the
    gradient of the mean over the data, however it is cut into batches.

    Args:
        model, data, loss, train, seed: see `each_gradient`.
        names: which parameters; default: all floating-point ones.
    """
    if names is None:
        names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    mean = RunningMean()
    each_gradient(model, data, lambda n, g: mean.add(g, n), names=names, loss=loss, train=train, seed=seed)
    return mean.value


def hessian_gradient(
    model: nn.Module,
    data: Sequence[Any],
    loss: Loss | None = None,
    *,
    names: Sequence[str],
    train: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The Hessian of the loss times its gradient, Hg, with respect to `names` and over all of `data`.

    Two passes: g first; then, batch by batch, the gradient of <g, gradient of the batch> with g held constant.

    Args:
        model, data, loss, names, train, seed: see `each_gradient`; `data` is read twice.
    """
    whole = gradients(model, data, loss, names=names, train=train, seed=seed)
    parameters = resolve(model, names)
    mean = RunningMean()
    # The fused attention kernels have no second derivative.
    with _differentiating(model, parameters, train, seed), sdpa_kernel(SDPBackend.MATH):
        for batch in data:
            second = hessian_product(loss_of(model, batch, loss), parameters, whole)
            mean.add({n: _known(g, parameters[n]) for n, g in second.items()}, samples_in(batch))
    return mean.value


@contextmanager
def observing(
    model: nn.Module, visitors: Mapping[str, Visitor], *, train: bool = False, seed: int = 0
) -> Iterator[None]:
    """Inside, each call of a module named in `visitors` is shown to its visitor; afterwards the model is as it was.

    Args:
        model: see `preserved`, also for `train` and `seed`.
        visitors: per module name `(module, first input tensor, first output tensor) -> None`, without gradients.
    """
    with preserved(model, train=train, seed=seed), torch.no_grad(), ExitStack() as hooks:
        for name, visitor in visitors.items():
            handle = model.get_submodule(name).register_forward_hook(_hook(visitor), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def observe(
    model: nn.Module,
    data: Iterable[Any],
    visitors: Mapping[str, Visitor],
    *,
    padding: bool = False,
    train: bool = False,
    seed: int = 0,
) -> None:
    """Runs `data` through `model` and shows the modules in `visitors` to their visitors (see `observing`).

    Args:
        padding: whether visitors see the tokens that a batch's "attention_mask" leaves out. Without them a tensor
            [samples, tokens, …] is shown as [seen tokens, …].
        others: see `observing`.

    Raises:
        ModelError: a module was never called, so that nothing is known about it.
    """
    silent = dict.fromkeys(visitors)
    seen: Tensor | None = None

    def noting(name: str, visitor: Visitor) -> Visitor:
        def visit(module: nn.Module, given: Tensor, made: Tensor) -> None:
            silent.pop(name, None)
            visitor(module, _without_padding(module, given, seen), _without_padding(module, made, seen))

        return visit

    with observing(model, {n: noting(n, v) for n, v in visitors.items()}, train=train, seed=seed):
        for batch in data:
            seen = None if padding else seen_of([batch])[0]
            run(model, move(split(batch)[0], device_of(model)))
    if silent:
        raise ModelError(
            f"no call of {_some(list(silent))} was seen on this data, so its activations are unknown: the model uses "
            f"its weights without calling it (as nn.MultiheadAttention does), or the data never reaches it; give more "
            f"data, use a criterion without activations, or leave its group out."
        )


def _without_padding(module: nn.Module, tensor: Tensor, seen: Tensor | None) -> Tensor:
    """What the mask [samples, tokens] leaves of a tensor that has these axes first: ids, or a vector for each token."""
    if seen is None or isinstance(module, nn.modules.conv._ConvNd) or tensor.shape[:2] != seen.shape:
        return tensor
    return tensor if tensor.dim() == 2 and tensor.is_floating_point() else tensor[seen.to(tensor.device)]


class RunningMean:
    """A weighted mean of dicts of tensors; `value` is the mean so far."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds one dict with `weight`."""
        self._weight += weight
        for name, tensor in found.items():
            part = tensor * weight
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    @property
    def value(self) -> dict[str, Tensor]:
        """Per name the mean of what was added."""
        return {name: total / self._weight for name, total in self._sums.items()}


def samples(batch: Any) -> Iterator[Any]:
    """The samples of `batch`, each as a batch of one; tensors with another first axis than the inputs' stay whole."""
    count = samples_in(batch)

    def cut(i: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[i : i + 1] if tensor.dim() and len(tensor) == count else tensor

    for i in range(count):
        yield mapped(batch, cut(i))


def mapped(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with `function` applied to every tensor inside tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(mapped(v, function) for v in tree)
    if isinstance(tree, list):
        return [mapped(v, function) for v in tree]
    if hasattr(tree, "items"):
        return {k: mapped(v, function) for k, v in tree.items()}
    return tree


@contextmanager
def _differentiating(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], train: bool, seed: int
) -> Iterator[None]:
    with preserved(model, train=train, differentiate=parameters.values(), seed=seed), torch.enable_grad():
        yield


def _known(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return _wide(torch.zeros_like(parameter) if gradient is None else gradient).detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pieces(data: Iterable[Any], per: Per) -> Iterator[Any]:
    for batch in data:
        yield from samples(batch) if per == "sample" else (batch,)


def _unreached(names: Sequence[str]) -> str:
    return (
        f"the loss reaches none of the tensors to be scored ({_some(names)}): look for detach() or no_grad() on the "
        f"way, or for a loss that does not use the model's output."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hook(visitor: Visitor) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next(leaves((args, kwargs)), None)
        made = next(leaves(output), None)
        if given is not None and made is not None:
            visitor(module, given.detach(), made.detach())

    return hook
