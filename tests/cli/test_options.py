from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import typer

from secateurs.cli import _options


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("8", 8), ("10%", 0.1), ("0.25", 0.25), ("12.5%", 0.125), ("0", 0)]
)
def test_floors(text: str | None, value: float | None) -> None:
    assert _options._floor(text) == text
    assert _options.floor_of(text) == value
    assert type(_options.floor_of(text)) is type(value)


@pytest.mark.parametrize("text", ["many", "x%", "1,5"])
def test_what_is_no_floor_is_misuse(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="neither a count, as 8, nor a share, as 10%"):
        _options._floor(text)


def test_shapes() -> None:
    assert _options.shape_of(_options._shape("1, 3,224,224")) == (1, 3, 224, 224)
    assert _options.shape_of(None) is None


@pytest.mark.parametrize("text", ["", "1,,2", "1,0", "a", "1x3", "-1,2", "1.5"])
def test_what_is_no_shape_is_misuse(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no shape; give sizes with commas between"):
        _options._shape(text)


def test_settings() -> None:
    texts = ["power=2", "scale=0.5", "fast=true", "name=er=k", "skip-first=[1, 2]"]
    assert _options.settings_of(_options._settings(texts)) == {
        "power": 2,
        "scale": 0.5,
        "fast": True,
        "name": "er=k",
        "skip_first": [1, 2],
    }


def test_a_setting_without_value_is_misuse() -> None:
    with pytest.raises(typer.BadParameter, match="'power' must read NAME=VALUE"):
        _options._settings(["power"])


def test_records_of_options_are_taken_apart_in_their_place_and_put_together() -> None:
    told: list[Any] = []

    def command(model: str, *, first: bool = False, output: _options.Output, last: int = 1) -> None:
        """Do it."""
        told.append((model, first, output, last))

    made = _options.flat(command)
    taken = signature(made).parameters
    assert list(taken) == ["model", "first", "as_json", "quiet", "debug", "last"]
    assert [taken[name].default for name in ("as_json", "last")] == [False, 1]
    assert taken["quiet"].annotation == _options.Quiet
    assert made.__doc__ == "Do it."
    made(model="m", first=True, as_json=False, quiet=True, debug=False, last=2)
    assert told == [("m", True, _options.Output(quiet=True), 2)]
