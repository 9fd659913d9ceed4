from __future__ import annotations

from pathlib import Path

from tests.cli.running import run, run_json

DATA = ("--data", "small.npz", "--test-data", "small.npz", "--batch-size", "16")
SHORT = (*DATA, "--copies", "2", "--retrain-epochs", "1", "--quiet")


def test_temperature_of_one_model(workplace: Path) -> None:
    found = run_json("advise", "temperature", "things:net", "--budget", "sparsity=50%", *SHORT)
    assert found["advice"] in ("raise", "lower", "keep")
    assert (found["name"], found["budget"]) == ("things:net", "sparsity=50%")
    kept = run_json(
        "advise", "temperature", "things:net", "--budget", "sparsity=50%", *SHORT, "--delta", "1", "--kappa", "0"
    )
    assert (kept["regime"], kept["advice"]) == ("II-B", "keep")
    assert kept["mc"] == found["mc"]


def test_a_person_gets_a_sentence(workplace: Path) -> None:
    shown = run("advise", "temperature", "things:net", "--budget", "sparsity=50%", *SHORT)
    assert shown.code == 0
    assert shown.out.startswith("things:net at density 50.0%: mc ")
    assert shown.out.count("\n") == 1


def test_a_family_is_ranked(workplace: Path) -> None:
    things = (workplace / "things.py").read_text(encoding="utf-8")
    (workplace / "things.py").write_text(things + "\n\ndef other():\n    return net()\n", encoding="utf-8")
    words = ("advise", "family", "things:net", "things:other", "--budget", "sparsity=50%", *SHORT)
    found = run_json(*words, "--sharpness")
    assert {cell["name"] for cell in found["ranking"]} == {"things:net", "things:other"}
    assert found["ranking"][0]["name"] == found["chosen"]
    assert set(found["rules"]) == {"regime", "dense accuracy", "sharpness"}
    assert "Prune things:" in run(*words).out


def test_a_radius_for_each_density(workplace: Path) -> None:
    words = ("advise", "sam", "things:net", "--budget", "sparsity=50%", "--budget", "sparsity=80%", *SHORT)
    found = run_json(*words, "--setting", "0.05", "--setting", "0.5", "--epochs", "1")
    assert found["knob"] == "sam-rho"
    assert [cell["budget"] for cell in found["chosen"]] == ["sparsity=50%", "sparsity=80%"]
    assert all(climb[0]["name"] == "sam-rho 0.05" for climb in found["climbs"])


def test_errors_are_one_sentence(workplace: Path) -> None:
    words = ("advise", "sam", "things:net", "--budget", "sparsity=50%", *SHORT)
    failed = run(*words, "--knob", "lr")
    assert (failed.code, failed.error.startswith("error: unknown knob with settings of its own")) == (1, True)
    failed = run(*words, "--knob", "batch-size", "--setting", "0.5")
    assert failed.error.startswith("error: Grid: settings of batch-size must be whole positive numbers")
    failed = run("advise", "family", "things:net", "things:net", "--budget", "sparsity=50%", *SHORT)
    assert failed.error == "error: each model of a family is named once, got things:net, things:net."
