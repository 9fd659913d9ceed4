"""PAT (arXiv 2408.14721) on a small language model: its width learned while it is tuned, against cut before it."""

from __future__ import annotations

import copy
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.compresso import Batch, epochs_of, held_out, perplexity, tuned
from benchmarks.record import holds, mean_std, record
from benchmarks.stories import model
from secateurs import FineTune, prune
from secateurs.methods.language.pat import Pat, pat

SEEDS = (0, 1)
STEPS, RATE, RANK = 200, 2e-3, 8
BUDGET = "sparsity=25%"
# The mask has 80 steps, not 10,000, so logits move ten times as fast as the rest.
HOW = {on: Pat(RANK, 8.0, 0.0, operator=1 / 16, anneal=0.4, mask_rate=10.0, identity=on) for on in (True, False)}


def untied(dense: nn.Module) -> nn.Module:
    """A copy whose head has a weight of its own, as PAT makes one."""
    made = copy.deepcopy(dense)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
    return made


def learned(dense: nn.Module, rows: Tensor, test: list[Batch], seed: int, *, identity: bool) -> tuple[float, float]:
    """Perplexity of PAT, and how many logits missed the count."""
    recover = FineTune(steps=STEPS, lr=RATE, weight_decay=0.0, data=epochs_of(rows, seed))
    made = pat(dense, {"input_ids": rows[:2]}, BUDGET, recover=recover, options=HOW[identity], seed=seed, measure=False)
    return perplexity(made.model, test), made.report.recipe["missed"]


def once(dense: nn.Module, rows: Tensor, test: list[Batch], seed: int) -> tuple[float, float]:
    """Perplexity of the width cut by magnitude and tuned as long with LoRA, and before that."""
    made = prune(
        untied(dense), {"input_ids": rows[:2]}, BUDGET, granularity="width", scope="model.embed_tokens", measure=False
    )
    before = perplexity(made.model, test)
    tuned(made.model, rows, seed, steps=STEPS, schedule="linear")
    return perplexity(made.model, test), before


def main() -> None:
    """Runs all arms and records the table."""
    torch.set_num_threads(1)
    dense, (rows, test) = model(), held_out()
    runs = {
        "PAT": [learned(dense, rows, test, seed, identity=True) for seed in SEEDS],
        "PAT without identity loss": [learned(dense, rows, test, seed, identity=False) for seed in SEEDS],
        "once by magnitude, then LoRA": [once(dense, rows, test, seed) for seed in SEEDS],
    }
    means = {name: fmean(run[0] for run in found) for name, found in runs.items()}
    rival, plain = means["once by magnitude, then LoRA"], means["PAT without identity loss"]
    table = [("dense", f"{perplexity(dense, test):.3f}", "", "")]
    for name, found in runs.items():
        second = [run[1] for run in found]
        last = ("", ", ".join(f"{missed:+d}" for missed in second)) if "PAT" in name else (mean_std(second, 1), "")
        table.append((name, mean_std([run[0] for run in found], 1), *last))
    record(
        "pat",
        system="pat",
        claim="Pruning the width while tuning loses less than pruning it once and tuning as long with LoRA, and the "
        "identity loss helps.",
        held=f"Perplexity of pruning once minus that of PAT: {rival - means['PAT']:+.2f} "
        f"({holds(rival > means['PAT'])}). Without minus with identity loss: {plain - means['PAT']:+.2f} "
        f"({holds(plain >= means['PAT'])}).",
        columns=("arm", "perplexity", "before LoRA", "channels that logits missed the count by"),
        rows=table,
        data="stories260k on text/tinystories.txt, windows of 64 tokens: the last 160 held out",
        seeds=SEEDS,
        note=f"A residual width of 64 cut to 48; {STEPS} steps of 8 windows for every arm, LoRA of rank {RANK} and "
        f"scale 1 on all linear layers but the head, AdamW, {RATE:g} on a cosine (PAT) or a line (LoRA); operators "
        "of rank 4, masks annealed in 80 steps, logits at ten times the rate; the paper has 10,000.",
    )


if __name__ == "__main__":
    main()
