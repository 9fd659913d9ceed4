"""What the language systems make leaves the process in which it was made: saved, exported, generating, as ONNX."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES
from secateurs.core.errors import ModelError
from secateurs.deploy.onnx import export_onnx
from secateurs.integrations.pretrained import export_pretrained
from secateurs.methods.language.flap import Flap, flap
from secateurs.methods.language.ziplm import ZipLM, ziplm
from secateurs.pruning import Pruned
from tests.support import fresh_process
from tests.support.fresh_process import gives

TABLE = ("BERT", "GPT-2", "Llama", "OPT", "Qwen2", "Qwen3")
QUICK = ("BERT", "Llama")
METHODS = ("flap", "ziplm")
FEW = ZipLM(starts=0, failures=0)


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 100, (4, 16), generator=generator)} for _ in range(3)]


@cache
def family(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The model with larger weights, so that tokens depend on what came before."""
    torch.manual_seed(0)
    model, x = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model, x


def counted(whole: nn.Module, smaller: nn.Module, _: Any) -> tuple[float, float]:
    """A clock that counts parameters, so that every run decides the same."""
    one, other = (0.1 + sum(p.numel() for p in model.parameters()) / 1000 for model in (whole, smaller))
    return one, other


@cache
def made(name: str, method: str) -> Pruned:
    """The family cut by about 30%, or 2:4."""
    model, x = family(name)
    if method == "ziplm":
        return ziplm(model, x, "speedup>=1.3x", data=tokens(), timer=counted, options=FEW, measure=False)
    budget = "2:4" if method == "sparsegpt" else "sparsity=30%"
    return sec.prune(model, x, budget, method=method, data=tokens(), measure=False)


def opened(how: str, place: Path) -> dict[str, dict[str, Tensor]]:
    """What a fresh process finds in each folder of `place`."""
    command = [sys.executable, fresh_process.__file__, how, str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {folder.name: load_file(folder / "outputs.safetensors") for folder in place.iterdir()}


def laid_down(place: Path, name: str, pruned: Iterable[str] = ()) -> Path:
    """The folder for the model in a new one, whose notes a fresh process reads."""
    model, x = family(name)
    place.mkdir(parents=True)
    save_file(x, place / "inputs.safetensors")
    note = {"class": type(model).__name__, "causal": model.can_generate(), "pruned": list(pruned)}
    (place / "note.json").write_text(json.dumps(note))
    return place / "model"


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def given(name: str, model: Any) -> dict[str, Tensor]:
    """What the model gives in this process; with its cache the same tokens as without."""
    found = gives(model.eval(), family(name)[1], model.can_generate())
    if model.can_generate():
        assert torch.equal(found["tokens, use_cache=True"], found["tokens, use_cache=False"])
    return found


# -- smaller models --------------------------------------------------------------------------------------------------


def check_saved(names: Iterable[str], methods: Iterable[str], place: Path) -> None:
    wanted = {}
    for method in methods:
        for name in names:
            cut = made(name, method)
            assert 0.5 < cut.plan.cost("params") < 0.9
            folder = cut.save(laid_down(place / f"{method}, {name}", name))
            wanted[f"{method}, {name}"] = given(name, cut.model)
            assert same(given(name, sec.load(folder).model), wanted[f"{method}, {name}"])
    found = opened("saved", place)
    assert [key for key in wanted if not same(found[key], wanted[key])] == []


def test_what_was_saved_comes_back_here_and_in_a_fresh_process(tmp_path: Path) -> None:
    check_saved(QUICK, METHODS, tmp_path)


@pytest.mark.slow
def test_what_was_saved_comes_back_of_all_families(tmp_path: Path) -> None:
    check_saved([name for name in TABLE if name not in QUICK], METHODS, tmp_path)


# The same width in all layers, so that one number of the config fits; heads only where the config has their size, and
# no biases that the class cannot make.
EXPRESSED: dict[str, dict[str, Any]] = {
    "BERT": {"units": "channels"},
    "GPT-2": {"units": "channels"},
    "OPT": {"units": "channels"},
    "Llama": {},
    "Qwen2": {"compensation": False},
    "Qwen3": {"compensation": False},
}


# The levels that are found for GPT-2 are the same in all layers, so that its config has them.
REFUSED = [
    pytest.param(name, method, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in TABLE
    for method in METHODS
    if (name, method) != ("GPT-2", "ziplm")
]


@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_what_no_config_expresses_is_refused_with_the_reason(name: str, method: str, tmp_path: Path) -> None:
    model, x = family(name)
    why = r"makes '.*' \[.*\], but it is \[.*\], and no one number of the config fits"
    with pytest.raises(ModelError, match=rf"^the config of {type(model).__name__} {why}.*: save it with save_model\.$"):
        export_pretrained(made(name, method).model, x, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# -- two of four -------------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> set[str]:
    """The matrices within the blocks, which are numbered, found here once more."""
    found = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    return {name for name in found if {"0", "1"} & set(name.split("."))}


def check_pretrained(names: Iterable[str], place: Path) -> None:
    wanted = {}
    for name in names:
        model, x = family(name)
        how = Flap(structure="UL-UM", **EXPRESSED[name])
        cut = flap(model, x, "sparsity=50%", options=how, data=tokens(), measure=False)
        export_pretrained(cut.model, x, laid_down(place / f"flap, {name}", name))
        wanted[f"flap, {name}"] = given(name, cut.model)
        halved = made(name, "sparsegpt")
        layers = [weight.removesuffix(".weight") for weight in halved.masks]
        assert set(layers) == linear_layers(model)
        export_pretrained(halved.model, x, laid_down(place / f"2:4, {name}", name, layers))
        wanted[f"2:4, {name}"] = given(name, halved.model)
    found = opened("pretrained", place)
    assert [key for key in wanted if not same(found[key], wanted[key])] == []


def test_plain_transformers_load_even_widths_and_two_of_four(tmp_path: Path) -> None:
    check_pretrained(QUICK, tmp_path)


@pytest.mark.slow
def test_plain_transformers_load_all_families(tmp_path: Path) -> None:
    check_pretrained([name for name in TABLE if name not in QUICK], tmp_path)


@pytest.mark.slow
def test_a_fresh_process_sees_a_broken_pattern(tmp_path: Path) -> None:
    """The twin of the test above."""
    family("GPT-2")[0].save_pretrained(laid_down(tmp_path / "GPT-2", "GPT-2", ["transformer.h.0.mlp.c_fc"]))
    with pytest.raises(AssertionError, match=r"transformer\.h\.0\.mlp\.c_fc is not 2:4"):
        opened("pretrained", tmp_path)


@pytest.mark.parametrize("name", QUICK)
def test_every_system_makes_another_model(name: str) -> None:
    """Outputs tell them apart, so that equal ones mean something."""
    models = [family(name)[0], *(made(name, method).model for method in (*METHODS, "sparsegpt"))]
    found = [given(name, model)["logits"] for model in models]
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("BERT", "sparsegpt"),
        pytest.param("Llama", "sparsegpt", marks=pytest.mark.slow),
        *(pytest.param(name, method, marks=pytest.mark.slow) for name in ("BERT", "Llama") for method in METHODS),
    ],
)
def test_onnx_agrees(name: str, method: str, tmp_path: Path) -> None:
    model, (_, x) = made(name, method).model.eval(), family(name)
    path = export_onnx(model, x, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found, *_) = session.run(None, {key: value.numpy() for key, value in x.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(**x).logits, rtol=1e-4, atol=1e-4)
