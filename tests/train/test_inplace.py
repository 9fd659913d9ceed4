"""Writing under a mask equals masked_fill and where, bit for bit, whatever the numbers and the layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.train.inplace import put_masked, zero_masked

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.complex64, torch.complex128]
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


def numbers(dtype: torch.dtype, seed: int) -> Tensor:
    found = (100 * torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(seed))).abs().to(dtype)
    if dtype.is_floating_point:
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40])
        found.view(-1)[:10] = torch.cat([special, special]).to(dtype)
    return found


def mask() -> Tensor:
    kept = torch.rand(4, 6, 3, 3, generator=torch.Generator().manual_seed(9)) < 0.5
    kept.view(-1)[:10] = torch.tensor([True] * 5 + [False] * 5)
    return kept


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_are_those_of_masked_fill(dtype: torch.dtype, layout: str) -> None:
    tensor, kept = LAYOUTS[layout](numbers(dtype, 1)), mask()
    expected = tensor.masked_fill(~kept, 0)
    zero_masked(tensor, kept)
    assert bits(tensor) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_values_are_those_of_where(dtype: torch.dtype, layout: str, other: str) -> None:
    tensor, values, kept = LAYOUTS[layout](numbers(dtype, 1)), LAYOUTS[other](numbers(dtype, 2)), mask()
    expected = torch.where(kept, tensor, values)
    before = bits(values)
    put_masked(tensor, kept, values)
    assert bits(tensor) == bits(expected)
    assert bits(values) == before


def test_parameters_are_written_in_place_and_autograd_sees_it() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    address, loss = weight.data_ptr(), (weight * weight).sum()
    zero_masked(weight, torch.eye(2, dtype=torch.bool))
    assert weight.data_ptr() == address
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_other_devices_get_the_plain_operations() -> None:
    tensor = torch.empty(2, 2, device="meta")
    zero_masked(tensor, torch.empty(2, 2, dtype=torch.bool, device="meta"))
    put_masked(tensor, torch.empty(2, 2, dtype=torch.bool, device="meta"), tensor)
    assert tensor.shape == (2, 2)
