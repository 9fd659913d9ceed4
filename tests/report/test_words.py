from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.report import words

SIZES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (0.0, "0%"),
        (1.0, "100%"),
        (0.4961, "49.6%"),
        (0.38, "38.0%"),
        (0.0004, "<0.1%"),
        (0.0006, "0.1%"),
        (0.9994, "99.9%"),
        (0.99951, ">99.9%"),
        (1.234, "123.4%"),
        (-0.05, "−5.0%"),
        (None, "unknown"),
        (math.inf, "infinite"),
    ],
)
def test_shares(part: float | None, text: str) -> None:
    assert words.share(part) == text


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_share_is_never_rounded_to_nothing_or_everything(part: float) -> None:
    assert words.share(part) not in ("0%", "0.0%", "100%", "100.0%")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.4, "999"),
        (1000, "1.00 K"),
        (999_600, "1.00 M"),
        (853_018, "853 K"),
        (125_485_760, "125 M"),
        (12_345_678, "12.3 M"),
        (9_999, "10.0 K"),
        (4.5e15, "4500 T"),
        (None, "unknown"),
        (math.nan, "unknown"),
    ],
)
def test_counts(amount: float | None, text: str) -> None:
    assert words.count(amount) == text


@given(st.floats(1e3, 9e14))
def test_a_count_has_three_digits_and_is_right_to_half_of_the_last(amount: float) -> None:
    number, unit = words.count(amount).split()
    assert len(re.sub(r"\D", "", number)) in (3, 4)
    assert float(number) * SIZES[unit] == pytest.approx(amount, rel=5.1e-3)
    assert float(number) <= 1000


@pytest.mark.parametrize(
    ("amount", "text"), [(12, "12 B"), (3_417_905, "3.42 MB"), (1_762_800, "1.76 MB"), (2_500_000_000, "2.50 GB")]
)
def test_file_sizes(amount: int, text: str) -> None:
    assert words.file_size(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (8.12e-4, "812 µs"),
        (0.00421, "4.21 ms"),
        (0.9999, "1.00 s"),
        (1.32, "1.32 s"),
        (59.4, "59.4 s"),
        (59.7, "1 min 0 s"),
        (125, "2 min 5 s"),
        (7260, "2 h 1 min"),
        (None, "unknown"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(("times", "text"), [(1.7133, "1.71×"), (0.5, "0.50×"), (12.34, "12.3×"), (123.4, "123×")])
def test_factors(times: float, text: str) -> None:
    assert words.factor(times) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [(5.12345, "5.123"), (-0.25, "−0.25"), (3.1e-7, "3.1 × 10⁻⁷"), (2e12, "2 × 10¹²"), (math.nan, "not a number")],
)
def test_numbers(amount: float, text: str) -> None:
    assert words.number(amount) == text


@pytest.mark.parametrize(
    ("name", "amount", "text"),
    [
        ("accuracy", 0.9312, "93.1%"),
        ("robust accuracy", 0.5, "50.0%"),
        ("top5", 1.0, "100%"),
        ("ece", 0.03, "3.0%"),
        ("accuracy", 93.1, "93.1"),
        ("perplexity", 0.5, "0.5"),
        ("perplexity", math.inf, "infinite"),
        ("loss", None, "unknown"),
    ],
)
def test_values_are_percentages_only_for_shares(name: str, amount: float | None, text: str) -> None:
    assert words.value(name, amount) == text


@pytest.mark.parametrize(
    ("name", "before", "after", "text"),
    [
        ("accuracy", 0.939, 0.931, "−0.8 points"),
        ("accuracy", 0.939, 0.9391, "no change"),
        ("perplexity", 12.0, 12.5, "+0.5"),
        ("loss", 0.5, 0.5, "no change"),
        ("perplexity", 12.0, math.inf, ""),
    ],
)
def test_differences(name: str, before: float, after: float, text: str) -> None:
    assert words.difference(name, before, after) == text


def test_small_words() -> None:
    assert words.metric("top-5") == "top-5 accuracy"
    assert words.metric("nll") == "negative log-likelihood"
    assert words.metric("my_score") == "my score"
    assert words.tick("accuracy", 0.9) == "90%"
    assert words.shape((64, 3, 7, 7)) == "64×3×7×7"
    assert (words.plural(1, "layer"), words.plural(0, "layer")) == ("1 layer", "0 layers")
    assert [words.listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("block.bn.running_var", "block.bn"),
        ("attn.in_proj_weight", "attn"),
        ("block.fc.weight inputs", "block.fc inputs"),
        ("block.fc", "block.fc"),
        ("class_token", "class_token"),
        ("weight", "weight"),
    ],
)
def test_tensors_are_called_by_their_layer(tensor: str, layer: str) -> None:
    assert words.module_of(tensor) == layer


def test_two_forms_agree_exactly_or_to_an_error() -> None:
    assert [words.agreement(error) for error in (0.0, 2e-7)] == ["exactly", "to a relative 2 × 10⁻⁷"]
