"""The closed-form repair of a structured cut: every layer that consumes what goes makes up for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dims import kept
from ..core.errors import ModelError, OptionError
from ..criteria.lifting import owner
from ..graph.plan import ModelPlan
from ..graph.structure import Structure
from ..graph.twin import attention_swaps, swap_attention, twin
from ..solvers import Gram, from_matrix, remove_columns, solvable, solve_in_order, to_matrix, weight_of

__all__ = ["consumed", "repaired"]


def repaired(model: nn.Module, decided: ModelPlan, data: Iterable[Any], *, damping: float = 0.01) -> nn.Module:
    """A copy of `model` in which the layers that consume what the plan removes do without it as well as they can.

    One after the other in the order of the forward pass, each is solved for the inputs that the repaired ones before it
    give (`solvers.remove_columns`). The columns that go are exact zeros, so the copy computes what the cut will compute
    before anything is cut; `decided.cut(copy)` cuts it.

    Args:
        model: for which the plan was made; untouched.
        decided: a plan over channels or heads.
        data: calibration batches, gone through once for each level of consumers; labels are not needed.
        damping: see `solvers.inverse`.

    Raises:
        DataError: there is no batch.
        OptionError: a plan over single weights or whole layers.
        ModelError: a layer cannot be repaired, is never called, or its hessian cannot be inverted.
    """
    stays = consumed(model, decided)
    work = twin(model, {})
    # PyTorch's own attention multiplies by its projection without calling it; its equal here calls it.
    swap_attention(work, attention_swaps(work))

    def solve(name: str, module: nn.Module, gram: Gram) -> None:
        weight = module.get_parameter("weight").detach()
        inputs = stays[weight_of(name)].to(weight.device).expand(weight.shape)
        goes = ~to_matrix(module, inputs)[:, 0]
        parts = zip(to_matrix(module, weight), gram.hessian, goes, strict=True)
        made = [remove_columns(w, h, s, share=damping, where=name) for w, h, s in parts]
        weight.copy_(from_matrix(module, torch.stack(made), weight.shape))

    solve_in_order(work, data, [tensor.rpartition(".")[0] for tensor in stays], solve)
    return twin(model, {tensor: work.get_parameter(tensor).detach() for tensor in stays})


def consumed(model: nn.Module, decided: ModelPlan) -> dict[str, Tensor]:
    """Per tensor that consumes what goes, the bool mask of the inputs that stay, broadcastable to its shape.

    Raises:
        OptionError: a plan over single weights or whole layers.
        ModelError: a tensor of another layer than a linear one or a convolution, or one that several layers share.
    """
    decided.check(model)
    structure = decided.structure
    if not isinstance(structure, Structure):
        removed = "single weights" if structure is None else "whole layers"
        raise OptionError(f"what is repaired are the consumers of removed channels; this plan removes {removed}.")
    found: dict[str, Tensor] = {}
    for member in (m for group in structure.groups for m in group.members if m.role == "in"):
        inputs = kept(structure.tensors[member.tensor][member.axis], decided.keep)
        if not bool(inputs.all()):
            found[member.tensor] = inputs.view([-1 if axis == member.axis else 1 for axis in range(member.rank)])
    for tensor in found:
        _check_repairable(model, tensor)
    return found


def _check_repairable(model: nn.Module, tensor: str) -> None:
    module, parameter = owner(model, tensor), model.get_parameter(tensor)
    other = [
        n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and owner(model, n) is not module
    ]
    if tensor.rpartition(".")[2] != "weight" or not solvable(module):
        reason = f"it belongs to a {type(module).__name__}, which is no linear layer or convolution"
    elif other:
        reason = f"{other[0]} is the same tensor"
    else:
        return
    raise ModelError(
        f"{tensor} consumes what goes and cannot be repaired: {reason}; leave it out with ignore={tensor!r}, or cut "
        "without repair."
    )
