"""CIFAR-10 as the benchmarks use it: pretrained residual networks and exact or JPEG images."""

from __future__ import annotations

import io
import os
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet", "batches", "data_folder", "exact", "jpeg", "pretrained", "shuffled"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_folder() -> Path:
    """The folder with the benchmark data: SECATEURS_DATA, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("SECATEURS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"no benchmark data at {folder}: set SECATEURS_DATA to the folder that has cifar10/")
    return folder


class Block(nn.Module):
    """Two 3×3 convolutions with a parameter-free shortcut (option A of He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The CIFAR residual network of 6n+2 layers, named as in the widely used pretrained checkpoints."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, width = (depth - 2) // 6, 16
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, outputs in enumerate((16, 32, 64), 1):
            layers = [
                Block(width, outputs, 1 if stage == 1 else 2),
                *(Block(outputs, outputs, 1) for _ in range(blocks - 1)),
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            width = outputs
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(depth: int) -> ResNet:
    """ResNet-20 or ResNet-56 with the weights of the benchmark data, in evaluation mode."""
    model = ResNet(depth)
    model.load_state_dict(load_file(data_folder() / "cifar10" / f"resnet{depth}.safetensors"))
    return model.eval()


def normalized(images: np.ndarray) -> Tensor:
    """uint8 [n, height, width, 3] as float [n, 3, height, width], normalised as the checkpoints expect."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@cache
def exact(part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of the exact part: "train" has 8,068 of them, "test" 1,017."""
    with np.load(data_folder() / "cifar10" / "cifar10_exact.npz") as file:
        return normalized(file[f"{part}_x"]), torch.from_numpy(file[f"{part}_y"]).long()


@cache
def jpeg(part: str, limit: int) -> tuple[Tensor, Tensor]:
    """The first `limit` images and labels of the JPEG part; the checkpoints never saw JPEG loss."""
    from PIL import Image

    with np.load(data_folder() / "cifar10" / "cifar10_jpeg.npz") as file:
        stream, ends, labels = file[f"{part}_jpeg"], file[f"{part}_offset"], file[f"{part}_y"]
    images = [
        np.asarray(Image.open(io.BytesIO(stream[a:b].tobytes())).convert("RGB")) for a, b in pairwise(ends[: limit + 1])
    ]
    return normalized(np.stack(images)), torch.from_numpy(labels[: len(images)]).long()


def batches(part: tuple[Tensor, Tensor], size: int = 128, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The first `limit` images in batches, in order."""
    x, y = part
    return list(zip(x[:limit].split(size), y[:limit].split(size), strict=True))


def shuffled(part: tuple[Tensor, Tensor], seed: int, size: int = 128):
    """A function from the number of the pass to shuffled batches with random flips and crops, as in He et al. 2016."""
    x, y = part

    def one_pass(epoch: int) -> list[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(x), generator=random)
        return [(augmented(x[i], random), y[i]) for i in order.split(size)]

    return one_pass


def augmented(x: Tensor, random: torch.Generator) -> Tensor:
    """Each image flipped with probability ½ and shifted by up to four pixels."""
    flip = torch.rand(len(x), generator=random) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4))
    dx, dy = torch.randint(0, 9, (2, len(x)), generator=random)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(32))[:, None, None, :]
    return padded[torch.arange(len(x))[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
