"""From a model and a budget to a smaller model: plan, apply, repair, measure, report, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature
from operator import length_hint
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from .core.batch import Loss, split, take
from .core.budget import Budget
from .core.catalogue import Method, get_method, hyperparameters
from .core.errors import BudgetError, OptionError, unknown_name
from .core.wrapped import unwrapped
from .deploy.store import load_extra, load_model, save_model
from .graph.plan import ModelPlan, digest
from .planning import batches_of, recipe_of
from .planning import plan as make_plan
from .recover.batchnorm import recalibrate_batch_norm
from .recover.context import seeded
from .recover.finetune import Data, History, fine_tune, one_pass
from .report.data import Report
from .running import Clock, Stage, checkpoint_folder, other_run, take_place
from .summary import Findings, quality_of, summarize
from .sweep import front, sensitivity

__all__ = ["FineTune", "Pruned", "completed", "load", "prune"]

Repair = Callable[[nn.Module, ModelPlan], nn.Module]
_PLAN = "plan.safetensors"
# Units of methods that leave zeros, which a pattern may arrange.
_ZEROS = {"weight", "block", "N:M"}
# What every method passes on to `plan`; what else it takes, its signature names.
_SHARED = ("scope", "ignore", "seed")


@dataclass(frozen=True)
class FineTune:
    """Training that repairs a cut; the arguments of `recover.fine_tune`.

    Args:
        epochs, steps: give one of them.
        lr, optimizer, weight_decay, schedule, label_smoothing: of the training.
        distill: the unpruned model teaches the pruned one.
        data: training batches, or a function from the number of the pass to them; default: the data given to `prune`.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float = 0.01
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    distill: bool = False
    data: Data | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise OptionError(f"FineTune needs epochs or steps, and not both; got {self.epochs} and {self.steps}.")

    def training_data(self, data: Data | None) -> Data:
        """This recipe's own data, else `data`.

        Raises:
            OptionError: there is neither.
        """
        found = data if self.data is None else self.data
        if found is None:
            raise OptionError("recover= needs training data: pass data=, or FineTune(data=…).")
        return found

    def total_steps(self, data: Data) -> int:
        """Optimizer steps of the whole training on `data`; read once where it does not tell its length."""
        if self.steps is not None:
            return self.steps
        first = one_pass(data)
        return (self.epochs or 0) * (length_hint(first) or sum(1 for _ in first))

    def run(self, model: nn.Module, teacher: nn.Module, data: Data, **options: Any) -> History:
        """The history of training `model` on this recipe's own data, else on `data`."""
        settings = {k: v for k, v in vars(self).items() if k not in ("distill", "data")}
        own = self.training_data(data)
        return fine_tune(model, own, teacher=teacher if self.distill else None, **settings, **options)


@dataclass
class Pruned:
    """What pruning made.

    Args:
        model: an ordinary module: smaller where units were cut out, with zeros where single weights went.
        plan: the decision.
        report: before and after.
        masks: for zeros, the mask of each parameter; keep them with `train.Masks` in further training.
    """

    model: nn.Module
    plan: ModelPlan
    report: Report
    masks: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path, *, extra: Mapping[str, bytes] | None = None) -> Path:
        """The folder written: model, plan and report, in safetensors, JSON and HTML; see `deploy.save_model`.

        Args:
            extra: further files by name.
        """
        with TemporaryDirectory() as drafts:
            plan = self.plan.save(Path(drafts) / _PLAN).read_bytes()
            page = self.report.to_html(Path(drafts) / "report.html").read_bytes()
        own = {_PLAN: plan, "report.json": self.report.to_dict(), "report.html": page}
        return save_model(self.model, folder, extra={**(extra or {}), **own})


def load(folder: str | Path, *, trust: Sequence[str] = ()) -> Pruned:
    """What `Pruned.save` wrote; the model has every width of its own and the same bits.

    Args:
        trust: packages of your own whose classes the model may use; see `deploy.load_model`.

    Raises:
        FileError: a file is missing, truncated, tampered with, or of another release.
    """
    model = load_model(folder, trust=trust)
    with TemporaryDirectory() as drafts:
        file = Path(drafts) / _PLAN
        file.write_bytes(load_extra(folder, _PLAN))
        plan = ModelPlan.load(file)
    report = Report.from_dict(load_extra(folder, "report.json"))
    return Pruned(model, plan, report, plan.masks(model) if plan.structure is None else {})


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    budget: str | Budget | None = None,
    *,
    method: str | None = None,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    recover: FineTune | None = None,
    recalibrate: bool = True,
    measure: bool = True,
    sensitivities: Sequence[float] = (),
    budgets: Sequence[str] = (),
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    on_stage: Stage | None = None,
    on_step: Callable[[Any], None] | None = None,
    on_block: Callable[[Any], None] | None = None,
    name: str | None = None,
    repair: Repair | None = None,
    **options: Any,
) -> Pruned:
    """`model` pruned to `budget`: units found, scored and chosen, cut out, proven, repaired and measured.

    With channels, the default, or whole layers the result is physically smaller; with single weights it has zeros.

    Args:
        model: any module whose forward runs on the example inputs; untouched unless `inplace`. Of one that
            `torch.compile`, `DataParallel` or `DistributedDataParallel` wraps, the module inside is pruned: wrap the
            result again.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords; by default the inputs of the
            first batch of `data`, which then must be something to go through more than once.
        budget: as "macs<=50%", "sparsity=90%", "2:4"; several joined with ",".
        method: a published system of the catalogue that decides in place of `options`; it takes its own options then.
        data: batches for criteria, batch-norm recalibration and fine-tuning, read only where one of these needs them.
            What can be gone through only once, as a generator, is kept in memory.
        test: batches on which quality is measured before and after; nothing is chosen by it.
        loss: `(output, target) -> scalar`; by default the output's own loss, or cross-entropy.
        recover: fine-tuning after the cut; None for none.
        recalibrate: whether batch-norm statistics are measured again on `data`, where there is both.
        measure: whether latency is measured, before and after in one run.
        sensitivities: sparsities at which each group alone is pruned and tested, for the report; needs `test`.
        budgets: others for the same model, cut and tested without training, for the report; needs `test`.
        inplace: the result's modules take the place of those of `model`, which is also the result's model.
        checkpoint: a folder in which the plan and the training are kept, so that a killed run resumes to the same
            result; nothing is kept without it.
        on_stage, on_step, on_block: told the name of each stage, each training step, and each block of a method that
            goes through a model block by block, for a progress bar.
        name: of the model, for the report.
        repair: `(model, plan) -> model`, a copy of the same shapes with other weights, perhaps with biases that were
            not there, to which the plan is applied; a closed-form solver of a method.
        options: of `plan`: criterion, allocation, granularity, scope, ignore, floor, round_to, seed …

    Raises:
        SecateursError: as `plan` does; a `ProofError` if the cut is not equal to the zeros.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> prune(net, torch.ones(1, 8), "macs<=50%", measure=False).model[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    if budget is None:
        raise OptionError('prune needs a budget, such as budget="macs<=50%".')
    model = unwrapped(model)
    if example_inputs is None:
        data = batches_of(data)
        example_inputs = inputs_like(data)
    if method is not None:
        common = {
            "data": data, "test": test, "loss": loss, "recover": recover, "recalibrate": recalibrate,
            "measure": measure, "sensitivities": sensitivities, "budgets": budgets, "inplace": inplace,
            "checkpoint": checkpoint, "on_stage": on_stage, "on_step": on_step, "name": name,
        }  # fmt: skip
        if on_block is not None and _takes(method, "on_block"):
            common["on_block"] = on_block
        return _by_method(method, options, budget)(model, example_inputs, budget, **common, **options)
    batches = batches_of(data)
    _check_options(options, recover, batches)
    tests = None if test is None else take(test, what="test data")
    if tests is None and (sensitivities or budgets):
        raise OptionError("sensitivities= and budgets= are measured on test data: pass test=.")
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    folder = checkpoint_folder(checkpoint)
    with clock("planning"):
        decided = _planned(model, example_inputs, budget, folder, data=batches, loss=loss, **options)
    seed, source = decided.recipe.seed, model
    if repair is not None:
        with clock("repairing"), seeded(seed, "repairing"):
            source = repair(model, decided)
    with clock("cutting"):
        made, masks, notes.proof = _applied(source, decided)
    if tests is not None:
        with clock("testing"):
            notes.quality["before"] = quality_of(model, tests)
            notes.quality["one-shot"] = quality_of(made, list(decided.recode_batches(tests)))
    if tests is not None and (sensitivities or budgets):
        with clock("sweeping"), seeded(seed, "sweeping"):
            _sweep(model, decided, notes, tests, batches if recalibrate else None, sensitivities, budgets, measure)
    return completed(
        model, made, decided, masks, example_inputs, notes, clock, data=batches, tests=tests, loss=loss,
        recover=recover, recalibrate=recalibrate, measure=measure, inplace=inplace, folder=folder, on_step=on_step,
    )  # fmt: skip


def completed(
    model: nn.Module,
    made: nn.Module,
    plan: ModelPlan,
    masks: dict[str, Tensor],
    example_inputs: Any,
    notes: Findings,
    clock: Clock,
    *,
    data: Iterable[Any] | None,
    tests: list[Any] | None,
    loss: Loss | None,
    recover: FineTune | None,
    recalibrate: bool,
    measure: bool,
    inplace: bool,
    folder: Path | None,
    on_step: Callable[[Any], None] | None,
) -> Pruned:
    """What was decided for `model`, recalibrated, recovered, measured and reported: the second half of `prune`.

    Args:
        model: the original.
        made: a copy to which the plan was applied; it is changed.
        masks: for zeros; see `Pruned`.
        notes, clock: of the first half; they are added to.
        folder: of the checkpoint.
        others: as for `prune`.
    """
    seed = plan.recipe.seed
    # All data is for the model that was made, whose ids may have other numbers.
    tests, data = None if tests is None else list(plan.recode_batches(tests)), plan.recode_batches(data)
    if data is not None and recalibrate:
        with clock("recalibrating"), seeded(seed, "recalibrating"):
            layers = recalibrate_batch_norm(made, data)
        if layers and tests is not None:
            notes.quality["batch-norm recalibrated"] = quality_of(made, tests)
    if recover is not None:
        with clock("recovering"):
            where = None if folder is None else folder / "recovery"
            own = plan.recode_batches(recover.data)
            notes.history = (recover if own is recover.data else replace(recover, data=own)).run(
                made, model, recover.training_data(data), masks=masks or None, loss=loss, seed=seed, checkpoint=where,
                on_step=on_step,
            )  # fmt: skip
        if tests is not None:
            notes.quality["recovered"] = quality_of(made, tests)
    with clock("measuring"):
        report = summarize(model, made, plan, example_inputs, notes, timed=measure)
    if inplace:
        made = take_place(model, made)
    return Pruned(made, plan, report, masks)


def _check_options(options: Mapping[str, Any], recover: FineTune | None, data: Iterable[Any] | None) -> None:
    """Refuse before anything is done what would fail later.

    Raises:
        OptionError: an unknown option, or a recovery that is no recipe, has no data or no teacher.
    """
    known = [name for name, p in signature(recipe_of).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in sorted(options.keys() - {*known}):
        raise unknown_name("option", option, [*known, *signature(prune).parameters])
    if not (recover is None or isinstance(recover, FineTune)):
        raise OptionError(f"recover= takes a FineTune, such as sec.FineTune(epochs=10), got {recover!r}.")
    if recover is not None:
        recover.training_data(data)
        if recover.distill and options.get("granularity") == "embedding":
            raise OptionError("distill=True needs a teacher with the same ids, and some of them go; leave it out.")


def inputs_like(data: Iterable[Any] | None) -> Any:
    """The inputs of the first batch of `data`, without labels.

    Raises:
        OptionError: there are no data to take them from.
    """
    if data is None:
        raise OptionError("prune needs example_inputs= to run the model on, or data= to take them from.")
    inputs = split(take(data, 1)[0])[0]
    return {k: v for k, v in inputs.items() if k != "labels"} if isinstance(inputs, dict) else inputs


def _sweep(
    model: nn.Module, decided: ModelPlan, notes: Findings, tests: list[Any], data: Any, shares: Sequence[float],
    budgets: Sequence[str], timed: bool,
) -> None:  # fmt: skip
    notes.sensitivity = sensitivity(model, decided, tests, shares) if shares else {}
    notes.front = front(model, decided, budgets, tests, data=data, timed=timed)


def _takes(name: str, argument: str) -> bool:
    """Whether the method called `name` has an argument of its own of that name."""
    return argument in signature(_method(name).run).parameters


def _method(name: str) -> Method:
    # Methods stand on this module, so that they are known only once it is there.
    import_module(f"{__package__}.methods")
    return get_method(name)


def _by_method(name: str, options: Mapping[str, Any], budget: str | Budget) -> Callable[..., Pruned]:
    chosen = _method(name)
    run: Callable[..., Pruned] = chosen.run
    if "builder" in chosen.needs:
        raise OptionError(f"{name} compares trainings of a fresh network: call {run.__module__}.{run.__qualname__}.")
    pattern = Budget.parse(budget).pattern
    if pattern is not None and not _ZEROS & {*chosen.units}:
        raise BudgetError(
            f"{pattern} is a pattern of single weights, and {name} removes {' and '.join(chosen.units)} units: ask it "
            "for sparsity=50% or params<=70%, say, or take a method that leaves zeros, such as sparsegpt."
        )
    record, given = hyperparameters(run), options.get("options")
    if given is not None and record is not None and not isinstance(given, record):
        raise OptionError(
            f"the hyperparameters of {name} are a {record.__name__} of {record.__module__}, such as "
            f"options={record.__name__}(); got {given!r}."
        )
    own = [option for option in options if option not in (*_SHARED, *signature(run).parameters)]
    if own:
        raise OptionError(
            f"method {name!r} leaves no choice of {', '.join(own)}; its hyperparameters are given as options=…, or "
            "leave out method= and choose all yourself."
        )
    return run


def _planned(
    model: nn.Module, example_inputs: Any, budget: str | Budget, folder: Path | None, **options: Any
) -> ModelPlan:
    """The plan, from the checkpoint if that holds one of the same model, budget and options."""
    if folder is None:
        return make_plan(model, example_inputs, budget, **options)
    file = folder / _PLAN
    asked = recipe_of(budget, **options)
    if file.exists():
        known = ModelPlan.load(file)
        if known.recipe != asked or known.digest != digest(model):
            raise other_run(folder)
        return replace(known, example_inputs=example_inputs)
    made = make_plan(model, example_inputs, budget, **options)
    made.save(file)
    return made


def _applied(model: nn.Module, decided: ModelPlan) -> tuple[nn.Module, dict[str, Tensor], float | None]:
    if decided.structure is None:
        return decided.mask(model), decided.masks(model), None
    smaller, error = decided.proven_cut(model)
    return smaller, {}, error
