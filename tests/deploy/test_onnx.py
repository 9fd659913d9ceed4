"""ONNX files of narrowed models agree with the models, or nothing is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from secateurs.core.errors import MissingExtraError, ModelError, OptionError, ProofError
from secateurs.deploy import onnx as module
from secateurs.deploy.onnx import export_onnx
from tests.deploy.exportable import IMAGES, TOKENS, Branching, conv_net, llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def run(path: Path, feed: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a) for a in session.run(None, {name: t.numpy() for name, t in feed.items()})]


def test_onnx_of_any_batch_size(tmp_path: Path) -> None:
    net = conv_net()
    path = export_onnx(net, IMAGES, tmp_path / "x" / "net.onnx", dynamic_batch=True)
    assert net.training
    assert os.listdir(tmp_path / "x") == ["net.onnx"]
    seven = torch.randn(7, 3, 8, 8)
    (found,) = run(path, {"input": seven})
    torch.testing.assert_close(found, net.eval()(seven))


def test_a_session_is_called_as_the_model() -> None:
    net = conv_net().eval()
    session = module.onnx_session(net, IMAGES, threads=1)
    (found,) = session(IMAGES)
    torch.testing.assert_close(found, net(IMAGES))
    assert session.session.get_session_options().intra_op_num_threads == 1
    model = llama()
    torch.testing.assert_close(module.onnx_session(model, TOKENS)(**TOKENS)[0], model.eval()(**TOKENS).logits)


def test_onnx_with_keywords(tmp_path: Path) -> None:
    model = llama()
    path = export_onnx(model, TOKENS, tmp_path / "llama.onnx")
    torch.testing.assert_close(run(path, TOKENS)[0], model.eval()(**TOKENS).logits)
    assert model.config.use_cache is True


def test_a_file_that_disagrees_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_text("old")
    program = module._program

    def spoiled(*args: Any) -> Any:
        made = program(*args)
        for value in made.model.graph.initializers.values():
            value.const_value = shifted(value)
        return made

    def shifted(value: Any) -> Any:
        array = value.const_value.numpy()
        return onnx_ir.tensor(array + 1 if array.dtype == numpy.float32 else array, name=value.name)

    monkeypatch.setattr(module, "_program", spoiled)
    with pytest.raises(ProofError, match=r"output 0 of the model and of the ONNX file differ by up to .* is allowed"):
        export_onnx(conv_net(), IMAGES, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "old"
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing} is needed here; .*'secateurs\[onnx\]'"):
        export_onnx(conv_net(), IMAGES, tmp_path / "m.onnx")


def test_bfloat16_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"export model.float\(\), or pass check=False"):
        export_onnx(conv_net().bfloat16(), IMAGES, tmp_path / "m.onnx")


def test_what_pytorch_cannot_export_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="PyTorch cannot export this model to ONNX: "):
        export_onnx(Branching(), torch.ones(2), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_weights_beyond_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONE_FILE", 0)
    net = conv_net()
    path = export_onnx(net, IMAGES, tmp_path / "net.onnx")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.data"]
    torch.testing.assert_close(run(path, {"input": IMAGES})[0], net.eval()(IMAGES))
