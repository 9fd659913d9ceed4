"""Layers as matrices: their columns times their rows are their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.errors import DataError, ModelError
from secateurs.solvers import Gram, from_matrix, gram, solvable, to_matrix


class Conv1D(nn.Module):
    """A linear layer as Hugging Face has it: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": (nn.Linear(5, 3, bias=False), (4, 5)),
    "linear over tokens": (nn.Linear(5, 3, bias=False), (2, 6, 5)),
    "linear on one vector": (nn.Linear(5, 3, bias=False), (5,)),
    "hugging face": (Conv1D(3, 5), (2, 6, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1, bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), bias=False), (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 2, 3, 4, 3)),
    "dilated": (nn.Conv2d(2, 3, 3, padding=2, dilation=2, bias=False), (2, 2, 6, 5)),
    "same": (nn.Conv2d(2, 3, (3, 4), padding="same", bias=False), (2, 2, 6, 5)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid", bias=False), (2, 2, 6, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (2, 2, 6, 5)),
    "grouped": (nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False), (2, 6, 4, 4)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 4, 4)),
    "one image": (nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 2, 2, bias=False), (2, 4, 3, 3)),
}


def columns(module: nn.Module, x: Tensor) -> Tensor:
    """All columns that the weight multiplies, as the room gathers them: [groups, observations, columns]."""
    return torch.cat(list(gram._columns(module, x)), 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_columns_are_the_output(name: str) -> None:
    module, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    out = columns(module, x) @ to_matrix(module, module.weight.detach()).double().mT
    wanted = module(x).detach().double()
    if name == "transposed":
        # Patches do not overlap at this stride; rows are (output, kernel offset).
        flat = out[0].view(2, 3, 3, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 6, 6)
        torch.testing.assert_close(flat, wanted, rtol=1e-5, atol=1e-5)
        return
    channel = -1 - len(getattr(module, "kernel_size", ()))
    rows = wanted.movedim(channel, -1).reshape(-1, wanted.shape[channel])
    torch.testing.assert_close(out.transpose(0, 1).flatten(1), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_of_a_weight_turns_back(name: str) -> None:
    weight = LAYERS[name][0].weight.detach()
    module = LAYERS[name][0]
    assert torch.equal(from_matrix(module, to_matrix(module, weight), weight.shape), weight)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_sums_over_observations_however_they_come(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = LAYERS[name]
    torch.manual_seed(1)
    x, y = torch.randn(shape), torch.randn(shape)
    both = torch.cat([columns(module, x), columns(module, y)], 1)
    found = Gram()
    found.add(module, x)
    # Smaller pieces than one call brings must give the same sums.
    monkeypatch.setattr(gram, "_CHUNK", 8)
    found.add(module, y)
    assert found.count == both.shape[1]
    assert found.hessian.dtype == torch.float64
    torch.testing.assert_close(found.hessian, 2 / both.shape[1] * both.mT @ both, rtol=1e-12, atol=1e-12)


def test_patches_are_those_of_unfold() -> None:
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 3, 7, 7)
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27).double()
    assert torch.equal(columns(conv, x)[0], patches)


def test_two_tokens_by_hand() -> None:
    found = Gram()
    found.add(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert found.hessian.tolist() == [[[10.0, 2.0], [2.0, 4.0]]]


def test_half_precision_is_gathered_in_double() -> None:
    x = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    found = Gram()
    found.add(nn.Linear(1, 1), x)
    assert float(found.hessian) == pytest.approx(2 * float(x[0].double()) ** 2, rel=1e-12)


def test_no_observation_is_an_error() -> None:
    with pytest.raises(DataError, match="saw no observation on the calibration data"):
        _ = Gram().hessian
    found = Gram()
    found.add(nn.Linear(3, 1), torch.empty(0, 3))
    with pytest.raises(DataError, match="saw no observation"):
        _ = found.hessian


def test_other_layers_are_refused() -> None:
    assert all(solvable(module) for module, _ in LAYERS.values())
    others = (nn.Embedding(3, 2), nn.BatchNorm1d(3), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.GRU(2, 2))
    assert not any(solvable(module) for module in others)
    with pytest.raises(ModelError, match="the inputs of a BatchNorm1d are no columns of a matrix"):
        Gram().add(nn.BatchNorm1d(3), torch.randn(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [4, 600])
def test_a_hessian_is_symmetric_to_the_bit_and_that_of_the_formula(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    found, batches = Gram(dtype=dtype), [torch.randn(7, width), torch.randn(30, width)]
    for batch in batches:
        found.add(nn.Linear(width, 2, device="meta"), batch)
        assert torch.equal(found.hessian, found.hessian.mT)
    x = torch.cat(batches).double()
    torch.testing.assert_close(found.hessian[0], 2 / 37 * x.T @ x, rtol=1e-5, atol=1e-5)
