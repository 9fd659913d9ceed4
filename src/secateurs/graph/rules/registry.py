"""The table of rules, by the name of the ATen op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..records import Type
from ..trace import Call

__all__ = ["ALWAYS", "MOVES", "POINTS", "RULES", "rule"]

Rule = Callable[[Call], "list[Type] | Type"]
_R = TypeVar("_R", bound=Rule)
RULES: dict[str, Rule] = {}
# Ops whose rules run even where no axis can go: they charge MACs, or make new axes.
ALWAYS: set[str] = set()
# Ops that move values about and change none, so that positions stay positions.
MOVES: set[str] = set()
# Ops whose rules know what to do with positions; any other op that is given some fixes the axis they are positions in.
POINTS: set[str] = set()


def rule(*names: str, always: bool = False, moves: bool = False, points: bool = False) -> Callable[[_R], _R]:
    """Register one function as the rule of the named ATen ops (`add` also stands for `add_`).

    Args:
        always: the rule is asked even where no axis of an argument can go.
        moves: the ops move values about and change none.
        points: the rule sees to tensors of positions (see `Type.into`) itself.

    Raises:
        ValueError: an op already has a rule.
    """

    def register(function: _R) -> _R:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} already has a rule: {RULES[name].__qualname__}")
            RULES[name] = function
        ALWAYS.update(names if always else ())
        MOVES.update(names if moves else ())
        POINTS.update(names if points else ())
        return function

    return register
