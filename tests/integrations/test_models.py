from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateurs as sec
from secateurs.core.errors import FileError, MissingExtraError, ModelError, OptionError
from secateurs.deploy import save_model
from secateurs.integrations import ImageFormat, LoadedModel, load_model_from

MODULE = """
import torch
from torch import nn
class Net(nn.Linear):
    def __init__(self): super().__init__(3, 8)
ready = nn.Linear(2, 2)
number = 3
def make(): return nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2))
def pair(): return nn.Linear(3, 8), torch.ones(2, 3)
def wrong(): return 3
def broken(): raise ValueError("it rains. And more of it")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "forge.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("forge", None)


def shapes(loaded: LoadedModel) -> Any:
    inputs = loaded.example_inputs
    return {k: tuple(v.shape) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(inputs.shape)


# -- factories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["forge:make", "forge:Net", "forge:ready"])
def test_factories(spec: str) -> None:
    loaded = load_model_from(spec)
    assert (loaded.name, loaded.example_inputs) == (spec, None)
    assert not loaded.model.training


def test_a_factory_may_bring_its_inputs() -> None:
    loaded = load_model_from("forge:pair")
    assert shapes(loaded) == (2, 3)
    assert loaded.with_examples(torch.zeros(5, 3)) is loaded
    assert shapes(load_model_from("forge:pair", shape=(7, 3))) == (7, 3)


def test_weights_follow_the_seed() -> None:
    a, b, c = (load_model_from("forge:make", seed=seed).model[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_a_batch_says_of_the_inputs() -> None:
    loaded = load_model_from("forge:make")
    with pytest.raises(OptionError, match="the inputs of forge:make are unknown: give --input"):
        loaded.runnable()
    assert shapes(loaded.with_examples((torch.zeros(5, 3), torch.zeros(5)), 2).runnable()) == (2, 3)
    words = loaded.with_examples({"input_ids": torch.zeros(5, 9), "labels": torch.zeros(5, 9)})
    assert shapes(words) == {"input_ids": (1, 9)}
    several = loaded.with_examples((torch.zeros(5, 1), torch.zeros(5, 2), torch.zeros(5)), 3)
    assert [tuple(x.shape) for x in several.example_inputs] == [(3, 1), (3, 2)]


@pytest.mark.parametrize(
    ("spec", "kind", "sentence"),
    [
        (
            "forge:wrong",
            ModelError,
            "forge:wrong returned a int; it must return a torch.nn.Module, or (module, example",
        ),
        ("forge:number", OptionError, "forge:number is a int; it must be a function that returns a model."),
        ("forge:broken", ModelError, "forge:broken failed with ValueError: it rains"),
        ("forge.py", FileError, "forge.py is a file; a MODEL is timm/NAME"),
        ("../", FileError, "holds no model: neither model.json nor config.json is in it."),
        ("~/x", FileError, "there is no folder '~/x'"),
        ("a/b/c", FileError, "there is no folder 'a/b/c'"),
        ("", FileError, "there is no folder ''"),
        ("model.onnx", FileError, "there is no file model.onnx."),
    ],
)
def test_what_is_no_model(tmp_path: Path, spec: str, kind: type[Exception], sentence: str) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(kind) as refused:
        load_model_from(spec if spec != "../" else "inner")
    assert sentence in str(refused.value)


def test_devices() -> None:
    loaded = load_model_from("forge:pair")
    assert loaded.to("cpu").model.weight.device.type == "cpu"
    with pytest.raises(OptionError, match="device 'abacus' cannot be used"):
        loaded.to("abacus")


def test_a_folder_of_ours() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    made = sec.prune(net, torch.ones(4, 3), "macs<=50%", measure=False, name="little")
    made.save("saved")
    loaded = load_model_from("saved")
    assert (loaded.name, shapes(loaded), loaded.fixed) == ("little", (4, 3), True)
    assert torch.equal(loaded.model[0].weight, made.model[0].weight)
    save_model(net, "bare")
    bare = load_model_from("bare")
    assert (bare.name, bare.example_inputs) == ("bare", None)
    assert torch.equal(bare.model[0].weight, net[0].weight)


# -- libraries of pictures ---------------------------------------------------------------------------------------------


def test_timm() -> None:
    pytest.importorskip("timm")
    loaded = load_model_from("timm/resnet18", random_weights=True, batch=2)
    assert loaded.images == ImageFormat((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.95, "bicubic")
    assert (loaded.name, shapes(loaded)) == ("timm/resnet18", (2, 3, 224, 224))
    assert shapes(load_model_from("timm/resnet18", random_weights=True, shape=(1, 3, 64, 64))) == (1, 3, 64, 64)
    with pytest.raises(OptionError, match="unknown timm model 'resnet1800'; the nearest are resnet"):
        load_model_from("timm/resnet1800")


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    loaded = load_model_from("torchvision/squeezenet1_1", random_weights=True)
    assert loaded.images == ImageFormat((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, "bilinear")
    assert shapes(loaded) == (1, 3, 224, 224)
    with pytest.raises(OptionError, match="unknown torchvision model 'squeezenet'; the nearest are squeezenet"):
        load_model_from("torchvision/squeezenet")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way out. Try\nlater")

    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(ModelError) as refused:
        load_model_from("torchvision/resnet18")
    assert str(refused.value) == (
        "the pretrained weights of torchvision/resnet18 cannot be loaded (no way out); --random-weights goes without "
        "them."
    )


def test_a_build_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("secateurs.integrations.models.importlib.import_module", fail)
    with pytest.raises(ModelError, match=r"timm cannot be imported \(operator torchvision::nms does not exist\)"):
        load_model_from("timm/resnet18")


@pytest.mark.parametrize(
    ("package", "spec"), [("timm", "timm/x"), ("torchvision", "torchvision/x"), ("transformers", "name")]
)
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "secateurs.integrations.hub", raising=False)
    # `from . import hub` finds the attribute of the package before it looks for the module.
    monkeypatch.delattr("secateurs.integrations.hub", raising=False)
    with pytest.raises(MissingExtraError, match=f"{package} is needed here; install it with: pip install 'secateurs"):
        load_model_from(spec)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the smallest models of four kinds."""
    hf = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("tiny")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = {
        "gpt": hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=11, n_positions=24, n_embd=8, n_layer=1, n_head=2)),
        "bert": hf.BertForSequenceClassification(hf.BertConfig(vocab_size=11, **small)),
        "vit": hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, **small)),
        "t5": hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
    processor = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 16, "width": 16}}'
    (place / "vit" / "preprocessor_config.json").write_text(processor)
    return place


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("gpt", "GPT2LMHeadModel", {"input_ids": (2, 24)}),
        ("bert", "BertForSequenceClassification", {"input_ids": (2, 128)}),
        ("vit", "ViTForImageClassification", {"pixel_values": (2, 3, 16, 16)}),
        ("t5", "T5ForConditionalGeneration", {"input_ids": (2, 128), "decoder_input_ids": (2, 8)}),
    ],
)
def test_transformers(tiny: Path, name: str, kind: str, expected: dict[str, tuple[int, ...]]) -> None:
    loaded = load_model_from(str(tiny / name), batch=2)
    assert type(loaded.model).__name__ == kind
    assert shapes(loaded) == expected
    loaded.model(**loaded.example_inputs)
    other = load_model_from(str(tiny / name), random_weights=True).model
    mine = dict(loaded.model.named_parameters())
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in mine.items()}
    assert any(not torch.equal(p, mine[n]) for n, p in other.named_parameters())


def test_what_transformers_want(tiny: Path) -> None:
    vit, gpt, bert = (load_model_from(str(tiny / name)) for name in ("vit", "gpt", "bert"))
    assert vit.images == ImageFormat((16, 16), 3, (0.5,) * 3, (0.25,) * 3)
    assert vit.text is None
    assert gpt.images is None
    assert gpt.text is not None
    assert (gpt.text.causal, gpt.text.length) == (True, 24)
    assert bert.text is not None
    assert not bert.text.causal
    assert shapes(load_model_from(str(tiny / "gpt"), shape=(3, 5))) == {"input_ids": (3, 5)}


def test_no_code_of_a_hub_runs_unasked(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MineConfig"}}'
    )
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="--trust-remote-code lets its code run"):
        load_model_from(str(folder))


def test_a_name_that_no_hub_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("secateurs.integrations.hub")

    def fail(*_: Any) -> None:
        raise OSError("nobody has it. Look elsewhere")

    monkeypatch.setattr(hub, "model_of", fail)
    with pytest.raises(
        ModelError, match=r"who/what cannot be loaded as a Hugging Face model \(nobody has it\); a MODEL"
    ):
        load_model_from("who/what")
