"""What a hyperparameter may be: rules that check a value, say what is allowed, and know values that are wrong.

A field of a method's dataclass declares its rule, as in `lr: Annotated[float, Between(0, closed="neither")] = 0.1`, and
`check(self)` in its `__post_init__` holds all of them. Since a rule knows wrong values, one test refuses them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, Protocol, get_args, get_type_hints, runtime_checkable

from ..core.errors import OptionError

__all__ = ["Between", "OneOf", "Registered", "Rule", "Several", "Switch", "check", "rules_of"]


@runtime_checkable
class Rule(Protocol):
    """What one hyperparameter may be."""

    def fault(self, value: object) -> str | None:
        """What is wrong with `value`, to follow the field's name; None if nothing is."""

    def wrong(self) -> tuple[object, ...]:
        """Values that have a fault."""


@dataclass(frozen=True)
class Between:
    """Finite numbers from `low` to `high`.

    Args:
        low, high: the bounds; `high` may be infinite.
        closed: which of them are allowed themselves.
        whole: whole numbers only.
    """

    low: float
    high: float = math.inf
    closed: Literal["both", "low", "high", "neither"] = "low"
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.high):
            return f"{kind} {'of at least' if self._low_allowed else 'above'} {self.low:g}"
        left, right = "[" if self._low_allowed else "(", "]" if self._high_allowed else ")"
        return f"{kind} in {left}{self.low:g}, {self.high:g}{right}"

    @property
    def _low_allowed(self) -> bool:
        return self.closed in ("both", "low")

    @property
    def _high_allowed(self) -> bool:
        return self.closed in ("both", "high")

    def fault(self, value: object) -> str | None:
        return None if self._holds(value) else f"must be {self}, got {value!r}"

    def _holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        above = number > self.low or (number == self.low and self._low_allowed)
        below = number < self.high or (number == self.high and self._high_allowed)
        return above and below

    def wrong(self) -> tuple[object, ...]:
        outside = [self.low - 1, math.nan, math.inf, "1", None, True]
        outside += [] if self._low_allowed else [self.low]
        outside += [] if math.isinf(self.high) else [self.high + 1]
        outside += [] if self._high_allowed else [self.high]
        return (*outside, self.low + 0.5) if self.whole else tuple(outside)


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def fault(self, value: object) -> str | None:
        return None if value in self.words else f"must be {self}, got {value!r}"

    def wrong(self) -> tuple[object, ...]:
        return ("nonsense", None, 0)


@dataclass(frozen=True)
class Switch:
    """True or False, and nothing that merely counts as either."""

    def __str__(self) -> str:
        return "True or False"

    def fault(self, value: object) -> str | None:
        return None if isinstance(value, bool) else f"must be {self}, got {value!r}"

    def wrong(self) -> tuple[object, ...]:
        return 1, "yes", None


@dataclass(frozen=True)
class Registered:
    """A name that a registry knows.

    Args:
        find: from a name to its entry; it raises an `OptionError` with the nearest names for one that is unknown.
    """

    find: Callable[[str], object]

    def __str__(self) -> str:
        return "a registered name"

    def fault(self, value: object) -> str | None:
        if not isinstance(value, str):
            return f"must be {self}, got {value!r}"
        try:
            self.find(value)
        except OptionError as error:
            return f"is an {str(error).rstrip('.')}"
        return None

    def wrong(self) -> tuple[object, ...]:
        return ("nonsense", None, 0)


@dataclass(frozen=True)
class Several:
    """A tuple of one or more values that each follow a rule."""

    each: Rule

    def __str__(self) -> str:
        return f"a tuple of one or more, each {self.each}"

    def fault(self, value: object) -> str | None:
        fine = isinstance(value, tuple) and value and all(self.each.fault(item) is None for item in value)
        return None if fine else f"must be {self}, got {value!r}"

    def wrong(self) -> tuple[object, ...]:
        return ((), None, 1, *((item,) for item in self.each.wrong()))


def rules_of(parameters: type) -> dict[str, Rule]:
    """The rule of each field of a dataclass that declares one."""
    hints = get_type_hints(parameters, include_extras=True)
    found = {name: [part for part in get_args(hint) if isinstance(part, Rule)] for name, hint in hints.items()}
    return {name: rules[0] for name, rules in found.items() if rules}


def check(parameters: object) -> None:
    """None, if every field follows its rule.

    Raises:
        OptionError: one or more do not; all are listed.
    """
    found = ((name, rule.fault(getattr(parameters, name))) for name, rule in rules_of(type(parameters)).items())
    faults = [f"{name} {fault}" for name, fault in found if fault is not None]
    if faults:
        raise OptionError(f"{type(parameters).__name__}: {'; '.join(faults)}.")
