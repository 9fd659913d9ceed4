"""Why a width stays, in words for somebody who has not read the code: reasons of one kind told once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .data import FrozenWidth

__all__ = ["Stay", "plain", "stays"]

# A reason ends with the op that decided it and the module that called the op.
_PLACED = re.compile(r"(?P<what>.+): [\w.:]+ in \S+")
_PATTERNS = (
    (r"(?P<op>\S+) has no rule, in .+", "there is no rule for the op {op}, so nothing it touches may go"),
    (r".+ does not run at another size: .+", "a module that uses it does not run at another size"),
    (
        r"an? (?P<kind>\S+) unit, and only .+ were asked for",
        "its units are of the kind {kind}, which was not asked for",
    ),
    (r"no layer produces it, only .+", "no layer makes it, it is only read"),
    (r".+ did not run on these inputs, .+", "a part of the model that did not run on these inputs may need it"),
    (r"(?P<op>[\w.:]+) in \S+", "the op {op} uses it in a way that no rule follows"),
)
_DIFFERS = "removing differs from zeroing: "

_PLAIN = {
    "a group of experts, of which all groups have as many": "it groups experts, of which all groups have as many",
    "an axis of the model's output": "it is an axis of the model's output, on which others rely",
    "a number in the code fixes its size": "a number in the model's code fixes its size",
    "chosen from": "a router chooses among its units: removing one is not the same as zeroing it",
    "channels that become pixels": "its positions become pixels",
    "how often each unit of its axis is repeated": "it says how often units are repeated, and a copy cannot go alone",
    "indexed at a fixed position": "the model's code picks positions of it by fixed numbers",
    "indexed by a mask": "a mask that depends on the data picks its positions",
    "indexed by data": "numbers that come with the data pick its positions",
    "it is flattened with itself": "it is flattened with itself, so a unit is no slice",
    "left out by scope or ignore": "left out by scope or ignore",
    "looked up by number": "its rows are looked up by number, so each must keep its place",
    "normalised over": "a norm runs over it: removing a unit is not the same as zeroing it",
    "no weight of a layer": "it is no weight of a layer",
    "ordered": "its values are put in order, and a zero has a place there",
    "packed by length": "sequences of several lengths are packed along it",
    "padded from its own values": "it is padded from its own values",
    "positions are looked up": "its positions are looked up by number, so each must keep its place",
    "reduced over": "a mean or maximum runs over it: removing a unit is not the same as zeroing it",
    "reordered": "its positions are put in another order",
    "reshaped across its boundaries": "a reshape mixes its positions with those of another axis",
    "reshaped without entries": "a reshape of nothing says nothing about it",
    "rows and experts": "rows are sent to experts by the data",
    "sliced inside a product": "a slice begins or ends inside a unit",
    "sliced with a step": "a slice takes some of its positions and leaves others",
    "spatial axes": "it is a place in a picture or a sequence, no width",
    "summed over values that zeroing does not make zero": "a sum runs over it, and a zeroed unit would still count",
    "the scale depends on the head size": "attention is scaled by its size, so removing is not zeroing",
    "the model's output has positions along it": "the model's output has positions along it, on which others rely",
    "the parts of a complex number": "its two positions are the parts of complex numbers",
    "tied to a fixed axis": "it must be as long as an axis that stays",
    "tokens and batch": "it is made of tokens or samples, no width",
    "transformed along": "a Fourier transform mixes its positions",
    "two layouts that do not align": "two layers lay its positions out differently",
    "undefined at zero": "an op has no value at zero, so zeroing a unit is no removal",
    "values read by Python": "the model's code looks at its values",
}


@dataclass(frozen=True)
class Stay:
    """Widths that stay for one reason.

    Args:
        reason: in plain words.
        widths: those that stay for it, in the order in which they were met.
    """

    reason: str
    widths: tuple[FrozenWidth, ...]


def plain(reason: str) -> str:
    """`reason` in plain words, without the op and the module that decided it; as it stands if it is not known.

    >>> plain("indexed by data: index in blocks.0.attn")
    'numbers that come with the data pick its positions'
    """
    for pattern, words in _PATTERNS:
        if match := re.fullmatch(pattern, reason):
            return words.format(**match.groupdict())
    placed = _PLACED.fullmatch(reason)
    what = placed["what"] if placed else reason
    differs, what = what.startswith(_DIFFERS), what.removeprefix(_DIFFERS)
    # The last part is the first cause; where that is told in no other way, the first part says how it reached here.
    for cause in (what.rpartition(": ")[2], what.partition(": ")[0]):
        if cause in _PLAIN:
            return _PLAIN[cause]
    return f"removing a unit would differ from zeroing it: {what}" if differs else what


def stays(frozen: Iterable[FrozenWidth]) -> tuple[Stay, ...]:
    """The widths under their reasons in plain words, the reason of most widths first."""
    found: dict[str, list[FrozenWidth]] = {}
    for width in frozen:
        found.setdefault(plain(width.reason), []).append(width)
    return tuple(Stay(why, tuple(widths)) for why, widths in sorted(found.items(), key=lambda item: -len(item[1])))
