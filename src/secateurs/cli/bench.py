"""`secateurs bench`: models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import MODEL, Opening, Output
from ._session import session, table

if TYPE_CHECKING:
    from ..integrations import LoadedModel
    from ..measure.latency import Latency
    from ..report.runtime import RuntimeLayer, RuntimeSummary
    from ._session import Session

__all__ = ["bench"]

# Each form of a layer is timed for this part of the time that a whole model gets.
SHARE = 10


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help=MODEL, show_default=False)],
    *,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Time to spend on each model.")] = 2.0,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Also each model with its layers in sparse forms where these are faster.")
    ] = False,
    opening: Opening,
    output: Output,
) -> None:
    """Time models in turn in one run, and compare them with the first.

    Every round runs each model once, so that what disturbs the machine disturbs all of them.
    With --sparse, each layer's dense and sparse forms are timed, and the whole against the dense model and, where it
    is installed, onnxruntime.
    """
    with session(**vars(output), threads=opening.threads) as talk:
        from ..measure.latency import compare
        from ..report.codec import encode

        opened = {name: opening.ready(model) for name, model in zip(_names(models), models, strict=True)}
        talk.say(f"timing {len(opened)} model{'s' * (len(opened) > 1)} in turn")
        timings = compare(
            {name: source.model for name, source in opened.items()},
            {name: source.example_inputs for name, source in opened.items()},
            seconds=seconds,
        )
        if len({timing.batch for timing in timings.values()}) > 1:
            talk.say("note: the models are given batches of different sizes; --input makes them equal.")
        records = [_record(name, source, timings[name]) for name, source in opened.items()]
        shown = [_table(records)]
        if sparse:
            for record, (name, source) in zip(records, opened.items(), strict=True):
                talk.say(f"timing the layers of {name} in sparse forms")
                summary = _sparse(source, seconds, talk)
                record["sparse"] = encode(summary)
                shown += [_forms(name, summary), *_whole(summary)]
        talk.result(records, *shown)


def _names(specs: list[str]) -> list[str]:
    """The models as given; one that is given again has its number behind it."""
    return [
        spec if spec not in specs[:place] else f"{spec} ({specs[: place + 1].count(spec)})"
        for place, spec in enumerate(specs)
    ]


def _record(name: str, source: LoadedModel, timing: Latency) -> dict[str, Any]:
    from ..measure.macs import macs
    from ..measure.params import bytes_in_memory, nonzeros, parameters

    speedup = timing.speedup
    return {
        "model": name,
        "params": parameters(source.model),
        "nonzero": nonzeros(source.model),
        "macs": macs(source.model, source.example_inputs),
        "bytes": bytes_in_memory(source.model),
        "latency": {"median": timing.median, "p10": timing.p10, "p90": timing.p90},
        "speedup": None if speedup is None else {"median": speedup.median, "p10": speedup.p10, "p90": speedup.p90},
        "batch": timing.batch,
        "device": timing.device,
        "threads": timing.threads,
        "repeats": timing.repeats,
    }


def _table(records: list[dict[str, Any]]) -> Any:
    from ..report.words import count, duration

    def row(record: dict[str, Any]) -> list[str]:
        time, speed = record["latency"], record["speedup"]
        return [
            record["model"],
            count(record["params"]),
            count(record["macs"]),
            duration(time["median"]),
            f"{duration(time['p10'])} – {duration(time['p90'])}",
            f"{speed['median']:.2f}× ({speed['p10']:.2f} – {speed['p90']:.2f})",
        ]

    first = records[0]
    title = f"batch {first['batch']}, {first['device']}, {first['threads']} threads, {first['repeats']} rounds"
    columns = ("model", "params>", "MACs>", "median>", "10 – 90 %>", "speed against the first>")
    return table(columns, [row(record) for record in records], title)


def _sparse(source: LoadedModel, seconds: float, talk: Session) -> RuntimeSummary:
    from ..deploy.runtime import sparse_runtime
    from ..summary import runtime_summary

    beside = _onnxruntime(source, talk)
    return runtime_summary(sparse_runtime(source.model, source.example_inputs, beside=beside, seconds=seconds / SHARE))


def _onnxruntime(source: LoadedModel, talk: Session) -> dict[str, Any]:
    """The model in onnxruntime, if that is installed and runs it."""
    from ..core.batch import device_of
    from ..core.errors import MissingExtraError, SecateursError
    from ..deploy.onnx import onnx_session

    if device_of(source.model).type != "cpu":
        return {}
    try:
        return {"onnxruntime": onnx_session(source.model, source.example_inputs)}
    except MissingExtraError:
        return {}
    except SecateursError as error:
        talk.say(f"note: without onnxruntime, since {error}")
        return {}


def _forms(name: str, summary: RuntimeSummary) -> Any:
    from ..report.words import duration, factor, shape, share

    def row(layer: RuntimeLayer) -> list[str]:
        dense, now = layer.dense_seconds, layer.seconds
        faster = "" if not dense or not now else factor(dense / now)
        times = ["" if seconds is None else duration(seconds) for seconds in (dense, now)]
        return [layer.name, layer.format, shape(layer.shape), share(layer.density), *times, faster, layer.reason]

    columns = ("layer", "form", "weight>", "not zero>", "dense>", "now>", "speed>", "why dense")
    return table(columns, [row(layer) for layer in summary.layers], f"{name}: the form of each layer")


def _whole(summary: RuntimeSummary) -> list[str]:
    from ..report.words import duration

    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in summary.seconds.items())
    return [summary.verdict, f"One pass, taken in turn: {times}."]
