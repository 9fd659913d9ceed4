"""`secateurs prune`: a model and a budget in, a smaller model and its report out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import (
    Floor,
    Granularity,
    Model,
    Opening,
    Output,
    Settings,
    filled,
    floor_of,
    settings_of,
)
from ._session import Session, Stages, session

if TYPE_CHECKING:
    from ..core.plan import Recipe
    from ..integrations import Batches, LoadedModel, Loader
    from ..pruning import FineTune, Pruned

__all__ = ["prune"]

_DATA = (
    "a folder with one folder of pictures a class, an .npz file with arrays x and y, a .txt file, the name of a "
    "Hugging Face data set, or module:loader"
)
# What the result does not depend on.
_BESIDE = ("out", "export", "resume", "as_json", "quiet", "debug")
# Sparsities at which each group is tested alone.
_SHARES = (0.25, 0.5, 0.75)
# Units of methods that are cut out.
_WHOLE = {"channel", "head", "layer", "neuron"}
# A layer of fewer units takes about the same time at half its width.
_NARROW = 32


class Export(str, Enum):
    """What else to write."""

    onnx = "onnx"
    program = "program"
    huggingface = "huggingface"


_SUFFIXES = {Export.onnx: ".onnx", Export.program: ".pt2", Export.huggingface: ".hf"}


def prune(
    context: typer.Context,
    *,
    model: Model,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            help='What may be left, as "macs<=50%", "latency<=3ms", "sparsity=90%" or "2:4".',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the result; a saved model there is replaced.", show_default=False)
    ],
    data: Annotated[str | None, typer.Option("--data", help=f"For scoring, statistics and recovery: {_DATA}.")] = None,
    train_data: Annotated[
        str | None, typer.Option("--train-data", help="For recovery.", show_default="all of --data")
    ] = None,
    test_data: Annotated[
        str | None, typer.Option("--test-data", "--test", help="For measuring quality; nothing is chosen by it.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME",
            help="Measure a language model on this task of lm-eval, as arc_easy, or of a YAML file; repeatable.",
        ),
    ] = None,
    tasks_limit: Annotated[
        int | None, typer.Option("--tasks-limit", min=1, help="Examples of each task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples a batch of data.")] = 32,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Batches of --data for scoring and statistics.")] = 32,
    method: Annotated[
        str | None, typer.Option("--method", help="A published system that decides; see `secateurs methods`.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="How units are scored; see `secateurs methods --criteria`.",
            show_default="magnitude; token-frequency for embedding with --data",
        ),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option("--allocation", help="How much goes from where.", show_default="global")
    ] = None,
    granularity: Granularity = None,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="Layers to prune, by name or pattern; repeatable.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Layers to leave alone, by name or pattern; repeatable.")
    ] = None,
    floor: Floor = None,
    round_to: Annotated[
        int | None, typer.Option("--round-to", min=1, help="Kept widths are multiples of it.", show_default="1")
    ] = None,
    settings: Settings = None,
    recover_epochs: Annotated[
        int, typer.Option("--recover-epochs", min=0, help="Passes of fine-tuning after the cut.")
    ] = 0,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the fine-tuning.")] = 0.01,
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adam or adamw.")] = "sgd",
    distill: Annotated[bool, typer.Option("--distill", help="The unpruned model teaches the pruned one.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also test each group pruned alone, for the report.")
    ] = False,
    other_budgets: Annotated[
        list[str] | None,
        typer.Option("--other-budget", help="Also test this budget, without recovery, for the report; repeatable."),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time both models in one run.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    export: Annotated[
        list[Export] | None,
        typer.Option(
            "--export", help="Also write OUT.onnx, OUT.pt2, or the folder OUT.hf for from_pretrained; repeatable."
        ),
    ] = None,
    opening: Opening,
    output: Output,
) -> None:
    """Prune a model to a budget; save the result, its plan and its report.

    The model itself is never changed. A run that is killed goes on with --resume to the same result.
    """
    with session(**vars(output), threads=opening.threads) as talk:
        from .. import pruning
        from ..integrations.onnx import files_of
        from . import _tasks, _work

        given = context.params
        options = _plan_options(given)
        recipe = _checked(given, options)
        place = _work.checked_out(out, model)
        if Export.huggingface in (export or []):
            _work.checked_beside(_beside(place, Export.huggingface))
        source = opening.load(model)
        known, tests = _opened(source, data, "train", given), _opened(source, test_data, "test", given)
        source = _with_examples(source, known or tests, opening.batch).to(opening.device)
        options |= _of_tokenizer(source, options)
        answering = _tasks.answering(source, tasks, tasks_limit, opening.seed)
        for note in _announcements(recipe, method, source, test_data or tasks):
            talk.say(f"note: {note}")
        work = _work.opened(place, given, _BESIDE, resume)
        try:
            with Stages(talk) as stages:
                answered = answering(stages, source.model)
                made = pruning.prune(
                    source.model,
                    source.example_inputs,
                    budget,
                    method=method,
                    data=None if known is None else known.sample(limit),
                    test=tests,
                    recover=_recovery(given, _opened(source, train_data, "train", given) or known),
                    measure=measure,
                    **_sweep(sensitivity, other_budgets or []),
                    checkpoint=work,
                    on_stage=stages.begin,
                    on_step=stages.step,
                    on_block=stages.step,
                    name=source.name,
                    **options,
                )
                made.report = _tasks.with_answers(made.report, answered, answering(stages, made.model))
        except Exception:
            # Whatever stopped the run, its work folder is either worth keeping or in the way of the next one.
            if not _work.close_if_unused(work):
                talk.say(f"note: what is done so far is kept in {work}; --resume goes on from there.")
            raise
        made.report = replace(made.report, command=_command(context))
        source = replace(source, example_inputs=made.plan.recode(source.example_inputs))
        graph = files_of(made.model, source.example_inputs)
        made.save(place, extra=graph)
        _work.close(work)
        files = {
            "model": str(place),
            "page": str(place / "report.html"),
            **({"ONNX": str(place / "model.onnx")} if graph else {}),
        }
        try:
            files |= _exported(made, source, place, export or [])
        except Exception:
            talk.say(f"note: {made.report.headline()}")
            talk.say(f"note: the result is whole in {place}, where secateurs.load finds it; only the export failed.")
            raise
        _tell(talk, made, files)


def _plan_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `plan` that were given; what was not keeps its default.

    Raises:
        OptionError: an option that the method does not leave to the user, or does not have.
    """
    names = ("criterion", "allocation", "granularity", "scope", "ignore", "round_to", "seed")
    chosen = {**{name: given[name] for name in names}, "floor": floor_of(given["floor"])}
    options = {name: value for name, value in chosen.items() if value not in (None, [], ())}
    extra = settings_of(given["settings"])
    if given["method"] is None:
        return {**options, "criterion_options": extra} if extra else options
    return {**options, **_method_options(given["method"], options, extra)}


def _method_options(method: str, options: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The method's hyperparameters, as the dataclass that its `options` takes; nothing if none were given.

    Raises:
        OptionError: an option of `plan` that the method decides itself, or a hyperparameter that it does not have.
    """
    from .. import methods as _room  # noqa: F401  (registers them)
    from ..core.catalogue import get_method, hyperparameters
    from ..core.errors import OptionError

    run = get_method(method).run
    own = [name for name in options if name not in ("scope", "ignore", "seed", *signature(run).parameters)]
    if own:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        raise OptionError(f"{method} decides {words} itself: leave that out, or --method.")
    return {"options": filled(hyperparameters(run), method, extra)} if extra else {}


def _checked(given: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe | None:
    """The recipe, None if a method has its own; every name in it is known before a model is loaded."""
    from ..core.allocate import get_allocation
    from ..core.budget import Budget
    from ..core.catalogue import get_method
    from ..core.errors import OptionError
    from ..criteria import get_criterion
    from ..planning import Granularity as Units
    from ..planning import recipe_of

    for budget in (given["budget"], *(given["other_budgets"] or ())):
        Budget.parse(budget)
    if given["recover_epochs"] and given["data"] is None and given["train_data"] is None:
        raise OptionError("--recover-epochs needs data to train on: give --data or --train-data.")
    if (given["sensitivity"] or given["other_budgets"]) and given["test_data"] is None:
        raise OptionError("--sensitivity and --other-budget are measured on --test-data: give it.")
    if given["granularity"] == "embedding" and given["tasks"]:
        raise OptionError("--tasks asks with the old tokenizer, and granularity embedding changes ids: leave it out.")
    if given["method"] is not None:
        if "data" in get_method(given["method"]).needs and given["data"] is None and given["train_data"] is None:
            raise OptionError(f"method {given['method']!r} looks at data: give --data.")
        return None
    recipe = recipe_of(given["budget"], data=given["data"], **options)
    Units.parse(recipe.granularity)
    get_allocation(recipe.allocation)
    if not get_criterion(recipe.criterion).data_free and given["data"] is None:
        raise OptionError(f"criterion {recipe.criterion!r} looks at data: give --data.")
    return recipe


def _of_tokenizer(source: LoadedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where rows of embeddings go: the tokenizer's special ids, which stay, and that of unknown tokens."""
    from ..integrations.pretrained import has_tokenizer
    from ..integrations.text import tokenizer_of

    text = source.text
    if options.get("granularity") != "embedding" or text is None or not has_tokenizer(text.tokenizer):
        return {}
    tokenizer = tokenizer_of(text)
    return {"keep_ids": tokenizer.all_special_ids, "unknown": tokenizer.unk_token_id}


def _opened(source: LoadedModel, spec: str | None, split: Any, given: Mapping[str, Any]) -> Batches | Loader | None:
    from ..core.errors import DataError
    from ..integrations import load_data

    if spec is None:
        return None
    if split == "test" and spec.endswith(".txt") and source.text is not None and not source.text.causal:
        raise DataError(
            f"{source.name} does not predict the next token, so plain text cannot test it: give module:loader."
        )
    return load_data(
        spec, split=split, images=source.images, text=source.text, size=given["batch_size"], seed=given["seed"]
    )


def _with_examples(source: LoadedModel, data: Batches | Loader | None, samples: int) -> LoadedModel:
    from ..core.batch import take

    return source.runnable() if data is None else source.with_examples(take(data, 1, "data")[0], samples).runnable()


def _announcements(recipe: Recipe | None, method: str | None, source: LoadedModel, tested: Any) -> list[str]:
    """What a person would rather know before the run than after it."""
    from ..core.catalogue import get_method
    from ..planning import Granularity as Units

    widest = max((p.shape[0] for p in source.model.parameters() if p.dim() > 1), default=0)
    cut = bool(Units.parse(recipe.granularity).kinds if recipe else _WHOLE & {*get_method(method or "").units})
    notes = []
    if not cut:
        instead = "; --granularity channel makes it smaller" if recipe and not recipe.budget.pattern else ""
        notes.append(
            "what goes becomes zero in tensors of the same shape, so the file and the latency stay those of the dense "
            f"model{instead}."
        )
    elif widest < _NARROW:
        notes.append(
            f"the widest layer has {widest} units; the cut model is smaller, but layers this narrow hardly run faster."
        )
    if not tested:
        notes.append("without --test-data the quality of the model is not measured.")
    return notes


def _recovery(given: Mapping[str, Any], data: Batches | Loader | None) -> FineTune | None:
    from ..pruning import FineTune

    if not given["recover_epochs"]:
        return None
    return FineTune(
        epochs=given["recover_epochs"],
        lr=given["lr"],
        optimizer=given["optimizer"],
        distill=given["distill"],
        data=data,
    )


def _sweep(sensitivity: bool, budgets: list[str]) -> dict[str, Any]:
    """What `prune` is to test besides; nothing if nothing is asked, since not every method can."""
    return {**({"sensitivities": _SHARES} if sensitivity else {}), **({"budgets": budgets} if budgets else {})}


def _exported(made: Pruned, source: LoadedModel, place: Path, wanted: list[Export]) -> dict[str, str]:
    """The files written beside the folder, by their kind."""
    from ..deploy import export_onnx, export_program
    from ..integrations.onnx import write_verified
    from ..integrations.pretrained import export_pretrained
    from ..onnx import OnnxModule

    tokenizer = None if source.text is None else source.text.tokenizer
    kept = {g.name: made.plan.kept_ids(g.name) for g in made.plan.groups if g.kind == "embedding"}
    to_onnx = write_verified if isinstance(made.model, OnnxModule) else export_onnx
    writers: dict[Export, Callable[..., Path]] = {
        Export.onnx: to_onnx,
        Export.program: export_program,
        Export.huggingface: partial(export_pretrained, tokenizer=tokenizer, kept=kept),
    }
    files = {}
    for kind in dict.fromkeys(wanted):
        files[kind.value] = str(writers[kind](made.model, source.example_inputs, _beside(place, kind)))
    return files


def _beside(place: Path, kind: Export) -> Path:
    """Where an export of this kind stands."""
    return place.with_name(place.name + _SUFFIXES[kind])


def _command(context: typer.Context) -> str:
    """What to type to get the same result."""
    words = ["secateurs", "prune"]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        if name in ("resume", "as_json", "quiet", "debug") or value in (parameter.default, None, [], ()):
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            text = item.value if isinstance(item, Enum) else str(item)
            option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            # A flag stands alone; one that is off has a name of its own.
            words += option if item is True else parameter.secondary_opts[:1] if item is False else [*option, text]
    return shlex.join(words)


def _tell(talk: Session, made: Pruned, files: Mapping[str, str]) -> None:
    from ..report.findings import checks

    headline, found = made.report.headline(), checks(made.report)
    verdicts = {True: ": met", False: ": NOT MET", None: ""}
    data = {
        "headline": headline,
        "checks": [vars(check) for check in found],
        "files": dict(files),
        "report": made.report.to_dict(),
    }
    talk.result(
        data,
        headline,
        *(f"{check.asked} asked, {check.got}{verdicts[check.met]}" for check in found),
        *(f"warning: {warning}" for warning in made.report.warnings),
        *(f"{kind}: {file}" for kind, file in files.items()),
    )
