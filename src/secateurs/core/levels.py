"""Levels: how much of each group may stay, and what a model then costs, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import OptionError

__all__ = ["Table", "counts_of_heads", "counts_of_width"]


@dataclass(frozen=True)
class Table:
    """What a model costs as a fixed part and one entry for each group: seconds, MACs, parameters or bytes.

    Args:
        whole: of the model as it is.
        counts: per group the units kept at each level; the first are all of them.
        entries: per group the cost of each level; a constant of a group changes nothing.

    >>> Table(10.0, {"heads": (4, 2)}, {"heads": (3.0, 1.0)}).total({"heads": 2})
    8.0
    """

    whole: float
    counts: Mapping[str, tuple[int, ...]]
    entries: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        wrong = [
            name for name, counts in self.counts.items() if not counts or len(self.entries.get(name, ())) != len(counts)
        ]
        if wrong or set(self.entries) != set(self.counts):
            raise OptionError(f"a table needs one entry for each count of each group; look at {', '.join(wrong)}.")

    @property
    def above(self) -> dict[str, tuple[float, ...]]:
        """Per group what each level costs beyond the cheapest of its levels."""
        return {name: tuple(cost - min(costs) for cost in costs) for name, costs in self.entries.items()}

    @property
    def lowest(self) -> float:
        """The cost with every group at the cheapest of its levels."""
        return self.whole - sum(costs[0] for costs in self.above.values())

    def total(self, kept: Mapping[str, int]) -> float:
        """The cost with `kept[group]` units; a group without a count is whole.

        Raises:
            OptionError: a count, or a group, that is not in the table; nothing is interpolated.
        """
        saved = 0.0
        for name, count in kept.items():
            if count not in self.counts.get(name, ()):
                known = ", ".join(map(str, self.counts.get(name, ()))) or "none"
                raise OptionError(f"the table has no entry for {count} units of {name}; it has {known}.")
            costs = self.entries[name]
            saved += costs[0] - costs[self.counts[name].index(count)]
        return self.whole - saved


def counts_of_heads(size: int, *, least: int = 1, multiple: int = 1) -> tuple[int, ...]:
    """Every number of heads from all of them down to `least`, in multiples.

    >>> counts_of_heads(4, least=0)
    (4, 3, 2, 1, 0)
    """
    _check(size, least, multiple)
    return (size, *(count for count in reversed(range(least, size)) if count % multiple == 0))


def counts_of_width(
    size: int, *, least: int = 1, multiple: int = 1, factor: float = 0.9, steps: int = 42
) -> tuple[int, ...]:
    """`size`·`factor`^i for i = 0 … `steps`, rounded to multiples and at least `least`; 0 follows where `least` is 0.

    Defaults are ZipLM's: 43 levels, the last with about 1% (arXiv 2302.04089).

    Raises:
        OptionError: a number outside its range.

    >>> counts_of_width(10, steps=5)
    (10, 9, 8, 7, 6)
    """
    _check(size, least, multiple)
    if not 0 < factor < 1 or steps < 0:
        raise OptionError(f"levels shrink by a factor in (0, 1) in at least 0 steps, got {factor} and {steps}.")
    ladder = [round(size * factor**i / multiple) * multiple for i in range(1, steps + 1)]
    fewer = [count for count in dict.fromkeys(ladder) if max(least, 1) <= count < size]
    return (size, *fewer, *([0] if least == 0 and size else []))


def _check(size: int, least: int, multiple: int) -> None:
    if not 0 <= least <= size or multiple < 1:
        raise OptionError(
            f"levels of a group go from its size down to least, in multiples of at least 1; got size {size}, least "
            f"{least}, multiple {multiple}."
        )
