"""PERP (arXiv 2312.15230) on digits: what training a few parameters after one-shot pruning is worth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.digits import Pair, accuracy, digits, epochs_of, train
from benchmarks.record import holds, mean_std, record
from secateurs import Pruned, prune
from secateurs.methods.language.perp import Perp, retrain, trained_share
from secateurs.recover.adapters import attach
from secateurs.recover.finetune import fine_tune
from secateurs.recover.trainable import only_trained

SEEDS = (0, 1, 2)
SPARSITIES = (0.95, 0.97)
STEPS, RATES = 200, (1e-3, 5e-3, 2e-2)
ADAPTED = ("biases", "norms", "adapters")
ARMS = {
    "norms": Perp(train=("norms",), steps=STEPS),
    "biases": Perp(train=("biases",), steps=STEPS),
    "biases and norms": Perp(train=("biases", "norms"), steps=STEPS),
    "ScaleLoRA": Perp(train=ADAPTED, adapter="scale-lora", rank=8, alpha=16.0, steps=STEPS),
    "MaskLoRA": Perp(train=ADAPTED, adapter="mask-lora", rank=8, alpha=16.0, steps=STEPS),
    "all": Perp(train=("all",), steps=STEPS),
}
LORA_PRUNE = ("LoRA-Prune before merge", "LoRA-Prune after merge")
SCALES = "norm weights alone"
NAMES = ("none", SCALES, *ARMS, *LORA_PRUNE)
# Norms and biases have the biases of the norms in common, so that both readings of "norms" are in the table.
CLAIMED = ("none", "norms", "biases", "biases and norms", "ScaleLoRA", "MaskLoRA")


@dataclass(frozen=True)
class Split:
    """Digits to fit the weights, to choose the rate of each arm, and to test."""

    fit: Pair
    tune: Pair
    test: Pair


def split(seed: int) -> Split:
    """800, 200 and 797 digits."""
    (x, y), test = digits(seed)
    return Split((x[:800], y[:800]), (x[800:], y[800:]), test)


def net(seed: int) -> nn.Module:
    """64-256-256-10 with a layer norm after each hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def best(runs: list[dict[str, tuple[float, float]]], judged: str) -> dict[str, float]:
    """Test accuracies of the run whose accuracy under the name `judged` is best where rates are chosen."""
    chosen = max(runs, key=lambda run: run[judged][0])
    return {name: test for name, (_, test) in chosen.items()}


def judge(model: nn.Module, parts: Split) -> tuple[float, float]:
    """Accuracy where the rate is chosen, and on the test part."""
    return accuracy(model, parts.tune), accuracy(model, parts.test)


def subset(name: str, start: Pruned, parts: Split, seed: int, lr: float) -> dict[str, tuple[float, float]]:
    """One arm at one rate."""
    model = copy.deepcopy(start.model)
    retrain(model, start.masks, epochs_of(parts.fit, seed), options=ARMS[name], lr=lr, seed=seed)
    return {name: judge(model, parts)}


def tuned(model: nn.Module, parts: Split, seed: int, lr: float) -> None:
    """Trains what requires gradients, as `retrain` does."""
    fine_tune(
        model, epochs_of(parts.fit, seed), steps=STEPS, lr=lr, optimizer="adamw", schedule="linear-warmup", seed=seed
    )


def scales(start: Pruned, parts: Split, seed: int, lr: float) -> dict[str, tuple[float, float]]:
    """The norms without their biases, at one rate."""
    model = copy.deepcopy(start.model)
    with only_trained(model, "norms") as chosen:
        for name, parameter in chosen.items():
            parameter.requires_grad_(name.endswith("weight"))
        tuned(model, parts, seed, lr)
    return {SCALES: judge(model, parts)}


def lora_prune(start: Pruned, parts: Split, seed: int, lr: float) -> dict[str, tuple[float, float]]:
    """LoRA-Prune at one rate, on either side of its merge."""
    model = copy.deepcopy(start.model)
    adapters = attach(model, "*", "lora-prune", rank=8, alpha=16.0, masks=start.masks, seed=seed)
    with only_trained(model, ADAPTED):
        tuned(model, parts, seed, lr)
    before = judge(model, parts)
    adapters.merge()
    return dict(zip(LORA_PRUNE, (before, judge(model, parts)), strict=True))


def arms(dense: nn.Module, sparsity: float, parts: Split, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Test accuracy of every arm, each at its own best rate, and the share of the parameters that each trains."""
    inputs: Tensor = parts.fit[0][:2]
    start = prune(dense, inputs, f"sparsity={sparsity:.0%}", granularity="weight", allocation="uniform", measure=False)
    found = {"none": accuracy(start.model, parts.test)}
    shares = {"none": 0.0}
    for name, how in ARMS.items():
        found |= best([subset(name, start, parts, seed, lr) for lr in RATES], name)
        shares[name] = trained_share(start.model, start.masks, how).share
    found |= best([scales(start, parts, seed, lr) for lr in RATES], SCALES)
    shares[SCALES] = shares["biases and norms"] - shares["biases"]
    # The rate that is best for what is trained, which is the model before its merge.
    found |= best([lora_prune(start, parts, seed, lr) for lr in RATES], LORA_PRUNE[0])
    shares |= dict.fromkeys(LORA_PRUNE, shares["MaskLoRA"])
    return found, shares


def main() -> None:
    """Runs all arms and records the table."""
    found: dict[float, list[dict[str, float]]] = {sparsity: [] for sparsity in SPARSITIES}
    shares: dict[str, float] = {}
    dense_accuracies = []
    for seed in SEEDS:
        parts = split(seed)
        dense = train(net(seed), parts.fit, seed, epochs=40, lr=0.05)
        dense_accuracies.append(accuracy(dense, parts.test))
        for sparsity in SPARSITIES:
            accuracies, shares = arms(dense, sparsity, parts, seed)
            found[sparsity].append(accuracies)
    rows = [
        (name, f"{100 * shares[name]:.1f}", *(mean_std([run[name] for run in found[s]]) for s in SPARSITIES))
        for name in NAMES
    ]

    def mean(name: str, sparsity: float) -> float:
        return 100 * fmean(run[name] for run in found[sparsity])

    wrong = {
        s: [f"{a} {mean(a, s) - mean(b, s):+.1f} above {b}" for a, b in pairwise(CLAIMED) if mean(a, s) >= mean(b, s)]
        for s in SPARSITIES
    }
    narrow = [mean("biases", s) - mean(SCALES, s) for s in SPARSITIES]
    gaps = [mean("all", s) - mean("MaskLoRA", s) for s in SPARSITIES]
    losses = [mean("MaskLoRA", s) - mean(LORA_PRUNE[1], s) for s in SPARSITIES]
    told = "; ".join(f"{s:.0%}: {', '.join(w)}" for s, w in wrong.items() if w)
    record(
        "perp",
        system="perp",
        claim="At high sparsity and equal steps none < norms < biases < biases and norms < ScaleLoRA < MaskLoRA, which "
        "comes close to retraining all, and LoRA-Prune after its merge is worse than MaskLoRA.",
        held=(
            f"Order: {holds(not told)}{f' ({told})' if told else ''}; biases minus norm weights alone "
            f"{' and '.join(f'{gap:+.1f}' for gap in narrow)} ({holds(min(narrow) > 0)}). All minus MaskLoRA: "
            f"{' and '.join(f'{gap:+.1f}' for gap in gaps)} points (within 2: {holds(max(gaps) <= 2)}). MaskLoRA minus "
            f"LoRA-Prune after merge: {' and '.join(f'{loss:+.1f}' for loss in losses)} ({holds(min(losses) > 0)})."
        ),
        columns=("trained", "of the parameters, %", *(f"test accuracy at {s:.0%}, %" for s in SPARSITIES)),
        rows=rows,
        data="scikit-learn digits, 800 to fit, 200 to choose each arm's rate, 797 to test; MLP 64-256-256-10 with "
        f"layer norm, dense {mean_std(dense_accuracies)}",
        seeds=SEEDS,
        note=f"Magnitude, uniform over all three layers; {STEPS} steps of AdamW, rate up for a tenth and then down to "
        f"0, the best of {', '.join(f'{rate:g}' for rate in RATES)} for every arm, seed and sparsity. Adapters have "
        "rank 8 and scale 2 and train with biases and norms. Shares are large because the network is small.",
    )


if __name__ == "__main__":
    main()
