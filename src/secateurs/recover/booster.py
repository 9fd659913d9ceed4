"""SLoRB, a sparse low-rank booster: beside a pruned matrix, a thin one that sees the sums of runs of inputs.

    y = (W ⊙ M)·x + S·(P·x) + b,     P [inputs / k, inputs]: ones where row r meets the inputs r·k … r·k + k - 1

Huang et al. (AST), arXiv 2407.20584. S [outputs, inputs / k] starts as the mean, zeros included, of what the mask took
from each run of k weights: no other S is nearer to W ⊙ (1 - M), and where the inputs of each run are equal the branch
gives back what the mask took. S then trains; P may. It goes with any mask, trained or not:

    made = sec.prune(model, inputs, "2:4", method="wanda", data=data)
    boost(made.model, model, made.masks)

A boosted layer keeps its object, its names and its class's manners: only its class is exchanged, for one that adds the
branch, the submodule `booster`. So it saves and loads as any model (`Pruned.save`); Hugging Face's `save_pretrained`
writes the branch too, but its `from_pretrained` leaves it out. Not an adapter (`recover.adapters`): those hang on
hooks, which a file cannot hold, and would multiply by P, where the sums of runs take one addition an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ModelError, OptionError, unknown_name
from ..solvers.blocks import weight_of
from ..solvers.gram import from_matrix, is_hf_conv1d, to_matrix

__all__ = ["STARTS", "BoostedLinear", "Booster", "Conv1D", "Start", "block_start", "boost", "boosters_of", "fold"]

Start = Literal["mean", "sum"]
STARTS: tuple[Start, ...] = get_args(Start)


class Booster(nn.Module):
    """The branch S·(P·x) of one layer; `boost` makes it.

    Attributes:
        run: k, inputs that are summed.
        up: S [outputs, inputs / k], trained.
        down: P [inputs / k, inputs], trained; None where it stays what it is, a sum.
    """

    down: nn.Parameter | None

    def __init__(self, up: Tensor, run: int, *, train_projection: bool = False) -> None:
        super().__init__()
        self.run = run
        self.up = nn.Parameter(up)
        self.register_parameter("down", nn.Parameter(_sums(up, run)) if train_projection else None)

    @property
    def product(self) -> Tensor:
        """S·P, [outputs, inputs]; differentiable."""
        return self.up.repeat_interleave(self.run, 1) if self.down is None else self.up @ self.down

    def forward(self, given: Tensor) -> Tensor:
        """What is added to the layer's output for the input `given`, in the dtype of S."""
        wide = given.to(self.up.dtype)
        seen = wide.unflatten(-1, (-1, self.run)).sum(-1) if self.down is None else F.linear(wide, self.down)
        added: Tensor = F.linear(seen, self.up)
        return added

    def extra_repr(self) -> str:
        """k and the rank, for printing."""
        return f"run={self.run}, rank={self.up.shape[1]}"


class BoostedLinear(nn.Linear):
    """A Linear with a booster; `boost` makes it."""

    booster: Booster

    def forward(self, given: Tensor) -> Tensor:
        """W·x + b and the booster's part."""
        return _with_branch(F.linear(given, self.weight, self.bias), self.booster(given))


class Conv1D(nn.Module):
    """Hugging Face's linear layer, weight [inputs, outputs], with a booster; the library knows such by their name."""

    weight: nn.Parameter
    bias: nn.Parameter
    booster: Booster

    def forward(self, given: Tensor) -> Tensor:
        """x·W + b and the booster's part."""
        return _with_branch(F.linear(given, self.weight.T, self.bias), self.booster(given))


def block_start(lost: Tensor, run: int = 16, start: Start = "mean") -> Tensor:
    """The first S: [outputs, inputs / run], in the dtype of `lost`, summed in float64.

    Args:
        lost: [outputs, inputs], the weights that the mask took, zero elsewhere.
        run: k (16, the paper's command); it must divide the inputs.
        start: "mean" over each run, zeros included (the paper), or "sum", an option of its code, which is k times too
            large for the least error.

    Raises:
        OptionError: `run` does not divide the inputs, or an unknown start.

    >>> block_start(torch.tensor([[2.0, 0.0, 0.0, 4.0]]), run=2).tolist()
    [[1.0, 2.0]]
    """
    if start not in STARTS:
        raise unknown_name("start of a booster", start, STARTS)
    if run < 1 or lost.shape[1] % run:
        raise OptionError(f"a booster over runs of {run} needs inputs that {run} divides, got {lost.shape[1]}.")
    runs = lost.double().unflatten(1, (-1, run))
    made: Tensor = runs.mean(-1) if start == "mean" else runs.sum(-1)
    return made.to(lost.dtype)


@torch.no_grad()
def boost(
    model: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    run: int = 16,
    start: Start = "mean",
    train_projection: bool = False,
) -> dict[str, Booster]:
    """The boosters, by layer, that pruned layers of `model` carry from now on, as trainable parameters.

    Args:
        model: pruned; changed in place. Linear layers and Hugging Face's `Conv1D`s are boosted, others are left alone.
        dense: the same before pruning; not changed.
        masks: what stays, by name of the weight; `Pruned.masks`.
        run, start: see `block_start`.
        train_projection: P trains too, and is then stored: as many numbers again as a square layer's S.

    Raises:
        OptionError: `run` does not divide the inputs of a layer; the first is named.
        ModelError: no masked layer can carry a booster, or one has one already. Nothing was changed.
    """
    made: dict[str, tuple[nn.Module, Booster]] = {}
    for key, mask in masks.items():
        name = key.rpartition(".")[0]
        layer = model.get_submodule(name)
        if name in boosters_of(model):
            raise ModelError(f"{name} has a booster already, which must be folded first.")
        if not key.endswith("weight") or not (type(layer) is nn.Linear or is_hf_conv1d(layer)):
            continue
        made[name] = layer, Booster(_start(key, layer, dense, mask, run, start), run, train_projection=train_projection)
    if not made:
        raise ModelError(f"no pruned layer of {type(model).__name__} is a Linear or a Conv1D, which carry boosters.")
    for layer, booster in made.values():
        layer.add_module("booster", booster.train(layer.training))
        # The class and not the object: parents, optimizers and hooks know the object, and names stay true.
        layer.__class__ = BoostedLinear if type(layer) is nn.Linear else Conv1D
    return {name: booster for name, (_, booster) in made.items()}


def boosters_of(model: nn.Module) -> dict[str, Booster]:
    """The boosters that layers of `model` carry, by the qualified name of the layer."""
    return {n: m.booster for n, m in model.named_modules() if isinstance(m, BoostedLinear | Conv1D)}


@torch.no_grad()
def fold(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the layers whose boosters are gone: W becomes W + (S·P) ⊙ M, exactly zero where M is.

    This changes the function by what S·P is where M removes, and leaves ordinary layers.

    Args:
        model: changed in place.
        masks: what stays, by name of the weight; a layer without one takes all of S·P.
    """
    found = boosters_of(model)
    for name, booster in found.items():
        layer = model.get_submodule(name)
        weight = cast(nn.Parameter, layer.weight)
        added = from_matrix(layer, booster.product[None], weight.shape)
        kept = masks.get(weight_of(name))
        summed = (weight.to(added.dtype) + added).to(weight.dtype)
        weight.copy_(summed if kept is None else torch.where(kept.to(weight.device), summed, 0))
        del layer._modules["booster"]
        layer.__class__ = nn.Linear if isinstance(layer, BoostedLinear) else _hf_conv1d()
    return tuple(found)


def _with_branch(made: Tensor, added: Tensor) -> Tensor:
    return made + added.to(made.dtype)


def _start(key: str, layer: nn.Module, dense: nn.Module, mask: Tensor, run: int, start: Start) -> Tensor:
    weight = dense.get_parameter(key).detach()
    lost = to_matrix(layer, weight.masked_fill(mask.to(weight.device), 0))[0]
    if run < 1 or lost.shape[1] % run:
        raise OptionError(
            f"a booster over runs of {run} needs inputs that {run} divides; {key} has {lost.shape[1]}: choose another."
        )
    return block_start(lost.to(torch.promote_types(weight.dtype, torch.float32)), run, start)


def _sums(up: Tensor, run: int) -> Tensor:
    """P: [blocks, inputs]."""
    return torch.eye(up.shape[1], dtype=up.dtype, device=up.device).repeat_interleave(run, 1)


def _hf_conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D as plain

    return cast("type[nn.Module]", plain)
