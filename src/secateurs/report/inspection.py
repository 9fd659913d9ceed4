"""An inspection as data: what of a model can go, what goes along, what a unit costs, and what stays and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import FileError
from .codec import decode, encode, settle
from .data import FrozenWidth, write

__all__ = ["Inspection", "ModelLayer", "UnitGroup", "UnitTime"]

_FORMAT = "secateurs inspection"
_VERSION = 1


@dataclass(frozen=True)
class UnitTime:
    """Seconds of one forward pass that one unit costs: the difference that a part of its group makes, by the part.

    Args:
        median, p10, p90: over rounds in which the whole and the cut model ran one after the other; negative where
            the cut model was slower.
        removed: units that were cut for it.
    """

    median: float
    p10: float
    p90: float
    removed: int

    def __post_init__(self) -> None:
        settle(self)

    @property
    def noisy(self) -> bool:
        """Whether the spread of the rounds is larger than what was measured."""
        return self.p90 - self.p10 > abs(self.median)


@dataclass(frozen=True)
class UnitGroup:
    """Units that can go one by one, and every layer that loses something with each.

    Args:
        name, kind, size: of the group; a unit is a channel, head, weight …
        tensor: where the units are first met.
        along: the other tensors that carry them.
        makers: layers whose outputs the units are.
        passing: layers that hold something for each unit and pass it on, as norms and depthwise convolutions.
        readers: layers that take the units as inputs.
        params_per_unit, macs_per_unit, bytes_per_unit: what goes with one unit while all else is whole.
        multiple: the number that stays must be a multiple of this.
        time: the share of these layers in the time of all layers; None if not measured.
        measured: what a unit costs in time; None if not measured.
        index: PQ index (p = 0.5, q = 1) of the units' magnitudes, 0 if all are equal; None without values.
        bound: the fewest units that can hold what matters, as the index implies.
    """

    name: str
    kind: str
    size: int
    tensor: str
    along: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    params_per_unit: float = 0.0
    macs_per_unit: float = 0.0
    bytes_per_unit: float = 0.0
    multiple: int = 1
    time: float | None = None
    measured: UnitTime | None = None
    index: float | None = None
    bound: int | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class ModelLayer:
    """One layer of the model.

    Args:
        name: qualified name; "" is the model itself.
        kind: its class, as "Conv2d".
        shape: of its weight.
        params: entries of its own parameters.
        macs: multiply–accumulates of one forward pass.
        stays: reasons for which its output width stays, or may stay where there are several; empty if it can go.
    """

    name: str
    kind: str = ""
    shape: tuple[int, ...] = ()
    params: int = 0
    macs: float = 0.0
    stays: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What of a model can go, what goes along with it, and what stays and why.

    Args:
        model: its name, for people.
        params, macs, bytes: of the whole model; MACs for the example inputs.
        groups: what can go, in the order of the forward pass.
        layers: in the same order.
        frozen: the widths that stay.
        unknown: ops without a rule, and a module that calls each.
        params_in_reach, macs_in_reach: shares that lie along a width that can go.
    """

    model: str
    params: float
    macs: float
    bytes: float
    groups: tuple[UnitGroup, ...] = ()
    layers: tuple[ModelLayer, ...] = ()
    frozen: tuple[FrozenWidth, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    params_in_reach: float = 0.0
    macs_in_reach: float = 0.0

    def __post_init__(self) -> None:
        settle(self)

    def __str__(self) -> str:
        """The inspection as plain text for a terminal; long lists stop at ten."""
        from .inspection_text import to_text

        return to_text(self)

    def to_html(self, path: str | Path) -> Path:
        """The path to which the inspection was written as one self-contained page, with a drawing of the groups.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        from .inspection_page import render

        return write(path, render(self))

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values, with a format and a version."""
        return {"format": _FORMAT, "version": _VERSION, **encode(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Inspection:
        """The inspection that `to_dict` wrote.

        Raises:
            FileError: another format or version, a field that is unknown, missing or of the wrong type.
        """
        if not isinstance(data, Mapping) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            raise FileError(f"this is not an inspection of version {_VERSION}: make one with Inspection.to_dict.")
        return decode(
            cls, {name: node for name, node in data.items() if name not in ("format", "version")}, "inspection"
        )
