"""Activation criteria: what layers see and make on calibration data. They need data but no labels.

Every token and every pixel is an observation, but for tokens that an "attention_mask" leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import OptionError
from ..core.moments import Moments
from ..solvers.gram import from_matrix, to_matrix
from ..solvers.layerwise import seen_of
from ..solvers.scores import relative_importance
from ..solvers.sequential import grams_of
from ..solvers.stacks import input_axis, is_stack, parts_of, stack_at
from .evidence import Visitor, observe, values
from .layers import column_energy, layers, out_axis, output_rows, sees_input
from .lifting import Lift, owner, resolve
from .preserve import preserved
from .registry import criterion

__all__ = ["activation_norm", "activation_variance", "input_norms", "output_moments", "ria", "wanda"]

# Outputs belong to the axis that makes them, so which members and tensors count is no option.
_PRODUCERS: dict[str, Any] = {
    "groups": ("channel",),
    "lift": Lift(members="out"),
    "fixed": ("members", "tensors"),
    "needs": ("data",),
}


@criterion("wanda", needs=("data",), paper="Sun et al. 2024, arXiv 2306.11695, equation 1")
def wanda(model: nn.Module, names: Sequence[str], *, data: Sequence[Any], seed: int) -> dict[str, Tensor]:
    """|w_ij|·||x_j||_2, with x_j the input feature that the weight multiplies, over all tokens of the data.

    Defined for weights of Linear, Conv1d/2d/3d (a feature is a channel at a kernel offset, as in the unfolded input),
    Embedding (x is one-hot), Hugging Face's Conv1D and stacked experts (x is what is routed to the expert). Tensors of
    other layers in a channel group do not count. The paper compares within each output row; that is a matter of
    selection.

    Args:
        model, names, data, seed: see `input_norms`.
    """
    norms = input_norms(model, names, data, seed=seed)
    return {n: w.abs() * norms[n].to(w) for n, w in values(model, tuple(norms)).items()}


@criterion("ria", needs=("data",), paper="Zhang et al. 2024, ICLR, Plug-and-Play, equation 4")
def ria(
    model: nn.Module, names: Sequence[str], *, power: float = 0.5, data: Sequence[Any], seed: int
) -> dict[str, Tensor]:
    """(|w_ij|/Σ_i|w_ij| + |w_ij|/Σ_j|w_ij|)·||x_j||_2^power: the share of a weight in its column and in its row.

    No channel is then lost as a whole because all its weights are small. Layers as for `wanda`; each group of a
    convolution is a matrix of its own.

    Args:
        model, names, data, seed: see `input_norms`.
        power: of the norm of the input, a; 0.5 as in the paper. 0 is the relative importance alone.

    Raises:
        OptionError: a negative power.
    """
    if not 0 <= power < float("inf"):
        raise OptionError(f"power must be at least 0, got {power}.")
    norms = input_norms(model, names, data, seed=seed)
    found = values(model, tuple(norms))
    return {n: _relative(model, n, w) * norms[n].pow(power).to(w) for n, w in found.items()}


@criterion("activation-norm", finish=torch.sqrt, paper="cf. Hu et al. 2016, arXiv 1607.03250", **_PRODUCERS)
def activation_norm(model: nn.Module, names: Sequence[str], *, data: Sequence[Any], seed: int) -> dict[str, Tensor]:
    """The root mean square of a unit's output, before any norm or nonlinearity; over its positions the root of the sum.

    The layers that make the unit count (Linear, Conv, ConvTranspose without groups, Embedding, Hugging Face's Conv1D).

    Args:
        model, names, data, seed: see `output_moments`.
    """
    moments = output_moments(model, names, data, seed=seed)
    return {n: _along_outputs(model, n, m.mean_square) for n, m in moments.items()}


@criterion("activation-variance", paper="cf. An et al. 2024, arXiv 2312.11983", **_PRODUCERS)
def activation_variance(model: nn.Module, names: Sequence[str], *, data: Sequence[Any], seed: int) -> dict[str, Tensor]:
    """The variance of a unit's output over observations, summed over its positions: what a constant cannot replace.

    Args:
        model, names, data, seed: see `output_moments`; layers as for `activation_norm`.
    """
    moments = output_moments(model, names, data, seed=seed)
    return {n: _along_outputs(model, n, m.variance) for n, m in moments.items()}


def input_norms(model: nn.Module, names: Sequence[str], data: Sequence[Any], *, seed: int = 0) -> dict[str, Tensor]:
    """||x_j||_2 for each weight of the layers named: parameter name -> float64, broadcastable to the parameter.

    Args:
        model: any model that calls its layers.
        names: parameters; those that are no weight of a known layer (see `layers`) and no experts are left out.
        data: batches.
        seed: see `preserved`.
    """
    known = {n: module for n, module in layers(model, names).items() if sees_input(module)}
    others = {n: stack_at(model, n) for n in names if n not in known}
    stacks = [n for n, parameter in others.items() if parameter is not None and is_stack(parameter)]
    energies: dict[str, Tensor] = {}

    def visitor(name: str) -> Visitor:
        def visit(module: nn.Module, given: Tensor, made: Tensor) -> None:
            energy = column_energy(module, given)
            energies[name] = energies[name] + energy if name in energies else energy

        return visit

    observe(model, data, {_module(n): visitor(n) for n in known}, seed=seed)
    return {n: energies[n].sqrt() for n in known} | _norms_of_experts(model, stacks, data, seed)


def output_moments(model: nn.Module, names: Sequence[str], data: Sequence[Any], *, seed: int = 0) -> dict[str, Moments]:
    """Count, mean and variance of each output position of the layers named: parameter name -> moments [outputs].

    Args:
        model, names, data, seed: see `input_norms`.
    """
    known = layers(model, names)
    moments: dict[str, Moments] = {}

    def visitor(name: str) -> Visitor:
        def visit(module: nn.Module, given: Tensor, made: Tensor) -> None:
            found = Moments.of(output_rows(module, made))
            moments[name] = moments[name].merge(found) if name in moments else found

        return visit

    observe(model, data, {_module(n): visitor(n) for n in known}, seed=seed)
    return {n: moments[n] for n in known}


def _norms_of_experts(model: nn.Module, stacks: Sequence[str], data: Sequence[Any], seed: int) -> dict[str, Tensor]:
    """||x_j||_2 over what each expert is given, 0 for one that is given nothing; stacks without a known product go."""
    if not stacks:
        return {}
    with preserved(model, seed=seed):
        grams, _ = grams_of(model, data, stacks, full=False, seen=seen_of(data))
    found: dict[str, Tensor] = {}
    for name in stacks:
        parts = [(grams[part], module) for part, module in parts_of(model, name).items()]
        if any(gram.count for gram, _ in parts):
            rows = [
                gram.norm[0] * gram.count**0.5 if gram.count else module.weight.new_zeros(module.in_features).double()
                for gram, module in parts
                if isinstance(module, nn.Linear)
            ]
            found[name] = torch.stack(rows).unsqueeze(3 - input_axis(model, name))
    return found


def _relative(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Each magnitude as a share of its column's sum plus a share of its row's, in the weight's shape; 0 for 0."""
    module = owner(model, name)
    if out_axis(module) is None:
        turned = input_axis(model, name) == 1
        made = _shares_of(weight.mT if turned else weight)
        return (made.mT if turned else made).to(weight)
    return from_matrix(module, _shares_of(to_matrix(module, weight)), weight.shape).to(weight)


def _shares_of(matrices: Tensor) -> Tensor:
    return torch.stack([relative_importance(part, torch.ones(part.shape[1]), power=0) for part in matrices])


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _along_outputs(model: nn.Module, name: str, outputs: Tensor) -> Tensor:
    """`outputs` [outputs] along the weight's output axis, of size one along its other axes."""
    rank = resolve(model, [name])[name].dim()
    return outputs.view([-1 if i == out_axis(owner(model, name)) else 1 for i in range(rank)])
