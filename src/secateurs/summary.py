"""What a pruning run found, as a report: both models measured in one go and set side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .core.batch import split
from .deploy.runtime import LayerChoice, Runtime
from .deploy.size import size_on_disk
from .graph.depth.layers import LayerStructure, original_paths
from .graph.mixtures.cut import ExpertStructure
from .graph.plan import ModelPlan
from .measure.latency import Latency, compare, layer_times
from .measure.params import LayerRow, bytes_in_memory, layer_table, nonzeros, parameters
from .measure.quality import evaluate
from .recover.finetune import History
from .report.data import (
    FrontPoint,
    FrozenWidth,
    GroupChange,
    LatencySummary,
    LayerChange,
    Recovery,
    Report,
    Scores,
    Side,
    Speedup,
)
from .report.runtime import RuntimeLayer, RuntimeSummary

__all__ = ["Findings", "quality_of", "runtime_summary", "summarize", "with_runtime"]


@dataclass
class Findings:
    """What is known of a run before it is summed up.

    Args:
        model: its name.
        quality: metrics by stage: "before", "one-shot", "batch-norm recalibrated", "recovered".
        seconds: by stage.
        proof: of the cut.
        history: of the fine-tuning.
        sensitivity, front: as `sweep` returns them.
        errors: of the outputs of layers that were solved one by one.
        predicted_speedup: by the times of parts that were chosen by; None where none were.
    """

    model: str
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    proof: float | None = None
    history: History | None = None
    sensitivity: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    front: tuple[FrontPoint, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    predicted_speedup: float | None = None


def quality_of(model: nn.Module, data: Sequence[Any]) -> dict[str, float]:
    """Accuracy, negative log-likelihood and calibration error; for language models perplexity instead.

    Raises:
        DataError: the batches carry no labels.
    """
    inputs, target = split(data[0])
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    # One label a row is a class; one a token, or none at all, is a language model's.
    if target is None and (labels is None or labels.dim() > 1):
        return evaluate(model, data, ("perplexity", "nll"))
    return evaluate(model, data, ("accuracy", "nll", "ece"))


def summarize(
    before: nn.Module, after: nn.Module, plan: ModelPlan, example_inputs: Any, found: Findings, *, timed: bool = True
) -> Report:
    """The report of a run.

    Args:
        before, after: both models, measured here on `example_inputs`.
        plan: that led from one to the other.
        found: what the run noted.
        timed: whether to measure latency, in whole and per layer, interleaved.
    """
    given = {"before": example_inputs, "after": plan.recode(example_inputs)}
    rows = layer_table(before, example_inputs), layer_table(after, given["after"])
    timings = compare({"before": before, "after": after}, given) if timed else {}
    layers = (layer_times(before, example_inputs), layer_times(after, given["after"])) if timed else ({}, {})
    stages = {name: values for name, values in found.quality.items() if name != "before"}
    speedup = timings["after"].speedup if timed else None
    return Report(
        model=found.model,
        form="mask" if plan.structure is None else "cut",
        before=_side(before, rows[0], timings.get("before"), found.quality.get("before", {})),
        after=_side(after, rows[1], timings.get("after"), next(reversed(stages.values()), {})),
        budget=str(plan.recipe.budget),
        recipe=plan.recipe.to_dict(),
        layers=_layers(*rows, *layers, _path_before(before, plan), found.errors),
        groups=tuple(_group(plan, name) for name in plan.keep),
        frozen=() if plan.structure is None else tuple(FrozenWidth(**vars(f)) for f in plan.structure.frozen),
        proof=found.proof,
        warnings=plan.warnings,
        stages=stages,
        sensitivity=found.sensitivity,
        front=found.front,
        history=None if found.history is None else _recovery(found.history),
        speedup=None if speedup is None else Speedup(speedup.median, speedup.p10, speedup.p90),
        predicted_speedup=found.predicted_speedup,
        environment=environment(),
        seconds=found.seconds,
    )


def with_runtime(report: Report, runtime: Runtime) -> Report:
    """The report with what the sparse runtime made of the pruned model."""
    return replace(report, runtime=runtime_summary(runtime))


def runtime_summary(runtime: Runtime) -> RuntimeSummary:
    """The sparse runtime as a part of a report."""
    faster = runtime.speedup
    return RuntimeSummary(
        verdict=runtime.verdict,
        seconds={name: timing.median for name, timing in runtime.timings.items()},
        speedup=None if faster is None else (faster.median, faster.p10, faster.p90),
        batch=next((timing.batch for timing in runtime.timings.values()), None),
        layers=tuple(map(_form, runtime.layers)),
    )


def _form(choice: LayerChoice) -> RuntimeLayer:
    dense, now = (choice.seconds.get(form) for form in ("dense", choice.format))
    return RuntimeLayer(choice.layer, choice.format, choice.shape, choice.density, dense, now, choice.reason)


def environment() -> dict[str, Any]:
    """Versions, processor, threads and date: what a figure depends on."""
    return {
        "secateurs": version("secateurs"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _side(model: nn.Module, rows: Iterable[LayerRow], timing: Latency | None, quality: Mapping[str, float]) -> Side:
    return Side(
        params=parameters(model),
        nonzero=nonzeros(model),
        macs=sum(row.macs for row in rows),
        bytes=bytes_in_memory(model),
        disk_bytes=size_on_disk(model),
        latency=None if timing is None else _latency(timing),
        quality=quality,
    )


def _latency(timing: Latency) -> LatencySummary:
    return LatencySummary(timing.median, timing.p10, timing.p90, timing.threads, timing.batch, timing.device)


def _path_before(model: nn.Module, plan: ModelPlan) -> Callable[[str], str]:
    """From the name of a layer of the pruned model to the one it had: those behind layers that go move up."""
    layers = plan.structure
    if not isinstance(layers, LayerStructure | ExpertStructure):
        return str
    return original_paths(model, layers.gone(plan.keep))


def _layers(
    before: Sequence[LayerRow],
    after: Sequence[LayerRow],
    slow: Mapping[str, float],
    fast: Mapping[str, float],
    path_before: Callable[[str], str],
    errors: Mapping[str, float],
) -> tuple[LayerChange, ...]:
    new = {path_before(row.name): row for row in after}
    fast = {path_before(name): seconds for name, seconds in fast.items()}
    return tuple(
        LayerChange(
            name=old.name,
            kind=old.type,
            shape_before=old.weight_shape,
            shape_after=new[old.name].weight_shape,
            params_before=old.params,
            params_after=new[old.name].params,
            nonzero_after=new[old.name].nonzero,
            macs_before=old.macs,
            macs_after=new[old.name].macs,
            seconds_before=slow.get(old.name),
            seconds_after=fast.get(old.name),
            error=errors.get(old.name),
        )
        for old in before
        if old.name in new
    )


def _group(plan: ModelPlan, name: str) -> GroupChange:
    group = next(g for g in plan.groups if g.name == name)
    scores, keep = plan.scores[name], plan.keep[name]
    kept = scores[keep]
    summary = Scores(
        float(scores.min()), float(scores.median()), float(scores.max()), float(kept.min()) if len(kept) else None
    )
    return GroupChange(name, group.kind, group.size, int(keep.sum()), group.tensors[1:], summary)


def _recovery(history: History) -> Recovery:
    return Recovery("epoch", tuple({"loss": epoch.loss} for epoch in history.epochs))
