"""Evidence: what a model does on data — gradients, curvature products and statistics of activations.

Everything here goes through `preserved`, which gives the model back exactly as it was, also when the body raises.
Gradients are taken with `torch.autograd.grad`, so nobody's `.grad` is touched; averages are kept in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.batch import Loss, call, default_loss, device_of, leaves, main_output, move, split
from ..core.errors import DataError, ModelError, OptionError
from .lifting import resolve

__all__ = [
    "Moments",
    "Per",
    "RunningMean",
    "Visitor",
    "each_gradient",
    "gradients",
    "hessian_gradient",
    "loss_of",
    "observe",
    "observing",
    "preserved",
    "samples",
    "values",
]

Per = Literal["batch", "sample"]
Visitor = Callable[[nn.Module, Tensor, Tensor], None]


def values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters called `names`, detached, in float32 or wider."""
    return {name: _wide(tensor.detach()) for name, tensor in resolve(model, names).items()}


@contextmanager
def preserved(
    model: nn.Module, *, train: bool = False, differentiate: Iterable[nn.Parameter] | None = None, seed: int = 0
) -> Iterator[None]:
    """Inside, `model` is in eval (or train) mode and random numbers follow `seed`; afterwards all is as it was.

    What is brought back: training flags, `requires_grad`, the `.grad` objects, buffers, and the random state.

    Args:
        model: what to look at.
        train: train mode instead of eval mode.
        differentiate: inside, exactly these parameters require gradients; None leaves the flags alone.
        seed: of the random numbers inside (dropout, noisy routing).
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda(model)))
        _seed(model, seed)
        stack.callback(_Snapshot.of(model).restore)
        model.train(train)
        if differentiate is not None:
            wanted = {id(p) for p in differentiate}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in wanted)
        for parameter in model.parameters():
            parameter.grad = None
        yield


@dataclass(frozen=True)
class _Snapshot:
    """The state of a model that forward and backward passes may change."""

    modes: list[tuple[nn.Module, bool]]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]
    buffers: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]]

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        return cls(
            [(m, m.training) for m in model.modules()],
            [(p, p.requires_grad, p.grad) for p in model.parameters()],
            [(m, dict(m._buffers), _copies(m._buffers)) for m in model.modules() if m._buffers],
        )

    def restore(self) -> None:
        for module, training in self.modes:
            module.training = training
        for parameter, requires_grad, grad in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, tensors, copies in self.buffers:
            module._buffers.clear()
            module._buffers.update(tensors)
            for name, copy in copies.items():
                _put_back(tensors[name], copy)


def loss_of(model: nn.Module, batch: Any, loss: Loss | None = None) -> Tensor:
    """The loss of `model` on `batch`: a scalar with its graph; batches and devices as in `core.batch`.

    Raises:
        DataError: there are no labels, or the loss is not one number.
        ModelError: the loss is NaN or infinite.
    """
    inputs, target = split(batch)
    output = call(model, move(inputs, device_of(model)))
    if target is not None:
        target = move(target, next((leaf.device for leaf in leaves(output)), device_of(model)))
    value = (loss or default_loss)(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"the loss must be one number per batch, got {shape}: reduce it with a mean.")
    if not bool(torch.isfinite(value)):
        raise ModelError(f"the loss is {value.item()} on a batch: look at the data, or run the model in float32.")
    return value.squeeze()


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
    tensors = list(parameters.values())
    reached = False
    with preserved(model, train=train, differentiate=tensors, seed=seed), torch.enable_grad():
        for piece in _pieces(data, per):
            found = _backward(loss_of(model, piece, loss), tensors)
            reached = reached or any(g is not None for g in found)
            gradient = [_wide(torch.zeros_like(t) if g is None else g) for t, g in zip(tensors, found, strict=True)]
            visit(_count(piece), {n: g.detach() for n, g in zip(parameters, gradient, strict=True)})
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
    mean = RunningMean()
    each_gradient(
        model,
        data,
        lambda count, gradient: mean.add(gradient, count),
        names=names if names is not None else [n for n, p in model.named_parameters() if p.is_floating_point()],
        loss=loss,
        train=train,
        seed=seed,
    )
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
    """The Hessian of the loss times its gradient, Hg, both over `names` and over all of `data` (GraSP, equation 8).

    Two passes over `data`: g first, then per batch the gradient of the product of g (constant) with the batch's gradient.
    """
    whole = gradients(model, data, loss, names=names, train=train, seed=seed)
    parameters = resolve(model, names)
    tensors = list(parameters.values())
    mean = RunningMean()
    # The fused attention kernels have no second derivative.
    with preserved(model, train=train, differentiate=tensors, seed=seed), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in data:
            first = _backward(loss_of(model, batch, loss), tensors, create_graph=True)
            terms = [(whole[n] * g).sum() for n, g in zip(parameters, first, strict=True) if g is not None]
            second = _backward(torch.stack(terms).sum(), tensors) if terms else [None] * len(tensors)
            product = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, second, strict=True)]
            mean.add(dict(zip(parameters, map(_wide, product), strict=True)), _count(batch))
    return mean.value


@contextmanager
def observing(model: nn.Module, visitors: Mapping[str, Visitor], *, train: bool = False, seed: int = 0) -> Iterator[None]:
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
    model: nn.Module, data: Iterable[Any], visitors: Mapping[str, Visitor], *, train: bool = False, seed: int = 0
) -> None:
    """Runs `data` through `model` and shows the modules in `visitors` to their visitors (see `observing`).

    Raises:
        ModelError: a module was never called, so that nothing is known about it.
    """
    seen: set[str] = set()

    def noting(name: str, visitor: Visitor) -> Visitor:
        return lambda *found: (seen.add(name), visitor(*found))[1]

    with observing(model, {n: noting(n, v) for n, v in visitors.items()}, train=train, seed=seed):
        for batch in data:
            call(model, move(split(batch)[0], device_of(model)))
    silent = [name for name in visitors if name not in seen]
    if silent:
        raise ModelError(
            f"no call of {', '.join(silent[:3])} was seen on this data, so its activations are unknown: the model uses "
            f"its weights without calling it (as nn.MultiheadAttention does), or the data never reaches it; use more "
            f"data, a criterion without activations, or leave its group out."
        )


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per position, in float64; those of two parts of a sample can be merged.

    Args:
        count: number of observations.
        mean: float64 [positions].
        deviation: float64 [positions], the sum over observations of (x - mean)^2.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of `rows` [observations, positions]."""
        rows = double(rows)
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        return cls(len(rows), mean, (rows - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together (Chan, Golub and LeVeque 1979), free of cancellation."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        gap = other.mean - self.mean
        deviation = self.deviation + other.deviation + gap.square() * (self.count * share)
        return Moments(count, self.mean + gap * share, deviation)

    @property
    def variance(self) -> Tensor:
        """Variance over the observations (divided by their number): float64 [positions]."""
        return self.deviation / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2: float64 [positions]."""
        return self.variance + self.mean.square()


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
        return {name: total / self._weight for name, total in self._sums.items()}


def samples(batch: Any) -> Iterator[Any]:
    """The samples of `batch` one by one, each as a batch of one: every tensor whose first axis is the batch is sliced."""
    count = _count(batch)
    for i in range(count):
        yield _sliced(batch, i, count)


def double(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where its device has no such type."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pieces(data: Iterable[Any], per: Per) -> Iterator[Any]:
    for batch in data:
        yield from samples(batch) if per == "sample" else (batch,)


def _count(batch: Any) -> int:
    """Number of samples of `batch`: the first axis of its first tensor that has one."""
    return next((len(leaf) for leaf in leaves(split(batch)[0]) if leaf.dim()), 1)


def _sliced(tree: Any, i: int, count: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[i : i + 1] if tree.dim() and len(tree) == count else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_sliced(v, i, count) for v in tree)
    if hasattr(tree, "items"):
        return {k: _sliced(v, i, count) for k, v in tree.items()}
    return tree


def _backward(value: Tensor, tensors: Sequence[Tensor], *, create_graph: bool = False) -> Sequence[Tensor | None]:
    """Gradients of `value`, None for a tensor that it does not depend on."""
    if not value.requires_grad:
        return [None] * len(tensors)
    return torch.autograd.grad(value, tensors, allow_unused=True, create_graph=create_graph)


def _unreached(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the loss reaches none of the tensors to be scored ({shown}): look for detach() or no_grad() on the way, "
        f"or for a loss that does not use the model's output."
    )


def _hook(visitor: Visitor) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next(leaves((args, kwargs)), None)
        made = next(leaves(output), None)
        if given is not None and made is not None:
            visitor(module, given.detach(), made.detach())

    return hook


def _cuda(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in (*model.parameters(), *model.buffers()) if p.device.type == "cuda"})


def _seed(model: nn.Module, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    for device in _cuda(model):
        torch.cuda.default_generators[device].manual_seed(seed)


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in buffers.items() if tensor is not None}


def _put_back(tensor: Tensor | None, copy: Tensor) -> None:
    if tensor is not None:
        with torch.no_grad():
            tensor.copy_(copy)
