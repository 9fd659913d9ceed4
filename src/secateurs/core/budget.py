"""Budgets: what is asked of a pruned model, as text with a comparison and as data.

    budget  = item { "," item }
    item    = metric comparison number unit | keep ":" of
    metric  = macs | params | bytes | memory | latency | speedup | sparsity | tokens

`"macs<=50%"` leaves at most half of the multiply–accumulates, `"sparsity=90%"` removes nine units of ten, `"2:4"`
keeps two of every four consecutive inputs. Text is read once, here, into frozen objects that print as they are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from .errors import BudgetError, unknown_name

__all__ = ["Budget", "Limit", "Pattern", "nearest_limit", "nearest_sparsity", "units_kept"]


@dataclass(frozen=True)
class _Metric:
    """How limits on one metric are written.

    Args:
        comparisons: those allowed, the usual one first.
        units: suffix to factor, in ascending order; "" stands for a bare number.
        share: whether a percentage is allowed (of the unpruned model).
        only_share: whether nothing but a share is allowed.
        example: one limit as text.
    """

    comparisons: tuple[str, ...]
    units: Mapping[str, int | str]
    share: bool
    example: str
    only_share: bool = False


_COUNTS: dict[str, int | str] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_DECIMAL_BYTES: dict[str, int | str] = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_BYTES: dict[str, int | str] = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZES = {**_DECIMAL_BYTES, **_BINARY_BYTES}
_SECONDS: dict[str, int | str] = {"ns": "1e-9", "us": "1e-6", "ms": "1e-3", "s": 1}
_METRICS = {
    "macs": _Metric(("<=",), _COUNTS, True, "macs<=50%"),
    "params": _Metric(("<=",), _COUNTS, True, "params<=5M"),
    "bytes": _Metric(("<=",), _SIZES | {"": 1}, True, "bytes<=1GB"),
    "memory": _Metric(("<=",), _SIZES, True, "memory<=200MB"),
    "latency": _Metric(("<=",), _SECONDS, True, "latency<=3ms"),
    "speedup": _Metric((">=",), {"x": 1, "": 1}, False, "speedup>=2x"),
    "sparsity": _Metric(("=", ">="), {"": 1}, True, "sparsity=90%", only_share=True),
    "tokens": _Metric(("<=",), _COUNTS, True, "tokens<=25%"),
}
# Units in which a limit is printed: one spelling for each power of a thousand.
_PRINTED = {**dict.fromkeys(("macs", "params", "tokens"), ("", "K", "M", "G", "T")), "latency": ("us", "ms", "s")}
_PRINTED |= {**dict.fromkeys(("bytes", "memory"), tuple(_DECIMAL_BYTES)), "speedup": ("x",)}
# What people write for our metrics where the spelling alone would not lead there.
_OTHER_WORDS = {"flops": "macs", "time": "latency", "size": "bytes", "density": "sparsity", "weights": "params"}
_ALIASES = {"memory": "bytes"}
_PATTERN = "N:M pattern"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_LIMIT_TEXT = re.compile(rf"([A-Za-z_]+)\s*(<=|>=|==|=|<|>)\s*({_NUMBER})\s*(%|[A-Za-z]*)")
_PATTERN_TEXT = re.compile(r"(\d+)\s*:\s*(\d+)")


@dataclass(frozen=True)
class Limit:
    """One limit of a budget.

    Args:
        metric: macs, params, bytes, memory, latency, speedup, sparsity or tokens.
        comparison: "<=", for speedup ">=", for sparsity "=" or ">=".
        value: a share in (0, 1] if relative ([0, 1) for sparsity); else a number of MACs, parameters, tokens or bytes,
            seconds for latency, a factor of at least 1 for speedup.
        relative: whether `value` is a share of the unpruned model; always so for sparsity (the share removed).

    Raises:
        BudgetError: any of these is outside what is allowed; all faults are listed.
    """

    metric: str
    comparison: str
    value: float
    relative: bool

    def __post_init__(self) -> None:
        faults = _limit_faults(self)
        if faults:
            raise BudgetError("; ".join(faults) + ".")

    @property
    def cost(self) -> str:
        """The name of what is limited in a cost model: bytes for memory, else the metric itself."""
        return _key(self.metric)

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{_number_text(self)}"


@dataclass(frozen=True)
class Pattern:
    """`keep` of every `of` consecutive inputs stay.

    Raises:
        BudgetError: not 1 <= keep < of.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise BudgetError(f"{self} must keep at least 1 and fewer than all of each {self.of}, as 2:4 and 4:8 do.")

    @property
    def sparsity(self) -> float:
        """The share removed."""
        return 1 - self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class Budget:
    """Limits that must all hold, at most one a metric, and possibly an N:M pattern.

    Raises:
        BudgetError: it asks for nothing, or limits one metric twice (memory is bytes).
    """

    limits: tuple[Limit, ...] = ()
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        faults = _repeated(limit.cost for limit in self.limits)
        if not self.limits and self.pattern is None:
            faults = [f"an empty budget asks for nothing; {_allowed()}"]
        if faults:
            raise BudgetError("; ".join(faults) + ".")

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """The budget that `text` describes; a Budget is returned as it is.

        Raises:
            BudgetError: `text` is not in the grammar; lists every fault of it and what is allowed.

        >>> Budget.parse("macs<=50%, latency <= 3ms").limits[1]
        Limit(metric='latency', comparison='<=', value=0.003, relative=False)
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str):
            raise BudgetError(f"a budget is text or a Budget, got {_brief(text)}; {_allowed()}.")
        items = [item.strip() for item in text.split(",")]
        parts, faults = _read_items(items)
        faults += _repeated(filter(None, map(_key_of_text, items)))
        if faults:
            raise BudgetError(f"cannot read budget {text!r}: {'; '.join(faults)}; {_allowed()}.")
        patterns = [part for part in parts if isinstance(part, Pattern)]
        return cls(tuple(part for part in parts if isinstance(part, Limit)), patterns[0] if patterns else None)

    def limit(self, metric: str) -> Limit | None:
        """The limit on `metric`, or on its alias (memory is bytes); None without one."""
        return next((limit for limit in self.limits if limit.cost == _key(metric)), None)

    def __str__(self) -> str:
        return ",".join(map(str, self.limits + (() if self.pattern is None else (self.pattern,))))


def units_kept(sparsity: float, total: int) -> int:
    """How many of `total` units stay at `sparsity`: `(1 − sparsity)·total` rounded, halves to the even number."""
    return round((1 - sparsity) * total)


def nearest_limit(limit: Limit, value: float) -> Limit:
    """`limit` relaxed to `value`, rounded to three digits on the feasible side.

    >>> str(nearest_limit(Limit("macs", "<=", 0.05, True), 0.12234))
    'macs<=12.3%'
    """
    relaxed = _three_digits(value, up=limit.comparison == "<=")
    return Limit(limit.metric, limit.comparison, float(relaxed), limit.relative)


def nearest_sparsity(keep: int, total: int) -> Limit:
    """The highest sparsity at which at least `keep` of `total` units stay, its density rounded up to three digits.

    >>> str(nearest_sparsity(123456, 10**6))
    'sparsity=87.6%'
    """
    density = min(_three_digits(keep / total, up=True), Decimal(1))
    return Limit("sparsity", "=", float(1 - density), True)


def _three_digits(value: float, up: bool) -> Decimal:
    exact = Decimal(repr(float(value)))
    if not exact:
        return exact
    return exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), ROUND_CEILING if up else ROUND_FLOOR)


def _read_items(items: Sequence[str]) -> tuple[list[Limit | Pattern], list[str]]:
    parts: list[Limit | Pattern] = []
    faults: list[str] = []
    for item in items:
        try:
            parts.append(_read(item))
        except BudgetError as error:
            fault = str(error).rstrip(".")
            faults.append(f"{item!r}: {fault}" if len(items) > 1 else fault)
    return parts, faults


def _read(item: str) -> Limit | Pattern:
    if pattern := _PATTERN_TEXT.fullmatch(item):
        return Pattern(int(pattern[1]), int(pattern[2]))
    found = _LIMIT_TEXT.fullmatch(item)
    if found is None:
        raise BudgetError("neither a metric with a comparison and a number nor a pattern such as 2:4")
    metric, comparison, number, suffix = found[1].lower(), found[2], found[3], found[4]
    if metric not in _METRICS:
        raise BudgetError(_unknown_metric(metric))
    factor = _factor(metric, suffix)
    if factor is None:
        raise BudgetError(f"{metric} is given in {_units_text(metric)}, not {repr(suffix) if suffix else 'bare'}")
    return Limit(metric, comparison, float(Decimal(number) * factor), suffix == "%" or _METRICS[metric].only_share)


def _factor(metric: str, suffix: str) -> Decimal | None:
    """What one `suffix` of `metric` is worth, None if it is not a unit of it; upper and lower case are one."""
    if suffix == "%":
        return Decimal("0.01")
    units = {name.lower(): factor for name, factor in _METRICS[metric].units.items()}
    return Decimal(units[suffix.lower()]) if suffix.lower() in units else None


def _limit_faults(limit: Limit) -> list[str]:
    metric = _METRICS.get(limit.metric)
    if metric is None:
        return [_unknown_metric(limit.metric)]
    if not math.isfinite(limit.value):
        return [f"the limit on {limit.metric} must be a finite number, got {limit.value}"]
    faults = _direction_faults(limit, metric)
    if limit.relative and not metric.share:
        faults.append(f"{limit.metric} is given in {_units_text(limit.metric)}, not as a share")
    elif metric.only_share:
        faults += _sparsity_faults(limit)
    else:
        faults += _value_faults(limit)
    return faults


def _direction_faults(limit: Limit, metric: _Metric) -> list[str]:
    if limit.comparison in metric.comparisons:
        return []
    right = f"{limit.metric}{metric.comparisons[0]}{_number_text(limit)}"
    allowed = " or ".join(metric.comparisons)
    return [f"{limit.metric} takes {allowed}, not {limit.comparison}: write {right!r}"]


def _sparsity_faults(limit: Limit) -> list[str]:
    if not limit.relative:
        return ["sparsity is a share of the units: it must be relative"]
    if 0 <= limit.value < 1:
        return []
    why = "would remove everything" if limit.value == 1 else "is no share that can be removed"
    # What was given bare is a share; who forgot the sign meant per cent.
    meant = f": write 'sparsity={_plain(Decimal(repr(limit.value)))}%'" if 1 < limit.value < 100 else ""
    return [f"sparsity {_number_text(limit)} {why}; sparsity lies in [0%, 100%){meant}"]


def _value_faults(limit: Limit) -> list[str]:
    if limit.value <= 0:
        return [f"{limit.metric} must be more than 0, got {_number_text(limit)}"]
    if limit.relative and limit.value > 1:
        return [f"{limit.metric} is over 100% of the unpruned model: {_number_text(limit)}"]
    if limit.metric == "speedup" and limit.value < 1:
        return [f"a speedup of {_number_text(limit)} asks for a slower model; it must be at least 1x"]
    return []


def _number_text(limit: Limit) -> str:
    """The limit's value in the largest unit that it reaches; exact, so that it is read back to the same float."""
    value = Decimal(repr(float(limit.value)))
    if limit.relative or limit.metric not in _PRINTED:
        return f"{_plain(value * 100)}%"
    units = [(name, Decimal(_METRICS[limit.metric].units[name])) for name in _PRINTED[limit.metric]]
    name, factor = next(((n, f) for n, f in reversed(units) if abs(value) >= f), units[0])
    return f"{_plain(value / factor)}{name}"


def _plain(value: Decimal) -> str:
    return format(value.normalize(), "f")


def _units_text(metric: str) -> str:
    names = [name or "bare numbers" for name in _METRICS[metric].units]
    return ", ".join(names + ["%"] * _METRICS[metric].share)


def _unknown_metric(metric: str) -> str:
    if metric in _OTHER_WORDS:
        return f"unknown metric {metric!r}; the nearest is {_OTHER_WORDS[metric]}"
    return str(unknown_name("metric", metric, _METRICS)).rstrip(".")


def _key(metric: str) -> str:
    return _ALIASES.get(metric, metric)


def _key_of_text(item: str) -> str | None:
    """What an item limits, as far as it can be told: items with the same key cannot stand together."""
    if _PATTERN_TEXT.fullmatch(item):
        return _PATTERN
    found = _LIMIT_TEXT.fullmatch(item)
    return _key(found[1].lower()) if found else None


def _repeated(keys: Iterable[str]) -> list[str]:
    seen = list(keys)
    return [f"{key} is limited twice" for key in dict.fromkeys(seen) if seen.count(key) > 1]


def _brief(value: object) -> str:
    return text if len(text := repr(value)) < 50 else f"a {type(value).__name__}"


def _allowed() -> str:
    examples = ", ".join(metric.example for metric in _METRICS.values())
    return f"allowed are {examples}, 2:4 and several of them joined by commas"
