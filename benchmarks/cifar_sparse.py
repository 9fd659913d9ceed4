"""Dense-to-sparse training on CIFAR-10 from a pretrained ResNet-20: GraNet, PDP, gradual and one-shot magnitude."""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks import cifar
from benchmarks.record import holds, mean_std, record
from secateurs import PDP, GlobalMagnitude, GradualMagnitude, GraNet
from secateurs.measure.quality import evaluate
from secateurs.recover.batchnorm import recalibrate_batch_norm
from secateurs.recover.finetune import fine_tune

EPOCHS, BATCHES, EVERY = 2, 64, 8
STEPS = EPOCHS * BATCHES
SPARSITIES = (0.95, 0.98)
SEEDS = (0, 1, 2)
# Points of accuracy within which two arms are called equal: the standard error of a difference on 1,017 images.
TIE = 1.0

Make = Callable[[nn.Module, Any, int], Any]


def arms(sparsity: float) -> dict[str, Make]:
    """By name, what prunes: all have the same steps, and are done with pruning by three quarters of them."""
    end = STEPS // 2
    return {
        "one-shot magnitude": lambda m, o, s: GlobalMagnitude(m, o, sparsity=sparsity),
        "gradual magnitude, global": lambda m, o, s: GraNet(
            m, o, sparsity=sparsity, initial=0, share=0, end=end, until=end, every=EVERY, seed=s
        ),
        "gradual magnitude, per tensor": lambda m, o, s: GradualMagnitude(
            m, o, sparsity=sparsity, begin=0, end=end, every=EVERY
        ),
        "GraNet": lambda m, o, s: GraNet(
            m, o, sparsity=sparsity, initial=0, end=end, until=3 * STEPS // 4, every=EVERY, seed=s
        ),
        "PDP": lambda m, o, s: PDP(m, o, begin=0, every=EVERY, rise=1 / 8, sparsity=sparsity, until=3 * STEPS // 4),
    }


def trained(make: Make, seed: int) -> float:
    """Test accuracy after the training, batch-norm statistics measured again."""
    torch.manual_seed(seed)
    model, passes = cifar.pretrained(20), cifar.shuffled(cifar.exact("train"), seed)
    fine_tune(model, passes, epochs=EPOCHS, lr=0.05, weight_decay=5e-4, seed=seed, pruner=lambda m, o: make(m, o, seed))
    recalibrate_batch_norm(model, passes(0))
    return evaluate(model, cifar.batches(cifar.exact("test")), ("accuracy",))["accuracy"]


def verdict(sparsity: float, found: dict[str, list[float]]) -> str:
    """The claims with their figures in points."""
    mean = {name: 100 * fmean(values) for name, values in found.items()}

    def against(name: str, other: str) -> str:
        gap = mean[name] - mean[other]
        return f"{name} over {other} {gap:+.2f} ({'a tie' if abs(gap) < TIE else holds(gap > 0)})"

    pairs = [("GraNet", "gradual magnitude, global"), ("PDP", "gradual magnitude, global")]
    pairs += [("gradual magnitude, global", "one-shot magnitude")]
    return f"At {sparsity:.0%}: {'; '.join(against(*pair) for pair in pairs)}."


def main() -> None:
    """None; the table is on file after each sparsity."""
    seeds = SEEDS[: int(sys.argv[1])] if sys.argv[1:] else SEEDS
    rows: list[tuple[str, str, str]] = []
    verdicts = []
    for sparsity in SPARSITIES:
        found: dict[str, list[float]] = {}
        for name, make in arms(sparsity).items():
            found[name] = [trained(make, seed) for seed in seeds]
            rows.append((name, f"{sparsity:.0%}", mean_std(found[name])))
            print(rows[-1], flush=True)
        verdicts.append(verdict(sparsity, found))
        record(
            "cifar_sparse",
            system="granet",
            claim="From one dense network with equal training, GraNet ≥ gradual ≥ one-shot; PDP ≥ gradual.",
            held=" ".join(verdicts),
            columns=("arm", "sparsity", "test accuracy, %"),
            rows=rows,
            data="CIFAR-10, exact images, 8,068 train / 1,017 test, pretrained ResNet-20 (91.64% dense)",
            seeds=seeds,
            note=f"{EPOCHS} epochs of momentum SGD from the pretrained weights, rate 0.05, cosine to 0. Seeds are "
            "of the order of the data. This many epochs are few for all of them.",
            show=sparsity == SPARSITIES[-1],
        )


if __name__ == "__main__":
    main()
