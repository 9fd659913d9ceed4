"""Bias compensation of a structured cut: the mean of what goes stays behind, in the biases of what consumed it.

An et al. 2024, arXiv 2312.11983 (FLAP). It needs one pass over calibration data, no gradients, and no inverse, and can
follow any plan over channels or heads: `prune(…, repair=partial(compensated, data=batches))`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import take
from ..core.errors import DataError, ModelError
from ..core.finite import all_finite
from ..graph.biases import bias_slots
from ..graph.plan import ModelPlan
from ..graph.structure import Structure
from ..graph.twin import shared_twin, twin
from ..recover.trainable import create_biases
from ..solvers import Gram, compensation, grams_of, to_matrix
from ..solvers.gram import TRANSPOSED
from ..solvers.layerwise import seen_of
from .repair import consumed

__all__ = ["compensated"]


def compensated(model: nn.Module, decided: ModelPlan, data: Iterable[Any]) -> nn.Module:
    """A copy of `model` in which each layer that consumes what the plan removes has its mean in its bias.

    Means are those of the unpruned model's activations. A layer without a bias gets one, of zeros before; where the
    config of a Hugging Face model can only say that of several layers together (`attention_bias` of q, k, v and o), the
    others get zeros too, so that a cut to equal widths still goes through `save_pretrained`. `decided.cut(copy)` cuts
    it; a bias that was created adds its entries to what the plan's costs say. A layer that the data never reaches stays
    as it is, with a warning.

    Args:
        model: for which the plan was made; untouched.
        decided: a plan over channels or heads.
        data: calibration batches, gone through once; "attention_mask" tells padding, which does not count.

    Raises:
        DataError: there is no batch, or activations are not finite.
        OptionError: a plan over single weights or whole layers.
        ModelError: a layer that consumes what goes can have no bias that stands for it.
    """
    batches = take(data)
    stays = consumed(model, decided)
    paths = {tensor: tensor.rpartition(".")[0] for tensor in stays}
    missing = [path for path in paths.values() if _checked(model, decided, path).bias is None]
    grams, _ = grams_of(shared_twin(model), batches, list(paths.values()), full=False, seen=seen_of(batches))
    made = twin(model, {})
    create_biases(made, bias_slots(model, missing) if missing and _alike(decided) else missing)
    with torch.no_grad():
        for tensor, path in paths.items():
            module = made.get_submodule(path)
            bias = module.get_parameter("bias")
            bias.add_(_compensation(path, module, stays[tensor], grams[path]).to(bias))
    return made


def _alike(decided: ModelPlan) -> bool:
    """Whether all groups of one kind and size keep as many units, so that the numbers of one config may say it."""
    counts = decided.counts
    widths = {(g.kind, g.size, counts[g.name]) for g in decided.groups}
    return len(widths) == len({(kind, size) for kind, size, _ in widths})


def _compensation(path: str, module: nn.Module, stays: Tensor, gram: Gram) -> Tensor:
    weight = module.get_parameter("weight").detach()
    if not gram.count:
        warnings.warn(f"{path} saw no token of the calibration data and stays as it is.", stacklevel=3)
        return weight.new_zeros(())
    goes = ~to_matrix(module, stays.to(weight.device).expand(weight.shape))
    found = compensation(to_matrix(module, weight), gram.mean.to(weight.device), goes)
    if not all_finite(found):
        raise DataError(
            f"the inputs of {path} are NaN or infinite on the calibration data: look at the data, or run the model in "
            "float32 or bfloat16."
        )
    return found


def _checked(model: nn.Module, decided: ModelPlan, path: str) -> nn.Module:
    """The layer at `path`, which can have a bias that stands for some of its inputs."""
    module, structure = model.get_submodule(path), decided.structure
    recorded = structure.recorded if isinstance(structure, Structure) else {}
    if isinstance(module, TRANSPOSED):
        reason = "its patches overlap, so that the mean of its outputs is not the same everywhere"
    elif module.bias is None and any(path == r or path.startswith(f"{r}.") or not r for r in recorded):
        reason = "the cut replaces its code by a recording, which knows no bias there"
    else:
        return module
    raise ModelError(
        f"{path} consumes what goes and cannot be compensated: {reason}; leave it out with ignore={path!r}."
    )
