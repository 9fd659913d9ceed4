"""The exchange: exact counts in every weight, by hand, against a slow twin, and for any weights and gradients."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import OptionError
from secateurs.core.schedule import Cubic
from secateurs.core.units import WeightGroup
from secateurs.train.regrowth import Prolonged, Regrowth, Share
from secateurs.train.scoring import Magnitude
from secateurs.train.update import Moment, Ranked, Regrowing, by_rule


def rule(weights: dict[str, Tensor], share: float, block: tuple[int, int] = (1, 1), **how: object) -> Regrowth:
    """A rule whose share never changes, with an exchange at every step."""
    groups = tuple(WeightGroup(name, tuple(w.shape), block) for name, w in weights.items())
    schedule = Prolonged(Cubic(final=0.9, begin=0, end=1000, every=1), 1000)
    prune = Ranked(groups, Magnitude(), by_rule("global", groups, {}), nested=True)
    return Regrowth(prune, schedule, Share(share, share, 1000), **how)


def exchanged(
    made: Regrowth,
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    gradients: dict[str, Tensor],
    sparsity: float | None = None,
    step: int = 7,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks after dropping, and after growing; the sparsity stays as it is unless another is given."""
    total = sum(m.numel() for m in masks.values())
    asked = 1 - sum(int(m.sum()) for m in masks.values()) / total if sparsity is None else sparsity
    state = made.init(weights)
    if gradients:
        state = made.observe(gradients, state)
    dropped, state = made.update(Moment(step, asked, weights, masks), state)
    grown, state = made.regrow(Moment(step, asked, weights, dropped), state)
    assert state["owed"] == {}
    return dropped, {**dropped, **grown}


def live(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


# -- the share ---------------------------------------------------------------------------------------------------------


def test_the_share_of_granet_s_code() -> None:
    share = Share(0.5, 0.005, over=62_560)
    assert [share(step) for step in (0, 31_280, 62_560)] == pytest.approx([0.5, 0.2525, 0.005], abs=1e-12)
    assert share(70_000) == pytest.approx(0.005)


def test_the_share_of_rigl_falls_to_nothing() -> None:
    share = Share(0.3, 0.0, over=100)
    assert share(100) == 0.0
    assert share(50) == pytest.approx(0.15)
    assert share(25) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 500), st.integers(0, 600))
def test_a_share_never_rises_and_stays_between_its_ends(first: float, part: float, over: int, step: int) -> None:
    share = Share(first, first * part, over)
    assert first * part - 1e-12 <= share(step + 1) <= share(step) + 1e-12 <= first + 2e-12


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_share_that_never_changes(value: float) -> None:
    assert {Share(value, value, 10)(step) for step in range(20)} == {value}


def test_wrong_shares_are_refused_together() -> None:
    with pytest.raises(OptionError, match=r"first share must lie in \[0, 1\), got 1.0; .* between 0 and .* at least 1"):
        Share(1.0, 2.0, over=0)
    with pytest.raises(OptionError, match=r"got -0.1"):
        Share(-0.1, -0.1, over=5)


# -- when --------------------------------------------------------------------------------------------------------------


def test_pruning_ends_and_the_exchange_goes_on() -> None:
    schedule = Prolonged(Cubic(final=0.9, begin=20, end=100, every=20), 160)
    assert [t for t in range(300) if schedule.due(t)] == [20, 40, 60, 80, 100, 120, 140, 160]
    assert [t for t in range(300) if schedule.exchanges(t)] == [20, 40, 60, 80, 100, 120, 140, 160]
    assert (schedule(100), schedule(160), schedule.end, schedule.final) == (0.9, 0.9, 160, 0.9)


def test_an_end_off_the_grid_prunes_and_does_not_exchange() -> None:
    schedule = Prolonged(Cubic(final=0.9, begin=0, end=50, every=20), 90)
    assert [t for t in range(1, 120) if schedule.due(t)] == [20, 40, 50, 60, 80]
    assert not schedule.exchanges(50)


def test_a_sparse_start_is_an_update_at_step_0_without_an_exchange() -> None:
    curve = Cubic(final=0.9, begin=10, end=50, initial=0.5, every=10)
    assert Prolonged(curve, 50, from_start=True).due(0)
    assert not Prolonged(curve, 50).due(0)
    at_once = Prolonged(Cubic(final=0.9, begin=0, end=50, initial=0.5, every=10), 50)
    assert at_once.due(0)
    assert not at_once.exchanges(0)


@pytest.mark.parametrize(("updates", "last"), [(10, 0.94905), (28, 0.95 - 0.95 / 28**3)])
def test_the_published_schedule_stops_short_and_ours_does_not(updates: int, last: float) -> None:
    curve = Cubic(final=0.95, begin=0, end=100 * updates, every=100)
    published, ours = Prolonged(curve, 10_000, meet_final=False), Prolonged(curve, 10_000)
    assert published(100 * (updates - 1)) == published(5_000) == published.final == pytest.approx(last, abs=1e-12)
    assert ours(100 * updates) == ours.final == 0.95
    assert published(150) == ours(150)


def test_the_28_updates_of_the_specification() -> None:
    assert round(Prolonged(Cubic(final=0.95, begin=0, end=28, every=1), 50, meet_final=False).final, 7) == 0.9499567


@pytest.mark.parametrize(("begin", "until"), [(0, 0), (10, 9)])
def test_an_exchange_that_ends_before_it_begins_is_refused(begin: int, until: int) -> None:
    with pytest.raises(OptionError, match=rf"must be {max(begin, 1)} or more, got {until}"):
        Prolonged(Cubic(final=0.9, begin=begin, end=20), until)


# -- what drops, what grows --------------------------------------------------------------------------------------------


def test_the_specification_s_example() -> None:
    weights = {"w": torch.tensor([[5.0, 4, 3, 2, 1, 0, 0, 0]])}
    masks = {"w": torch.tensor([[True] * 5 + [False] * 3])}
    gradients = {"w": torch.tensor([[7.0, 7, 7, 0.1, 0.9, 0.5, -0.8, 0.2]])}
    dropped, grown = exchanged(rule(weights, 0.4), weights, masks, gradients)
    assert live(dropped["w"]) == [0, 1, 2]
    assert live(grown["w"]) == [0, 1, 2, 4, 6]


def test_ties_go_by_index() -> None:
    weights = {"w": torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]])}
    masks = {"w": weights["w"] > 0}
    dropped, grown = exchanged(rule(weights, 0.5), weights, masks, {"w": torch.zeros(1, 8)})
    assert live(dropped["w"]) == [0, 1]
    assert live(grown["w"]) == [0, 1, 2, 3]
    _, grown = exchanged(rule(weights, 0.5), weights, masks, {"w": torch.tensor([[0.0, 0, 0, 0, 0, 2, 2, 2]])})
    assert live(grown["w"]) == [0, 1, 5, 6]


def test_a_live_zero_drops_before_what_is_larger_and_a_removed_one_is_not_dropped() -> None:
    """A weight that grew and was not moved is live at 0; the published threshold cannot tell it from a removed one."""
    weights = {"w": torch.tensor([[0.0, 0, 3, 2, 0]])}
    masks = {"w": torch.tensor([[False, True, True, True, False]])}
    dropped, grown = exchanged(rule(weights, 0.3), weights, masks, {"w": torch.tensor([[0.0, 0, 0, 0, 1]])})
    assert live(dropped["w"]) == [2, 3]
    assert live(grown["w"]) == [2, 3, 4]


def test_a_product_just_above_an_integer_drops_that_many() -> None:
    weights = {"w": torch.arange(140.0).view(1, 140)}
    masks = {"w": (torch.arange(140) < 100).view(1, 140)}
    assert 0.07 * 100 > 7
    dropped, _ = exchanged(rule(weights, 0.07), weights, masks, {"w": torch.ones(1, 140)})
    assert int(dropped["w"].sum()) == 93


def test_a_dense_weight_has_nowhere_else_to_grow() -> None:
    weights = {"a": torch.tensor([[3.0, 1, 2]]), "b": torch.tensor([[3.0, 1, 0]])}
    masks = {"a": torch.ones(1, 3, dtype=torch.bool), "b": weights["b"] > 0}
    dropped, grown = exchanged(rule(weights, 0.5), weights, masks, {n: torch.ones(1, 3) for n in weights})
    assert live(dropped["a"]) == [0, 1, 2]
    assert live(dropped["b"]) == [0]
    assert int(grown["b"].sum()) == 2


def test_pruning_comes_first_and_the_share_is_of_what_it_leaves() -> None:
    """Of 10 live weights 6 stay; of these ⌈0.3·6⌉ = 2 are exchanged for positions of the largest gradient."""
    weights = {"w": torch.arange(1.0, 21).view(1, 20)}
    masks = {"w": (torch.arange(20) < 10).view(1, 20)}
    gradient = torch.zeros(1, 20)
    gradient[0, [0, 19]] = 1
    dropped, grown = exchanged(rule(weights, 0.3), weights, masks, {"w": gradient}, sparsity=0.7)
    assert live(dropped["w"]) == [6, 7, 8, 9]
    assert live(grown["w"]) == [0, 6, 7, 8, 9, 19]


def test_removed_weights_are_never_brought_back_by_the_ranking() -> None:
    """95 of 100 are zero and 4 are asked for: the 4 largest of the 5 live ones, though `|w| ≥ 0` holds for all."""
    weights = {"w": torch.zeros(1, 100)}
    weights["w"][0, :5] = torch.tensor([1.0, 5, 4, 3, 2])
    masks = {"w": (torch.arange(100) < 5).view(1, 100)}
    dropped, grown = exchanged(rule(weights, 0.0), weights, masks, {}, sparsity=0.96)
    assert live(grown["w"]) == live(dropped["w"]) == [1, 2, 3, 4]
    weights["w"][0, 1:4] = 0
    _, grown = exchanged(rule(weights, 0.0), weights, masks, {}, sparsity=0.96)
    assert live(grown["w"]) == [0, 1, 2, 4]


def twin(weight: list[float], mask: list[bool], gradient: list[float], share: float) -> list[int]:
    """The paper's two lists, with Python's stable sort: keep the largest live, then add the largest gradients."""
    active = [i for i, stays in enumerate(mask) if stays]
    if len(active) == len(mask):
        return active
    going = math.ceil(share * len(active) - 1e-9)
    kept = sorted(active, key=lambda i: -abs(weight[i]))[: len(active) - going]
    free = [i for i in range(len(mask)) if i not in kept]
    return sorted(kept + sorted(free, key=lambda i: -abs(gradient[i]))[:going])


LAYER = st.tuples(st.integers(-3, 3), st.booleans(), st.integers(-3, 3))


@given(st.lists(LAYER, min_size=1, max_size=40), st.floats(0, 0.99))
def test_the_exchange_is_the_slow_twin_s(layer: list[tuple[int, bool, int]], share: float) -> None:
    weight, mask, gradient = (list(column) for column in zip(*layer, strict=True))
    weight = [w if stays else 0 for w, stays in zip(weight, mask, strict=True)]
    weights, masks = {"w": torch.tensor([weight]).float()}, {"w": torch.tensor([mask])}
    _, grown = exchanged(rule(weights, share), weights, masks, {"w": torch.tensor([gradient]).float()})
    assert live(grown["w"]) == twin(weight, mask, gradient, share)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.sampled_from(["gradient", "random", "momentum"]),
    st.integers(0, 1000),
    st.integers(1, 4),
)
def test_every_weight_keeps_exactly_as_many_non_zeros(
    shapes: list[tuple[int, int]], share: float, grow: str, seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chance = random.Random(seed)

    def drawn(shape: tuple[int, int]) -> Tensor:
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()

    masks = {str(i): torch.rand(shape, generator=generator) < chance.random() for i, shape in enumerate(shapes)}
    weights = {name: drawn(mask.shape) * mask for name, mask in masks.items()}
    gradients = {name: drawn(mask.shape) for name, mask in masks.items()}
    dropped, grown = exchanged(rule(weights, share, grow=grow), weights, masks, gradients)
    for name, mask in masks.items():
        count = int(mask.sum())
        assert int(grown[name].sum()) == count
        moved = 0 if count == mask.numel() else math.ceil(share * count - 1e-9)
        assert int(dropped[name].sum()) == count - moved
        assert not bool((dropped[name] & ~mask).any())
        assert bool(grown[name][dropped[name]].all())


def test_blocks_are_exchanged_whole() -> None:
    """Four blocks of 1×2, the last two live: the one of mean 1 drops, the one of mean |gradient| 3 grows."""
    weights = {"w": torch.tensor([[0.0, 0, 0, 0, 9, 1, 0, 2]])}
    masks = {"w": torch.tensor([[False] * 4 + [True] * 4])}
    gradients = {"w": torch.tensor([[5.0, 0, -3, 3, 9, 9, 0, 0]])}
    dropped, grown = exchanged(rule(weights, 0.5, block=(1, 2)), weights, masks, gradients)
    assert live(dropped["w"]) == [4, 5]
    assert live(grown["w"]) == [2, 3, 4, 5]
    _, grown = exchanged(rule(weights, 0.5, block=(1, 2), pool="max"), weights, masks, gradients)
    assert live(grown["w"]) == [0, 1, 4, 5]


# -- where from --------------------------------------------------------------------------------------------------------

WEIGHTS = {"w": torch.arange(1.0, 13).view(3, 4)}
HALF = {"w": torch.arange(12).view(3, 4) % 2 == 0}


def test_random_growth_follows_seed_name_and_step_alone() -> None:
    def grown(seed: int, step: int, name: str = "w") -> list[int]:
        weights, masks = {name: torch.arange(400.0).view(20, 20)}, {name: torch.arange(400).view(20, 20) < 100}
        return live(exchanged(rule(weights, 0.5, grow="random", seed=seed), weights, masks, {}, step=step)[1][name])

    first = grown(1, 7)
    torch.manual_seed(5)
    assert grown(1, 7) == first
    assert first not in (grown(2, 7), grown(1, 8), grown(1, 7, "v"))


def test_random_growth_reaches_every_free_place_alike() -> None:
    counts = torch.zeros(12)
    made = rule(WEIGHTS, 0.1, grow="random")
    for step in range(1, 601):
        dropped, grown = exchanged(made, WEIGHTS, HALF, {}, step=step)
        counts += (grown["w"] & ~dropped["w"]).flatten()
    assert live(counts > 0) == [0, 1, 3, 5, 7, 9, 11]
    assert counts[counts > 0].min() > 50, "600 draws of one of seven places"


def test_momentum_is_a_running_mean_and_stays() -> None:
    made = rule(WEIGHTS, 0.1, grow="momentum", smoothing=0.5)
    state = made.init(WEIGHTS)
    for value in (4.0, 8.0, -6.0):
        state = made.observe({"w": torch.full((3, 4), value)}, state)
    assert state["seen"]["w"].unique().tolist() == [0.0]
    state = made.observe({"w": torch.full((3, 4), 8.0)}, state)
    masks, state = made.update(Moment(7, 0.5, WEIGHTS, HALF), state)
    _, state = made.regrow(Moment(7, 0.5, WEIGHTS, masks), state)
    assert state["seen"]["w"].unique().tolist() == [4.0]


def test_a_gradient_is_copied_widened_and_forgotten() -> None:
    made = rule(WEIGHTS, 0.1)
    gradient = torch.ones(3, 4, dtype=torch.bfloat16)
    state = made.observe({"w": gradient}, made.init(WEIGHTS))
    gradient.zero_()
    assert state["seen"]["w"].dtype == torch.float32
    assert state["seen"]["w"].all()
    masks, state = made.update(Moment(7, 0.5, WEIGHTS, HALF), state)
    assert made.regrow(Moment(7, 0.5, WEIGHTS, masks), state)[1]["seen"] == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_a_gradient_that_overflowed_is_not_looked_at(value: float, grow: str) -> None:
    made = rule(WEIGHTS, 0.5, grow=grow)
    broken = torch.ones(3, 4)
    broken[1, 1] = value
    dropped, grown = exchanged(made, WEIGHTS, HALF, {"w": broken})
    assert torch.equal(grown["w"], HALF["w"])
    assert torch.equal(dropped["w"], HALF["w"])
    state = made.observe({"w": broken}, made.observe({"w": torch.ones(3, 4)}, made.init(WEIGHTS)))
    assert torch.equal(state["seen"]["w"], torch.ones(3, 4))


@pytest.mark.parametrize(
    ("grow", "share", "wanted"),
    [("gradient", 0.3, [4, 8, 12]), ("momentum", 0.3, list(range(1, 13))), ("random", 0.3, []), ("gradient", 0.0, [])],
)
def test_dense_gradients_are_wanted_only_where_they_are_used(grow: str, share: float, wanted: list[int]) -> None:
    groups = (WeightGroup("w", (3, 4)),)
    schedule = Prolonged(Cubic(final=0.9, begin=0, end=6, every=4), 12)
    prune = Ranked(groups, Magnitude(), by_rule("global", groups, {}), nested=True)
    made = Regrowth(prune, schedule, Share(share, share, 12), grow)
    assert [step for step in range(1, 30) if made.wants(step)] == wanted
    assert isinstance(made, Regrowing)
    assert not isinstance(prune, Regrowing)


def test_the_last_share_of_rigl_wants_nothing() -> None:
    groups = (WeightGroup("w", (3, 4)),)
    schedule = Prolonged(Cubic(final=0.9, begin=0, end=6, every=4), 12)
    prune = Ranked(groups, Magnitude(), by_rule("global", groups, {}), nested=True)
    assert [t for t in range(20) if Regrowth(prune, schedule, Share(0.3, 0.0, 12)).wants(t)] == [4, 8]


def test_the_start_has_exact_counts() -> None:
    made = rule(WEIGHTS, 0.5, start={"w": 5})
    dropped, grown = exchanged(made, WEIGHTS, {"w": torch.ones(3, 4, dtype=torch.bool)}, {}, step=0)
    assert int(dropped["w"].sum()) == 5
    assert torch.equal(grown["w"], dropped["w"])


def test_wrong_rules_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown way to grow 'gradients'; the nearest are gradient"):
        rule(WEIGHTS, 0.5, grow="gradients")
    with pytest.raises(OptionError, match=r"smoothing must lie in \[0, 1\), got 1.0"):
        rule(WEIGHTS, 0.5, smoothing=1.0)
