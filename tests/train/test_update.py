"""Mask updates as pure functions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import OptionError
from secateurs.core.units import WeightGroup
from secateurs.train.scoring import Bound, Magnitude, Motion
from secateurs.train.update import Drawn, Moment, Ranked, by_rule, drawn_mask, per_tensor, tensor_targets


def ranked(
    weights: dict[str, Tensor], block: tuple[int, int] = (1, 1), pool: str = "mean", nested: bool = True
) -> Ranked:
    groups = tuple(WeightGroup(name, tuple(w.shape), block) for name, w in weights.items())
    return Ranked(groups, Magnitude(pool), per_tensor(0.9, {}, dict.fromkeys(weights, 1)), nested)


def moment(weights: dict[str, Tensor], sparsity: float, masks: dict[str, Tensor] | None = None) -> Moment:
    return Moment(1, sparsity, weights, masks or {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()})


def updated(weights: dict[str, Tensor], sparsity: float, masks: dict[str, Tensor] | None = None, **how: object) -> dict:
    return ranked(weights, **how).update(moment(weights, sparsity, masks), {})[0]


@given(st.integers(1, 300), st.floats(0, 0.99), st.integers(1, 5), st.integers(0, 99))
def test_every_tensor_keeps_exactly_the_rounded_count_whatever_the_ties(
    size: int, sparsity: float, levels: int, seed: int
) -> None:
    weights = {"w": torch.randint(0, levels, (1, size), generator=torch.Generator().manual_seed(seed)).float()}
    assert int(updated(weights, sparsity)["w"].sum()) == max(round(size * (1 - sparsity)), 1)


def test_the_count_of_the_paper_s_curve() -> None:
    assert int(updated({"w": torch.randn(10, 100)}, 0.5203125)["w"].sum()) == 480


def test_halves_round_to_even() -> None:
    assert int(updated({"w": torch.randn(1, 10)}, 0.75)["w"].sum()) == 2


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=8), st.floats(0, 0.9))
def test_brute_force_no_other_mask_is_closer(values: list[float], sparsity: float) -> None:
    weight = torch.tensor([values], dtype=torch.float64)
    mask = updated({"w": weight}, sparsity)["w"]
    kept = int(mask.sum())
    ours = float((weight * ~mask).square().sum())
    for chosen in itertools.combinations(range(len(values)), kept):
        lost = sum(v * v for i, v in enumerate(values) if i not in chosen)
        assert ours <= lost + 1e-12


def test_equal_scores_go_by_index() -> None:
    assert updated({"w": torch.ones(1, 4)}, 0.5)["w"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("pool", "first"), [("mean", True), ("max", True)])
def test_blocks(pool: str, first: bool) -> None:
    """Mean: both blocks have 1, and the earlier stays. Max: 4 beats 1."""
    weights = {"w": torch.tensor([[4.0, 0, 1, 1], [0, 0, 1, 1]])}
    mask = updated(weights, 0.5, block=(2, 2), pool=pool)["w"]
    assert mask.tolist() == [[first, first, not first, not first]] * 2


def test_mean_and_maximum_of_blocks_differ() -> None:
    weights = {"w": torch.tensor([[4.0, 0, 2, 2], [0, 0, 2, 2]])}
    assert updated(weights, 0.5, block=(2, 2), pool="mean")["w"].tolist() == [[False, False, True, True]] * 2
    assert updated(weights, 0.5, block=(2, 2), pool="max")["w"].tolist() == [[True, True, False, False]] * 2


def test_edge_blocks_average_over_the_entries_they_have() -> None:
    weights = {"w": torch.tensor([[1.0, 1.0, 1.5]])}
    assert updated(weights, 0.5, block=(1, 2))["w"].tolist() == [[False, False, True]]


def test_a_removed_entry_never_returns_when_nested() -> None:
    weights = {"w": torch.tensor([[3.0, 1.0, 2.0, 0.5]])}
    masks = {"w": torch.tensor([[False, True, True, True]])}
    assert updated(weights, 0.5, masks)["w"].tolist() == [[False, True, True, False]]
    assert updated(weights, 0.5, masks, nested=False)["w"].tolist() == [[True, False, True, False]]


def test_live_zeros_stay_before_removed_ones() -> None:
    weights = {"w": torch.tensor([[0.0, 5.0, 0.0, 0.0]])}
    masks = {"w": torch.tensor([[False, True, True, True]])}
    assert updated(weights, 0.25, masks)["w"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("rule", ["global", "lamp", "erk", "uniform"])
def test_rules_keep_the_exact_total_and_nest(rule: str) -> None:
    weights = {"a": torch.randn(10, 10), "b": torch.randn(40, 20) * 5, "c": torch.randn(4, 10)}
    groups = tuple(WeightGroup(name, tuple(w.shape)) for name, w in weights.items())
    decide = Ranked(groups, Magnitude(), by_rule(rule, groups, {}), nested=True)
    masks = moment(weights, 0.0).masks
    for sparsity in (0.3, 0.6, 0.85, 0.95):
        before = masks
        weights = {n: (w + torch.randn_like(w)) * before[n] for n, w in weights.items()}
        masks, _ = decide.update(moment(weights, sparsity, dict(before)), {})
        assert sum(int(m.sum()) for m in masks.values()) == round(940 * (1 - sparsity))
        assert all(not (masks[n] & ~before[n]).any() for n in masks)


def test_removed_entries_take_no_place_in_the_ranking_whatever_their_score() -> None:
    """Under a criterion other than magnitude a removed weight may score high: here its tensor would keep all four."""
    groups = (WeightGroup("a", (1, 4)), WeightGroup("b", (1, 4)))
    scores = {"a": torch.tensor([9.0, 9.0, 1.0, 0.0]), "b": torch.tensor([4.0, 3.0, 2.0, 1.5])}
    masks = {"a": torch.tensor([[False, False, True, True]]), "b": torch.ones(1, 4, dtype=torch.bool)}
    decide = Ranked(
        groups, Bound(lambda model, groups: scores, torch.nn.Identity()), by_rule("global", groups, {}), True
    )
    weights = dict.fromkeys(("a", "b"), torch.ones(1, 4))
    after, _ = decide.update(moment(weights, 0.5, masks), {})
    assert after["a"].tolist() == [[False] * 4]
    assert after["b"].tolist() == [[True] * 4]


def test_targets_scale_with_the_schedule() -> None:
    scores = {"a": torch.zeros(100), "b": torch.zeros(100)}
    counts = per_tensor(0.8, {"b": 0.4}, {"a": 1, "b": 1})
    assert counts(scores, 0.8, {"a": 100, "b": 100}) == {"a": 20, "b": 60}
    assert counts(scores, 0.4, {"a": 100, "b": 100}) == {"a": 60, "b": 80}


def test_tensor_targets() -> None:
    names = ["conv1.weight", "conv2.weight", "fc.weight"]
    assert tensor_targets({r"conv\d": 0.5, "^fc": 0.0}, names) == {names[0]: 0.5, names[1]: 0.5, names[2]: 0.0}
    with pytest.raises(OptionError, match=r"conv1.weight is found by 'conv' and '1'; only one may find it"):
        tensor_targets({"conv": 0.5, "1": 0.6}, names)
    with pytest.raises(OptionError, match=r"target of 'fc' must lie in \[0, 1\), got 1.0"):
        tensor_targets({"fc": 1.0}, names)
    with pytest.raises(OptionError, match=r"unknown target pattern 'cv'"):
        tensor_targets({"cv": 0.5}, names)


# -- random positions --------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 9))
def test_drawn_masks_have_exact_counts_and_repeat(size: int, keep: int, seed: int) -> None:
    keep = min(keep, size)
    mask = drawn_mask((1, size), keep, seed, "w")
    assert int(mask.sum()) == keep
    assert torch.equal(mask, drawn_mask((1, size), keep, seed, "w"))


def test_layers_and_seeds_have_streams_of_their_own() -> None:
    a, b, c = (drawn_mask((100,), 50, seed, name) for seed, name in ((0, "a"), (0, "b"), (1, "a")))
    for one, other in itertools.combinations((a, b, c), 2):
        # Hypergeometric: mean 25, standard deviation 2.5.
        assert 15 <= int((one & other).sum()) <= 35


def test_positions_are_uniform() -> None:
    hits = torch.stack([drawn_mask((10,), 3, seed, "w") for seed in range(2000)]).float().mean(0)
    torch.testing.assert_close(hits, torch.full((10,), 0.3), atol=0.05, rtol=0)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Drawn({"w": 2}, 0).update(moment({"w": torch.randn(2, 2)}, 0.5), {})
    weights = torch.randn(1)
    torch.set_rng_state(before)
    torch.randn(2, 2)
    assert torch.equal(weights, torch.randn(1))


# -- motion ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
def test_motion_follows_its_equation(order: int) -> None:
    groups = (WeightGroup("w", (1, 3)),)
    path = [torch.randn(1, 3) for _ in range(5)]
    scorer = Motion(order, decay=0.9)
    state = scorer.init({"w": path[0]})
    average, past = [0.0] * 3, [path[0], path[0]]
    for weight in path[1:]:
        scores, state = scorer.score({"w": weight}, groups, state)
        if order == 1:
            moved = [abs(float(a - b)) for a, b in zip(weight[0], past[0][0], strict=True)]
        else:
            moved = [abs(float(a + c - 2 * b)) for a, b, c in zip(weight[0], past[0][0], past[1][0], strict=True)]
        length = math.sqrt(sum(m * m for m in moved))
        average = [0.9 * g + 0.1 * m / length for g, m in zip(average, moved, strict=True)]
        expected = [abs(float(w)) * g for w, g in zip(weight[0], average, strict=True)]
        assert scores["w"].tolist() == pytest.approx(expected, rel=1e-5)
        past = [weight, past[0]]


def test_motion_of_a_tensor_that_stood_still_is_zero_not_nan() -> None:
    weight = torch.ones(1, 3)
    scorer = Motion()
    scores, _ = scorer.score({"w": weight}, (WeightGroup("w", (1, 3)),), scorer.init({"w": weight}))
    assert scores["w"].tolist() == [0, 0, 0]


def test_motion_refuses_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"order 1 or 2 and decay in \[0, 1\), got 3 and 0.5"):
        Motion(3, 0.5)  # type: ignore[arg-type]


def test_low_precision_is_scored_in_float32() -> None:
    scores, _ = Magnitude().score({"w": torch.ones(1, 2, dtype=torch.bfloat16)}, (WeightGroup("w", (1, 2)),), {})
    assert scores["w"].dtype == torch.float32
