"""Every form of a layer computes what the dense layer computes, whatever the zeros, the sizes and the inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secateurs.deploy.kernels import (
    BagProduct,
    BsrProduct,
    CsrProduct,
    MapLayer,
    Product,
    RowsLayer,
    ShrunkConv,
    ShrunkLinear,
    as_matrix,
)

PRODUCTS: dict[str, Callable[[Tensor], Product]] = {
    "csr": CsrProduct,
    "bag": BagProduct,
    "bsr": lambda weight: BsrProduct(weight, 4),
}
FORMS = ("csr", "bag", "bsr", "shrunk")


def sparse_weight(outputs: int, inputs: int, seed: int, density: float = 0.3) -> Tensor:
    """Random zeros, with at least one weight, and a row and a column without any where there is room."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, inputs, generator=generator) < density
    if outputs > 1 and inputs > 1:
        weight[seed % outputs], weight[:, seed % inputs] = 0, 0
    weight[(seed + 1) % outputs, (seed + 1) % inputs] = 2.0
    return weight


def linear(form: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    return ShrunkLinear(weight, bias) if form == "shrunk" else RowsLayer(PRODUCTS[form](weight), bias)


@given(
    form=st.sampled_from(FORMS),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    lead=st.lists(st.integers(1, 5), max_size=3),
    seed=st.integers(0, 99),
    biased=st.booleans(),
    by_columns=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_linear_forms(
    form: str, sizes: tuple[int, int], lead: list[int], seed: int, biased: bool, by_columns: bool
) -> None:
    step = 4 if form == "bsr" else 1
    weight = sparse_weight(step * sizes[0], step * sizes[1], seed).double()
    bias = torch.randn(len(weight)).double() if biased else None
    x = torch.randn(*lead, weight.shape[1]).double()
    layer = linear(form, weight, bias)
    layer.by_columns = by_columns
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("rows", [63, 64, 65, 128, 129, 300])
def test_pieces_of_many_inputs(form: str, by_columns: bool, rows: int) -> None:
    weight, bias, x = sparse_weight(12, 8, 3), torch.randn(12), torch.randn(rows, 8)
    layer = linear(form, weight, bias)
    layer.by_columns = by_columns
    found = layer(x)
    torch.testing.assert_close(found, F.linear(x, weight, bias))
    assert found.stride() == ((1, rows) if by_columns and form != "shrunk" else (12, 1))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_lie_as_columns(form: str) -> None:
    weight = sparse_weight(8, 8, 1)
    x = torch.randn(8, 70).t()
    torch.testing.assert_close(linear(form, weight, None)(x), F.linear(x, weight))


@pytest.mark.parametrize("form", FORMS)
def test_no_inputs_at_all(form: str) -> None:
    assert linear(form, sparse_weight(8, 4, 1), torch.ones(8))(torch.ones(0, 4)).shape == (0, 8)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_as_they_were(form: str) -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    linear(form, sparse_weight(4, 4, 1), torch.ones(4))(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bias", [None, torch.arange(3.0)])
def test_a_weight_of_zeros_is_shrunk_to_its_bias(bias: Tensor | None) -> None:
    layer = ShrunkLinear(torch.zeros(3, 5), bias)
    assert layer.weight.shape == (1, 1)
    expected = torch.zeros(3) if bias is None else bias
    assert torch.equal(layer(torch.randn(2, 5)), expected.expand(2, 3))


def test_what_is_shrunk() -> None:
    weight = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 2, 3]])
    layer = ShrunkLinear(weight, torch.tensor([1.0, 5, 7]))
    assert torch.equal(layer.weight, torch.tensor([[1.0, 0], [2, 3]]))
    assert torch.equal(layer(torch.tensor([9.0, 1, 1])), torch.tensor([2.0, 5, 12]))
    whole = ShrunkLinear(torch.tensor([[1.0, 0], [0, 2]]), None)
    assert (whole.inputs, whole.outputs) == (None, None)
    columns = ShrunkLinear(torch.tensor([[1.0, 0], [2, 0]]), None)
    assert columns.outputs is None
    assert torch.equal(columns(torch.ones(2)), torch.tensor([1.0, 2]))


CONVS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_convolutions(form: str, options: dict, biased: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, bias=biased, **options).requires_grad_(False)
    conv.weight *= torch.rand_like(conv.weight) < 0.4
    conv.weight[2], conv.weight[:, 1] = 0, 0
    layer = ShrunkConv(conv) if form == "shrunk" else MapLayer(PRODUCTS[form](as_matrix(conv)), conv, conv.bias)
    # 11 × 12 places are more than one piece.
    for x in (torch.randn(2, 4, 11, 12), torch.randn(4, 11, 12), torch.randn(1, 4, 5, 5)):
        torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-4)


def test_matrices_of_weights() -> None:
    assert as_matrix(nn.Conv2d(4, 8, 3)).shape == (8, 36)
    other = Conv1D(6, 4)
    assert torch.equal(as_matrix(other), other.weight.detach().t())
    assert not as_matrix(nn.Linear(2, 3)).requires_grad
