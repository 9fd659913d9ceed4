"""LoRAPrune (arXiv 2305.18403): do adapters rank units as true gradients do, and is their model the better?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import stories
from benchmarks.digits import digits, epochs_of, mlp, train
from benchmarks.record import holds, mean_std, record
from secateurs import FineTune, Pruned
from secateurs.core.units import ChannelGroup
from secateurs.graph.infer import infer
from secateurs.measure.quality import perplexity
from secateurs.methods.language.loraprune import Guide, LoraPrune, loraprune
from secateurs.recover.adapters import attach
from secateurs.recover.trainable import only_trained

# (a) the criterion, on an MLP whose hidden layer has 128 units.
SEEDS, RANKS, PROXY_STEPS = (0, 1, 2), (8, 32), 60
# (b) the result, on a language model.
TUNED_SEEDS, STEPS, LENGTH, BATCH, HELD_OUT, RATE = (0, 1), 200, 128, 4, 140, 3e-3
EVERY = LoraPrune(units="channels", every=5)
DENSE, GUIDED, BY_MAGNITUDE, BY_GRADIENT, LATE, EARLY = (
    "nothing goes", "LoRAPrune", "magnitude, same schedule", "true gradient, same schedule",
    "LoRA-guided, at once at the end", "LoRA-guided, at once after a tenth",
)  # fmt: skip
ARMS = {
    DENSE: EVERY,
    GUIDED: EVERY,
    BY_MAGNITUDE: replace(EVERY, criterion="magnitude"),
    BY_GRADIENT: replace(EVERY, criterion="grad"),
    LATE: replace(EVERY, every=1, warmup=0.985, cooldown=0.0),
    EARLY: replace(EVERY, every=1, cooldown=0.885),
}


def averaged(model: nn.Module, group: ChannelGroup, rank: int, seed: int) -> dict[str, Tensor]:
    """The average scores of one group after a tuning, by each criterion along the same way."""
    adapters = attach(model, ["0", "2"], "lora", rank=rank, alpha=2.0 * rank, seed=seed)
    (x, y), _ = digits(seed)
    found = {name: torch.zeros(group.size) for name in ("lora", "grad", "magnitude")}
    with only_trained(model, "adapters") as chosen:
        guides = {name: Guide(model, [group], adapters, name) for name in found}
        optimizer = torch.optim.AdamW(chosen.values(), 1e-3)
        batches = [batch for epoch in range(3) for batch in epochs_of((x, y), seed)(100 + epoch)]
        for inputs, labels in batches[:PROXY_STEPS]:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            for name, guide in guides.items():
                found[name].mul_(0.9).add_(guide()[group.name], alpha=0.1)
            optimizer.step()
    return found


def correlations(rank: int, seed: int, members: Callable[[ChannelGroup], ChannelGroup]) -> tuple[float, float]:
    """Spearman's, with the scores from true gradients: of LoRA-guided scores and of magnitudes."""
    pair, _ = digits(seed)
    model = train(mlp((64, 128, 64, 10), seed), pair, seed, epochs=5, lr=0.05)
    group = members(infer(model, pair[0][:2], entangled=False).groups[0])
    found = averaged(model, group, rank, seed)
    lora, magnitude = (float(spearmanr(found[name], found["grad"]).statistic) for name in ("lora", "magnitude"))
    return lora, magnitude


def rows_alone(group: ChannelGroup) -> ChannelGroup:
    """The units as rows of the matrix that makes them."""
    return replace(group, members=tuple(member for member in group.members if member.role == "out"))


def batches_of(rows: Tensor, seed: int) -> Callable[[int], list[dict[str, Tensor]]]:
    """A function from the number of the pass to shuffled batches."""

    def one_pass(epoch: int) -> list[dict[str, Tensor]]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return stories.labelled(rows[order], BATCH)

    return one_pass


def tuned(model: nn.Module, rows: Tensor, arm: str, seed: int) -> Pruned:
    """One arm: half of the inner channels gone, or none, and as many steps of the same training as any other."""
    training = FineTune(
        steps=STEPS, lr=RATE, optimizer="adamw", weight_decay=0.0, schedule="linear-warmup", data=batches_of(rows, seed)
    )
    budget = "sparsity=0%" if arm == DENSE else "sparsity=50%"
    x: Any = {"input_ids": rows[:1]}
    return loraprune(model, x, budget, options=ARMS[arm], recover=training, seed=seed, measure=False)


def verdict(margins: dict[str, float], rivals: dict[str, float], share: float) -> str:
    """What held: by least margins of the correlation, perplexities over LoRAPrune's, and the share that trains."""
    ranked = "; ".join(f"{what} {holds(margin > 0)}, least margin {margin:+.2f}" for what, margin in margins.items())
    told = "; ".join(f"{arm} {gap:+.2f}, {holds(gap > 0)}" for arm, gap in rivals.items() if arm != BY_GRADIENT)
    return (
        f"Correlation above that of magnitudes: {ranked} (over ranks and seeds). Perplexity less LoRAPrune's: {told}; "
        f"{BY_GRADIENT} {rivals[BY_GRADIENT]:+.2f}. Gradients of adapters alone: {share:.0%} of the weights', for so "
        "small a model."
    )


def main() -> None:
    """Runs both parts and records the table."""
    table: list[tuple[str, str, str]] = []
    margins: dict[str, float] = {}
    for what, members in (("rows", rows_alone), ("rows and columns", lambda group: group)):
        for rank in RANKS:
            pairs = [correlations(rank, seed, members) for seed in SEEDS]
            for name, column in (("LoRA-guided", 0), ("magnitude", 1)):
                figures = mean_std([pair[column] for pair in pairs], 1)
                table.append((f"rank correlation with true gradients, {what}, r = {rank}", name, figures))
            margin = min(lora - magnitude for lora, magnitude in pairs)
            margins[what] = min(margin, margins.get(what, margin))
    model, rows = stories.model(), stories.windows(LENGTH)
    held_out = stories.labelled(rows[-HELD_OUT:])
    before = perplexity(model, held_out)
    table.append(("perplexity", "before", f"{before:.3f}"))
    found: dict[str, list[float]] = {}
    made: Pruned | None = None
    for arm in ARMS:
        runs = [tuned(model, rows[:-HELD_OUT], arm, seed) for seed in TUNED_SEEDS]
        found[arm] = [perplexity(one.model, held_out) for one in runs]
        made = runs[0]
        table.append(("perplexity", arm, mean_std(found[arm], 1)))
    assert made is not None
    noted = made.report.recipe["loraprune"]
    whole = sum(p.numel() for p in model.parameters())
    table.append(("bytes of gradients", "LoRAPrune", f"{4 * noted['trained']:,}"))
    table.append(("bytes of gradients", "of all weights", f"{4 * whole:,}"))
    mean = {arm: fmean(values) for arm, values in found.items()}
    rivals = {arm: mean[arm] - mean[GUIDED] for arm in (BY_MAGNITUDE, BY_GRADIENT, LATE, EARLY)}
    record(
        "loraprune",
        system="loraprune",
        claim="LoRA-guided scores correlate more with those of true gradients than magnitudes do; at 50% LoRAPrune has "
        "a lower perplexity than the same schedule by magnitude and than pruning at once at the end of the same steps; "
        "gradients are those of adapters alone.",
        held=verdict(margins, rivals, noted["trained"] / whole),
        columns=("figure", "arm", "value"),
        rows=table,
        data="Correlations: scikit-learn digits, MLP 64-128-64-10, five passes of training, then "
        f"{PROXY_STEPS} steps of LoRA. Perplexity: stories260k (five blocks of 172 inner channels) on TinyStories, "
        f"{len(rows) - HELD_OUT} windows of {LENGTH} tokens to tune, {HELD_OUT} to test.",
        seeds=SEEDS,
        note=f"{STEPS} steps of {BATCH} windows with AdamW at {RATE:g} for every arm, units every 5 steps, seeds "
        f"{' and '.join(map(str, TUNED_SEEDS))}; half of the inner channels of four of five blocks, since the last "
        "is left out and heads are few. At once is within three steps. No rate was tuned; it falls to 0 on a line, so "
        "that what goes late is repaired at a low rate, and what goes early at a high one.",
    )
    assert all(math.isfinite(value) for value in mean.values())


if __name__ == "__main__":
    main()
