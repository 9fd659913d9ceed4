"""Modules whose Python code stands in the way of a cut, replaced by recordings whose numbers can follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...core.batch import call, device_of, leaves
from ...core.errors import ModelError
from ..run import Executing, place, running
from ..twin import meta_twin, shared_twin
from .recording import Arguments
from .traced import TracedForward, traced_forward

__all__ = ["install", "recordings"]


def recordings(model: nn.Module, example_inputs: Any, paths: Iterable[str], *, real: bool) -> dict[str, dict[str, Any]]:
    """What `TracedForward.from_dict` needs for each module named that can be recorded; `model` is not changed.

    Args:
        paths: of modules that ran on the example inputs; the model itself is left out where it has more than a forward.
        real: on real tensors instead of shapes only.
    """
    copy = shared_twin(model) if real else meta_twin(model)
    wanted = [path for path in sorted(paths, key=len, reverse=True) if _recordable(model, path)]
    inputs = place(example_inputs, device_of(model) if real else "meta")
    calls = _calls(copy, inputs, wanted)
    try:
        more = _calls(copy, _doubled(inputs), wanted)
    except Exception:  # noqa: BLE001  (a model for one batch size is recorded for that)
        more = {}
    found: dict[str, dict[str, Any]] = {}
    for path in wanted:
        try:
            with Executing():
                seen = [*calls[path][:1], *more.get(path, [])[:1]]
                found[path] = traced_forward(copy.get_submodule(path), seen).to_dict()
        except ModelError:
            continue
    return found


def install(model: nn.Module, documents: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """`model` itself, with each module named turned into its recording."""
    for path, document in documents.items():
        TracedForward.from_dict(model.get_submodule(path), document)
    return model


def _recordable(model: nn.Module, path: str) -> bool:
    """Whether it makes sense: not where every number is an attribute already, nor where more than a forward is lost."""
    around = [model.get_submodule(path[:end]) for end in range(len(path) + 1) if end == len(path) or path[end] == "."]
    known = any(getattr(module, "numbers_are_attributes", False) for module in (model, *around))
    return not known and (bool(path) or _is_plain(model))


def _is_plain(model: nn.Module) -> bool:
    """Whether nothing but a forward would be lost with the model's class."""
    own = {name for kind in type(model).__mro__ for name in vars(kind) if kind not in nn.Module.__mro__}
    return not any(callable(getattr(model, name)) for name in own if not name.startswith("_") and name != "forward")


def _calls(model: nn.Module, inputs: Any, paths: Iterable[str]) -> dict[str, list[Arguments]]:
    calls: dict[str, list[Arguments]] = {path: [] for path in paths}

    def noting(path: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: calls[path].append((args, kwargs))

    handles = [model.get_submodule(p).register_forward_pre_hook(noting(p), with_kwargs=True) for p in calls]
    with running(model), Executing():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


def _doubled(inputs: Any) -> Any:
    """The inputs twice, along the axis that leads their first tensor."""
    first = next((t for t in leaves(inputs) if t.dim()), None)
    size = 0 if first is None else first.shape[0]
    twice = {id(t): torch.cat([t, t]) for t in leaves(inputs) if t.dim() and t.shape[0] == size}
    return tree_map_only(Tensor, lambda t: twice.get(id(t), t), inputs)
