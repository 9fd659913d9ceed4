"""A pruning run as data: what was asked, what came of it, what changed, and how to do it again.

Everything but the model's name, the form and the two sides may be left out; what is left out is said to be unknown
where it matters and is not mentioned elsewhere. Constructors take lists for tuples, arrays' scalars for numbers and
any object with a meaningful `str()`, such as a `Budget` or a device, for text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.errors import FileError, OptionError
from .codec import decode, encode, plain, settle
from .runtime import RuntimeSummary

__all__ = [
    "FrontPoint",
    "FrozenWidth",
    "GroupChange",
    "LatencySummary",
    "LayerChange",
    "Recovery",
    "Report",
    "Scores",
    "Side",
    "Speedup",
    "write",
]

_FORMAT = "secateurs report"
_VERSION = 1


@dataclass(frozen=True)
class LatencySummary:
    """Time of one forward pass.

    Args:
        median, p10, p90: seconds, over repeated runs.
        threads: CPU threads within an op; None where they do not matter.
        batch: number of samples; None if unknown.
        device: as "cpu" or "cuda:0".
    """

    median: float
    p10: float
    p90: float
    threads: int | None = None
    batch: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Speedup:
    """How many times faster the pruned model is, from runs side by side.

    Args:
        median: over the rounds; below 1 it is slower.
        p10, p90: 10th and 90th percentile.

    Raises:
        OptionError: a figure is not positive and finite.
    """

    median: float
    p10: float
    p90: float

    def __post_init__(self) -> None:
        settle(self)
        for figure in (self.median, self.p10, self.p90):
            if not 0 < figure < math.inf:
                raise OptionError(f"a speed-up is how many times faster, so finite and more than 0; got {figure}.")


@dataclass(frozen=True)
class Side:
    """A model before or after pruning; None stands for "not known".

    Args:
        params: entries of all parameters.
        nonzero: those that are not zero.
        macs: multiply–accumulates of one forward pass.
        bytes: of parameters and buffers in memory.
        disk_bytes: of the saved file or folder.
        latency: of one forward pass.
        quality: metric name to value, the one that matters most first; shares in [0, 1].
    """

    params: int
    nonzero: int | None = None
    macs: float | None = None
    bytes: int | None = None
    disk_bytes: int | None = None
    latency: LatencySummary | None = None
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after.

    Args:
        name: qualified name.
        kind: its class, as "Conv2d".
        shape_before, shape_after: of its weight; an empty shape after says that the layer is gone.
        params_before, params_after: entries of its own parameters.
        nonzero_after: those that are not zero; None if not counted.
        macs_before, macs_after: multiply–accumulates of one forward pass.
        seconds_before, seconds_after: of one forward pass; None if not measured.
        error: ‖WX − W'X‖²/‖WX‖² on calibration data, of a method that solves layer by layer; None of others.
    """

    name: str
    kind: str = ""
    shape_before: tuple[int, ...] = ()
    shape_after: tuple[int, ...] = ()
    params_before: int = 0
    params_after: int = 0
    nonzero_after: int | None = None
    macs_before: float = 0.0
    macs_after: float = 0.0
    seconds_before: float | None = None
    seconds_after: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Scores:
    """Scores of one group's units, on whatever scale the criterion has.

    Args:
        low, median, high: smallest, middle and largest.
        threshold: the lowest score that stays; None if no unit stays.
    """

    low: float
    median: float
    high: float
    threshold: float | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class GroupChange:
    """One group of coupled units.

    Args:
        name: of the group: the layer or tensor whose units were chosen.
        kind: what a unit is: channel, head, weight …
        size, kept: units before and after.
        layers: tensors that go along, by qualified name; a blank and a word such as "inputs" may follow.
        scores: of the units.

    Raises:
        OptionError: `kept` is not in [0, size].
    """

    name: str
    kind: str
    size: int
    kept: int
    layers: tuple[str, ...] = ()
    scores: Scores | None = None

    def __post_init__(self) -> None:
        settle(self)
        if not 0 <= self.kept <= self.size:
            raise OptionError(f"group {self.name} of {self.size} units keeps {self.kept}: it must be 0 to {self.size}.")

    @property
    def sparsity(self) -> float:
        """The share of units removed."""
        return 1 - self.kept / self.size if self.size else 0.0


@dataclass(frozen=True)
class FrozenWidth:
    """An axis that could not be pruned.

    Args:
        tensor, axis: where it was met first.
        size: number of positions.
        reason: why it stays, with the op and the layer that decided it.
    """

    tensor: str
    axis: int
    size: int
    reason: str

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Recovery:
    """How the metrics moved while training repaired the model.

    Args:
        unit: what one entry of `values` stands for.
        values: metric name to value. An entry may have its own position under the unit's name ("epoch" or "step"),
            else they count from 1. Where `x_low` and `x_high` stand beside `x`, they are drawn as its band.
    """

    unit: Literal["epoch", "step"] = "epoch"
    values: tuple[Mapping[str, float], ...] = ()

    def __post_init__(self) -> None:
        settle(self)
        if self.unit not in ("epoch", "step"):
            raise OptionError(f"the unit of a recovery is 'epoch' or 'step', got {self.unit!r}.")


@dataclass(frozen=True)
class FrontPoint:
    """One budget on the front between cost and quality.

    Args:
        budget: as text.
        macs_left, latency_left: what is left, as shares of the unpruned model; None if not measured.
        quality: the first metric of the report's sides; None if not measured.
    """

    budget: str
    macs_left: float | None = None
    latency_left: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One pruning run.

    Args:
        model: its name, for people.
        form: "cut" for a smaller model, "mask" for zeros in the same shapes.
        before, after: the model on either side.
        budget: what was asked, in the budget grammar; empty if nothing was.
        recipe: criterion, allocation and their options, as JSON values.
        layers: in the order of the forward pass.
        groups: what could go, in the same order; also those that stay whole.
        frozen: what could not go.
        proof: largest relative difference between the outputs of the cut and the masked model; None if not run.
        warnings: what a person should know, one sentence each.
        stages: quality at each stage between `before` and `after`, in order: "one-shot", "recovered" …
        sensitivity: per group (sparsity, quality) pairs with only this group pruned.
        front: other budgets for the same model.
        history: of the recovery.
        speedup: measured side by side; a (median, p10, p90) tuple is taken too. Without it the two latencies count.
        predicted_speedup: what the method expected from the times of parts that it chose by, on the machine where it
            chose; None of methods that do not say.
        runtime: the pruned model in its sparse runtime; None if none was made.
        environment: python, torch, secateurs, cpu, threads, date …
        seconds: per stage of the run.
        command: what to type to get the same result.

    Raises:
        OptionError: another form, or a predicted speed-up that is not positive and finite.
    """

    model: str
    form: Literal["cut", "mask"]
    before: Side
    after: Side
    budget: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[LayerChange, ...] = ()
    groups: tuple[GroupChange, ...] = ()
    frozen: tuple[FrozenWidth, ...] = ()
    proof: float | None = None
    warnings: tuple[str, ...] = ()
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sensitivity: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    front: tuple[FrontPoint, ...] = ()
    history: Recovery | None = None
    speedup: Speedup | None = None
    predicted_speedup: float | None = None
    runtime: RuntimeSummary | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    command: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", str(self.budget))
        if isinstance(self.speedup, (tuple, list)):
            object.__setattr__(self, "speedup", Speedup(*self.speedup))
        settle(self)
        for name in ("recipe", "environment"):
            # Their values have no type that could tell the string "NaN" from the number when they are read again.
            object.__setattr__(self, name, plain({key: _open(item) for key, item in getattr(self, name).items()}))
        if self.form not in ("cut", "mask"):
            raise OptionError(f"the form of a pruned model is 'cut' or 'mask', got {self.form!r}.")
        if self.predicted_speedup is not None and not 0 < self.predicted_speedup < math.inf:
            raise OptionError(f"a predicted speed-up is finite and more than 0; got {self.predicted_speedup}.")

    def headline(self) -> str:
        """One plain sentence: what got smaller and faster, and what did not."""
        from .headline import headline

        return headline(self)

    def to_text(self) -> str:
        """The report as plain text for a terminal; long lists stop at ten."""
        from .text import to_text

        return to_text(self)

    def to_html(self, path: str | Path) -> Path:
        """The path to which the report was written as one self-contained page.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        from .page import render

        return write(path, render(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, with a format and a version."""
        release = str(self.environment.get("secateurs", ""))
        return {"format": _FORMAT, "version": _VERSION, "secateurs": release, **encode(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote.

        Raises:
            FileError: another format or version, a field that is unknown, missing or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise FileError("this is not a report of secateurs: make one with Report.save.")
        release = data.get("secateurs") or "an unknown release"
        if data.get("version") != _VERSION:
            raise FileError(
                f"the report has format version {data.get('version')!r}, written by secateurs {release}; this release "
                f"reads version {_VERSION}: install the one that wrote it, or make the report again."
            )
        body = {name: node for name, node in data.items() if name not in ("format", "version", "secateurs")}
        try:
            return decode(cls, body, "report")
        except FileError as fault:
            raise FileError(f"{fault}; the report was written by secateurs {release}.") from fault

    def save(self, path: str | Path) -> Path:
        """The path to which the report was written as JSON."""
        return write(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report in a file that `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or not such a report; it is named.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(f"{path} cannot be read as a report ({error}).") from error
        except FileError as fault:
            raise FileError(f"{path}: {fault}") from fault


def _open(node: Any) -> Any:
    """`plain(node)` with numbers that are not finite as text."""
    if isinstance(node, float) and not math.isfinite(node):
        return encode(float(node))
    if isinstance(node, Mapping):
        return {key: _open(item) for key, item in node.items()}
    return [_open(item) for item in node] if isinstance(node, tuple) else node


def write(path: str | Path, text: str) -> Path:
    """The path, with `text` in it; the file before it is whole until then."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target
