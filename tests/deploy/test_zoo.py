"""Models of torchvision, timm and transformers with a width of its own in every layer, saved and loaded bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from secateurs.deploy.store import load_model, save_model
from tests.deploy.samples import narrow, narrow_conv, narrow_linear, same, some

IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
TOKENS = {"input_ids": torch.arange(14).reshape(2, 7)}


def resnet18() -> tuple[nn.Module, Any]:
    model = torchvision.models.resnet18()
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    for seed, block in enumerate(blocks):
        narrow_conv(block.conv1, block.bn1, block.conv2, seed)
    return model, IMAGE


def mobilenet_v2() -> tuple[nn.Module, Any]:
    model = torchvision.models.mobilenet_v2(width_mult=0.25)
    for seed, block in enumerate(model.features[2:-1]):
        (expand, norm, _), (depthwise, middle, _), project, _ = block.conv
        keep = some(len(expand.weight), seed)
        for layer in (norm, middle):
            narrow(layer, "weight bias running_mean running_var", 0, keep)
        narrow(expand, "weight", 0, keep)
        narrow(depthwise, "weight", 0, keep)
        narrow(project, "weight", 1, keep)
        depthwise.groups = depthwise.in_channels = len(keep)
    return model, IMAGE


def densenet121() -> tuple[nn.Module, Any]:
    model = torchvision.models.DenseNet(growth_rate=8, block_config=(2, 3, 2, 2), num_init_features=16)
    layers = [module for module in model.modules() if hasattr(module, "conv2") and hasattr(module, "norm2")]
    for seed, layer in enumerate(layers):
        narrow_conv(layer.conv1, layer.norm2, layer.conv2, seed)
    return model, IMAGE


def vit_b_16() -> tuple[nn.Module, Any]:
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64
    )
    for seed, block in enumerate(model.encoder.layers):
        narrow_linear(block.mlp[0], block.mlp[3], seed)
    return model, IMAGE


def timm_vit_tiny() -> tuple[nn.Module, Any]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3)
    for seed, block in enumerate(model.blocks):
        narrow_linear(block.mlp.fc1, block.mlp.fc2, seed)
    return model, IMAGE


def timm_convnext_atto() -> tuple[nn.Module, Any]:
    model = timm.create_model("convnext_atto")
    blocks = [block for stage in model.stages for block in stage.blocks]
    for seed, block in enumerate(blocks):
        keep = some(len(block.mlp.fc1.weight), seed)
        narrow(block.mlp.fc1, "weight bias", 0, keep)
        narrow(block.mlp.fc2, "weight", 1, keep)
    return model, IMAGE


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}


def bert() -> tuple[nn.Module, Any]:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    for seed, layer in enumerate(model.bert.encoder.layer):
        narrow_linear(layer.intermediate.dense, layer.output.dense, seed)
    return model, TOKENS


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    for seed, block in enumerate(model.transformer.h):
        keep = some(block.mlp.c_fc.nf, seed)
        block.mlp.c_fc.weight = nn.Parameter(block.mlp.c_fc.weight[:, keep].detach())
        block.mlp.c_fc.bias = nn.Parameter(block.mlp.c_fc.bias[keep].detach())
        block.mlp.c_proj.weight = nn.Parameter(block.mlp.c_proj.weight[keep].detach())
        block.mlp.c_fc.nf = block.mlp.c_proj.nx = len(keep)
    return model, TOKENS


def llama() -> tuple[nn.Module, Any]:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    for seed, layer in enumerate(model.model.layers):
        keep = some(len(layer.mlp.up_proj.weight), seed)
        narrow(layer.mlp.up_proj, "weight", 0, keep)
        narrow(layer.mlp.gate_proj, "weight", 0, keep)
        narrow(layer.mlp.down_proj, "weight", 1, keep)
    return model, TOKENS


def vit() -> tuple[nn.Module, Any]:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=64))
    for seed, layer in enumerate(model.vit.layers):
        narrow_linear(layer.mlp.fc1, layer.mlp.fc2, seed)
    return model, {"pixel_values": IMAGE}


ZOO = [resnet18, mobilenet_v2, densenet121, vit_b_16, timm_vit_tiny, timm_convnext_atto, bert, gpt2, llama, vit]


@pytest.mark.parametrize("build", ZOO, ids=[build.__name__ for build in ZOO])
def test_narrowed_models_come_back_bit_for_bit(build: Callable[[], tuple[nn.Module, Any]], tmp_path: Path) -> None:
    model, inputs = build()
    model.eval()
    back = load_model(save_model(model, tmp_path / "m"))
    assert same(model, back, inputs)
    assert repr(back) == repr(model)
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert sum(tensor.numel() for tensor in back.parameters()) == sum(tensor.numel() for tensor in model.parameters())


def test_loaded_models_train(tmp_path: Path) -> None:
    model, inputs = bert()
    back = load_model(save_model(model, tmp_path / "m"))
    assert back.training
    back(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in back.parameters())


def test_hugging_face_models_share_one_config_and_tied_weights(tmp_path: Path) -> None:
    model, _ = gpt2()
    back = load_model(save_model(model, tmp_path / "m"))
    assert back.lm_head.weight is back.transformer.wte.weight
    configs = {id(module.config) for module in back.modules() if hasattr(module, "config")}
    assert configs == {id(back.config)}
    assert back.config.to_dict() == model.config.to_dict()


def test_hugging_face_models_generate(tmp_path: Path) -> None:
    model, inputs = gpt2()
    model.eval()
    back = load_model(save_model(model, tmp_path / "m"))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(back.generate(**inputs, **settings), model.generate(**inputs, **settings))


def hidden(model: nn.Module) -> tuple[Tensor, ...]:
    states: tuple[Tensor, ...] = model(**TOKENS, output_hidden_states=True).hidden_states
    return states


@pytest.fixture
def unnoted() -> Iterator[Callable[[], None]]:
    """Makes transformers forget what to collect of each class, as in a process that has built no such model."""
    noted = dict(_CAN_RECORD_REGISTRY)
    yield _CAN_RECORD_REGISTRY.clear
    _CAN_RECORD_REGISTRY.update(noted)


def test_hidden_states_are_collected_after_loading(tmp_path: Path, unnoted: Callable[[], None]) -> None:
    model, _ = llama()
    model.eval()
    # Asking for them hangs hooks on the layers, which must neither stop the save nor be lost for the loaded model.
    expected = hidden(model)
    save_model(model, tmp_path / "m")
    unnoted()
    found = hidden(load_model(tmp_path / "m"))
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
