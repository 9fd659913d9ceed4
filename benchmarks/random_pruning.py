"""Random pruning at initialization (arXiv 2202.02643) on digits: densities, width, SNIP's ratios, calibration."""

from __future__ import annotations

from functools import partial
from statistics import fmean

from benchmarks.digits import accuracy, digits, epochs_of, mlp
from benchmarks.record import holds, mean_std, record
from secateurs import GlobalMagnitude, RandomSparse
from secateurs.criteria import score
from secateurs.measure.quality import evaluate
from secateurs.recover.finetune import fine_tune

SEEDS = (0, 1, 2, 3, 4)
WIDTHS = ((25, 12), (50, 25), (100, 50), (300, 150))


def run(seed: int, widths: tuple[int, int], make) -> tuple[float, float]:
    """Test accuracy and calibration error of a network trained with the pruner that `make` builds (None: dense)."""
    part, test = digits(seed)
    model = mlp((64, *widths, 10), seed, kaiming=True)
    snip = partial(score, "snip", data=[(part[0][:100], part[1][:100])])
    pruner = None if make is None else lambda m, o: make(m, o, seed, snip)
    fine_tune(model, epochs_of(part, seed), epochs=40, lr=0.1, seed=seed, pruner=pruner)
    return accuracy(model, test), evaluate(model, [test], ("ece",))["ece"]


def arms(sparsity: float) -> dict:
    """The pruners compared at one sparsity."""
    return {
        "uniform": lambda m, o, s, _: RandomSparse(m, o, sparsity=sparsity, allocation="uniform", seed=s),
        "ERK": lambda m, o, s, _: RandomSparse(m, o, sparsity=sparsity, allocation="erk", seed=s),
        "SNIP ratios": lambda m, o, s, snip: RandomSparse(m, o, sparsity=sparsity, allocation=snip, seed=s),
        "SNIP": lambda m, o, s, snip: GlobalMagnitude(m, o, sparsity=sparsity, criterion=snip, floor=0),
    }


def main() -> None:
    """Runs every width, sparsity and rule and records the table."""
    rows, table = [], {}
    for widths in WIDTHS:
        whole = [run(s, widths, None) for s in SEEDS]
        table[widths, 0.0, "dense"] = whole
        for sparsity in (0.8, 0.9):
            for name, make in arms(sparsity).items():
                table[widths, sparsity, name] = [run(s, widths, make) for s in SEEDS]
    for (widths, sparsity, name), values in table.items():
        acc, error = zip(*values, strict=True)
        rows.append(("-".join(map(str, widths)), f"{sparsity:.0%}", name, mean_std(acc), mean_std(error)))

    def mean(widths, sparsity, name, column=0):
        return 100 * fmean(v[column] for v in table[widths, sparsity, name])

    c1 = [mean(w, 0.9, "ERK") - mean(w, 0.9, "uniform") for w in WIDTHS]
    gaps = [mean(w, 0.0, "dense") - mean(w, 0.9, "ERK") for w in WIDTHS]
    c3 = [mean(w, 0.9, "SNIP") - mean(w, 0.9, "SNIP ratios") for w in WIDTHS[2:]]
    c4 = mean(WIDTHS[-1], 0.8, "ERK", 1) - mean(WIDTHS[-1], 0.0, "dense", 1)
    record(
        "random_pruning",
        system="random-pruning",
        claim="ERK beats uniform; the gap to dense closes with width; only SNIP's ratios matter, not its positions.",
        held=(
            f"At 90%, ERK minus uniform by width: {', '.join(f'{v:+.2f}' for v in c1)} points "
            f"({sum(v > 0 for v in c1)} of 4 positive). Dense minus ERK: "
            f"{', '.join(f'{v:.2f}' for v in gaps)} (shrinks with width: {holds(gaps[0] > gaps[-1])}). "
            f"SNIP minus its ratios drawn at random, two widest: {', '.join(f'{v:+.2f}' for v in c3)}. "
            f"Calibration error of the widest ERK net at 80% minus dense: {c4:+.2f} points."
        ),
        columns=("hidden widths", "sparsity", "densities", "test accuracy, %", "calibration error, %"),
        rows=rows,
        data="scikit-learn digits, 1,000 train / 797 test, MLP, 40 epochs",
        seeds=SEEDS,
        note="Kaiming-normal initial weights, as in the paper's code; PyTorch's default for linear layers is smaller "
        "and costs sparse networks about ten points.",
    )


if __name__ == "__main__":
    main()
