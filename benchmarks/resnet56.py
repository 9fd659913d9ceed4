"""ResNet-56 on CIFAR-10 at half its MACs: one-shot, batch-norm recalibrated, briefly recovered, and measured."""

from __future__ import annotations

import torch

from benchmarks.cifar import batches, exact, pretrained, shuffled
from benchmarks.record import holds, mean_std, record
from secateurs import FineTune, prune
from secateurs.measure.latency import compare

SEEDS = (0, 1, 2)
EPOCHS = 3
STAGES = ("one-shot", "batch-norm recalibrated", "recovered")
RECIPES = {
    "magnitude, global": {"criterion": "magnitude"},
    "magnitude, global, widths in eights": {"criterion": "magnitude", "round_to": 8},
    "taylor, global, widths in eights": {"criterion": "taylor", "round_to": 8},
}


def run(seed: int, options: dict) -> tuple[dict[str, float], torch.nn.Module, float]:
    """Test accuracy at every stage, the pruned model, and the share of MACs left."""
    test, part = batches(exact("test")), exact("train")
    calibration = shuffled(part, seed)(999)[:8]
    recover = FineTune(epochs=EPOCHS, lr=0.02, distill=True, data=shuffled(part, seed))
    made = prune(
        pretrained(56), part[0][:2], "macs<=50%", data=calibration, test=test, recover=recover, measure=False, seed=seed, **options
    )  # fmt: skip
    stages = made.report.stages
    return {name: stages[name]["accuracy"] for name in STAGES}, made.model, made.plan.cost("macs")


def main() -> None:
    """Runs every recipe for every seed, then times the last model of each beside the original."""
    rows, speeds = [], {}
    for name, options in RECIPES.items():
        found, models, left = zip(*(run(seed, options) for seed in SEEDS), strict=True)
        timing = compare({"dense": pretrained(56), "pruned": models[-1]}, torch.randn(64, 3, 32, 32), seconds=20)
        speed = timing["pruned"].speedup
        assert speed is not None
        speeds[name] = speed.median * left[-1]
        accuracies = [mean_std([f[stage] for f in found]) for stage in STAGES]
        rows.append(
            (name, f"{left[-1]:.1%}", *accuracies, f"{speed.median:.2f} ({speed.p10:.2f}–{speed.p90:.2f})", f"{speeds[name]:.0%}")
        )  # fmt: skip
    rounded = speeds["magnitude, global, widths in eights"]
    record(
        "resnet56",
        system="core",
        claim="Half the MACs give at least 75% of the ideal speed-up on a CPU when widths are multiples that it likes.",
        held=f"With widths in eights the measured speed-up is {rounded:.0%} of the ideal one ({holds(rounded >= 0.75)}).",
        columns=("recipe", "MACs left", *STAGES, "times faster, batch 64", "of the ideal"),
        rows=rows,
        data=f"CIFAR-10, pretrained ResNet-56 (92.7 dense), 1,017 exact test images; {EPOCHS} epochs on 8,068 exact images",
        seeds=SEEDS,
        note="Recovery: SGD 0.02, cosine, distillation from the dense network. Seeds change calibration and training batches.",
    )


if __name__ == "__main__":
    main()
