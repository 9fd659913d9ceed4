"""Layers as matrices: the weight as rows that multiply columns of inputs, and the second moments of those inputs.

Known are Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d without groups, and the `Conv1D` of Hugging Face. A convolution's
columns are the positions of its patches (channel, then kernel offset); each of its groups is a matrix of its own.
The products of a transposed convolution are added up where its patches overlap, so that its columns are independent
of one another only where they do not: what is best for the products is then close to best for the sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.batch import double
from ..core.errors import DataError, ModelError
from ..core.moments import Moments
from .triangle import mirror, strips

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED",
    "Gram",
    "from_matrix",
    "is_hf_conv1d",
    "matrix_shape",
    "padded",
    "solvable",
    "to_matrix",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Numbers of unfolded input that are held at a time: 64 MiB in float64.
_CHUNK = 2**23


class Gram:
    """The second moments of the inputs of one layer, with their means and variances, gathered call by call.

    Args:
        full: whether products of different inputs are gathered, for `hessian`; without them memory is a row a layer.
        dtype: of the products, float64 or float32; their sum, means and variances are float64.

    >>> gram = Gram()
    >>> gram.add(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.hessian.tolist()
    [[[10.0, 2.0], [2.0, 4.0]]]
    """

    def __init__(self, *, full: bool = True, dtype: torch.dtype = torch.float64) -> None:
        self.full = full
        self._dtype = dtype
        self.moments: Moments | None = None
        self._shape: tuple[int, int] = (0, 0)
        self._hessian: Tensor | None = None
        # Whether what is below the diagonals is filled in.
        self._whole = True

    @property
    def count(self) -> int:
        """Observations so far."""
        return 0 if self.moments is None else self.moments.count

    def add(self, module: nn.Module, given: Tensor) -> None:
        """Adds one call of `module` with the input `given`; every token and every pixel is an observation."""
        for columns in _columns(module, given):
            self._shape = (columns.shape[0], columns.shape[2])
            found = Moments.of(columns.transpose(0, 1).flatten(1))
            self.moments = found if self.moments is None else self.moments.merge(found)
            if self.full:
                self._add_products(columns.to(self._dtype))

    def replace(self, moments: Moments, hessian: Tensor | None, shape: tuple[int, int]) -> None:
        """None; the gram holds what several processes found together.

        Args:
            moments: over all groups and columns, in one row.
            hessian: [groups, columns, columns]; None without products.
            shape: groups and columns.
        """
        self.moments, self._hessian, self._shape, self._whole = moments, hessian, shape, True

    def _add_products(self, columns: Tensor) -> None:
        groups, seen, width = columns.shape
        if self._hessian is None:
            self._hessian = columns.new_zeros(groups, width, width, dtype=torch.float64)
        # Kept as the mean that is asked for, so that nobody holds a scaled copy of the largest tensor there is.
        total = max(self.count, 1)
        # The products of a strip of rows with those from it on; what is below the diagonal is above it, too.
        for a, b in strips(width):
            products = columns[:, :, a:b].mT @ columns[:, :, a:]
            self._hessian[:, a:b, a:].mul_((self.count - seen) / total).add_(products, alpha=2 / total)
        self._whole = False

    @property
    def hessian(self) -> Tensor:
        """H = (2/S)·Σ x·xᵀ over S observations, of half the mean squared error: float64 [groups, columns, columns].

        Symmetric to the bit, and not a copy: who works in it leaves it as it was.

        Raises:
            DataError: there was no observation.
        """
        if self._hessian is None or not self.count:
            raise DataError("a layer saw no observation on the calibration data: give more batches.")
        if not self._whole:
            mirror(self._hessian)
            self._whole = True
        return self._hessian

    @property
    def mean(self) -> Tensor:
        """The mean of each input: float64 [groups, columns]."""
        return self._known.mean.view(self._shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each input: float64 [groups, columns]."""
        return self._known.variance.view(self._shape)

    @property
    def norm(self) -> Tensor:
        """The root of the mean square of each input: float64 [groups, columns]; a factor never changes a ranking."""
        return self._known.mean_square.sqrt().view(self._shape)

    @property
    def _known(self) -> Moments:
        if self.moments is None or not self.count:
            raise DataError("a layer saw no observation on the calibration data: give more batches.")
        return self.moments


def solvable(module: nn.Module) -> bool:
    """Whether the module is of a known kind."""
    if isinstance(module, TRANSPOSED):
        return module.groups == 1
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_hf_conv1d(module)


def to_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, in the shape of the module's, as [groups, rows, columns]; a column is what one input multiplies."""
    if isinstance(module, CONVOLUTIONS):
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1)
    if isinstance(module, TRANSPOSED) or is_hf_conv1d(module):
        return weight.flatten(1).T[None]
    return weight[None]


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Groups and columns of the module's weight as `to_matrix` gives it."""
    groups, _, columns = to_matrix(module, module.get_parameter("weight")).shape
    return groups, columns


def from_matrix(module: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_matrix`: a weight of the given shape."""
    turned = isinstance(module, TRANSPOSED) or is_hf_conv1d(module)
    return (matrix[0].T if turned else matrix).reshape(shape)


def padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: Tensor) -> Tensor:
    """The input of a convolution as a batch, with the padding that the module gives it."""
    batched = given if given.dim() == len(module.kernel_size) + 2 else given[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(batched, _padding(module), mode=mode)


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether the module is Hugging Face's linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _columns(module: nn.Module, given: Tensor) -> Iterator[Tensor]:
    """What the weight multiplies, in pieces: float64 [groups, observations, columns]."""
    if not solvable(module):
        raise ModelError(f"the inputs of a {type(module).__name__} are no columns of a matrix.")
    if isinstance(module, CONVOLUTIONS):
        yield from _patches(module, given)
        return
    rows = given
    if isinstance(module, TRANSPOSED):
        rows = given.movedim(-1 - len(module.kernel_size), -1)
    rows = rows.reshape(-1, rows.shape[-1])
    for piece in rows.split(max(_CHUNK // rows.shape[1], 1)):
        yield double(piece)[None]


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: Tensor) -> Iterator[Tensor]:
    views = padded(module, given)
    sides = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    for axis, (kernel, stride, dilation) in enumerate(sides, 2):
        views = views.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    spatial = range(2, 2 + len(sides))
    # [images, channels, *outputs, *kernel] to [images, *outputs, channels, *kernel].
    views = views.permute(0, *spatial, 1, *range(2 + len(sides), views.dim()))
    width = math.prod(views.shape[1 + len(sides) :])
    per_image = max(math.prod(views.shape[1:]), 1)
    for piece in views.split(max(_CHUNK // per_image, 1)):
        yield double(piece).reshape(-1, module.groups, width // module.groups).transpose(0, 1)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding before and after each spatial axis, last axis first, as `F.pad` wants it."""
    if module.padding == "valid":
        sides: Sequence[tuple[int, int]] = [(0, 0)] * len(module.kernel_size)
    elif module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(t // 2, math.ceil(t / 2)) for t in total]
    else:
        sides = [(int(p), int(p)) for p in module.padding]
    return [side for pair in reversed(sides) for side in pair]
