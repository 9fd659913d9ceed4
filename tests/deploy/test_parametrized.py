"""Parametrized weights: pruned, saved and opened elsewhere as they are, bit for bit, and still parametrized."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import secateurs as sec
from secateurs.core.errors import FileError
from secateurs.deploy.huggingface import save_pretrained
from secateurs.deploy.skeleton import decode, encode
from secateurs.deploy.store import load_model, save_model
from tests.deploy.samples import HERE, Halved, Own

transformers = pytest.importorskip("transformers")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(16, 12, 3), n_power_iterations=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        parametrizations.orthogonal(nn.Linear(12, 16), orthogonal_map="cayley"),
        nn.ReLU(),
        parametrizations.weight_norm(parametrizations.weight_norm(nn.Linear(16, 4)), name="bias"),
    ).eval()


def again(model: nn.Module, folder: Path, **options: Any) -> Any:
    return load_model(save_model(model, folder / "saved"), **options)


def test_a_net_of_all_norms_is_pruned_saved_and_opened(tmp_path: Path) -> None:
    pruned = sec.prune(net(), X, "params<=60%", measure=False).model
    loaded = again(pruned, tmp_path)
    assert torch.equal(loaded(X), pruned(X))
    assert list(loaded.state_dict()) == list(pruned.state_dict())
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in pruned.modules()]
    assert isinstance(loaded[0], nn.Conv2d)
    assert loaded[0].out_channels == loaded[2].in_channels == loaded[0].weight.shape[0] < 16
    assert parametrize.is_parametrized(loaded[8], "bias")


def test_what_is_opened_trains_like_what_was_saved(tmp_path: Path) -> None:
    models = [net(), again(net(), tmp_path)]
    for model in models:
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert torch.equal(models[0](X), models[1](X))
    assert not torch.equal(models[1](X), net().train()(X))
    weight = models[1][6].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(12), atol=1e-5, rtol=0)


def test_what_is_opened_can_be_changed_like_what_was_saved(tmp_path: Path) -> None:
    loaded = again(net(), tmp_path)
    with torch.no_grad():
        loaded[0].weight = torch.ones(16, 3, 3, 3)
    torch.testing.assert_close(loaded[0].weight, torch.ones(16, 3, 3, 3))
    before = loaded[8].weight.detach().clone()
    parametrize.remove_parametrizations(loaded[8], "weight")
    assert torch.equal(loaded[8].weight, before)
    assert type(parametrize.remove_parametrizations(loaded[8], "bias")) is nn.Linear
    torch.testing.assert_close(copy.deepcopy(loaded)(X), loaded(X))
    assert again(loaded, tmp_path)[8].weight.shape == (4, 16)


def test_old_names_of_weight_norm_load(tmp_path: Path) -> None:
    model = net()
    parts = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {}
    for name, tensor in model.state_dict().items():
        for new, short in parts.items() if name[0] in "08" else ():
            name = name.replace(new, short)
        old[name] = tensor + 0.1
    loaded = again(again(model, tmp_path), tmp_path)
    assert len(loaded[0]._load_state_dict_pre_hooks) == 1
    loaded.load_state_dict(old)
    assert torch.equal(loaded[0].parametrizations.weight.original0, old["0.weight_g"])


def test_a_fresh_process_gives_the_same(tmp_path: Path) -> None:
    pruned = sec.prune(net(), X, "params<=60%")
    pruned.save(tmp_path / "m")
    torch.save(X, tmp_path / "x.pt")
    code = (
        "import torch, secateurs; from safetensors.torch import save_file\n"
        f"model = secateurs.load({str(tmp_path / 'm')!r}).model\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"save_file({{'y': model(x).detach()}}, {str(tmp_path / 'y.safetensors')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], pruned.model(X))


def test_a_parametrization_of_the_model_itself(tmp_path: Path) -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.ones(1, 4)
    assert torch.equal(again(layer, tmp_path)(x), layer(x))


def test_parametrizations_of_a_user_are_code_of_a_user(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.raises(FileError, match=r"uses code outside the packages .*tests.deploy.samples:Halved"):
        again(layer, tmp_path)
    loaded = again(layer, tmp_path, trust=HERE)
    assert torch.equal(loaded(torch.ones(1, 4)), layer(torch.ones(1, 4)))


def test_a_name_alone_makes_no_parametrization(tmp_path: Path) -> None:
    loaded = again(model := Own(), tmp_path, trust=HERE)
    assert type(loaded) is Own
    assert torch.equal(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.mark.parametrize("names", [[], ["bias"], ["weight", "bias"], ["forward"]])
def test_names_that_nothing_makes_are_refused(names: list[str]) -> None:
    skeleton, tensors = encode(parametrizations.weight_norm(nn.Linear(4, 3)))
    skeleton = json.loads(json.dumps(skeleton))
    skeleton["modules"][""]["parametrized"] = names
    with pytest.raises(FileError, match="a Linear does not hold what makes its tensors"):
        decode(skeleton, tensors.__getitem__)


def test_a_list_in_the_place_of_a_parametrization_is_refused() -> None:
    skeleton, tensors = encode(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))))
    skeleton = json.loads(json.dumps(skeleton))
    made = skeleton["modules"][""]["children"]["0"]["children"]["parametrizations"]["children"]["weight"]
    made["class"] = "torch.nn.modules.container:Sequential"
    with pytest.raises(FileError, match="does not hold what makes its tensors"):
        decode(skeleton, tensors.__getitem__)


# -- models of transformers --------------------------------------------------------------------------------------------

_WAVE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 20,
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Wav2Vec2": {}, "Hubert": {}, "WavLM": {}, "UniSpeech": {}, "UniSpeechSat": {}, "SEW": {"squeeze_factor": 2},
    "Data2VecAudio": {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
}  # fmt: skip
_POSITION = ("pos_conv_embed.conv", "pos_conv_embed.layers.0.conv")
_SOUND = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))


def heard(family: str, head: str = "ForCTC") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_WAVE, **FAMILIES[family]})
    return getattr(transformers, f"{family}{head}")(config).eval()


def first(model: Any) -> Tensor:
    with torch.no_grad():
        return model(_SOUND)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_speech_are_pruned_saved_and_opened(family: str, tmp_path: Path) -> None:
    """The positions' convolution has a weight norm, and loses the groups in which hidden channels go."""
    model = heard(family)
    options = {"granularity": "width", "allocation": "uniform", "measure": False}
    pruned = sec.prune(model, _SOUND, "sparsity=25%", **options).model
    position = next(m for n, m in pruned.named_modules() if n.endswith(_POSITION))
    # The code of WavLM's attention is fixed to its width.
    assert (pruned.lm_head.in_features < 32) is (family != "WavLM")
    if family != "Data2VecAudio":
        assert parametrize.is_parametrized(position, "weight")
        assert tuple(position.parametrizations.weight.original0.shape) == (1, 1, 8)
        assert position.weight.shape[0] == position.out_channels
        assert (position.out_channels < 32) is (family != "WavLM")
    loaded = again(pruned, tmp_path)
    assert torch.equal(first(loaded), first(pruned))
    loaded.train()(_SOUND)[0].sum().backward()
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "pos_conv" in n)


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_what_a_config_can_say_loads_from_its_folder(family: str, tmp_path: Path) -> None:
    pruned = sec.prune(
        heard(family, "Model"), _SOUND, "sparsity=25%", allocation="uniform", ignore="*attention*", measure=False
    ).model
    save_pretrained(pruned, tmp_path / "m", example_inputs=_SOUND)
    loaded = type(pruned).from_pretrained(tmp_path / "m").eval()
    assert (loaded.config.intermediate_size, list(loaded.config.conv_dim)) == (36, [12, 16])
    assert torch.equal(first(loaded), first(pruned))
