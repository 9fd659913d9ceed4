"""Tiny ONNX models, one a case, with the inputs they run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
OPSET = 20
_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
}


@dataclass(frozen=True)
class Case:
    """One node: its op, its inputs (arrays are data, those in `constants` are initializers), and attributes."""

    op: str
    inputs: Sequence[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: Sequence[int] = ()
    outputs: int = 1
    opset: int = OPSET
    domain: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.op}{self.note and f' {self.note}'}"


def f(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> Array:
    """Random float32 numbers of a shape."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def i(*values: ArrayLike) -> Array:
    """int64 numbers: one list, or the values."""
    return np.array(values[0] if len(values) == 1 else values, dtype=np.int64)


def model_of(nodes: Sequence[Any], inputs: dict[str, Any], outputs: Sequence[str], **more: Any) -> onnx.ModelProto:
    """A checked model; inputs map names to (type, shape), `constants` map names to arrays."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, _TYPES[kind], shape) for n, (kind, shape) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in more.get("constants", {}).items()],
    )
    imports = [helper.make_opsetid("", more.get("opset", OPSET)), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10)
    made = onnx.shape_inference.infer_shapes(made)
    for output in made.graph.output:
        # Of ops of other domains nothing is inferred.
        if not output.type.WhichOneof("value"):
            rank = len(next(iter(inputs.values()))[1])
            output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [None] * rank))
    return made


def single(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The model of one node, and its data."""
    names = ["" if a is None else f"x{n}" for n, a in enumerate(case.inputs)]
    data = {n: a for k, (n, a) in enumerate(zip(names, case.inputs, strict=True)) if n and k not in case.constants}
    constants = {names[k]: case.inputs[k] for k in case.constants}
    outputs = [f"y{n}" for n in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, domain=case.domain, **case.attributes)
    inputs = {n: (str(a.dtype), a.shape) for n, a in data.items()}
    return model_of([node], inputs, outputs, constants=constants, opset=case.opset), data
