"""Rethinking the value of pruning (arXiv 1810.05270): fine-tuning against training from scratch, on digits."""

from __future__ import annotations

import sys

import torch

from benchmarks.digits import convnet, digits, epochs_of, mlp
from benchmarks.record import holds, mean_std, record
from secateurs.methods.channels.rethinking_value import Protocol, rethinking_value

SEEDS = (0, 1, 2, 3, 4)
CONV = Protocol(epochs=24, tune_epochs=6, tune_rates=(0.001, 0.01, 0.1), cap=2.0, seeds=SEEDS)
MLP = Protocol(epochs=40, tune_epochs=10, tune_rates=(0.001, 0.05), cap=1.0, seeds=SEEDS)


def structured(budget: str) -> dict:
    """All arms for a convolutional network whose filters go by L1 norm, equally in every layer."""
    part, test = digits(0, images=True)
    verdict = rethinking_value(
        lambda seed: convnet(seed=seed),
        torch.randn(2, 1, 8, 8),
        budget,
        data=epochs_of(part, 0, 64),
        test=[test],
        options=CONV,
    )
    return {arm.name: arm.accuracies for arm in verdict.arms}


def unstructured(budget: str) -> dict:
    """All arms for a plain network whose smallest weights go, ranked together."""
    part, test = digits(0)
    verdict = rethinking_value(
        lambda seed: mlp(seed=seed), torch.randn(2, 64), budget, data=epochs_of(part, 0), test=[test], options=MLP,
        granularity="weight", allocation="global", criterion_options={},
    )  # fmt: skip
    return {arm.name: arm.accuracies for arm in verdict.arms}


def main() -> None:
    """Runs C1 on the convolutional network and C2, C3 on the plain one."""
    runs = {
        ("filters", "half the channels"): structured("sparsity=50%"),
        ("filters", "a quarter"): structured("sparsity=75%"),
        ("weights", "80%"): unstructured("sparsity=80%"),
        ("weights", "90%"): unstructured("sparsity=90%"),
        ("weights", "95%"): unstructured("sparsity=95%"),
    }
    rows = [(unit, size, arm, mean_std(v)) for (unit, size), arms in runs.items() for arm, v in arms.items()]

    def mean(key, arm):
        return 100 * sum(runs[key][arm]) / len(SEEDS)

    half = ("filters", "half the channels")
    tuned = max(mean(half, a) for a in runs[half] if a.startswith("fine-tune"))
    c1 = mean(half, "scratch-E") - tuned, mean(half, "scratch-B") - mean(half, "scratch-E")
    sparse = ("weights", "95%")
    c2 = (
        mean(sparse, "fine-tune at 0.05") - mean(sparse, "scratch-E"),
        mean(sparse, "fine-tune at 0.001") - mean(sparse, "scratch-E"),
    )
    c3 = (
        mean(("weights", "80%"), "lottery") - mean(("weights", "80%"), "scratch-E"),
        mean(sparse, "lottery") - mean(sparse, "scratch-E"),
    )
    record(
        "rethinking_value",
        system="rethinking-value",
        claim="Filters: training from scratch matches fine-tuning. Weights at high sparsity: fine-tuning wins. "
        "The lottery ticket's initial weights gain nothing at a large rate.",
        held=(
            f"Filters, half the channels: Scratch-E minus the best fine-tuning {c1[0]:+.2f}, B - E "
            f"{c1[1]:+.2f} points ({holds(c1[0] >= -0.3 and c1[1] >= -0.2)}). Weights at 95%: fine-tune at 0.05 minus "
            f"Scratch-E {c2[0]:+.2f} ({holds(c2[0] > 0)}), at the paper's 0.001 {c2[1]:+.2f} ({holds(c2[1] > 0)}). "
            f"Lottery minus fresh weights: {c3[0]:+.2f} at 80%, {c3[1]:+.2f} at 95% ({holds(max(c3) <= 0.3)})."
        ),
        columns=("unit", "pruned", "arm", "test accuracy, %"),
        rows=rows,
        data="scikit-learn digits, 1,000 train / 797 test; CNN 16-32-32, 24 epochs; MLP 100-50, 40 epochs",
        seeds=SEEDS,
        note="Scratch-B of the plain network is capped at Scratch-E's length: equal MACs are up to 20 times that.",
    )


if __name__ == "__main__":
    sys.exit(main())
