"""`prune(model, x, "macs<=50%")` with no further argument, on the architectures that people bring first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateurs as sec
from secateurs.core.batch import call, main_output
from secateurs.measure.macs import macs

Case = Callable[[], tuple[nn.Module, Any]]


def picture(name: str, pixels: int = 64, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options).eval(), torch.randn(1, 3, pixels, pixels)

    return make


def timm_model(name: str, **options: Any) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import timm

        model = timm.create_model(name, pretrained=False, **options).eval()
        return model, torch.randn(1, *model.default_cfg["input_size"])

    return make


def text(model: str, config: str, **sizes: Any) -> Case:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=200, **sizes)).eval()
        return built, {"input_ids": torch.randint(0, 200, (2, 12))}

    return make


def small_vit() -> tuple[nn.Module, Any]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    return model.eval(), torch.randn(1, 3, 32, 32)


BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}
LLAMA = {**BERT, "num_key_value_heads": 2}
MODELS: dict[str, Case] = {
    "resnet18": picture("resnet18"),
    "squeezenet": picture("squeezenet1_1"),
    "mobilenet_v2": picture("mobilenet_v2"),
    "densenet121": picture("densenet121"),
    "torchvision vit": small_vit,
    "timm vit": timm_model("vit_tiny_patch16_224", depth=2),
    "timm convnext": timm_model("convnext_atto"),
    "bert": text("BertModel", "BertConfig", **BERT),
    "gpt2": text("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "llama": text("LlamaForCausalLM", "LlamaConfig", **LLAMA),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_the_macs_without_hints(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = sec.prune(model, inputs, "macs<=50%", measure=False)

    assert 0.45 <= cut.plan.cost("macs") <= 0.5
    # The polynomial and an independent counter agree on both sides.
    assert macs(model, inputs) == pytest.approx(cut.plan.costs.total("macs"), rel=1e-6)
    assert macs(cut.model, inputs) == pytest.approx(cut.plan.cost("macs", relative=False), rel=1e-6)
    assert sum(p.numel() for p in cut.model.parameters()) == cut.plan.cost("params", relative=False)
    assert cut.report.proof is not None
    assert cut.report.proof <= 1e-5

    cut.save(tmp_path / "model")
    again = sec.load(tmp_path / "model").model
    with torch.no_grad():
        wanted, mine, theirs = (main_output(call(m, inputs)) for m in (model, cut.model, again))
    assert mine.shape == wanted.shape
    assert torch.equal(mine, theirs)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())

    main_output(
        call(cut.model.train(), inputs if name != "densenet121" else inputs.repeat(2, 1, 1, 1))
    ).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in cut.model.parameters())


def test_a_pruned_language_model_generates_with_a_cache() -> None:
    for name in ("gpt2", "llama"):
        model, inputs = MODELS[name]()
        cut = sec.prune(model, inputs, "macs<=60%", measure=False).model
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            cached = cut.generate(inputs["input_ids"], use_cache=True, **options)
            assert torch.equal(cached, cut.generate(inputs["input_ids"], use_cache=False, **options))


def test_grouped_queries_go_with_their_keys_and_values() -> None:
    model, inputs = MODELS["llama"]()
    cut = sec.prune(model, inputs, "sparsity=50%", granularity="head", allocation="uniform", measure=False).model
    attention = cut.model.layers[0].self_attn
    assert (attention.k_proj.out_features, attention.v_proj.out_features) == (16, 16)
    assert (attention.q_proj.out_features, attention.o_proj.in_features) == (32, 32)
