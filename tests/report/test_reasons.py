"""Reasons in plain words: each that the shape algebra gives is one sentence, and those of one kind are told once."""

from __future__ import annotations

import pytest

from secateurs.report.data import FrozenWidth
from secateurs.report.reasons import plain, stays


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("an axis of the model's output", "it is an axis of the model's output, on which others rely"),
        ("indexed by data: index in a.b", "numbers that come with the data pick its positions"),
        (
            "removing differs from zeroing: normalised over: native_layer_norm in a",
            "a norm runs over it: removing a unit is not the same as zeroing it",
        ),
        (
            "removing differs from zeroing: turned: roll in a",
            "removing a unit would differ from zeroing it: turned",
        ),
        ("tied to a fixed axis: indexed by data: index in a", "numbers that come with the data pick its positions"),
        ("tied to a fixed axis: rows of something", "it must be as long as an axis that stays"),
        ("_fft_r2c has no rule, in mixer", "there is no rule for the op _fft_r2c, so nothing it touches may go"),
        (
            "a head-size unit, and only channel, head were asked for",
            "its units are of the kind head-size, which was not asked for",
        ),
        ("as_strided in avgpool", "the op as_strided uses it in a way that no rule follows"),
        (
            "a.b does not run at another size: RuntimeError: x in y",
            "a module that uses it does not run at another size",
        ),
        ("no layer produces it, only w consumes it on axis 1", "no layer makes it, it is only read"),
        (
            "w did not run on these inputs, and Python decides by values what runs",
            "a part of the model that did not run on these inputs may need it",
        ),
        ("nobody knows", "nobody knows"),
    ],
)
def test_reasons_in_plain_words(reason: str, words: str) -> None:
    assert plain(reason) == words


def test_widths_of_one_kind_of_reason_stand_together() -> None:
    widths = [
        FrozenWidth("c.weight", 0, 9, "an axis of the model's output"),
        FrozenWidth("a.table", 0, 5, "indexed by data: index in a"),
        FrozenWidth("b.table", 0, 6, "indexed by data: gather in b"),
    ]
    assert [tuple(w.tensor for w in stay.widths) for stay in stays(widths)] == [("a.table", "b.table"), ("c.weight",)]
    assert stays(()) == ()
