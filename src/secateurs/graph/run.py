"""How a model is run to be traced: on which device, in which state, in which module, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.batch import move
from .shortcuts import shortcut

__all__ = ["Executing", "execute", "flat", "module_paths", "output_tensors", "place", "running", "tensors_in"]


def flat(values: Iterable[Any]) -> list[Any]:
    """The values inside nested tuples and lists."""
    out: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            out += flat(value)
        else:
            out.append(value)
    return out


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """The tensors inside nested tuples and lists, or the tensor that `value` is."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple([v for v in flat(value) if isinstance(v, Tensor)]) if isinstance(value, Iterable) else ()


@contextmanager
def module_paths(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside: a function that tells the path of the innermost module of `model` that is running."""
    names = {id(m): path for path, m in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if id(module) in names:
            stack.append(names[id(module)])

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        if id(module) in names and stack:
            stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running(model: nn.Module) -> Iterator[Callable[[], str]]:
    """The state in which models are traced: no gradients, no fused attention fast path; gives the module path."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if any(isinstance(m, nn.LSTM) for m in model.modules()):
            # On real tensors an LSTM is one fused kernel of its backend; without that it is the ops that rules know.
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(backend.set_flags, backend.enabled)
                backend.set_flags(False)
        yield stack.enter_context(module_paths(model))


def place(inputs: Any, device: torch.device | str) -> Any:
    """`inputs` on `device`; for the meta device integers stay real, since Python code may ask for their values."""
    if str(device) != "meta":
        return move(inputs, device)
    if isinstance(inputs, Tensor):
        return inputs.to("meta") if inputs.is_floating_point() or inputs.is_complex() else inputs.cpu()
    if isinstance(inputs, (tuple, list)):
        placed = [place(v, device) for v in inputs]
        return type(inputs)(*placed) if hasattr(inputs, "_fields") else type(inputs)(placed)
    if hasattr(inputs, "items"):
        return {k: place(v, device) for k, v in inputs.items()}
    return inputs


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type != "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(v) for v in value)
    return value


def execute(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op itself. A mix of meta and real arguments runs on meta; integers made on meta are made for real."""
    tensors = tensors_in((*args, *kwargs.values()))
    where = {t.is_meta for t in tensors}
    on_meta = True in where
    if len(where) > 1:
        args, kwargs = _on_meta(args), {k: _on_meta(v) for k, v in kwargs.items()}
    if not tensors and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        dtype = kwargs.get("dtype")
        if dtype is None or not dtype.is_floating_point:
            out = func(*args, **{**kwargs, "device": "cpu"})
            return out if not out.is_floating_point() else func(*args, **kwargs)
    made = shortcut(func, args, kwargs) if on_meta else None
    return func(*args, **kwargs) if made is None else made


class Executing(TorchDispatchMode):
    """Runs every op by `execute`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return execute(func, args, kwargs or {})


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output that a caller sees; caches of attention layers are not among them."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "items"):
        return [t for k, v in output.items() if k not in _CARRIED for t in output_tensors(v)]
    if isinstance(output, (tuple, list)):
        return [t for v in output for t in output_tensors(v)]
    if is_dataclass(output):
        return [t for f in fields(output) for t in output_tensors(getattr(output, f.name))]
    if hasattr(output, "__dict__") and not type(output).__name__.endswith("Cache"):
        held = [v for v in vars(output).values() if isinstance(v, _CONTAINERS) or is_dataclass(v)]
        return [t for v in held for t in output_tensors(v)]
    return []


# What a step of generation hands to the next; its form follows the model's.
_CARRIED = frozenset({"past_key_values", "cache_params", "state", "mems"})
_CONTAINERS = (Tensor, tuple, list, dict)
