"""Gradual magnitude pruning (arXiv 1710.01878) on digits: against small-dense networks and against one-shot."""

from __future__ import annotations

from benchmarks.digits import accuracy, digits, epochs_of, mlp, train
from benchmarks.record import holds, mean_std, record
from secateurs import GradualMagnitude
from secateurs.recover.finetune import fine_tune
from secateurs.train.magnitude import GlobalMagnitude

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, BATCHES = 40, 20
STEPS = EPOCHS * BATCHES
SMALL = {0.8: (64, 29, 14, 10), 0.9: (64, 16, 8, 10)}


def pruned(seed: int, sparsity: float, begin: float, end: float) -> float:
    """Test accuracy of a training in which sparsity rises from `begin` to `end`, shares of the training."""
    part, test = digits(seed)
    model = mlp(seed=seed)
    start, stop = int(begin * STEPS), int(end * STEPS)

    def pruner(trained, optimizer):
        return GradualMagnitude(
            trained, optimizer, sparsity=sparsity, begin=start, end=stop, every=10 if stop - start > 10 else 1
        )

    fine_tune(model, epochs_of(part, seed), epochs=EPOCHS, lr=0.1, seed=seed, pruner=pruner)
    return accuracy(model, test)


def at_the_end(seed: int, sparsity: float) -> float:
    """Test accuracy of a trained network pruned per tensor without any recovery."""
    part, test = digits(seed)
    model = train(mlp(seed=seed), part, seed)
    GradualMagnitude(model, None, sparsity=sparsity, end=1, every=1).step()
    return accuracy(model, test)


def globally(seed: int, sparsity: float) -> float:
    """As the gradual arm, but ranking all tensors together."""
    part, test = digits(seed)
    model = mlp(seed=seed)
    begin, end = int(0.1 * STEPS), int(0.7 * STEPS)

    def pruner(trained, optimizer):
        return GlobalMagnitude(trained, optimizer, sparsity=sparsity, begin=begin, end=end, every=10)

    fine_tune(model, epochs_of(part, seed), epochs=EPOCHS, lr=0.1, seed=seed, pruner=pruner)
    return accuracy(model, test)


def dense(seed: int, widths: tuple[int, ...]) -> float:
    """Test accuracy of an unpruned network of these widths, trained alike."""
    part, test = digits(seed)
    return accuracy(train(mlp(widths, seed), part, seed), test)


def main() -> None:
    """Runs every arm and records the table."""
    rows, found = [], {}
    rows.append(("dense 64-100-50-10", "0%", mean_std([dense(s, (64, 100, 50, 10)) for s in SEEDS])))
    for sparsity in (0.8, 0.9):
        arms = {
            "gradual, per tensor": [pruned(s, sparsity, 0.1, 0.7) for s in SEEDS],
            "gradual, global": [globally(s, sparsity) for s in SEEDS],
            "one-shot at 70% of training": [pruned(s, sparsity, 0.7, 0.7 + 1 / STEPS) for s in SEEDS],
            "one-shot at the end": [at_the_end(s, sparsity) for s in SEEDS],
            f"small-dense {'-'.join(map(str, SMALL[sparsity]))}": [dense(s, SMALL[sparsity]) for s in SEEDS],
        }
        rows += [(name, f"{sparsity:.0%}", mean_std(values)) for name, values in arms.items()]
        found[sparsity] = [100 * sum(v) / len(v) for v in arms.values()]
    gradual, _, shot, end, small = found[0.9]
    held = (
        f"At 90%: gradual minus small-dense {gradual - small:+.2f} points ({holds(gradual > small + 0.3)}), minus "
        f"one-shot at 70% {gradual - shot:+.2f} and minus one-shot at the end {gradual - end:+.2f} "
        f"({holds(gradual >= shot and gradual > end + 0.3)})."
    )
    record(
        "gradual_magnitude",
        system="gradual-magnitude",
        claim="A large network pruned gradually beats a small dense one of equal non-zeros, and one-shot pruning.",
        held=held,
        columns=("arm", "sparsity", "test accuracy, %"),
        rows=rows,
        data="scikit-learn digits, 1,000 train / 797 test, MLP, 40 epochs",
        seeds=SEEDS,
    )


if __name__ == "__main__":
    main()
