"""Small networks as exporters write them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.torchvision_shim import declare_missing_ops

declare_missing_ops()
Case = Callable[[], tuple[nn.Module, Tensor]]


class Logits(nn.Module):
    """A transformer of Hugging Face that takes ids and returns its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, return_dict=False)[0]
        return found


class Dense(nn.Module):
    """Convolutions of which each sees the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 8 * n, 8, 3, padding=1) for n in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 8 * n) for n in range(3))
        self.head = nn.Linear(27, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            seen = torch.cat([seen, layer(norm(seen).relu())], 1)
        return self.head(seen.mean((2, 3)))


def vision(name: str, pixels: int = 32, **sizes: Any) -> Case:
    """A torchvision model with random weights."""

    def make() -> tuple[nn.Module, Tensor]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=10, **sizes), torch.randn(
            2, 3, pixels, pixels
        )

    return make


def vit() -> tuple[nn.Module, Tensor]:
    """A vision transformer of two small layers."""
    import torchvision

    made = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    return made, torch.randn(2, 3, 32, 32)


def language(model: str, config: str, **sizes: Any) -> Case:
    """A transformer of two small layers over ids."""

    def make() -> tuple[nn.Module, Tensor]:
        import transformers

        common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        built = getattr(transformers, config)(**common, vocab_size=100, use_cache=False, **sizes)
        return Logits(getattr(transformers, model)(built)), torch.randint(0, 100, (2, 9))

    return make


NETS: dict[str, Case] = {
    "resnet18": vision("resnet18"),
    "mobilenet_v2": vision("mobilenet_v2"),
    "shufflenet_v2_x0_5": vision("shufflenet_v2_x0_5"),
    "dense": lambda: (Dense(), torch.randn(2, 3, 8, 8)),
    "vit": vit,
    "bert": language("BertModel", "BertConfig"),
    "llama": language("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
}
# PyTorch's older exporter has no `aten::diff`, which the masks of this one are made with.
OLD_CANNOT = {"llama"}


def exported(name: str, path: Path, *, dynamo: bool, dynamic: bool = True) -> Path:
    """The file; its batch, and the tokens of language models, may be any number if `dynamic`."""
    torch.manual_seed(0)
    model, example = NETS[name]()
    model.eval()
    free = (0,) if example.is_floating_point() else (0, 1)
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    if dynamo:
        axes: Any = (dict.fromkeys(free, torch.export.Dim.DYNAMIC),) if dynamic else None
        options.update(dynamo=True, verbose=False, dynamic_shapes=axes)
    else:
        axes = {"x": {axis: f"d{axis}" for axis in free}} if dynamic else None
        options.update(dynamo=False, dynamic_axes=axes, opset_version=17)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), str(path), **options)
    return path
