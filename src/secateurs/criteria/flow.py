"""Flow criteria, made for networks that are not trained yet: gradient flow (GraSP, CroP), synaptic flow (SynFlow)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.batch import Loss, default_loss, device_of, leaves, main_output, move, split
from ..core.errors import DataError, ModelError, OptionError
from .evidence import hessian_gradient, mapped, samples, values
from .lifting import resolve
from .preserve import preserved
from .registry import criterion

__all__ = ["crop", "grasp", "synflow"]


@criterion("grasp", needs=("data", "labels"), signed=True, paper="Wang et al. 2020, arXiv 2002.07376")
def grasp(
    model: nn.Module,
    names: Sequence[str],
    *,
    data: Sequence[Any],
    loss: Loss | None,
    seed: int,
    temperature: float = 1.0,
    train: bool = False,
) -> dict[str, Tensor]:
    """w·(Hg): by how much the squared gradient norm falls, to first order and halved, when w becomes zero.

    The paper's score is -w·(Hg) and its largest entries are removed. Here it is negated, so that as everywhere the
    highest are kept. H and g are those of the loss over all of the data, with respect to the scored tensors.

    Args:
        model, names, data, loss, seed, train: see `gradient.snip`.
        temperature: divides the logits before the loss; 1 (default) is the paper's equation, 200 the authors' code.
    """
    return {n: w * h for n, (w, h) in _curved(model, names, data, loss, seed, temperature, train).items()}


@criterion("crop", needs=("data", "labels"), paper="Rachwan et al. 2022, arXiv 2206.10451")
def crop(
    model: nn.Module,
    names: Sequence[str],
    *,
    data: Sequence[Any],
    loss: Loss | None,
    seed: int,
    temperature: float = 1.0,
    train: bool = False,
) -> dict[str, Tensor]:
    """|w·(Hg)|: how far the gradient flow changes, up or down, when w becomes zero.

    Args:
        model, names, data, loss, seed, temperature, train: see `grasp`.
    """
    return {n: (w * h).abs() for n, (w, h) in _curved(model, names, data, loss, seed, temperature, train).items()}


@criterion("synflow", needs=("inputs",), paper="Tanaka et al. 2020, arXiv 2006.05467")
def synflow(
    model: nn.Module, names: Sequence[str], *, data: Sequence[Any], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """|w|·dR/d|w| / R, with R the sum of the outputs for an input of ones once every parameter is made positive.

    The division by R is a common factor that no ranking sees; with it the scores are the share of the flow through
    each weight, and those of each layer of a network without biases add up to one. One pass: the paper's hundred
    rounds of scoring and pruning are the caller's schedule. Parameters and buffers are replaced by
    their absolute values for the call only (in eval mode); the model's own tensors are not touched.

    Args:
        model: of any kind that takes floating-point inputs.
        names: parameters.
        data: one batch, of which only the shapes count.
        dtype: of the computation; R overflows float32 in deep networks, so the default is float64.

    Raises:
        ModelError: all inputs are integers (there is no "one" among tokens), or R is zero or overflows.
    """
    args, kwargs = _ones(data[0], dtype, device_of(model))
    state = {n: _positive(t, dtype) for n, t in (*model.named_parameters(), *model.named_buffers())}
    canonical = {id(p): n for n, p in model.named_parameters()}
    sources = {n: canonical[id(p)] for n, p in resolve(model, names).items()}
    scored = {n: state[n].requires_grad_() for n in dict.fromkeys(sources.values())}
    with preserved(model), torch.enable_grad():
        total = main_output(functional_call(model, state, args, kwargs)).sum()
    if not bool(torch.isfinite(total)) or total == 0 or not total.requires_grad:
        raise ModelError(
            f"synflow: the flow through the scored tensors is {total.item()}, of which there are no shares; use "
            f"another criterion, or dtype=torch.float64 if it overflows."
        )
    found = torch.autograd.grad(total, list(scored.values()), allow_unused=True)
    gradient = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(scored.items(), found, strict=True)}
    return {n: (scored[s] * gradient[s] / total).detach().abs() for n, s in sources.items()}


def _curved(
    model: nn.Module,
    names: Sequence[str],
    data: Sequence[Any],
    loss: Loss | None,
    seed: int,
    temperature: float,
    train: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per name the weights and the Hessian-gradient product."""
    if not temperature > 0:
        raise OptionError(f"temperature must be positive, got {temperature}.")
    cooled = loss if temperature == 1 else _tempered(loss, temperature)
    product = hessian_gradient(model, data, cooled, names=names, train=train, seed=seed)
    return {n: (w, product[n]) for n, w in values(model, names).items()}


def _tempered(loss: Loss | None, temperature: float) -> Loss:
    def tempered(output: Any, target: Any) -> Tensor:
        if target is None:
            raise DataError(
                "a temperature needs batches as (inputs, target), as the model's own loss cannot be tempered."
            )
        return (loss or default_loss)(main_output(output) / temperature, target)

    return tempered


def _positive(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy for the call: absolute values in `dtype`; integer and boolean tensors as they are."""
    copy = tensor.detach().clone()
    return copy.to(dtype).abs() if tensor.is_floating_point() else copy


def _ones(batch: Any, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments like the inputs of `batch`, but of one sample and of ones; masks stay."""
    inputs = split(next(samples(batch)))[0]
    if isinstance(inputs, dict):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if not any(leaf.is_floating_point() for leaf in leaves(inputs)):
        raise ModelError(
            "synflow feeds a tensor of ones, and this model takes integers (tokens): use another criterion, as snip."
        )
    made = move(mapped(inputs, lambda t: torch.ones_like(t, dtype=dtype) if t.is_floating_point() else t), device)
    if isinstance(made, dict):
        return (), made
    return (made if isinstance(made, tuple) else (made,)), {}
