"""The PQ index against its formula, its six properties, its bound by brute force, and what a round of SAP takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core import pq as module
from secateurs.core.errors import OptionError
from secateurs.core.pq import (
    adaptive_keep,
    check_orders,
    fewest,
    gini_index,
    hoyer_index,
    pq_bound,
    pq_index,
    share_keep,
)

PAIRS = [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)]
magnitudes = st.lists(st.floats(0.01, 100), min_size=2, max_size=12)
pairs = st.sampled_from(PAIRS)


def index(values: Sequence[float], p: float, q: float) -> float:
    """The definition, in plain numbers."""
    norms = [sum(abs(w) ** order for w in values) ** (1 / order) for order in (p, q)]
    return 1 - len(values) ** (1 / q - 1 / p) * norms[0] / norms[1]


def of(values: Sequence[float], p: float = 0.5, q: float = 1.0) -> float:
    return float(pq_index(torch.tensor(values, dtype=torch.float64), p, q))


# -- the index ---------------------------------------------------------------------------------------------------------


@given(magnitudes, pairs)
def test_the_index_is_its_definition(values: list[float], orders: tuple[float, float]) -> None:
    assert of(values, *orders) == pytest.approx(index(values, *orders), abs=1e-12)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_equal_magnitudes_have_none(p: float, q: float) -> None:
    for scale in (1e-30, 0.1, 7.0, 1e30):
        assert of([scale] * 1000, p, q) == pytest.approx(0, abs=1e-12)
    assert of([3.0], p, q) == 0


def test_one_alone_has_all() -> None:
    assert of([0, 0, -5, 0], 1, 2) == pytest.approx(0.5)
    assert of([0, 0, -5, 0]) == pytest.approx(0.75)
    assert of([0, 0, 0, 5], 0.3, 1.7) == pytest.approx(1 - 4 ** (1 / 1.7 - 1 / 0.3))


def test_one_to_four() -> None:
    assert of([1, 2, 3, 4], 1, 2) == pytest.approx(0.0871291, abs=5e-8)
    assert of([1, 2, 3, 4]) == pytest.approx(0.0555859, abs=5e-8)
    bound = pq_bound(pq_index(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, 2), 4, 1, 2)
    assert float(bound) == pytest.approx(3.3333, abs=5e-5)
    assert int(adaptive_keep(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, 2)) == 4


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda n, g: torch.randn(n, generator=g), (0.8472, 0.6366)),
        (lambda n, g: -torch.rand(n, generator=g).clamp(min=1e-12).log(), (math.pi / 4, 0.5)),
        (lambda n, g: torch.rand(n, generator=g), (8 / 9, 3 / 4)),
    ],
    ids=["Gaussian", "Laplace", "uniform"],
)
def test_what_one_round_keeps_of_a_distribution(draw: Callable[..., Tensor], expected: tuple[float, float]) -> None:
    """A Laplace variable has exponential magnitudes."""
    values = draw(10**6, torch.Generator().manual_seed(0))
    kept = [int(adaptive_keep(values, p, q)) / 10**6 for p, q in ((0.5, 1), (1, 2))]
    assert kept == pytest.approx(expected, abs=1e-3)


def test_the_limits_of_a_gaussian_s_index() -> None:
    values = torch.randn(10**6, generator=torch.Generator().manual_seed(1))
    assert float(pq_index(values)) == pytest.approx(0.152787, abs=1e-3)
    assert float(pq_index(values, 1, 2)) == pytest.approx(1 - math.sqrt(2 / math.pi), abs=1e-3)


# -- its six properties ------------------------------------------------------------------------------------------------


@given(magnitudes, pairs, st.floats(1e-6, 1e6), st.randoms())
def test_scale_sign_order_and_copies_are_nothing_to_it(
    values: list[float], orders: tuple[float, float], scale: float, random: Random
) -> None:
    """Scaling and Cloning, and besides them signs and order."""
    whole = of(values, *orders)
    shuffled = [w * random.choice((-1, 1)) for w in random.sample(values, len(values))]
    assert of([scale * w for w in values], *orders) == pytest.approx(whole, abs=1e-12)
    assert of(shuffled, *orders) == pytest.approx(whole, abs=1e-12)
    assert of(values * 3, *orders) == pytest.approx(whole, abs=1e-12)


def test_taking_from_the_rich_lowers_it() -> None:
    """Robin Hood: 1,000 transfers from a larger to a smaller magnitude, by less than their difference."""
    generator = torch.Generator().manual_seed(2)
    before = torch.rand(1000, 8, generator=generator, dtype=torch.float64).sort(-1).values + 0.01
    gap = before[:, 6] - before[:, 1]
    given_away = gap * (0.01 + 0.98 * torch.rand(1000, generator=generator, dtype=torch.float64))
    after = before.clone()
    after[:, 6] -= given_away
    after[:, 1] += given_away
    for p, q in PAIRS:
        assert bool((pq_index(after, p, q) < pq_index(before, p, q)).all())


@given(magnitudes.filter(lambda values: max(values) > 1.1 * min(values)), pairs, st.floats(0.1, 10))
def test_a_rising_tide_lowers_it(values: list[float], orders: tuple[float, float], tide: float) -> None:
    assert of([w + tide for w in values], *orders) < of(values, *orders)


@given(magnitudes, pairs)
def test_one_who_grows_without_bound_raises_it(values: list[float], orders: tuple[float, float]) -> None:
    """Bill Gates: from some size on, more is sparser."""
    rich = [of([*values[:-1], 10.0**power], *orders) for power in (4, 6, 8)]
    assert rich == sorted(rich)
    assert rich[-1] > rich[0]


@given(magnitudes, pairs, st.integers(1, 5))
def test_babies_raise_it(values: list[float], orders: tuple[float, float], zeros: int) -> None:
    assert of([*values, *[0.0] * zeros], *orders) > of(values, *orders)


# -- many vectors, masks, large and small ------------------------------------------------------------------------------


def test_the_last_axis_holds_the_vector() -> None:
    values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    found = pq_index(values, 1, 2)
    assert found.shape == (2, 3)
    assert found.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(index(values[i, j].tolist(), 1, 2))


def test_only_what_is_left_counts() -> None:
    values = torch.tensor([[4.0, 9.0, 0.5, 1.0], [0.0, 2.0, 0.0, 7.0]])
    left = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert pq_index(values, keep=left).tolist() == pytest.approx([index([4, 0.5, 1], 0.5, 1), index([2, 0], 0.5, 1)])
    assert pq_index(values, keep=left)[0] < pq_index(values * left)[0]


def test_nothing_to_measure_is_zero_and_keeps_all() -> None:
    zeros = torch.zeros(2, 6)
    assert pq_index(zeros).tolist() == [0, 0]
    assert pq_index(torch.ones(2, 3), keep=torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]
    assert pq_index(torch.ones(2, 0)).tolist() == [0, 0]
    assert adaptive_keep(zeros).tolist() == [6, 6]
    assert int(adaptive_keep(torch.tensor([3.0]))) == 1


def test_small_numbers_of_a_narrow_type_do_not_vanish() -> None:
    values = torch.tensor([1e-7, 2e-7, 3e-7, 4e-7], dtype=torch.bfloat16)
    assert float(pq_index(values, 0.2, 2)) == pytest.approx(index(values.double().tolist(), 0.2, 2))
    tiny = [w * 1e-300 for w in (1, 2, 3, 4)]
    assert of(tiny, 1, 2) == pytest.approx(0.0871291, abs=5e-8)


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 101, generator=torch.Generator().manual_seed(4))
    left = values > -1
    whole = pq_index(values, keep=left), pq_index(values)
    monkeypatch.setattr(module, "_CHUNK", 24)
    torch.testing.assert_close((pq_index(values, keep=left), pq_index(values)), whole, rtol=1e-13, atol=1e-13)


# -- the bound and what a round takes ----------------------------------------------------------------------------------


@given(magnitudes, pairs)
def test_the_bound_holds_for_every_number_that_is_kept(values: list[float], orders: tuple[float, float]) -> None:
    p, q = orders
    powers = sorted((w**p for w in values), reverse=True)
    found = torch.tensor(of(values, p, q), dtype=torch.float64)
    for r in range(1, len(values) + 1):
        eta = sum(powers[r:]) / sum(powers[:r])
        assert r >= float(pq_bound(found, len(values), p, q, eta)) - 1e-9


def test_counts_are_rounded_up_without_rounding_errors() -> None:
    """A one-hot vector of 4 needs 4·(1 - 0.5)² = 1, and equal ones need all."""
    assert fewest(torch.tensor([0.5, 0.0, 0.4]), torch.tensor([4, 7, 10]), 1, 2).tolist() == [1, 7, 4]
    assert fewest(torch.tensor(0.1), torch.tensor(30)).item() == 27


def kept(values: Tensor, p: float, q: float, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9) -> int:
    """Steps 4 and 5 of the algorithm for one vector."""
    d = len(values)
    r = math.ceil(d * (1 + eta) ** (-q / (q - p)) * (1 - index(values.tolist(), p, q)) ** (p * q / (q - p)) - 1e-9)
    return d - math.floor(d * min(max(gamma * (1 - r / d), 0), beta) + 1e-9)


@given(
    magnitudes, pairs, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 0.5, 1.0, 5.0]), st.floats(0.05, 0.95)
)
def test_a_round_takes_what_the_algorithm_says(
    values: list[float], orders: tuple[float, float], eta: float, gamma: float, beta: float
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    found = int(adaptive_keep(tensor, *orders, eta=eta, gamma=gamma, beta=beta))
    assert found == kept(tensor, *orders, eta, gamma, beta)


@pytest.mark.parametrize("d", [1, 9, 10, 11, 30, 1000])
def test_no_boldness_takes_nothing_and_much_takes_nine_tenths(d: int) -> None:
    values = torch.arange(1, d + 1).double() ** 3
    assert int(adaptive_keep(values, gamma=0)) == d
    assert int(adaptive_keep(torch.full((d,), 0.1), gamma=1e9)) == d
    if d > 1:
        assert d - int(adaptive_keep(values, gamma=1e9)) == 9 * d // 10


def test_the_mild_pair_takes_the_index_itself() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(5))
    assert 10_000 - int(adaptive_keep(values)) == math.floor(10_000 * float(pq_index(values)))


def test_a_fixed_share_is_rounded_down() -> None:
    left = torch.tensor([[True] * 10, [True] * 4 + [False] * 6])
    assert share_keep(torch.ones(2, 10), 0.2, keep=left).tolist() == [8, 4]
    assert int(share_keep(torch.ones(30), 0.9)) == 3
    assert int(share_keep(torch.ones(7), 0.0)) == 7


# -- its relatives -----------------------------------------------------------------------------------------------------


def test_gini() -> None:
    assert gini_index(torch.tensor([1.0, 2.0, 3.0, 4.0])) == 0.25
    assert gini_index(torch.tensor([[0.0, -5.0], [0.0, 0.0]])) == 0.75
    assert gini_index(torch.ones(9)) == pytest.approx(0)
    assert gini_index(torch.zeros(3)) == gini_index(torch.zeros(0)) == 0


@given(magnitudes)
def test_hoyer_is_the_index_of_one_and_two_in_full_range(values: list[float]) -> None:
    d, norms = len(values), (sum(values), math.sqrt(sum(w * w for w in values)))
    expected = (math.sqrt(d) - norms[0] / norms[1]) / (math.sqrt(d) - 1)
    assert hoyer_index(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, abs=1e-9)
    assert hoyer_index(torch.tensor([0.0, 3.0])) == pytest.approx(1)
    assert hoyer_index(torch.ones(1)) == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(0, 1), (-1, 1), (1, 1), (2, 1), (float("nan"), 1), (0.5, float("inf"))])
def test_orders_out_of_order(p: float, q: float) -> None:
    for call in (lambda: pq_index(torch.ones(3), p, q), lambda: pq_bound(torch.tensor(0.1), 3, p, q)):
        with pytest.raises(OptionError, match=rf"must follow 0 < p < q, got p = {p} and q = {q}"):
            call()
    with pytest.raises(ValueError, match="0 < p < q"):
        check_orders(p, q)


def test_orders_that_nearly_meet_are_warned_about(recwarn: pytest.WarningsRecorder) -> None:
    check_orders(0.9, 1.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"p = 0\.95 and q = 1\.0 are less than 0\.1 apart.* above 19"):
        check_orders(0.95, 1.0)


def test_other_numbers_out_of_range() -> None:
    values = torch.ones(4)
    for eta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="eta must be a number of at least 0"):
            pq_bound(torch.tensor(0.1), 4, eta=eta)
    for wrong in ({"beta": 0.0}, {"beta": 1.0}, {"gamma": -1.0}, {"gamma": float("nan")}):
        with pytest.raises(OptionError, match=r"gamma must be a number of at least 0 and beta lie in \(0, 1\)"):
            adaptive_keep(values, **wrong)
    for share in (-0.1, 1.0):
        with pytest.raises(OptionError, match=r"must lie in \[0, 1\), got"):
            share_keep(values, share)


def test_what_is_no_number_or_no_vector() -> None:
    for bad in (float("nan"), float("inf")):
        for measure in (pq_index, gini_index, hoyer_index):
            with pytest.raises(OptionError, match="1 of 3 values are NaN or infinite"):
                measure(torch.tensor([1.0, bad, 2.0]))
    with pytest.raises(OptionError, match=r"values \[\.\.\., entries\].* got \[\]"):
        pq_index(torch.tensor(1.0))
    with pytest.raises(OptionError, match=r"got \[3\] and a torch\.bool mask \[2\]"):
        pq_index(torch.ones(3), keep=torch.ones(2, dtype=torch.bool))
    with pytest.raises(OptionError, match=r"a torch\.float32 mask"):
        pq_index(torch.ones(3), keep=torch.ones(3))
