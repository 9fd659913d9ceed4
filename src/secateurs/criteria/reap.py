"""Experts: what each adds to the tokens that a router sends to it, and how many those are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from posixpath import commonpath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..core.batch import call, device_of, double, leaves, move, split
from ..core.errors import ModelError
from ..core.experts import ExpertGroup
from ..core.units import ChannelGroup, Member
from .gated import Watched, watch
from .preserve import preserved
from .registry import criterion

__all__ = ["expert_frequency", "reap"]


@criterion(
    "reap",
    kind="unit",
    groups=("expert",),
    needs=("data",),
    paper="Lasby et al. 2025, arXiv 2510.13999, router-weighted expert activation pruning",
)
def reap(
    model: nn.Module, groups: Sequence[ChannelGroup | ExpertGroup], *, data: Sequence[Any], seed: int
) -> dict[str, Tensor]:
    """The mean, over the tokens that are sent to an expert, of gate weight times the L2 norm of its output.

    An expert that no token is sent to has 0. Where a unit is one expert of each group of a router, theirs are summed.
    Scores of different layers are on scales of their own: the paper prunes all layers alike (allocation "uniform").

    Args:
        model: whose experts are called as transformers does: one module that holds the matrices of all experts of a
            layer [experts, …] is given the tokens [tokens, …] and, both [tokens, k], the experts of each token and
            their weights. It runs once more for each of the k, on that alone. Or each expert is a module, and what it
            returns is multiplied with one weight a token.
        groups: of granularity "expert".
        data: batches; padding counts as any token does, so leave it out.
        seed: see `preserved`.

    Raises:
        ModelError: the experts of a group are called in another way, or not at all.
    """

    def mean(seen: _Seen | Watched) -> Tensor:
        if isinstance(seen, Watched) and not all(seen.weighed or [False]):
            raise ModelError(_unseen(groups[0].name, "what they return is not multiplied with one weight a token"))
        return seen.added / seen.tokens.clamp(min=1)

    return _scored(model, groups, data, seed, mean)


@criterion(
    "expert-frequency", kind="unit", groups=("expert",), needs=("data",), paper="the baseline of arXiv 2510.13999"
)
def expert_frequency(
    model: nn.Module, groups: Sequence[ChannelGroup | ExpertGroup], *, data: Sequence[Any], seed: int
) -> dict[str, Tensor]:
    """The share of tokens that are sent to an expert.

    Args:
        model, groups, data, seed: see `reap`.
    """
    return _scored(model, groups, data, seed, lambda seen: seen.tokens / max(seen.total, 1))


@dataclass
class _Seen:
    """Of each expert the tokens sent to it, and what it added to them: float64 [experts]; `total` counts all tokens."""

    tokens: Tensor
    added: Tensor
    total: int = 0


@dataclass(frozen=True)
class _Routed:
    """One call of the module that holds the experts: the tokens, and [tokens, k] the experts and weights of each."""

    given: Any
    experts: Tensor
    weights: Tensor

    def slot(self, number: int) -> Any:
        """The arguments with only one of the k experts of each token."""
        one = {id(t): t[:, number : number + 1] for t in (self.experts, self.weights)}
        return tree_map_only(Tensor, lambda t: one.get(id(t), t), self.given)


def _scored(
    model: nn.Module,
    groups: Sequence[ChannelGroup | ExpertGroup],
    data: Sequence[Any],
    seed: int,
    score: Callable[[_Seen | Watched], Tensor],
) -> dict[str, Tensor]:
    apart = [group for group in groups if isinstance(group, ExpertGroup)]
    for group in apart:
        if not group.blocks:
            raise ModelError(_unseen(group.name, "they are no modules, and given to none together"))
    watched = watch(model, apart, data, seed) if apart else {}
    return {name: score(each) for name, each in watched.items()} | _scored_together(
        model, [group for group in groups if isinstance(group, ChannelGroup)], data, seed, score
    )


def _scored_together(
    model: nn.Module, groups: Sequence[ChannelGroup], data: Sequence[Any], seed: int, score: Callable[[_Seen], Tensor]
) -> dict[str, Tensor]:
    seen = _observed(model, {group.name: _holder(group) for group in groups}, data, seed) if groups else {}
    scores: dict[str, Tensor] = {}
    for group in groups:
        units = group.units_along(_matrices(group)[0])
        each = score(seen[group.name])[units >= 0].cpu()
        scores[group.name] = each.new_zeros(group.size).index_add_(0, units[units >= 0], each)
    return scores


def _matrices(group: ChannelGroup) -> list[Member]:
    """The axes of tensors that hold a matrix of each expert."""
    return [member for member in group.members if member.rank == 3 and member.axis == 0]


def _holder(group: ChannelGroup) -> str:
    """The path of the module that holds the matrices of all experts."""
    owners = [member.tensor.rpartition(".")[0] for member in _matrices(group)]
    if not owners:
        raise ModelError(_unseen(group.name, "no tensor [experts, …, …] belongs to them"))
    return commonpath([owner.replace(".", "/") for owner in owners]).replace("/", ".")


def _observed(model: nn.Module, holders: Mapping[str, str], data: Sequence[Any], seed: int) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def visitor(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def visit(module: nn.Module, args: Any, kwargs: Any) -> None:
            routed = _routed(name, args, kwargs)
            count = next(p.shape[0] for p in module.parameters() if p.dim() == 3)
            zeros = torch.zeros(count, dtype=torch.float64, device=routed.experts.device)
            _add(seen.setdefault(name, _Seen(zeros, zeros.clone())), module, routed)

        return visit

    with preserved(model, seed=seed), torch.no_grad(), ExitStack() as hooks:
        for name, path in holders.items():
            handle = model.get_submodule(path).register_forward_pre_hook(visitor(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in data:
            call(model, move(split(batch)[0], device_of(model)))
    for name in holders:
        if name not in seen:
            raise ModelError(_unseen(name, f"{holders[name]} is never called on this data"))
    return seen


def _add(seen: _Seen, module: nn.Module, routed: _Routed) -> None:
    seen.total += len(routed.experts)
    for number in range(routed.experts.shape[1]):
        args, kwargs = routed.slot(number)
        # Not the module itself, whose hooks would count this as another call.
        made = next(leaves(module.forward(*args, **kwargs)))
        norms = double(made.reshape(len(routed.experts), -1)).norm(dim=1)
        chosen = routed.experts[:, number].long()
        seen.added.index_add_(0, chosen, norms.to(seen.added))
        seen.tokens.index_add_(0, chosen, torch.ones_like(norms, dtype=torch.float64))


def _routed(name: str, args: Any, kwargs: Any) -> _Routed:
    tensors = list(leaves((args, kwargs)))
    floats = [t for t in tensors if t.is_floating_point()]
    experts = next((t for t in tensors if t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    weights = [t for t in floats if experts is not None and t.shape == experts.shape]
    if experts is None or not weights or len(floats) < 2:
        raise ModelError(_unseen(name, "they are not given, for each token, its experts and their weights"))
    # Tokens come before the weights, whose shape they may have.
    return _Routed((args, kwargs), experts, weights[-1])


def _unseen(name: str, why: str) -> str:
    return (
        f"what the experts of {name!r} add cannot be seen: {why}; use a criterion that looks at weights only, such as "
        "magnitude, or leave them out with ignore=."
    )
