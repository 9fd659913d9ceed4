"""Modules of ONNX graphs as files again: the graph that was read, with the tensors and sizes of now."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import FileError, OptionError
from ..core.folder import replace_file
from .facts import needed
from .module import Node, OnnxModule, Recipe, Step

__all__ = ["write_onnx"]

# A protobuf file ends at 2 GiB; weights beyond that go into a second file beside it.
_ONE_FILE = 1_900_000_000
_RECURRENT = ("RNN", "GRU", "LSTM")


def write_onnx(module: OnnxModule, path: str | Path, *, check: Callable[[Path], None] | None = None) -> Path:
    """The path of the file that was written: the graph that was read, with the module's tensors and sizes.

    Names, metadata, op sets and declared inputs and outputs are those of the file that was read. Shapes of what lies
    between are found anew.

    Args:
        module: from `read_onnx`, or pruned from such a one.
        path: the file, replaced whole. Models beyond 1.9 GB get a second one beside it, `<path>.data`.
        check: looks at the file before it takes its place; an error leaves what was there.

    Raises:
        OptionError: the module does not come from an ONNX file, or a node in it was replaced.
        FileError: the disk refuses, or the graph is not valid with the sizes of now.
    """
    if not isinstance(module, OnnxModule):
        raise OptionError(f"write_onnx takes what read_onnx made, not {type(module).__name__}: use export_onnx for it.")
    ir, onnx = needed("onnx_ir"), needed("onnx")
    model = _Writer(module).model()
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    place = Path(path)

    def write(fresh: Path) -> None:
        ir.save(model, fresh, external_data=f"{fresh.name}.data" if size > _ONE_FILE else None)
        try:
            onnx.checker.check_model(str(fresh))
        except (onnx.checker.ValidationError, ValueError) as error:
            raise FileError(f"{place} was not written, the graph is not valid: {error}") from error
        if check is not None:
            check(fresh)

    replace_file(place, write)
    return place


class _Writer:
    """The graph that a module was read from, brought up to date."""

    def __init__(self, module: OnnxModule) -> None:
        self.ir, onnx = needed("onnx_ir"), needed("onnx")
        self.module = module
        proto = onnx.ModelProto.FromString(base64.b64decode(module._graph))
        self.made = self.ir.from_proto(proto)
        self.graph = self.made.graph
        self.nodes = list(self.graph)
        self.values = {v.name: v for node in self.nodes for v in node.outputs}
        self.values.update({v.name: v for v in (*self.graph.inputs, *self.graph.initializers.values())})
        self.changed = False
        self.cut = False

    def model(self) -> Any:
        """The model."""
        self._put_tensors()
        for path in self.module._order:
            node = self.module.get_submodule(path)
            if not isinstance(node, Node):
                raise OptionError(f"{path} is no longer a node of the graph but a {type(node).__name__}: put it back.")
            if node._step.place >= 0:
                self._update(node)
        passes = needed("onnx_ir.passes.common")
        if self.changed:
            passes.RemoveUnusedNodesPass()(self.made)
        outputs = {v.name for v in self.graph.outputs}
        for node in self.graph:
            for value in node.outputs:
                if value.name not in outputs:
                    value.shape = None
        passes.ShapeInferencePass()(self.made)
        return self.made

    def _put_tensors(self) -> None:
        for name in self.module._tensors:
            value = self.values[name]
            held = self.module.held(name).detach().cpu().contiguous()
            self.cut |= tuple(held.shape) != tuple(value.shape or held.shape)
            self.graph.inputs.remove(value)
            self._initialize(value, self.ir.tensor(held, name=name))

    def _initialize(self, value: Any, const: Any) -> None:
        value.const_value, value.shape = const, self.ir.Shape(const.shape)
        value.type = self.ir.TensorType(const.dtype)
        self.graph.register_initializer(value)

    def _update(self, node: Node) -> None:
        """Attributes and constant inputs of one node."""
        target = self.nodes[node._step.place]
        for name in node._sizes:
            there = "group" if name == "groups" else name
            held = getattr(node, name)
            target.attributes[there] = self.ir.Attr(there, target.attributes[there].type, held)
        if node._step.op in _RECURRENT:
            held = getattr(node, node._tensors[node._step.inputs[2]]).shape[-1]
            target.attributes["hidden_size"] = self.ir.AttrInt64("hidden_size", held)
        for i, name in enumerate(node._step.inputs):
            if name in node._recipes:
                self._update_input(node, node._recipes[name], target, i)

    def _update_input(self, node: Node, recipe: Recipe, target: Any, at: int) -> None:
        """Bring one input that is known without data up to date, if the node's own constants were changed."""
        known = dict(self.values)
        for name, constant in recipe.constants.items():
            if getattr(node, constant.attribute) != constant.value or (self.cut and self._computed(name)):
                known[name] = self._new_constant(node.constant(constant), f"{name}.{target.name}")
        if any(known[n] is not self.values.get(n) for n in recipe.constants if n in known):
            for step in recipe.steps:
                copy = self._copied(step, known, target.name)
                self.graph.insert_before(target, copy)
                known.update(dict(zip(step.outputs, copy.outputs, strict=True)))
        result = known[recipe.result]
        if recipe.fixed and (self.cut or getattr(node, recipe.fixed.attribute) != recipe.fixed.value):
            result = self._partly_fixed(result, getattr(node, recipe.fixed.attribute), target)
        if result is not self.values[recipe.result]:
            target.replace_input_with(at, result)
            self.changed = True

    def _computed(self, name: str) -> bool:
        """Whether the file works the value out. Once anything was cut, that may give another size than the module's."""
        producer = self.values[name].producer() if name in self.values else None
        return producer is not None and producer.op_type != "Constant"

    def _partly_fixed(self, sizes: Any, fixed: tuple[int | None, ...], before: Any) -> Any:
        """The sizes with those in the place that are fixed."""
        stays = self._new_constant(np.array([n is None for n in fixed]), f"{before.name}.free")
        own = self._new_constant(np.array([n or 0 for n in fixed], dtype=np.int64), f"{before.name}.sizes")
        made = self.ir.Value(name=self._unused(f"{before.name}.shape"))
        self.values[made.name] = made
        node = self.ir.Node("", "Where", [stays, sizes, own], outputs=[made], name=made.name)
        self.graph.insert_before(before, node)
        return made

    def _new_constant(self, array: Any, name: str) -> Any:
        name = self._unused(name)
        value = self.ir.Value(name=name)
        self.values[name] = value
        self._initialize(value, self.ir.tensor(array, name=name))
        return value

    def _copied(self, step: Step, known: dict[str, Any], beside: str) -> Any:
        old = self.nodes[step.place]
        outputs = [self.ir.Value(name=self._unused(f"{name}.{beside}")) for name in step.outputs]
        self.values.update({v.name: v for v in outputs})
        return self.ir.Node(
            old.domain,
            old.op_type,
            [known[n] if n else None for n in step.inputs],
            list(old.attributes.values()),
            outputs=outputs,
            version=old.version,
            name=self._unused(f"{old.name}.{beside}"),
        )

    def _unused(self, name: str) -> str:
        while name in self.values:
            name += "_"
        return name
