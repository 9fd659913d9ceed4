"""Three regimes of pruning: how the dense network should have been trained for the density that it is pruned to.

Zhou, Yang, Chang and Mahoney, "A Three-regime Model of Network Pruning", ICML 2023, arXiv 2305.18383. Unit: whatever is
pruned; single weights by magnitude, equally in every layer, by default. When: before training, to choose what the dense
training is like: its temperature, which rises with fewer epochs, smaller batches, a larger learning rate or a larger
radius ρ of SAM. How: prune, train R copies that differ in the order of the data alone, and look at two of them,

    mc = m - E(t*),  t* = argmax |m - E(t)|,  m = (E(0) + E(1))/2      training error E on the line between the two
    CKA = ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖)                                       of their centred outputs

    I     mc < -δ               poorly connected           raise the temperature
    II-A  mc ≥ -δ, CKA < κ      connected, not alike       lower it
    II-B  mc ≥ -δ, CKA ≥ κ      connected and alike        keep it

The paper's transition: at a high density a colder training gives the better pruned network, below some density a hotter
one does. `three_regime` measures a grid of temperatures and densities. Its three uses are `advise_temperature` (one
trained network: which way), `advise_family` (several trained networks: which one to prune) and `advise_ladder` (a knob,
as SAM's ρ: which setting for each density). CKA is high, too, where both copies are equally bad: the error is told
beside it.

Defaults. The recipe is the paper's for CIFAR: SGD 0.1, 160 epochs with ×0.1 at 80 and 120, retraining alike, test error
as the mean of the last 5 epochs, 11 points, 101 batches for CKA. δ = 0.02 of training error and κ = 0.98 are ours: the
paper draws its borders by eye. A dense network of fewer epochs is the full run stopped early, with the learning rates
that the full one had; a smaller batch takes as many steps. Batch norms get new statistics at every point of the line.
The paper prunes convolutions alone; here all weights go, unless `scope` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Annotated, Any, Literal, cast, get_args

from torch import Tensor, nn

from ...core.batch import take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import DataError, OptionError
from ...measure.connectivity import connect, error_on
from ...measure.hessian import sharpness
from ...measure.params import parameters
from ...measure.similarity import output_similarity
from ...planning import batches_of, plan
from ...pruning import FineTune
from ...recover.batchnorm import recalibrate_batch_norm
from ...recover.context import seeded
from ...recover.copies import passes_from, trained_copies
from ...recover.finetune import Data, fine_tune, one_pass
from ...recover.schedules import get_rate
from ...train.sam import SAM
from ..parameters import Between, OneOf, Registered, Several, check
from ..rebatching import rebatched
from ._regimes import Cell, Family, Ladder, Sweep, ranked, regime

__all__ = [
    "METHOD",
    "PAPER_SETTINGS",
    "Cell",
    "Family",
    "Grid",
    "Knob",
    "Ladder",
    "Sweep",
    "advise_family",
    "advise_ladder",
    "advise_temperature",
    "climb",
    "regime",
    "three_regime",
    "train_dense",
]

Build = Callable[[int], nn.Module]
Loads = str | Budget | Sequence[str | Budget]
Knob = Literal["epochs", "batch-size", "sam-rho", "lr"]
PAPER_SETTINGS: dict[Knob, tuple[float, ...]] = {
    "epochs": tuple(range(160, 0, -10)),
    "batch-size": (512, 256, 128, 64, 32, 16),
    "sam-rho": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}


@dataclass(frozen=True)
class Grid:
    """Hyperparameters.

    Args:
        knob: what makes dense training hotter: fewer "epochs" of one run, a smaller "batch-size", a larger "sam-rho" or
            a larger "lr".
        settings: of the knob (of the paper's 16 numbers of epochs, four).
        epochs: of the full dense training (160).
        lr, weight_decay, schedule: of dense training (0.1, 1e-4, "step"); a name, see `fine_tune`.
        retrain_epochs, retrain_lr, retrain_schedule: after pruning (160, 0.1, "step"); weight decay as above.
        copies: R, trained from each pruned network (3).
        seeds: one dense network of every temperature for each (three in the paper).
        last: the test error is the mean over so many last passes (5).
        points: on the line between two copies, ends included (11).
        cka_batches: that outputs are compared on (101).
        outputs: compare "logits", or probabilities after "softmax", as the code's figure does.
        delta: δ, the largest barrier, as a share of the training data, of two that are connected (0.02).
        kappa: κ, the least CKA of two that are alike (0.98).
    """

    knob: Annotated[Knob, OneOf(get_args(Knob))] = "epochs"
    settings: Annotated[tuple[float, ...], Several(Between(0))] = (160, 80, 40, 10)
    epochs: Annotated[int, Between(1, whole=True)] = 160
    lr: Annotated[float, Between(0, closed="neither")] = 0.1
    weight_decay: Annotated[float, Between(0)] = 1e-4
    schedule: Annotated[str, Registered(get_rate)] = "step"
    retrain_epochs: Annotated[int, Between(1, whole=True)] = 160
    retrain_lr: Annotated[float, Between(0, closed="neither")] = 0.1
    retrain_schedule: Annotated[str, Registered(get_rate)] = "step"
    copies: Annotated[int, Between(2, whole=True)] = 3
    seeds: Annotated[tuple[int, ...], Several(Between(0, whole=True))] = (0, 1, 2)
    last: Annotated[int, Between(1, whole=True)] = 5
    points: Annotated[int, Between(2, whole=True)] = 11
    cka_batches: Annotated[int, Between(1, whole=True)] = 101
    outputs: Annotated[Literal["logits", "softmax"], OneOf(("logits", "softmax"))] = "logits"
    delta: Annotated[float, Between(0)] = 0.02
    kappa: Annotated[float, Between(0, 1, closed="both")] = 0.98

    def __post_init__(self) -> None:
        check(self)
        whole = self.knob in ("epochs", "batch-size")
        high = self.epochs if self.knob == "epochs" else float("inf")
        rule = Between(0 if self.knob == "sam-rho" else 1e-12, high, closed="both")
        if any(rule.fault(s) or (whole and s != int(s)) for s in self.settings):
            bound = f" of at most {self.epochs}" if self.knob == "epochs" else ""
            least = "numbers of at least 0" if self.knob == "sam-rho" else "positive numbers"
            raise OptionError(
                f"Grid: settings of {self.knob} must be {'whole ' if whole else ''}{least}{bound}, got {self.settings}."
            )

    @property
    def ladder(self) -> tuple[float, ...]:
        """The settings from the coldest to the hottest, each once."""
        return tuple(sorted(set(self.settings), reverse=self.knob in ("epochs", "batch-size")))


def three_regime(
    build: Build,
    example_inputs: Any,
    budget: Loads,
    *,
    data: Data,
    test: Iterable[Any],
    sample: Iterable[Any] | None = None,
    options: Grid | None = None,
    on_cell: Callable[[Cell], None] | None = None,
    **pruning: Any,
) -> Sweep:
    """The grid of temperatures and densities, with the regime and the advice of every cell.

    Args:
        build: makes the untrained network for a seed.
        example_inputs: as for `plan`.
        budget: one load, or a list of them, each a cell of every temperature.
        data: training batches in a new order for each pass; see `recover.copies.trained_copies`.
        test: batches with labels; nothing is chosen by them.
        sample: training batches without augmentation, on which connectivity and likeness are measured; default: `data`
            itself, or its first pass.
        options: hyperparameters.
        on_cell: told each cell when all its seeds are done.
        pruning: arguments of `plan`; default: single weights by magnitude, equal sparsity in every layer.

    Raises:
        BudgetError: a budget cannot be met; before any training.
        DataError: there are no batches, their order never changes, or a pruned network says the same of all samples.
    """
    how, loads = options or Grid(), _loads(budget)
    seen = _Look(example_inputs, data, test, sample, how, pruning)
    for load in loads:
        seen.decide(build(how.seeds[0]), load)
    cells: list[Cell] = []
    for setting in how.ladder:
        parts = [
            [seen.cell(dense, load, f"{how.knob} {setting:g}") for load in loads]
            for dense in (train_dense(build, seen.data, setting, how, seed) for seed in how.seeds)
        ]
        for column in zip(*parts, strict=True):
            cells.append(Cell.merged(column))
            if on_cell is not None:
                on_cell(cells[-1])
    return Sweep(how.knob, tuple(cells))


def advise_temperature(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    *,
    data: Data,
    test: Iterable[Any],
    sample: Iterable[Any] | None = None,
    options: Grid | None = None,
    name: str = "the model",
    **pruning: Any,
) -> Cell:
    """The cell of one trained network at one density: its `advice` is to raise, lower or keep the temperature.

    Args:
        model: trained; it stays as it is.
        name: in what is printed.
        example_inputs, budget, data, test, sample, options, pruning: see `three_regime`; of the hyperparameters those
            of retraining and measuring count.
    """
    return _Look(example_inputs, data, test, sample, options or Grid(), pruning).cell(model, budget, name)


def advise_family(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    budget: str | Budget,
    *,
    data: Data,
    test: Iterable[Any],
    sample: Iterable[Any] | None = None,
    options: Grid | None = None,
    by_sharpness: bool = False,
    on_cell: Callable[[Cell], None] | None = None,
    **pruning: Any,
) -> Family:
    """Trained networks in the order in which they should be pruned, and what each rule of choice would have cost.

    First come those whose copies are connected, then those that are more alike, then those of lower training error.
    The regret of a rule is the test error, after pruning and retraining, of what it chose less that of the best.

    Args:
        models: two or more, by name.
        by_sharpness: also choose by the smallest eigenvalue at the top of the dense Hessian, on the first batch of the
            sample; the rule that the paper compares with.
        example_inputs, budget, data, test, sample, options, on_cell, pruning: see `three_regime`.

    Raises:
        OptionError: fewer than two models.
    """
    if len(models) < 2:
        raise OptionError(f"a family to choose from has at least two models, got {len(models)}.")
    seen = _Look(example_inputs, data, test, sample, options or Grid(), pruning)
    cells = []
    for name, model in models.items():
        cells.append(seen.cell(model, budget, name))
        if on_cell is not None:
            on_cell(cells[-1])
    sharp = {n: sharpness(m, take(seen.sample, 1)).eigenvalue.value for n, m in models.items()} if by_sharpness else {}
    return Family(ranked(cells), sharp)


def advise_ladder(
    build: Build,
    example_inputs: Any,
    budget: Loads,
    *,
    data: Data,
    test: Iterable[Any],
    sample: Iterable[Any] | None = None,
    options: Grid | None = None,
    start: float | None = None,
    on_cell: Callable[[Cell], None] | None = None,
    **pruning: Any,
) -> Ladder:
    """The setting of the knob for each density: from `start` the advice is followed a notch at a time.

    A climb ends with the advice to keep the setting, at an end of the ladder or where it turns back; chosen is, among
    what was seen, what `advise_family` would rank first. Heavily pruned networks should come out hotter.

    Args:
        build, example_inputs, budget, data, test, sample, on_cell, pruning: see `three_regime`.
        options: hyperparameters; default: SAM's ρ at the paper's settings.
        start: one of the settings; default: the middle one.

    Raises:
        OptionError: `start` is no setting.
    """
    how = options or Grid(knob="sam-rho", settings=PAPER_SETTINGS["sam-rho"])
    first = how.ladder[(len(how.ladder) - 1) // 2] if start is None else start
    if first not in how.ladder:
        raise OptionError(f"start must be one of the settings {how.ladder}, got {start}.")
    seen, dense = _Look(example_inputs, data, test, sample, how, pruning), dict[float, list[nn.Module]]()

    def assess(load: str | Budget, setting: float) -> Cell:
        if setting not in dense:
            dense[setting] = [train_dense(build, seen.data, setting, how, seed) for seed in how.seeds]
        name = f"{how.knob} {setting:g}"
        found = Cell.merged([seen.cell(model, load, name) for model in dense[setting]])
        if on_cell is not None:
            on_cell(found)
        return found

    loads = _loads(budget)
    for load in loads:
        seen.decide(build(how.seeds[0]), load)
    return Ladder(how.knob, tuple(climb(how.ladder, first, partial(assess, load)) for load in loads))


def climb(ladder: Sequence[float], start: float, assess: Callable[[float], Cell]) -> tuple[Cell, ...]:
    """The cells seen on the way that their advice points, from `start` until it is to keep, the end, or a return.

    Args:
        ladder: settings from the coldest to the hottest.
        start: one of them.
        assess: from a setting to its cell.
    """
    seen: dict[int, Cell] = {}
    at = ladder.index(start)
    while 0 <= at < len(ladder) and at not in seen:
        seen[at] = assess(ladder[at])
        at += {"raise": 1, "lower": -1, "keep": 0}[seen[at].advice]
    return tuple(seen.values())


def train_dense(build: Build, data: Data, setting: float, how: Grid, seed: int) -> nn.Module:
    """The dense network of a seed, trained from scratch with the knob at `setting`.

    Args:
        build: makes it untrained.
        data: in batches of the usual size.
        setting: epochs: where the full run is stopped, whose learning rates it has until then; batch-size: samples, at
            as many steps as the full run has with the usual size; sam-rho; lr.
        how: hyperparameters.
        seed: of the network and of its training.
    """
    model, rate = build(seed), get_rate(how.schedule)
    training: dict[str, Any] = {"epochs": how.epochs, "lr": how.lr, "schedule": rate}
    passes = passes_from(data, seed * how.epochs)
    if how.knob == "epochs":
        training |= {"epochs": int(setting), "schedule": lambda share: rate(share * setting / how.epochs)}
    elif how.knob == "batch-size":
        steps = FineTune(epochs=how.epochs, lr=how.lr).total_steps(data)
        training |= {"epochs": None, "steps": steps}
        whole = passes
        passes = lambda epoch: rebatched(whole(epoch), int(setting))  # noqa: E731
    elif how.knob == "sam-rho":
        training["sam"] = SAM(setting)
    else:
        training["lr"] = setting
    fine_tune(model, passes, weight_decay=how.weight_decay, seed=seed, **training)
    return model


def _loads(budget: Loads) -> list[str | Budget]:
    return [budget] if isinstance(budget, (str, Budget)) else list(budget)


class _Look:
    """What stays the same while cells are measured."""

    def __init__(
        self, example_inputs: Any, data: Data, test: Iterable[Any], sample: Iterable[Any] | None, how: Grid,
        pruning: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._how, self._inputs, self._tests = how, example_inputs, take(test, what="test data")
        self.data = cast(Data, batches_of(cast(Iterable[Any], data)))
        fixed = self.data if sample is None else batches_of(sample)
        self.sample: Iterable[Any] = fixed if isinstance(fixed, Iterable) else list(one_pass(self.data))
        take(self.sample, 1, "training data")
        given = {"granularity": "weight", "criterion": "magnitude", "allocation": "uniform"}
        self._pruning = {**given, **pruning}

    def decide(self, dense: nn.Module, load: str | Budget) -> Any:
        return plan(dense, self._inputs, load, data=one_pass(self.data), **self._pruning)

    def cell(self, dense: nn.Module, load: str | Budget, name: str) -> Cell:
        how, decided, tested = self._how, self.decide(dense, load), error_on(self._tests)
        masks = None if decided.structure else decided.masks(dense)
        pruned = decided.cut(dense) if masks is None else decided.mask(dense)
        copies = trained_copies(
            pruned, self.data, how.copies, epochs=how.retrain_epochs, lr=how.retrain_lr, masks=masks, score=tested,
            weight_decay=how.weight_decay, schedule=how.retrain_schedule, last=how.last, seed=1,
        )  # fmt: skip
        pairs = list(combinations([made.model for made in copies], 2))
        with seeded(0, "measuring"):
            paths = [connect(a, a, b, error_on(self.sample), prepare=self._settle, points=how.points) for a, b in pairs]
            alike = [self._likeness(a, b, f"{name} at {load}") for a, b in pairs]
        return Cell(
            name=name,
            budget=str(load),
            density=parameters(pruned) / parameters(dense) if masks is None else _density(masks.values()),
            mcs=tuple(path.mc for path in paths),
            ckas=tuple(alike),
            errors=tuple(fmean(made.scores) for made in copies),
            training_errors=tuple(path.ends for path in paths),
            dense_errors=(tested(dense),),
            delta=how.delta,
            kappa=how.kappa,
        )

    def _settle(self, model: nn.Module) -> None:
        recalibrate_batch_norm(model, self.sample, by_size=True)

    def _likeness(self, a: nn.Module, b: nn.Module, where: str) -> float:
        how = self._how
        try:
            return output_similarity(a, b, self.sample, softmax=how.outputs == "softmax", limit=how.cka_batches)
        except DataError as error:
            raise DataError(f"{where}: {str(error).rstrip('.')}; prune less or train the copies longer.") from error


def _density(masks: Iterable[Tensor]) -> float:
    counted = [(int(mask.sum()), mask.numel()) for mask in masks]
    return sum(kept for kept, _ in counted) / sum(entries for _, entries in counted)


METHOD = method(
    Method(
        name="three-regime",
        title="A Three-regime Model of Network Pruning",
        arxiv="2305.18383",
        units=("weight", "channel"),
        when=("before training",),
        how="connectivity and likeness of retrained copies say which way the temperature of dense training should go",
        run=three_regime,
        needs=("data", "labels", "training", "builder"),
        fused=("SAM",),
        claim="At moderate density colder dense training makes the pruned network better; at very low density a hotter "
        "one does, and its copies are better connected.",
    )
)
