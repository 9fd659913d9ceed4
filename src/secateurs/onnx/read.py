"""ONNX files as modules."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import FileError, ModelError
from .facts import SIZES, Facts, needed, op_of
from .module import Input, Node, OnnxModule, Recipe, Step
from .ops import OPS
from .ops.table import dtype_of

__all__ = ["read_onnx"]

_SIZE_ATTRIBUTES = frozenset(
    {"groups", "num_groups", "num_heads", "q_num_heads", "kv_num_heads", "split", "starts", "ends"}
)
_STATISTICS = frozenset({"mean", "var", "input_mean", "input_var"})
# Added to scores, numbers of this size say "not here".
_MASKING = 1e30


def read_onnx(path: str | Path) -> OnnxModule:
    """The file's graph as a module in evaluation mode, which is pruned, trained and measured as any other.

    Floating-point initializers are parameters, but for numbers on their own, batch-norm statistics, and masks (matrices
    of zeros and ones, or with entries beyond 1e30), which are buffers. Integers are no parameters.

    Args:
        path: of the file; weights in a second file beside it are found.

    Raises:
        FileError: the file is missing, truncated, no ONNX file, or its weights beside it are missing.
        ModelError: an op that is not supported; the message names it, its node and its op set.
        MissingExtraError: onnx or onnx-ir is not installed.
    """
    model = _loaded(Path(path))
    _refuse_unknown(model)
    try:
        module = _Reader(model).module()
    except (OSError, ValueError) as error:
        raise FileError(f"the weights of {path} cannot be read ({error}): is the file beside it missing?") from error
    return module.eval()


def _loaded(path: Path) -> Any:
    """The file's model, its functions unfolded and its constants among the initializers."""
    ir, passes, onnx = needed("onnx_ir"), needed("onnx_ir.passes.common"), needed("onnx")
    if not path.is_file():
        raise FileError(f"there is no file {path}.")
    try:
        model = ir.load(path)
    except Exception as error:
        raise FileError(f"{path} is no ONNX file, or is truncated ({type(error).__name__}: {_line(error)}).") from error
    if not len(model.graph):
        raise FileError(f"{path} holds no graph: it is no ONNX file, or is truncated.")
    if model.functions:
        passes.InlinePass()(model)
    _refuse_unknown(model, beside=("Constant",))
    try:
        # onnxruntime has ops of its own among ONNX's, which the checker does not know.
        if all(node.domain or onnx.defs.has(node.op_type) for node in model.graph):
            onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} is not valid: {_line(error)}.") from error
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    model.ir_version = max(model.ir_version, 4)
    passes.NameFixPass()(model)
    passes.ShapeInferencePass()(model)
    _untie_vectors(model.graph)
    return model


def _untie_vectors(graph: Any) -> None:
    """Give every node its own copy of a vector of weights.

    Exporters store equal tensors once, so that biases which happen to be equal would be tied. Matrices stay tied.
    """
    ir = needed("onnx_ir")
    for value in list(graph.initializers.values()):
        if value.const_value.dtype.is_floating_point() and len(value.shape) == 1 and value.shape[0] != 1:
            for number, (node, at) in enumerate(list(value.uses())[1:], 2):
                copy = ir.Value(name=f"{value.name}_{number}", shape=value.shape, type=value.type)
                copy.const_value = value.const_value
                graph.register_initializer(copy)
                node.replace_input_with(at, copy)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def _refuse_unknown(model: Any, beside: tuple[str, ...] = ()) -> None:
    unknown = [n for n in model.graph if op_of(n) not in OPS and op_of(n) not in beside]
    if unknown:
        named = "; ".join(f"{op_of(n)} (node {n.name!r})" for n in unknown[:5])
        more = f" and {len(unknown) - 5} more nodes" if len(unknown) > 5 else ""
        opset = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items())
        raise ModelError(f"these ops are not supported: {named}{more}; op set {opset}.")


class _Reader:
    """One pass over a graph: a submodule for each node that is not left to others."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graph = model.graph
        self.facts = Facts(model)
        self.tensors = self._tensors()
        outputs = [v.name for v in self.graph.outputs]
        self.root = OnnxModule("", [_declared(v) for v in self.graph.inputs], outputs)

    def module(self) -> OnnxModule:
        """The module; the graph that it keeps has its parameters as inputs, so that they are stored once."""
        facts, outputs = self.facts, self.root.output_names
        order = [self._attach(i) for i in range(len(facts.nodes)) if not facts.is_host(i)]
        order += [self._attach_output(name) for name in outputs if name in facts.host or name in facts.initializers]
        self.root._order = tuple(order)
        self._note_last_uses()
        self.root._graph = self._stripped()
        return self.root

    def _attach(self, i: int) -> str:
        """The path of a new submodule for node `i`."""
        node = self.facts.nodes[i]
        step = self.facts.step(i)
        recipes: dict[str, Recipe] = {}
        own: list[str] = []
        held: dict[str, Any] = {}
        for name, formal in zip(step.inputs, self.facts.formals[i], strict=False):
            if (
                name in self.facts.host
                or self.facts.is_constant(name, formal)
                or (name in self.facts.sources and formal in SIZES)
            ):
                recipes.setdefault(name, self.facts.recipe(name, formal, step.op, held))
            elif name in self.facts.initializers:
                own.append(name)
        shapes = [n for r in recipes.values() for n in self.facts.shapes_in(r)]
        direct = [n for n in step.inputs if n and n not in recipes and n not in self.facts.initializers]
        made = Node(step, list(dict.fromkeys((*direct, *shapes))), recipes, node.name or f"number {i}")
        sizes = {n: v for n, v in step.values.items() if n in _SIZE_ATTRIBUTES}
        made._sizes = tuple(sizes)
        for attribute, value in {**sizes, **held}.items():
            setattr(made, attribute, value)
        home = _home(own)
        path = self._placed(made, home or _plain_name(node.name or f"{node.op_type}_{i}"))
        for name in own:
            self._register(made, path, name, home)
        return path

    def _attach_output(self, name: str) -> str:
        """The path of a submodule that returns what no other one makes: arithmetic on shapes, or an initializer."""
        held: dict[str, Any] = {}
        recipes = {name: self.facts.recipe(name, "", "Identity", held)} if name in self.facts.host else {}
        shapes = [n for r in recipes.values() for n in self.facts.shapes_in(r)]
        made = Node(Step("Identity", (name,), (name,), {}, 1, -1), list(dict.fromkeys(shapes)), recipes, name)
        for attribute, value in held.items():
            setattr(made, attribute, value)
        path = self._placed(made, _plain_name(name))
        if not recipes:
            self._register(made, path, name, "")
        return path

    def _placed(self, made: nn.Module, wanted: str) -> str:
        """The path at which the module was put: the one wanted, or one with a number added."""
        path, number = wanted, 1
        while not _free(self.root, path):
            number += 1
            path = f"{wanted}_{number}"
        holder: nn.Module = self.root
        *parents, last = path.split(".")
        for parent in parents:
            if parent not in holder._modules:
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(last, made)
        return path

    def _register(self, made: Node, path: str, name: str, home: str) -> None:
        local = (name.removeprefix(f"{home}.") if home else name).replace(".", "_")
        while hasattr(made, local):
            local += "_"
        value = self.tensors[name]
        if isinstance(value, nn.Parameter):
            made.register_parameter(local, value)
        else:
            made.register_buffer(local, value)
        made._tensors[name] = local
        self.root._tensors.setdefault(name, f"{path}.{local}")

    def _tensors(self) -> dict[str, Tensor]:
        """Every initializer as a parameter, if it is a weight, or as it is."""
        statistics = {
            v.name
            for node, formals in zip(self.facts.nodes, self.facts.formals, strict=True)
            for v, formal in zip(node.inputs, formals, strict=False)
            if v is not None and node.op_type == "BatchNormalization" and formal in _STATISTICS
        }
        return {
            name: nn.Parameter(value) if name not in statistics and _is_weight(value) else value
            for name, value in self.facts.initializers.items()
        }

    def _note_last_uses(self) -> None:
        last: dict[str, Any] = {}
        for path in self.root._order:
            node: Any = self.root.get_submodule(path)
            last.update(dict.fromkeys((*node._needs, *node._step.outputs), node))
        for name, node in last.items():
            if name not in self.root._outputs:
                node._done = (*node._done, name)

    def _stripped(self) -> str:
        ir = needed("onnx_ir")
        for name in self.root._tensors:
            value = self.graph.initializers.pop(name)
            value.const_value = None
            self.graph.inputs.append(value)
        return base64.b64encode(ir.to_proto(self.model).SerializeToString()).decode()


def _is_weight(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() < 2:
        return False
    if sum(n > 1 for n in value.shape) < 2 or bool(value.isnan().any()):
        return True
    switches = bool(((value == 0) | (value == 1)).all()) and float(value.min()) < float(value.max())
    return float(value.abs().max()) < _MASKING and not switches


def _home(names: Iterable[str]) -> str:
    """The module that the name of a node's first tensor names, as `layer.conv` of `layer.conv.weight`."""
    homes = (name.rpartition(".")[0] for name in names)
    return next((home for home in homes if home and all(home.split("."))), "")


def _plain_name(name: str) -> str:
    return name.strip("/").replace(".", "_") or "node"


def _free(root: nn.Module, path: str) -> bool:
    """Whether a module can be put there."""
    holder = root
    *parents, last = path.split(".")
    for parent in parents:
        if parent not in holder._modules:
            return not hasattr(holder, parent)
        holder = holder.get_submodule(parent)
    return not hasattr(holder, last)


def _declared(value: Any) -> Input:
    if value.shape is None or value.dtype is None:
        raise ModelError(f"the input {value.name!r} declares no type or no shape: give it one in the file.")
    shape = tuple(n if isinstance(n, int) else n.value for n in value.shape)
    return Input(value.name, dtype_of(int(value.dtype)), shape)
