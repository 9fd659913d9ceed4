"""The forms in which a layer's weight could be stored for the sake of its zeros, and which layers have such forms.

| format | what is stored | where |
| --- | --- | --- |
| `csr` | the weights that are not zero, row by row | CPU |
| `bag` | the same, read by the kernel of embedding bags | CPU |
| `bsr:BxB` | dense blocks of 4, 8 or 16 rows and columns, where the zeros leave such | CPU |
| `shrunk` | the weight without the rows and columns that are all zero | anywhere |
| `2:4` | 2 of every 4 inputs, in half precision | GPUs that have the kernel |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..core.errors import ModelError
from ..core.finite import all_finite
from ..solvers.gram import is_hf_conv1d
from .kernels import (
    BagProduct,
    BsrProduct,
    CsrProduct,
    MapLayer,
    Product,
    RowsLayer,
    SemiStructuredLayer,
    ShrunkConv,
    ShrunkLinear,
    as_matrix,
)

__all__ = ["DENSE", "SEMI_STRUCTURED", "Forms", "block_size", "density", "forms", "is_sparse_layer", "no_2_4", "unfit"]

DENSE, SEMI_STRUCTURED = "dense", "2:4"
BLOCKS = (16, 8, 4)
# Zeros that blocks may store: a block kernel gains less than this over one that takes single weights.
_FILL = 1.25
# With fewer zeros than this no form can win the 5% that it must.
_FEW = 0.05
_REAL = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Forms:
    """What could stand in for a layer.

    Args:
        makers: format to a function that builds the module.
        refused: format to the sentence that says why the zeros would suit it and the machine does not.
    """

    makers: Mapping[str, Callable[[], nn.Module]]
    refused: Mapping[str, str]


def is_sparse_layer(module: nn.Module) -> bool:
    """Whether it is a layer of a kind that has sparse forms: Linear, Hugging Face's Conv1D, Conv2d without groups."""
    if is_hf_conv1d(module) or type(module).forward is nn.Linear.forward:
        return True
    return type(module).forward is nn.Conv2d.forward and getattr(module, "groups", 0) == 1


def density(layer: nn.Module) -> float:
    """The share of the layer's weights that are not zero.

    Raises:
        ModelError: a weight or bias is NaN or infinite.
    """
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        if tensor is not None and not all_finite(tensor.detach()):
            raise ModelError(f"the {name} of a {type(layer).__name__} has entries that are NaN or infinite")
    weight = _weight(layer)
    return int(weight.count_nonzero()) / max(1, weight.numel())


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def unfit(layer: nn.Module, kept: float) -> str:
    """Why no other form than the dense one is tried, or "".

    Args:
        layer: for which `is_sparse_layer` holds.
        kept: its density.
    """
    if not _weight(layer).numel():
        return "it has no weights"
    if 1 - kept < _FEW:
        return "hardly any of its weights are zero" if kept < 1 else "none of its weights is zero"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized: it is made anew at each call"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which another form would not run"
    if any(True for _ in layer.children()):
        return "it has a branch beside its weight, which another form would not run"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"its padding is {layer.padding_mode!r}"
    return ""


def forms(layer: nn.Module) -> Forms:
    """The forms that the layer's zeros, its type and its device allow."""
    weight = _weight(layer)
    makers: dict[str, Callable[[], nn.Module]] = {}
    refused: dict[str, str] = {}
    matrix = as_matrix(layer)
    if weight.device.type == "cpu" and weight.dtype in _REAL and not isinstance(getattr(layer, "padding", 0), str):
        makers |= _products(layer, matrix)
    if _has_dead(weight.detach()):
        makers["shrunk"] = lambda: _shrunk(layer)
    if not isinstance(layer, nn.Conv2d) and _is_2_4(matrix):
        why_not = no_2_4(weight.device) or _not_half(weight)
        if why_not:
            refused[SEMI_STRUCTURED] = why_not
        else:
            makers[SEMI_STRUCTURED] = lambda: SemiStructuredLayer(matrix.contiguous(), _bias(layer))
    return Forms(makers, refused)


def _products(layer: nn.Module, matrix: Tensor) -> dict[str, Callable[[], nn.Module]]:
    if not bool(matrix.any()):
        return {}
    made: dict[str, Callable[[], nn.Module]] = {
        "csr": lambda: _with(CsrProduct(matrix), layer),
        "bag": lambda: _with(BagProduct(matrix), layer),
    }
    block = block_size(matrix)
    if block is not None:
        made[f"bsr:{block}x{block}"] = lambda: _with(BsrProduct(matrix, block), layer)
    return made


def _with(product: Product, layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return MapLayer(product, layer, _bias(layer))
    return RowsLayer(product, _bias(layer))


def _shrunk(layer: nn.Module) -> nn.Module:
    return ShrunkConv(layer) if isinstance(layer, nn.Conv2d) else ShrunkLinear(as_matrix(layer), _bias(layer))


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _has_dead(weight: Tensor) -> bool:
    """Whether an output or an input has no weight."""
    used = weight != 0
    return not all(bool(used.transpose(0, axis).flatten(1).any(1).all()) for axis in (0, 1))


def block_size(weight: Tensor) -> int | None:
    """The largest of 16, 8 and 4 in whose square blocks the weights [out, in] lie dense, or None.

    Dense are blocks that hold at most a quarter more entries than there are weights; both sizes must divide.
    """
    used = weight != 0
    for size in BLOCKS:
        if weight.shape[0] % size == 0 and weight.shape[1] % size == 0:
            blocks = used.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
            if int(blocks.sum()) * size**2 <= _FILL * int(used.sum()):
                return size
    return None


def _is_2_4(matrix: Tensor) -> bool:
    """Whether at most 2 of every 4 inputs are not zero."""
    return matrix.shape[1] % 4 == 0 and int((matrix != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2


def _not_half(weight: Tensor) -> str:
    return "" if weight.dtype in _HALF else f"2:4 kernels take half precision, and the weight is {weight.dtype}"


def no_2_4(device: torch.device) -> str:
    """Why the device has no 2:4 kernel, or ""; on a GPU that should have one, it is tried.

    >>> no_2_4(torch.device("cpu"))
    '2:4 kernels need a CUDA GPU of compute capability 8.0 or newer, and the model is on cpu'
    """
    if device.type != "cuda":
        return f"2:4 kernels need a CUDA GPU of compute capability 8.0 or newer, and the model is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"2:4 kernels need compute capability 8.0 or newer, and {device} has {major}.{minor}"
    return _tried_2_4(device)


@cache
def _tried_2_4(device: torch.device) -> str:
    """ "" if a small product by the kernel is right, else why not."""
    weight = torch.tensor([1.0, 0, 0, 2], dtype=torch.float16, device=device).repeat(128, 32)
    x = torch.ones(64, 128, dtype=torch.float16, device=device)
    try:
        found = SemiStructuredLayer(weight, None)(x)
    except (RuntimeError, AttributeError, ImportError) as error:
        return f"the 2:4 kernel of {device} fails: {' '.join(str(error).split())}"
    return "" if torch.equal(found, F.linear(x, weight)) else f"the 2:4 kernel of {device} gives wrong results"
