"""PERP: after pruning, only biases, norms and adapters that keep the zeros are trained, a share of the parameters.

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv 2312.15230. Unit: single
weights or N:M, by any criterion and allocation. When: after training, once weights have gone. How:

    1. prune     every layer in the scope once, by |w| or another criterion
    2. choose    what trains: biases (those of norms included), norms, the head, adapters; all else is frozen
    3. adapters  for a pruned weight W with mask M: W + s·(B·A)⊙M (mask-lora), W⊙(B·A) (scale-lora), or W + s·B·A
                 merged as W + s·(B·A)⊙M (lora-prune, which changes the function); rank r, s = alpha / r
    4. retrain   AdamW on the model's own loss (next token for a language model, any loss for other models), rate up for
                 a tenth of the steps, then down to 0 on a line; weight decay 0
    5. merge     ordinary layers again, with as many exact zeros as before

`Retraining` is the same recovery after any other method, as `recover=Retraining(…)`, and `retrain` is steps 2 to 5 for
a model that is pruned already. `recover=Reconstruction(…)` trains the same parameters block by block, to give again
what the dense block made of the same inputs, without the task's loss. Batch-norm statistics are measured again before
the training, as after every pruning, and follow it.

Defaults. Rank 16, alpha 32, dropout 0, the optimizer and its schedule are the code's; so is the rate of 5e-4, its debug
preset, which must be tuned: what is best for biases is one to two orders above what is best for all parameters. 1000
steps is the order of the paper's. Magnitude and uniform are its main case.

Not as in the code. It takes M anew at every forward as what is not zero, and so loses a weight that half precision
rounds to 0; here M is stored. The head is not in the default: in many language models it is the embedding, too, and a
merge would change both, which is refused; it trains by plain LoRA where it was not pruned. Biases that do not exist are
created where asked for, since they are the strongest subset; the code has none then. Adapters are float32 in a model
of half precision, its biases and norms train as they are: for float32 there as well, keep the model in float32 and give
`retrain` an `autocast`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ...core.allocate import get_allocation
from ...core.batch import Call, call, main_output
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import ModelError, OptionError
from ...core.state import read_state, write_state
from ...criteria import get_criterion
from ...pruning import FineTune, Pruned, prune
from ...recover.adapters import AdapterKind, adaptable, attach
from ...recover.context import modes_kept
from ...recover.finetune import Data, Epoch, History, fine_tune, one_pass
from ...recover.reconstruct import reconstruct
from ...recover.trainable import BIASED, create_biases, head_of, is_tied, only_trained, trainable_parameters
from ...running import claim
from ...solvers import blocks_of, call_levels, recorded, walk, weight_of
from ..parameters import Between, OneOf, Registered, Several, check

__all__ = ["METHOD", "Perp", "Reconstruction", "Retraining", "Trained", "perp", "retrain", "trained_share"]

Subset = Literal["biases", "norms", "head", "adapters", "all"]
Kept = Literal["mask-lora", "scale-lora", "lora-prune"]


@dataclass(frozen=True)
class Perp:
    """Hyperparameters.

    Args:
        train: of "biases", "norms", "head" and "adapters"; "all" is full retraining with masks, the paper's baseline.
        adapter: "mask-lora", "scale-lora" or "lora-prune", for pruned layers; a head that is dense gets plain LoRA.
        rank: of the adapters (16, the code).
        alpha: their scale is alpha / rank (32, the code); without effect for "scale-lora".
        missing_biases: "create" them in pruned layers that have none, or "leave" them out (the code).
        criterion: of the pruning ("magnitude", the paper's main case).
        allocation: of the pruning ("uniform", the same share of every layer).
        steps: of the training (1000, the order of the paper's).
        lr: its initial rate (5e-4, the code's debug preset; tune it).
    """

    train: Annotated[tuple[Subset, ...], Several(OneOf(get_args(Subset)))] = ("biases", "norms", "adapters")
    adapter: Annotated[Kept, OneOf(get_args(Kept))] = "mask-lora"
    rank: Annotated[int, Between(1, whole=True)] = 16
    alpha: Annotated[float, Between(0, closed="neither")] = 32.0
    missing_biases: Annotated[Literal["leave", "create"], OneOf(("leave", "create"))] = "leave"
    criterion: Annotated[str, Registered(get_criterion)] = "magnitude"
    allocation: Annotated[str, Registered(get_allocation)] = "uniform"
    steps: Annotated[int, Between(1, whole=True)] = 1000
    lr: Annotated[float, Between(0, closed="neither")] = 5e-4

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Retraining(FineTune):
    """PERP's training as the recovery after any method: a `FineTune` of few parameters, with the code's optimizer.

    >>> Retraining(steps=200, lr=5e-3, how=Perp(adapter="scale-lora")).optimizer
    'adamw'

    Args:
        how: what trains; its own steps and rate have no effect here.
        others: as for `FineTune`.
    """

    lr: float = 5e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "linear-warmup"
    how: Perp = field(default_factory=Perp)

    def run(
        self, model: nn.Module, teacher: nn.Module, data: Data, *, masks: Mapping[str, Tensor] | None = None,
        seed: int = 0, **options: Any,
    ) -> History:  # fmt: skip
        """The history of training the chosen parameters of `model`, which has ordinary layers afterwards."""
        plain = FineTune(**{f.name: getattr(self, f.name) for f in fields(FineTune)})
        with _prepared(model, masks or {}, self.how, seed) as kept:
            return plain.run(model, teacher, data, masks=kept or None, seed=seed, **options)


@dataclass(frozen=True)
class Reconstruction(FineTune):
    """PERP's reconstruction as the recovery after any method: block after block gives again what the dense one gave.

    Block by block in the order of the forward pass, each on the outputs of the reconstructed ones before it; the target
    is what the dense block makes of the same inputs. No labels are needed. A history has one record a part, whose loss
    is the mean squared error that is left.

    >>> Reconstruction(steps=100, lr=1e-3, parts="halves").parts
    'halves'

    Args:
        steps: for each part.
        how: what trains, of "biases", "norms" and "adapters"; its own steps and rate have no effect here.
        parts: what is reconstructed at a time: "blocks" (default, the paper), "halves" of blocks, which are what lies
            directly in them, as attention and MLP (Zimmer et al. 2025, arXiv 2510.14444), or single "layers".
        others: as for `FineTune`; there is no teacher but the dense model, and no epochs.
    """

    lr: float = 5e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "linear-warmup"
    how: Perp = field(default_factory=Perp)
    parts: Literal["blocks", "halves", "layers"] = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None or self.optimizer != "adamw" or {"head", "all"} & set(self.how.train):
            raise OptionError("a reconstruction takes steps, adamw, and of what trains biases, norms and adapters.")
        if self.parts not in ("blocks", "halves", "layers"):
            raise OptionError(f"parts must be blocks, halves or layers, got {self.parts!r}.")

    def run(
        self, model: nn.Module, teacher: nn.Module, data: Data, *, masks: Mapping[str, Tensor] | None = None,
        seed: int = 0, checkpoint: str | Path | None = None, **_: Any,
    ) -> History:  # fmt: skip
        """The history of reconstructing the blocks of `model`, which has ordinary layers afterwards."""
        batches = list(one_pass(self.training_data(data)))
        records: list[Epoch] = []

        def visit(name: str, block: nn.Module, calls: list[Call]) -> list[Any]:
            kept = None if checkpoint is None else Path(checkpoint) / f"{len(records):04}.safetensors"
            records.extend(
                self._block(block, teacher.get_submodule(name), calls, _below(name, masks or {}), seed, kept)
            )
            with torch.no_grad():
                return [call(block, given) for given in calls]

        with modes_kept(model), modes_kept(teacher):
            model.eval()
            teacher.eval()
            walk(model, batches, blocks_of(model), visit)
        return History(tuple(records))

    def _block(
        self, block: nn.Module, dense: nn.Module, calls: list[Call], masks: Mapping[str, Tensor], seed: int,
        kept: Path | None,
    ) -> list[Epoch]:  # fmt: skip
        """One record for each part of the block, which is reconstructed in place, or as it was kept."""
        if kept is not None and kept.exists():
            state = read_state(kept, "reconstructed block")
            block.load_state_dict(state["block"])
            return [Epoch(**record) for record in state["records"]]
        records = []
        for part in self._parts(block, calls, masks):
            inside = _below(part, masks)
            given = recorded(block, part, calls)
            with torch.no_grad():
                targets = [main_output(call(dense.get_submodule(part), one)) for one in given]
            _, after = self._part(block.get_submodule(part), given, targets, inside, seed)
            records.append(Epoch(self.steps or 0, after, self.lr))
        if kept is not None:
            write_state(
                kept, {"block": block.state_dict(), "records": [vars(r) for r in records]}, "reconstructed block"
            )
        return records

    def _part(
        self, part: nn.Module, given: list[Call], targets: list[Tensor], masks: Mapping[str, Tensor], seed: int
    ) -> tuple[float, float]:
        train = [subset for subset in self.how.train if masks or subset != "adapters"]
        with _prepared(part, masks, replace(self.how, train=tuple(train)), seed):
            return reconstruct(
                part, given, targets, steps=self.steps or 0, lr=self.lr, train=train, schedule=self.schedule,
                weight_decay=self.weight_decay,
            )  # fmt: skip

    def _parts(self, block: nn.Module, calls: list[Call], masks: Mapping[str, Tensor]) -> list[str]:
        """Names of the parts that hold pruned layers, in the order of their calls; "" is the block itself."""
        if self.parts == "blocks" or not masks:
            return [""] if masks else []
        layers = [name.rpartition(".")[0] for name in masks]
        names = layers if self.parts == "layers" else [name.partition(".")[0] for name in layers]
        return [name for level in call_levels(block, calls[:1], list(dict.fromkeys(names))) for name in level]


@dataclass(frozen=True)
class Trained:
    """How much of a model trained.

    Args:
        trained: parameters that trained, adapters included, each once.
        parameters: of the model without adapters.
        by: numbers for each subset alone; norms and biases overlap.
    """

    trained: int
    parameters: int
    by: Mapping[str, int]

    @property
    def share(self) -> float:
        """trained / parameters."""
        return self.trained / self.parameters


def perp(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, recover: FineTune | None = None,
    options: Perp | None = None, **common: Any,
) -> Pruned:  # fmt: skip
    """A copy of `model`, pruned once and retrained in few parameters; zeros in dense tensors.

    Args:
        model, example_inputs: as for `prune`.
        budget: "sparsity=50%", "2:4" …
        recover: another training than `options` say, with its own steps, rate and optimizer; default:
            `Retraining(steps=options.steps, lr=options.lr)`.
        options: hyperparameters.
        common: data (batches to train on, with labels where the loss needs them), test, loss, scope, ignore, seed and
            the rest of `prune`'s arguments. The report's recipe has the share of parameters that trained, as "trained".

    Raises:
        OptionError: no data, a rank that a layer cannot have, or adapters where no pruned layer can carry one.
        ModelError: nothing to train, or a head whose weight is that of the embedding.
    """
    how = options or Perp()
    if common.get("checkpoint") is not None:
        claim(Path(common["checkpoint"]), {"perp": asdict(how) | {"train": list(how.train)}})
    training = Retraining(steps=how.steps, lr=how.lr, how=how)
    if recover is not None:
        training = Retraining(**{f.name: getattr(recover, f.name) for f in fields(FineTune)}, how=how)
    chosen: dict[str, Any] = {"granularity": "weight", "criterion": how.criterion, "allocation": how.allocation}
    made = prune(model, example_inputs, budget, recover=training, **chosen, **common)
    found = trained_share(made.model, made.masks, how)
    recipe = {**made.report.recipe, "trained": asdict(found) | {"share": found.share}}
    return replace(made, report=replace(made.report, recipe=recipe))


def retrain(
    model: nn.Module, masks: Mapping[str, Tensor], data: Data, *, options: Perp | None = None, seed: int = 0,
    **training: Any,
) -> History:  # fmt: skip
    """The history of training the chosen parameters of `model`, in place; its layers are ordinary ones afterwards.

    Args:
        model: pruned.
        masks: what stays, by name of the weight; `Pruned.masks`.
        data: as for `fine_tune`.
        options: hyperparameters; those of the pruning have no effect here.
        seed: of the adapters and the training.
        training: other arguments of `fine_tune` than the code's: loss, teacher, accumulate, autocast, checkpoint …

    Raises:
        OptionError, ModelError: as for `perp` and `fine_tune`; the adapters are gone then, what has trained stays.
    """
    how = options or Perp()
    settings: dict[str, Any] = {"lr": how.lr, "optimizer": "adamw", "schedule": "linear-warmup"}
    if training.get("epochs") is None:
        settings["steps"] = how.steps
    with _prepared(model, masks, how, seed) as kept:
        return fine_tune(model, data, masks=kept or None, seed=seed, **{**settings, **training})


def trained_share(model: nn.Module, masks: Mapping[str, Tensor], how: Perp) -> Trained:
    """How much of `model` trains; biases that would be created count once they are there."""
    adapted = [layer for layers in _adapted(model, masks, how).values() for layer in layers]
    low = sum(how.rank * sum(model.get_submodule(name).get_parameter("weight").shape) for name in adapted)
    plain = {subset: trainable_parameters(model, subset) for subset in how.train if subset not in ("head", "adapters")}
    chosen = {name: parameter.numel() for found in plain.values() for name, parameter in found.items()}
    by: dict[str, int] = {subset: sum(p.numel() for p in found.values()) for subset, found in plain.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return Trained(sum(chosen.values()) + low, total, by | ({"adapters": low} if adapted else {}))


def _below(name: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of what lies in the module called `name`, by the names that it has for them."""
    if not name:
        return dict(masks)
    return {key.removeprefix(f"{name}."): mask for key, mask in masks.items() if key.startswith(f"{name}.")}


@contextmanager
def _prepared(model: nn.Module, masks: Mapping[str, Tensor], how: Perp, seed: int) -> Iterator[dict[str, Tensor]]:
    """A context in which only what is chosen trains; it gives the masks of that, and merges unless an error ends it."""
    with ExitStack() as stack:
        if how.missing_biases == "create":
            stack.enter_context(_biases_created(model, masks))
        chosen = [subset for subset in how.train if subset not in ("head", "adapters")]
        settings: dict[str, Any] = {"rank": how.rank, "alpha": how.alpha, "masks": masks, "seed": seed}
        adapted = _adapted(model, masks, how).items()
        attached = [stack.enter_context(attach(model, names, kind, **settings)) for kind, names in adapted]
        if attached:
            chosen.append("adapters")
        trained = stack.enter_context(only_trained(model, chosen))
        yield {name: mask for name, mask in masks.items() if name in trained}
        for adapters in attached:
            adapters.merge()


@contextmanager
def _biases_created(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in whose beginning pruned layers without a bias get one; an error in it takes them away again."""
    owners = [name.rpartition(".")[0] for name in masks]
    layers = [n for n in owners if isinstance(model.get_submodule(n), BIASED)]
    created = create_biases(model, layers)
    try:
        yield
    except BaseException:
        for name in created:
            model.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
        raise


def _adapted(model: nn.Module, masks: Mapping[str, Tensor], how: Perp) -> dict[AdapterKind, list[str]]:
    """The layers that carry adapters, by their kind."""
    known = adaptable(model)
    pruned = [name for name in known if weight_of(name) in masks]
    found: dict[AdapterKind, list[str]] = {}
    if "adapters" in how.train:
        if not pruned:
            raise OptionError(
                f"no pruned layer of {type(model).__name__} can carry an adapter, which Linear layers can: leave "
                "'adapters' out of train."
            )
        found[how.adapter] = pruned
    if "head" in how.train:
        head = head_of(model)
        if is_tied(model, head):
            raise ModelError(f"the weight of {head} is that of an embedding too: leave 'head' out of train.")
        kind: AdapterKind = how.adapter if head in pruned else "lora"
        found[kind] = list(dict.fromkeys([*found.get(kind, []), head]))
    return found


METHOD = method(
    Method(
        name="perp",
        title="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        arxiv="2312.15230",
        units=("weight", "N:M"),
        when=("after training",),
        how="|w| once, then biases, norms and adapters that keep the zeros are trained",
        run=perp,
        needs=("data", "training"),
        fused=("LoRA",),
        claim="Retraining well under one per cent of the parameters comes close to retraining all of them.",
    )
)
