"""The table of tensors: the same bits, dtype, strides and ties come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import FileError
from secateurs.deploy.tensors import TensorTable, rebuild

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
]


def there_and_back(*tensors: Tensor) -> list[Tensor]:
    table = TensorTable()
    names = [table.add(tensor, f"t{index}") for index, tensor in enumerate(tensors)]
    made = rebuild(table.entries, table.data.__getitem__)
    return [made[name] for name in names]


def identical(left: Tensor, right: Tensor) -> bool:
    return (
        (left.dtype, left.shape, left.requires_grad, type(left))
        == (right.dtype, right.shape, right.requires_grad, type(right))
        # Bytes, so that NaN equals NaN and 0.0 differs from -0.0.
        and left.detach().contiguous().flatten().view(torch.uint8).tolist()
        == right.detach().contiguous().flatten().view(torch.uint8).tolist()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_dtype_and_shape_are_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 9 - 4).to(dtype)
    (back,) = there_and_back(tensor)
    assert identical(tensor, back)
    assert back.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_special_numbers_are_kept() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    assert identical(tensor, there_and_back(tensor)[0])


@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 3)] * 4))
def test_strides_of_dense_tensors_are_kept(order: list[int], shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).permute(order)
    (back,) = there_and_back(tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(4, 6)[:, ::2], torch.randn(3, 1).expand(3, 5), torch.randn(8)[2:6]],
    ids=["gaps", "one", "part"],
)
def test_gaps_are_closed(tensor: Tensor) -> None:
    (back,) = there_and_back(tensor)
    assert torch.equal(back, tensor)
    assert back.is_contiguous()
    assert back.untyped_storage().nbytes() == tensor.numel() * 4


def test_parameters_and_gradients() -> None:
    frozen, buffer = nn.Parameter(torch.randn(2), requires_grad=False), torch.randn(2, requires_grad=True)
    for tensor in (nn.Parameter(torch.randn(2)), frozen, buffer, nn.Parameter(torch.arange(3), requires_grad=False)):
        assert identical(tensor, there_and_back(tensor)[0])


def test_one_tensor_is_one_entry() -> None:
    tensor = nn.Parameter(torch.randn(2))
    table = TensorTable()
    assert (table.add(tensor, "first"), table.add(tensor, "second")) == ("first", "first")
    assert list(table.data) == ["first"]


def test_two_tensors_on_one_memory_stay_on_one_memory() -> None:
    tensor = torch.randn(2, 3)
    table = TensorTable()
    for name, parameter in (("a", nn.Parameter(tensor)), ("b", nn.Parameter(tensor))):
        table.add(parameter, name)
    made = rebuild(table.entries, table.data.__getitem__)
    assert list(table.data) == ["a"]
    assert made["a"] is not made["b"]
    made["a"].data[0, 0] = 7
    assert made["b"][0, 0] == 7


def test_parts_of_one_tensor_are_stored_apart() -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    rows, others, column = nn.Parameter(whole[:2]), nn.Parameter(whole[2:]), nn.Parameter(whole[:, :1])
    table = TensorTable()
    for name, part in (("rows", rows), ("others", others), ("column", column)):
        table.add(part, name)
    storages = {tensor.untyped_storage().data_ptr() for tensor in table.data.values()}
    assert len(storages) == 3
    assert all(torch.equal(table.data[name], part) for name, part in (("rows", rows), ("others", others)))


def test_overlapping_trainable_views_are_refused() -> None:
    whole = torch.randn(4, 3)
    table = TensorTable()
    table.add(nn.Parameter(whole), "whole")
    with pytest.raises(FileError, match=r"overlaps 'whole' in memory without being equal to it; clone\(\) one"):
        table.add(nn.Parameter(whole[:2]), "part")
    table.add(whole[1:3], "constant")


def hooked() -> Tensor:
    tensor = torch.randn(2, requires_grad=True)
    tensor.register_hook(lambda grad: grad * 0)
    return tensor


def accumulating() -> Tensor:
    tensor = torch.randn(2, requires_grad=True)
    tensor.register_post_accumulate_grad_hook(lambda _: None)
    return tensor


class Special(torch.Tensor):
    pass


REFUSED = [
    (lambda: torch.empty(2, device="meta"), "meta device"),
    (lambda: nn.UninitializedParameter(), "lazy parameter"),
    (lambda: torch.randn(2, 2).to_sparse(), "sparse, quantized or nested"),
    (lambda: torch.quantize_per_tensor(torch.randn(2), 0.1, 0, torch.qint8), "sparse, quantized or nested"),
    (lambda: torch.randn(2, requires_grad=True) * 2, r"detach\(\) it"),
    (lambda: torch.randn(2).as_subclass(Special), "is a Special, not a plain tensor"),
    (hooked, "gradient hooks"),
    (accumulating, "gradient hooks"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[case[1][:12] for case in REFUSED])
def test_what_is_no_plain_tensor_is_refused(make: Any, message: str) -> None:
    with pytest.raises(FileError, match=message):
        TensorTable().add(make(), "name")


def entry(**fields: Any) -> dict[str, Any]:
    return {"x": {"dtype": "float32", "shape": [2, 3], **fields}}


MALFORMED = [
    (entry(dtype="save"), "has the dtype 'save', which this PyTorch does not know"),
    (entry(dtype="float16"), r"should be float16 \[2, 3\], but torch.float32 \[2, 3\] is stored"),
    (entry(shape=[3, 2]), r"should be float32 \[3, 2\]"),
    (entry(dtype="complex64"), "should be complex64"),
    (entry(strides=[9, 9]), r"strides \[9, 9\], which do not fit its shape"),
    (entry(strides=[0, 0]), r"strides \[0, 0\]"),
    (entry(data="y"), "shares the data of 'y', which is not listed before it"),
    (entry(colour=1), "unknown field 'colour'"),
    ({"x": {"shape": []}}, "lacks the field 'dtype'"),
    ({"x": 3}, "should be a JSON object"),
]


@pytest.mark.parametrize(("entries", "message"), MALFORMED, ids=[case[1][:20] for case in MALFORMED])
def test_malformed_entries_are_refused(entries: Any, message: str) -> None:
    with pytest.raises(FileError, match=message):
        rebuild(entries, {"x": torch.zeros(2, 3)}.__getitem__)


def test_integers_cannot_be_trained() -> None:
    with pytest.raises(FileError, match="cannot require gradients"):
        rebuild({"x": {"dtype": "int64", "shape": [1], "requires_grad": True}}, lambda _: torch.zeros(1).long())
