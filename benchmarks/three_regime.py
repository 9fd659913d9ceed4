"""Three regimes of pruning (arXiv 2305.18383): dense networks of several temperatures, pruned, retrained, on digits."""

from __future__ import annotations

import sys
from itertools import combinations
from statistics import fmean

import torch

from benchmarks.digits import digits, epochs_of, mlp
from benchmarks.record import holds, mean_std, record
from secateurs.measure.connectivity import connect, error_on
from secateurs.measure.similarity import output_similarity
from secateurs.methods.weights.three_regime import Cell, Grid, three_regime, train_dense

SEEDS = (0, 1, 2)
LOADS = ("sparsity=50%", "sparsity=95%", "sparsity=98%")
# Dense networks are stages of one run at a constant rate; the paper's borders are drawn where its own rate first drops.
GRID = Grid(
    settings=(40, 10, 3, 1), epochs=40, schedule="constant", retrain_epochs=40, retrain_schedule="constant", copies=2,
    seeds=SEEDS, weight_decay=0.0,
)  # fmt: skip


def build(seed: int) -> torch.nn.Module:
    """64-100-50-10, untrained."""
    return mlp(seed=seed)


def row(cell: Cell) -> tuple[str, ...]:
    """One cell of the grid."""
    return (
        cell.name, f"{cell.density:.0%}", mean_std(cell.errors), mean_std(cell.dense_errors), mean_std(cell.mcs),
        f"{cell.cka:.4f}", cell.regime, cell.advice,
    )  # fmt: skip


def main() -> None:
    """Asks C1 and C3, and shows C2."""
    part, test = digits(0)
    data = epochs_of(part, 0)
    sweep = three_regime(
        build, torch.randn(2, 64), LOADS, data=data, test=[test], sample=[part], options=GRID,
        on_cell=lambda cell: print(cell, flush=True),
    )  # fmt: skip
    at = {(c.name.split()[-1], c.budget): c for c in sweep.cells}
    dense = [train_dense(build, data, 40, GRID, seed) for seed in SEEDS]
    pairs = list(combinations(dense, 2))
    strangers = [connect(a, a, b, error_on([part])).mc for a, b in pairs]
    alike = [output_similarity(a, b, [part]) for a, b in pairs]
    cold, hot = at["40", LOADS[0]], at["1", LOADS[0]]
    best = min((at[e, LOADS[-1]] for e in ("10", "3", "1")), key=lambda cell: cell.error)
    full = at["40", LOADS[-1]]
    record(
        "three_regime",
        system="three-regime",
        claim="C1: at moderate density colder training lowers the pruned error and raises CKA. C2: at very low density "
        "some hotter parent beats the fully trained one, and its copies are better connected. C3: two networks from "
        "independent beginnings are worse connected than two copies of one.",
        held=(
            f"C1, density 50%: 40 epochs minus 1 epoch, error {100 * (cold.error - hot.error):+.2f} points, CKA "
            f"{cold.cka - hot.cka:+.4f} ({holds(cold.error < hot.error and cold.cka > hot.cka)}). C3: mc "
            f"{100 * fmean(strangers):+.2f} points between beginnings, {100 * cold.mc:+.2f} between copies "
            f"({holds(fmean(strangers) < cold.mc)}). C2, density 2%, shown and not asserted: {best.name} minus 40 "
            f"epochs, error {100 * (best.error - full.error):+.2f} points, mc {100 * (best.mc - full.mc):+.2f} points."
        ),
        columns=(
            "dense training",
            "density",
            "test error, %",
            "dense error, %",
            "mc, points",
            "CKA",
            "regime",
            "advice",
        ),
        rows=[
            *map(row, sweep.cells),
            ("independent, 40", "100%", "", "", mean_std(strangers), f"{fmean(alike):.4f}", "", ""),
        ],
        data="scikit-learn digits, 1,000 train / 797 test; MLP 64-100-50-10; SGD 0.1, momentum 0.9, "
        "retrained 40 epochs",
        seeds=SEEDS,
        note="Spread is over seeds and copies. mc is of training error. The paper's own figures are of a ResNet with "
        "batch norm on CIFAR-10.",
    )


if __name__ == "__main__":
    sys.exit(main())
