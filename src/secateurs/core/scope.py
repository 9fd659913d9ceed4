"""Which groups of units patterns of names choose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from .errors import unknown_name
from .experts import ExpertGroup
from .units import ChannelGroup

__all__ = ["in_scope", "listed"]

S = TypeVar("S", bound=ChannelGroup | ExpertGroup)


def in_scope(
    groups: tuple[S, ...],
    scope: str | Sequence[str] | None,
    ignore: str | Sequence[str],
    present: Iterable[str] = (),
) -> tuple[S, ...]:
    """Groups of which a pattern of the scope matches the name or a producing tensor, and none to ignore any member.

    Args:
        groups: all that can go.
        scope, ignore: as for `plan`.
        present: names of parameters that may be ignored though nothing of them can go.

    Raises:
        OptionError: a pattern matches nothing.
    """
    wanted = None if scope is None else listed(scope)
    left_alone = listed(ignore)

    def named(names: Iterable[str], pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for t in names for name in (t, t.rpartition(".")[0]))

    def hit(group: ChannelGroup | ExpertGroup, pattern: str, producing: bool) -> bool:
        if isinstance(group, ExpertGroup):
            return named((group.name, *group.blocks, *group.tensors), pattern)
        tensors = [m.tensor for m in group.members if m.role == "out" or not producing]
        return named((group.name, *tensors), pattern)

    stays = list(present)
    for pattern in (*(wanted or ()), *left_alone):
        idle = pattern in left_alone and named(stays, pattern)
        if not idle and not any(hit(g, pattern, False) for g in groups):
            raise unknown_name("pattern", pattern, [g.name for g in groups])
    chosen = [g for g in groups if wanted is None or any(hit(g, p, True) for p in wanted)]
    return tuple(g for g in chosen if not any(hit(g, p, False) for p in left_alone))


def listed(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Several patterns; a single one is a list of one."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
