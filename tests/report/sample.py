"""A report as a pruned ResNet-56 on 32×32 images would give it: 56 layers, every part filled in."""

from __future__ import annotations

import math
from collections.abc import Iterator

from secateurs.report import (
    FrontPoint,
    FrozenWidth,
    GroupChange,
    LatencySummary,
    LayerChange,
    Recovery,
    Report,
    Scores,
    Side,
    Speedup,
)

BLOCKS = 9
STAGES = ((16, 32), (32, 16), (64, 8))  # width, side of the feature map


def kept(stage: int, block: int, width: int) -> int:
    """Units that stay in a block: few at the start of a stage, more towards its end, as global scores have it."""
    share = 0.25 + 0.06 * block + 0.08 * math.sin(3 * stage + 2 * block)
    return max(1, round(width * min(share, 1)))


def conv(name: str, before: tuple[int, int], after: tuple[int, int], side: int) -> LayerChange:
    old, new = 9 * before[0] * before[1], 9 * after[0] * after[1]
    macs = (old * side**2, new * side**2)
    return LayerChange(
        name,
        "Conv2d",
        (*before, 3, 3),
        (*after, 3, 3),
        params_before=old,
        params_after=new,
        nonzero_after=new,
        macs_before=macs[0],
        macs_after=macs[1],
        seconds_before=6e-5 + macs[0] * 64 * 4e-12,
        seconds_after=6e-5 + macs[1] * 64 * 5e-12,
    )


def layers() -> Iterator[LayerChange]:
    yield conv("conv1", (16, 3), (16, 3), 32)
    wide = 16
    for stage, (width, side) in enumerate(STAGES, 1):
        for block in range(BLOCKS):
            inner = kept(stage, block, width)
            yield conv(f"layer{stage}.{block}.conv1", (width, wide), (inner, wide), side)
            yield conv(f"layer{stage}.{block}.conv2", (width, width), (width, inner), side)
            wide = width
    yield LayerChange("fc", "Linear", (10, 64), (10, 64), 650, 650, 650, 640, 640, 2.1e-5, 2.0e-5)


def groups() -> Iterator[GroupChange]:
    along = tuple(
        tensor
        for block in range(BLOCKS)
        for tensor in (
            f"layer1.{block}.conv1.weight inputs",
            f"layer1.{block}.conv2.weight",
            *(f"layer1.{block}.bn2.{own}" for own in ("weight", "bias", "running_mean", "running_var")),
        )
    )
    yield GroupChange("conv1", "channel", 16, 16, ("conv1.weight", "bn1.weight", "bn1.bias", *along))
    for stage, (width, _) in enumerate(STAGES, 1):
        for block in range(BLOCKS):
            at = f"layer{stage}.{block}"
            own = (f"{at}.conv1.weight", f"{at}.bn1.weight", f"{at}.bn1.bias", f"{at}.conv2.weight inputs")
            stays = kept(stage, block, width)
            low, high = 0.02 * stage, 0.9 + 0.05 * block
            threshold = low + (high - low) * (1 - stays / width) ** 1.4
            yield GroupChange(
                f"{at}.conv1", "channel", width, stays, own, Scores(low, (low + high) / 2.3, high, threshold)
            )


def sensitivity() -> dict[str, tuple[tuple[float, float], ...]]:
    return {
        f"layer{stage}.{block}.conv1": tuple(
            (s, 0.939 - (0.3 / (1 + block + 2 * (3 - stage))) * s ** (2 + 0.3 * block))
            for s in (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
        )
        for stage in (1, 2, 3)
        for block in range(BLOCKS)
    }


def history() -> Recovery:
    epochs = range(1, 31)
    accuracy = [0.9302 - 0.11 * math.exp(-e / 4) + 0.003 * math.sin(2.3 * e) for e in epochs]
    return Recovery(
        "epoch",
        tuple(
            {
                "epoch": e,
                "accuracy": a,
                "accuracy_low": a - 0.02 * math.exp(-e / 9) - 0.002,
                "accuracy_high": a + 0.02 * math.exp(-e / 9) + 0.002,
                "loss": 0.16 + 0.9 * math.exp(-e / 5) + 0.01 * math.sin(e),
            }
            for e, a in zip(epochs, accuracy, strict=True)
        ),
    )


def sample() -> Report:
    """The report with every part filled in."""
    rows = tuple(layers())
    params = (sum(r.params_before for r in rows) + 4064, sum(r.params_after for r in rows) + 3100)
    macs = (sum(r.macs_before for r in rows), sum(r.macs_after for r in rows))
    latency = {"threads": 2, "batch": 64, "device": "cpu"}
    return Report(
        model="resnet56",
        form="cut",
        budget="macs<=50%,latency<=40ms",
        recipe={
            "criterion": "taylor",
            "criterion_options": {"power": 2, "reduce": "sum"},
            "allocation": "global",
            "granularity": "channel",
            "floor": 0.1,
            "round_to": 1,
            "seed": 0,
        },
        before=Side(
            params[0],
            params[0],
            macs[0],
            4 * params[0] + 16_500,
            3_471_225,
            LatencySummary(0.0752, 0.0741, 0.0803, **latency),
            {"accuracy": 0.939, "nll": 0.2291, "ece": 0.0312},
        ),
        after=Side(
            params[1],
            params[1],
            macs[1],
            4 * params[1] + 12_700,
            4 * params[1] + 71_000,
            LatencySummary(0.0440, 0.0433, 0.0478, **latency),
            {"accuracy": 0.9312, "nll": 0.2487, "ece": 0.0344},
        ),
        layers=rows,
        groups=tuple(groups()),
        frozen=(
            FrozenWidth("fc.weight", 0, 10, "an axis of the model's output"),
            FrozenWidth("conv1.weight", 1, 3, "an axis of the model's input"),
            FrozenWidth("layer2.0.shortcut", 0, 16, "aten.constant_pad_nd in layer2.0 has no rule for padded channels"),
            FrozenWidth("layer3.0.shortcut", 0, 32, "aten.constant_pad_nd in layer3.0 has no rule for padded channels"),
        ),
        proof=3.1e-7,
        warnings=(
            "layer1.0.conv1 keeps 4 of 16 channels: fewer than 8 channels are rarely faster on this CPU.",
            "Quality was measured on 10,000 test images, which also chose the epoch; expect a little less on new data.",
        ),
        stages={
            "one-shot": {"accuracy": 0.6127, "nll": 1.402, "ece": 0.1204},
            "batch-norm recalibrated": {"accuracy": 0.8266, "nll": 0.561, "ece": 0.0418},
            "recovered": {"accuracy": 0.9312, "nll": 0.2487, "ece": 0.0344},
        },
        sensitivity=sensitivity(),
        front=(
            FrontPoint("macs<=80%", 0.797, 0.862, 0.9388),
            FrontPoint("macs<=65%", 0.648, 0.731, 0.9361),
            FrontPoint("macs<=50%,latency<=40ms", 0.496, 0.585, 0.9312),
            FrontPoint("macs<=35%", 0.349, 0.467, 0.9214),
            FrontPoint("macs<=20%", 0.198, 0.352, 0.8973),
        ),
        history=history(),
        speedup=Speedup(1.71, 1.66, 1.77),
        environment={
            "secateurs": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "cpu": "AMD EPYC 7B13, 2 of 128 cores",
            "threads": 2,
            "date": "2026-11-21",
        },
        seconds={"trace": 0.14, "score": 3.9, "decide": 0.021, "prove": 0.38, "recover": 1312.0, "measure": 21.4},
        command='secateurs prune timm/resnet56 --budget "macs<=50%,latency<=40ms" --criterion taylor --data cifar10 '
        "--recover 30 --seed 0 --out resnet56-half",
    )
