"""Modules that only run another one: what is pruned is the model inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import ModelError

__all__ = ["unwrapped"]


def unwrapped(model: Any) -> nn.Module:
    """The model inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`; any other is itself.

    Raises:
        ModelError: it is no module, but a state dict, a class or a function, say.

    >>> inner = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(inner)) is inner
    True
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ModelError(f"a model is a torch.nn.Module that is built and holds its weights, got {what}.")
    inside = getattr(model, "_orig_mod", None)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inside = model.module
    return unwrapped(inside) if isinstance(inside, nn.Module) else model
