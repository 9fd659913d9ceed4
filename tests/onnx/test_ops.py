"""Every op against onnxruntime, on random inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from secateurs.core.errors import ModelError
from secateurs.onnx import read_onnx
from secateurs.onnx.ops import OPS, op
from tests.onnx.samples import Array, Case, f, i, single

X = f(2, 4, 6, 6)
W3 = f(6, 4, 3, 3, seed=1)
IDS = i([[0, 2], [3, 1]])
B = np.array

UNARY = [
    "Abs", "Atan", "Asinh", "Ceil", "Cos", "Elu", "Celu", "Selu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sinh",
    "Cosh", "Tan", "Tanh", "ThresholdedRelu", "IsNaN", "Shrink", "Gelu", "Softmax", "LogSoftmax", "Hardmax", "Dropout",
]  # fmt: skip
BINARY = [
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Sum",
    "Mean",
]  # fmt: skip
LOGICAL = ("And", "Or", "Xor")
REDUCE = [f"Reduce{what}" for what in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare", "LogSumExp")]


def _resizes() -> list[Case]:
    cases = []
    for mode in ("nearest", "linear", "cubic"):
        for way in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            for scale in (2.0, 0.6):
                given = [f(1, 2, 5, 7), None, B([1, 1, scale, scale], "float32")]
                options = {"mode": mode, "coordinate_transformation_mode": way}
                cases.append(Case("Resize", given, options, [2], note=f"{mode} {way} {scale}"))
    return cases


CASES = [
    *(Case(name, [f(2, 3, 4)]) for name in UNARY),
    *(Case(name, [f(2, 3, low=0.1, high=0.9)]) for name in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt")),
    Case("Acosh", [f(3, low=1.5)]),
    *(Case(name, [f(2, 3, low=0.5), f(3, low=0.5, seed=1)]) for name in BINARY),
    *(Case(name, [f(2, 3, low=0.5), B(1.5, "float32")], {}, [1], note="number") for name in BINARY[:5]),
    *(Case(name, [f(2, 3) > 0, f(3, seed=1) > 0]) for name in LOGICAL),
    Case("Not", [f(2, 3) > 0]),
    Case("Div", [i([-7, 7]), i([2, 2])], note="integers"),
    Case("Mod", [i([-7, 7]), i([3, -3])], note="integers"),
    Case("Mod", [f(4), f(4, seed=1)], {"fmod": 1}),
    Case("Pow", [i([2, 3]), i([2, 2])], note="integers"),
    Case("BitShift", [B([8, 9], "uint8"), B([1, 2], "uint8")], {"direction": "RIGHT"}),
    Case("BitwiseAnd", [i(6), i(3)]),
    Case("BitwiseOr", [i(6), i(3)]),
    Case("BitwiseXor", [i(6), i(3)]),
    Case("BitwiseNot", [i(6)]),
    Case("IsInf", [B([1, np.inf, -np.inf], "float32")]),
    Case("IsInf", [B([1, np.inf, -np.inf], "float32")], {"detect_negative": 0}, note="above"),
    Case("IsInf", [B([1, np.inf, -np.inf], "float32")], {"detect_positive": 0}, note="below"),
    Case("Where", [f(2, 3) > 0, f(2, 3), f(3, seed=1)]),
    Case("Where", [f(2, 3) > 0, f(2, 3), B(-9.0, "float32")], {}, [2], note="number"),
    Case("Clip", [f(2, 3), B(-1.0, "float32"), B(0.5, "float32")], {}, [1, 2]),
    Case("Clip", [f(2, 3), None, B(0.5, "float32")], {}, [2], note="above"),
    Case("Clip", [f(2, 3)], {"min": -1.0, "max": 0.5}, opset=6, note="6"),
    Case("Cast", [f(2, 3)], {"to": 7}),
    Case("Cast", [i(0, 3)], {"to": 1}, note="integers"),
    Case("CastLike", [f(2, 3), i(1)]),
    Case("PRelu", [f(2, 4, 3), f(4, 1, seed=1)], {}, [1]),
    Case("Gelu", [f(2, 3)], {"approximate": "tanh"}, note="tanh"),
    Case("Gelu", [f(2, 3)], domain="com.microsoft", note="microsoft"),
    Case("QuickGelu", [f(2, 3)], domain="com.microsoft"),
    Case("FastGelu", [f(2, 3)], domain="com.microsoft"),
    Case("BiasGelu", [f(2, 3), f(3, seed=1)], {}, [1], domain="com.microsoft"),
    Case("Softmax", [f(2, 3, 4)], {"axis": 1}, opset=11, note="11"),
    Case("LogSoftmax", [f(2, 3, 4)], {"axis": 1}, note="axis"),
    Case("Conv", [X, W3, f(6, seed=2)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, [1, 2]),
    Case("Conv", [X, W3], {"pads": [0, 1, 2, 1], "dilations": [2, 1]}, [1], note="uneven"),
    Case("Conv", [X, f(8, 2, 3, 3, seed=1)], {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, [1], note="up"),
    Case("Conv", [X, f(4, 1, 2, 2, seed=1)], {"group": 4, "auto_pad": "SAME_LOWER"}, [1], note="low"),
    Case("Conv", [X, W3], {"auto_pad": "VALID"}, [1], note="valid"),
    Case("Conv", [f(2, 4, 9), f(6, 4, 3, seed=1)], {"pads": [1, 1]}, [1], note="1d"),
    Case("Conv", [f(1, 2, 4, 4, 4), f(3, 2, 2, 2, 2, seed=1)], {}, [1], note="3d"),
    Case("ConvTranspose", [X, f(4, 3, 3, 3, seed=1), f(3, seed=2)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}, [1, 2]),
    Case(
        "ConvTranspose",
        [X, f(4, 3, 3, 3, seed=1), f(3, seed=2)],
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 1]},
        [1, 2],
        note="uneven",
    ),
    Case("ConvTranspose", [X, f(4, 3, 3, 3, seed=1)], {"strides": [2, 2], "output_shape": [12, 12]}, [1], note="shape"),
    Case("ConvTranspose", [X, f(4, 2, 3, 3, seed=1)], {"group": 2, "auto_pad": "SAME_UPPER"}, [1], note="groups"),
    Case("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, note="ceil"),
    Case("MaxPool", [X], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}, note="same"),
    Case("MaxPool", [X], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, note="uneven"),
    Case("MaxPool", [X], {"kernel_shape": [2, 2], "dilations": [2, 2]}, outputs=2, note="where"),
    Case("MaxPool", [f(1, 2, 9)], {"kernel_shape": [3]}, note="1d"),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, note="counted"),
    Case("AveragePool", [X], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, note="uneven"),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}, note="same"),
    Case("LpPool", [X], {"kernel_shape": [2, 2], "p": 2}),
    Case("GlobalAveragePool", [X]),
    Case("GlobalMaxPool", [X]),
    Case("GlobalLpPool", [X]),
    Case("Gemm", [f(3, 4), f(4, 5, seed=1), f(5, seed=2)], {}, [1, 2]),
    Case("Gemm", [f(4, 3), f(5, 4, seed=1), f(5, seed=2)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, [1]),
    Case("MatMul", [f(2, 3, 4), f(4, 5, seed=1)], {}, [1]),
    Case("MatMul", [f(2, 3, 4), f(2, 4, 5, seed=1)], note="batched"),
    Case("FusedMatMul", [f(2, 3, 4), f(2, 5, 4, seed=1)], {"transB": 1, "alpha": 0.5}, domain="com.microsoft"),
    Case("Einsum", [f(2, 3, 4), f(2, 5, 4, seed=1)], {"equation": "bik,bjk->bij"}),
    Case("Det", [f(2, 3, 3)]),
    Case("BatchNormalization", [X, f(4, seed=1), f(4, seed=2), f(4, seed=3), f(4, low=0.5, seed=4)], {}, [1, 2, 3, 4]),
    Case("InstanceNormalization", [X, f(4, seed=1), f(4, seed=2)], {}, [1, 2]),
    Case("GroupNormalization", [X, f(4, seed=1), f(4, seed=2)], {"num_groups": 2}, [1, 2], opset=21),
    Case("LayerNormalization", [f(2, 3, 4), f(4, seed=1), f(4, seed=2)], {}, [1, 2]),
    Case("LayerNormalization", [f(2, 3, 4), f(3, 4, seed=1)], {"axis": 1}, [1], outputs=3, note="statistics"),
    Case("SimplifiedLayerNormalization", [f(2, 3, 4), f(4, seed=1)], {"axis": -1}, [1]),
    Case(
        "SkipLayerNormalization",
        [f(2, 3, 4), f(2, 3, 4, seed=3), f(4, seed=1), f(4, seed=2)],
        {"epsilon": 1e-5},
        [2, 3],
        domain="com.microsoft",
    ),
    Case("LRN", [X], {"size": 3, "alpha": 0.1}),
    Case("LpNormalization", [f(2, 3)], {"axis": 1}),
    Case("MeanVarianceNormalization", [X], opset=12),
    Case("Reshape", [X, i(0, -1, 12)], {}, [1]),
    Case("Reshape", [X, i(8, 36)], note="data"),
    Case("Flatten", [X]),
    Case("Flatten", [X], {"axis": -1}, note="last"),
    Case("Squeeze", [f(1, 3, 1), i([0])], {}, [1]),
    Case("Squeeze", [f(1, 3, 1)], note="all"),
    Case("Squeeze", [f(1, 3, 1)], {"axes": [2]}, opset=11, note="11"),
    Case("Unsqueeze", [f(2, 3), i(0, -1)], {}, [1]),
    Case("Transpose", [f(2, 3, 4)]),
    Case("Transpose", [f(2, 3, 4)], {"perm": [0, 2, 1]}, note="told"),
    Case("Concat", [f(2, 3), f(2, 4, seed=1)], {"axis": -1}),
    Case("Split", [f(2, 6), i(2, 4)], {"axis": 1}, [1], outputs=2),
    Case("Split", [f(2, 7)], {"axis": 1, "num_outputs": 3}, outputs=3, note="even"),
    Case("Split", [f(2, 6)], {"axis": 1, "split": [1, 5]}, outputs=2, opset=11, note="11"),
    Case("Slice", [f(4, 6), i(1, -2), i(9, -9), i(0, 1), i(1, -2)], {}, [1, 2, 3, 4]),
    Case("Slice", [f(4, 6), i([1]), i([3])], note="data"),
    Case("Slice", [f(4, 6)], {"starts": [1], "ends": [3], "axes": [1]}, opset=9, note="9"),
    Case("Expand", [f(3, 1), i(2, 1, 4)], {}, [1]),
    Case("Tile", [f(2, 3), i(2, 1)], {}, [1]),
    Case("Pad", [f(2, 3), i(0, 1, 1, 0), B(7.0, "float32")], {}, [1, 2]),
    *(Case("Pad", [f(3, 4), i(2, 1, 0, 2)], {"mode": mode}, [1], note=mode) for mode in ("reflect", "edge")),
    Case("Pad", [f(3, 4), i(1, 2), None, i([1])], {}, [1, 3], note="axes"),
    Case("Pad", [f(3, 4)], {"pads": [0, 1, 1, 0], "value": 3.0}, opset=10, note="10"),
    Case("DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2}),
    Case("DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}, note="CRD"),
    Case("SpaceToDepth", [f(1, 2, 4, 6)], {"blocksize": 2}),
    Case("Shape", [X], {"start": 1, "end": -1}),
    Case("Size", [X]),
    Case("ConstantOfShape", [i(2, 3)]),
    Case("Range", [i(1), i(9), i(3)]),
    Case("EyeLike", [f(3, 4)], {"k": 1}),
    Case("Trilu", [f(3, 4), i(1)], {}, [1]),
    Case("Trilu", [f(3, 4)], {"upper": 0}, note="lower"),
    *_resizes(),
    Case("Resize", [f(1, 2, 5, 7), None, None, i(1, 2, 9, 4)], {"mode": "linear"}, [3], note="sizes"),
    Case(
        "Resize",
        [f(1, 1, 5, 7), None, B([3.0, 0.7], "float32")],
        {"mode": "cubic", "axes": [2, 3], "exclude_outside": 1},
        [2],
        note="axes",
    ),
    Case("Resize", [f(1, 2, 4, 4), B([1, 1, 2, 2], "float32")], {"mode": "nearest"}, [1], opset=10, note="10"),
    Case("Upsample", [f(1, 2, 4, 4), B([1, 1, 2, 2], "float32")], {"mode": "linear"}, [1], opset=9),
    *(
        Case(
            "Resize",
            [f(1, 1, 5), None, B([1, 1, 1.7], "float32")],
            {"mode": "nearest", "nearest_mode": mode},
            [2],
            note=mode,
        )
        for mode in ("floor", "ceil", "round_prefer_ceil")
    ),
    Case("Gather", [f(3, 4), IDS], {"axis": 1}),
    Case("Gather", [f(3, 4), i(-1)], {"axis": 0}, [1], note="one"),
    Case("Gather", [f(9, 4), IDS], {}, [0], note="table"),
    Case("GatherElements", [f(2, 3), i([[0, -1], [1, 2]])], {"axis": 1}),
    Case("GatherND", [f(2, 3, 4), i([[0, 1], [1, 2]])]),
    Case("GatherND", [f(2, 3, 4), i([[1], [2]])], {"batch_dims": 1}, note="batched"),
    Case("ScatterND", [f(4, 3), i([[1], [3]]), f(2, 3, seed=1)]),
    Case("ScatterElements", [f(2, 3), i([[0], [-1]]), f(2, 1, seed=1)], {"axis": 1}),
    Case("ScatterElements", [f(2, 3), i([[0], [0]]), f(2, 1, seed=1)], {"axis": 1, "reduction": "add"}, note="add"),
    Case("ScatterElements", [f(2, 3), i([[0], [0]]), f(2, 1, seed=1)], {"axis": 1, "reduction": "max"}, note="max"),
    Case("NonZero", [B([[1, 0], [2, 3]], "float32")]),
    Case("OneHot", [i([[0, 2], [-1, 1]]), i(3), B([0, 5], "float32")], {}, [1, 2]),
    Case("OneHot", [i(0, 2), i(3), B([0, 5], "float32")], {"axis": 0}, [1, 2], note="first"),
    Case("TopK", [f(3, 5), i([2])], {"axis": 1}, [1], outputs=2),
    Case("ArgMax", [f(3, 5)], {"axis": 1, "keepdims": 0}),
    Case("ArgMin", [B([[1, 0, 0]], "float32")], {"axis": 1, "select_last_index": 1}),
    Case("Compress", [f(3, 4), B([True, False, True])], {"axis": 0}),
    Case("ReverseSequence", [f(4, 2, 3), i(2, 4)]),
    *(
        Case(name, [f(2, 3, 4), i(0, -1)], {"keepdims": keep}, [1], note=f"{keep}")
        for name in REDUCE
        for keep in (0, 1)
    ),
    Case("ReduceLogSum", [f(2, 3, low=0.5)]),
    Case("ReduceSum", [f(2, 3)], {"noop_with_empty_axes": 1}, note="none"),
    Case("ReduceMean", [f(2, 3, 4)], {"axes": [1]}, opset=11, note="11"),
    Case("CumSum", [f(2, 5), i(1)], {"exclusive": 1, "reverse": 1}, [1]),
    Case("CumSum", [i(1, 2, 3), i(0)], {}, [1], note="integers"),
    *(
        Case(
            name,
            [f(5, 2, 3), f(d, k * 4, 3, seed=1), f(d, k * 4, 4, seed=2), f(d, k * 8, seed=3)],
            {"hidden_size": 4, "direction": way, **more},
            [1, 2, 3],
            outputs=2,
            note=f"{way} {len(more)}",
        )
        for name, k, more in (("LSTM", 4, {}), ("GRU", 3, {}), ("GRU", 3, {"linear_before_reset": 1}), ("RNN", 1, {}))
        for way, d in (("forward", 1), ("bidirectional", 2), ("reverse", 1))
    ),
    Case("Attention", [f(2, 4, 3, 8), f(2, 2, 5, 8, seed=1), f(2, 2, 5, 8, seed=2)], opset=23),
    Case(
        "Attention",
        [f(2, 3, 8), f(2, 3, 8, seed=1), f(2, 3, 8, seed=2)],
        {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1},
        opset=23,
        note="flat",
    ),
    Case("RotaryEmbedding", [f(2, 2, 3, 4), f(5, 2, seed=1), f(5, 2, seed=2), i([[0, 1, 2], [2, 3, 4]])], opset=23),
    Case(
        "RotaryEmbedding",
        [f(2, 3, 8), f(2, 3, 2, seed=1), f(2, 3, 2, seed=2)],
        {"num_heads": 2, "interleaved": 1},
        opset=23,
        note="flat",
    ),
    Case("RMSNormalization", [f(2, 3, 4), f(4, seed=1)], {}, [1], opset=23),
    Case("Swish", [f(2, 3)], {"alpha": 1.5}, opset=24),
]
# Other names of functions that have a case.
ALIASES = {"Scatter", "com.microsoft::SkipSimplifiedLayerNormalization"}


def reference(path: Path, data: dict[str, Array]) -> list[Array]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, data))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_gives_what_onnxruntime_gives(case: Case, tmp_path: Path) -> None:
    model, data = single(case)
    onnx.save(model, tmp_path / "op.onnx")
    expected = reference(tmp_path / "op.onnx", data)
    module = read_onnx(tmp_path / "op.onnx")
    with torch.no_grad():
        found = module(**{name: torch.from_numpy(np.array(a)) for name, a in data.items()})
    for want, got in zip(expected, found if case.outputs > 1 else [found], strict=True):
        assert got.numpy().dtype == want.dtype
        assert got.shape == want.shape
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-5)


def test_every_op_has_a_case() -> None:
    covered = {f"{case.domain}::{case.op}" if case.domain else case.op for case in CASES}
    assert set(OPS) - covered == ALIASES


def test_an_op_has_one_function() -> None:
    with pytest.raises(ValueError, match="Relu already has a function"):
        op("Relu")(lambda a, x: x)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (
            Case(
                "Resize", [f(1, 1, 4, 4), None, B([1, 1, 0.5, 0.5], "float32")], {"mode": "linear", "antialias": 1}, [2]
            ),
            "antialias",
        ),
        (Case("AveragePool", [X], {"kernel_shape": [2, 2], "dilations": [2, 2]}), "dilated"),
        (Case("ScatterND", [f(4, 3), i([[1]]), f(1, 3)], {"reduction": "mul"}), "reduction 'mul'"),
    ],
)
def test_a_variant_that_is_not_supported_is_named(case: Case, what: str, tmp_path: Path) -> None:
    model, data = single(case)
    onnx.save(model, tmp_path / "op.onnx")
    with pytest.raises(ModelError, match=what):
        read_onnx(tmp_path / "op.onnx")(*(torch.from_numpy(a) for a in data.values()))
