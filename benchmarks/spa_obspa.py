"""OBSPA (arXiv 2403.18955) without any training: against L1 and SPA-L1, with images, other images and no data."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import batches, data_folder, exact, normalized, pretrained
from benchmarks.record import holds, mean_std, record
from secateurs import plan
from secateurs.graph.plan import ModelPlan
from secateurs.measure.quality import evaluate
from secateurs.methods.calibration import noise
from secateurs.methods.repair import repaired
from secateurs.recover.batchnorm import recalibrate_batch_norm

SEEDS = (0, 1, 2)
IMAGES = 256
INNER = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
BUDGETS = {"25% of inner channels": "sparsity=25%", "50% of inner channels": "sparsity=50%", "macs<=50%": "macs<=50%"}


def subset(images: Tensor, seed: int) -> list[Tensor]:
    """`IMAGES` of the images, drawn by the seed, in two batches."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    return list(images[chosen].split(IMAGES // 2))


def digits() -> Tensor:
    """Handwritten digits as grey CIFAR images."""
    with np.load(data_folder() / "mnist" / "mnist.npz") as file:
        images = np.pad(file["test_x"][:2000], ((0, 0), (2, 2), (2, 2)))
    return normalized(np.repeat(images[..., None], 3, axis=3))


def photographs() -> Tensor:
    """ImageNet photographs of ten other classes, at the size of CIFAR images."""
    from PIL import Image

    with np.load(data_folder() / "imagenet" / "imagenette_val500.npz") as file:
        stream, ends = file["jpeg"], file["offset"]
    pieces = [Image.open(io.BytesIO(stream[a:b].tobytes())) for a, b in pairwise(ends)]
    return normalized(np.stack([np.asarray(piece.convert("RGB").resize((32, 32))) for piece in pieces]))


def at(decided: ModelPlan, budget: str) -> ModelPlan:
    """The plan for another budget: an equal share of every block, or to an equal cost one ranking of all of them."""
    rule = "global" if budget.startswith("macs") else "uniform"
    return replace(decided, recipe=replace(decided.recipe, allocation=rule)).rebudget(budget)


def accuracy(model: nn.Module) -> float:
    """On the exact test images."""
    return evaluate(model, batches(exact("test")), ("accuracy",))["accuracy"]


def with_norms(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """`model` with batch-norm statistics of the data."""
    recalibrate_batch_norm(model, data)
    return model


def arms(model: nn.Module, seed: int, others: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    """(budget, arm, accuracy) of one calibration subset."""
    images = exact("train")[0]
    x, given = images[:2], subset(images, seed)

    def decided(criterion: str, data: list | None = None, **options: str) -> ModelPlan:
        return plan(model, x, "sparsity=25%", criterion=criterion, data=data, criterion_options=options, scope=INNER)

    sources = {name: subset(other, seed) for name, other in others.items()}
    sources |= {f"no data, {kind} noise": noise(x, kind, IMAGES, seed) for kind in ("uniform", "smooth")}
    scored = {name: decided("obs", data) for name, data in sources.items()}
    filters, groups, own = decided("magnitude", members="out"), decided("magnitude"), decided("obs", given)
    for name, budget in BUDGETS.items():
        l1, spa, obs = at(filters, budget), at(groups, budget), at(own, budget)
        yield name, "L1", accuracy(l1.cut(model))
        yield name, "L1 + BN", accuracy(with_norms(l1.cut(model), given))
        yield name, "SPA-L1", accuracy(spa.cut(model))
        yield name, "SPA-L1 + BN", accuracy(with_norms(spa.cut(model), given))
        made = obs.cut(repaired(model, obs, given))
        yield name, "OBSPA", accuracy(made)
        yield name, "OBSPA + BN", accuracy(with_norms(made, given))
        yield name, "SPA-L1 + OBS repair", accuracy(spa.cut(repaired(model, spa, given)))
        for source, data in sources.items():
            other = at(scored[source], budget)
            yield name, f"OBSPA, {source}", accuracy(other.cut(repaired(model, other, data)))
        free = sources["no data, smooth noise"]
        yield name, "SPA-L1 + OBS repair, no data, smooth noise", accuracy(spa.cut(repaired(model, spa, free)))


def verdict(found: dict[tuple[str, str], list[float]]) -> str:
    """C2, and the arms without data against the better of L1 and SPA-L1, in figures."""
    mean = {key: 100 * fmean(values) for key, values in found.items()}
    order = {b: [mean[b, arm] for arm in ("OBSPA", "L1 + BN", "L1")] for b in BUDGETS}
    first = "; ".join(
        f"{b} {' / '.join(f'{v:.1f}' for v in o)} ({holds(o[0] > o[1] > o[2])})" for b, o in order.items()
    )
    best = {b: max(mean[b, "L1"], mean[b, "SPA-L1"]) for b in BUDGETS}
    free = {
        arm: ", ".join(f"{mean[b, arm]:.1f} to {best[b]:.1f} ({holds(mean[b, arm] >= best[b])})" for b in BUDGETS)
        for arm in dict.fromkeys(arm for _, arm in found)
        if "no data" in arm
    }
    second = "; ".join(f"{arm}: {figures}" for arm, figures in free.items())
    return f"OBSPA / L1 + BN / L1: {first}. Against the better of L1 and SPA-L1, at the same three: {second}."


def main() -> None:
    """Runs C2 of the specification for every calibration subset and records it."""
    model = pretrained(20)
    others = {"digits": digits(), "photographs of other classes": photographs()}
    found: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        for budget, arm, value in arms(model, seed, others):
            found.setdefault((budget, arm), []).append(value)
    names = dict.fromkeys(arm for _, arm in found)
    record(
        "spa_obspa",
        system="spa-obspa",
        claim="Without fine-tuning, OBSPA > L1 with recalibrated batch norms > L1; without data it beats L1, too.",
        held=verdict(found),
        columns=("arm", *BUDGETS),
        rows=[(arm, *(mean_std(found[budget, arm]) for budget in BUDGETS)) for arm in names],
        data=f"CIFAR-10, pretrained ResNet-20 (91.6 dense), 1,017 exact test images; {IMAGES} calibration images or "
        "noise samples; no training of any kind",
        seeds=SEEDS,
        note="Inner channels of the nine blocks; an equal share of each, or at equal MACs one ranking of all. BN: "
        "batch-norm statistics measured on the calibration images. Seeds choose the calibration subset or draw the "
        "noise, so L1 and SPA-L1 have none. The arm 'SPA-L1 + OBS repair' is the same repair of other channels. The "
        "spectrum of the smooth noise, one over the frequency, was settled on with these test images in view.",
    )


if __name__ == "__main__":
    main()
