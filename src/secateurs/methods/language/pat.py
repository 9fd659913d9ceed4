"""PAT: the residual width shrinks while a language model is tuned, by one mask that all its layers share.

Liu et al., "PAT: Pruning-Aware Tuning for Large Language Models", AAAI 2025, arXiv 2408.14721. Unit: channels of the
residual width, the same in every layer, embedding and head, cut out in the end. When: during training, of adapters and
operators alone. How:

    1. places    every layer that adds to the width: embedding, attention output, second matrix of the feed-forward
    2. operator  what it adds passes through z = D ⊙ M ⊙ (x + V·U·x): low rank, mergeable, at first the identity
    3. mask      M = sigmoid(T·w) + b for one w [d] in all places; T rises, b falls: `train.shared_mask`
    4. loss      the task's + 10·|kept - d'|/d' and two clusters of w + the mean square of U·Uᵀ - I of every operator
    5. merge     LoRA, then W ← D ⊙ (I + V·U)·W; rows and columns of the other channels are cut out; the weights of the
                 norms grow by √(d/d'), and their ε by d/d', since they then run over d' channels

Places follow from the shape algebra: they are the layers that produce the width which a norm runs over or, in a model
without one, the width that carries the most parameters. Where vectors make up a part of that width, as a batch norm's,
their output has M alone. An embedding that is the head, too, gets a copy for the head before anything else.

Defaults. Rank 20 and alpha 4 of LoRA on all linear layers but the head, dropout 0.05 and rank 200 of the operators are
the presets' for a width of 4096; here the operators' rank is a share of the width, 200/4096. 10,000 of about 30,000
steps anneal the mask: a third of the training. The presets' rate is 5e-5, on a cosine (`recover` has 0.01 unless told).

Not as in the code. Its merge leaves D out, and only three of its identity losses count; here D is merged and all count.
Its loss is no number while no logit is above zero; one rule holds here, that 0 stays. What it keeps may miss d' by a
few; here the d' highest logits stay, from the end of the annealing on, so that what training is left repairs a mask
that was not hard by then; the report says by how many channels the logits had missed d'. Only root-mean-square norms
may run over the width. Masks that do not train are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ...core.batch import Loss, device_of
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.dims import Atom
from ...core.errors import BudgetError, ModelError, OptionError
from ...core.units import ChannelGroup, Member
from ...graph.infer import infer
from ...graph.plan import ModelPlan, digest
from ...graph.rms import entangled, norms_over, refuse_others, rescale
from ...graph.structure import Structure
from ...in_training import Session, prune_by_training
from ...planning import Granularity, in_scope, plan
from ...pruning import FineTune, Pruned
from ...recover.adapters import adaptable, attach
from ...recover.context import seeded
from ...recover.trainable import only_trained
from ...running import take_place
from ...train.scope import canonical_names
from ...train.shared_mask import MaskPruner, Operator, SharedMask
from ..parameters import Between, Switch, check
from ._adapted import Names, adapted_layers, at_own_rate, outputs_axis

__all__ = ["METHOD", "Pat", "pat"]


@dataclass(frozen=True)
class Pat:
    """Hyperparameters.

    Args:
        rank, alpha, dropout: of LoRA.
        adapted: patterns of the layers that carry it; empty for all linear layers but the head.
        operator: rank of the operators, as a share of the width; 0 for D and M alone.
        anneal: share of the training in which the mask becomes hard.
        identity: whether the operators have an identity loss, and D trains.
        mask_rate: rate of the logits, as a multiple of that of the adapters.
    """

    rank: Annotated[int, Between(1, whole=True)] = 20
    alpha: Annotated[float, Between(0, closed="neither")] = 4.0
    dropout: Annotated[float, Between(0, 1)] = 0.05
    adapted: Annotated[tuple[str, ...], Names()] = ()
    operator: Annotated[float, Between(0, 1, closed="both")] = 200 / 4096
    anneal: Annotated[float, Between(0, 1, closed="high")] = 1 / 3
    identity: Annotated[bool, Switch()] = True
    mask_rate: Annotated[float, Between(0, closed="neither")] = 1.0

    def __post_init__(self) -> None:
        check(self)


def pat(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Pat | None = None, loss: Loss | None = None, seed: int = 0, checkpoint: str | Path | None = None,
    on_step: Callable[[Any], None] | None = None, inplace: bool = False, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model` with a smaller residual width, whose channels went while it was tuned by `recover`.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=25%", a share of the width, or "params<=…" and the like.
        recover: the training: its length, rate and schedule; its optimizer is AdamW.
        options: hyperparameters.
        loss, seed, checkpoint, on_step, inplace, common: as for `prune`: data, test, scope, ignore and the rest. The
            report compares with the model whose head has an embedding of its own; its recipe says, as "missed", how
            many more channels than asked for had a logit of 0 or more.

    Raises:
        BudgetError: another budget, or one that cannot be met.
        OptionError: no training, one of a single step, or a rank that a layer cannot have.
        ModelError: a norm over the width that is no root-mean-square norm, or a part of the width that no linear layer
            or embedding makes.
    """
    how, asked = options or Pat(), Budget.parse(budget)
    if asked.pattern is not None:
        raise BudgetError(f"PAT needs a share of the width or a cost, such as 'sparsity=25%', got {str(budget)!r}.")
    source = _untied(model)
    planned, places = _planned(source, example_inputs, asked, seed, common)
    done: list[tuple[ModelPlan, int]] = []

    def train(session: Session) -> dict[str, Tensor]:
        own, recover = session.model, session.recover
        steps = _annealing(how, recover.total_steps(session.data))
        mask = SharedMask(places.group.size, planned.counts[places.group.name], steps).to(device_of(own))
        with ExitStack() as stack:
            settings: dict[str, Any] = {"rank": how.rank, "alpha": how.alpha, "dropout": how.dropout, "seed": seed}
            adapters = stack.enter_context(attach(own, adapted_layers(own, how.adapted), "lora", **settings))
            stack.enter_context(only_trained(own, "adapters"))
            operators = stack.enter_context(_operating(own, places, mask, how, seed))

            def optimizer(parameters: Sequence[nn.Parameter], lr: float) -> AdamW:
                rest = {"params": [parameter for parameter in parameters if parameter is not mask.logits]}
                logits: dict[str, Any] = {"params": [mask.logits], "lr": how.mask_rate * lr, "weight_decay": 0.0}
                return AdamW([rest, logits], lr=lr, weight_decay=recover.weight_decay)

            with session.clock("training"):
                session.notes.history = at_own_rate(recover, optimizer).run(
                    own, session.original, session.data, loss=loss, seed=seed, checkpoint=checkpoint, on_step=on_step,
                    pruner=lambda _own, made: MaskPruner(mask, tuple(operators.values()), made, identity=how.identity),
                )  # fmt: skip
            session.test("pruned in training")
            adapters.merge()
            places.merge(own, operators)
        stays = mask.stays().cpu()
        rescale(own, places.norms, len(stays), int(stays.sum()))
        logits, name = mask.logits.detach().cpu(), places.group.name
        recipe = replace(planned.recipe, criterion="mask")
        made = replace(planned, scores={name: logits}, keep={name: stays}, recipe=recipe, digest=digest(own))
        done.append((made, int((logits >= 0).sum()) - mask.count))
        return {}

    pruned = prune_by_training(
        source, example_inputs, budget, train, recover=recover, granularity="width", seed=seed, checkpoint=checkpoint,
        settings=asdict(how) | {"adapted": list(how.adapted)}, decide=lambda _trained, _masks: done[-1][0], **common,
    )  # fmt: skip
    report = replace(pruned.report, recipe={**pruned.report.recipe, "missed": done[-1][1]})
    return replace(pruned, model=take_place(model, pruned.model) if inplace else pruned.model, report=report)


@dataclass(frozen=True)
class _Places:
    """Where the width is made.

    Args:
        group: its channels.
        layers: by path of a layer, the axes of its parameters along which an operator is merged into it.
        others: paths of modules that make a part of the width by vectors.
        norms: that run over it.
    """

    group: ChannelGroup
    layers: Mapping[str, tuple[Member, ...]]
    others: tuple[str, ...]
    norms: tuple[str, ...]

    @torch.no_grad()
    def merge(self, model: nn.Module, operators: Mapping[str, Operator]) -> None:
        """None; the layers' own parameters do what the operators did, but for the mask."""
        for path, members in self.layers.items():
            for member in members:
                parameter = model.get_parameter(member.tensor)
                parameter.copy_(operators[path].merged(parameter, member.axis))


def _planned(
    model: nn.Module, example_inputs: Any, asked: Budget, seed: int, common: Mapping[str, Any]
) -> tuple[ModelPlan, _Places]:
    """A plan for the width alone, whose channels are yet to be chosen, and where these are made."""
    structure = infer(model, example_inputs, kinds=Granularity.parse("width").kinds, entangled=True)
    chosen = in_scope(structure.groups, common.get("scope"), common.get("ignore", ()))
    wide = {group.name for group in entangled(model, example_inputs, structure)}
    offered = [group for group in chosen if group.name in wide] or list(chosen)
    if not offered:
        raise ModelError(f"{type(model).__name__} has no width that can go in this scope.")
    group = max(offered, key=lambda g: sum(model.get_parameter(t).numel() for t in _parameters(model, g)))
    places = _places(model, structure, group)
    made = plan(model, example_inputs, asked, granularity="width", scope=group.name, seed=seed)
    return made, places


def _parameters(model: nn.Module, group: ChannelGroup) -> list[str]:
    known = dict(model.named_parameters())
    return [name for name in group.tensors if name in known]


def _places(model: nn.Module, structure: Structure, group: ChannelGroup) -> _Places:
    """Where the group is made.

    Raises:
        ModelError: by something that no operator can be merged into, or with a norm that no factor mends.
    """
    norms = norms_over(structure, group)
    refuse_others(model, norms, group.size)
    owners: dict[str, list[Member]] = {}
    for member in group.members:
        owner = member.tensor.rpartition(".")[0]
        if member.role == "out" and owner not in norms and member.tensor in _parameters(model, group):
            owners.setdefault(owner, []).append(member)
    layers = {path: tuple(found) for path, found in owners.items() if any(member.rank > 1 for member in found)}
    known = adaptable(model)
    for path, found in layers.items():
        module = model.get_submodule(path)
        last = 1 if isinstance(module, nn.Embedding) else outputs_axis(module)
        whole = all(isinstance(m.dim, Atom) and (m.rank == 1 or m.axis == last) for m in found)
        if not whole or not (path in known or isinstance(module, nn.Embedding)):
            raise ModelError(
                f"{path or 'the model'} ({type(module).__name__}) makes the width {group.name}, and an operator can be "
                "merged into linear layers and embeddings alone; name another width in scope=."
            )
    return _Places(group, layers, tuple(path for path in owners if path not in layers), norms)


@contextmanager
def _operating(
    model: nn.Module, places: _Places, mask: SharedMask, how: Pat, seed: int
) -> Iterator[dict[str, Operator]]:
    """A context in which what makes the width passes through operators, by path; the first holds the mask."""
    rank, made, handles = round(how.operator * places.group.size), {}, []
    for path in (*places.layers, *places.others):
        with seeded(seed, "operator", path):
            inner = path in places.layers
            made[path] = Operator(mask, rank if inner else 0, scaled=inner and how.identity).to(device_of(model))
    first = model.get_submodule(next(iter(made)))
    try:
        first.add_module("shared_mask", mask)
        for path, operator in made.items():
            layer = model.get_submodule(path)
            layer.add_module("operator", operator)
            handles.append(layer.register_forward_hook(operator.hook))
        yield made
    finally:
        for handle in handles:
            handle.remove()
        for path in made:
            model.get_submodule(path)._modules.pop("operator", None)
        first._modules.pop("shared_mask", None)


def _annealing(how: Pat, steps: int) -> int:
    """N for a training of `steps`.

    Raises:
        OptionError: a training of one step, in which no mask becomes hard.
    """
    if steps < 2:
        raise OptionError(f"the mask needs 2 optimizer steps or more to become hard, got {steps}: train longer.")
    return max(round(how.anneal * steps), 2)


def _untied(model: nn.Module) -> nn.Module:
    """`model`, or a copy in which every layer that shares the weight of an embedding has its own."""
    first = canonical_names(model)
    shared = [name for name in first if first[name] != name]
    owners = [{path: model.get_submodule(path.rpartition(".")[0]) for path in (first[n], n)} for n in shared]
    if not any(isinstance(owner, nn.Embedding) for found in owners for owner in found.values()):
        return model
    made = copy.deepcopy(model)
    for name in shared:
        path, _, own = name.rpartition(".")
        layer = made.get_submodule(path)
        layer.register_parameter(own, nn.Parameter(layer.get_parameter(own).detach().clone()))
    config: Any = getattr(made, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return made


METHOD = method(
    Method(
        name="pat",
        title="PAT: Pruning-Aware Tuning for Large Language Models",
        arxiv="2408.14721",
        units=("channel",),
        when=("during training",),
        how="one annealed mask of the residual width behind low-rank operators that are merged",
        run=pat,
        needs=("data", "labels", "training"),
        fused=("LoRA",),
        claim="Pruning the width while tuning loses less than pruning it once and tuning as long with LoRA.",
    )
)
