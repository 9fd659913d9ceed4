"""scikit-learn's handwritten digits, 1,000 to train on and 797 to test on, and the networks that learn them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from secateurs.measure.quality import evaluate
from secateurs.recover.finetune import fine_tune

__all__ = ["accuracy", "convnet", "digits", "epochs_of", "mlp", "train"]

Pair = tuple[Tensor, Tensor]


def digits(seed: int = 0, *, images: bool = False) -> tuple[Pair, Pair]:
    """Training and test part, split by a fixed permutation for the seed; pixels in [0, 1]."""
    raw = load_digits()
    x = torch.from_numpy(raw.data).float() / 16
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = (x.view(-1, 1, 8, 8) if images else x)[order]
    return (x[:1000], y[order][:1000]), (x[1000:], y[order][1000:])


def mlp(widths: Sequence[int] = (64, 100, 50, 10), seed: int = 0, *, kaiming: bool = False) -> nn.Sequential:
    """A ReLU network of linear layers without normalisation, with PyTorch's or with Kaiming-normal initial weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    for layer in layers if kaiming else ():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers[:-1])


def convnet(widths: Sequence[int] = (16, 32, 32), seed: int = 0) -> nn.Sequential:
    """Three 3×3 convolutions with batch norm, max-pooling after the first, global average, classifier."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise((1, *widths))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if i == 0:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def epochs_of(part: Pair, seed: int, size: int = 50) -> Callable[[int], list[Pair]]:
    """A function from the number of the pass to shuffled batches."""
    x, y = part

    def one_pass(epoch: int) -> list[Pair]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(10_000 * seed + epoch))
        return [(x[i], y[i]) for i in order.split(size)]

    return one_pass


def train(
    model: nn.Module, part: Pair, seed: int, *, epochs: int = 40, lr: float = 0.1, size: int = 50, **options
) -> nn.Module:
    """`model`, trained with momentum SGD."""
    fine_tune(model, epochs_of(part, seed, size), epochs=epochs, lr=lr, seed=seed, **options)
    return model


def accuracy(model: nn.Module, part: Pair) -> float:
    """Share of the part that the model names right."""
    return evaluate(model, [part], ("accuracy",))["accuracy"]
