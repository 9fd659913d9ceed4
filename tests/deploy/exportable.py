"""Two narrowed models and their inputs, for the tests of exporting."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from tests.deploy.samples import narrow_conv

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
TOKENS = {
    # Not in the order of the arguments of forward.
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "input_ids": torch.arange(8).reshape(2, 4),
}


def conv_net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net.append(nn.Dropout(0.5)).append(nn.Linear(5, 3))
    narrow_conv(net[0], net[1], net[3], seed=3)
    return net


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20
    )
    model = transformers.LlamaForCausalLM(config)
    for seed, layer in enumerate(model.model.layers):
        width = 20 + seed
        layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight[:width].detach())
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight[:width].detach())
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, :width].detach())
    return model


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x * 2
