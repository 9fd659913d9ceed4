"""Derivatives of a loss: the loss itself, its gradient, and its Hessian times a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Loss, default_loss, device_of, leaves, move, run, split
from .errors import DataError, ModelError

__all__ = ["gradients_of", "hessian_product", "loss_of", "samples_in"]


def loss_of(model: nn.Module, batch: Any, loss: Loss | None = None) -> Tensor:
    """The loss of `model` on `batch`: a scalar with its graph; for batches and the default loss see `core.batch`.

    Raises:
        DataError: there are no labels, or the loss is not one number.
        ModelError: the model fails on the batch, or the loss is NaN or infinite.
    """
    inputs, target = split(batch)
    output = run(model, move(inputs, device_of(model)))
    if target is not None:
        target = move(target, next((leaf.device for leaf in leaves(output)), device_of(model)))
    value = (loss or default_loss)(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DataError(f"the loss must be a tensor of one number per batch, got {found}: reduce it, with a mean.")
    if not bool(torch.isfinite(value)):
        raise ModelError(f"the loss is {value.item()} on a batch: look at the data, or run the model in float32.")
    return value.squeeze()


def gradients_of(
    value: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False
) -> dict[str, Tensor | None]:
    """Gradients of the scalar `value` by name, None for a parameter that it does not depend on."""
    if not value.requires_grad:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, create_graph=create_graph)
    return dict(zip(parameters, found, strict=True))


def hessian_product(
    value: Tensor, parameters: Mapping[str, Tensor], vector: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """The Hessian of the scalar `value` times `vector`, by name; None where the product is zero for lack of a path.

    The graph of `value` is freed.

    Args:
        value: with its graph, from operations that have second derivatives.
        parameters: with respect to these.
        vector: per name a tensor of the parameter's shape, taken as constant.
    """
    first = gradients_of(value, parameters, create_graph=True)
    terms = [(vector[name] * gradient).sum().flatten() for name, gradient in first.items() if gradient is not None]
    return gradients_of(torch.cat(terms).sum(), parameters) if terms else dict.fromkeys(parameters)


def samples_in(batch: Any) -> int:
    """Number of samples of `batch`: the first axis of its first tensor that has one."""
    return next((len(leaf) for leaf in leaves(split(batch)[0]) if leaf.dim()), 1)
