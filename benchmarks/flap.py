"""FLAP (arXiv 2312.11983) and CFSP (2409.13199) without retraining, against Wanda-sp and magnitude-sp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks import stories
from benchmarks.digits import digits, mlp, train
from benchmarks.record import holds, mean_std, record
from secateurs.graph.plan import ModelPlan
from secateurs.measure.quality import evaluate, perplexity
from secateurs.methods.compensation import compensated
from secateurs.methods.language.cfsp import importance

SEEDS = (0, 1, 2)
SHARES = (0.2, 0.3, 0.5)
LENGTH, CALIBRATION, HELD_OUT = 128, 128, 80
FFN = "*.mlp.gate_proj"


@dataclass(frozen=True)
class Arm:
    """One way to prune.

    Args:
        criterion, options, allocation: of a plan; CFSP's allocation needs importances, which are measured.
        bias: whether means stay in the biases.
    """

    criterion: str
    options: dict[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    bias: bool = False


_Z = {"standardize": True}
_COLUMN = {"members": "in", "norm": 2}
ARMS = {
    "FLAP": Arm("fluctuation", {**_Z, "square_heads": True}, "global", True),
    "FLAP without bias": Arm("fluctuation", {**_Z, "square_heads": True}, "global"),
    "FLAP, heads not squared": Arm("fluctuation", _Z, "global", True),
    "FLAP UL-UM": Arm("fluctuation", {}, "uniform", True),
    "Wanda-sp": Arm("fluctuation", {"metric": "wifn"}),
    "Wanda-sp + bias": Arm("fluctuation", {"metric": "wifn"}, bias=True),
    "magnitude-sp": Arm("magnitude", _COLUMN),
    "magnitude-sp + bias": Arm("magnitude", _COLUMN, bias=True),
}
INNER = {name: arm for name, arm in ARMS.items() if "squared" not in name} | {
    "Wanda-sp, z-scores over layers": Arm("fluctuation", {**_Z, "metric": "wifn"}, "global"),
    "CFSP": Arm("input-norm", {}, "sigmoid"),
    "CFSP, equal widths": Arm("input-norm"),
    "CFSP + bias": Arm("input-norm", {}, "sigmoid", True),
    "CFSP, weight-aware": Arm("weight-aware", {}, "sigmoid"),
    "CFSP, weight-aware, equal widths": Arm("weight-aware"),
}


def decided(model: nn.Module, x: Any, data: list[Any], arm: Arm, scope: Any = None) -> ModelPlan:
    """The arm's plan before anything goes; `rebudget` gives the others."""
    options: dict[str, Any] = {}
    if arm.allocation == "sigmoid":
        blocks = importance(model, data)
        options = {"importance": {f"{block}.mlp.gate_proj": value for block, value in blocks.items()}}
    return sec.plan(
        model, x, "sparsity=0%", data=data, criterion=arm.criterion, criterion_options=arm.options,
        allocation=arm.allocation, allocation_options=options, floor=1, scope=scope,
    )  # fmt: skip


def applied(model: nn.Module, plan: ModelPlan, arm: Arm, data: list[Any]) -> nn.Module:
    """The model as the cut would leave it, with zeros."""
    return plan.mask(compensated(model, plan, data) if arm.bias else model)


def budget(plan: ModelPlan, share: float, inner: bool) -> str:
    """A share of the inner channels, or of the parameters of heads and inner channels."""
    if inner:
        return f"sparsity={share:.0%}"
    whole, none = plan.costs.total("params"), plan.costs.total("params", {group.name: 0 for group in plan.groups})
    return f"params<={int(whole - share * (whole - none))}"


def perplexities(rows: Tensor, model: nn.Module, seed: int) -> Iterator[tuple[str, str, float, float]]:
    """(units, arm, share that goes, perplexity) of one calibration set."""
    known, test = rows[: len(rows) // 2], rows[len(rows) // 2 :][:HELD_OUT]
    chosen = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    data = [{"input_ids": part} for part in known[chosen].split(32)]
    x, held_out = {"input_ids": rows[:1]}, stories.labelled(test)
    for units, arms, scope in (("heads and channels", ARMS, None), ("channels", INNER, FFN)):
        for name, arm in arms.items():
            plan = decided(model, x, data, arm, scope)
            for share in SHARES:
                fitted = plan.rebudget(budget(plan, share, scope is not None))
                yield units, name, share, perplexity(applied(model, fitted, arm, data), held_out)


def losses(seed: int) -> Iterator[tuple[str, float, float]]:
    """(arm, share that goes, test loss) of the 128 hidden units of a network on digits."""
    seen, test = digits(seed)
    model = train(mlp((64, 128, 10), seed), seen, seed).eval()
    yield "dense", 0.0, evaluate(model, [test], ("nll",))["nll"]
    arms = {
        "WIFV": Arm("fluctuation"), "Wanda-sp": Arm("fluctuation", {"metric": "wifn"}),
        "magnitude-sp": Arm("magnitude", _COLUMN),
    }  # fmt: skip
    for name, arm in arms.items():
        plan = decided(model, seen[0][:2], [seen[0]], arm)
        for share in (0.5, 0.7):
            fitted = plan.rebudget(f"sparsity={share:.0%}")
            for suffix, bias in (("", False), (" + bias", True)):
                made = applied(model, fitted, Arm(arm.criterion, bias=bias), [seen[0]])
                yield name + suffix, share, evaluate(made, [test], ("nll",))["nll"]


def verdict(found: dict[tuple[str, str, float], list[float]], digit: dict[tuple[str, float], list[float]]) -> str:
    """Each claim at each share, in figures."""
    mean = {key: fmean(values) for key, values in found.items()}

    def at(units: str, first: str, *others: str) -> str:
        parts = []
        for share in SHARES:
            values = [mean[units, name, share] for name in (first, *others)]
            figures = " / ".join(f"{v:.1f}" for v in values)
            parts.append(f"{share:.0%} {figures} ({holds(values[0] < min(values[1:]))})")
        return f"{first} < {', '.join(others)}: {'; '.join(parts)}"

    loss = {key: fmean(values) for key, values in digit.items()}
    helped = {
        (arm, share): (value, loss[f"{arm} + bias", share])
        for (arm, share), value in loss.items()
        if (f"{arm} + bias", share) in loss
    }
    gains = "; ".join(f"{arm} {share:.0%} {a:.3f} to {b:.3f}" for (arm, share), (a, b) in helped.items())
    all_helped = all(after < before for before, after in helped.values())
    rest = ("FLAP without bias", "Wanda-sp", "magnitude-sp")
    return (
        f"Heads and channels, {at('heads and channels', 'FLAP', *rest)}. "
        f"Channels alone, {at('channels', 'FLAP', *rest)}. "
        f"{at('channels', 'CFSP', 'CFSP, equal widths')}. "
        f"{at('channels', 'CFSP', 'Wanda-sp, z-scores over layers', 'magnitude-sp')}. "
        f"Digits, test loss without and with bias ({holds(all_helped)}): {gains}."
    )


def main() -> None:
    """Runs all arms for every calibration set and records them."""
    model, rows = stories.model(), stories.windows(LENGTH)
    dense = perplexity(model, stories.labelled(rows[len(rows) // 2 :][:HELD_OUT]))
    found: dict[tuple[str, str, float], list[float]] = {}
    digit: dict[tuple[str, float], list[float]] = {}
    for seed in SEEDS:
        for units, arm, share, value in perplexities(rows, model, seed):
            found.setdefault((units, arm, share), []).append(value)
        for arm, share, value in losses(seed):
            digit.setdefault((arm, share), []).append(value)
    names = dict.fromkeys((units, arm) for units, arm, _ in found)
    table = [(units, arm, *(mean_std(found[units, arm, s], 1) for s in SHARES)) for units, arm in names]
    table += [
        ("digits, 100 × test loss", arm, "", "", mean_std(digit[arm, 0.5]), mean_std(digit[arm, 0.7]))
        for arm in dict.fromkeys(arm for arm, _ in digit if arm != "dense")
    ]
    weighed = importance(model, [{"input_ids": rows[:CALIBRATION]}])
    record(
        "flap",
        system="flap",
        claim="Without retraining FLAP keeps a lower perplexity than without its bias, than Wanda-sp and magnitude-sp; "
        "CFSP's widths one lower than equal widths, than Wanda-sp over all layers and magnitude-sp.",
        held=verdict(found, digit),
        columns=("units", "arm", *(f"{share:.0%}" for share in SHARES), "70%"),
        rows=[(*row, "") if len(row) == 5 else row for row in table],
        data=f"stories260k ({dense:.2f} dense), TinyStories: {CALIBRATION} windows of {LENGTH} tokens to calibrate on, "
        f"{HELD_OUT} others to measure perplexity on; digits, {fmean(digit['dense', 0.0]):.3f} dense, "
        "128 hidden units, calibrated on the 1,000 training images",
        seeds=SEEDS,
        note="Shares are of the parameters of heads and inner channels, or of inner channels alone. This model of five "
        "blocks has 20 key-value heads, so that one head more or less is much. Seeds draw the calibration windows, "
        "or split the digits and start the network. Block importance of CFSP, by angle over pi: "
        + ", ".join(f"{value:.3f}" for value in weighed.values())
        + ".",
    )


if __name__ == "__main__":
    main()
