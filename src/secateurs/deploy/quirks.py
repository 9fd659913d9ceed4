"""What libraries do to a model behind its attributes, and what becomes of it in a saved one.

transformers keeps, per model class, a global note of the outputs that `output_hidden_states=True` collects, written by
the constructor, which loading does not call; and when they are first asked for it hangs hooks that do nothing
otherwise. The note is renewed on loading; the hooks are left out, and transformers hangs them again when needed.

torch's weight norm hangs a translator for checkpoints of older releases, which stays when the norm has been removed.

A traced forward of ours keeps in its attributes what it will call; that is judged before the model is handed out.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..graph.traced import TracedForward

__all__ = ["is_inert", "transient", "wake"]

_CAPTURE = "transformers.utils.output_capturing"
_FLAG = "_output_capturing_hooks_installed"
_WEIGHT_NORM = "weight_norm.<locals>._weight_norm_compat_hook"
_REGISTRY = "_CAN_RECORD_REGISTRY"
# Where transformers 4 and 5 keep the note.
_REGISTRY_HOMES = (_CAPTURE, "transformers.utils.generic")


def is_inert(hook: Any) -> bool:
    """Whether a hook may be left out: it does nothing unasked and is hung again when needed, or has had its day."""
    name = getattr(hook, "__qualname__", "")
    return getattr(hook, "__module__", None) == _CAPTURE or name == _WEIGHT_NORM


def transient(module: nn.Module) -> frozenset[str]:
    """Names of attributes that are not saved: they say that inert hooks are hung."""
    return frozenset({_FLAG} & vars(module).keys())


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
