"""Half the MACs of ResNet-56, with and without widths in eights: how much of the ideal speed-up a CPU gives."""

from __future__ import annotations

import torch

from benchmarks.cifar import pretrained
from benchmarks.record import holds, record
from secateurs import plan
from secateurs.measure.latency import compare

WIDTHS = {"any width": 1, "widths in eights": 8, "widths in sixteens": 16}
BATCHES = (1, 64, 256)


def main() -> None:
    """Cuts once per rounding and times each batch size with all models in turn."""
    dense, x = pretrained(56), torch.randn(2, 3, 32, 32)
    plans = {name: plan(dense, x, "macs<=50%", round_to=multiple) for name, multiple in WIDTHS.items()}
    models = {"dense": dense, **{name: made.cut(dense) for name, made in plans.items()}}
    rows, shares = [], {}
    for batch in BATCHES:
        timings = compare(models, torch.randn(batch, 3, 32, 32), seconds=15)
        for name, made in plans.items():
            speed = timings[name].speedup
            assert speed is not None
            shares[name, batch] = speed.median * made.cost("macs")
            spread = f"{speed.median:.2f} ({speed.p10:.2f}–{speed.p90:.2f})"
            rows.append(
                (
                    name,
                    batch,
                    f"{made.cost('macs'):.1%}",
                    f"{1 / made.cost('macs'):.2f}",
                    spread,
                    f"{shares[name, batch]:.0%}",
                )
            )
    best = shares["widths in eights", 64]
    record(
        "latency",
        system="core",
        claim="Half the MACs give at least 75% of the ideal speed-up on a CPU with widths at multiples of eight.",
        held=f"At batch 64 the measured speed-up is {best:.0%} of the ideal ({holds(best >= 0.75)}).",
        columns=("rounding", "batch", "MACs left", "ideal", "times faster (p10–p90)", "of the ideal"),
        rows=rows,
        data="random images of 32×32, pretrained ResNet-56, evaluation mode; all models in turn, paired by round",
    )


if __name__ == "__main__":
    main()
