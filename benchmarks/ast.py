"""AST (arXiv 2407.20584) on digits and on a small language model: adaptive masks, a teacher, and a low-rank booster."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import nn

from benchmarks.digits import Pair, digits, epochs_of, train
from benchmarks.perp import net
from benchmarks.record import holds, mean_std, record
from benchmarks.stories import labelled, model, windows
from secateurs import FineTune, Pruned, prune
from secateurs.measure.quality import evaluate, perplexity
from secateurs.methods.language.ast import Ast, ast
from secateurs.recover.booster import boost, boosters_of, fold

Runs = Mapping[str, Sequence[float]]

DIGIT_SEEDS, DIGIT_STEPS, DIGIT_RATE = (0, 1, 2), 300, 1e-3
ALONE = {"kd": 0.0, "pull": 1e-3}
DIGIT_ARMS = {
    "fixed mask": Ast(adaptive=False, **ALONE),
    "fixed mask + KD": Ast(adaptive=False, pull=1e-3),
    "adaptive": Ast(**ALONE),
    "adaptive + KD": Ast(pull=1e-3),
    "adaptive + KD + SLoRB": Ast(pull=1e-3, booster="keep"),
}
STARTS = ("one-shot magnitude", "the same with SLoRB")

SEEDS, STEPS, RATE, SIZE, LENGTH, HELD_OUT = (0, 1), 300, 2e-4, 8, 128, 128
# 172 inner channels: the largest run that divides these and 64.
RUN = 4
ARMS = {
    "fixed-mask retraining": Ast(adaptive=False, **ALONE),
    "the same + KD": Ast(adaptive=False, pull=1e-3),
    "AST-Naive": Ast(pull=1e-3),
    "AST-Boosted": Ast(pull=1e-3, booster="keep", run=RUN),
}
FOLDED = "AST-Boosted, then folded"
ORDER = ("AST-Boosted", "AST-Naive", "fixed-mask retraining", "SparseGPT", "magnitude")


def loss(made: nn.Module, part: Pair) -> float:
    """Mean negative log-likelihood."""
    return evaluate(made, [part], ("nll",))["nll"]


def on_digits(seed: int) -> dict[str, float]:
    """The test loss of every arm, from one trained network."""
    fit, test = digits(seed)
    dense = train(net(seed), fit, seed, epochs=40, lr=0.05)
    inputs = fit[0][:2]
    start = prune(dense, inputs, "1:4", measure=False)
    found = {"dense": loss(dense, test), STARTS[0]: loss(start.model, test)}
    boost(start.model, dense, start.masks)
    found[STARTS[1]] = loss(start.model, test)
    recover = FineTune(steps=DIGIT_STEPS, lr=DIGIT_RATE, optimizer="adamw", weight_decay=0.0, data=epochs_of(fit, seed))
    for name, how in DIGIT_ARMS.items():
        made = ast(dense, inputs, "1:4", recover=recover, options=how, measure=False, seed=seed)
        found[name] = loss(made.model, test)
    return found


def flips_told(made: Pruned) -> str:
    """The flips against the masks before: of the first update, at the peak, of the last."""
    counts = [one["previous"] for one in made.report.recipe["flips"]]
    return f"{counts[0]}, at most {max(counts)}, {counts[-1]}"


def on_stories(seed: int) -> tuple[dict[str, float], str]:
    """Perplexities of all arms on windows that none has seen, and the flips of AST-Naive."""
    rows = windows(LENGTH)
    fit, held_out = rows[:-HELD_OUT], labelled(rows[-HELD_OUT:])

    def batches(epoch: int) -> list[dict[str, torch.Tensor]]:
        order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return labelled(fit[order][: len(fit) // SIZE * SIZE], SIZE)

    dense, inputs = model(), {"input_ids": rows[:1]}
    one_shot = {
        "magnitude": prune(dense, inputs, "2:4", measure=False),
        "SparseGPT": prune(dense, inputs, "2:4", method="sparsegpt", data=batches(0)[:16], measure=False),
    }
    found = {"dense": perplexity(dense, held_out)}
    found |= {name: perplexity(made.model, held_out) for name, made in one_shot.items()}
    start = copy.deepcopy(one_shot["magnitude"].model)
    boost(start, dense, one_shot["magnitude"].masks, run=RUN)
    found["magnitude with SLoRB"] = perplexity(start, held_out)
    recover = FineTune(steps=STEPS, lr=RATE, optimizer="adamw", weight_decay=0.1, data=batches)
    flips = ""
    for name, how in ARMS.items():
        made = ast(dense, inputs, "2:4", recover=recover, options=how, measure=False, seed=seed)
        found[name] = perplexity(made.model, held_out)
        flips = flips_told(made) if name == "AST-Naive" else flips
        if boosters_of(made.model):
            fold(made.model, made.masks)
            found[FOLDED] = perplexity(made.model, held_out)
    return found, flips


def merged(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """By name the figures of all runs."""
    return {name: [run[name] for run in runs] for name in runs[0]}


def gain(runs: Runs, better: str, worse: str) -> str:
    """By how much one arm is lower than another, in each run and in words."""
    gaps = [b - a for a, b in zip(runs[better], runs[worse], strict=True)]
    return f"{better} below {worse} by {fmean(gaps):+.3f} ({holds(min(gaps) > 0)} in every run)"


def digit_table() -> None:
    """Runs the arms on digits and records their losses."""
    found = merged([on_digits(seed) for seed in DIGIT_SEEDS])
    pairs = (
        (STARTS[1], STARTS[0]), ("fixed mask + KD", "fixed mask"), ("adaptive", "fixed mask"),
        ("adaptive + KD", "adaptive"), ("adaptive + KD + SLoRB", "adaptive + KD"),
    )  # fmt: skip
    record(
        "ast_digits",
        system="ast",
        claim="A booster lowers the loss at the start and in the end, and a teacher and adaptive masks lower it.",
        held=f"{'; '.join(gain(found, *pair) for pair in pairs)}.",
        columns=("arm", "test loss, hundredths"),
        rows=[(name, mean_std(values)) for name, values in found.items()],
        data="scikit-learn digits, 1,000 to train, 797 to test; MLP 64-256-256-10 with layer norm; 1:4",
        seeds=DIGIT_SEEDS,
        note=f"{DIGIT_STEPS} steps of AdamW at {DIGIT_RATE:g}, cosine, batches of 50; λ = 1e-3 after a quarter of the "
        "steps, masks every 10, T = 2, weight 0.67 of the teacher, runs of 16 (S has a sixteenth of the entries of W).",
        command="python -m benchmarks.ast",
    )


def story_table() -> None:
    """Runs the arms on stories and records their perplexities."""
    runs, flips = zip(*(on_stories(seed) for seed in SEEDS), strict=True)
    found = merged(runs)
    names = ("dense", "magnitude", "magnitude with SLoRB", "SparseGPT", *ARMS, FOLDED)
    record(
        "ast",
        system="ast",
        claim="At 2:4 and equal steps the perplexity of AST-Boosted is below that of AST-Naive, fixed-mask retraining, "
        "SparseGPT and magnitude, in this order.",
        held=f"{'; '.join(gain(found, *pair) for pair in pairwise(ORDER))}. Beyond the claim, masks that change "
        f"against fixed ones, both with a teacher: {gain(found, 'AST-Naive', 'the same + KD')}.",
        columns=("arm", "perplexity on held-out windows"),
        rows=[(name, mean_std(found[name], 1)) for name in names],
        data=f"stories260k on text/tinystories.txt, windows of {LENGTH} tokens: the last {HELD_OUT} held out, 128 "
        "others for SparseGPT",
        seeds=SEEDS,
        note=f"{STEPS} steps of AdamW at {RATE:g}, {SIZE} windows each, cosine, weight decay 0.1; λ = 1e-3 after a "
        "quarter of the steps, masks every 10, T = 2. Fixed masks are those of magnitude and have no teacher. Runs of "
        f"{RUN}, the largest that divides 64 and 172: S has a quarter of the entries of W, where the paper's have a "
        "sixteenth. The text is what the model was trained on, held-out windows too. Flips of AST-Naive (first update, "
        f"peak, last): {'; '.join(flips)}.",
    )


def main() -> None:
    """Records both tables."""
    digit_table()
    story_table()


if __name__ == "__main__":
    main()
