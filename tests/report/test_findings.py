from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from secateurs.report import FrozenWidth, GroupChange, LatencySummary, LayerChange, Report, Side, Speedup
from secateurs.report.findings import (
    Check,
    by_reason,
    changed_groups,
    changed_layers,
    checks,
    key_metric,
    left,
    sparsity,
    speedup,
    stages,
)

BEFORE = Side(1000, 1000, 2000.0, 4000, 5000, LatencySummary(0.010, 0.009, 0.012))
AFTER = Side(400, 400, 1000.0, 1600, 2000, LatencySummary(0.005, 0.004, 0.006))


def report(**more: Any) -> Report:
    return Report(**{"model": "net", "form": "cut", "before": BEFORE, "after": AFTER, **more})


def test_shares_left() -> None:
    assert left(8, 2) == 0.25
    assert [left(None, 1), left(1, None), left(0, 0)] == [None, None, None]


@pytest.mark.parametrize(
    ("budget", "got", "met"),
    [
        ("macs<=50%", "50.0%", True),
        ("macs<=49.9%", "50.0%", False),
        ("macs<=1K", "1.00 K", True),
        ("macs<=999", "1.00 K", False),
        ("params<=40%", "40.0%", True),
        ("params<=399", "400", False),
        ("bytes<=1600B", "1.60 KB", True),
        ("memory<=39%", "40.0%", False),
        ("latency<=5ms", "5.00 ms", True),
        ("latency<=4.9ms", "5.00 ms", False),
        ("latency<=50%", "50.0%", True),
        ("speedup>=2x", "2.00×", True),
        ("speedup>=2.05x", "2.00×", False),
        ("sparsity=75%", "75.0%", True),
        ("sparsity=90%", "75.0%", False),
        ("sparsity>=70%", "75.0%", True),
        ("sparsity>=80%", "75.0%", False),
        ("tokens<=25%", "not measured", None),
        ("2:4", "75.0% removed", None),
        ("1:8", "75.0% removed", False),
    ],
)
def test_what_was_asked_is_checked(budget: str, got: str, met: bool | None) -> None:
    groups = (GroupChange("a", "channel", 10, 2), GroupChange("b", "channel", 30, 8))
    (check,) = checks(report(budget=budget, groups=groups))
    assert (check.got, check.met) == (got, met)


def test_what_a_limit_on_time_was_chosen_by_stands_beside_what_was_measured() -> None:
    found = report(budget="speedup>=2x,latency<=5ms,macs<=50%", predicted_speedup=2.13)
    assert [check.got for check in checks(found)] == [
        "2.00×, 2.13× the speed predicted",
        "5.00 ms, 2.13× the speed predicted",
        "50.0%",
    ]
    unmeasured = replace(found, after=replace(AFTER, latency=None))
    assert checks(unmeasured)[0].got == "not measured, 2.13× the speed predicted"


def test_several_limits_and_what_was_not_measured() -> None:
    unmeasured = replace(AFTER, macs=None, latency=None)
    assert checks(report(budget="macs<=50%,latency<=5ms,params<=50%", after=unmeasured)) == (
        Check("macs<=50%", "not measured", None),
        Check("latency<=5ms", "not measured", None),
        Check("params<=50%", "40.0%", True),
    )
    assert checks(report(budget="speedup>=2x,latency<=60%", after=unmeasured))[1].met is None


@pytest.mark.parametrize("budget", ["", "whatever the method likes"])
def test_an_unreadable_budget_is_not_checked(budget: str) -> None:
    assert checks(report(budget=budget)) == ()


def test_speedups() -> None:
    assert speedup(report(speedup=Speedup(1.5, 1.4, 1.6))) == Speedup(1.5, 1.4, 1.6)
    derived = speedup(report())
    assert derived is not None
    assert (derived.median, derived.p10, derived.p90) == pytest.approx((2.0, 0.009 / 0.006, 0.012 / 0.004))
    assert speedup(report(after=replace(AFTER, latency=None))) is None
    assert speedup(report(after=replace(AFTER, latency=LatencySummary(1, 1, 1e-10)))) is None


def test_sparsity_is_of_units_or_else_of_parameters() -> None:
    assert sparsity(report(groups=(GroupChange("a", "head", 8, 2),))) == 0.75
    assert sparsity(report(after=replace(AFTER, nonzero=100))) == 0.75
    assert sparsity(report(after=replace(AFTER, nonzero=None))) is None


def test_stages_begin_with_the_dense_model_and_end_with_the_final_one() -> None:
    dense, final = replace(BEFORE, quality={"accuracy": 0.9}), replace(AFTER, quality={"accuracy": 0.8})
    steps = {"one-shot": {"accuracy": 0.3}, "recovered": {"accuracy": 0.8}}
    assert [s.name for s in stages(report(before=dense, after=final, stages=steps))] == [
        "dense",
        "one-shot",
        "recovered",
    ]
    assert [s.name for s in stages(report(before=dense, after=final))] == ["dense", "final"]
    unfinished = report(before=dense, after=final, stages={"one-shot": {"accuracy": 0.3}})
    assert [s.name for s in stages(unfinished)] == ["dense", "one-shot", "final"]
    assert stages(report()) == ()


def test_the_key_metric_is_the_first_of_the_final_model() -> None:
    assert key_metric(report()) is None
    assert key_metric(report(stages={"one-shot": {"loss": 1.0}})) == "loss"
    assert key_metric(report(before=replace(BEFORE, quality={"nll": 1.0}), stages={"s": {"loss": 1.0}})) == "nll"
    assert key_metric(report(after=replace(AFTER, quality={"top5": 1.0, "nll": 2.0}))) == "top5"


def test_layers_by_what_they_lost() -> None:
    def layer(name: str, macs: tuple[float, float], params: tuple[int, int], nonzero: int | None = None) -> LayerChange:
        return LayerChange(name, "", (), (), *params, nonzero, *macs)

    rows = [
        layer("whole", (9, 9), (5, 5), 5),
        layer("little", (9, 8), (5, 4), 1),
        layer("much", (9, 1), (5, 4), 4),
        layer("same as little", (9, 8), (5, 4), 1),
        layer("more params", (9, 8), (9, 1), 1),
        layer("no macs", (0, 0), (5, 2), 2),
    ]
    changed, whole = changed_layers(report(layers=rows))
    assert [r.name for r in changed] == ["much", "more params", "little", "same as little", "no macs"]
    assert [r.name for r in whole] == ["whole"]
    changed, whole = changed_layers(report(layers=rows, form="mask"))
    assert [r.name for r in changed] == ["more params", "little", "same as little", "no macs", "much"]


def test_groups_by_the_share_that_went() -> None:
    generator = random.Random(0)
    groups = [GroupChange(str(i), "head", 12, generator.randint(0, 12)) for i in range(40)]
    changed, whole = changed_groups(report(groups=groups))
    slow = [g for kept in range(12) for g in groups if g.kept == kept]
    assert list(changed) == slow
    assert list(whole) == [g for g in groups if g.kept == 12]
    assert whole


def test_frozen_widths_by_reason() -> None:
    a, b, c = (FrozenWidth(n, 0, 4, why) for n, why in (("a", "output"), ("b", "no rule"), ("c", "output")))
    assert by_reason([a, b, c]) == {"output": [a, c], "no rule": [b]}
