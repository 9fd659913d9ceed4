"""The catalogue: one record per name, found by name, and readable as JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from secateurs.core import catalogue as module
from secateurs.core.catalogue import Method, catalogue, get_method, method
from secateurs.core.errors import OptionError


def run() -> None:
    """What a user would call."""


def record(name: str) -> Method:
    return Method(name, "A Paper", "2308.06767", ("channel",), ("after training",), "magnitude", run, needs=("data",))


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_METHODS", {})


def test_a_record_is_found_by_name_and_all_are_sorted() -> None:
    names = ("thin-net", "apoz", "slimming")
    made = [method(record(name)) for name in names]
    assert [get_method(name) for name in names] == made
    assert [m.name for m in catalogue()] == ["apoz", "slimming", "thin-net"]


def test_a_name_is_given_once() -> None:
    first = method(record("apoz"))
    with pytest.raises(OptionError, match=f"method 'apoz' is already in the catalogue, by {__name__}"):
        method(record("apoz"))
    assert get_method("apoz") is first


def test_an_unknown_name_lists_the_nearest() -> None:
    for name in ("thin-net", "apoz", "slimming", "zzz"):
        method(record(name))
    with pytest.raises(OptionError, match=r"unknown method 'thinet'; the nearest are thin-net"):
        get_method("thinet")


def test_a_record_is_plain_json() -> None:
    data = json.loads(json.dumps(record("apoz").to_dict()))
    assert data == {
        "name": "apoz",
        "title": "A Paper",
        "arxiv": "2308.06767",
        "units": ["channel"],
        "when": ["after training"],
        "how": "magnitude",
        "run": f"{__name__}.run",
        "needs": ["data"],
        "fused": [],
        "claim": "",
        "summary": "The catalogue: one record per name, found by name, and readable as JSON.",
    }


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        record("apoz").name = "other"  # type: ignore[misc]
