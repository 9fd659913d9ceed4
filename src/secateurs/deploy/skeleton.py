"""A module tree as JSON and back: classes, attributes and names of tensors, without any tensor's numbers.

A constructor fixes the widths of a layer, and no constructor knows the widths of a pruned model. So none is called:
`decode` makes each module empty, as `nn.Module` itself leaves it, and puts back the attributes, parameters, buffers
and children that `encode` found. Whatever is shared (a tied weight, a module used twice, one config in all layers) is
shared again.

    {"uses": [names of classes and functions], "modules": {"": tree, "$hidden.0": tree …}, "tensors": {name: entry}}

A tree is `{"class", "training", "attributes", "parameters", "buffers", "non_persistent", "load_hooks", "parametrized",
"children"}`; empty parts are left out. A module that is held outside the tree (in a plain list, say) is a tree of its
own under `$hidden`. Parameters and buffers name their entry among the tensors. A parametrized module has the class that
it had before; what its tensors are made by are its children, as PyTorch keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError
from . import quirks
from .decoding import Reader
from .encoding import Writer, settled
from .fields import checked
from .references import module_of, untrusted
from .tensors import TensorTable, rebuild

__all__ = ["decode", "encode"]

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_post_hooks",
)
_TREE = ("training", "attributes", "parameters", "buffers", "non_persistent", "load_hooks", "parametrized", "children")
_MOST_FAULTS = 8


def encode(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The skeleton of the model, ready for JSON, and the tensors to store by name, each once.

    Raises:
        FileError: something in the model cannot be saved; the message lists the modules and attributes and says what
            to do with each.
    """
    encoder = _Encoder()
    encoder.root("", model)
    for path, module, node in encoder.trees():
        encoder.attributes(path, module, node)
    for name, tensor in encoder.table:
        encoder.tensor_attributes(name, tensor)
    if encoder.faults:
        raise FileError(_report(encoder.faults))
    skeleton = {
        "uses": sorted(encoder.write.uses),
        "modules": settled(encoder.roots),
        "tensors": settled(encoder.table.entries),
    }
    return skeleton, encoder.table.data


def _report(faults: Sequence[str]) -> str:
    shown = "; ".join(faults[:_MOST_FAULTS])
    more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
    return f"the model cannot be saved: {shown}{more}."


def _own_names() -> frozenset[str]:
    """Names that nn.Module itself puts into every module."""
    return frozenset(vars(nn.Module()))


class _Encoder:
    """One pass over a model; modules that turn up in attributes are queued as further roots."""

    def __init__(self) -> None:
        self.roots: dict[str, Any] = {}
        self.faults: list[str] = []
        self.table = TensorTable()
        self.write = Writer(self._module, self._tensor)
        self._paths: dict[int, str] = {}
        self._queue: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._own = _own_names()

    def root(self, path: str, module: nn.Module) -> None:
        """Adds a tree of modules."""
        self.roots[path] = self._tree(path, module)

    def trees(self) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
        """Path, module and node, parents first, also of the roots that are added meanwhile."""
        done = 0
        while done < len(self._queue):
            yield self._queue[done]
            done += 1

    def attributes(self, path: str, module: nn.Module, node: dict[str, Any]) -> None:
        """Adds to the node what the module holds besides tensors and children."""
        skipped = self._own | quirks.transient(module)
        place = _place(path, module)
        for name, value in vars(module).items():
            if name not in skipped:
                with self._at(f"{place}, attribute {name!r}"):
                    node["attributes"].update(self.write.named({name: value}))
        for hook in module._load_state_dict_pre_hooks.values():
            if not quirks.is_inert(hook):
                with self._at(f"{place}, load hook"):
                    node["load_hooks"].append(self._load_hook(hook))
        for section in _TREE[1:]:
            if not node[section]:
                del node[section]

    def tensor_attributes(self, name: str, tensor: Tensor) -> None:
        """Adds to the tensor's entry the attributes that libraries hang on tensors."""
        if vars(tensor):
            with self._at(f"the tensor {name!r}"):
                self.table.entries[name]["attributes"] = self.write.named(vars(tensor))

    @contextlib.contextmanager
    def _at(self, place: str) -> Iterator[None]:
        """Notes a fault with its place and goes on, so that all faults are reported at once."""
        try:
            yield
        except FileError as fault:
            self.faults.append(f"{place}: {fault}")

    def _tree(self, path: str, module: nn.Module) -> dict[str, Any]:
        self._paths[id(module)] = path
        place = _place(path, module)
        obstacles = [f"{place}: {fault}" for fault in _obstacles(module)]
        self.faults += obstacles
        node: dict[str, Any] = {
            "class": None,
            "training": module.training,
            "attributes": {},
            "parameters": self._named_tensors(path, module, module._parameters),
            "buffers": self._named_tensors(path, module, module._buffers),
            "non_persistent": sorted(module._non_persistent_buffers_set),
            "load_hooks": [],
            "parametrized": quirks.parametrized(module),
            "children": {},
        }
        if not obstacles:
            with self._at(place):
                node["class"] = self.write.name(quirks.own_class(module))
        self._queue.append((path, module, node))
        for name, child in module._modules.items():
            node["children"][name] = self._child(_join(path, name), child)
        return node

    def _child(self, path: str, child: nn.Module | None) -> dict[str, Any] | None:
        if child is None:
            return None
        if id(child) in self._paths:
            return {"shared": self._paths[id(child)]}
        return self._tree(path, child)

    def _named_tensors(
        self, path: str, module: nn.Module, tensors: Mapping[str, Tensor | None]
    ) -> dict[str, str | None]:
        named: dict[str, str | None] = {}
        for name, tensor in tensors.items():
            with self._at(f"{_place(path, module)}, tensor {name!r}"):
                named[name] = None if tensor is None else self.table.add(tensor, _join(path, name))
        return named

    def _load_hook(self, hook: Any) -> dict[str, Any]:
        return {"function": self.write(getattr(hook, "hook", hook)), "with_module": getattr(hook, "with_module", False)}

    def _module(self, module: nn.Module) -> str:
        if id(module) not in self._paths:
            self.root(f"$hidden.{len(self.roots) - 1}", module)
        return self._paths[id(module)]

    def _tensor(self, tensor: Tensor) -> str:
        return self.table.add(tensor, f"$hidden.tensor.{len(self.table.entries)}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _place(path: str, module: nn.Module) -> str:
    return f"{path or 'the model itself'} ({type(module).__name__})"


def _obstacles(module: nn.Module) -> Iterator[str]:
    """Why the module is more than its attributes, tensors and children."""
    home = quirks.own_class(module).__module__
    if home.startswith("torch._dynamo"):
        yield "it is a compiled model; save its ._orig_mod"
    elif isinstance(module, torch.jit.ScriptModule):
        yield "it is a TorchScript module; save the model that it was made from"
    elif isinstance(module, torch.fx.GraphModule):
        yield "it is a traced graph, whose code has no name; use export_program"
    for kind in _HOOKS:
        for hook in getattr(module, kind).values():
            if not quirks.is_inert(hook):
                yield f"it has a {_hook_words(kind)} ({_hook_name(hook)}); {_HOOK_ADVICE}"


_HOOK_ADVICE = "remove it (handle.remove(), or for weight norm and pruning masks the remove function of torch.nn.utils)"


def _hook_words(kind: str) -> str:
    return kind.strip("_").removesuffix("s").replace("_", " ")


def _hook_name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def decode(
    skeleton: Mapping[str, Any],
    read: Callable[[str], Tensor],
    *,
    trust: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The model that `encode` described.

    Args:
        skeleton: what `encode` returned.
        read: the stored tensor of a name; it is copied.
        trust: packages besides the allowed ones whose classes and functions may be used.
        device: where the tensors go.

    Raises:
        FileError: a class or function is not allowed or not found, or the skeleton is malformed. The message is a
            fact; the caller adds the file.
    """
    checked(skeleton, "the skeleton", required=("uses", "modules", "tensors"))
    _refuse_strangers(skeleton["uses"], trust)
    decoder = _Decoder(skeleton, rebuild(skeleton["tensors"], read, device), trust)
    for path, node in skeleton["modules"].items():
        decoder.tree(path, node)
    for module, node in decoder.made:
        decoder.attributes(module, node)
    for name, entry in skeleton["tensors"].items():
        vars(decoder.tensors[name]).update(decoder.named(entry.get("attributes", {})))
    for module, node in decoder.made:
        quirks.parametrize_again(module, node.get("parametrized", ()))
        quirks.wake(module)
    return decoder.module("")


def _refuse_strangers(uses: Sequence[str], trust: Sequence[str]) -> None:
    strangers = untrusted(uses, trust)
    if strangers:
        roots = sorted({module_of(name).partition(".")[0] for name in strangers})
        raise FileError(
            f"it uses code outside the packages that are allowed by default ({', '.join(strangers[:_MOST_FAULTS])}); "
            f"if you trust that code, pass trust=({', '.join(map(repr, roots))},)"
        )


class _Decoder:
    """Modules and tensors by name while a model is put together."""

    def __init__(self, skeleton: Mapping[str, Any], tensors: dict[str, Tensor], trust: Sequence[str]) -> None:
        self.tensors = tensors
        self.made: list[tuple[nn.Module, Mapping[str, Any]]] = []
        self._modules: dict[str, nn.Module] = {}
        self._read = Reader(self.module, self._tensor, skeleton["uses"], trust)

    def module(self, path: str) -> nn.Module:
        """The module at the path; it may still be empty."""
        if path not in self._modules:
            raise FileError(f"there is no module {path!r}")
        return self._modules[path]

    def tree(self, path: str, node: Any) -> nn.Module:
        """The module with its tensors and children, its attributes still missing."""
        checked(node, f"the module {path!r}", required=("class", "training"), optional=_TREE)
        cls = self._read.find(node["class"], "module")
        module: nn.Module = object.__new__(cls)
        # An empty module lends its dicts, so that no code of the class runs.
        vars(module).update(vars(nn.Module()))
        self._modules[path] = module
        self.made.append((module, node))
        vars(module)["training"] = node["training"]
        module._parameters.update(self._named_tensors(node, "parameters"))
        module._buffers.update(self._named_tensors(node, "buffers"))
        module._non_persistent_buffers_set.update(node.get("non_persistent", ()))
        for name, child in node.get("children", {}).items():
            module._modules[name] = self._child(_join(path, name), child)
        return module

    def attributes(self, module: nn.Module, node: Mapping[str, Any]) -> None:
        """Puts back what the module held besides tensors and children, in the order in which it was written."""
        vars(module).update(self.named(node.get("attributes", {})))
        for hook in node.get("load_hooks", ()):
            checked(hook, "a hook", required=("function", "with_module"))
            module._register_load_state_dict_pre_hook(self._read(hook["function"]), hook["with_module"])

    def named(self, nodes: Mapping[str, Any]) -> dict[str, Any]:
        """The values behind named nodes, in order."""
        return {name: self._read(node) for name, node in nodes.items()}

    def _child(self, path: str, node: Any) -> nn.Module | None:
        if node is None:
            return None
        if isinstance(node, dict) and node.keys() == {"shared"}:
            return self.module(node["shared"])
        return self.tree(path, node)

    def _named_tensors(self, node: Mapping[str, Any], section: str) -> dict[str, Any]:
        return {name: None if key is None else self._tensor(key) for name, key in node.get(section, {}).items()}

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FileError(f"there is no tensor {name!r}")
        return self.tensors[name]
