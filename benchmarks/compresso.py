"""Compresso (arXiv 2310.05015) on a small language model: gates that learn with LoRA, against pruning before it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.record import holds, mean_std, record
from benchmarks.stories import labelled, model, windows
from secateurs import FineTune, prune
from secateurs.measure.quality import evaluate
from secateurs.methods.language.compresso import Compresso, compresso
from secateurs.recover.adapters import attach
from secateurs.recover.finetune import fine_tune
from secateurs.recover.trainable import only_trained

__all__ = ["Batch", "epochs_of", "held_out", "main", "perplexity", "tuned"]

Batch = dict[str, Tensor]
SEEDS = (0, 1)
LENGTH, HELD_OUT, BATCH = 64, 160, 8
STEPS, RATE, RANK = 400, 2e-3, 8
BUDGETS = (0.3, 0.5)
# 60 steps of LoRA alone, a ramp of 150, 100 at the target, 90 under fixed gates.
HOW = Compresso("channel", rank=RANK, begin=0.15, end=0.525, fix=0.775)


def held_out() -> tuple[Tensor, list[Batch]]:
    """Windows to train on, and batches to measure perplexity on."""
    rows = windows(LENGTH)
    return rows[:-HELD_OUT], labelled(rows[-HELD_OUT:])


def epochs_of(rows: Tensor, seed: int) -> Callable[[int], list[Batch]]:
    """A function from the number of the pass to shuffled batches."""

    def one_pass(epoch: int) -> list[Batch]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(10_000 * seed + epoch))
        return labelled(rows[order], BATCH)

    return one_pass


def perplexity(net: nn.Module, test: list[Batch]) -> float:
    """Of the next token."""
    return evaluate(net, test, ("perplexity",))["perplexity"]


def tuned(net: nn.Module, rows: Tensor, seed: int, *, steps: int = STEPS, schedule: str = "constant") -> None:
    """Trains LoRA of all linear layers of `net` but the head, merged at the end."""
    with attach(net, "*_proj", "lora", rank=RANK, alpha=8.0, seed=seed) as adapters:
        with only_trained(net, "adapters"):
            fine_tune(net, epochs_of(rows, seed), steps=steps, lr=RATE, optimizer="adamw", schedule=schedule, seed=seed)
        adapters.merge()


def gates(dense: nn.Module, rows: Tensor, test: list[Batch], sparsity: float, seed: int) -> tuple[float, float, float]:
    """Perplexity, and the sparsity expected and real, of Compresso."""
    made = compresso(
        dense, {"input_ids": rows[:2]}, f"params<={1 - sparsity:.0%}", options=HOW,
        recover=FineTune(steps=STEPS, lr=RATE, schedule="constant", weight_decay=0.0, data=epochs_of(rows, seed)),
        seed=seed, measure=False,
    )  # fmt: skip
    return perplexity(made.model, test), made.report.recipe["expected_sparsity"], 1 - made.plan.cost("params")


def once(dense: nn.Module, rows: Tensor, test: list[Batch], sparsity: float, seed: int) -> tuple[float, float, float]:
    """Perplexity after one cut, after as many steps of LoRA, and the sparsity of that."""
    made = prune(
        dense, {"input_ids": rows[:2]}, f"params<={1 - sparsity:.0%}", granularity="channel", floor=1, measure=False,
        seed=seed,
    )  # fmt: skip
    before = perplexity(made.model, test)
    tuned(made.model, rows, seed)
    return perplexity(made.model, test), before, 1 - made.plan.cost("params")


def main() -> None:
    """Runs all arms and records the table."""
    warnings.filterwarnings("ignore", message="gates were fixed")
    dense, (rows, test) = model(), held_out()
    whole, lora = perplexity(dense, test), copy.deepcopy(dense)
    tuned(lora, rows, 0)
    table = [
        ("0%", "dense", f"{whole:.3f}", "", "", ""),
        ("0%", "LoRA alone", f"{perplexity(lora, test):.3f}", "", "", ""),
    ]
    gains, misses, drifts = {}, [], []
    for sparsity in BUDGETS:
        learned = [gates(dense, rows, test, sparsity, seed) for seed in SEEDS]
        cut = [once(dense, rows, test, sparsity, seed) for seed in SEEDS]
        misses += [abs(run[1] - sparsity) for run in learned]
        drifts += [abs(run[1] - run[2]) for run in learned]
        gains[f"{sparsity:.0%}"] = fmean(run[0] for run in cut) - fmean(run[0] for run in learned)
        after, expected, real = (mean_std([run[i] for run in learned], 100 if i else 1) for i in range(3))
        table.append((f"{sparsity:.0%}", "Compresso", after, "", expected, real))
        after, before, real = (mean_std([run[i] for run in cut], 100 if i == 2 else 1) for i in range(3))
        table.append((f"{sparsity:.0%}", "once by magnitude, then LoRA", after, before, "", real))
    told = ", ".join(f"{gain:+.2f} at {budget}" for budget, gain in gains.items())
    record(
        "compresso",
        system="compresso",
        claim="Gates learned with LoRA lose less than one-shot pruning of the same units with as much LoRA after it; "
        "the expected sparsity comes within 0.5 points of the target, the real one within 1 point of the expected.",
        held=f"Perplexity of pruning once minus that of gates: {told} ({holds(min(gains.values()) > 0)}). "
        f"Expected sparsity off by at most {100 * max(misses):.2f} points "
        f"({holds(max(misses) <= 0.005)}), real off the expected by at most {100 * max(drifts):.2f} "
        f"({holds(max(drifts) <= 0.01)}).",
        columns=("parameters removed", "arm", "perplexity", "before LoRA", "expected sparsity, %", "real, %"),
        rows=table,
        data=f"stories260k on text/tinystories.txt, windows of {LENGTH} tokens: the last {HELD_OUT} held out",
        seeds=SEEDS,
        note=f"Heads (query groups) and feed-forward channels; {STEPS} steps of {BATCH} windows for every arm, LoRA of "
        f"rank {RANK} on all linear layers, AdamW at {RATE:g}; gates at 0.1, begun at step 60, target reached at 210, "
        "fixed at 310. The budget counts embeddings, which stay whole. One-shot pruning has all steps for its repair, "
        "gates have the last 90.",
    )


if __name__ == "__main__":
    main()
