"""Models saved by every released file format still load and still compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn

from secateurs.deploy.store import FORMAT, load_extra, load_model, save_model
from tests.deploy.make_golden import GOLDEN, MODELS

FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/model.json"))


def outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: Any = model(inputs)
    return found[0] if isinstance(found, tuple) else found


def test_there_is_a_golden_folder_for_every_format() -> None:
    assert {path.parent.name for path in FOLDERS} == {f"v{number}" for number in range(1, FORMAT + 1)}
    assert {path.name for path in FOLDERS if path.parent.name == f"v{FORMAT}"} == set(MODELS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_golden_models_load_and_compute_the_same(folder: Path, tmp_path: Path) -> None:
    expected = load(load_extra(folder, "expected.safetensors"))
    model = load_model(folder)
    tolerance = 1e-5 if expected["outputs"].dtype == torch.float32 else 1e-2
    found = outputs(model, expected["inputs"])
    torch.testing.assert_close(found, expected["outputs"], rtol=tolerance, atol=tolerance)
    assert torch.equal(outputs(load_model(save_model(model, tmp_path / "m")), expected["inputs"]), found)


def test_golden_weights_stay_tied_and_frozen() -> None:
    model = load_model(GOLDEN / "v1" / "recurrent")
    assert model.weight_hh_l1 is model.weight_hh_l0
    assert not model.weight_hh_l0.requires_grad
    assert model.weight_ih_l0.requires_grad
