"""What a module's own Python code does with tensors, as data: the torch functions and child modules that it calls.

Recorded with a `TorchFunctionMode` while the module's own forward runs. What happens inside a child is the child's.
Several recordings of one module tell its numbers apart: those that grow with the batch, the constants that follow
`training`, the dtypes that follow the input.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, get_overridable_functions, resolve_name

from ...core.batch import device_of, leaves
from ...core.errors import FileError, ModelError
from ..comparing import Differs, follow_dtype, follow_training, leading_batch, merged, overlaid, training_by_name
from ..run import Executing
from ..twin import shared_twin
from .templates import described, mapped

__all__ = ["Arguments", "function_named", "recorded"]

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]

# They compute on tensors or make them, though PyTorch does not count them among the functions that can be overridden.
_FURTHER = {
    "torch": "arange as_tensor empty eye full linspace logspace normal ones rand rand_like randint randint_like randn "
    "randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros",
    "torch.Tensor": "new_empty new_full new_ones new_tensor new_zeros unflatten",
    "torch.nn.functional": "hardsigmoid hardswish sigmoid tanh",
}
# Through these Python learns a value, and goes another way on other inputs.
_VALUES = ("__array__", "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "item", "numpy")
_READING = frozenset(
    {f"torch.Tensor.{name}" for name in (*_VALUES, "allclose", "equal", "is_nonzero", "tolist")}
    | {"torch.allclose", "torch.equal", "torch.is_nonzero"}
)
_WRITING = "torch.Tensor.__setitem__"


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a step may call, by its name: PyTorch's own, those that compute on tensors or make them."""
    homes = {"torch": torch, "torch.Tensor": Tensor, "torch.nn.functional": nn.functional}
    table = {f"{home}.{name}": getattr(homes[home], name) for home, names in _FURTHER.items() for name in names.split()}
    for functions in get_overridable_functions().values():
        for function in functions:
            table.setdefault(str(resolve_name(function)), function)
    return table


def function_named(name: str) -> Callable[..., Any]:
    """The torch function of that name.

    Raises:
        FileError: it is none that this PyTorch can override, so no step ever called it.
    """
    if name not in _functions():
        raise FileError(f"{name!r} is no function of torch that a traced forward may call")
    return _functions()[name]


def recorded(module: nn.Module, calls: Sequence[Arguments]) -> dict[str, Any]:
    """What `module` does on all of `calls`: `signature`, `inputs`, `steps`, `output` and `batch`, as plain JSON.

    The module is not changed; it runs as a copy in evaluation mode that shares its parameters.

    Raises:
        ModelError: its code does what cannot be recorded, or other things in one call than in another.
    """
    runs = [_recording(shared_twin(module), args, kwargs) for args, kwargs in calls]
    key, batches = leading_batch([run.leading for run in runs])
    same = merged([run.tree for run in runs], batches)
    plain, (args, kwargs) = runs[0].tree, calls[0]
    training = _unless_it_fails(lambda: _recording(shared_twin(module).train(), args, kwargs))
    try:
        same = overlaid(same, plain, training, follow_training) if training else training_by_name(same)
    except Differs as error:
        raise ModelError(f"{type(module).__name__} does other things in training than in evaluation mode.") from error
    double = _unless_it_fails(lambda: _recording(copy.deepcopy(shared_twin(module)).double(), *_cast((args, kwargs))))
    with contextlib.suppress(Differs):
        same = overlaid(same, plain, double, follow_dtype) if double else same
    return {"signature": _signature(module), "batch": key, **same}


class _Recorder(TorchFunctionMode):
    """Notes what is called, in order; tensors go by the names that they were given when they appeared."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.tree: dict[str, Any] = {"inputs": {}, "steps": [], "output": None}
        self.leading: dict[str, int] = {}
        self._what = type(module).__name__
        self._names: dict[int, Any] = {}
        self._alive: list[Any] = []
        self._devices: set[torch.device] = set()
        self._grad = True
        self._depth = 0
        self._call: dict[str, Any] = {}
        for name, tensor in _own_tensors(module):
            self._named(tensor, {"$tensor": name})
        for path, child in module.named_modules():
            if path:
                child.register_forward_pre_hook(self._entering(path), prepend=True, with_kwargs=True)
                child.register_forward_hook(self._leaving, with_kwargs=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if not k.startswith("_")}
        result = func(*args, **kwargs)
        if self._depth:
            return result
        if func is torch._C._set_grad_enabled:
            self._grad = args[0]
            return result
        name = str(resolve_name(func))
        if self._ends_here(name, func, result):
            return result
        return self._step({"function": name, "child": ""}, self._arguments(args, kwargs), result)

    def begin(self, arguments: dict[str, Any]) -> None:
        """Note what the module is called with."""
        self.tree["inputs"] = self._pattern(arguments, "in")
        for key, value in self._inputs(arguments):
            if value.dim():
                self.leading[key] = value.shape[0]

    def end(self, output: Any) -> None:
        """Note what the module returns."""
        self.tree["output"] = described(output, self._known)

    def _inputs(self, arguments: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
        for value in leaves(arguments):
            self._devices.add(value.device)
            if "$value" in self._names.get(id(value), {}):
                yield self._names[id(value)]["$value"], value

    def _ends_here(self, name: str, func: Any, result: Any) -> bool:
        """Whether the call is no step because it only tells shapes, dtypes and the like."""
        if any(True for _ in _tensors(result)) or name == _WRITING:
            if name not in _functions():
                raise ModelError(f"{self._what} calls {getattr(func, '__name__', func)}, which cannot be recorded.")
            return False
        if name in _READING:
            raise ModelError(f"{self._what} reads the value of a tensor ({name}), so it may do other things elsewhere.")
        if result is None and name in _functions() and not name.endswith(".__get__"):
            raise ModelError(f"{self._what} calls {name}, which returns nothing and cannot be recorded.")
        return True

    def _step(self, step: dict[str, Any], arguments: Any, result: Any) -> Any:
        result = self._apart(result)
        key = str(len(self.tree["steps"]))
        pattern = self._pattern(result, key)
        self.tree["steps"].append({**step, "arguments": arguments, "result": pattern, "grad": self._grad})
        return result

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "args": [described(v, self._known) for v in args],
            "kwargs": {k: described(v, self._known) for k, v in kwargs.items()},
        }

    def _apart(self, result: Any) -> Any:
        """`result` with a view in place of each tensor that has a name already.

        What evaluation mode passes through (dropout) would otherwise have one name with what it was given.
        """
        if not any(id(t) in self._names for t in _tensors(result)):
            return result
        return mapped(result, lambda v: v.view_as(v) if isinstance(v, Tensor) and id(v) in self._names else v)

    def _pattern(self, value: Any, prefix: str) -> Any:
        count = 0

        def name(inner: Any) -> Any:
            nonlocal count
            if isinstance(inner, torch.device):
                return {"$ignored": "device"}
            if id(inner) not in self._names or "$tensor" in self._names[id(inner)]:
                self._named(inner, {"$value": f"{prefix}.{count}"})
                count += 1
            return self._names[id(inner)]

        return described(value, name, lambda _: {"$ignored": "int"})

    def _named(self, value: Any, node: dict[str, Any]) -> None:
        self._names[id(value)] = node
        self._alive.append(value)
        if isinstance(value, Tensor):
            self._devices.add(value.device)

    def _known(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return {"$device": "input" if value in self._devices else str(value)}
        if id(value) not in self._names:
            kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
            raise ModelError(
                f"{self._what} uses {kind} that it was not given, does not hold and no recorded function made."
            )
        return self._names[id(value)]

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(_child: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._depth:
                self._call = {"child": path, "arguments": self._arguments(args, kwargs)}
            self._depth += 1

        return enter

    def _leaving(self, _child: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        self._depth -= 1
        if self._depth:
            return None
        self._depth = 1
        output = self._step({"function": "", "child": self._call["child"]}, self._call["arguments"], output)
        self._depth = 0
        return output


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    described(value, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    return found


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters, buffers and tensors in attributes, each once, under its first qualified name."""
    seen: set[int] = set()
    for path, inner in module.named_modules():
        for name, tensor in {**vars(inner), **inner._buffers, **inner._parameters}.items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor


def _recording(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Recorder:
    """What one call does. `module` is used up: it keeps the hooks of the recorder."""
    # Without gradients to follow, every change of the gradient mode can be seen and nothing is kept for them.
    module.requires_grad_(False)
    args, kwargs = _fresh((args, dict(kwargs)))
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    recorder = _Recorder(module)
    recorder.begin(dict(bound.arguments))
    before = _held(module)
    device = device_of(module)
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, torch.enable_grad(), Executing(), recorder:
        output = module.forward(*args, **kwargs)
    recorder.end(output)
    changed = sorted(name for name, value in _held(module).items() if before.get(name) is not value)
    if changed:
        raise ModelError(f"{type(module).__name__} sets its attribute {changed[0]!r} when it runs.")
    return recorder


def _held(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **module._buffers, **module._parameters}


def _fresh(value: Any) -> Any:
    """The arguments with copies of their tensors; what is the same tensor stays the same."""
    copies: dict[int, Any] = {}

    def change(inner: Any) -> Any:
        if not isinstance(inner, Tensor):
            return inner
        return copies.setdefault(id(inner), inner.detach().clone())

    return mapped(value, change)


def _cast(value: Any) -> Any:
    doubles: dict[int, Any] = {}

    def change(inner: Any) -> Any:
        if not (isinstance(inner, Tensor) and inner.is_floating_point()):
            return inner
        return doubles.setdefault(id(inner), inner.double())

    return mapped(value, change)


def _signature(module: nn.Module) -> dict[str, Any]:
    """Names and constant defaults of the parameters of `forward`, so that later calls are bound alike."""
    by_kind: dict[Any, list[str]] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        by_kind.setdefault(parameter.kind, []).append(name)
        if parameter.default is None or type(parameter.default) in (bool, int, float, str):
            defaults[name] = parameter.default
    kinds = inspect.Parameter
    positional = by_kind.get(kinds.POSITIONAL_ONLY, []) + by_kind.get(kinds.POSITIONAL_OR_KEYWORD, [])
    return {
        "positional": positional,
        "keyword": by_kind.get(kinds.KEYWORD_ONLY, []),
        "more_positional": next(iter(by_kind.get(kinds.VAR_POSITIONAL, [])), None),
        "more_keyword": next(iter(by_kind.get(kinds.VAR_KEYWORD, [])), None),
        "defaults": defaults,
    }


def _unless_it_fails(record: Callable[[], _Recorder]) -> dict[str, Any] | None:
    """What the module does in another state; None where its code does not run in it.

    Batch norm refuses to train on one value, and some ops know only one dtype.
    """
    try:
        return record().tree
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None
