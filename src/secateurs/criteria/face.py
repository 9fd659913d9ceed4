"""The face of the criteria: `score`, the same call for every criterion and every kind of group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import Loss, take
from ..core.depth import LayerGroup
from ..core.errors import ModelError, OptionError
from ..core.finite import all_finite
from ..core.units import Cache, ChannelGroup, Group, WeightGroup, marginals, normalized
from .lifting import Lift, lifted, resolve, select
from .registry import Criterion, criteria, get_criterion

__all__ = ["check_finite", "score"]

_LIFT = tuple(field.name for field in fields(Lift))
# Channels that some criteria are for alone.
_OWN_KINDS = ("expert", "embedding")


@torch.inference_mode(False)
def score(
    criterion: str | Criterion | Callable[..., Mapping[str, Tensor]],
    model: nn.Module,
    groups: Sequence[Group],
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """How much each unit matters: per group name float32 [size] on the CPU, higher = keep.

    The model is left exactly as it was: weights, buffers, gradients, hooks, `requires_grad` and training flags.

    Args:
        criterion: a registered name; a `Criterion`, such as `elementwise(f)` for `f(name, values) -> saliency`; or a
            function `(model, groups, *, data, loss, seed) -> {group name: scores}` that may leave out the keywords it
            does not want.
        model: where the groups' tensors live; on any device.
        groups: groups of channels, of layers and of weights, no two of the same name.
        data: batches (see `core.batch`), for criteria that need them; `synflow` looks at the shape of the first one.
        loss: `(output, target) -> scalar`; default: `core.batch.default_loss`.
        seed: for everything random; results do not depend on, and do not change, the global random state.
        **options: of the lifting (see `Lift`) and of the criterion (see its docstring).

    Raises:
        OptionError: an unknown criterion or option, or a criterion that makes no sense for a group.
        ModelError: NaN or infinite weights or scores, or a group that the criterion cannot score.
        DataError: no data, or no labels, where they are needed.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
    >>> score("magnitude", model, [WeightGroup("weight", (1, 2))])
    {'weight': tensor([3., 4.])}
    """
    chosen = _as_criterion(criterion)
    lift, own = _divide(chosen, options)
    _check_groups(chosen, groups)
    check_finite(model)
    supplied = {"data": _batches(chosen, data), "loss": loss, "seed": seed, **own}
    if chosen.kind == "elementwise":
        return _from_entries(chosen, model, groups, lift, supplied, own)
    found = chosen.evaluate(model, groups, supplied)
    return {group.name: _unit_scores(chosen, group, found, lift) for group in groups}


def _as_criterion(criterion: str | Criterion | Callable[..., Any]) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return get_criterion(criterion)
    if callable(criterion):
        return Criterion(getattr(criterion, "__name__", "function"), criterion, kind="unit", signed=True)
    raise OptionError(f"criterion must be a name, a Criterion or a function, got {type(criterion).__name__}.")


def _divide(criterion: Criterion, options: Mapping[str, Any]) -> tuple[Lift, dict[str, Any]]:
    """The options of the lifting and those of the criterion, or one error for all that are neither."""
    fixed = criterion.fixed if criterion.kind == "elementwise" else {*_LIFT} - {"normalize"}
    free = [name for name in _LIFT if name not in fixed]
    wrong = [name for name in options if name not in free and not criterion.accepts(name)]
    if wrong:
        allowed = ", ".join([*criterion.options, *free]) or "none"
        raise OptionError(f"criterion {criterion.name!r} has no option {', '.join(wrong)}; its options are {allowed}.")
    lift = replace(criterion.lift, **{name: options[name] for name in free if name in options})
    if criterion.signed and lift.normalize in ("sum", "mean", "max"):
        raise OptionError(
            f"scores of criterion {criterion.name!r} carry a sign, so their {lift.normalize} is no scale; "
            f"normalize must be none, minmax or gaussian."
        )
    return lift, {name: value for name, value in options.items() if name not in free}


def _check_groups(criterion: Criterion, groups: Sequence[Group]) -> None:
    if not groups:
        raise OptionError("there are no groups to score: the list is empty.")
    twice = [name for name, count in Counter(group.name for group in groups).items() if count > 1]
    if twice:
        raise OptionError(f"group names must differ, but {', '.join(map(repr, twice))} occur more than once.")
    for group in groups:
        kind = _kind_of(group)
        if not _scores(criterion, kind):
            others = ", ".join(c.name for c in criteria() if _scores(c, kind))
            raise OptionError(
                f"criterion {criterion.name!r} scores {' and '.join(criterion.groups)} groups, but {group.name!r} is a "
                f"{kind} group; for it use one of {others}."
            )


def _kind_of(group: Group) -> str:
    if isinstance(group, WeightGroup):
        return "weight"
    if isinstance(group, LayerGroup):
        return "layer"
    return group.kind if group.kind in _OWN_KINDS else "channel"


def _scores(criterion: Criterion, kind: str) -> bool:
    """Whether it makes sense for a kind of group; experts and rows of embeddings are channels, too."""
    return kind in criterion.groups or (kind in _OWN_KINDS and "channel" in criterion.groups)


def check_finite(model: nn.Module) -> None:
    """None for a model without NaN or infinite weights.

    Raises:
        ModelError: names the first such parameters.
    """
    wrong = [name for name, tensor in model.named_parameters() if _broken(tensor)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"NaN or infinite weights in {', '.join(wrong[:3])}{more}: repair or reload the model before pruning."
        )


def _broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor)


def _batches(criterion: Criterion, data: Iterable[Any] | None) -> list[Any] | None:
    if "inputs" in criterion.needs:
        return take(data, 1, "example inputs")
    if "data" in criterion.needs or (data is not None and criterion.accepts("data")):
        return take(data)
    return None


def _from_entries(
    criterion: Criterion,
    model: nn.Module,
    groups: Sequence[Group],
    lift: Lift,
    supplied: Mapping[str, Any],
    own: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Scores of an elementwise criterion: its saliencies, checked and lifted."""
    parts = [select(group, model, lift) for group in groups]
    parameters = resolve(model, dict.fromkeys(name for group in parts for name in group.tensors))
    finish = None if criterion.finish is None else partial(criterion.finish, **own)
    scores: dict[str, Tensor] = {}
    cache: Cache = {}
    saliency: dict[str, Tensor] = {}
    axes = _axes(parts)

    def note(name: str, values: Tensor) -> None:
        _check_saliency(criterion, name, values, parameters[name])
        rows = marginals(values, axes.get(name, ()), lift.reduce)
        cache.update({(name, axis, lift.reduce): along for axis, along in rows.items()})
        saliency.update({} if rows else {name: values})
        # A sum has no number where an entry has none, and is much shorter.
        _check_numbers(criterion, name, next(iter(rows.values())) if rows and lift.reduce != "max" else values)

    # Without data each tensor is for itself: its saliency is reduced and forgotten before that of the next is made.
    for names in [tuple(parameters)] if criterion.needs else [(name,) for name in parameters]:
        made = criterion.evaluate(model, names, supplied)
        while made:
            note(*made.popitem())
    for group in parts:
        found = lifted(group, saliency, lift, signed=criterion.signed, finish=finish, cache=cache)
        if found is None:
            raise ModelError(
                f"criterion {criterion.name!r} has no score for group {group.name!r}: none of its tensors "
                f"({', '.join(group.tensors)}) is the weight of a layer that it knows; use another criterion for it."
            )
        scores[group.name] = _finished(criterion, group, found)
    return scores


def _axes(groups: Sequence[Group]) -> dict[str, set[int]]:
    """Per tensor of channel groups the axes that carry them."""
    axes: dict[str, set[int]] = {}
    for member in (m for group in groups if isinstance(group, ChannelGroup) for m in group.members):
        axes.setdefault(member.tensor, set()).add(member.axis)
    return axes


def _check_saliency(criterion: Criterion, name: str, values: Tensor, parameter: Tensor) -> None:
    same_rank = values.dim() == parameter.dim()
    if not same_rank or any(a not in (b, 1) for a, b in zip(values.shape, parameter.shape, strict=True)):
        raise OptionError(
            f"criterion {criterion.name!r} returned shape {tuple(values.shape)} for {name!r} of shape "
            f"{tuple(parameter.shape)}: it must return one value per entry."
        )


def _check_numbers(criterion: Criterion, name: str, values: Tensor) -> None:
    if not all_finite(values):
        raise ModelError(
            f"criterion {criterion.name!r} gave NaN or infinite values for {name!r}: look at the loss and the data, "
            f"or run the model in float32."
        )


def _unit_scores(criterion: Criterion, group: Group, found: Mapping[str, Tensor], lift: Lift) -> Tensor:
    if group.name not in found:
        raise OptionError(f"criterion {criterion.name!r} returned no scores for group {group.name!r}.")
    return _finished(criterion, group, normalized(found[group.name], lift.normalize or "none"))


def _finished(criterion: Criterion, group: Group, scores: Tensor) -> Tensor:
    if scores.shape != (group.size,):
        raise OptionError(
            f"criterion {criterion.name!r} returned shape {tuple(scores.shape)} for group {group.name!r}, "
            f"which has {group.size} units: it must return one score per unit."
        )
    out = scores.detach().to("cpu", torch.float32)
    if not all_finite(out):
        raise ModelError(f"criterion {criterion.name!r} gave NaN or infinite scores for group {group.name!r}.")
    return out
