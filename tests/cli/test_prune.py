from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import secateurs as sec
import secateurs.methods
from secateurs.cli import prune as command
from secateurs.integrations import LoadedModel
from tests.cli.running import Ran, run, run_json
from tests.onnx.samples import Case, f, single

SHORT = ("--budget", "macs<=50%", "--out", "smaller", "--input", "2,1,8,8", "--no-measure")


def refused(*words: str | Path) -> str:
    """The sentence with which a command fails; nothing may have been written."""
    before = sorted(path.name for path in Path().iterdir())
    ran = run("prune", *words)
    assert (ran.code, ran.out) == (1, "")
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == before
    assert ran.error.startswith("error: ")
    return ran.error.removeprefix("error: ")


@pytest.fixture
def pruned(workplace: Path) -> Ran:
    return run("prune", "things:net", *SHORT)


def test_a_cut_model_is_saved_with_plan_and_report(pruned: Ran, workplace: Path) -> None:
    assert pruned.code == 0, pruned.err
    made = sec.load("smaller")
    assert made.plan.cost("macs") <= 0.5
    assert made.model(torch.ones(3, 1, 8, 8)).shape == (3, 4)
    assert {path.name for path in Path("smaller").iterdir()} == {
        *("model.json", "model.safetensors", "plan.safetensors", "report.html", "report.json")
    }
    assert not Path("smaller.work").exists()
    assert "macs<=50% asked" in pruned.out
    assert "page: smaller/report.html" in pruned.out


def test_an_onnx_file_is_pruned_to_one(workplace: Path) -> None:
    model, _ = single(Case("Conv", [f(2, 3, 6, 6), f(8, 3, 3, 3, seed=1)], {}, [1]))
    grown = helper.make_node("Conv", ["y0", "more"], ["y"])
    model.graph.node.append(grown)
    model.graph.initializer.append(numpy_helper.from_array(f(4, 8, 3, 3, seed=2), "more"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [2, 4, 2, 2]))
    onnx.save(model, "net.onnx")
    ran = run("prune", "net.onnx", "--budget", "macs<=50%", "--out", "smaller", "--no-measure", "--export", "onnx")
    assert ran.code == 0, ran.err
    assert "ONNX: smaller/model.onnx" in ran.out
    assert Path("smaller/model.onnx").read_bytes() == Path("smaller.onnx").read_bytes()
    shapes = [list(t.dims) for t in onnx.load("smaller/model.onnx").graph.initializer]
    assert shapes == [[4, 3, 3, 3], [4, 4, 3, 3]]
    loaded = sec.load("smaller").model
    assert [list(p.shape) for p in loaded.parameters()] == shapes
    assert run("prune", "smaller", "--budget", "macs<=50%", "--out", "tiny", "--no-measure").code == 0
    assert Path("tiny/model.onnx").is_file()


def test_the_run_is_told_beside_the_result(pruned: Ran) -> None:
    told = pruned.err.splitlines()
    assert told[:2] == [
        "note: the widest layer has 16 units; the cut model is smaller, but layers this narrow hardly run faster.",
        "note: without --test-data the quality of the model is not measured.",
    ]
    assert [line.strip() for line in told[2:]] == ["planning", "cutting", "measuring"]


def test_the_command_in_the_report_does_the_same_again(pruned: Ran) -> None:
    words = sec.load("smaller").report.command
    assert words == "secateurs prune things:net --budget 'macs<=50%' --out smaller --no-measure --input 2,1,8,8"


def test_a_saved_model_is_pruned_again_and_replaced(pruned: Ran) -> None:
    before = Path("smaller/model.safetensors").read_bytes()
    again = run("prune", "smaller", "--budget", "params<=60%", "--out", "tiny", "--no-measure")
    assert again.code == 0, again.err
    assert Path("smaller/model.safetensors").read_bytes() == before
    assert run("prune", "things:net", *SHORT[:1], "macs<=30%", *SHORT[2:]).code == 0
    assert sec.load("smaller").plan.cost("macs") <= 0.3


def test_data_recovers_and_tests_are_measured(workplace: Path) -> None:
    found = run_json(
        *(
            "prune",
            "things:net",
            "--budget",
            "macs<=60%",
            "--out",
            "out/deep",
            "--data",
            "small.npz",
            "--test",
            "small.npz",
        ),
        *("--recover-epochs", "2", "--lr", "0.05", "--distill", "--batch-size", "16", "--no-measure"),
    )
    assert list(found["report"]["stages"]) == ["one-shot", "batch-norm recalibrated", "recovered"]
    assert len(found["report"]["history"]["values"]) == 2
    assert found["checks"][0]["met"] is True
    assert found["files"] == {"model": "out/deep", "page": "out/deep/report.html"}
    assert found["report"]["recipe"]["round_to"] == 1
    assert [path.name for path in Path("out").iterdir()] == ["deep"]


def test_other_decisions_are_measured(workplace: Path) -> None:
    words = ("--test-data", "small.npz", "--sensitivity", "--other-budget", "macs<=80%", "--other-budget", "macs<=30%")
    found = run_json("prune", "things:net", *SHORT, *words)["report"]
    assert [point["budget"] for point in found["front"]][-2:] == ["macs<=80%", "macs<=30%"]
    assert {name: [share for share, _ in curve] for name, curve in found["sensitivity"].items()} == {
        "0": [0.25, 0.5, 0.75],
        "3": [0.25, 0.5, 0.75],
    }


def test_the_same_seed_gives_the_same_bits(workplace: Path) -> None:
    for name in ("a", "b", "c"):
        options = ("--data", "things:batches", "--recover-epochs", "1", "--seed", "7" if name == "c" else "3")
        ran = run("prune", "things:net", "--budget", "macs<=50%", "--out", name, "--no-measure", *options)
        assert ran.code == 0, ran.err
    a, b, c = (Path(name, "model.safetensors").read_bytes() for name in ("a", "b", "c"))
    assert a == b
    assert a != c


def test_masks_are_announced(workplace: Path) -> None:
    ran = run("prune", "things:net", "--budget", "sparsity=50%", "--granularity", "weight", *SHORT[2:])
    assert "note: what goes becomes zero in tensors of the same shape" in ran.err
    assert "--granularity channel makes it smaller" in ran.err
    assert ran.out.startswith("Masked, not smaller")
    model = sec.load("smaller").model
    assert model[3].weight.count_nonzero() < model[3].weight.numel()


def test_exports_stand_beside_the_folder(workplace: Path) -> None:
    found = run_json("prune", "things:net", *SHORT, "--export", "program")
    assert found["files"]["program"] == "smaller.pt2"
    loaded = torch.export.load("smaller.pt2").module()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), sec.load("smaller").model(x))


def test_options_reach_the_plan(workplace: Path) -> None:
    found = run_json(
        *("prune", "things:net", *SHORT, "--criterion", "magnitude", "--set", "norm=1", "--allocation", "uniform"),
        *("--scope", "3", "--floor", "25%", "--round-to", "4", "--seed", "5"),
    )
    recipe = found["report"]["recipe"]
    assert recipe["criterion_options"] == {"norm": 1}
    assert (recipe["allocation"], recipe["scope"], recipe["floor"]) == ("uniform", ["3"], 0.25)
    assert (recipe["round_to"], recipe["seed"]) == (4, 5)
    assert [group["kept"] % 4 for group in found["report"]["groups"]] == [0]


def test_a_method_decides_itself(workplace: Path) -> None:
    common = ("prune", "things:net", "--budget", "sparsity=60%", *SHORT[2:], "--method", "global-magnitude")
    assert run_json(*common, "--set", "minimum=1")["report"]["form"] == "mask"
    own = ("--criterion", "random", "--round-to", "4")
    assert "global-magnitude decides --criterion, --round-to itself" in run(*common, *own).error
    assert (
        "unknown option of global-magnitude 'minimm'; the nearest are minimum"
        in run(*common, "--set", "minimm=1").error
    )


def test_a_method_may_prune_in_training(workplace: Path) -> None:
    words = ("--method", "gradual-magnitude", "--data", "small.npz", "--recover-epochs", "2", "--set", "updates=3")
    found = run_json("prune", "things:net", "--budget", "sparsity=50%", *SHORT[2:4], "--no-measure", *words)
    assert found["report"]["form"] == "mask"
    assert len(found["report"]["history"]["values"]) == 2


# -- errors are behaviour ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--criterion", "magnitud"), "unknown criterion 'magnitud'; the nearest are magnitude"),
        (("--allocation", "globl"), "unknown allocation 'globl'; the nearest are global"),
        (("--granularity", "chanel"), "unknown granularity 'chanel'; the nearest are channel"),
        (("--method", "sparse-gtp"), "unknown method 'sparse-gtp'; the nearest are"),
        (("--scope", "layer9"), "unknown pattern 'layer9'; the nearest are 0, 3."),
        (("--method", "wanda"), "method 'wanda' looks at data: give --data."),
        (("--criterion", "taylor"), "criterion 'taylor' looks at data: give --data."),
        (("--recover-epochs", "1"), "--recover-epochs needs data to train on: give --data or --train-data."),
        (("--sensitivity",), "--sensitivity and --other-budget are measured on --test-data: give it."),
        (("--other-budget", "macs"), "cannot read budget 'macs'"),
        (("--allocation", "erk"), "use uniform, global or given."),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--data", "missing.npz"), "there is no file missing.npz; DATA is a folder"),
        (("--data", "./nowhere"), "there is no file or folder './nowhere'; DATA is a folder"),
        (("--data", "things.py"), "things.py is of no kind that can be read; DATA is"),
        (("--data", "things:nothing"), "the data is empty"),
        (("--data", "empty"), "empty holds no pictures; it must have one folder a class"),
        (("--data", "things:batchez"), "module 'things' has nothing called 'batchez'."),
    ],
)
def test_wrong_options_are_refused(workplace: Path, words: tuple[str, ...], sentence: str) -> None:
    (workplace / "empty").mkdir()
    assert sentence in refused("things:net", *SHORT, *words)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("net.onnx", "there is no file net.onnx."),
        ("./missing", "there is no folder './missing'; a MODEL is timm/NAME"),
        ("things.py", "things.py is a file; a MODEL is timm/NAME"),
        ("things:broken", "things:broken failed with RuntimeError: no luck today"),
        ("nothings:net", "nothings:net: there is no module 'nothings' in the current folder or among the installed"),
    ],
)
def test_what_is_no_model_is_refused(workplace: Path, model: str, sentence: str) -> None:
    assert sentence in refused(model, *SHORT)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ("macs<=0.001%", "Nearest feasible: 'macs<="),
        ("macs=50%", "macs takes <=, not =: write 'macs<=50%'"),
        ("flops<=50%", "unknown metric 'flops'; the nearest is macs"),
        ("3:4", "3:4 needs a number of inputs that 4 divides"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(workplace: Path, budget: str, sentence: str) -> None:
    (workplace / "flat.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Linear(6, 5))\n")
    model, shape = ("flat:net", "1,6") if ":" in budget else ("things:net", "1,1,8,8")
    assert sentence in refused(model, "--budget", budget, "--out", "smaller", "--input", shape)


def test_inputs_must_be_known(workplace: Path) -> None:
    sentence = refused("things:net", "--budget", "macs<=50%", "--out", "smaller")
    assert sentence.startswith("the inputs of things:net are unknown: give --input, as 1,3,224,224, or data")


def test_inputs_must_fit(workplace: Path) -> None:
    sentence = refused("things:net", "--budget", "macs<=50%", "--out", "smaller", "--input", "1,3,8,8")
    assert "does not run on the example inputs (tensor [1, 3, 8, 8])" in sentence


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("things.py", "--out things.py is a file; choose a folder."),
        (".", "holds something else than a saved model; choose a new folder."),
        ("../", "holds something else than a saved model; choose a new folder."),
    ],
)
def test_what_is_not_ours_is_not_replaced(workplace: Path, out: str, sentence: str) -> None:
    assert sentence in refused("things:net", "--budget", "macs<=50%", "--out", out, "--input", "1,1,8,8")


def test_the_model_itself_is_not_replaced(pruned: Ran) -> None:
    before = Path("smaller/model.safetensors").read_bytes()
    sentence = refused("smaller", "--budget", "macs<=90%", "--out", "./smaller")
    assert "is the model itself, which is never changed" in sentence
    assert Path("smaller/model.safetensors").read_bytes() == before


def test_own_classes_need_trust(workplace: Path) -> None:
    assert run("prune", "things:own", "--budget", "macs<=50%", "--out", "mine", "--no-measure").code == 0
    assert "things" in refused("mine", *SHORT[:3], "less", "--no-measure")
    assert run("prune", "mine", *SHORT[:3], "less", "--no-measure", "--trust", "things").code == 0


def test_a_plan_that_fails_leaves_no_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise sec.SecateursError("not today.")

    monkeypatch.setattr("secateurs.pruning.prune", fail)
    assert refused("things:net", *SHORT) == "not today."


def test_an_option_that_a_method_refuses_leaves_no_work(workplace: Path) -> None:
    words = ("things:own", "--budget", "macs<=50%", "--out", "smaller", "--method", "wanda", "--data", "things:batches")
    assert refused(*words).startswith(
        "what is solved layer by layer needs a budget such as sparsity=50% or 2:4, got macs<=50%."
    )


def test_a_folder_in_the_way_of_an_export_is_told_before_the_work(workplace: Path) -> None:
    (workplace / "smaller.hf").mkdir()
    (workplace / "smaller.hf" / "config.json").touch()
    assert refused("things:net", *SHORT, "--export", "huggingface") == (
        "--export huggingface writes smaller.hf, and that is not empty: delete it, or choose another --out."
    )


def test_an_export_that_fails_leaves_the_result(workplace: Path) -> None:
    ran = run("prune", "things:net", *SHORT, "--export", "huggingface")
    assert ran.code == 1
    assert ran.error == "error: Sequential is not a transformers model: save it with save_model."
    told = ran.err.strip().splitlines()
    assert "of the MACs" in told[-3]
    assert told[-2] == "note: the result is whole in smaller, where secateurs.load finds it; only the export failed."
    assert sec.load("smaller").plan.cost("macs") <= 0.5
    assert not Path("smaller.work").exists()


@pytest.mark.parametrize(("method", "zeros"), [("cfsp", False), ("flap", False), ("wanda", True)])
def test_only_what_leaves_zeros_is_announced_as_zeros(method: str, zeros: bool) -> None:
    source = LoadedModel(torch.nn.Linear(2, 2), "net")
    notes = command._announcements(None, method, source, "test.txt")
    assert any("becomes zero in tensors of the same shape" in note for note in notes) is zeros


def test_every_argument_is_sorted_into_what_the_result_depends_on(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings of a run are kept for --resume: a new option is among them unless it is listed as beside."""
    kept: dict[str, Any] = {}

    def look(*_: Any, checkpoint: Path, **__: Any) -> None:
        kept.update(json.loads((checkpoint / "command.json").read_text()))
        raise sec.SecateursError("seen.")

    monkeypatch.setattr("secateurs.pruning.prune", look)
    run("prune", "things:net", *SHORT)
    assert kept["budget"] == "macs<=50%"
    assert {"data", "seed", "lr", "limit", "threads", "measure"} <= set(kept)
    assert not set(kept) & set(command._BESIDE)
