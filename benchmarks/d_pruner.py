"""D-Pruner (arXiv 2405.06275): one mask for a domain and for general use, on a small language model and on digits."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar import data_folder
from benchmarks.digits import digits, mlp, train
from benchmarks.record import holds, mean_std, record
from secateurs import prune
from secateurs.core.budget import Budget
from secateurs.graph.plan import ModelPlan
from secateurs.measure.quality import evaluate
from secateurs.methods.language.d_pruner import DPruner, general_importance, masks_of
from secateurs.to_solve import layers_to_solve
from tests.support.torchvision_shim import declare_missing_ops

SEEDS = (0, 1, 2)
STRENGTHS = (0.1, 10.0)
DOMAIN_ONLY, GENERAL_ONLY = "D-Pruner λ=0 (domain only)", "G only (general only)"
LENGTH, TUNING, CALIBRATION, TEST = 128, 200, 64, 48


@dataclass(frozen=True)
class Task:
    """A model, and batches of either kind.

    Args:
        model: dense.
        general, domain: to calibrate on; those of the domain also to tune on.
        tests: held out, by "domain" and "general".
        inputs: example inputs.
        lr, epochs: of the tuning.
    """

    model: nn.Module
    general: list[Any]
    domain: list[Any]
    tests: dict[str, list[Any]]
    inputs: Any
    lr: float
    epochs: int


def arms() -> dict[str, DPruner]:
    """The forms and strengths of D-Pruner."""
    found = {DOMAIN_ONLY: DPruner(strength=0.0)}
    for strength in STRENGTHS:
        found[f"D-Pruner λ={strength:g}"] = DPruner(strength=strength)
    for strength in (0.1, 1.0, 10.0):
        found[f"D-Pruner sum λ={strength:g}"] = DPruner(strength=strength, form="sum")
    found["D-Pruner released λ=0.1"] = DPruner(form="released")
    return found


def losses(model: nn.Module, task: Task) -> dict[str, float]:
    """Mean negative log-likelihood on what was held out."""
    # With "perplexity" asked for, labels are next tokens.
    metrics = ("nll", "perplexity") if isinstance(task.inputs, Mapping) else ("nll",)
    return {part: evaluate(model, data, metrics)["nll"] for part, data in task.tests.items()}


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy with zeros."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            made.get_parameter(name).mul_(mask)
    return made


def dual_plan(task: Task, how: DPruner, general: Mapping[str, Tensor], budget: str) -> tuple[ModelPlan, dict[str, Any]]:
    """The plan of D-Pruner and what it says of its tuning; other budgets follow from its scores."""
    options = DPruner(**{**vars(how), "lr": task.lr, "epochs": task.epochs})
    made = prune(
        task.model, task.inputs, budget, method="d-pruner", data=task.domain, general=general, options=options,
        measure=False, recalibrate=False,
    )  # fmt: skip
    return made.plan, made.report.recipe["dual"]


def by_method(task: Task, method: str, data: list[Any], budget: str) -> nn.Module:
    """A baseline of the catalogue."""
    return prune(task.model, task.inputs, budget, method=method, data=data, measure=False, recalibrate=False).model


def compared(task: Task, sparsities: tuple[float, ...]) -> tuple[dict[str, dict[float, dict[str, float]]], dict]:
    """Losses by arm, sparsity and part; and what D-Pruner says of its tuning, by arm."""
    budgets = {s: f"sparsity={s:.0%}" for s in sparsities}
    first = budgets[sparsities[0]]
    general = general_importance(task.model, task.general, first)
    found: dict[str, dict[float, dict[str, float]]] = {"dense": dict.fromkeys(sparsities, losses(task.model, task))}
    sizes = {name: task.model.get_parameter(name).detach().abs() for name in general}
    for name, scores in (("magnitude", sizes), (GENERAL_ONLY, general)):
        layers = {s: layers_to_solve(task.model, Budget.parse(b), "matrix") for s, b in budgets.items()}
        found[name] = {
            s: losses(masked(task.model, masks_of(task.model, scores, chosen)), task) for s, chosen in layers.items()
        }
    for label, method in (("Wanda", "wanda"), ("SparseGPT", "sparsegpt")):
        for part, data in (("general", task.general), ("domain", task.domain)):
            found[f"{label} on {part} data"] = {
                s: losses(by_method(task, method, data, b), task) for s, b in budgets.items()
            }
    told = {}
    for name, how in arms().items():
        plan, told[name] = dual_plan(task, how, general, first)
        plans = {s: plan if b == first else plan.rebudget(b) for s, b in budgets.items()}
        found[name] = {s: losses(one.mask(task.model), task) for s, one in plans.items()}
    return found, told


# -- a small language model --------------------------------------------------------------------------------------------


@cache
def windows(kind: str) -> Tensor:
    """All windows of LENGTH tokens of a text, the first of each the token that begins one: int64 [windows, LENGTH]."""
    from transformers import AutoTokenizer

    folder = data_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm" / "stories260k")
    text = _questions(folder) if kind == "domain" else (folder / "text" / "tinystories.txt").read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    rows = ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
    return torch.cat([torch.ones(len(rows), 1, dtype=torch.long), rows], 1)


def _questions(folder: Path) -> str:
    articles = json.loads((folder / "qa" / "xquad_en.json").read_text("utf-8"))["data"]
    pairs = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    return "\n".join(f"Question: {qa['question']} Answer: {qa['answers'][0]['text']}" for qa in pairs)


def language(seed: int) -> Task:
    """stories260k; the last windows of each text are held out, the seed chooses among the others."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data_folder() / "lm" / "stories260k").eval()

    def part(kind: str, count: int, held_out: bool) -> list[Any]:
        known = windows(kind)
        if held_out:
            ids = known[-count:]
        else:
            rest = known[:-TEST]
            ids = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:count]]
        return [{"input_ids": batch, "labels": batch} for batch in ids.split(8)]

    tests = {kind: part(kind, TEST, True) for kind in ("domain", "general")}
    general, domain = part("general", CALIBRATION, False), part("domain", TUNING, False)
    return Task(model, general, domain, tests, {"input_ids": windows("general")[:1]}, lr=0.03, epochs=1)


# -- digits ------------------------------------------------------------------------------------------------------------


def vision(seed: int) -> Task:
    """A network that learned all digits, and the first five with inverted contrast, which are the domain."""
    (x, y), (test_x, test_y) = digits(seed)
    inverted, test_inverted = (1 - x[y < 5], y[y < 5]), (1 - test_x[test_y < 5], test_y[test_y < 5])
    both = torch.cat([x, inverted[0]]), torch.cat([y, inverted[1]])
    model = train(mlp(seed=seed), both, seed).eval()

    def batches(part: tuple[Tensor, Tensor]) -> list[Any]:
        return list(zip(part[0].split(50), part[1].split(50), strict=True))

    tests = {"domain": batches(test_inverted), "general": batches((test_x, test_y))}
    return Task(model, batches((x, y)), batches(inverted), tests, x[:2], lr=0.03, epochs=5)


# -- the verdict -------------------------------------------------------------------------------------------------------

Runs = list[dict[str, dict[float, dict[str, float]]]]


def mean(runs: Runs, arm: str, sparsity: float, part: str) -> float:
    """Over seeds."""
    return fmean(run[arm][sparsity][part] for run in runs)


def verdict(runs: Runs, sparsities: tuple[float, ...]) -> str:
    """At how many sparsities each inequality held, by arm, in words."""
    of, said = len(sparsities), []
    for arm in list(arms())[1:]:
        found = {part: [mean(runs, arm, s, part) for s in sparsities] for part in ("domain", "general")}

        def below(other: str, part: str, found: Mapping[str, list[float]] = found) -> list[bool]:
            return [f < mean(runs, other, s, part) for f, s in zip(found[part], sparsities, strict=True)]

        first, second = sum(below(GENERAL_ONLY, "domain")), sum(below(DOMAIN_ONLY, "general"))
        size = sum(map(all, zip(below("magnitude", "domain"), below("magnitude", "general"), strict=True)))
        said.append(f"{arm}: {holds(first == second == of)} (domain {first}/{of}, general {second}/{of}; {size}/{of})")
    told = "sparsities at which the domain's loss is below G only, the general one below λ=0; both below magnitude"
    return f"{'; '.join(said)}. In brackets: {told}."


def show(name: str, make: Any, sparsities: tuple[float, ...], **about: Any) -> None:
    """Runs one task for all seeds and records its table."""
    results = [compared(make(seed), sparsities) for seed in SEEDS]
    runs: Runs = [found for found, _ in results]
    told = [notes for _, notes in results]
    columns = [f"{part} loss at {s:.0%}" for s in sparsities for part in ("domain", "general")]
    rows = []
    for arm in runs[0]:
        figures = [
            mean_std([run[arm][s][part] for run in runs], 1) for s in sparsities for part in ("domain", "general")
        ]
        notes = [note[arm] for note in told if arm in note]
        turned = f"{fmean(note['penalty'] for note in notes):.1e}" if notes else ""
        moved = f"{fmean(note['distance'] for note in notes):.1e}" if notes else ""
        rows.append((arm, *figures, turned, moved))
    record(
        name,
        system="d-pruner",
        claim="At equal sparsity, without retraining, the domain's loss is below that of a mask by G alone, and the "
        "general loss below that of a mask for the domain alone (λ = 0).",
        held=verdict(runs, sparsities),
        columns=("mask", *columns, "penalty / gradient", "distance tuned"),
        rows=rows,
        seeds=SEEDS,
        command="python -m benchmarks.d_pruner",
        **about,
    )


def main() -> None:
    """Both tables."""
    declare_missing_ops()
    show(
        "d_pruner",
        language,
        (0.5, 0.6),
        data="stories260k; general: TinyStories, domain: questions and answers of XQuAD (English); windows of "
        f"{LENGTH} tokens, the last {TEST} of each held out, {CALIBRATION} and {TUNING} of the others to calibrate or "
        "tune on",
        note="Losses are nats a token: exp of one is a perplexity. The model writes children's stories; it knows the "
        "domain badly (see its dense loss), so that a mask that serves it may gain by chance. One pass of SGD at rate "
        "0.03, batches of 8; G at 50%.",
    )
    show(
        "d_pruner_digits",
        vision,
        (0.8, 0.9),
        data="scikit-learn digits, 1,000 and 797 to test; general: all classes, domain: 0-4 with inverted contrast; "
        "MLP 64-100-50-10 trained on both",
        note="The proxy of the specification. Five passes of SGD at rate 0.03, batches of 50; G at 80%.",
    )


if __name__ == "__main__":
    main()
