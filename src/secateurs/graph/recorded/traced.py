"""A module whose own Python code was replaced by a recording of it, in which every number can be edited.

Where Python code hard-wires a number that a cut changes (a padding, a head size, the sizes of a view), no attribute can
be made to follow. `traced_forward` records what the module does and replays it: the children, parameters and buffers
stay, and so do their names; each torch function that the module called becomes a step with its integers in `numbers`.

What a recording fixes: the branches that the code took, and the sizes that it read from shapes, but for those that
grow with the batch if calls with two batch sizes were given. With one call the batch size is fixed as well.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.batch import leaves
from ...core.errors import FileError, ModelError
from .recording import Arguments, function_named, recorded
from .templates import built, check, fitted, tag_of

__all__ = ["Step", "TracedForward", "traced_forward"]

_DOCUMENT = ("class", "signature", "batch", "inputs", "output", "output_numbers", "steps")
_SIGNATURE = ("positional", "keyword", "more_positional", "more_keyword", "defaults")
_STEP = ("function", "child", "arguments", "result", "grad", "numbers")


def traced_forward(module: nn.Module, calls: Sequence[Arguments]) -> TracedForward:
    """`module` itself, which from now on replays what its code did on `calls`.

    Its class changes in place, so that weights, flags, hooks and the names in its state dict stay. It runs at any
    batch size if `calls` has two, at any shape that its numbers allow, and in training as in evaluation mode: a module
    that takes other steps in training is refused.

    Args:
        module: real or on the meta device; no other module of the model is changed.
        calls: what it was called with, `(args, kwargs)` of each call; with two or more that differ in the leading axis
            of a tensor, integers that are a multiple of it follow it.

    Raises:
        ModelError: the module cannot be replaced or recorded, with the reason; it is as it was.
    """
    _refuse_special(module)
    if not calls:
        raise ModelError(f"{type(module).__name__} was not called, so there is nothing to record.")
    try:
        return TracedForward.from_dict(module, _document(module, calls))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{type(module).__name__} cannot be recorded ({type(error).__name__}: {error}).") from error


def _document(module: nn.Module, calls: Sequence[Arguments]) -> dict[str, Any]:
    found = recorded(module, calls)
    cls = f"{type(module).__module__}:{type(module).__qualname__}"
    steps = [_numbered(step) for step in found.pop("steps")]
    numbers = _Numbers()
    return {
        **found,
        "class": cls,
        "output": numbers(found["output"]),
        "output_numbers": numbers.found,
        "steps": steps,
    }


class Step(nn.Module):
    """One call that a traced forward makes: of a torch function, or of a child.

    Args:
        function: the name of the torch function; empty for a child.
        child: the child's path; empty for a function.
        arguments: `args` and `kwargs` as templates.
        result: the pattern that names what comes out.
        grad: whether the call stood outside `torch.no_grad`.
        numbers: the integers of the arguments, in order; editable.
        released: names of values that no later step uses.
    """

    def __init__(
        self,
        *,
        function: str,
        child: str,
        arguments: dict[str, Any],
        result: Any,
        grad: bool,
        numbers: Sequence[int],
        released: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.function = function
        self.child = child
        self.arguments = arguments
        self.result = result
        self.grad = grad
        self.numbers = tuple(numbers)
        self.released = tuple(released)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for arguments in which every name was replaced by its value."""
        return function_named(self.function)(*args, **kwargs)

    def extra_repr(self) -> str:
        """What is called, with which integers."""
        return f"{self.function or self.child}, numbers={self.numbers}"

    def to_dict(self) -> dict[str, Any]:
        """The step as plain JSON."""
        return {**{name: getattr(self, name) for name in _STEP}, "numbers": list(self.numbers)}


class TracedForward(nn.Module):
    """A module that replays a recording of its former class. It is never constructed: a module changes class.

    Its steps are children named `step_12_view`, which have no tensors; `output_numbers` holds integers that it returns.
    """

    output_numbers: tuple[int, ...]
    recording: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the recorded code returns.

        Raises:
            ModelError: it is called in another form than it was recorded in.
        """
        run = _Run(self, args, kwargs)
        for step in self.steps():
            positional, named = run.arguments(step)
            called = self.get_submodule(step.child) if step.child else step
            with nullcontext() if step.grad else torch.no_grad():
                result = called(*positional, **named)
            fitted(step.result, result, run.values, f"the result of {step.function or step.child}")
            for key in step.released:
                run.values.pop(key, None)
        return run.built(self.recording["output"], self.output_numbers)

    def steps(self) -> list[Step]:
        """The steps in order."""
        return [child for child in self._modules.values() if isinstance(child, Step)]

    def extra_repr(self) -> str:
        """The class that was replaced."""
        return str(self.recording["class"])

    def to_dict(self) -> dict[str, Any]:
        """The recording with its numbers as they are now, as plain JSON."""
        steps = [step.to_dict() for step in self.steps()]
        return {**self.recording, "output_numbers": list(self.output_numbers), "steps": steps}

    @classmethod
    def from_dict(cls, module: nn.Module, document: Mapping[str, Any]) -> TracedForward:
        """`module` itself, turned into the traced forward that `to_dict` described.

        Args:
            module: of the class that was traced, with children and tensors of the same names.

        Raises:
            FileError: the document is malformed, names a function that is not torch's, or children or tensors that
                `module` does not have.
        """
        _check(module, document)
        for name in [name for name, value in vars(module).items() if _is_local(value)]:
            delattr(module, name)
        for name in [name for name, child in module._modules.items() if isinstance(child, Step)]:
            delattr(module, name)
        module.__class__ = cls
        traced: TracedForward = module  # type: ignore[assignment]  # its class has just changed
        traced.recording = {name: document[name] for name in _DOCUMENT if name not in ("output_numbers", "steps")}
        traced.output_numbers = tuple(document["output_numbers"])
        released = _released(document)
        for i, step in enumerate(document["steps"]):
            traced.add_module(f"step_{i}_{_short(step)}", Step(**step, released=released[i]).train(module.training))
        return traced

    def check(self) -> None:
        """Refuse a recording that did not come from `traced_forward`, before it runs.

        Raises:
            FileError: as in `from_dict`.
        """
        _check(self, self.to_dict())


class _Run:
    """The values of one call, by the names that the recording gave them."""

    def __init__(self, module: TracedForward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        recording = module.recording
        self.values: dict[str, Any] = {}
        self._module = module
        named = _bound(recording["signature"], args, kwargs)
        fitted(recording["inputs"], named, self.values, f"the call of {recording['class']}")
        self._dtype, self._device = _dtype_and_device(leaves(list(self.values.values())), module)
        self._batch = None if recording["batch"] is None else self.values[recording["batch"]].shape[0]

    def arguments(self, step: Step) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments of a step."""
        args, kwargs = step.arguments["args"], step.arguments["kwargs"]
        return self.built(args, step.numbers), {k: self.built(v, step.numbers) for k, v in kwargs.items()}

    def built(self, node: Any, numbers: Sequence[int]) -> Any:
        """The value that a template stands for in this run."""
        return built(
            node,
            {
                "$value": self.values.__getitem__,
                "$tensor": lambda name: _held_tensor(self._module, name),
                "$number": numbers.__getitem__,
                "$batch": lambda share: self.built(share[0], numbers) * self._batch // share[1],
                "$training": lambda pair: pair[0 if self._module.training else 1],
                "$dtype": lambda name: self._dtype if name == "input" else getattr(torch, name),
                "$device": lambda name: self._device if name == "input" else torch.device(name),
            },
        )


def _dtype_and_device(given: Iterable[Tensor], module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Those of the first floating-point tensor that the module was given or holds; integers may be elsewhere."""
    first = None
    for tensor in itertools.chain(given, module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
        first = tensor if first is None else first
    return torch.get_default_dtype(), torch.get_default_device() if first is None else first.device


def _bound(signature: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the recorded `forward` gave them, its defaults filled in."""
    positional, known = signature["positional"], {*signature["positional"], *signature["keyword"]}
    named = {**signature["defaults"], **dict(zip(positional, args, strict=False))}
    named.update({k: v for k, v in kwargs.items() if k in known})
    more, others = args[len(positional) :], {k: v for k, v in kwargs.items() if k not in known}
    for name, rest in ((signature["more_positional"], more), (signature["more_keyword"], others)):
        if name is not None:
            named[name] = rest
        elif rest:
            raise ModelError(
                f"a traced forward takes {', '.join(positional)}; it was given {len(rest)} more arguments."
            )
    return named


def _held_tensor(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found = getattr(module.get_submodule(path), attribute)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{name} is no tensor")
    return found


class _Numbers:
    """Moves the integers of a template into a list that can be edited."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, node: Any) -> Any:
        """The template with names of integers in their places."""
        if type(node) is int:
            self.found.append(node)
            return {"$number": len(self.found) - 1}
        if isinstance(node, list):
            return [self(n) for n in node]
        if isinstance(node, dict) and tag_of(node) == "$batch":
            times, per = node["$batch"]
            # A multiple may be a number of heads; the batch itself is no size that a cut changes.
            return {"$batch": [times if times == 1 else self(times), per]}
        return {k: self(n) for k, n in node.items()} if isinstance(node, dict) else node


def _numbered(step: Mapping[str, Any]) -> dict[str, Any]:
    numbers = _Numbers()
    return {**step, "arguments": numbers(step["arguments"]), "numbers": numbers.found}


def _short(step: Mapping[str, Any]) -> str:
    name: str = (step["child"] or step["function"].removesuffix(".__get__")).rpartition(".")[2]
    return name.strip("_")


def _mentioned(node: Any, tag: str) -> Iterator[str]:
    """What stands under `tag` in a template, in order."""
    if isinstance(node, dict):
        if tag in node:
            yield node[tag]
        for inner in node.values():
            yield from _mentioned(inner, tag)
    elif isinstance(node, list):
        for inner in node:
            yield from _mentioned(inner, tag)


def _released(document: Mapping[str, Any]) -> list[list[str]]:
    """For each step, the values that none after it needs, so that memory is held no longer than by the original."""
    last = {
        name: i
        for i, step in enumerate(document["steps"])
        for part in _USES
        for name in _mentioned(step[part], "$value")
    }
    for name in _mentioned(document["output"], "$value"):
        last.pop(name, None)
    return [[name for name, at in last.items() if at == i] for i in range(len(document["steps"]))]


_USES = ("arguments", "result")


def _refuse_special(module: nn.Module) -> None:
    """Refuse modules that are more than their `forward`, their children and their tensors."""
    what, cls = type(module).__name__, type(module)
    own = [name for name in _STATE if getattr(cls, name) is not getattr(nn.Module, name)]
    if isinstance(module, (TracedForward, torch.jit.ScriptModule)) or "forward" in vars(module):
        raise ModelError(f"{what} cannot be traced: its forward is not that of its class.")
    if parametrize.is_parametrized(module):
        raise ModelError(f"{what} cannot be traced: it is parametrized; remove its parametrizations first.")
    if own:
        raise ModelError(f"{what} cannot be traced: it has its own {own[0]}, so its state dict would change.")


_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")


def _is_local(value: Any) -> bool:
    """Whether it is a function that no other program could import; only the code that was replaced called it."""
    if isinstance(value, functools.partial):
        return _is_local(value.func)
    return isinstance(value, types.FunctionType) and "<" in value.__qualname__


def _check(module: nn.Module, document: Mapping[str, Any]) -> None:
    what = f"the traced forward of {document.get('class')!r}"
    try:
        _check_fields(document, _DOCUMENT, what)
        _check_fields(document["signature"], _SIGNATURE, what)
        check([document["inputs"], document["output"]], len(document["output_numbers"]), what)
        known = set(_mentioned(document["inputs"], "$value"))
        _check_names(module, [{"$value": name} for name in [document["batch"]] if name is not None], known)
        for i, step in enumerate(document["steps"]):
            _check_step(module, step, f"step {i} of {what}")
            _check_names(module, step["arguments"], known)
            known.update(_mentioned(step["result"], "$value"))
        _check_names(module, document["output"], known)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{what} is malformed or belongs to another module ({error})") from error


def _check_step(module: nn.Module, step: Mapping[str, Any], place: str) -> None:
    _check_fields(step, _STEP, place)
    if step["child"]:
        module.get_submodule(step["child"])
    else:
        function_named(step["function"])
    if not all(type(n) is int for n in step["numbers"]):
        raise FileError(f"{place} has numbers that are no integers")
    for argument in (*step["arguments"]["args"], *step["arguments"]["kwargs"].values(), step["result"]):
        check(argument, len(step["numbers"]), place)


def _check_names(module: nn.Module, node: Any, known: Set[str]) -> None:
    """Refuse names of tensors that the module does not hold, and of values that no earlier step made."""
    for name in _mentioned(node, "$tensor"):
        _held_tensor(module, name)
    for name in _mentioned(node, "$value"):
        if name not in known:
            raise KeyError(f"no value {name!r}")


def _check_fields(node: Mapping[str, Any], fields: Sequence[str], place: str) -> None:
    odd = sorted(set(node) ^ set(fields))
    if odd:
        raise FileError(f"{place} has fields other than {', '.join(fields)}: see {odd[0]!r}")
