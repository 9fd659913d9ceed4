"""The page that maps invariants to tests tells the truth."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "invariants.md"
# How many numbered invariants each system's specification has.
NUMBERS = {
    "gradual-magnitude": 8,
    "granet": 8,
    "global-magnitude": 9,
    "pq-index-sap": 9,
    "pdp": 9,
    "random-pruning": 10,
    "rethinking-value": 8,
    "spa-obspa": 8,
    "perp": 8,
    "ast": 8,
    "loraprune": 8,
    "obs-solvers": 8,
    "three-regime": 8,
    "flap": 8,
    "cfsp": 8,
    "d-pruner": 8,
}


def rows(page: str) -> dict[str, dict[int, list[str]]]:
    """By system and number of the invariant, the tests named."""
    found: dict[str, dict[int, list[str]]] = {}
    name = ""
    for line in page.splitlines():
        if line.startswith("## "):
            name = line[3:]
        elif row := re.fullmatch(r"\| (\d+) \| [^|]+ \| ([^|]+) \|", line):
            found.setdefault(name, {})[int(row[1])] = re.findall(r"`([^`]+)`", row[2])
    return found


@cache
def functions(file: str) -> frozenset[str]:
    """Names of the functions at the top of a file; none if there is no such file."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def missing(tests: list[str]) -> list[str]:
    """Those of the tests, given as `file::function`, that do not exist."""
    return [test for test in tests if test.partition("::")[2] not in functions(test.partition("::")[0])]


MAPPED = rows(PAGE.read_text(encoding="utf-8"))


def test_every_number_of_every_system_is_there() -> None:
    assert {name: sorted(found) for name, found in MAPPED.items()} == {
        name: list(range(1, count + 1)) for name, count in NUMBERS.items()
    }


@pytest.mark.parametrize("name", NUMBERS)
def test_every_test_named_exists(name: str) -> None:
    assert all(tests for tests in MAPPED[name].values())
    assert missing([test for tests in MAPPED[name].values() for test in tests]) == []


def test_a_test_that_is_gone_is_seen() -> None:
    here = "tests/methods/test_invariants.py"
    page = f"## x\n| 1 | what | `{here}::missing`, `{here}::gone`, `nowhere.py::rows` |\n| two | what | `no::row` |"
    assert rows(page) == {"x": {1: [f"{here}::missing", f"{here}::gone", "nowhere.py::rows"]}}
    assert missing(rows(page)["x"][1]) == [f"{here}::gone", "nowhere.py::rows"]
