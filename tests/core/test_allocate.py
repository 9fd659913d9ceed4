"""Allocation rules against the numbers of the papers' specifications, brute force, and each other."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.allocate import (
    allocate,
    allocation,
    densities,
    floor_counts,
    get_allocation,
    lamp_scores,
    shares,
)
from secateurs.core.budget import Budget, units_kept
from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.pq import adaptive_keep
from secateurs.core.select import top, top_across

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
CONVS = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "fc": (10, 32)}
# CIFAR ResNet-20 with shortcuts that have no parameters: 20 weights, 268,336 entries.
RESNET20 = {
    "conv1": (16, 3, 3, 3),
    **{f"stage1.{i}": (16, 16, 3, 3) for i in range(6)},
    **{f"stage2.{i}": (32, 32 if i else 16, 3, 3) for i in range(6)},
    **{f"stage3.{i}": (64, 64 if i else 32, 3, 3) for i in range(6)},
    "fc": (10, 64),
}


def numel(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def mean_density(shapes: dict[str, tuple[int, ...]], found: dict[str, float]) -> float:
    sizes = numel(shapes)
    return math.fsum(found[name] * sizes[name] for name in sizes) / sum(sizes.values())


def raw_erk(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


@pytest.mark.parametrize(
    ("density", "expected", "scale"),
    [
        (0.05, (0.03848, 0.11133, 0.91851), 8.3501),
        (0.1, (0.07957, 0.23019, 1.0), 17.2642),
        (0.2, (0.16224, 0.46936, 1.0), None),
        (0.5, (0.4341, 1.0, 1.0), None),
    ],
)
def test_erk_of_lenet(density: float, expected: tuple[float, ...], scale: float | None) -> None:
    found = densities("erk", LENET, density)
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-5)
    assert mean_density(LENET, found) == pytest.approx(density, abs=1e-12)
    assert densities("er", LENET, density) == found
    if scale is not None:
        assert found["fc1"] / raw_erk(LENET["fc1"]) == pytest.approx(scale, abs=1e-4)


def test_er_and_erk_of_convolutions() -> None:
    assert tuple(densities("erk", CONVS, 0.05).values()) == pytest.approx((0.12818, 0.02596, 0.29070), abs=1e-5)
    assert tuple(densities("er", CONVS, 0.05).values()) == pytest.approx((0.16447, 0.03895, 0.05453), abs=1e-5)


@pytest.mark.parametrize(
    ("density", "dense", "scale", "narrow", "wide"),
    [
        (0.05, {"fc"}, 8.9411, 0.1475, 0.0325),
        (0.1, {"conv1", "fc"}, 18.3487, 0.3026, 0.0667),
        (0.2, {"conv1", "fc"}, 37.461, 0.6178, 0.1362),
    ],
)
def test_erk_of_resnet20(density: float, dense: set[str], scale: float, narrow: float, wide: float) -> None:
    found = densities("erk", RESNET20, density)
    assert {name for name, value in found.items() if value == 1.0} == dense
    assert found["stage1.0"] / raw_erk((16, 16, 3, 3)) == pytest.approx(scale, abs=1e-3)
    assert found["stage1.0"] == pytest.approx(narrow, abs=5e-5)
    assert found["stage3.1"] == pytest.approx(wide, abs=5e-5)


def test_erk_with_power_zero_is_uniform() -> None:
    assert densities("erk", CONVS, 0.3, power=0.0) == pytest.approx(densities("uniform", CONVS, 0.3))


def test_uniform_plus_meets_the_mean_that_the_published_code_misses() -> None:
    found = densities("uniform+", RESNET20, 0.1)
    assert (found["conv1"], found["fc"]) == (1.0, 0.2)
    assert found["stage1.0"] == pytest.approx(0.098306, abs=5e-7)
    assert mean_density(RESNET20, found) == pytest.approx(0.1, abs=1e-12)


def test_uniform_plus_from_a_fifth_on_holds_only_the_first() -> None:
    found = densities("uniform+", RESNET20, 0.2)
    assert found["conv1"] == 1.0
    assert found["fc"] == found["stage1.0"] == pytest.approx((0.2 * 268_336 - 432) / (268_336 - 432))
    named = densities("uniform+", RESNET20, 0.1, first="stage1.0", classifier="conv1")
    assert (named["stage1.0"], named["conv1"]) == (1.0, 0.2)


def test_uniform_plus_without_a_dense_first_weight() -> None:
    """GraNet's uniform variant, by the formula of its code: `1 − (T(1 − s) − 0.2·N_fc)/(T − N_fc)`."""
    shapes = {"a": (400,), "b": (500,), "fc": (100,)}
    found = densities("uniform+", shapes, 0.1, dense_first=False)
    assert found["fc"] == 0.2
    assert 1 - found["a"] == 1 - found["b"] == pytest.approx(0.911111, abs=1e-6)
    assert allocate("uniform+", numel(shapes), 100, dense_first=False) == {"a": 36, "b": 44, "fc": 20}
    assert densities("uniform+", shapes, 0.3, dense_first=False) == pytest.approx(dict.fromkeys(shapes, 0.3))
    assert densities("uniform+", {"fc": (100,)}, 0.1, dense_first=False) == {"fc": 0.1}


def test_erk_plus_holds_the_classifier() -> None:
    found = densities("erk+", RESNET20, 0.2)
    others = {name: shape for name, shape in RESNET20.items() if name != "fc"}
    rest = (0.2 * 268_336 - 640) / (268_336 - 640)
    assert found == pytest.approx({**densities("erk", others, rest), "fc": 1.0})
    half = densities("erk+", RESNET20, 0.2, fc_density=0.5)
    assert half["fc"] == pytest.approx(0.5)
    assert mean_density(RESNET20, half) == pytest.approx(0.2)
    # Even dense, the others cannot reach 0.9 of so large a classifier.
    assert densities("erk+", {"a": (10, 10), "fc": (10, 100)}, 0.9, fc_density=0.1)["fc"] == pytest.approx(0.89)


def test_a_classifier_that_exceeds_the_budget_is_refused() -> None:
    shapes = {"conv": (4, 3, 3, 3), "fc": (10, 100)}
    with pytest.raises(
        BudgetError, match="erk\\+ holds fc at density 1, which is 1000 weights, but only 110"
    ) as caught:
        densities("erk+", shapes, 110.8 / 1108)
    limit = Budget.parse(str(caught.value.nearest)).limit("sparsity")
    assert limit is not None
    assert allocate("erk+", numel(shapes), units_kept(limit.value, 1108), shapes=shapes)["fc"] == 1000
    with pytest.raises(BudgetError, match=r"uniform\+ holds a at density 1 and c at density 0\.2"):
        densities("uniform+", {"a": (100,), "b": (10,), "c": (100,)}, 0.19)


shape_lists = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


@given(shape_lists, st.floats(1e-3, 1.0), st.sampled_from(["uniform", "uniform+", "er", "erk", "erk+"]))
def test_densities_are_shares_that_average_to_what_was_asked(
    shapes: list[tuple[int, ...]], density: float, rule: str
) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    try:
        found = densities(rule, named, density)
    except BudgetError:
        assert rule.endswith("+")
        return
    assert mean_density(named, found) == pytest.approx(density, rel=1e-9)
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())


def test_densities_refuse() -> None:
    with pytest.raises(OptionError, match="'lamp' takes its counts from scores"):
        densities("lamp", LENET, 0.1)
    for density in (0.0, 1.1, float("nan")):
        with pytest.raises(OptionError, match=r"density must lie in \(0, 1\]"):
            densities("erk", LENET, density)
    with pytest.raises(OptionError, match="there is no classifier 'head'; the groups are fc1, fc2, fc3"):
        densities("erk+", LENET, 0.1, classifier="head")
    with pytest.raises(OptionError, match=r"fc_density must lie in \[0, 1\], got 2"):
        densities("erk+", LENET, 0.1, fc_density=2)


def random_scores(sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=rng) for name, size in sizes.items()}


@pytest.mark.parametrize("rule", ["er", "erk", "uniform", "uniform+", "erk+"])
def test_counts_are_the_densities_to_within_one_unit(rule: str) -> None:
    sizes, keep = numel(RESNET20), 26_834
    counts = allocate(rule, sizes, keep, shapes=RESNET20)
    exact = densities(rule, RESNET20, keep / sum(sizes.values()))
    assert sum(counts.values()) == keep
    assert all(abs(counts[name] - exact[name] * sizes[name]) < 1 for name in sizes)


def test_uniform_is_the_largest_remainder_method() -> None:
    assert allocate("uniform", {"a": 10, "b": 30, "c": 60}, 10) == {"a": 1, "b": 3, "c": 6}
    assert allocate("uniform", {"a": 5, "b": 5, "c": 5}, 7) == {"a": 3, "b": 2, "c": 2}
    assert allocate("uniform", {"a": 100, "b": 10, "c": 10}, 7) == {"a": 6, "b": 1, "c": 0}
    assert allocate("uniform", {"a": 3}, 0) == {"a": 0}


@st.composite
def allocations(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, dict[str, int], dict[str, int]]:
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    values = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
    scores = {str(i): torch.tensor(draw(st.lists(values, min_size=n, max_size=n))) for i, n in enumerate(sizes)}
    floors = {str(i): draw(st.integers(0, n)) for i, n in enumerate(sizes)}
    caps = {str(i): draw(st.integers(floors[str(i)], n)) for i, n in enumerate(sizes)}
    return scores, draw(st.integers(sum(floors.values()), sum(caps.values()))), floors, caps


@given(allocations(), st.sampled_from(["uniform", "er", "erk", "global", "lamp", "pq-index"]))
def test_every_rule_is_exact_within_floors_and_caps(
    case: tuple[dict[str, Tensor], int, dict[str, int], dict[str, int]], rule: str
) -> None:
    scores, keep, floors, caps = case
    shapes = {name: tuple(values.shape) for name, values in scores.items()}
    counts = allocate(rule, scores, keep, shapes=shapes, floors=floors, caps=caps)
    assert list(counts) == list(scores)
    assert sum(counts.values()) == keep
    assert all(floors[name] <= counts[name] <= caps[name] for name in scores)


def water_filling(scores: dict[str, Tensor], keep: int, floors: dict[str, int]) -> dict[str, int]:
    """Global magnitude pruning with minimum thresholds, in the repeated form: clip, take out, rank again."""
    fixed: dict[str, int] = {}
    while True:
        free = {name: values for name, values in scores.items() if name not in fixed}
        if not free:
            return fixed
        masks = top_across(free, keep - sum(fixed.values()))
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        short = {name: floors[name] for name in free if counts[name] < floors[name]}
        if not short:
            return {name: {**fixed, **counts}[name] for name in scores}
        fixed |= short


@given(allocations())
def test_global_with_floors_is_the_fixed_point_of_water_filling(
    case: tuple[dict[str, Tensor], int, dict[str, int], dict[str, int]],
) -> None:
    scores, keep, floors, _ = case
    assert allocate("global", scores, keep, floors=floors) == water_filling(scores, keep, floors)


@given(allocations())
def test_global_is_the_best_decision_within_the_bounds(
    case: tuple[dict[str, Tensor], int, dict[str, int], dict[str, int]],
) -> None:
    scores, keep, floors, caps = case
    best = {
        name: [values.sort(descending=True).values[:n].sum() for n in range(len(values) + 1)]
        for name, values in scores.items()
    }

    def value(counts: dict[str, int]) -> float:
        return float(sum(best[name][n] for name, n in counts.items()))

    def every(names: list[str], left: int) -> list[dict[str, int]]:
        if not names:
            return [{}] if left == 0 else []
        name = names[0]
        counts = range(floors[name], min(caps[name], left) + 1)
        return [{name: n, **rest} for n in counts for rest in every(names[1:], left - n)]

    counts = allocate("global", scores, keep, floors=floors, caps=caps)
    assert value(counts) == pytest.approx(max(map(value, every(list(scores), keep))))


def test_global_on_ten_magnitudes_keeps_exactly_one() -> None:
    scores = {"w": torch.arange(1, 11) / 10}
    assert allocate("global", scores, units_kept(0.9, 10)) == {"w": 1}
    assert top(scores["w"], 1).tolist() == [False] * 9 + [True]


def test_global_is_top_k_of_the_concatenation() -> None:
    scores = random_scores({"a": 50, "b": 300, "c": 7})
    flat = torch.cat(list(scores.values()))
    for keep in (0, 1, 40, 200, 357):
        expected = top(flat, keep).split([50, 300, 7])
        assert allocate("global", scores, keep) == {n: int(m.sum()) for n, m in zip("abc", expected, strict=True)}


def test_global_looks_at_scale_only_between_groups() -> None:
    scores = random_scores({"a": 50, "b": 300, "c": 100})
    counts = allocate("global", scores, 100)
    assert allocate("global", {name: 10 * values for name, values in scores.items()}, 100) == counts
    assert allocate("global", scores | {"a": 10 * scores["a"]}, 100)["a"] > counts["a"]
    # Normalized within each group, a common factor of one group is nothing any more.
    normal = allocate("global", scores, 100, normalize="mean")
    assert allocate("global", scores | {"a": 8 * scores["a"]}, 100, normalize="mean") == normal != counts


def test_ties_go_to_the_earlier_group() -> None:
    assert allocate("global", {"b": torch.ones(3), "a": torch.ones(3)}, 4) == {"b": 3, "a": 1}
    assert allocate("lamp", {"b": torch.ones(2), "a": torch.ones(2)}, 3) == {"b": 2, "a": 1}


def test_floors_of_the_published_example() -> None:
    scores = {"l1": torch.rand(100) * 1e-3, "l2": torch.rand(1000) * 1e-3, "l3": 1 + torch.rand(8900)}
    keep, minimum = units_kept(0.98, 10_000), int(10_000 * 0.5 / 100)
    counts = allocate("global", scores, keep, floors=floor_counts({n: len(s) for n, s in scores.items()}, minimum))
    assert counts == {"l1": 50, "l2": 50, "l3": 100}
    sparsity = {name: 1 - share for name, share in shares(counts, {n: len(s) for n, s in scores.items()}).items()}
    assert sparsity == pytest.approx({"l1": 0.5, "l2": 0.95, "l3": 0.988764}, abs=1e-6)


def test_the_total_is_met_for_every_sparsity_and_feasible_floor() -> None:
    sizes = {"a": 100, "b": 1000, "c": 8900}
    scores = {name: values * 10.0**-i for i, (name, values) in enumerate(random_scores(sizes).items())}
    for sparsity in (0.0, 0.3, 0.9, 0.98, 0.999):
        keep = units_kept(sparsity, 10_000)
        for minimum in (0, 3, keep // 3):
            floors = floor_counts(sizes, minimum)
            if sum(floors.values()) <= keep:
                counts = allocate("global", scores, keep, floors=floors)
                assert sum(counts.values()) == keep
                assert all(counts[name] >= floors[name] for name in sizes)


def test_extreme_floors_make_global_vanilla_or_uniform() -> None:
    scores = {
        name: values * 10.0**i for i, (name, values) in enumerate(random_scores(dict.fromkeys("abcd", 25)).items())
    }
    assert allocate("global", scores, 20, floors=dict.fromkeys("abcd", 0)) == allocate("global", scores, 20)
    assert allocate("global", scores, 20, floors=dict.fromkeys("abcd", 5)) == dict.fromkeys("abcd", 5)


def test_global_keeps_the_largest_mass() -> None:
    weight = torch.tensor([0.3, -2.0, 0.9, 1.1, -0.2, 0.5, -0.7, 1.6, 0.1, -1.2])
    groups = {"a": weight[:3], "b": weight[3:4], "c": weight[4:]}
    for keep in range(11):
        counts = allocate("global", {name: w.abs() for name, w in groups.items()}, keep)
        mass = sum(float(w[top(w.abs(), counts[name])].square().sum()) for name, w in groups.items())
        assert mass == pytest.approx(max(float(weight[list(s)].square().sum()) for s in combinations(range(10), keep)))


def test_no_group_gains_units_when_sparsity_grows() -> None:
    scores = random_scores({"a": 20, "b": 35, "c": 5})
    floors = {"a": 2, "c": 1}
    counts = [allocate("global", scores, keep, floors=floors) for keep in range(3, 61)]
    assert all(fewer[n] <= more[n] for fewer, more in pairwise(counts) for n in scores)


def test_lamp_scores_follow_the_formula() -> None:
    weight = torch.tensor([0.5, 3.0, 1.0, 2.0])
    ascending = weight.sort()
    expected = torch.empty(4, dtype=torch.float64)
    for rank, position in enumerate(ascending.indices):
        expected[position] = weight[position] ** 2 / sum(v**2 for v in ascending.values[rank:])
    torch.testing.assert_close(lamp_scores(weight), expected)
    assert lamp_scores(weight).tolist() == pytest.approx([0.25 / 14.25, 1.0, 1 / 14, 4 / 13])


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=12))
def test_lamp_keeps_the_order_within_a_group_and_ignores_its_scale(values: list[float]) -> None:
    scores = torch.tensor(values)
    for k in range(len(values) + 1):
        assert torch.equal(top(lamp_scores(scores), k), top(scores, k))
    torch.testing.assert_close(lamp_scores(scores * 2.0**-20), lamp_scores(scores))


def test_lamp_keeps_one_of_each_group_first() -> None:
    scores = {"small": torch.tensor([1e-6, 1e-7]), "large": torch.tensor([5.0, 4.0, 3.0])}
    assert allocate("global", scores, 2) == {"small": 0, "large": 2}
    assert allocate("lamp", scores, 2) == {"small": 1, "large": 1}


def test_lamp_refuses_signs_and_infinities() -> None:
    for wrong in (-1.0, float("inf")):
        with pytest.raises(OptionError, match="lamp is defined for finite magnitudes"):
            lamp_scores(torch.tensor([1.0, wrong]))


def test_given_densities_set_the_proportions() -> None:
    sizes = {"a": 100, "b": 200}
    wanted = {"b": 0.1, "a": 0.4}
    assert allocate("given", sizes, 60, densities=wanted) == {"a": 40, "b": 20}
    assert allocate("given", sizes, 30, densities=wanted) == {"a": 20, "b": 10}
    assert allocate("given", sizes, 210, densities=wanted) == {"a": 100, "b": 110}


def test_given_densities_must_name_every_group_and_be_shares() -> None:
    with pytest.raises(OptionError) as caught:
        allocate("given", {"a": 10, "b": 10, "c": 10}, 5, densities={"a": 0.5, "x": 1.5})
    for part in ("missing are b, c", "unknown are x", "a density of 1.5 for x, outside [0, 1]"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="'given' needs the option densities"):
        allocate("given", {"a": 10}, 5)


def test_shares_carry_a_rule_over_to_other_positions() -> None:
    scores = random_scores({"a": 100, "b": 900})
    sizes = {"a": 100, "b": 900}
    counts = allocate("global", scores, 300)
    assert allocate("given", sizes, 300, densities=shares(counts, sizes)) == counts


@pytest.mark.parametrize(
    ("floor", "expected"),
    [(0, [0, 0, 0]), (4, [1, 4, 4]), (0.1, [1, 3, 3]), (0.0, [1, 1, 1]), (1.0, [1, 25, 30]), (1, [1, 1, 1])],
)
def test_floors_are_counts_or_shares(floor: float, expected: list[int]) -> None:
    assert list(floor_counts({"a": 1, "b": 25, "c": 30}, floor).values()) == expected


def test_a_share_that_is_a_whole_number_of_units_is_not_rounded_up() -> None:
    assert 0.07 * 100 > 7
    assert floor_counts({"a": 100}, 0.07) == {"a": 7}


def test_floors_refuse() -> None:
    with pytest.raises(OptionError, match="at least 0, got -1"):
        floor_counts({"a": 1}, -1)
    with pytest.raises(OptionError, match=r"must lie in \[0, 1\], got 1.5"):
        floor_counts({"a": 1}, 1.5)


def test_an_impossible_total_quotes_both_numbers_and_the_nearest() -> None:
    with pytest.raises(
        BudgetError, match="9 of 100 units are to stay, but the floors of the groups add up to 12"
    ) as low:
        allocate("global", random_scores({"a": 40, "b": 60}), 9, floors={"a": 6, "b": 6})
    assert low.value.nearest == "sparsity=88%"
    with pytest.raises(
        BudgetError, match="91 of 100 units are to stay, but the caps of the groups add up to 80"
    ) as high:
        allocate("uniform", {"a": 40, "b": 60}, 91, caps={"b": 40})
    assert high.value.nearest == "sparsity=20%"
    with pytest.raises(BudgetError, match="101 of 100 units"):
        allocate("uniform", {"a": 40, "b": 60}, 101)


def test_bounds_must_fit_the_groups() -> None:
    with pytest.raises(OptionError) as caught:
        allocate("uniform", {"a": 10, "b": 10}, 5, floors={"a": 5, "x": 1, "b": -1}, caps={"a": 4})
    for part in ("no group is called 'x'", "a has floor 5 and cap 4", "b has floor -1"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="no group to allocate to"):
        allocate("uniform", {}, 0)
    assert allocate("uniform", {"a": 10, "b": 90}, 30, floors={"a": 50}) == {"a": 10, "b": 20}


def test_rules_that_need_shapes_say_why_channels_have_none() -> None:
    with pytest.raises(OptionError, match="'erk' derives densities from weight shapes, which b have not"):
        allocate("erk", {"a": 10, "b": 10}, 5, shapes={"a": (2, 5)})
    with pytest.raises(OptionError, match="channels and heads have none"):
        allocate("erk+", {"a": 10}, 5)


def test_rules_that_need_scores_say_so() -> None:
    with pytest.raises(OptionError, match="'lamp' ranks scores, but b has only a size"):
        allocate("lamp", {"a": torch.ones(3), "b": 4}, 5)
    for rule in ("global", "lamp", "pq-index"):
        with pytest.raises(OptionError, match="1 of 2 scores of b are NaN"):
            allocate(rule, {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, 2)


def test_the_index_takes_from_where_few_hold_most() -> None:
    """SAP would leave all 8 equal units, and 2 of 4 of which one is nearly all; scores of 0 or −∞ went before."""
    scores = {"even": torch.ones(8), "one": torch.tensor([1e-9, 9.0, 1e-9, 1e-9]), "gone": torch.tensor([2.0, 0.0])}
    scores["gone"][1] = -torch.inf
    wanted = {name: int(adaptive_keep(values)) for name, values in scores.items() if name != "gone"} | {"gone": 1}
    assert wanted == {"even": 8, "one": 2, "gone": 1}
    assert allocate("pq-index", scores, 11) == wanted
    assert allocate("pq-index", scores, 6) == {"even": 4, "one": 1, "gone": 1}
    assert allocate("pq-index", scores, 0) == dict.fromkeys(scores, 0)
    bold = allocate("pq-index", scores, 6, p=1.0, q=2.0, gamma=2.0, beta=0.5)
    assert bold == {"even": 4, "one": 1, "gone": 1}
    with pytest.raises(OptionError, match="pq-index is defined for magnitudes, got negative scores; use global"):
        allocate("pq-index", {"a": torch.tensor([1.0, -1.0])}, 1)


def test_what_a_rule_needs_is_data() -> None:
    needs = {name: (rule.needs_scores, rule.needs_shapes) for name in RULES if (rule := get_allocation(name))}
    assert needs == RULES
    assert get_allocation("erk+").options == ("power", "fc_density", "classifier")
    assert get_allocation("global").options == ("normalize",)


RULES = {
    "uniform": (False, False),
    "uniform+": (False, False),
    "er": (False, True),
    "erk": (False, True),
    "erk+": (False, True),
    "given": (False, False),
    "global": (True, False),
    "lamp": (True, False),
    "pq-index": (True, False),
}


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown allocation 'erl'; the nearest are er"):
        get_allocation("erl")
    with pytest.raises(OptionError, match="'erk' has no option pover; its options are: power"):
        allocate("erk", {"a": 10}, 5, shapes={"a": (2, 5)}, pover=2.0)
    with pytest.raises(OptionError, match="'uniform' has no option power; its options are: none"):
        densities("uniform", LENET, 0.5, power=1.0)
    with pytest.raises(OptionError, match="allocation 'erk' is defined twice"):
        allocation("erk")(lambda shapes, density: {})


def test_a_floor_that_is_no_number_is_refused() -> None:
    with pytest.raises(OptionError, match=r"a floor is a number of units or a share of them, got '10%'\."):
        floor_counts({"a": 4}, "10%")  # type: ignore[arg-type]
