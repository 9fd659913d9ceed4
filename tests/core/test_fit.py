"""Fitting: within every limit, as large as can be, against trying every number of units."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.allocate import allocate
from secateurs.core.budget import Budget, units_kept
from secateurs.core.cost import CostModel, Monomial, constant
from secateurs.core.dims import Atom, Fixed
from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.fit import fit

SIZES = {"a": 24, "b": 40, "heads": 6}
A, B, H = (Atom(name, size) for name, size in SIZES.items())
# Two convolutions on 7×7 pixels, then attention of heads of 8 on 5 tokens, then a classifier that cannot shrink.
COSTS = CostModel(
    {
        "macs": (
            Monomial(49 * 27, (A,), "conv1"),
            Monomial(49 * 9, (A, B), "conv2"),
            Monomial(4 * 5, (B, H, Fixed(8)), "attention"),
            Monomial(2 * 5 * 5, (H, Fixed(8)), "attention"),
        ),
        "params": (
            Monomial(28, (A,), "conv1"),
            Monomial(9, (A, B), "conv2"),
            Monomial(4, (B, H, Fixed(8)), "attention"),
            constant(410, "fc"),
        ),
        "bytes": (Monomial(36, (A, B), "conv2"), constant(1640, "fc")),
    }
)
SCORES = {n: torch.rand(size, generator=torch.Generator().manual_seed(i)) for i, (n, size) in enumerate(SIZES.items())}
TOTAL = sum(SIZES.values())


def ruled(rule: str = "global", scores: dict[str, Tensor] = SCORES) -> Callable[[int], dict[str, int]]:
    return lambda keep: allocate(rule, scores, keep, floors=dict.fromkeys(scores, 1))


def fitted(budget: str, rule: str = "global", **options: object) -> dict[str, int]:
    given_options = {"allocate": ruled(rule), "total_units": TOTAL, "minimum_units": 3, "costs": COSTS, "sizes": SIZES}
    return fit(budget, **{**given_options, **options})  # type: ignore[arg-type]


def used(budget: str, counts: dict[str, int]) -> float:
    """The largest share of a limit that `counts` use, written once more from the grammar's meaning."""
    shares = []
    for limit in Budget.parse(budget).limits:
        if limit.metric == "sparsity":
            shares.append(sum(counts.values()) / max(units_kept(limit.value, TOTAL), 1))
            continue
        metric = {"memory": "bytes"}.get(limit.metric, limit.metric)
        allowed = limit.value * COSTS.total(metric) if limit.relative else limit.value
        shares.append(COSTS.total(metric, counts) / allowed)
    return max(shares)


BUDGETS = [
    "macs<=50%",
    "params<=3K",
    "memory<=9KB",
    "macs<=29%,params<=60%",
    "bytes<=40%,sparsity>=20%",
    "sparsity>=55%",
    "macs<=100%",
]


@pytest.mark.parametrize("rule", ["global", "uniform", "lamp"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_decision_is_the_largest_that_fits(budget: str, rule: str) -> None:
    counts = fitted(budget, rule)
    every = (ruled(rule)(keep) for keep in range(3, TOTAL + 1))
    largest = max(sum(c.values()) for c in every if used(budget, c) <= 1 + 1e-9)
    assert used(budget, counts) <= 1 + 1e-9
    assert sum(counts.values()) >= largest


@settings(max_examples=40)
@given(st.floats(0.05, 0.99), st.sampled_from([1, 4, 8]), st.sampled_from(["macs", "params"]))
def test_nothing_that_fits_is_left(share: float, multiple: int, metric: str) -> None:
    budget = f"{metric}<={100 * share:.4f}%"
    try:
        counts = fitted(budget, round_to=multiple)
    except BudgetError as error:
        budget = str(error.nearest)
        counts = fitted(budget, round_to=multiple)
    assert used(budget, counts) <= 1 + 1e-9
    if used(budget, counts) < 0.999:
        grown = [{**counts, n: next_level(counts[n], SIZES[n], multiple)} for n in SIZES if counts[n] < SIZES[n]]
        assert all(used(budget, more) > 1 for more in grown)


def next_level(count: int, size: int, multiple: int) -> int:
    return size if size <= multiple else min(count // multiple * multiple + multiple, size)


def test_sparsity_is_met_exactly_with_one_call_of_the_rule() -> None:
    calls = []

    def rule(keep: int) -> dict[str, int]:
        calls.append(keep)
        return ruled()(keep)

    counts = fitted("sparsity=60%", allocate=rule)
    assert sum(counts.values()) == 28 == units_kept(0.6, TOTAL)
    assert calls == [28]
    assert counts == ruled()(28)


def test_a_rule_is_called_few_times_where_costs_are_linear() -> None:
    calls = []
    size = 10**7
    costs = CostModel({"params": (Monomial(1, (Atom("w", size),)), constant(1000))})

    def rule(keep: int) -> dict[str, int]:
        calls.append(keep)
        return {"w": keep}

    counts = fit("params<=37%", allocate=rule, total_units=size, minimum_units=1, costs=costs, sizes={"w": size})
    assert counts == {"w": int(0.37 * (size + 1000)) - 1000}
    assert len(calls) < 12


def test_a_pinned_sparsity_does_not_give_way_to_other_limits() -> None:
    with pytest.raises(BudgetError, match="macs<=5% cannot be met, the smallest decision keeps") as caught:
        fitted("sparsity=50%,macs<=5%")
    assert caught.value.nearest is not None
    assert caught.value.nearest.startswith("sparsity=50%,macs<=")
    assert sum(fitted(caught.value.nearest).values()) == 35
    assert sum(fitted("sparsity>=50%,macs<=5%").values()) < 35


def test_a_costly_unit_stops_its_own_group_only() -> None:
    # The next unit in rank is a head, which costs as much as fifty channels.
    scores = {"head": torch.tensor([9.0, 5.0]), "channel": torch.linspace(4, 1, 100)}
    sizes = {"head": 2, "channel": 100}
    costs = CostModel({"macs": (Monomial(50, (Atom("head", 2),)), Monomial(1, (Atom("channel", 100),)))})
    counts = fit(
        "macs<=90",
        allocate=ruled(scores=scores),
        total_units=102,
        minimum_units=2,
        costs=costs,
        sizes=sizes,
    )
    assert counts == {"head": 1, "channel": 40}


def test_an_unreachable_limit_names_the_nearest_that_can_be_met() -> None:
    least = COSTS.total("macs", {"a": 1, "b": 1, "heads": 1}) / COSTS.total("macs")
    with pytest.raises(BudgetError) as caught:
        fitted("macs<=0.1%,params<=90%")
    assert caught.value.nearest is not None
    limit = Budget.parse(caught.value.nearest).limit("macs")
    assert limit is not None
    assert least <= limit.value <= least * 1.01
    assert caught.value.nearest.endswith("params<=90%")
    assert f"macs<=0.1% cannot be met, the smallest decision keeps {least:.3%} of the macs" in str(caught.value)
    with pytest.raises(BudgetError, match=r"params<=100 cannot be met, the smallest decision keeps \d+ params") as few:
        fitted("params<=100")
    assert fitted(str(few.value.nearest)) == {"a": 1, "b": 1, "heads": 1}


def test_too_high_a_sparsity_names_the_highest() -> None:
    with pytest.raises(
        BudgetError, match="sparsity=97% cannot be met, the smallest decision keeps 3 of 70 units"
    ) as low:
        fitted("sparsity=97%")
    assert sum(fitted(str(low.value.nearest)).values()) == 3
    with pytest.raises(BudgetError) as rounded:
        fitted("sparsity>=97%", round_to=8)
    assert str(rounded.value.nearest).startswith("sparsity>=")
    # The lowest levels are 8, 8 and, six heads being fewer than eight, 1.
    assert fitted(str(rounded.value.nearest), round_to=8) == {"a": 8, "b": 8, "heads": 1}


def test_a_rule_that_refuses_few_units_is_asked_for_more() -> None:
    shapes = {"a": (24, 1), "b": (40, 1), "heads": (6, 1)}

    def rule(keep: int) -> dict[str, int]:
        return allocate("erk+", SIZES, keep, shapes=shapes, classifier="b", floors=dict.fromkeys(SIZES, 1))

    counts = fitted("macs<=60%", allocate=rule)
    assert counts["b"] == 40
    assert used("macs<=60%", counts) <= 1
    with pytest.raises(BudgetError, match="macs<=1% cannot be met"):
        fitted("macs<=1%", allocate=rule)
    with pytest.raises(BudgetError, match=r"erk\+ holds b at density 1"):
        fitted("sparsity=80%", allocate=rule)


@settings(max_examples=40)
@given(st.floats(0.1, 0.95), st.sampled_from([4, 7, 8, 16]), st.sampled_from(["global", "uniform"]))
def test_counts_are_multiples_or_whole(share: float, multiple: int, rule: str) -> None:
    budget = f"macs<={100 * share:.2f}%"
    try:
        counts = fitted(budget, rule, round_to=multiple)
    except BudgetError:
        return
    for name, count in counts.items():
        # Six heads have no multiple of seven: they stay whole or, where the rule leaves no more, one stays.
        floor = 1 if SIZES[name] <= multiple else multiple
        assert count in (SIZES[name], floor) or (count % multiple == 0 and count >= floor)


@pytest.mark.parametrize(
    ("count", "size", "floor", "multiple", "rounded"),
    [
        (11, 64, 1, 8, 8),
        (12, 64, 1, 8, 16),
        (13, 64, 1, 8, 16),
        (1, 64, 1, 8, 8),
        (3, 64, 0, 8, 0),
        (20, 64, 17, 8, 24),
        (61, 62, 1, 8, 62),
        (58, 62, 1, 8, 56),
        (62, 62, 1, 8, 62),
        (3, 6, 1, 8, 6),
        (1, 6, 1, 8, 1),
        (0, 6, 0, 8, 0),
        (5, 8, 1, 8, 8),
        (11, 12, 9, 8, 12),
        (9, 12, 9, 8, 9),
        (5, 7, 1, 1, 5),
    ],
)
def test_rounding_goes_to_the_nearest_level(count: int, size: int, floor: int, multiple: int, rounded: int) -> None:
    counts = fit(
        "macs<=100",
        allocate=lambda keep: {"g": count},
        total_units=size,
        minimum_units=floor,
        costs=CostModel({"macs": (constant(1),)}),
        sizes={"g": size},
        round_to=multiple,
        floors={"g": floor},
    )
    assert counts == {"g": rounded}


def test_without_rounding_the_counts_of_the_rule_stand() -> None:
    for options in ({}, {"round_to": 1}, {"round_to": {}}):
        counts = fitted("sparsity=96%", allocate=lambda keep: {"a": keep, "b": 0, "heads": 0}, **options)
        assert counts == {"a": 3, "b": 0, "heads": 0}


def test_rounding_may_differ_between_groups() -> None:
    counts = fitted("macs<=50%", round_to={"a": 8, "b": 4})
    assert counts["a"] % 8 == counts["b"] % 4 == 0
    assert counts["heads"] != SIZES["heads"]


def test_rounding_never_exceeds_a_sparsity() -> None:
    counts = fitted("sparsity=50%", round_to=8)
    assert sum(counts.values()) <= 35
    assert counts["a"] % 8 == counts["b"] % 8 == 0


class Clock:
    """A model whose time is a constant and a share of its MACs."""

    def __init__(self, constant_part: float = 0.2) -> None:
        self.constant_part = constant_part
        self.calls = 0

    def __call__(self, counts: dict[str, int]) -> float:
        self.calls += 1
        share = COSTS.total("macs", counts) / COSTS.total("macs")
        return 0.010 * (self.constant_part + (1 - self.constant_part) * share)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        ("speedup>=2x", 0.005),
        ("latency<=4ms", 0.004),
        ("latency<=60%", 0.006),
        ("latency<=9ms,speedup>=2.5x", 0.004),
        ("macs<=70%,speedup>=3x", 0.01 / 3),
    ],
)
def test_latency_is_met_within_eight_measurements(budget: str, allowed: float) -> None:
    clock = Clock()
    counts = fitted(budget, measure=clock)
    assert clock.calls <= 8
    assert clock(counts) <= allowed
    # Five bisections leave less than a thirty-second of all units.
    assert clock(ruled()(min(sum(counts.values()) + TOTAL // 32 + 2, TOTAL))) > allowed


def test_a_latency_that_the_other_limits_already_meet_costs_two_measurements() -> None:
    clock = Clock()
    assert fitted("macs<=20%,speedup>=2x", measure=clock) == fitted("macs<=20%")
    assert clock.calls == 2


def test_a_measured_decision_is_rounded() -> None:
    clock = Clock()
    counts = fitted("speedup>=2x", measure=clock, round_to=8)
    assert counts["a"] % 8 == counts["b"] % 8 == 0
    assert clock(counts) <= 0.005
    assert clock.calls <= 9


@pytest.mark.parametrize(("budget", "near"), [("speedup>=9x", 4.8), ("latency<=1ms", 0.0021), ("latency<=10%", 0.21)])
def test_an_unreachable_latency_names_the_nearest(budget: str, near: float) -> None:
    clock = Clock()
    with pytest.raises(BudgetError, match=r"cannot be met, the smallest decision takes 2\.0\d ms") as caught:
        fitted(f"{budget},params<=90%", measure=clock)
    assert clock.calls <= 8
    assert caught.value.nearest is not None
    assert caught.value.nearest.endswith(",params<=90%")
    assert Budget.parse(caught.value.nearest).limits[0].value == pytest.approx(near, rel=0.05)
    assert fitted(caught.value.nearest, measure=clock) == ruled()(3)


def test_a_cut_that_is_slower_than_the_model_has_no_nearest() -> None:
    with pytest.raises(BudgetError, match="more than the 10 ms of the whole model") as caught:
        fitted("speedup>=2x", measure=lambda counts: 0.01 if counts == SIZES else 0.02)
    assert caught.value.nearest is None


def test_what_cannot_be_fitted_is_refused_all_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        fit(
            "2:4,tokens<=25%,latency<=3ms,macs<=50%",
            allocate=ruled(),
            total_units=TOTAL,
            minimum_units=3,
            costs=CostModel({"params": (), "bytes": ()}),
            sizes=SIZES,
        )
    for part in (
        "the pattern 2:4 fixes its own counts",
        "tokens<=25% limits what a model reads",
        "latency<=3ms needs measurements",
        "macs<=50% limits macs, but the known costs are params, bytes",
    ):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="round_to must be at least 1, got 0 for a"):
        fitted("macs<=50%", round_to={"a": 0})


def test_a_cost_that_is_nothing_is_always_met() -> None:
    costs = CostModel({"macs": ()})
    assert fitted("macs<=50%", costs=costs) == SIZES
