"""What libraries do to a model behind its attributes, and what becomes of it in a saved one.

transformers keeps, per model class, a global note of the outputs that `output_hidden_states=True` collects, written by
the constructor, which loading does not call; and when they are first asked for it hangs hooks that do nothing
otherwise. The note is renewed on loading; the hooks are left out, and transformers hangs them again when needed.

torch's parametrizations give a module a class of its own, in which a tensor is a property. A saved module has the class
from before, and on loading gets its properties back. Weight norm also hangs a translator for checkpoints of older
releases, which stays when the norm has been removed; it is left out and hung again where there is a norm.

A traced forward of ours keeps in its attributes what it will call; that is judged before the model is handed out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ..core.errors import FileError
from ..graph.recorded.traced import TracedForward

__all__ = ["is_inert", "own_class", "parametrize_again", "parametrized", "transient", "wake"]

_CAPTURE = "transformers.utils.output_capturing"
_FLAG = "_output_capturing_hooks_installed"
_WEIGHT_NORM = "weight_norm.<locals>._weight_norm_compat_hook"
_REGISTRY = "_CAN_RECORD_REGISTRY"
# Where transformers 4 and 5 keep the note.
_REGISTRY_HOMES = (_CAPTURE, "transformers.utils.generic")


def is_inert(hook: Any) -> bool:
    """Whether a hook may be left out: it does nothing unasked and is hung again when needed, or has had its day."""
    # A copy of a hook that PyTorch has wrapped has lost its name.
    hook = getattr(hook, "hook", hook)
    name = getattr(hook, "__qualname__", "")
    return getattr(hook, "__module__", None) == _CAPTURE or name == _WEIGHT_NORM


def transient(module: nn.Module) -> frozenset[str]:
    """Names of attributes that are not saved: they say that inert hooks are hung."""
    return frozenset({_FLAG} & vars(module).keys())


def parametrized(module: nn.Module) -> list[str]:
    """Names of the tensors of the module that are made by parametrizations."""
    found = parametrize.is_parametrized(module)
    makers = dict(module.get_submodule("parametrizations").named_children()) if found else {}
    return list(makers) if all(map(_makes_a_tensor, makers.values())) else []


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what parametrizations make of it."""
    return type(module).__bases__[0] if parametrized(module) else type(module)


def parametrize_again(module: nn.Module, names: Sequence[str]) -> None:
    """Makes the tensors in `names` properties of a loaded module, whose children make them.

    Raises:
        FileError: its children do not. The message is a fact; the caller adds the file.
    """
    if list(names) != parametrized(module):
        raise FileError(f"a {type(module).__qualname__} does not hold what makes its tensors ({', '.join(names)})")
    if names:
        parametrize._inject_new_class(module)
    for name, maker in zip(names, _makers(module, names), strict=True):
        parametrize._inject_property(module, name)
        if isinstance(maker._modules["0"], parametrizations._WeightNorm):
            module._register_load_state_dict_pre_hook(_translator(name))


def _makers(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [module.get_submodule(f"parametrizations.{name}") for name in names]


def _makes_a_tensor(maker: nn.Module) -> bool:
    return isinstance(maker, parametrize.ParametrizationList) and "0" in maker._modules


def _translator(name: str) -> Any:
    """What weight norm hangs on a module for the old names of its parameters."""
    other = nn.Module()
    other.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
    return next(iter(parametrizations.weight_norm(other, name)._load_state_dict_pre_hooks.values())).hook


def wake(module: nn.Module) -> None:
    """Does for a loaded module what its constructor would have done outside of it.

    Raises:
        FileError: the module would call what a traced forward may not. The message is a fact; the caller adds the file.
    """
    if isinstance(module, TracedForward):
        module.check()
    outputs = getattr(module, "_can_record_outputs", None)
    for home in _REGISTRY_HOMES if outputs is not None else ():
        registry = getattr(sys.modules.get(home), _REGISTRY, None)
        if registry is not None:
            registry[module if home == _CAPTURE else str(type(module))] = outputs
            return
