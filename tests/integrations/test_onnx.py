"""ONNX in, ONNX out: exported networks are pruned, and onnxruntime agrees with the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

import secateurs as sec
from secateurs.core.errors import BudgetError, ModelError, OptionError, ProofError
from secateurs.integrations.onnx import prune_onnx, write_verified
from secateurs.onnx import OnnxModule, example_inputs, read_onnx, write_onnx
from tests.onnx.exported import NETS, OLD_CANNOT, exported
from tests.onnx.samples import f, i, model_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def run(path: Path, feed: dict[str, torch.Tensor]) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: t.numpy() for name, t in feed.items()}))


# The newer exporter takes seconds for each of these.
SLOW = {"resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "vit", "bert", "llama"}
CASES = [
    pytest.param(name, dynamo, marks=[pytest.mark.slow] if dynamo and name in SLOW else [])
    for name in NETS
    for dynamo in (True, False)
    if dynamo or name not in OLD_CANNOT
]


def numbers(path: Path) -> int:
    return sum(onnx.numpy_helper.to_array(t).size for t in onnx.load(path).graph.initializer)


@pytest.mark.parametrize(("name", "dynamo"), CASES)
def test_an_exported_net_at_half_its_macs(name: str, dynamo: bool, tmp_path: Path) -> None:
    path = exported(name, tmp_path / "net.onnx", dynamo=dynamo)
    before = path.read_bytes()
    cut = prune_onnx(path, "macs<=50%", tmp_path / "out.onnx", measure=False)
    assert path.read_bytes() == before
    assert isinstance(cut.model, OnnxModule)
    assert 0.4 <= cut.plan.cost("macs") <= 0.5
    assert numbers(tmp_path / "out.onnx") < 0.9 * numbers(path)
    # Any batch, and any number of tokens, as before.
    inputs = example_inputs(cut.model, batch=3, seed=5, sizes={"d1": 6})
    with torch.no_grad():
        found = cut.model(**inputs)
    (theirs,) = run(tmp_path / "out.onnx", inputs)
    np.testing.assert_allclose(theirs, found.numpy(), rtol=1e-3, atol=1e-4 * max(1.0, float(found.abs().max())))


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    path = exported("vit", tmp_path / "net.onnx", dynamo=False, dynamic=False)
    prune_onnx(path, "params<=70%", tmp_path / "out.onnx", measure=False)
    shape = onnx.load(tmp_path / "out.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 3, 32, 32]


def test_zeros_are_written_too(tmp_path: Path) -> None:
    path = exported("dense", tmp_path / "net.onnx", dynamo=False)
    made = prune_onnx(path, "sparsity=50%", tmp_path / "out.onnx", granularity="weight", scope="*", measure=False)
    assert made.masks
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer]
    zeros = sum(int((w == 0).sum()) for w in weights if w.ndim > 1)
    assert zeros >= 0.45 * sum(w.size for w in weights if w.ndim > 1)


def test_a_gradient_criterion_and_recovery(tmp_path: Path) -> None:
    path = exported("dense", tmp_path / "net.onnx", dynamo=False)
    data = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(2)]
    recover = sec.FineTune(steps=2)
    cut = prune_onnx(
        path, "macs<=60%", tmp_path / "out.onnx", data=data, criterion="taylor", recover=recover, measure=False
    )
    again = read_onnx(tmp_path / "out.onnx")
    inputs = example_inputs(again)
    torch.testing.assert_close(again(**inputs), cut.model(**inputs))


def test_a_plan_for_one_file_is_applied_to_another_copy(tmp_path: Path) -> None:
    path = exported("dense", tmp_path / "net.onnx", dynamo=False)
    module = read_onnx(path)
    plan = sec.plan(module, example_inputs(module), "macs<=50%")
    plan.save(tmp_path / "plan")
    again = sec.Plan.load(tmp_path / "plan").cut(read_onnx(path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plan.cut(module).parameters(), strict=True))


def test_a_saved_result_is_loaded_and_written(tmp_path: Path) -> None:
    path = exported("vit", tmp_path / "net.onnx", dynamo=False)
    cut = prune_onnx(path, "macs<=60%", tmp_path / "out.onnx", measure=False)
    cut.save(tmp_path / "saved")
    loaded = sec.load(tmp_path / "saved").model
    inputs = example_inputs(cut.model)
    assert torch.equal(loaded(**inputs), cut.model(**inputs))
    write_onnx(loaded, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def reshaping(more: dict[str, Any], constants: dict[str, Any]) -> onnx.ModelProto:
    """Two products with a reshape in their midst that splits the width between them."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("Reshape", ["h", "target"], ["r"], "split"),
        helper.make_node("Reshape", ["r", "back"], ["s"], "join"),
        helper.make_node("MatMul", ["s", "b"], ["y"], "two"),
    ]
    known = {"a": f(6, 24), "b": f(24, 6, seed=1), "back": i(0, -1), **constants}
    return model_of(nodes, {"x": ("float32", [2, 6]), **more}, ["y"], constants=known)


def test_a_literal_that_one_node_uses_follows(tmp_path: Path) -> None:
    onnx.save(reshaping({}, {"target": i(2, 4, 6)}), tmp_path / "net.onnx")
    cut = prune_onnx(tmp_path / "net.onnx", "params<=70%", tmp_path / "out.onnx", measure=False)
    (target,) = (
        onnx.numpy_helper.to_array(t).tolist()
        for t in onnx.load(tmp_path / "out.onnx").graph.initializer
        if t.name.startswith("target")
    )
    assert target == list(cut.model.get_submodule("split").shape)
    assert target[0] == 2
    assert target[1] * target[2] == cut.model.get_parameter("one.a").shape[1] < 24


def test_a_size_that_is_data_freezes(tmp_path: Path) -> None:
    onnx.save(reshaping({"target": ("int64", [3])}, {}), tmp_path / "net.onnx")
    inputs = {"x": torch.ones(2, 6), "target": torch.tensor([2, 4, 6])}
    with pytest.raises(ModelError, match=r"nothing to prune .*Reshape|nothing to prune .*split"):
        prune_onnx(tmp_path / "net.onnx", "params<=70%", tmp_path / "out.onnx", inputs=inputs, measure=False)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_a_recurrent_layer_gets_narrower(op: str, gates: int, tmp_path: Path) -> None:
    nodes = [
        helper.make_node(op, ["x", "w", "r", "b"], ["h"], "layer", hidden_size=8),
        helper.make_node("Squeeze", ["h", "axis"], ["s"], "drop"),
        helper.make_node("MatMul", ["s", "o"], ["y"], "out"),
    ]
    constants = {
        "w": f(1, 8 * gates, 4), "r": f(1, 8 * gates, 8, seed=1), "b": f(1, 16 * gates, seed=2), "o": f(8, 3, seed=3),
        "axis": i([1]),
    }  # fmt: skip
    onnx.save(model_of(nodes, {"x": ("float32", [5, 2, 4])}, ["y"], constants=constants), tmp_path / "net.onnx")
    cut = prune_onnx(tmp_path / "net.onnx", "params<=70%", tmp_path / "out.onnx", measure=False)
    (left,) = cut.plan.counts.values()
    (node,) = (n for n in onnx.load(tmp_path / "out.onnx").graph.node if n.op_type == op)
    assert [a.i for a in node.attribute if a.name == "hidden_size"] == [left]
    assert left < 8


def test_a_disagreeing_file_is_not_written(tmp_path: Path) -> None:
    path = exported("dense", tmp_path / "net.onnx", dynamo=False)
    (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(ProofError, match="the ONNX file"):
        prune_onnx(path, "macs<=50%", tmp_path / "out.onnx", measure=False, tolerance=-1.0)
    assert (tmp_path / "out.onnx").read_text() == "old"


def test_errors_of_prune_come_through(tmp_path: Path) -> None:
    path = exported("dense", tmp_path / "net.onnx", dynamo=False)
    with pytest.raises(BudgetError, match="Nearest feasible"):
        prune_onnx(path, "macs<=1%", tmp_path / "out.onnx", measure=False)
    with pytest.raises(OptionError, match="does not come from an ONNX file"):
        write_verified(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "out.onnx")
