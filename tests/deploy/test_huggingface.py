"""Models that a Hugging Face config can express become Hugging Face folders; the others say why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from secateurs.core.errors import FileError, MissingExtraError, ModelError, ProofError
from secateurs.deploy.huggingface import save_pretrained
from tests.deploy.samples import narrow, same

TOKENS = {"input_ids": torch.arange(14).reshape(2, 7)}


def bert(*widths: int) -> Any:
    """A model of one layer a width of its feed-forward part, all 64 before the cut."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=len(widths), num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertForMaskedLM(config).eval()
    for layer, width in zip(model.bert.encoder.layer, widths, strict=True):
        narrow(layer.intermediate.dense, "weight bias", 0, torch.arange(width))
        narrow(layer.output.dense, "weight", 1, torch.arange(width))
    return model


@pytest.mark.parametrize("width", [64, 40])
def test_uniform_widths_become_a_hugging_face_folder(tmp_path: Path, width: int) -> None:
    model = bert(width, width)
    save_pretrained(model, tmp_path / "m")
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path / "m").eval()
    assert back.config.intermediate_size == width
    assert same(model, back, TOKENS)
    assert model.config.intermediate_size == 64
    assert os.listdir(tmp_path) == ["m"]


def test_different_widths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        save_pretrained(bert(64, 40, 64), tmp_path / "m")
    assert str(caught.value) == (
        "the config of BertForMaskedLM makes 'bert.encoder.layer.1.intermediate.dense.weight' [64, 32], but it is "
        "[40, 32], and no one number of the config fits all layers: save it with save_model."
    )
    assert not (tmp_path / "m").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Linear is not a transformers model: save it with save_model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "m")


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(FileError, match="is not empty: choose a new folder"):
        save_pretrained(bert(64), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_does_not_come_back_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = transformers.BertForMaskedLM.from_pretrained.__func__

    def spoiled(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(cls, *args, **kwargs)
        model.bert.embeddings.LayerNorm.bias.data += 1
        return model

    monkeypatch.setattr(transformers.BertForMaskedLM, "from_pretrained", classmethod(spoiled))
    with pytest.raises(ProofError, match=r"'bert.embeddings.LayerNorm.bias' comes back from from_pretrained changed"):
        save_pretrained(bert(64), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_no_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateurs\[language\]'"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "m")
