"""The rules on the sample inputs of PyTorch's own table of operators, a private part of it that only tests may use."""

from __future__ import annotations

import itertools
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.graph.proof import prove_op

# Every day: what networks are made of. With -m slow: everything in the table.
COMMON = [
    "__getitem__", "add", "addbmm", "addmm", "amax", "baddbmm", "bmm", "cat", "chunk", "clamp", "cumsum", "diagonal",
    "div", "einsum", "expand", "flatten", "flip", "index_select", "inner", "kron", "linalg.norm", "logsumexp",
    "masked.mean",
    "matmul", "mean", "meshgrid", "movedim", "mul", "narrow", "nn.functional.avg_pool2d", "nn.functional.batch_norm",
    "nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.conv_transpose2d",
    "nn.functional.embedding", "nn.functional.glu", "nn.functional.group_norm", "nn.functional.instance_norm",
    "nn.functional.interpolate", "nn.functional.layer_norm", "nn.functional.linear", "nn.functional.normalize",
    "nn.functional.pad", "nn.functional.pixel_shuffle", "nn.functional.prelu", "nn.functional.rms_norm",
    "nn.functional.unfold", "outer", "permute", "pow", "repeat", "repeat_interleave", "reshape", "roll", "select",
    "softmax", "split", "squeeze", "stack", "std", "sum", "tensordot", "tile", "topk", "transpose", "tril", "unbind",
    "unflatten", "unsqueeze", "view", "where",
]  # fmt: skip

EXCUSED = {
    "as_strided": "looks at storage beyond its input, which a slice does not have",
    "hash_tensor": "its result has a dtype that cannot be sliced",
    "jiterator_2inputs_2outputs": "runs on GPUs only",
    "jiterator_4inputs_with_extra_args": "runs on GPUs only",
    "jiterator_binary": "runs on GPUs only",
    "jiterator_binary_return_by_ref": "runs on GPUs only",
    "jiterator_unary": "runs on GPUs only",
    "nn.functional.ctc_loss": "leaves part of its output unwritten",
    "nn.functional.scaled_dot_product_attention": "replays one kernel, which PyTorch chooses by the sizes",
    "sparse.mm": "sparse tensors cannot be masked by the proof",
    "sparse.sampled_addmm": "sparse tensors cannot be masked by the proof",
    "to_sparse": "sparse tensors cannot be sliced by the proof",
}


@cache
def table() -> dict[str, list[Any]]:
    """PyTorch's operators by name, without the test framework that the module asks for."""
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stand_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    found: dict[str, list[Any]] = {}
    for op in methods.op_db:
        if torch.float64 in op.dtypes:
            found.setdefault(op.name, []).append(op)
    return found


def samples(op: Any, limit: int) -> Iterator[tuple[Callable[..., Any], list[Tensor]]]:
    """`op` as a function of its float inputs only, and those, for each of its first samples."""
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), limit):
        flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        at = [i for i, v in enumerate(flat) if isinstance(v, Tensor) and v.dtype == torch.float64]
        # The variance of nothing is not zero but NaN, which no network computes.
        if any(flat[i].numel() == 0 for i in at) and op.name in ("var", "std", "var_mean", "std_mean"):
            continue

        def call(*tensors: Tensor, flat: list[Any] = flat, at: list[int] = at, spec: Any = spec) -> Any:
            values = dict(enumerate(flat)) | dict(zip(at, tensors, strict=True))
            first, args, kwargs = tree_unflatten(list(values.values()), spec)
            return op(first, *args, **kwargs)

        yield call, [flat[i].detach().clone() for i in at]


def prove_all(name: str, limit: int) -> int:
    """Prove the first samples of an operator; how many of them had a unit that can go."""
    free = 0
    for op in table()[name]:
        for call, inputs in samples(op, limit):
            for zeroed in (True, False):
                run = prove_op(call, inputs, [zeroed] * len(inputs), least=2)
                free += bool(run.live())
    return free


@pytest.mark.filterwarnings("ignore")
def test_common_operators() -> None:
    frozen = {name for name in COMMON if not prove_all(name, 5)}
    # Everything else keeps something free in some sample.
    assert frozen == {"addbmm", "diagonal", "masked.mean", "nn.functional.conv3d", "nn.functional.unfold", "tril"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_operators() -> None:
    wrong = {}
    for name in sorted(set(table()) - set(EXCUSED)):
        try:
            prove_all(name, 30)
        except Exception as error:  # noqa: BLE001  (all operators are tried before any is reported)
            wrong[name] = str(error)
    assert not wrong
