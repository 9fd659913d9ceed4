"""Numbers as a person would write them; every view of a report takes its words from here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

__all__ = [
    "agreement",
    "count",
    "difference",
    "duration",
    "factor",
    "file_size",
    "first_metric",
    "is_share",
    "listed",
    "metric",
    "module_of",
    "number",
    "plural",
    "shape",
    "share",
    "tick",
    "value",
]

MINUS = "−"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_METRICS = {
    "auroc": "AUROC",
    "ece": "calibration error",
    "fgsm_accuracy": "accuracy under FGSM",
    "nll": "negative log-likelihood",
}
_SHARES = re.compile(r"(.*[_ -])?accuracy|top-?\d+|ece|auroc|f1|agreement", re.IGNORECASE)
_TOP = re.compile(r"top-?(\d+)", re.IGNORECASE)
# What a layer calls its own tensors; their names say nothing that the layer's name does not.
_OWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias")


def share(part: float | None) -> str:
    """`part` as a percentage with one decimal; never 0% or 100% for something that is only near it.

    >>> share(0.4961), share(0.00001), share(0.99999), share(1.0)
    ('49.6%', '<0.1%', '>99.9%', '100%')
    """
    if part is None:
        return "unknown"
    if not math.isfinite(part):
        return number(part)
    if part in (0.0, 1.0):
        return f"{part:.0%}"
    if 0.9995 <= part < 1:
        return ">99.9%"
    if 0 < part < 0.0005:
        return "<0.1%"
    return f"{part:.1%}".replace("-", MINUS)


def count(amount: float | None) -> str:
    """`amount` with three digits and K, M, G or T for thousands; small whole numbers as they are.

    >>> count(853018), count(125_485_760), count(64)
    ('853 K', '125 M', '64')
    """
    return _scaled(amount, ("", "K", "M", "G", "T"), 1000)


def file_size(amount: float | None) -> str:
    """`amount` bytes in decimal units with three digits.

    >>> file_size(3_417_905)
    '3.42 MB'
    """
    return _scaled(amount, ("B", "KB", "MB", "GB", "TB"), 1000)


def duration(seconds: float | None) -> str:
    """`seconds` in the unit that suits them.

    >>> duration(0.00421), duration(125.0), duration(7260)
    ('4.21 ms', '2 min 5 s', '2 h 1 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 0.9995:
        return _scaled(seconds * 1e6, ("µs", "ms"), 1000)
    whole = round(seconds)
    if whole < 60:
        return f"{_digits(seconds)} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def factor(times: float) -> str:
    """`times` as a multiple with two decimals, or three digits from ten on.

    >>> factor(1.7133)
    '1.71×'
    """
    return f"{times:.2f}×" if times < 10 else f"{_digits(times)}×"


def agreement(error: float) -> str:
    """How closely two forms agree whose largest relative difference is `error`.

    >>> agreement(0.0), agreement(3.1e-7)
    ('exactly', 'to a relative 3.1 × 10⁻⁷')
    """
    return f"to a relative {number(error)}" if error else "exactly"


def number(amount: float) -> str:
    """`amount` with four significant digits.

    >>> number(5.12345), number(3.1e-7), number(float("inf"))
    ('5.123', '3.1 × 10⁻⁷', 'infinite')
    """
    if math.isnan(amount):
        return "not a number"
    if math.isinf(amount):
        return "infinite" if amount > 0 else f"{MINUS}infinite"
    digits, power, exponent = f"{amount:.4g}".partition("e")
    digits = digits.replace("-", MINUS)
    return f"{digits} × 10{str(int(exponent)).translate(_RAISED)}" if power else digits


def metric(name: str) -> str:
    """The name of a quality metric in words.

    >>> metric("top5"), metric("ece"), metric("perplexity")
    ('top-5 accuracy', 'calibration error', 'perplexity')
    """
    if top := _TOP.fullmatch(name):
        return f"top-{top[1]} accuracy"
    return _METRICS.get(name, name.replace("_", " "))


def is_share(name: str, *amounts: float) -> bool:
    """Whether a metric called `name` with these values is a share, to be written as a percentage."""
    return _SHARES.fullmatch(name) is not None and all(-1 <= amount <= 1 for amount in amounts)


def value(name: str, amount: float | None) -> str:
    """The value of a quality metric: a percentage where it is a share, else a number.

    >>> value("accuracy", 0.9312), value("perplexity", 12.3456)
    ('93.1%', '12.35')
    """
    if amount is None:
        return "unknown"
    return share(amount) if is_share(name, amount) else number(amount)


def tick(name: str, amount: float) -> str:
    """The value of a quality metric on an axis: without a fraction that is zero.

    >>> tick("accuracy", 0.9), tick("accuracy", 0.925), tick("loss", 0.25)
    ('90%', '92.5%', '0.25')
    """
    return value(name, amount).replace(".0%", "%")


def difference(name: str, before: float, after: float) -> str:
    """`after` minus `before` with its sign, in percentage points for shares; empty if it is not finite.

    >>> difference("accuracy", 0.939, 0.931), difference("perplexity", 12.0, 12.5)
    ('−0.8 points', '+0.5')
    """
    change = after - before
    if not math.isfinite(change):
        return ""
    if is_share(name, before, after):
        points = round(100 * change, 1)
        return "no change" if not points else f"{points:+.1f} points".replace("-", MINUS)
    text = f"{change:+.4g}"
    return "no change" if float(text) == 0 else text.replace("-", MINUS)


def shape(sizes: Sequence[int]) -> str:
    """Sizes of a tensor's axes.

    >>> shape((64, 3, 7, 7))
    '64×3×7×7'
    """
    return "×".join(map(str, sizes))


def plural(amount: int, noun: str) -> str:
    """`amount` and the noun in its number.

    >>> plural(1, "thread"), plural(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def listed(parts: Sequence[str]) -> str:
    """The parts as a phrase.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def module_of(tensor: str) -> str:
    """The layer that a tensor belongs to, with what follows the name after a blank.

    >>> module_of("block.bn.running_mean"), module_of("block.fc.weight inputs"), module_of("class_token")
    ('block.bn', 'block.fc inputs', 'class_token')
    """
    name, blank, note = tensor.partition(" ")
    layer, dot, own = name.rpartition(".")
    return f"{layer if dot and own in _OWN else name}{blank}{note}"


def _scaled(amount: float | None, units: Sequence[str], step: int) -> str:
    if amount is None or not math.isfinite(amount):
        return "unknown"
    size, unit = float(amount), 0
    # Half a unit in the third digit would already be written as the next one: 999.6 K is 1.00 M.
    while abs(size) >= step - 0.5 and unit < len(units) - 1:
        size, unit = size / step, unit + 1
    text = str(int(size)) if unit == 0 and size == int(size) else _digits(size)
    return f"{text} {units[unit]}".rstrip()


def _digits(amount: float) -> str:
    """Three significant digits, none of them behind an exponent."""
    if not amount:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(amount))))
    rounded = round(amount, places)
    if rounded and math.floor(math.log10(abs(rounded))) > math.floor(math.log10(abs(amount))):
        places = max(0, places - 1)
    return f"{amount:.{places}f}"


def first_metric(*qualities: Mapping[str, float]) -> str | None:
    """The metric that stands for quality: the first that any of them has; None without one."""
    return next((name for quality in qualities for name in quality), None)
