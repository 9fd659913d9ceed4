"""Layer kinds, in one place: where a weight keeps its outputs, and what a criterion sees of input and output.

Known are `Linear`, `Conv1d/2d/3d`, `Embedding`, `ConvTranspose1d/2d/3d` without groups (outputs only) and the `Conv1D`
of Hugging Face, a linear layer whose weight is [in, out].
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn

from ..core.batch import double
from ..solvers.gram import CONVOLUTIONS, TRANSPOSED, is_hf_conv1d, padded
from .lifting import owner

__all__ = ["column_energy", "layers", "out_axis", "output_rows", "sees_input"]


def layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of known kind whose weights are called `names`: parameter name -> module, others left out."""
    found = {name: owner(model, name) for name in names if name.endswith("weight")}
    return {name: module for name, module in found.items() if out_axis(module) is not None}


def out_axis(module: nn.Module) -> int | None:
    """The axis of the module's weight that runs over its outputs; None for an unknown kind."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return 0
    if isinstance(module, nn.Embedding) or is_hf_conv1d(module):
        return 1
    return 1 if isinstance(module, TRANSPOSED) and module.groups == 1 else None


def sees_input(module: nn.Module) -> bool:
    """Whether `column_energy` is defined for the module."""
    return isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)) or is_hf_conv1d(module)


def output_rows(module: nn.Module, output: Tensor) -> Tensor:
    """The module's output as [observations, outputs]: batch, time and pixels are observations alike."""
    spatial = len(module.kernel_size) if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    channels_last = output.movedim(-1 - spatial, -1)
    return channels_last.reshape(-1, channels_last.shape[-1])


def column_energy(module: nn.Module, given: Tensor) -> Tensor:
    """The sum of squares, over all tokens or pixels, of the input that each weight multiplies: float64.

    Broadcasts to the weight: [1, in] for Linear, [in, 1] for Hugging Face's Conv1D, [out or 1, in / groups, …kernel]
    for convolutions, [rows, 1] for Embedding, whose input is a one-hot vector, so that the sum is a count.
    """
    if isinstance(module, nn.Embedding):
        return double(torch.bincount(given.flatten(), minlength=module.num_embeddings))[:, None]
    if isinstance(module, CONVOLUTIONS):
        return _patch_energy(module, given)
    energy = double(given).square().flatten(0, -2).sum(0) if given.dim() > 1 else double(given).square()
    return energy[:, None] if is_hf_conv1d(module) else energy[None, :]


def _patch_energy(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: Tensor) -> Tensor:
    """Column energies of the unfolded input, summed per kernel offset without unfolding."""
    image = double(padded(module, given)).square().sum(0)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    columns = []
    for offset in product(*map(range, module.kernel_size)):
        seen = image
        for axis, (o, d, r, s) in enumerate(zip(offset, module.dilation, reach, module.stride, strict=True), 1):
            seen = seen.narrow(axis, o * d, image.shape[axis] - r + 1)[(slice(None),) * axis + (slice(None, None, s),)]
        columns.append(seen.flatten(1).sum(1))
    grouped = torch.stack(columns, 1).view(module.groups, -1, *module.kernel_size)
    return grouped.repeat_interleave(module.out_channels // module.groups, 0) if module.groups > 1 else grouped
