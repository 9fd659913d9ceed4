"""DSnoT against its loop written out row by row, on whole numbers, so that equal values and equal sums are met."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import dsnot

seeds = st.integers(0, 10**6)


def case(seed: int, rows: int = 4, columns: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, half a mask, means, variances and norms: whole numbers."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    mask = Comparison.of(Pattern(2, 4)).keep(torch.rand(rows, columns, generator=generator))
    return whole(-4, 4, rows, columns), mask, whole(-2, 3, columns), whole(1, 3, columns), whole(0, 3, columns)


def in_turn(case: tuple[Tensor, ...], of: int, cycles: int = 50, threshold: float = 0.1, power: float = 1.0) -> Tensor:
    """One swap after the other, each from what is left; `of` columns are a group."""
    weight, mask, mean, variance, norm = case
    made = mask.clone()
    for row in range(len(weight)):
        effect = (weight[row] * mean).tolist()
        error = sum(e for e, kept in zip(effect, mask[row].tolist(), strict=True) if not kept)
        sign = 1 if error > 0 else -1
        pruned = {j for j in range(len(effect)) if not mask[row, j] and effect[j] * sign > 0}
        kept = {j for j in range(len(effect)) if mask[row, j] and effect[j] * sign < 0}
        for _ in range(cycles):
            grow = [j for j in pruned if any(k // of == j // of for k in kept)]
            if abs(error) <= threshold or not grow:
                break
            j = min(grow, key=lambda j: (-abs(effect[j]) / float(variance[j]) ** power, j))
            mates = [k for k in kept if k // of == j // of]
            k = min(mates, key=lambda k: (abs(float(weight[row, k])) * float(norm[k]), k))
            after = error - effect[j] + effect[k]
            if after * sign <= 0:
                break
            error, made[row, j], made[row, k] = after, True, False
            pruned.remove(j)
            kept.remove(k)
    return made


def off(case: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    return (case[0] * case[2]).masked_fill(mask, 0).sum(1).abs()


def test_two_swaps_by_hand() -> None:
    """r = 9; 4 for -1 leaves 4, 3 for -2 would leave -1 and is not made."""
    ones = torch.ones(6)
    weight = torch.tensor([[4.0, 3.0, 2.0, -1.0, -2.0, 5.0]])
    mask = torch.tensor([[False, False, False, True, True, True]])
    made = dsnot(weight, mask, ones, ones, ones)
    assert made.tolist() == [[True, False, False, False, True, True]]
    # By variance the 2 comes first: 9 - 2 - 1 = 6, then 6 - 4 - 2 = 0 has lost its sign.
    variance = torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    made = dsnot(weight, mask, ones, variance, ones)
    assert made.tolist() == [[False, False, True, False, True, True]]
    # By norm the -2 goes first.
    norm = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0, 1.0])
    assert dsnot(weight, mask, ones, ones, norm).tolist() == [[True, False, False, True, False, True]]


@given(seeds, st.sampled_from([1, 2, 50]), st.sampled_from([0.1, 3.0]), st.sampled_from([0.0, 1.0]))
def test_it_is_the_loop_of_swaps(seed: int, cycles: int, threshold: float, power: float) -> None:
    one = case(seed)
    made = dsnot(*one, cycles=cycles, threshold=threshold, power=power)
    assert torch.equal(made, in_turn(one, 12, cycles, threshold, power))


@given(seeds, st.sampled_from([1, 2, 50]))
def test_inside_the_groups_of_a_pattern_too(seed: int, cycles: int) -> None:
    one = case(seed)
    made = dsnot(*one, pattern=Pattern(2, 4), cycles=cycles)
    assert torch.equal(made, in_turn(one, 4, cycles))
    assert (made.view(-1, 4).sum(1) == 2).all()


@given(seeds)
def test_counts_stay_and_errors_fall(seed: int) -> None:
    one = case(seed)
    made = dsnot(*one)
    assert torch.equal(made.sum(1), one[1].sum(1))
    changed = (made ^ one[1]).any(1)
    before, after = off(one, one[1]), off(one, made)
    assert (after[changed] < before[changed]).all()


def test_swaps_do_happen() -> None:
    moved = sum(int((dsnot(*case(seed)) ^ case(seed)[1]).sum()) for seed in range(20))
    bound = sum(int((dsnot(*case(seed), pattern=Pattern(2, 4)) ^ case(seed)[1]).sum()) for seed in range(20))
    assert min(moved, bound) > 40


def test_a_row_that_is_near_enough_is_left_alone() -> None:
    one = case(1)
    assert torch.equal(dsnot(*one, threshold=1e9), one[1])
    assert torch.equal(dsnot(*one, cycles=0), one[1])
    full = torch.ones_like(one[1])
    assert torch.equal(dsnot(one[0], full, *one[2:]), full)
    assert torch.equal(dsnot(one[0], ~full, *one[2:]), ~full)


def test_what_does_not_vary_is_grown_first() -> None:
    weight, mask = torch.tensor([[5.0, 1.0, -1.0]]), torch.tensor([[False, False, True]])
    made = dsnot(weight, mask, torch.ones(3), torch.tensor([1.0, 0.0, 1.0]), torch.ones(3))
    assert made.tolist() == [[False, True, False]]
    # Inputs that are always zero have no effect, and no say.
    assert torch.equal(dsnot(weight, mask, torch.zeros(3), torch.zeros(3), torch.zeros(3)), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype(dtype: torch.dtype) -> None:
    one = case(2)
    assert torch.equal(dsnot(one[0].to(dtype), *one[1:]), dsnot(*one))


def test_what_is_wrong_is_refused() -> None:
    weight, mask, *inputs = case(3)
    with pytest.raises(OptionError, match=r"a mask must be bool \[4, 12\], as the weight of fc; got torch\.float64"):
        dsnot(weight, mask.double(), *inputs, where="fc")
    text = r"mean, variance and norm must be \[12\], as fc has inputs; got \[11\], \[12\], \[12\]"
    with pytest.raises(OptionError, match=text):
        dsnot(weight, mask, inputs[0][1:], *inputs[1:], where="fc")
    with pytest.raises(OptionError, match=r"a weight is \[rows, columns\]; fc got \[48\]"):
        dsnot(weight.flatten(), mask, *inputs, where="fc")
    with pytest.raises(OptionError, match=r"2:5 needs a number of inputs that 5 divides; fc has 12"):
        dsnot(weight, mask, *inputs, pattern=Pattern(2, 5), where="fc")
    with pytest.raises(ModelError, match="NaN or infinite values in the weight or the inputs of fc"):
        dsnot(weight * float("nan"), mask, *inputs, where="fc")
    with pytest.raises(ModelError, match="NaN or infinite values in the weight or the inputs of fc"):
        dsnot(weight, mask, inputs[0], inputs[1] * float("inf"), inputs[2], where="fc")
    with pytest.raises(ModelError, match="a variance of the inputs of fc is negative"):
        dsnot(weight, mask, inputs[0], -inputs[1], inputs[2], where="fc")
