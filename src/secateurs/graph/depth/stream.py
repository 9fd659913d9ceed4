"""Which modules pass their input on with something added to it: followed through the ops of one run.

A block of a residual network maps a tensor to one of the same shape, and from its input to its output there is a way
along which nothing is mixed: only views, norms and elementwise ops, and somewhere the addition of what the block
computed from its input. So its removal leaves the stream as it was. A linear layer or an activation has no such way.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..run import Executing, tensors_in

__all__ = ["Block", "Fields", "Streams", "passed"]

# Elementwise ops that PyTorch does not tag as such, reorderings, and norms.
_CARRYING = frozenset(
    {
        *("_to_copy", "alias", "clone", "contiguous", "copy", "detach", "dropout", "hardswish", "native_dropout"),
        *("_reshape_alias", "_unsafe_view", "permute", "reshape", "roll", "squeeze", "t", "transpose", "unsqueeze"),
        *("_fused_rms_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm"),
        *("native_group_norm", "native_layer_norm", "view"),
    }
)
_ADDING = frozenset({"add", "addcmul", "lerp", "rsub", "sub"})
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Block:
    """What a run showed of a module.

    Args:
        output: how its output is made of its input when it passes that on, as `passed` takes it; None where no
            residual stream goes through it.
        unread: whether something in its output is neither the stream nor one of its inputs.
    """

    output: Mapping[str, Any] | None
    unread: bool = False


class Fields(dict[str, Any]):
    """A mapping whose values can also be had by position and as attributes, as of a model's output."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(name) from None


def passed(output: Mapping[str, Any], unread: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What a block that is left out returns: its input, in the form in which it returned its output.

    Args:
        output: `{"input": [position, name, key …]}` for an argument or what lies in it, `{"value": constant}`,
            `{"tuple": […]}`, `{"list": […]}`, `{"fields": {…}}` of such, or `{"unread": true}`.
        unread: what stands for values that only the block itself could compute; nobody may look at it.
        args, kwargs: what the block is called with.
    """

    def made(node: Mapping[str, Any]) -> Any:
        (kind, held), *_ = node.items()
        match kind:
            case "input":
                return _argument(held, args, kwargs)
            case "value":
                return held
            case "tuple":
                return tuple(map(made, held))
            case "list":
                return list(map(made, held))
            case "fields":
                return Fields({key: made(part) for key, part in held.items()})
        return unread

    return made(output)


def _argument(address: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    position, name, *keys = address
    value: Any = args[position] if 0 <= position < len(args) else kwargs.get(name)
    for key in keys:
        value = value[key]
    return value


class Streams(Executing):
    """Follows, while a model runs inside, the stream through each of the modules given.

    `blocks` has what was seen of each that ran, by path, and `calls` how often it was called.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks: dict[str, Block] = {}
        self.calls: Counter[str] = Counter()
        self._frames: list[_Frame] = []
        self._handles: list[RemovableHandle] = []
        for path, module in modules.items():
            self._watch(path, module)

    def _watch(self, path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._frames.append(_Frame(_arguments(module, args, kwargs)))

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            frame = self._frames.pop()
            self.calls[path] += 1
            self.blocks.setdefault(path, frame.block(output))

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given, made = tensors_in([args, list((kwargs or {}).values())]), tensors_in(out)
        for frame in self._frames:
            frame.follow(func, given, made)
        return out


Address = tuple[Any, ...]


class _Frame:
    """One call of a module: which tensors are its stream, and which it computed from its input."""

    def __init__(self, arguments: Mapping[Address, Any]) -> None:
        self._arguments = arguments
        tensors = {address: v for address, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
        # By id: where the stream came from, and whether something was added to it.
        self._streams: dict[int, tuple[Address, bool]] = {id(t): (address, False) for address, t in tensors.items()}
        self._computed: set[int] = set()
        # An id is good for as long as its tensor lives.
        self._alive: list[Tensor] = list(tensors.values())

    def follow(self, func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Notes what an op makes of tensors of this call."""
        known = [t for t in given if id(t) in self._streams or id(t) in self._computed]
        if not known or not made:
            return
        carried = [t for t in known if id(t) in self._streams and t.numel() == made[0].numel()]
        state = self._carried(func, carried, known, made[0]) if carried and _carries(func) else None
        self._computed.update(id(t) for t in made)
        self._alive.extend(made)
        if state is not None:
            self._streams[id(made[0])] = state

    def _carried(
        self, func: Any, carried: Sequence[Tensor], known: Sequence[Tensor], made: Tensor
    ) -> tuple[Address, bool]:
        states = [self._streams[id(t)] for t in carried]
        origin = next((origin for origin, added in states if added), states[0][0])
        added = _name(func) in _ADDING and any(id(t) not in self._streams and t.numel() == made.numel() for t in known)
        return origin, added or any(added for _, added in states)

    def block(self, output: Any) -> Block:
        """What the call showed, given what it returned."""
        first = next(_leaves(output), None)
        origin, added = self._streams.get(id(first), ((), False))
        if not isinstance(first, Tensor) or not added or not _alike(self._arguments[origin], first):
            return Block(None)
        node = self._described(output, first, origin)
        return Block(node, _has_unread(node))

    def _described(self, value: Any, stream: Tensor, origin: Address) -> dict[str, Any]:
        if value is stream:
            return {"input": list(origin)}
        if isinstance(value, _PLAIN):
            return {"value": value}
        for address, argument in self._arguments.items():
            if argument is value:
                return {"input": list(address)}
        if isinstance(value, (tuple, list)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._described(v, stream, origin) for v in value]}
        if isinstance(value, Mapping):
            return {"fields": {str(k): self._described(v, stream, origin) for k, v in value.items()}}
        return {"unread": True}


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Address, Any]:
    """The arguments of a call, and what lies in those that are containers, by position, name and keys."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given: dict[Address, Any] = {(i, names[i] if i < len(names) else ""): arg for i, arg in enumerate(args)}
    given.update({(names.index(k) if k in names else -1, k): value for k, value in kwargs.items()})
    return dict(_opened(given))


def _opened(given: Mapping[Address, Any]) -> Iterator[tuple[Address, Any]]:
    for address, value in given.items():
        yield address, value
        if isinstance(value, (tuple, list)):
            yield from _opened({(*address, i): v for i, v in enumerate(value)})
        elif isinstance(value, dict):
            yield from _opened({(*address, k): v for k, v in value.items() if isinstance(k, str)})


def _leaves(output: Any) -> Iterator[Any]:
    """The values in an output, as they come first."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        yield output
        return
    for value in output:
        yield from _leaves(value)


def _has_unread(node: Mapping[str, Any]) -> bool:
    (kind, held), *_ = node.items()
    parts = list(held.values()) if kind == "fields" else held if kind in ("tuple", "list") else ()
    return kind == "unread" or any(_has_unread(part) for part in parts)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _name(func: Any) -> str:
    name: str = func._schema.name.partition("::")[2]
    return name.removesuffix("_") if not name.endswith("__") else name


def _carries(func: Any) -> bool:
    """Whether each value that the op makes of a tensor of the same size comes from the value in its place."""
    return torch.Tag.pointwise in func.tags or _name(func) in _CARRYING
