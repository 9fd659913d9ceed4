"""The decision as data: what stays for a budget, and what a plan tells about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Budget
from secateurs.core.cost import CostModel, Monomial
from secateurs.core.dims import Atom
from secateurs.core.errors import BudgetError, OptionError, PlanError
from secateurs.core.plan import Plan, Recipe, Step, decide, pack, unpack
from secateurs.core.units import ChannelGroup, Group, Member, WeightGroup

A = ChannelGroup(
    "a", 4, "channel",
    (
        Member("a.weight", 0, Atom("a", 4), 2),
        Member("a.bias", 0, Atom("a", 4), 1),
        Member("b.weight", 1, Atom("a", 4), 2, "in"),
    ),
)  # fmt: skip
B = ChannelGroup("b", 6, "head", (Member("b.weight", 0, Atom("b", 6), 2),))
SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([0.5, 9.0, 0.5, 8.0, 7.0, 6.0])}
# 10 + 3 a + 2 b parameters, 34 in all; a · b MACs, 24 in all.
COSTS = CostModel(
    {
        "params": (
            Monomial(10.0, (), "rest"),
            Monomial(3.0, (Atom("a", 4),), "a"),
            Monomial(2.0, (Atom("b", 6),), "b"),
        ),
        "macs": (Monomial(1.0, (Atom("a", 4), Atom("b", 6)), "b"),),
    }
)


def recipe(budget: str, **options: Any) -> Recipe:
    return Recipe(Budget.parse(budget), **options)


def decided(budget: str, groups: tuple[Group, ...] = (A, B), costs: CostModel = COSTS, **options: Any) -> Plan:
    asked = recipe(budget, **options)
    scores: Mapping[str, Tensor] = {g.name: SCORES[g.name] for g in groups}
    return Plan(groups, scores, decide(groups, scores, costs, asked), costs, asked)


def kept(plan: Plan) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in plan.keep.items()}


# -- bits --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(mask: list[bool]) -> None:
    bits = pack(torch.tensor(mask, dtype=torch.bool))
    assert (bits.dtype, len(bits)) == (torch.uint8, -(-len(mask) // 8))
    assert int.from_bytes(bytes(bits.tolist()), "little") == sum(bit << i for i, bit in enumerate(mask))
    assert unpack(bits, len(mask)).tolist() == mask


def test_the_first_entry_is_the_lowest_bit() -> None:
    assert pack(torch.tensor([True, False, False, True] + [False] * 4 + [True])).tolist() == [9, 1]


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "options", "wanted"),
    [
        ("sparsity=40%", {"allocation": "global"}, {"a": [0, 2], "b": [1, 3, 4, 5]}),
        ("sparsity=50%", {"allocation": "uniform"}, {"a": [0, 2], "b": [1, 3, 4]}),
        ("sparsity=40%", {"allocation": "uniform", "floor": 3}, {"a": [0, 2, 3], "b": [1, 3, 4]}),
        # 17 of 34 parameters: 10 are fixed, one unit of each group takes 5, and 2 are left for one more of b.
        ("params<=50%", {"allocation": "global"}, {"a": [0], "b": [1, 3]}),
        ("sparsity=0%", {}, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3, 4, 5]}),
    ],
)
def test_the_best_units_stay(budget: str, options: dict[str, Any], wanted: dict[str, list[int]]) -> None:
    assert kept(decided(budget, **options)) == wanted


@given(st.integers(45, 100), st.sampled_from(["global", "uniform"]))
def test_a_limit_is_met_and_no_unit_more_would_fit(percent: int, rule: str) -> None:
    plan = decided(f"params<={percent}%", allocation=rule)
    limit = 34 * percent / 100
    assert plan.cost("params", relative=False) <= limit + 1e-9
    if plan.sparsity > 0:
        assert plan.cost("params", relative=False) + 3 > limit


def test_of_equal_scores_the_earlier_stay() -> None:
    plan = decided("sparsity=50%", allocation="given", allocation_options={"densities": {"a": 0.25, "b": 4 / 6}})
    assert kept(plan) == {"a": [0], "b": [1, 3, 4, 5]}
    plan = decided("sparsity=40%", allocation="given", allocation_options={"densities": {"a": 0.25, "b": 5 / 6}})
    assert kept(plan) == {"a": [0], "b": [0, 1, 3, 4, 5]}


def test_kept_counts_are_multiples() -> None:
    assert decided("sparsity=50%", round_to=2, allocation="uniform").counts == {"a": 2, "b": 2}


def test_what_cannot_be_met_is_refused_with_the_nearest() -> None:
    with pytest.raises(BudgetError) as caught:
        decided("params<=40%")
    assert caught.value.nearest is not None
    assert set(decided(caught.value.nearest).counts.values()) == {1}


@pytest.mark.parametrize(
    ("shape", "scores", "wanted"),
    [
        ((2, 4), [4, 1, 3, 2, 1, 2, 3, 4], [1, 0, 1, 0, 0, 0, 1, 1]),
        ((1, 8), [9, 8, 7, 6, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]),
        # [1, 4 inputs, 2 positions]: position 0 has 1 5 2 6, position 1 has 8 3 7 4.
        ((1, 4, 2), [1, 8, 5, 3, 2, 7, 6, 4], [0, 1, 1, 0, 0, 1, 1, 0]),
        ((1, 4, 1, 2), [1, 8, 5, 3, 2, 7, 6, 4], [0, 1, 1, 0, 0, 1, 1, 0]),
    ],
    ids=["linear", "two patterns and ties", "conv1d", "conv2d"],
)
def test_patterns_run_along_the_inputs(shape: tuple[int, ...], scores: list[float], wanted: list[int]) -> None:
    group = WeightGroup("w", shape)
    keep = decide((group,), {"w": torch.tensor(scores, dtype=torch.float32)}, CostModel({}), recipe("2:4"))
    assert keep["w"].int().tolist() == wanted


@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99))
def test_every_pattern_of_a_kernel_keeps_its_count(rows: int, blocks: int, side: int, seed: int) -> None:
    shape = (rows, 4 * blocks, side, side)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    keep = decide((WeightGroup("w", shape),), {"w": scores.flatten()}, CostModel({}), recipe("1:4"))["w"].view(shape)
    tiles, values = (t.unflatten(1, (blocks, 4)) for t in (keep, scores))
    assert tiles.sum(2).eq(1).all()
    assert torch.equal((values * tiles).sum(2), values.amax(2))


def test_blocks_are_units() -> None:
    group = WeightGroup("w", (4, 4), (2, 2))
    keep = decide((group,), {"w": torch.tensor([1.0, 4.0, 3.0, 2.0])}, CostModel({}), recipe("sparsity=50%"))
    assert group.spread(keep["w"])["w"].int().tolist() == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2


def test_patterns_are_for_single_weights_alone() -> None:
    scores = {"w": torch.ones(4), "a": torch.ones(4)}
    with pytest.raises(OptionError, match="2:4 is a pattern of single weights; w has block units"):
        decide((WeightGroup("w", (4, 4), (2, 2)),), scores, COSTS, recipe("2:4"))
    with pytest.raises(OptionError, match="2:4 is a pattern of single weights; a has channel units"):
        decide((A,), scores, COSTS, recipe("2:4"))
    with pytest.raises(BudgetError, match="2:4 fixes the sparsity, so it cannot be joined with macs<=50%"):
        decide((WeightGroup("w", (1, 4)),), scores, COSTS, recipe("2:4,macs<=50%"))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_costs_are_of_what_is_kept() -> None:
    plan = decided("sparsity=50%", allocation="uniform")
    assert (plan.counts, plan.sparsity) == ({"a": 2, "b": 3}, 0.5)
    assert (plan.cost("params", relative=False), plan.cost("macs", relative=False)) == (22, 6)
    assert (plan.cost("params"), plan.cost("macs")) == (22 / 34, 6 / 24)


def test_another_budget_is_decided_from_the_same_scores() -> None:
    plan = decided("sparsity=50%", allocation="uniform", round_to=1, floor=1)
    again = plan.rebudget("macs<=50%")
    assert kept(again) == kept(decided("macs<=50%", allocation="uniform"))
    assert str(again.recipe.budget) == "macs<=50%"
    assert again.scores is plan.scores
    assert plan.counts == {"a": 2, "b": 3}
    with pytest.raises(OptionError, match="latency<=1ms needs measurements"):
        plan.rebudget("latency<=1ms")
    timed = plan.rebudget("latency<=5s", lambda counts: float(sum(counts.values())))
    assert timed.counts == {"a": 2, "b": 3}


def with_keep(plan: Plan, **keep: list[int]) -> Plan:
    masks = {n: torch.tensor([i in units for i in range(len(SCORES[n]))]) for n, units in keep.items()}
    return Plan(plan.groups, plan.scores, {**plan.keep, **masks}, plan.costs, plan.recipe)


def test_the_difference_of_two_plans() -> None:
    plan = decided("sparsity=50%", allocation="uniform")
    other = with_keep(plan, b=[0, 1, 2, 3, 5])
    assert plan.diff(other) == {"b": (1, 3, 2)}
    assert other.diff(plan) == {"b": (3, 1, 2)}
    assert plan.diff(with_keep(plan)) == {}
    assert plan.same_as(with_keep(plan))
    assert not plan.same_as(other)
    with pytest.raises(PlanError, match="these plans are over different groups of units and cannot be compared"):
        plan.diff(decided("sparsity=50%", (A,), CostModel({})))


def test_steps_are_told_largest_change_first() -> None:
    plan = with_keep(decided("sparsity=0%"), a=[0, 1], b=[5])
    first, second = plan.steps()
    assert first == Step("b", "head", 6, 1, "b.weight", ())
    assert second == Step("a", "channel", 4, 2, "a.weight", ("a.bias", "b.weight"))
    assert str(first) == "b: 5 of 6 heads go"
    assert str(second) == "a: 2 of 4 channels go; also a.bias, b.weight"
    assert with_keep(plan, a=[0, 1, 2, 3]).steps() == (first,)
    assert str(Step("a", "channel", 2, 1, "w", ("x", "y", "z", "q"))) == "a: 1 of 2 channels go; also x, y, z …"


def test_a_plan_in_words() -> None:
    plan = decided("sparsity=50%", allocation="uniform")
    assert str(plan) == (
        "budget sparsity=50%: 25.0% of macs, 64.7% of params left; magnitude, uniform, 2 groups of channel\n"
        "  a: 2 of 4 channels go; also a.bias, b.weight\n"
        "  b: 3 of 6 heads go"
    )
    assert str(decided("sparsity=0%")).endswith("\n  nothing to do: the model meets the budget as it is")


def many(kept_by_group: list[int], size: int = 200) -> Plan:
    groups = tuple(WeightGroup(f"g{i}", (size, 1)) for i in range(len(kept_by_group)))
    keep = {g.name: torch.arange(size) < n for g, n in zip(groups, kept_by_group, strict=True)}
    return Plan(groups, {g.name: torch.ones(size) for g in groups}, keep, CostModel({}), recipe("sparsity=50%"))


def test_only_the_first_ten_steps_are_told() -> None:
    lines = str(many([100] * 12)).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more groups"


@pytest.mark.parametrize(
    ("counts", "warned"),
    [
        # 5% of 200 units are 10, as long as the whole keeps 20%.
        ([9, 200], ["g0"]),
        ([10, 200], []),
        # The whole keeps 4%, a quarter of that is 1%: 2 units.
        ([1, 15], ["g0"]),
        ([3, 13], []),
        ([6, 6], []),
    ],
)
def test_groups_about_to_collapse_are_warned_about(counts: list[int], warned: list[str]) -> None:
    plan = many(counts)
    assert [w.partition(" ")[0] for w in plan.warnings] == warned
    if warned:
        text = f"g0 keeps {counts[0]} of 200 units; give floor=, or ask for less."
        assert plan.warnings == (text,)
        assert str(plan).endswith(f"\n  warning: {text}")


def test_a_recipe_is_plain_json() -> None:
    made = recipe("macs<=50%,params<=2M", scope=None, ignore=("head",), criterion_options={"norm": 1}, floor=0.1)
    data = json.loads(json.dumps(made.to_dict()))
    back = Recipe.from_dict({**data, "ignore": tuple(data["ignore"])})
    assert back == made
    assert Recipe.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("field", ["round_to", "seed"])
@pytest.mark.parametrize("value", [1.5, "8", None])
def test_a_recipe_of_no_whole_numbers_is_refused(field: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{field} is a whole number, got {value!r}\."):
        Recipe(Budget.parse("macs<=50%"), **{field: value})
