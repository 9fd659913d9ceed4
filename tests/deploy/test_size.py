"""The size of a file that is not written is that of one that is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateurs.deploy.size import size_on_disk


class Tied(nn.Module):
    """An embedding that is also the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.out = nn.Linear(16, 100, bias=False)
        self.out.weight = self.embed.weight


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten())


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [convolutions, transformer])
def test_within_a_hundredth_of_a_written_file(tmp_path: Path, make: type[nn.Module], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = (tmp_path / "model.safetensors").stat().st_size
    assert size_on_disk(model) == pytest.approx(written, rel=0.01)


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    model = Tied()
    save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "model", metadata={"format": "pt"})
    assert size_on_disk(model) == pytest.approx((tmp_path / "model").stat().st_size, rel=0.01)


def test_a_model_without_tensors_is_a_header() -> None:
    assert 8 < size_on_disk(nn.ReLU()) < 100
