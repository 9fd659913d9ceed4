"""Writes the golden models: tiny saved models with inputs and outputs, one folder a file format.

Run once for each new file format, `python -m tests.deploy.make_golden`, and never again for an old one: the files prove
that models saved by an earlier release still load.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from secateurs.deploy.store import FORMAT, save_model

__all__ = ["GOLDEN", "main"]

GOLDEN = Path(__file__).parent / "golden"


def conv() -> tuple[nn.Module, Tensor]:
    """Convolutions of unequal widths, one of them depthwise, with batch norms that have seen data."""
    net = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False),
        nn.BatchNorm2d(7),
        nn.Hardswish(),
        nn.Conv2d(7, 7, 3, groups=7),
        nn.Conv2d(7, 5, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 4),
    )
    images = torch.randn(2, 3, 8, 8)
    net(images)
    return net, images


def attention() -> tuple[nn.Module, Tensor]:
    """Encoder layers with feed-forward widths of their own."""
    net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, width, batch_first=True) for width in (11, 5)))
    return net, torch.randn(2, 3, 8)


def recurrent() -> tuple[nn.Module, Tensor]:
    """A recurrent net in bfloat16 with a tied, frozen weight."""
    net = nn.GRU(4, 6, num_layers=2, bidirectional=True, bias=False).bfloat16()
    net.weight_hh_l1 = net.weight_hh_l0
    net.weight_hh_l0.requires_grad_(False)
    return net, torch.randn(3, 2, 4).bfloat16()


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "attention": attention,
    "conv": conv,
    "recurrent": recurrent,
}


def main() -> None:
    """Writes all models of the present format."""
    for seed, (name, make) in enumerate(MODELS.items()):
        folder = GOLDEN / f"v{FORMAT}" / name
        if folder.exists():
            sys.exit(f"{folder} exists: golden files are never written twice")
        torch.manual_seed(seed)
        model, inputs = make()
        with torch.no_grad():
            outputs = model.eval()(inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        save_model(model, folder, extra={"expected.safetensors": save({"inputs": inputs, "outputs": first})})


if __name__ == "__main__":
    main()
