"""LoRAPrune: heads and channels go while LoRA tunes, ranked by what adapters and their gradients say of the weights.

Zhang et al., "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", Findings of ACL 2024,
arXiv 2305.18403. Unit: attention heads (query groups where keys are shared) and inner channels of the feed-forward
layers, cut out in the end. When: during training, of adapters alone: no weight of the model has a gradient. How:

    1. adapters  LoRA on every linear layer of a block that carries units: W + s·B·A
    2. score     Ĝ = gB·A + B·gA - gB·gA in place of the gradient of W, I = |Ĝ ⊙ (W + s·B·A)|; sums over each unit, the
                 rows of the matrices that make it and the columns of those that consume it, divided by the L2 norm of
                 all units in that matrix, and added up over matrices
    3. average   S ← 0.9·S + 0.1·scores before each optimizer step; left out where a score is not finite
    4. remove    every 10 steps, each group's units of least S, on the cubic curve between the first and the last tenth
                 of the training
    5. finish    adapters are merged, what went is cut out, and the cut is proven

`criterion="grad"` has the weights' own gradients in place of Ĝ and "magnitude" ones: the comparisons of the paper. With
any, units go by one rule: `train.GradualUnits`. Any linear layers do, not only those of a language model; heads or
channels of a layer take part if all matrices that carry them are linear layers of one block.

Defaults. Rank 8, alpha 16, dropout 0.05, gradients clipped to norm 1, and the numbers above are the scripts'; their
training is `FineTune(epochs=2, lr=1e-4, optimizer="adamw", weight_decay=0)` with batches of 128. Units are not taken
from the first tenth of the blocks, rounded down, and from the last one, whose adapters train all the same: "sparsity=
50%" is of the units of the blocks between, "params<=50%" of the whole model. A model without a list of blocks has none
that are left out. "uniform" takes the same share of every group, as the paper; another allocation has its shares from S
at the first removal.

Not as in the code. It stops short of its target: it prunes only while s(t) is less than that, so 1,000 steps end at
0.499999 and take 15 of 32 heads; here the last step of the curve is one of removal, and takes 16. There a group whose S
is 0 may return; here none does. It masks outputs; here all that a unit owns is zero at once, also columns, biases and
norms, so that the trained model is the cut one, whatever lies between two layers. The matrix of a fused projection is
one matrix for the norms. A ramp shorter than the steps between removals is refused, where the code prunes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ...core.allocate import get_allocation
from ...core.batch import Loss
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import ModelError, OptionError
from ...core.plan import decide
from ...core.schedule import Cubic
from ...core.units import Cache, ChannelGroup, marginals
from ...criteria.low_rank import guided_gradient, importance, unit_scores
from ...graph.infer import infer
from ...graph.plan import ModelPlan, digest
from ...graph.structure import Structure, fingerprint
from ...in_training import Session, prune_by_training
from ...planning import in_scope, recipe_of
from ...pruning import FineTune, Pruned
from ...recover.adapters import Adapter, Adapters, adaptable, attach
from ...recover.trainable import is_tied, only_trained
from ...solvers import blocks_of, from_matrix, to_matrix, weight_of
from ...train.gradual_units import GradualUnits
from ..offered import offered
from ..parameters import Between, OneOf, Registered, check
from ._adapted import with_adapters

__all__ = ["METHOD", "Guide", "LoraPrune", "loraprune"]

Criterion = Literal["lora", "grad", "magnitude"]
Units = Literal["heads and channels", "channels", "heads"]
_KINDS: dict[str, tuple[str, ...]] = {
    "heads and channels": ("channel", "head"),
    "channels": ("channel",),
    "heads": ("head",),
}


@dataclass(frozen=True)
class LoraPrune:
    """Hyperparameters.

    Args:
        criterion: "lora" (default), "grad", which makes gradients of the frozen weights, or "magnitude".
        units: "heads and channels" (default), "channels" or "heads".
        rank: of the adapters (8).
        alpha: their scale is alpha / rank (16).
        dropout: of their inputs (0.05).
        decay: of the average of scores (0.9).
        every: optimizer steps from one removal to the next (10).
        warmup, cooldown: shares of the training before the first removal and after the last (0.1 each).
        skip_first: share of the blocks, from the first, of which nothing goes (0.1, rounded down).
        skip_last: blocks at the end of which nothing goes (1).
        clip_norm: largest norm of all gradients (1).
        allocation: how much goes of each group ("uniform").
    """

    criterion: Annotated[Criterion, OneOf(get_args(Criterion))] = "lora"
    units: Annotated[Units, OneOf(get_args(Units))] = "heads and channels"
    rank: Annotated[int, Between(1, whole=True)] = 8
    alpha: Annotated[float, Between(0, closed="neither")] = 16.0
    dropout: Annotated[float, Between(0, 1)] = 0.05
    decay: Annotated[float, Between(0, 1)] = 0.9
    every: Annotated[int, Between(1, whole=True)] = 10
    warmup: Annotated[float, Between(0, 1)] = 0.1
    cooldown: Annotated[float, Between(0, 1)] = 0.1
    skip_first: Annotated[float, Between(0, 1)] = 0.1
    skip_last: Annotated[int, Between(0, whole=True)] = 1
    clip_norm: Annotated[float, Between(0, closed="neither")] = 1.0
    allocation: Annotated[str, Registered(get_allocation)] = "uniform"

    def __post_init__(self) -> None:
        check(self)
        faults = []
        if self.warmup + self.cooldown >= 1:
            faults.append(f"warmup and cooldown must leave time between, got {self.warmup} and {self.cooldown}")
        if get_allocation(self.allocation).needs_shapes:
            faults.append(f"allocation {self.allocation!r} weighs shapes of weights, which heads and channels have not")
        if faults:
            raise OptionError(f"LoraPrune: {'; '.join(faults)}.")

    def schedule(self, final: float, steps: int) -> Cubic:
        """When units go, in a training of so many optimizer steps.

        Raises:
            OptionError: there is no removal between the first and the last.
        """
        begin, end = max(int(self.warmup * steps), 1), steps - int(self.cooldown * steps)
        if end - begin < self.every:
            raise OptionError(
                f"of {steps} optimizer steps {max(end - begin, 0)} lie between warm-up and cool-down, and units go "
                f"every {self.every}: train longer, or lower every."
            )
        return Cubic(final=final, begin=begin, end=end, every=self.every)


class Guide:
    """The scores of now by group: what `train.GradualUnits` is given. A context manager, which removes its hooks.

    One importance is held at a time, so memory is that of the largest matrix; "grad" holds a gradient of each.

    Args:
        model: carries the adapters.
        groups: the units; of their tensors the weights with an adapter count.
        adapters: by name of the layer.
        criterion: see `LoraPrune`; "grad" makes the weights require gradients, which no optimizer must hold.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        adapters: Mapping[str, Adapter],
        criterion: Criterion = "lora",
    ) -> None:
        self._model, self._groups, self._criterion = model, tuple(groups), criterion
        axes: dict[str, set[int]] = {}
        for group in groups:
            for member in group.members:
                axes.setdefault(member.tensor, set()).add(member.axis)
        named = {weight_of(layer): layer for layer in adapters}
        self._axes = {name: axes[name] for name in named if name in axes}
        self._layers = {name: (model.get_submodule(named[name]), adapters[named[name]]) for name in self._axes}
        self._sums: dict[str, Tensor] = {}
        self._hooks = [self._watch(name) for name in self._layers] if criterion == "grad" else []

    def __enter__(self) -> Guide:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Scores by group, float [units], from the gradients at hand; a matrix without one counts nothing."""
        cache: Cache = {}
        for name, axes in self._axes.items():
            found = self.importance(name)
            cache |= {(name, axis, "sum"): rows.cpu() for axis, rows in marginals(found, axes).items()}
        self._sums.clear()
        return {group.name: unit_scores(group, {}, cache) for group in self._groups}

    def importance(self, name: str) -> Tensor:
        """I of the weight called `name`, in its shape."""
        layer, adapter = self._layers[name]
        stored = cast(Tensor, layer.weight).detach()
        weight = to_matrix(layer, stored)[0]
        found = importance(self._gradient(name, layer, adapter), weight, adapter.scale * adapter.product)
        return from_matrix(layer, found[None], stored.shape)

    def _gradient(self, name: str, layer: nn.Module, adapter: Adapter) -> Tensor | None:
        if self._criterion == "magnitude":
            return None
        if self._criterion == "grad":
            found = self._sums.get(name)
            return torch.zeros_like(adapter.product) if found is None else to_matrix(layer, found)[0]
        down, up = (torch.zeros_like(p) if p.grad is None else p.grad for p in (adapter.down, adapter.up))
        return guided_gradient(adapter.down, adapter.up, down, up)

    def _watch(self, name: str) -> Any:
        """Takes each gradient of a weight as soon as it is made, so that no clipping ever sees it."""
        weight = cast(nn.Parameter, self._layers[name][0].weight).requires_grad_(True)

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._sums[name] = self._sums[name] + parameter.grad if name in self._sums else parameter.grad
            parameter.grad = None

        return weight.register_post_accumulate_grad_hook(collect)


def loraprune(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: LoraPrune | None = None, loss: Loss | None = None, scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (), seed: int = 0, checkpoint: Any = None,
    on_step: Callable[[Any], None] | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A smaller copy of `model`, tuned by adapters that are merged, without the units that mattered least meanwhile.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=50%", of the units that may go; "params<=70%", "macs<=70%" of the whole model.
        recover: the training; `FineTune(epochs=…, lr=…, optimizer="adamw")`.
        options: hyperparameters.
        common: data (batches with labels), test and the rest of `prune`'s arguments. The report's recipe has numbers of
            adapters, of parameters that trained, and of steps whose scores counted or were skipped, as "loraprune".

    Raises:
        BudgetError: a budget that cannot be met.
        ModelError: no head or channel can go, or those that can have matrices that are no linear layers, or lie in
            blocks that are left out.
        OptionError: no training, one that is too short, or a rank that a layer cannot have.
    """
    how = options or LoraPrune()
    layers, structure = _within(model, example_inputs, how, scope, ignore)
    groups = structure.groups
    recipe = recipe_of(
        budget, criterion="loraprune", criterion_options={"gradient": how.criterion}, allocation=how.allocation,
        granularity="channel", scope=scope, ignore=ignore, seed=seed,
    )  # fmt: skip

    def counts(scores: Mapping[str, Tensor]) -> dict[str, int]:
        return {n: int(stays.sum()) for n, stays in decide(groups, scores, structure.costs, recipe).items()}

    # What cannot be met is refused now and not after hours of training.
    least = counts({group.name: torch.ones(group.size) for group in groups})
    final = 1 - sum(least.values()) / sum(group.size for group in groups)
    built: list[GradualUnits] = []
    trained: dict[str, int] = {}

    def train(session: Session) -> dict[str, Tensor]:
        schedule = how.schedule(final, session.recover.total_steps(session.data))
        net = session.model
        with ExitStack() as stack:
            adapters = stack.enter_context(
                attach(net, layers, "lora", rank=how.rank, alpha=how.alpha, dropout=how.dropout, seed=seed)
            )
            chosen = stack.enter_context(only_trained(net, "adapters"))
            trained.update(adapters=len(adapters), trained=sum(p.numel() for p in chosen.values()))

            def build(_: nn.Module, optimizer: Any) -> GradualUnits:
                built.append(_pruner(net, optimizer, groups, adapters, schedule, counts, how, stack))
                return built[0]

            with session.clock("training"):
                session.notes.history = session.recover.run(
                    net, session.original, session.data, pruner=build, loss=loss, seed=seed, checkpoint=checkpoint,
                    on_step=on_step, clip_norm=how.clip_norm,
                )  # fmt: skip
            adapters.merge()
        session.test("pruned in training")
        return built[0].kept

    def planned(made: nn.Module, keep: dict[str, Tensor]) -> ModelPlan:
        return ModelPlan(
            groups=groups, scores=built[0].scores, keep=keep, costs=structure.costs, recipe=recipe,
            fingerprint=fingerprint(model), digest=digest(made), structure=structure, example_inputs=example_inputs,
        )  # fmt: skip

    pruned = prune_by_training(
        model, example_inputs, budget, train, recover=recover, granularity="channel", allocation=how.allocation,
        settings=asdict(how), decide=planned, scope=scope, ignore=ignore, seed=seed, checkpoint=checkpoint, **common,
    )  # fmt: skip
    noted = trained | {"observed": built[0].observed, "skipped": built[0].skipped}
    return replace(pruned, report=replace(pruned.report, recipe={**pruned.report.recipe, "loraprune": noted}))


def _within(
    model: nn.Module,
    example_inputs: Any,
    how: LoraPrune,
    scope: str | Sequence[str] | None,
    ignore: str | Sequence[str],
) -> tuple[list[str], Structure]:
    """The layers that get adapters, and the structure in which only those units can go that may."""
    homes = offered(model, example_inputs, _KINDS["heads and channels"])
    structure = infer(model, example_inputs, entangled=False)
    inside = [group for group in structure.groups if group.name in homes]
    carrying = {tensor for group in inside for tensor in group.tensors}
    layers = [n for n in adaptable(model) if weight_of(n) in carrying and not is_tied(model, n)]
    wanted = {group.name for group in in_scope(structure.groups, scope, ignore) if group.kind in _KINDS[how.units]}
    left_out = _left_out(blocks_of(model), how)
    linear = [group for group in inside if group.name in wanted and _all_linear(group, layers)]
    names = [group.name for group in linear if homes[group.name] not in left_out]
    if not names and linear:
        raise ModelError(
            f"all that could go lies in {', '.join(left_out[:3])}, which are left out: lower skip_first or skip_last."
        )
    if not names:
        raise ModelError(
            f"no {' or '.join(_KINDS[how.units])} in scope of {type(model).__name__} lies in linear layers "
            "alone, which adapters need: use another method for convolutions and fused attention."
        )
    return layers, structure.restricted(names)


def _left_out(blocks: Sequence[str], how: LoraPrune) -> tuple[str, ...]:
    """The blocks of which nothing goes; a model that is one block has none."""
    if list(blocks) == [""]:
        return ()
    first, last = int(how.skip_first * len(blocks) + 1e-9), max(len(blocks) - how.skip_last, 0)
    return tuple(dict.fromkeys((*blocks[:first], *blocks[last:])))


def _all_linear(group: ChannelGroup, layers: Sequence[str]) -> bool:
    weights = {member.tensor for member in group.members if member.rank > 1}
    return bool(weights) and weights <= {weight_of(layer) for layer in layers}


def _pruner(
    model: nn.Module,
    optimizer: Any,
    groups: Sequence[ChannelGroup],
    adapters: Adapters,
    schedule: Cubic,
    counts: Callable[[Mapping[str, Tensor]], Mapping[str, int]],
    how: LoraPrune,
    stack: ExitStack,
) -> GradualUnits:
    guide = stack.enter_context(Guide(model, groups, adapters, how.criterion))
    whole = [replace(group, members=with_adapters(model, group.members)) for group in groups]
    return GradualUnits(model, optimizer, whole, schedule, guide, counts, decay=how.decay)


METHOD = method(
    Method(
        name="loraprune",
        title="LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
        arxiv="2305.18403",
        units=("head", "channel"),
        when=("during training",),
        how="|Ĝ·W| with Ĝ from LoRA weights and gradients, averaged over steps, cubic, the same share of each group",
        run=loraprune,
        needs=("data", "labels", "training"),
        fused=("LoRA",),
        claim="Scores from adapters come closer to those from true gradients than magnitudes do, and pruning by them "
        "during LoRA tuning is better than by magnitude, or at once after it.",
    )
)
