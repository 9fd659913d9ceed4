"""Files: read and written again with equal bits, and what is said about files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from secateurs.core.errors import FileError, ModelError, OptionError
from secateurs.onnx import example_inputs, read_onnx, write_onnx
from tests.onnx.samples import Array, Case, f, i, model_of, single


def run(path: Path, feed: dict[str, Tensor]) -> list[Array]:
    """What onnxruntime makes of a file as it stands: with fusions, equal graphs may round otherwise."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: t.numpy() for name, t in feed.items()}))


def conv_net() -> onnx.ModelProto:
    """Convolution, batch norm, grouped convolution, a flatten spelled with Shape, and a dynamic batch."""
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["c"], "a", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "n.weight", "n.bias", "n.mean", "n.var"], ["n"], "n"),
        helper.make_node("Relu", ["n"], ["r"], "r"),
        helper.make_node("Conv", ["r", "b.weight"], ["d"], "b", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["d"], ["s"], "s"),
        helper.make_node("Gather", ["s", "zero"], ["batch"], "batch"),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["lead"], "lead"),
        helper.make_node("Concat", ["lead", "rest"], ["shape"], "shape", axis=0),
        helper.make_node("Reshape", ["d", "shape"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    constants: dict[str, Any] = {
        "a.weight": f(8, 3, 3, 3), "a.bias": f(8, seed=1), "n.weight": f(8, seed=2), "n.bias": f(8, seed=3),
        "n.mean": f(8, seed=4), "n.var": f(8, low=0.5, seed=5), "b.weight": f(8, 1, 3, 3, seed=6),
        "zero": i(0), "axis": i([0]), "rest": i([8 * 16]), "fc.weight": f(5, 128, seed=7), "fc.bias": f(5, seed=8),
    }  # fmt: skip
    made = model_of(nodes, {"x": ("float32", ["n", 3, 4, 4])}, ["y"], constants=constants)
    made.producer_name, made.doc_string = "sample", "a small net"
    made.metadata_props.add(key="author", value="nobody")
    return made


@pytest.fixture
def net(tmp_path: Path) -> Path:
    onnx.save(conv_net(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_parameters_have_the_names_of_the_file(net: Path) -> None:
    module = read_onnx(net)
    parameters = ["a.bias", "a.weight", "b.weight", "fc.bias", "fc.weight", "n.bias", "n.weight"]
    assert sorted(name for name, _ in module.named_parameters()) == parameters
    assert sorted(name for name, _ in module.named_buffers()) == ["n.mean", "n.var"]
    assert not module.training


def test_a_written_file_gives_equal_bits(net: Path, tmp_path: Path) -> None:
    module = read_onnx(net)
    path = write_onnx(module, tmp_path / "again.onnx")
    inputs = example_inputs(module, batch=3)
    for before, after in zip(run(net, inputs), run(path, inputs), strict=True):
        np.testing.assert_array_equal(before, after)
    assert sorted(tmp_path.iterdir()) == sorted([net, path])


def test_names_and_metadata_are_kept(net: Path, tmp_path: Path) -> None:
    before, after = onnx.load(net), onnx.load(write_onnx(read_onnx(net), tmp_path / "again.onnx"))
    assert after.producer_name == "sample"
    assert after.doc_string == "a small net"
    assert [(p.key, p.value) for p in after.metadata_props] == [("author", "nobody")]
    assert [n.name for n in after.graph.node] == [n.name for n in before.graph.node]
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert {t.name for t in after.graph.initializer} == {t.name for t in before.graph.initializer}


def test_integers_that_a_node_uses_are_its_own(net: Path) -> None:
    module = read_onnx(net)
    assert module.get_submodule("b").groups == 8
    assert module.get_submodule("flat").shape == (None, 128)
    assert "shape=(None, 128)" in repr(module)


def test_changed_sizes_are_written(net: Path, tmp_path: Path) -> None:
    module = read_onnx(net)
    for name in ("a.weight", "a.bias", "n.weight", "n.bias", "b.weight"):
        path, _, local = name.rpartition(".")
        module.get_submodule(path).register_parameter(local, nn.Parameter(module.get_parameter(name).detach()[:4]))
    for local in ("mean", "var"):
        module.get_submodule("n").register_buffer(local, module.get_buffer(f"n.{local}")[:4])
    module.get_submodule("fc").weight = nn.Parameter(module.get_parameter("fc.weight").detach()[:, :64].contiguous())
    module.get_submodule("b").groups, module.get_submodule("flat").shape = 4, (None, 64)
    path = write_onnx(module, tmp_path / "narrow.onnx")
    inputs = example_inputs(module, batch=3)
    np.testing.assert_allclose(run(path, inputs)[0], module(**inputs).detach().numpy(), rtol=1e-5, atol=1e-5)
    graph = onnx.load(path).graph
    assert [a.i for n in graph.node if n.name == "b" for a in n.attribute if a.name == "group"] == [4]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["n", 3, 4, 4]


def test_training_updates_statistics_and_is_written(net: Path, tmp_path: Path) -> None:
    module = read_onnx(net)
    before = module.get_submodule("n").mean.clone()
    inputs = example_inputs(module, batch=3)
    module.train()
    module(**inputs).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    assert not torch.equal(module.get_submodule("n").mean, before)
    (found,) = run(write_onnx(module, tmp_path / "trained.onnx"), inputs)
    np.testing.assert_allclose(found, module(**inputs).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_inputs_by_position_or_name(net: Path) -> None:
    module = read_onnx(net)
    x = torch.ones(2, 3, 4, 4)
    assert torch.equal(module(x), module(x=x))
    with pytest.raises(OptionError, match="the graph takes x; missing: x, not known: z"):
        module(z=x)


def test_example_inputs_are_what_the_graph_declares() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["m"], to=1),
        helper.make_node("Unsqueeze", ["m", "last"], ["w"]),
        helper.make_node("Mul", ["rows", "w"], ["y"]),
    ]
    inputs = {"ids": ("int64", ["n", "t"]), "mask": ("int64", ["n", "t"])}
    made = model_of(nodes, inputs, ["y"], constants={"table": f(7, 4), "last": i([-1])})
    module = _read(made)
    found = example_inputs(module, batch=2, seed=3, sizes={"t": 50})
    assert found["ids"].shape == found["mask"].shape == (2, 50)
    assert found["ids"].unique().tolist() == list(range(7))
    assert found["mask"].unique().tolist() == [1]
    assert torch.equal(found["ids"], example_inputs(module, batch=2, seed=3, sizes={"t": 50})["ids"])
    assert example_inputs(module)["ids"].shape == (1, 8)


def _read(model: onnx.ModelProto) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "net.onnx")
        return read_onnx(Path(folder) / "net.onnx")


def test_equal_vectors_are_not_tied_and_equal_matrices_are() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("Add", ["a", "b"], ["c"], "two"),
        helper.make_node("MatMul", ["c", "w"], ["d"], "three"),
        helper.make_node("Add", ["d", "b"], ["y"], "four"),
    ]
    made = model_of(nodes, {"x": ("float32", [2, 4])}, ["y"], constants={"w": f(4, 4), "b": f(4, seed=1)})
    assert sorted(p.shape for _, p in _read(made).named_parameters()) == [(4,), (4,), (4, 4)]


def test_numbers_statistics_and_masks_are_no_parameters() -> None:
    mask = np.where(np.tril(np.ones((4, 4))) > 0, 0, -np.inf).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("Add", ["a", "mask"], ["b"]),
        helper.make_node("Mul", ["b", "ones"], ["y"]),
    ]
    constants = {"scale": np.float32(0.5), "mask": mask, "ones": np.eye(4, dtype=np.float32)}
    module = _read(model_of(nodes, {"x": ("float32", [4, 4])}, ["y"], constants=constants))
    assert list(module.parameters()) == []
    assert len(list(module.buffers())) == 2


def test_outputs_that_are_sizes_or_constants() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["n"]),
        helper.make_node("Mul", ["n", "two"], ["twice"]),
    ]
    constants = {"first": i(0), "two": i(2), "w": f(3)}
    module = _read(model_of(nodes, {"x": ("float32", ["b", 2])}, ["twice", "s", "w"], constants=constants))
    twice, sizes, weight = module(torch.ones(5, 2))
    assert (twice.item(), sizes.tolist()) == (10, [5, 2])
    assert torch.equal(weight, torch.from_numpy(f(3)))
    assert module.output_names == ("twice", "s", "w")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_truncated_file(net: Path, keep: float) -> None:
    whole = net.read_bytes()
    net.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(FileError, match=r"net\.onnx .*truncated|net\.onnx is not valid"):
        read_onnx(net)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no file"):
        read_onnx(tmp_path / "none.onnx")


def test_an_unknown_op_is_named_with_its_node_and_op_set(tmp_path: Path) -> None:
    model, _ = single(Case("StringNormalizer", [f(2)]))
    model.graph.node[0].name = "strange"
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"StringNormalizer \(node 'strange'\); op set ai.onnx 20"):
        read_onnx(tmp_path / "net.onnx")


def test_a_graph_inside_a_node_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_empty_tensor_value_info("z")]
    )
    node = helper.make_node("If", ["c"], ["y"], "choice", then_branch=branch, else_branch=branch)
    made = model_of([node], {"x": ("float32", [2]), "c": ("bool", [])}, ["y"])
    onnx.save(made, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="If"):
        read_onnx(tmp_path / "net.onnx")


def test_weights_in_a_second_file_are_found_and_missed(net: Path, tmp_path: Path) -> None:
    model = onnx.load(net)
    path = tmp_path / "outside" / "net.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=64)
    inputs = example_inputs(read_onnx(path))
    np.testing.assert_array_equal(run(net, inputs)[0], run(path, inputs)[0])
    (path.parent / "net.data").unlink()
    with pytest.raises(FileError, match=r"net\.data"):
        read_onnx(path)


def test_only_graphs_are_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not Linear: use export_onnx"):
        write_onnx(nn.Linear(2, 2), tmp_path / "net.onnx")  # type: ignore[arg-type]


def test_a_module_whose_nodes_were_replaced_is_not_written(net: Path, tmp_path: Path) -> None:
    module = read_onnx(net)
    module.add_module("r", nn.ReLU())
    with pytest.raises(OptionError, match="r is no longer a node of the graph but a ReLU"):
        write_onnx(module, tmp_path / "new.onnx")


def test_a_graph_that_is_not_valid_is_not_written(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = read_onnx(net)

    def refuse(_path: str) -> None:
        raise onnx.checker.ValidationError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(FileError, match="was not written, the graph is not valid: no"):
        write_onnx(module, tmp_path / "new.onnx")
    assert list(tmp_path.iterdir()) == [net]
