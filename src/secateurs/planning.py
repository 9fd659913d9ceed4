"""From a model and a budget to a plan: find the units, score them, decide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import length_hint
from typing import Any

from torch import Tensor, nn

from .core.allocate import get_allocation
from .core.batch import Loss, check_batches, take
from .core.budget import Budget
from .core.cost import CostModel, Monomial
from .core.dims import Atom
from .core.errors import BudgetError, ModelError, OptionError, unknown_name
from .core.ids import recoded
from .core.plan import Recipe, decide
from .core.scope import in_scope, listed
from .core.select import staying_first, top
from .core.units import Group, WeightGroup
from .core.wrapped import unwrapped
from .criteria import get_criterion, score
from .graph.cut import AnyStructure, cut
from .graph.depth.infer import infer_layers
from .graph.depth.layers import LayerStructure
from .graph.infer import infer
from .graph.mixtures.cut import ExpertStructure
from .graph.mixtures.infer import infer_experts
from .graph.plan import ModelPlan, digest
from .graph.structure import Structure, fingerprint
from .measure.latency import latency
from .measure.macs import macs_by_module
from .measure.params import bytes_in_memory, parameters
from .recover.context import seeded
from .train.scope import divided_weights, input_axes, prunable_weights

__all__ = ["GRANULARITIES", "Granularity", "batches_of", "in_scope", "plan", "plan_of_masks", "recipe_of", "timer"]

GRANULARITIES = (
    "channel", "head", "head-size", "width", "expert", "embedding", "layer", "weight", "block:ROWSxCOLUMNS",
)  # fmt: skip
# What others call them.
_OTHER_WORDS = {
    "filter": "channel", "neuron": "channel", "structured": "channel", "unstructured": "weight", "element": "weight",
    "depth": "layer",
}  # fmt: skip
_BLOCK = re.compile(r"block:(\d+)x(\d+)")
# A group that keeps less than this share of its units is warned about, before anything is trained.
_FEW = 0.05


@dataclass(frozen=True)
class Granularity:
    """What a unit is.

    Args:
        kinds: kinds of coupled groups (see `graph.infer.KINDS`), or "layer"; empty for entries of weights.
        entangled: whether widths go whose removal differs from zeroing; see `graph.infer.infer`.
        block: rows and columns of a block of entries.
    """

    kinds: tuple[str, ...] = ()
    entangled: bool | None = None
    block: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """The granularity that `text` names.

        Raises:
            OptionError: `text` is none of `GRANULARITIES`.
        """
        if text == "channel":
            return cls(kinds=("channel", "head"))
        if text == "width":
            return cls(kinds=("channel", "head"), entangled=True)
        if text in ("head", "head-size"):
            # The size of a head is in the scale of its products, so its removal is seldom neutral.
            return cls(kinds=(text,), entangled=text == "head-size")
        if text in ("expert", "embedding"):
            # A softmax runs over them, a router's or that of an output layer: to remove one is not to zero it.
            return cls(kinds=(text,), entangled=True)
        if text == "layer":
            return cls(kinds=("layer",))
        if text == "weight":
            return cls()
        if match := _BLOCK.fullmatch(text):
            return cls(block=(int(match[1]), int(match[2])))
        if text in _OTHER_WORDS:
            raise OptionError(f"unknown granularity {text!r}; here it is called {_OTHER_WORDS[text]!r}.")
        raise unknown_name("granularity", text, GRANULARITIES)


def plan(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    criterion: str | Callable[..., Any] | None = None,
    criterion_options: Mapping[str, Any] | None = None,
    allocation: str = "global",
    allocation_options: Mapping[str, Any] | None = None,
    granularity: str | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    floor: int | float | None = None,
    round_to: int = 1,
    seed: int = 0,
    keep_ids: Sequence[int] = (),
    unknown: int | None = None,
) -> ModelPlan:
    """What of `model` goes so that `budget` is met; nothing is changed.

    Args:
        model: any module whose forward runs on the example inputs; of a wrapped one (see `prune`) the module inside.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        budget: as "macs<=50%", "sparsity=90%", "2:4", "latency<=3ms", or several joined with ",".
        data: batches, for criteria that look at activations or gradients; others do not read it.
        loss: `(output, target) -> scalar` for gradients; by default the output's own loss, or cross-entropy.
        criterion, criterion_options: how units are scored; see `secateurs.criteria`. Default "magnitude"; for rows of
            embeddings, where there is data, "token-frequency".
        allocation, allocation_options: how much goes from where; see `secateurs.core.allocate`.
        granularity: "channel" (the default: widths and attention heads whose removal equals zeroing, and where those
            are less than two fifths of the parameters all widths), "head", "head-size", "width" (also those that a
            normalisation runs over, such as the hidden size of a transformer), "expert" (of a mixture of experts, as if
            the router had never known those that go), "embedding" (rows of tables that inputs are looked up in, such as
            the tokens of a vocabulary; ids get new numbers, see `ModelPlan.recode`, and those in the example inputs
            stay), "layer" (whole blocks through which a residual stream goes),
            "weight" (the default for N:M), or "block:4x1".
        scope, ignore: patterns of names of layers or parameters to prune, or to leave alone.
        floor: fewest units that stay in a group: a count, or a share. Default 10% of the channels of a group; one
            entry of a weight; no layer, but for one where nothing else is in its container.
        round_to: kept widths are multiples of this number, those of attention in channels, not in heads.
        seed: of everything random.
        keep_ids: of rows of embeddings, ids that stay, such as a tokenizer's `all_special_ids`; those in the example
            inputs, and those that the model or its config holds, do anyway.
        unknown: of rows of embeddings, the id that stands for those that were removed where data has them; it stays.
            Default: none, and data that holds such an id is refused.

    Raises:
        BudgetError: the budget cannot be read or met; the message has the nearest that can.
        ModelError: the model does not run on the inputs, has NaN weights, or nothing in it can go.
        DataError: the criterion needs data, and it is missing or empty.
        OptionError: an unknown name, or a combination that makes no sense.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> plan(net, torch.ones(1, 8), "macs<=50%").counts
    {'0': 8}
    """
    recipe = recipe_of(
        budget,
        criterion=criterion,
        criterion_options=criterion_options,
        allocation=allocation,
        allocation_options=allocation_options,
        granularity=granularity,
        scope=scope,
        ignore=ignore,
        floor=floor,
        round_to=round_to,
        seed=seed,
        keep_ids=keep_ids,
        unknown=unknown,
        data=data,
    )
    model = unwrapped(model)
    unit = Granularity.parse(recipe.granularity)
    _check_combination(unit, recipe)
    batches = batches_of(data)
    structure, groups, costs = _units(model, example_inputs, unit, recipe)
    scored = recipe.criterion if criterion is None else criterion
    # A shuffling loader takes its order from the global random state.
    with seeded(seed, "scoring"):
        scores = score(
            scored, model, groups, data=_scoring_data(scored, batches, example_inputs), loss=loss, seed=seed,
            **(criterion_options or {}),
        )  # fmt: skip
    scores = {g.name: staying_first(scores[g.name], getattr(g, "stays", ())) for g in groups}
    keep = decide(groups, scores, costs, recipe, timer(model, structure, scores, example_inputs))
    return ModelPlan(
        groups=groups,
        scores=scores,
        keep=keep,
        costs=costs,
        recipe=recipe,
        fingerprint=fingerprint(model),
        digest=digest(model),
        structure=structure,
        example_inputs=example_inputs,
    )


def plan_of_masks(model: nn.Module, example_inputs: Any, masks: Mapping[str, Tensor], recipe: Recipe) -> ModelPlan:
    """The plan that masks found in training amount to; scores are the magnitudes of the weights that are left.

    Args:
        model: with the masks applied.
        masks: bool, by name and in the shape of each weight.
        recipe: what was asked; its granularity says what a unit is.
    """
    block = Granularity.parse(recipe.granularity).block
    groups = _grouped(model, {name: tuple(mask.shape) for name, mask in masks.items()}, block)
    return ModelPlan(
        groups=groups,
        scores=score("magnitude", model, groups),
        keep={g.name: g.lift({g.name: masks[g.name].cpu().float()}, "max")[g.name] > 0 for g in groups},
        costs=_weight_costs(model, example_inputs, groups),
        recipe=recipe,
        fingerprint=fingerprint(model),
        digest=digest(model),
        example_inputs=example_inputs,
    )


def recipe_of(
    budget: str | Budget,
    *,
    criterion: str | Callable[..., Any] | None = None,
    criterion_options: Mapping[str, Any] | None = None,
    allocation: str = "global",
    allocation_options: Mapping[str, Any] | None = None,
    granularity: str | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    floor: int | float | None = None,
    round_to: int = 1,
    seed: int = 0,
    keep_ids: Sequence[int] = (),
    unknown: int | None = None,
    data: Any = None,
    **_others: Any,
) -> Recipe:
    """The recipe that `plan` follows for these arguments, with every default filled in; data and loss are not in it."""
    asked = Budget.parse(budget)
    granularity = granularity or ("weight" if asked.pattern else "channel")
    if criterion is None:
        criterion = "token-frequency" if granularity == "embedding" and data is not None else "magnitude"
    return Recipe(
        budget=asked,
        criterion=criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "function"),
        criterion_options=dict(criterion_options or {}),
        allocation=allocation,
        allocation_options=dict(allocation_options or {}),
        granularity=granularity,
        scope=None if scope is None else listed(scope),
        ignore=listed(ignore),
        floor=_floor_of(Granularity.parse(granularity)) if floor is None else floor,
        round_to=round_to,
        seed=seed,
        keep_ids=tuple(sorted(keep_ids)),
        unknown=unknown,
    )


def _floor_of(unit: Granularity) -> int | float:
    if unit.kinds == ("layer",):
        return 0
    return 0.1 if unit.kinds and unit.kinds != ("embedding",) else 1


def batches_of(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """`data` as something to go through any number of times; read here only if it is an iterator.

    Raises:
        DataError: it is empty, or holds no batches.
    """
    check_batches(data)
    if isinstance(data, Iterator) or (data is not None and length_hint(data, 1) == 0):
        return take(data)
    return data


def timer(
    model: nn.Module, structure: AnyStructure | None, scores: Mapping[str, Tensor], example_inputs: Any
) -> Callable[[Mapping[str, int]], float] | None:
    """A function from kept counts to the measured median seconds of the model cut to them; None if nothing is cut."""
    if structure is None:
        return None

    def seconds(counts: Mapping[str, int]) -> float:
        keep = {name: top(scores[name], count) for name, count in counts.items()}
        ids = structure.kept_ids(keep) if isinstance(structure, Structure) else {}
        return latency(cut(model, structure, keep), recoded(example_inputs, ids)).median

    return seconds


def _check_combination(unit: Granularity, recipe: Recipe) -> None:
    budget = recipe.budget
    if unit.kinds and get_allocation(recipe.allocation).needs_shapes:
        raise OptionError(
            f"allocation {recipe.allocation!r} weighs the shapes of weight tensors, and a {recipe.granularity} spans "
            "several; use uniform, global or given."
        )
    if budget.limit("tokens"):
        raise BudgetError("a budget of tokens is met by token pruning, not by removing weights or channels.")
    timed = [str(limit) for limit in budget.limits if limit.metric in ("latency", "speedup")]
    if timed and not unit.kinds:
        raise BudgetError(
            f"{', '.join(timed)} cannot be met with {recipe.granularity} units: zeros in a dense tensor cost as much "
            "time as other numbers; use granularity='channel'."
        )


def _scoring_data(criterion: str | Callable[..., Any], batches: Iterable[Any] | None, example_inputs: Any) -> Any:
    """A criterion that only looks at the shape of a batch is given the example inputs."""
    if batches is not None or not isinstance(criterion, str):
        return batches
    return [(example_inputs, None)] if get_criterion(criterion).data_free else None


def _units(
    model: nn.Module, example_inputs: Any, unit: Granularity, recipe: Recipe
) -> tuple[AnyStructure | None, tuple[Group, ...], CostModel]:
    if not unit.kinds:
        groups = _weight_groups(model, unit, recipe)
        return None, groups, _weight_costs(model, example_inputs, groups)
    if unit.kinds == ("layer",):
        layers = _layers(model, example_inputs, recipe)
        return layers, layers.groups, layers.costs
    structure = infer(model, example_inputs, kinds=unit.kinds, entangled=unit.entangled)
    if unit.kinds == ("expert",) and not structure.groups:
        experts = _experts(model, example_inputs, recipe, structure)
        return experts, experts.groups, experts.costs
    if recipe.scope is not None or recipe.ignore:
        present = [name for name, _ in model.named_parameters()]
        chosen = in_scope(structure.groups, recipe.scope, recipe.ignore, present)
        structure = structure.restricted(group.name for group in chosen)
    structure = structure.with_staying(recipe.ids_that_stay)
    if not structure.groups:
        none = (
            "its layers are quantized; prune first, then quantize" if _quantized(model) else "no layer has a free width"
        )
        reasons = "; ".join(dict.fromkeys(_reasons(structure, unit))) or none
        raise ModelError(f"nothing to prune in {type(model).__name__} at this granularity: {reasons}.")
    return structure, structure.groups, structure.costs


def _quantized(model: nn.Module) -> bool:
    return any(".quantized." in type(module).__module__ for module in model.modules())


def _reasons(structure: Structure, unit: Granularity) -> list[str]:
    """The first three reasons for which widths stay; of experts and ids, those for which they do."""
    reasons = [frozen.reason for frozen in structure.frozen]
    if unit.kinds == ("embedding",):
        about = [reason for reason in reasons if any(word in reason for word in ("look", " ids", "vocabulary"))]
        return about[:3] or ["no integers among its inputs are looked up in a table"]
    if unit.kinds != ("expert",):
        return reasons[:3]
    looked_up = [reason for reason in reasons if "positions" in reason]
    return looked_up[:2] or ["nothing is chosen along an axis of its parameters"]


def _experts(model: nn.Module, example_inputs: Any, recipe: Recipe, followed: Structure) -> ExpertStructure:
    """The experts that can go where nothing `followed` op by op can, within the recipe's scope.

    Raises:
        OptionError: a pattern matches nothing.
        ModelError: there is none.
    """
    experts = infer_experts(model, example_inputs, lambda m: sum(macs_by_module(m, example_inputs).values()))
    if experts.groups and (recipe.scope is not None or recipe.ignore):
        present = [name for name, _ in model.named_parameters()]
        chosen = in_scope(experts.groups, recipe.scope, recipe.ignore, present)
        experts = experts.restricted(group.name for group in chosen)
    if not experts.groups:
        known = [f"{frozen.tensor} stays, {frozen.reason}" for frozen in experts.frozen]
        reasons = "; ".join(known[:3] or _reasons(followed, Granularity.parse("expert")))
        raise ModelError(f"nothing to prune in {type(model).__name__} at this granularity: {reasons}.")
    return experts


def _layers(model: nn.Module, example_inputs: Any, recipe: Recipe) -> LayerStructure:
    """The layers that can go, within the recipe's scope.

    Raises:
        OptionError: a pattern matches nothing.
        ModelError: there is none.
    """
    layers = infer_layers(model, example_inputs, macs_by_module(model, example_inputs))
    blocks = [block for group in layers.groups for block in group.blocks]

    def hit(block: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, p) for p in patterns for name in (block, block.rpartition(".")[0]))

    for pattern in (*(recipe.scope or ()), *recipe.ignore):
        if not any(hit(block, [pattern]) for block in blocks):
            raise unknown_name("pattern", pattern, blocks)
    scoped = [b for b in blocks if recipe.scope is None or hit(b, recipe.scope)]
    layers = layers.restricted([b for b in scoped if not hit(b, recipe.ignore)])
    if not layers.groups:
        reasons = "; ".join(f"{f.tensor} stays, {f.reason}" for f in layers.frozen[:3])
        raise ModelError(
            f"no layer of {type(model).__name__} can go as a whole: "
            f"{reasons or 'no module of a list or sequence passes its input on with something added to it'}."
        )
    return layers


def _weight_groups(model: nn.Module, unit: Granularity, recipe: Recipe) -> tuple[WeightGroup, ...]:
    weights = prunable_weights(model, recipe.scope, recipe.ignore)
    pattern = recipe.budget.pattern
    if pattern is not None:
        axes = input_axes(model, weights)
        named = recipe.scope is not None
        weights = divided_weights(weights, pattern.of, str(pattern), all_of_them=named, axes=axes)
    return _grouped(model, {name: tuple(w.shape) for name, w in weights.items()}, unit.block)


def _grouped(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], block: tuple[int, int]
) -> tuple[WeightGroup, ...]:
    axes = input_axes(model, shapes)
    return tuple(WeightGroup(name, shape, block, axes[name]) for name, shape in shapes.items())


def _weight_costs(model: nn.Module, example_inputs: Any, groups: Sequence[WeightGroup]) -> CostModel:
    """Costs with zeros not counted: what sparse hardware would do. Bytes do not change, a zero is stored too."""
    macs = macs_by_module(model, example_inputs)
    params: list[Monomial] = [Monomial(parameters(model) - sum(g.entries for g in groups), (), "the rest")]
    work: list[Monomial] = []
    for group in groups:
        units = Atom(group.name, group.size)
        layer = group.name.rpartition(".")[0]
        params.append(Monomial(group.entries / group.size, (units,), group.name))
        work.append(Monomial(macs.pop(layer, 0.0) / group.size, (units,), layer))
    work.append(Monomial(sum(macs.values()), (), "the rest"))
    return CostModel(
        {"params": tuple(params), "macs": tuple(work), "bytes": (Monomial(bytes_in_memory(model), (), "the model"),)}
    )
