"""Exported programs of narrowed models agree with the models, or nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from secateurs.core.errors import ModelError, OptionError, ProofError
from secateurs.deploy import program as module
from secateurs.deploy.program import export_program
from tests.deploy.exportable import IMAGES, TOKENS, Branching, conv_net, llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_a_program_of_any_batch_size(tmp_path: Path) -> None:
    net = conv_net()
    path = export_program(net, IMAGES, tmp_path / "net.pt2", dynamic_batch=True)
    assert net.training
    assert os.listdir(tmp_path) == ["net.pt2"]
    seven = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(seven), net.eval()(seven))


def test_a_program_with_keywords(tmp_path: Path) -> None:
    model = llama()
    path = export_program(model, TOKENS, tmp_path / "llama.pt2")
    torch.testing.assert_close(torch.export.load(path).module()(**TOKENS).logits, model.eval()(**TOKENS).logits)


def test_programs_have_their_suffix(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"does not end in .pt2"):
        export_program(conv_net(), IMAGES, tmp_path / "m.onnx")


def test_what_pytorch_cannot_export_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="PyTorch cannot export this model: "):
        export_program(Branching(), torch.ones(2), tmp_path / "m.pt2")
    assert os.listdir(tmp_path) == []


def test_a_file_that_disagrees_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.pt2").write_text("old")
    other = conv_net()
    monkeypatch.setattr(module, "_program", lambda *_: torch.export.export(other.eval(), (IMAGES,)))
    with pytest.raises(ProofError, match=r"output 0 of the model and of the exported program differ by up to"):
        export_program(conv_net(), IMAGES, tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_text() == "old"
    assert os.listdir(tmp_path) == ["net.pt2"]
