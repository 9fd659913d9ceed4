"""Every criterion with every allocation that applies: ResNet-20 on CIFAR-10, one-shot and briefly recovered."""

from __future__ import annotations

import itertools
import json
import sys
from time import monotonic

from benchmarks.cifar import batches, exact, pretrained, shuffled
from benchmarks.record import RESULTS, mean_std, record
from secateurs import FineTune, SecateursError, prune
from secateurs.criteria import criteria

SEEDS = (0, 1, 2)
STEPS, TEST = 10, 500
BUDGETS = {
    "channel": (("macs<=50%",), ("global", "uniform")),
    "weight": (("sparsity=90%", "sparsity=95%", "sparsity=98%"), ("global", "uniform", "erk", "lamp")),
}


def run(unit: str, criterion: str, allocation: str, budget: str, seed: int) -> tuple[float, float, float]:
    """Test accuracy one-shot, with batch-norm statistics measured again, and after `STEPS` steps."""
    test, part = batches(exact("test"), limit=TEST), exact("train")
    data = shuffled(part, seed, 64)(999)[:8]
    recover = FineTune(steps=STEPS, lr=0.02, data=shuffled(part, seed, 64))
    made = prune(
        pretrained(20), part[0][:2], budget, granularity=unit, criterion=criterion, allocation=allocation,
        data=data, test=test, recover=recover, measure=False, seed=seed,
    )  # fmt: skip
    stages = made.report.stages
    return tuple(stages[s]["accuracy"] for s in ("one-shot", "batch-norm recalibrated", "recovered"))


def known(name: str) -> list[tuple[str, ...]]:
    """The rows of an earlier run that was stopped."""
    path = RESULTS / f"{name}.json"
    return [tuple(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] if path.exists() else []


def main(unit: str, minutes: float) -> None:
    """Runs what is left of a grid, as far as the time allows, and records it; a refusal keeps its reason."""
    rows, stop = known(f"grid_{unit}"), monotonic() + 60 * minutes
    budgets, allocations = BUDGETS[unit]
    names = [c.name for c in criteria() if unit in c.groups]
    grid = list(itertools.product(budgets, allocations, names))
    for budget, allocation, criterion in grid:
        if any(tuple(row[:3]) == (budget, allocation, criterion) for row in rows):
            continue
        if monotonic() > stop:
            break
        try:
            found = [run(unit, criterion, allocation, budget, seed) for seed in SEEDS]
        except SecateursError as reason:
            rows.append((budget, allocation, criterion, f"refused: {reason}", "", ""))
            continue
        rows.append((budget, allocation, criterion, *(mean_std(values) for values in zip(*found, strict=True))))
        sys.stderr.write(f"{rows[-1]}\n")
    done = [row for row in rows if row[5]]
    best = {b: max((r for r in done if r[0] == b), key=lambda r: float(r[5].split()[0])) for b in {r[0] for r in done}}
    record(
        f"grid_{unit}",
        system="core",
        claim="No single criterion or allocation is best everywhere; data and global ranking usually help.",
        held="Best after the short recovery: "
        + "; ".join(f"{b}: {r[2]} with {r[1]}, {r[5]}" for b, r in sorted(best.items()))
        + f". {len(rows)} of {len(grid)} combinations were run.",
        columns=("budget", "allocation", "criterion", "one-shot", "batch-norm recalibrated", f"after {STEPS} steps"),
        rows=rows,
        data=f"CIFAR-10, pretrained ResNet-20 (91.6 dense), {TEST} exact test images; 512 images for calibration",
        seeds=SEEDS,
        command=f"python -m benchmarks.grid {unit}",
        note=f"Recovery is {STEPS} steps of 64 images: it ranks starting points and is no final accuracy.",
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "channel", float(sys.argv[2]) if len(sys.argv) > 2 else 240)
