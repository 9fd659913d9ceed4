"""Compresso: gates on heads, channels and the residual width learn what goes while LoRA tunes on instructions.

Guo et al., "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models", 2023,
arXiv 2310.05015. Unit: attention heads (query groups where keys are shared), inner channels of the feed-forward layers,
and channels of the residual width, all cut out in the end. When: during training, of adapters alone: no weight of the
model changes. How:

    1. adapters  LoRA on chosen layers, at first alone
    2. gates     one hard-concrete gate a unit, drawn at each pass: `train.hard_concrete`
    3. penalty   λ1·(s - t) + λ2·(s - t)², s the expected sparsity by the costs of the model, t on a ramp; gates
                 descend, λ1 and λ2 ascend: `train.gates`
    4. fix       the most probable units stay, each group in proportion to Σ P(z > 0), as many as the budget leaves,
                 and keep a soft value of at most 0.996; then LoRA alone under fixed gates
    5. fold      LoRA is merged, soft values are multiplied into the weights, and what is 0 is cut out

A gate multiplies what the next layer reads of its unit: in the weights, the columns of the layers that consume it. That
is the attention output of a head before the output projection, as in the paper. The residual width has norms between,
so there a gate multiplies what is written to the stream instead: the embedding and the rows of the layers whose output
is added. Either is exact when folded. The collaborative prompt is `COLLABORATION`; `with_prompt` puts its tokens before
those of a batch, in training and at inference, and leaves them out of the loss.

Defaults. Rank 8 and alpha 8 are the scripts', 5e-5 their rate of LoRA (`recover` has 0.01 unless told). Of 8 epochs and
3 under fixed gates the first is without gates and the target is reached after 5: shares of 11. Gates begin at 10 (heads
and width) or ln 99 (channels), at a rate of 0.1 without schedule. The scripts adapt ("*q_proj", "*v_proj"); by default
here all linear layers but the head are, since other models have other names.

Not as in the code. It multiplies the pre-activation and the other factor of a gated feed-forward layer, so that a value
of z counts about twice; here it counts once. Its merge forgets the gates of the embedding; its norms divide by the old
width for good, here their weights are scaled once so that any norm may divide by its own. A budget of parameters counts
all of them, embeddings too. A layer keeps at least one head. Only root-mean-square norms may run over a width that is
pruned: for layer norms use granularity="channel". Gates of whole layers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core.batch import Loss
from ...core.budget import Budget, Limit, nearest_limit
from ...core.catalogue import Method, method
from ...core.errors import BudgetError, DataError, OptionError
from ...core.plan import Recipe, decide
from ...core.schedule import get_schedule
from ...core.units import ChannelGroup
from ...graph.plan import ModelPlan, digest
from ...graph.rms import entangled, norms_over, refuse_others, rescale
from ...graph.structure import Structure
from ...in_training import Session, prune_by_training
from ...planning import plan
from ...pruning import FineTune, Pruned
from ...recover.adapters import attach
from ...recover.trainable import only_trained
from ...train.gates import Gated, GatePruner, Sparsity, expected_sparsity, gate_optimizer, highest_sparsity
from ...train.scope import canonical_names
from ..parameters import Between, OneOf, check
from ._adapted import Names, adapted_layers, at_own_rate, with_adapters

__all__ = ["COLLABORATION", "METHOD", "Compresso", "compresso", "with_prompt"]

COLLABORATION = (
    "You are a language model that is being made smaller. A pruning algorithm looks for those of your parameters that "
    "are redundant and takes them away, so that you answer faster and need less memory. Your answers must stay as good "
    "as they are now. The pruning goes step by step, and between the steps you are tuned on instructions like the one "
    "below. Work together with the algorithm: rely less and less on parts that you can spare, and keep what you know "
    "in those that matter. Follow the instruction below with full care, whatever has been taken away already."
)
Ramp = Literal["linear", "cubic"]
# The mean log-alpha of heads and width at first; the clamp makes ln 100 of it.
_OPEN = 10.0


@dataclass(frozen=True)
class Compresso:
    """Hyperparameters.

    Args:
        granularity: "width" (heads, channels and the residual width) or "channel" (without the latter).
        rank, alpha, dropout: of LoRA.
        adapted: patterns of the layers that carry it; empty for all linear layers but the head.
        begin: share of the training from which gates are drawn (1/11).
        end: share at which the target is reached (5/11).
        fix: share from which gates are fixed (8/11); 1 for never before the end.
        ramp: of the target, "linear" (the scripts) or "cubic".
        gate_lr: rate of gates and multipliers.
        drop: chance with which a channel is dropped at first; its log-alpha is ln((1 - drop)/drop).
        floor: fewest units that stay in a group.
    """

    granularity: Annotated[Literal["width", "channel"], OneOf(("width", "channel"))] = "width"
    rank: Annotated[int, Between(1, whole=True)] = 8
    alpha: Annotated[float, Between(0, closed="neither")] = 8.0
    dropout: Annotated[float, Between(0, 1)] = 0.0
    adapted: Annotated[tuple[str, ...], Names()] = ()
    begin: Annotated[float, Between(0, 1)] = 1 / 11
    end: Annotated[float, Between(0, 1, closed="high")] = 5 / 11
    fix: Annotated[float, Between(0, 1, closed="high")] = 8 / 11
    ramp: Annotated[Ramp, OneOf(get_args(Ramp))] = "linear"
    gate_lr: Annotated[float, Between(0, closed="neither")] = 0.1
    drop: Annotated[float, Between(0, 1, closed="neither")] = 0.01
    floor: Annotated[int, Between(1, whole=True)] = 1

    def __post_init__(self) -> None:
        check(self)
        if not self.begin < self.end <= self.fix:
            raise OptionError(
                f"Compresso: begin, end and fix must follow each other, got {self.begin}, {self.end} and {self.fix}."
            )


def compresso(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Compresso | None = None, loss: Loss | None = None, seed: int = 0, checkpoint: str | Path | None = None,
    on_step: Callable[[Any], None] | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A smaller copy of `model`, whose units went while adapters were trained by `recover`.

    Args:
        model, example_inputs: as for `prune`.
        budget: one limit: "sparsity=30%", a share of all gated units, or "params<=70%", "macs<=…", "bytes<=…".
        recover: the training: its length, and rate and schedule of the adapters, whose optimizer is AdamW.
        options: hyperparameters.
        loss, seed, checkpoint, on_step, common: as for `prune`: data, test, scope, ignore and the rest.

    Raises:
        BudgetError: another budget, or one that floors or clamped gates do not allow; the nearest is named.
        OptionError: no training, or a rank that a layer cannot have.
        ModelError: a norm over the residual width that is no root-mean-square norm, or no layer for an adapter.
    """
    how, asked = options or Compresso(), Budget.parse(budget)
    limit = _only_limit(asked)
    named = {key: common[key] for key in ("scope", "ignore") if key in common}
    planned = plan(
        model, example_inputs, asked, granularity=how.granularity, allocation="uniform", floor=how.floor, seed=seed,
        **named,
    )  # fmt: skip
    places, aim = _places(model, example_inputs, planned), _aim(planned, limit)
    done: list[tuple[ModelPlan, float]] = []

    def train(session: Session) -> dict[str, Tensor]:
        own, recover = session.model, session.recover
        times = _times(how, recover.total_steps(session.data))
        schedule = get_schedule(how.ramp)(final=aim.target, begin=times["begin"], end=times["end"])
        built: list[GatePruner] = []
        with ExitStack() as stack:
            settings: dict[str, Any] = {"rank": how.rank, "alpha": how.alpha, "dropout": how.dropout, "seed": seed}
            adapters = stack.enter_context(attach(own, adapted_layers(own, how.adapted), "lora", **settings))
            stack.enter_context(only_trained(own, "adapters"))
            groups = [replace(g, members=with_adapters(own, g.members)) for g in places.groups]
            gated = Gated(own, groups, places.starts(how.drop), seed)

            def pruner(_gated: nn.Module, optimizer: Any) -> GatePruner:
                choose = partial(_decided, planned)
                built.append(
                    GatePruner(
                        gated, optimizer, aim.sparsity, schedule, decide=choose, begin=times["begin"], fix=times["fix"]
                    )
                )
                return built[-1]

            def optimizer(parameters: Sequence[nn.Parameter], lr: float) -> Any:
                return gate_optimizer(gated, parameters, lr, gate_lr=how.gate_lr, weight_decay=recover.weight_decay)

            with session.clock("training"):
                session.notes.history = at_own_rate(recover, optimizer).run(
                    gated, session.original, session.data, pruner=pruner, loss=loss, seed=seed, checkpoint=checkpoint,
                    on_step=on_step,
                )  # fmt: skip
            adapters.merge()
        keep = gated.kept()
        gated.fold()
        session.test("pruned in training")
        for name, norms in places.norms.items():
            rescale(own, norms, len(keep[name]), int(keep[name].sum()))
        recipe = _recipe(planned, {name: float(count.detach()) for name, count in gated.expected().items()})
        made = replace(planned, scores=gated.log_alphas(), keep=keep, recipe=recipe, digest=digest(own))
        done.append((made, built[-1].reached))
        return {}

    pruned = prune_by_training(
        model, example_inputs, budget, train, recover=recover, granularity=how.granularity, seed=seed,
        checkpoint=checkpoint, settings=asdict(how) | {"adapted": list(how.adapted)},
        decide=lambda _trained, _masks: done[-1][0], **common,
    )  # fmt: skip
    recipe = {**pruned.report.recipe, "expected_sparsity": done[-1][1]}
    return replace(pruned, report=replace(pruned.report, recipe=recipe))


def with_prompt(batch: Mapping[str, Tensor], prompt: Tensor) -> dict[str, Tensor]:
    """The batch with the prompt's tokens before its own: attended to, and left out of the loss.

    Args:
        batch: "input_ids" [rows, tokens], and perhaps "attention_mask" and "labels" of that shape.
        prompt: int64 [tokens]: `tokenizer(COLLABORATION, return_tensors="pt")["input_ids"][0]`.

    Raises:
        DataError: no "input_ids", or more in the batch than this knows how to lengthen.

    >>> made = with_prompt({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])}, torch.tensor([1]))
    >>> made["input_ids"].tolist(), made["labels"].tolist()
    ([[1, 5, 6]], [[-100, 5, 6]])
    """
    fill: dict[str, Tensor] = {
        "input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": torch.full_like(prompt, -100)
    }  # fmt: skip
    strange = sorted(set(batch) - set(fill))
    if "input_ids" not in batch or strange:
        raise DataError(
            f"a prompt is put before batches of input_ids, attention_mask and labels, got {', '.join(sorted(batch))}."
        )
    return {name: torch.cat([fill[name].to(own).expand(len(own), -1), own], 1) for name, own in batch.items()}


@dataclass(frozen=True)
class _Places:
    """Where gates act.

    Args:
        groups: each with the members alone that its gates multiply.
        norms: for each group that norms run over, these.
    """

    groups: tuple[ChannelGroup, ...]
    norms: Mapping[str, tuple[str, ...]]

    def starts(self, drop: float) -> dict[str, float]:
        """The mean of the first log-alphas of each group."""
        own = math.log((1 - drop) / drop)
        return {g.name: _OPEN if g.kind == "head" or g.name in self.norms else own for g in self.groups}


@dataclass(frozen=True)
class _Aim:
    """The expected sparsity in the end, and how it follows from expected numbers of units."""

    target: float
    sparsity: Sparsity


def _places(model: nn.Module, example_inputs: Any, planned: ModelPlan) -> _Places:
    structure = planned.structure
    assert isinstance(structure, Structure)
    wide = {group.name for group in entangled(model, example_inputs, structure)}
    norms = {g.name: norms_over(structure, g) for g in structure.groups if g.name in wide}
    for group in structure.groups:
        refuse_others(model, norms.get(group.name, ()), group.size)
    first = canonical_names(model)
    tied = {first[name] for name in first if first[name] != name}
    return _Places(tuple(_gated(group, norms.get(group.name), tied) for group in structure.groups), norms)


def _gated(group: ChannelGroup, norms: tuple[str, ...] | None, tied: Collection[str]) -> ChannelGroup:
    """The group with the members alone that are multiplied: consumers; where norms run over it, producers."""
    consumers = tuple(m for m in group.members if m.role == "in")
    if norms is None and consumers:
        return replace(group, members=consumers)
    # An embedding that is the head, too, counts as its consumer; it writes to the stream all the same.
    produced = (m for m in group.members if m.role == "out" or m.tensor in tied)
    return replace(group, members=tuple(m for m in produced if m.tensor.rpartition(".")[0] not in (norms or ())))


def _only_limit(asked: Budget) -> Limit:
    known = ("sparsity", "params", "macs", "bytes")
    if len(asked.limits) != 1 or asked.pattern is not None or asked.limits[0].cost not in known:
        raise BudgetError(f"Compresso needs one limit, such as 'sparsity=30%' or 'params<=70%', got {str(asked)!r}.")
    return asked.limits[0]


def _aim(planned: ModelPlan, limit: Limit) -> _Aim:
    """What gates are to reach.

    Raises:
        BudgetError: clamped gates cannot; the nearest that they can is named.
    """
    sizes = {group.name: group.size for group in planned.groups}
    sparsity = expected_sparsity(limit.metric if limit.metric == "sparsity" else limit.cost, planned.costs, sizes)
    whole = 1.0 if limit.relative else planned.costs.total(limit.cost)
    target = limit.value if limit.metric == "sparsity" else max(1 - limit.value / whole, 0.0)
    most = highest_sparsity(sparsity, sizes)
    if target > most:
        relaxed = nearest_limit(limit, most if limit.metric == "sparsity" else (1 - most) * whole)
        raise BudgetError(
            f"{limit} asks for a sparsity of {target:.4f}, and gates that never close for good reach {most:.4f}.",
            nearest=str(relaxed),
        )
    return _Aim(target, sparsity)


def _recipe(planned: ModelPlan, expected: Mapping[str, float]) -> Recipe:
    """The decision from gates: groups keep units in proportion to their expected numbers."""
    shares = {group.name: min(expected[group.name] / group.size, 1.0) for group in planned.groups}
    chosen: dict[str, Any] = {"allocation": "given", "allocation_options": {"densities": shares}}
    return replace(planned.recipe, criterion="gates", **chosen)


def _decided(planned: ModelPlan, alphas: Mapping[str, Tensor], expected: Mapping[str, float]) -> dict[str, Tensor]:
    """What stays within the budget."""
    return decide(planned.groups, alphas, planned.costs, _recipe(planned, expected))


def _times(how: Compresso, steps: int) -> dict[str, int]:
    """When, in optimizer steps of a training of `steps`."""
    begin = int(how.begin * steps)
    end = max(round(how.end * steps), begin + 1)
    return {"begin": begin, "end": end, "fix": max(round(how.fix * steps), end)}


METHOD = method(
    Method(
        name="compresso",
        title="Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models",
        arxiv="2310.05015",
        units=("head", "channel"),
        when=("during training",),
        how="hard-concrete gates on heads, channels and width, an expected size by an augmented Lagrangian",
        run=compresso,
        needs=("data", "labels", "training"),
        fused=("LoRA",),
        claim="Gates learned with LoRA lose less than one-shot pruning of the same units with as much LoRA after it.",
    )
)
