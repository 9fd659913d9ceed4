"""The words of the three-regime model: a measured cell, its regime and advice, and results that print themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from ...core.errors import OptionError

__all__ = ["ADVICE", "Advice", "Cell", "Family", "Ladder", "Regime", "Sweep", "ranked", "regime"]

Regime = Literal["I", "II-A", "II-B"]
Advice = Literal["raise", "lower", "keep"]
ADVICE: dict[Regime, Advice] = {"I": "raise", "II-A": "lower", "II-B": "keep"}
_STATE = {"I": "poorly connected", "II-A": "connected but not alike", "II-B": "connected and alike"}
_HOTTER = "fewer epochs, smaller batches, a larger learning rate or a larger SAM radius"
_COLDER = "more epochs, larger batches, a smaller learning rate or a smaller SAM radius"
_DO: dict[Advice, str] = {
    "raise": f"raise the temperature of dense training ({_HOTTER})",
    "lower": f"lower the temperature of dense training ({_COLDER})",
    "keep": "keep the temperature of dense training",
}
# Networks that are wrong on more than half of what they were trained on may be alike in being bad.
_BAD = 0.5


def regime(mc: float, cka: float, *, delta: float = 0.02, kappa: float = 0.98) -> Regime:
    """The regime of a pruned network whose retrained copies have this connectivity and likeness.

    Args:
        mc: mode connectivity of training error, a share.
        cka: of outputs.
        delta: δ, the largest barrier of a connected pair.
        kappa: κ, the least CKA of an alike pair.

    Raises:
        OptionError: a figure is NaN or infinite.

    >>> regime(-0.3, 0.9), regime(0.0, 0.95), regime(0.0, 0.995)
    ('I', 'II-A', 'II-B')
    """
    if not math.isfinite(mc) or not math.isfinite(cka):
        raise OptionError(f"a regime needs finite figures, got mc {mc} and CKA {cka}.")
    if mc < -delta:
        return "I"
    return "II-A" if cka < kappa else "II-B"


@dataclass(frozen=True)
class Cell:
    """What was measured of one dense training at one density.

    Args:
        name: of the dense training or the model.
        budget: the load, as it was asked for.
        density: share of the pruned weights that is left.
        mcs, ckas: of each pair of copies.
        errors: on test data, of each copy, in [0, 1].
        training_errors: on the sample, of each pair's ends.
        dense_errors: on test data before pruning, of each dense network.
        delta, kappa: see `regime`.
    """

    name: str
    budget: str
    density: float
    mcs: tuple[float, ...]
    ckas: tuple[float, ...]
    errors: tuple[float, ...]
    training_errors: tuple[float, ...]
    dense_errors: tuple[float, ...]
    delta: float = 0.02
    kappa: float = 0.98

    @classmethod
    def merged(cls, cells: Sequence[Cell]) -> Cell:
        """Cells of several seeds as one."""
        joined = ("mcs", "ckas", "errors", "training_errors", "dense_errors")
        found: dict[str, Any] = {n: tuple(value for cell in cells for value in getattr(cell, n)) for n in joined}
        found["density"] = fmean(cell.density for cell in cells)
        return replace(cells[0], **found)

    @property
    def mc(self) -> float:
        """Mean mode connectivity over pairs and seeds."""
        return fmean(self.mcs)

    @property
    def cka(self) -> float:
        """Mean CKA over pairs and seeds."""
        return fmean(self.ckas)

    @property
    def error(self) -> float:
        """Mean test error after retraining."""
        return fmean(self.errors)

    @property
    def training_error(self) -> float:
        """Mean training error after retraining."""
        return fmean(self.training_errors)

    @property
    def dense_error(self) -> float:
        """Mean test error before pruning."""
        return fmean(self.dense_errors)

    @property
    def regime(self) -> Regime:
        """I, II-A or II-B."""
        return regime(self.mc, self.cka, delta=self.delta, kappa=self.kappa)

    @property
    def advice(self) -> Advice:
        """What to do with the temperature: raise, lower or keep it."""
        return ADVICE[self.regime]

    @property
    def doubt(self) -> str:
        """Why the advice may mislead, a sentence; empty for no doubt."""
        if self.training_error <= _BAD:
            return ""
        return f"The copies are wrong on {self.training_error:.0%} of their training data, so likeness says little."

    def to_dict(self) -> dict[str, Any]:
        """The figures and what follows from them, as plain JSON values."""
        means = {n: getattr(self, n) for n in ("mc", "cka", "error", "training_error", "dense_error")}
        words = {"regime": self.regime, "advice": self.advice, "doubt": self.doubt}
        return {"name": self.name, "budget": self.budget, "density": self.density, **means, **words}

    def __str__(self) -> str:
        told = (
            f"{self.name} at density {self.density:.1%}: mc {self.mc:+.4f}, CKA {self.cka:.4f}, test error "
            f"{self.error:.2%} (dense {self.dense_error:.2%}). Regime {self.regime}, {_STATE[self.regime]}: "
            f"{_DO[self.advice]}."
        )
        return f"{told} {self.doubt}".rstrip()


def ranked(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The best to prune first: connected before not, then by CKA, then by training error; of equals the earlier."""
    return tuple(sorted(cells, key=lambda cell: (cell.mc < -cell.delta, -cell.cka, cell.training_error)))


def _row(cell: Cell, *more: str) -> tuple[str, ...]:
    figures = (f"{cell.mc:+.4f}", f"{cell.cka:.4f}", f"{cell.error:.2%}")
    return (cell.name, f"{cell.density:.1%}", *figures, f"{cell.dense_error:.2%}", *more, cell.regime, cell.advice)


def _columns(*more: str) -> tuple[str, ...]:
    return ("dense training", "density>", "mc>", "CKA>", "error>", "dense error>", *more, "regime", "temperature")


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text; a column whose name ends in ">" is aligned on the right."""
    heads = [name.rstrip(">") for name in columns]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if name.endswith(">") else cell.ljust(width)
            for cell, width, name in zip(cells, widths, columns, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join(line(cells) for cells in (heads, *rows))


@dataclass(frozen=True)
class Sweep:
    """A grid of temperatures and densities, from the coldest training to the hottest."""

    knob: str
    cells: tuple[Cell, ...]

    def normalised(self, cell: Cell) -> float:
        """The cell's test error less that of the best temperature at its density."""
        return cell.error - min(c.error for c in self.cells if c.budget == cell.budget)

    columns = _columns("above best>")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One a cell, for `columns`."""
        return [_row(cell, f"{self.normalised(cell):.2%}") for cell in self.cells]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "knob": self.knob,
            "cells": [{**cell.to_dict(), "above_best": self.normalised(cell)} for cell in self.cells],
        }

    def __str__(self) -> str:
        return aligned(self.columns, self.rows)


@dataclass(frozen=True)
class Family:
    """Models in the order in which they should be pruned.

    Args:
        cells: best first.
        sharpness: top Hessian eigenvalue of each dense model by name; empty if it was not asked for.
    """

    cells: tuple[Cell, ...]
    sharpness: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Cell:
        """The one to prune."""
        return self.cells[0]

    @property
    def choices(self) -> dict[str, Cell]:
        """What each rule would choose: connectivity and likeness, dense accuracy, and sharpness if it is known."""
        found = {"regime": self.chosen, "dense accuracy": min(self.cells, key=lambda cell: cell.dense_error)}
        if self.sharpness:
            found["sharpness"] = min(self.cells, key=lambda cell: abs(self.sharpness[cell.name]))
        return found

    @property
    def regrets(self) -> dict[str, float]:
        """For each rule the pruned test error of its choice less that of the best of the family."""
        best = min(cell.error for cell in self.cells)
        return {rule: cell.error - best for rule, cell in self.choices.items()}

    columns = _columns()

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One a model, best first, for `columns`."""
        return [_row(cell) for cell in self.cells]

    @property
    def sentence(self) -> str:
        """What to prune, and what each rule of choice costs."""
        costs = "; ".join(f"by {r}: {self.choices[r].name}, {regret:.2%}" for r, regret in self.regrets.items())
        return f"Prune {self.chosen.name}. Test error above the best of the family: {costs}."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rules = {r: {"chosen": self.choices[r].name, "regret": regret} for r, regret in self.regrets.items()}
        ranking = [cell.to_dict() for cell in self.cells]
        return {"chosen": self.chosen.name, "ranking": ranking, "rules": rules, "sharpness": dict(self.sharpness)}

    def __str__(self) -> str:
        return f"{aligned(self.columns, self.rows)}\n{self.sentence}"


@dataclass(frozen=True)
class Ladder:
    """What was seen on the way to the right setting of a knob, for each density.

    Args:
        knob: that was turned.
        climbs: for each density the cells in the order in which they were measured.
    """

    knob: str
    climbs: tuple[tuple[Cell, ...], ...]

    @property
    def chosen(self) -> tuple[Cell, ...]:
        """One for each density."""
        return tuple(ranked(cells)[0] for cells in self.climbs)

    columns = _columns("chosen")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One a cell, in the order measured, for `columns`."""
        return [
            _row(cell, "yes" if cell is best else "")
            for cells, best in zip(self.climbs, self.chosen, strict=True)
            for cell in cells
        ]

    @property
    def sentence(self) -> str:
        """The setting for each density, and what the climb ended with."""
        return " ".join(f"At density {cell.density:.1%}: {cell.name}{_end(cell)}." for cell in self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        climbs = [[cell.to_dict() for cell in cells] for cells in self.climbs]
        return {"knob": self.knob, "chosen": [cell.to_dict() for cell in self.chosen], "climbs": climbs}

    def __str__(self) -> str:
        return f"{aligned(self.columns, self.rows)}\n{self.sentence}"


def _end(cell: Cell) -> str:
    return "" if cell.advice == "keep" else f" (the best seen, though its regime is {cell.regime})"
