from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from secateurs.report.inspection import Inspection
from tests.cli.running import run, run_json

NET = ("inspect", "things:net", "--input", "1,1,8,8")


def test_groups_by_hand(workplace: Path) -> None:
    """8 channels of 9 weights, a bias and two of the norm feed 16·9 weights of the next layer, at 64 positions."""
    found = run_json(*NET)
    first, second = found["groups"]
    assert (first["name"], first["kind"], first["size"], first["tensor"]) == ("0", "channel", 8, "0.weight")
    assert first["params_per_unit"] == 9 + 1 + 2 + 16 * 9
    assert first["macs_per_unit"] == 64 * (9 + 16 * 9)
    assert set(first["along"]) >= {"0.bias", "1.weight", "1.bias", "1.running_mean", "3.weight"}
    assert second["params_per_unit"] == 8 * 9 + 1 + 4
    assert second["macs_per_unit"] == 64 * 8 * 9 + 4
    assert first["bytes_per_unit"] == 4 * (9 + 1 + 2 + 2 + 16 * 9)
    assert (first["makers"], first["passing"], first["readers"]) == (["0"], ["1"], ["3"])
    assert (first["time"], first["measured"]) == (None, None)
    assert found["macs"] == 64 * 9 * 8 + 64 * 8 * 9 * 16 + 16 * 4


def test_what_stays_is_named_with_its_reason(workplace: Path) -> None:
    found = run_json(*NET)
    assert found["frozen"] == [{"tensor": "7.weight", "axis": 0, "size": 4, "reason": "an axis of the model's output"}]
    shown = run(*NET).out
    assert "1 width, 7.weight (4): it is an axis of the model's output, on which others rely" in shown
    assert "2 groups of units can be pruned" in shown
    assert re.search(r"^ 0 .* made by 0; passed on by 1; read by 3 *$", shown, flags=re.MULTILINE)


def test_the_index_and_its_bound_are_shown(workplace: Path) -> None:
    groups = run_json(*NET)["groups"]
    assert all(0 < group["index"] < 0.5 for group in groups)
    assert [group["bound"] for group in groups] == [math.ceil(g["size"] * (1 - g["index"])) for g in groups]
    shown = run(*NET).out
    assert re.search(r"PQ index +needed", shown)
    assert re.search(rf"^ 0 +channel +8 +{groups[0]['index']:.3f} +≥ {groups[0]['bound']} ", shown, flags=re.MULTILINE)
    weights = run_json(*NET, "--granularity", "weight")["groups"]
    assert all(0 < group["index"] < 1 and 0 < group["bound"] < group["size"] for group in weights)


def test_times_are_shares_and_what_a_unit_costs(workplace: Path) -> None:
    ran = run(*NET, "--time", "--json")
    groups = json.loads(ran.out)["groups"]
    assert all(0 < group["time"] < 1 for group in groups)
    assert [group["measured"]["removed"] for group in groups] == [4, 8]
    assert "measuring every group" in ran.err
    assert "time a unit" in run(*NET, "--time").out


def test_the_drawing(workplace: Path) -> None:
    ran = run(*NET, "--html", "groups.html")
    assert ran.out.splitlines()[-1] == "page: groups.html"
    assert "Shared widths" in Path("groups.html").read_text(encoding="utf-8")
    found = run_json(*NET, "--html", "again/groups.html")
    assert found.pop("page") == str(Path("again/groups.html"))
    assert Path("again/groups.html").is_file()
    assert Inspection.from_dict(found).to_dict() == found == run_json(*NET)


def test_weights(workplace: Path) -> None:
    found = run_json(*NET, "--granularity", "block:4x1")
    sizes = {group["name"]: (group["kind"], group["size"]) for group in found["groups"]}
    assert sizes["3.weight"][1] == 16 * 8 * 9 / 4
    assert found["groups"][1]["params_per_unit"] == 4
    assert found["groups"][1]["macs_per_unit"] == 64 * 4
    assert "1.weight" in {width["tensor"] for width in found["frozen"]}


@pytest.mark.parametrize("granularity", ["channels", "block:0", "heads"])
def test_unknown_granularity(workplace: Path, granularity: str) -> None:
    ran = run(*NET, "--granularity", granularity)
    assert ran.code == 1
    assert f"unknown granularity {granularity!r}" in ran.error


def test_a_model_in_which_nothing_can_go(workplace: Path) -> None:
    (workplace / "rigid.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 2)\n")
    ran = run("inspect", "rigid:net", "--input", "1,3")
    assert ran.code == 0
    assert "0 groups of units can be pruned" in ran.out
