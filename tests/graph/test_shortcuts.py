"""Shapes on the meta device: what a shortcut says is what PyTorch says, with its strides, or it says nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.graph.shortcuts import shortcut

ATEN = torch.ops.aten
SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)


def at(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def same(func: Any, *args: Any) -> bool:
    """Whether the shortcut agrees with the op; False where there is none. Where the op refuses, there must be none."""
    found = shortcut(func, args, {})
    try:
        wanted = func(*args)
    except (RuntimeError, IndexError):
        assert found is None, f"{func} refuses what the shortcut takes"
        return False
    if found is None:
        return False
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for mine, theirs in pairs:
        assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        axes = [axis for axis, n in enumerate(mine.shape) if n > 1] if mine.numel() else []
        assert [mine.stride(a) for a in axes] == [theirs.stride(a) for a in axes]
    return True


@given(SHAPES, SHAPES, st.permutations(range(4)), st.sampled_from(["add", "sub", "mul", "div"]))
def test_two_tensors_combined(shape: tuple[int, ...], other: tuple[int, ...], order: list[int], name: str) -> None:
    x, y = at(*shape), at(*other)
    x = x.permute([axis for axis in order if axis < x.dim()])
    same(getattr(ATEN, name).Tensor, x, y)
    if x.is_contiguous():
        same(getattr(ATEN, f"{name}_").Tensor, x.clone(), y)


@given(st.tuples(*[st.integers(1, 3)] * 4), st.permutations(range(4)), st.booleans())
def test_a_tensor_with_gaps_or_in_another_order(shape: tuple[int, ...], order: list[int], gaps: bool) -> None:
    x = at(*shape).permute(order)
    x = x[..., ::2] if gaps else x
    assert same(ATEN.mul.Scalar, x, 2.0)
    assert same(ATEN.gelu.default, x)
    assert same(ATEN.add.Tensor, x, at(shape[order[3]])[::2] if gaps else at(shape[order[3]]))


def test_what_is_expanded_has_one_place_for_many() -> None:
    assert same(ATEN.mul.Scalar, at(1, 4).expand(3, 4), 2.0)


@given(
    st.integers(1, 3), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(1, 9), st.integers(1, 3),
    st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_convolutions(
    axes: int, width: int, groups: int, n: int, kernel: int, stride: int, padding: int, dilation: int, bias: bool
) -> None:
    x, weight = at(2, width * groups, *[n] * axes), at(2 * groups, width, *[kernel] * axes)
    sizes = [stride] * axes, [padding] * axes, [dilation] * axes
    same(ATEN.convolution.default, x, weight, at(2 * groups) if bias else None, *sizes, False, [0] * axes, groups)


def test_a_convolution_is_shortened() -> None:
    x, weight = at(2, 3, 8, 8), at(4, 3, 3, 3)
    assert same(ATEN.convolution.default, x, weight, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (ATEN.bmm.default, (at(2, 3, 4), at(2, 4, 5))),
        (ATEN.mm.default, (at(3, 4), at(4, 5))),
        (ATEN.addmm.default, (at(5), at(3, 4), at(4, 5))),
        (ATEN.cat.default, ([at(2, 3), at(2, 4)], 1)),
        (ATEN.native_batch_norm.default, (at(2, 3, 4), at(3), at(3), at(3), at(3), False, 0.1, 1e-5)),
        (ATEN.native_layer_norm.default, (at(2, 3, 4), [4], at(4), at(4), 1e-5)),
        (ATEN._softmax.default, (at(2, 3), 1, False)),
        (ATEN.add_.Tensor, (at(2, 3), at(3))),
        (ATEN.add.Tensor, (at(3), at(2, 3))),
    ],
)
def test_equals_the_op(func: Any, args: tuple[Any, ...]) -> None:
    if func is ATEN.native_batch_norm.default:
        # In evaluation PyTorch returns no statistics of the batch; nobody looks at them.
        assert shortcut(func, args, {})[0].shape == func(*args)[0].shape
    else:
        assert same(func, *args)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (ATEN.bmm.default, (at(2, 3, 4), at(2, 5, 4))),
        (ATEN.bmm.default, (at(2, 3, 4), at(3, 4, 4))),
        (ATEN.add.Tensor, (at(2, 3), at(2, 4))),
        (ATEN.add_.Tensor, (at(3), at(2, 3))),
        (ATEN.convolution.default, (at(1, 3, 8), at(4, 2, 3), None, [1], [0], [1], False, [0], 1)),
        (ATEN.convolution.default, (at(1, 3, 2), at(4, 3, 3), None, [1], [0], [1], False, [0], 1)),
    ],
)
def test_the_op_refuses_itself(func: Any, args: tuple[Any, ...]) -> None:
    assert not same(func, *args)


@pytest.mark.parametrize("other", [at(2, dtype=torch.float64), at(2, dtype=torch.int64)])
def test_mixed_dtypes_are_left_to_pytorch(other: Tensor) -> None:
    assert shortcut(ATEN.add.Tensor, (at(3, 2), other), {}) is None
    assert shortcut(ATEN.mul.Tensor, (at(3, 2, dtype=torch.int64), at(2)), {}) is None
