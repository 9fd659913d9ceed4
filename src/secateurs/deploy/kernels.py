"""Products with a weight full of zeros, and the layers made of them, out of PyTorch's own kernels.

Every product here takes columns: `weight [out, in] @ columns [in, n]`, with the n columns side by side in memory. So
the inner loop of a sparse kernel runs over the samples, which lie next to each other, and not over the few weights of
a row, which do not: `F.linear` with a CSR weight has it the other way round and loses to the dense layer from a batch
of some 32 on. 32-bit indices are what MKL reads; others are converted at every call.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..solvers.gram import is_hf_conv1d

__all__ = [
    "BagProduct",
    "BsrProduct",
    "CsrProduct",
    "MapLayer",
    "Product",
    "RowsLayer",
    "SemiStructuredLayer",
    "ShrunkConv",
    "ShrunkLinear",
    "as_matrix",
]


class Product(Protocol):
    """A weight [out, in] that multiplies columns [in, n], contiguous, and returns [out, n], contiguous.

    `chunk` is about how many columns it is given at a time. So many inputs and outputs stay in a core's second cache;
    with all at once, they are fetched from memory again for each weight, which takes two to three times as long.
    """

    chunk: int

    def __call__(self, columns: Tensor) -> Tensor: ...


class _Compressed(nn.Module):
    """A product whose weight is one CSR or BSR tensor."""

    weight: Tensor
    chunk = 64

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compressed:
        # PyTorch copies no tensor of this layout deeply.
        made = type(self).__new__(type(self))
        _Compressed.__init__(made, self.weight.clone())
        return made.train(self.training)


class CsrProduct(_Compressed):
    """The product of a CSR matrix (MKL): any zeros. A single column is taken as a vector, which is faster still."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(_narrow(weight))

    def forward(self, columns: Tensor) -> Tensor:
        if columns.shape[1] == 1:
            return torch.mv(self.weight, columns[:, 0]).unsqueeze(1)
        return torch.mm(self.weight, columns)


class BsrProduct(_Compressed):
    """The product of a matrix of dense square blocks (MKL has no others)."""

    def __init__(self, weight: Tensor, block: int) -> None:
        super().__init__(_narrow(weight, block))

    def forward(self, columns: Tensor) -> Tensor:
        return torch.mm(self.weight, columns)


class BagProduct(nn.Module):
    """The product as a weighted sum of rows of the columns' matrix: an embedding bag, whose kernel FBGEMM compiles.

    Each output is one bag; the columns' matrix is the embedding, its rows are fetched ahead. At least one weight.
    """

    # Measured best among 32, 64, 128 and 256, as 64 is for the two others.
    chunk = 128
    rows: Tensor
    ends: Tensor
    values: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        sparse = _narrow(weight)
        for name, part in (
            ("ends", sparse.crow_indices()),
            ("rows", sparse.col_indices()),
            ("values", sparse.values()),
        ):
            self.register_buffer(name, part.clone(), persistent=False)

    def forward(self, columns: Tensor) -> Tensor:
        return F.embedding_bag(
            self.rows, columns, self.ends, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )


def _narrow(weight: Tensor, block: int | None = None) -> Tensor:
    """The matrix as CSR or, with a block size, BSR, with 32-bit indices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|BSR) tensor support is in beta")
        sparse = weight.to_sparse_csr() if block is None else weight.to_sparse_bsr((block, block))
        crow, cols = sparse.crow_indices().int(), sparse.col_indices().int()
        return torch.sparse_compressed_tensor(
            crow, cols, sparse.values(), sparse.shape, layout=sparse.layout, check_invariants=False
        )


class _ByProduct(nn.Module):
    """A layer whose outputs are columns of a `Product` and the bias [out], if it is not None."""

    bias: Tensor | None

    def __init__(self, product: Product, bias: Tensor | None) -> None:
        super().__init__()
        self.product = product
        self.register_buffer("bias", None if bias is None else bias[:, None], persistent=False)

    def outputs(self, columns: Tensor) -> Tensor:
        """[out, n], column by column in memory, of inputs [in, n]."""
        found = self.product(columns.contiguous())
        # Here, while they are in the cache.
        return found if self.bias is None else found.add_(self.bias)


class RowsLayer(_ByProduct):
    """A linear layer on inputs [..., in] by a `Product`.

    Args:
        product: of the weight.
        bias: [out], or None.

    `by_columns` says whether outputs [..., out] may lie in memory column by column, as the product makes them: a
    `RowsLayer` that takes them next, behind elementwise ops, needs no transposition then.
    """

    def __init__(self, product: Product, bias: Tensor | None) -> None:
        super().__init__(product, bias)
        self.by_columns = False

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, x.shape[-1]).t()
        pieces = _pieces(columns.shape[1], self.product.chunk)
        found = self._whole(columns) if len(pieces) == 1 else self._joined(columns, pieces)
        return found if x.dim() == 2 else found.reshape(*x.shape[:-1], found.shape[1])

    def _whole(self, columns: Tensor) -> Tensor:
        """The outputs [n, out]."""
        found = self.outputs(columns).t()
        return found if self.by_columns else found.contiguous()

    def _joined(self, columns: Tensor, pieces: list[slice]) -> Tensor:
        """The outputs [n, out], computed piece by piece."""
        part = self.outputs(columns[:, pieces[0]])
        sizes = (part.shape[0], columns.shape[1])
        found = part.new_empty(sizes).t() if self.by_columns else part.new_empty(sizes[::-1])
        found[pieces[0]] = part.t()
        for at in pieces[1:]:
            found[at] = self.outputs(columns[:, at]).t()
        return found


class MapLayer(_ByProduct):
    """A convolution without groups on inputs [..., channels, height, width] by a `Product`, sample by sample.

    A kernel of 1×1 multiplies the maps as they lie; for larger ones each place's neighbourhood is copied first.

    Args:
        product: of the weight as [out, in × kernel].
        conv: the layer, of which sizes are read.
        bias: [out], or None.
    """

    def __init__(self, product: Product, conv: nn.Conv2d, bias: Tensor | None) -> None:
        super().__init__(product, bias)
        self.geometry = {name: getattr(conv, name) for name in ("kernel_size", "dilation", "padding", "stride")}
        self.pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0)
        self.channels = conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        maps = x if x.dim() == 4 else x[None]
        height, width = self._sizes(*maps.shape[-2:])
        found = maps.new_empty(len(maps), self.channels, height * width)
        for sample, columns in zip(found, self._columns(maps), strict=True):
            for at in _pieces(columns.shape[1], self.product.chunk):
                sample[:, at] = self.outputs(columns[:, at])
        return found.view(*x.shape[:-3], self.channels, height, width)

    def _columns(self, maps: Tensor) -> Tensor:
        """[samples, in × kernel, places]."""
        if self.pointwise:
            down, along = self.geometry["stride"]
            return maps[:, :, ::down, ::along].flatten(2)
        return F.unfold(maps, **self.geometry)

    def _sizes(self, *sizes: int) -> list[int]:
        """Height and width of the outputs."""
        parts = zip(sizes, *(self.geometry[n] for n in ("kernel_size", "dilation", "padding", "stride")), strict=True)
        return [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, gap, pad, step in parts]


def _pieces(places: int, size: int) -> list[slice]:
    """Pieces of equal length, or nearly, and of about `size`: never one place left over for a piece of its own.

    >>> _pieces(65, 64), _pieces(100, 64)
    ([slice(0, 65, None)], [slice(0, 50, None), slice(50, 100, None)])
    """
    length = max(1, -(-places // max(1, round(places / size))))
    return [slice(start, min(start + length, places)) for start in range(0, max(1, places), length)]


class ShrunkLinear(nn.Module):
    """A linear layer without the inputs and outputs whose weights are all zero; such outputs are the bias, or 0.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """

    weight: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    bias: Tensor | None
    fill: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in _shrunk(weight, bias).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.inputs is None else x.index_select(-1, self.inputs)
        found = F.linear(kept, self.weight, self.bias)
        if self.outputs is None or self.fill is None:
            return found
        return self.fill.expand(*x.shape[:-1], -1).clone().index_copy_(-1, self.outputs, found)


class ShrunkConv(nn.Module):
    """A convolution without groups and without the input and output channels whose weights are all zero.

    Args:
        conv: the layer.
    """

    weight: Tensor
    inputs: Tensor | None
    outputs: Tensor | None
    bias: Tensor | None
    fill: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        bias = None if conv.bias is None else conv.bias.detach()
        for name, tensor in _shrunk(conv.weight.detach(), bias).items():
            self.register_buffer(name, tensor, persistent=False)
        self.geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation")}

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.inputs is None else x.index_select(-3, self.inputs)
        found = F.conv2d(kept, self.weight, self.bias, **self.geometry)
        if self.outputs is None or self.fill is None:
            return found
        whole = self.fill[:, None, None].expand(*x.shape[:-3], -1, *found.shape[-2:]).clone()
        return whole.index_copy_(-3, self.outputs, found)


def _shrunk(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
    """The smaller weight and bias, the places that stay (None: all) and what removed outputs hold (None: none is).

    One input and one output stay of a weight that is all zero: products of no size are no pleasure to any kernel.
    """
    used = weight != 0
    outputs, inputs = (_places(used.transpose(0, axis).flatten(1).any(1)) for axis in (0, 1))
    small = weight if outputs is None else weight.index_select(0, outputs)
    fill = None
    if outputs is not None:
        fill = weight.new_zeros(len(weight)) if bias is None else bias
        bias = None if bias is None else bias.index_select(0, outputs)
    small = small if inputs is None else small.index_select(1, inputs)
    return {"weight": small.contiguous(), "inputs": inputs, "outputs": outputs, "bias": bias, "fill": fill}


def _places(used: Tensor) -> Tensor | None:
    if bool(used.all()):
        return None
    return used.nonzero()[:, 0] if bool(used.any()) else torch.zeros(1, dtype=torch.long, device=used.device)


class SemiStructuredLayer(nn.Module):
    """A linear layer whose weight [out, in] keeps 2 of every 4 inputs, by the GPU's kernel for that pattern.

    Args:
        weight: half precision, on a GPU that has the kernel.
        bias: [out], or None.

    Raises:
        RuntimeError: the sizes are none that the kernel takes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.sparse.to_sparse_semi_structured(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return found.reshape(*x.shape[:-1], found.shape[1])


def as_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or a convolution as [out, in × kernel], of Hugging Face's Conv1D transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach()
    return matrix.t().contiguous() if is_hf_conv1d(layer) else matrix.flatten(1)
