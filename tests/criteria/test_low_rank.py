"""Importance from adapters: equation (1), its limits, and scores of units against loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from secateurs.core.dims import Atom, Product
from secateurs.core.units import ChannelGroup, Member, marginals
from secateurs.criteria.low_rank import EPSILON, guided_gradient, importance, unit_scores


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_the_guided_gradient_is_the_change_of_the_product(seed: int, rank: int, outputs: int, inputs: int) -> None:
    down, down_step, up, up_step = drawn(seed, (rank, inputs), (rank, inputs), (outputs, rank), (outputs, rank))
    change = up @ down - (up - up_step) @ (down - down_step)
    torch.testing.assert_close(guided_gradient(down, up, down_step, up_step), change, atol=1e-12, rtol=0)


def adapted(seed: int, down: Tensor, outputs: int, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient of a weight, and the guided one, at B = 0: y = W·x + s·B·A·x."""
    weight, given_, target = drawn(seed, (outputs, down.shape[1]), (20, down.shape[1]), (20, outputs))
    up = torch.zeros(outputs, len(down), dtype=torch.float64)
    leaves = [leaf.requires_grad_(True) for leaf in (weight, down.clone(), up)]
    output = given_ @ leaves[0].T + scale * given_ @ leaves[1].T @ leaves[2].T
    F.mse_loss(output, target).backward()
    true, down_gradient, up_gradient = (leaf.grad for leaf in leaves)
    assert true is not None
    assert not down_gradient.any()
    return true, guided_gradient(down, up, down_gradient, up_gradient)


def test_at_the_start_it_is_the_true_gradient_seen_through_a() -> None:
    (down,) = drawn(1, (3, 7))
    true, guided = adapted(2, down, 5, scale=2.0)
    torch.testing.assert_close(guided, 2.0 * true @ down.T @ down, atol=1e-12, rtol=0)


def test_with_all_directions_in_a_it_is_the_true_gradient_and_ranks_as_it_does() -> None:
    down, _ = torch.linalg.qr(drawn(3, (6, 6))[0])
    true, guided = adapted(4, down, 5, scale=2.0)
    torch.testing.assert_close(guided, 2.0 * true, atol=1e-14, rtol=1e-12)
    weight = drawn(5, (5, 6))[0]
    zero = torch.zeros_like(weight)
    ranks = [importance(g, weight, zero).sum(1).argsort() for g in (true, guided)]
    assert torch.equal(*ranks)


def test_importance_is_of_the_weight_that_the_adapter_makes() -> None:
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.float16)
    made = importance(torch.tensor([[3.0, 5.0]]), weight, torch.tensor([[1.0, 1.0]]))
    assert made.tolist() == [[6.0, 5.0]]
    assert made.dtype == torch.float32
    assert importance(None, weight, torch.zeros(1, 2)).tolist() == [[1.0, 2.0]]


HEADS = Atom("heads", 3)


def heads() -> ChannelGroup:
    """Three heads of two rows in q and v, and of two columns in o; a bias and a norm go along."""
    rows = Product((HEADS, Atom("size", 2)))
    members = (
        Member("q.weight", 0, rows, 2), Member("q.bias", 0, rows, 1), Member("v.weight", 0, rows, 2),
        Member("o.weight", 1, rows, 2, "in"),
    )  # fmt: skip
    return ChannelGroup("heads", 3, "head", members)


def slow(saliency: dict[str, Tensor]) -> list[float]:
    """Step 5 of the algorithm, with loops."""
    total = [0.0, 0.0, 0.0]
    for name, matrix in saliency.items():
        of = [matrix[:, 2 * i : 2 * i + 2] if name == "o.weight" else matrix[2 * i : 2 * i + 2] for i in range(3)]
        sums = [sum(float(x) for x in part.flatten()) for part in of]
        norm = sum(x * x for x in sums) ** 0.5
        total = [t + x / (norm + 1e-8) for t, x in zip(total, sums, strict=True)]
    return total


def saliencies(seed: int) -> dict[str, Tensor]:
    found = drawn(seed, (6, 4), (6, 4), (5, 6))
    return {name: x.abs() for name, x in zip(("q.weight", "v.weight", "o.weight"), found, strict=True)}


@given(st.integers(0, 10**6))
def test_scores_of_heads_are_the_slow_twin_s(seed: int) -> None:
    given_ = saliencies(seed)
    made = unit_scores(heads(), given_)
    assert made.tolist() == pytest.approx(slow(given_), rel=1e-6)
    cache = {}
    for name, matrix in given_.items():
        axis = 1 if name == "o.weight" else 0
        cache[name, axis, "sum"] = marginals(matrix, [axis])[axis]
    assert torch.equal(unit_scores(heads(), {}, cache), made)


def test_the_scale_of_one_matrix_does_not_count() -> None:
    given_ = saliencies(8)
    before = unit_scores(heads(), given_)
    after = unit_scores(heads(), given_ | {"v.weight": 1000 * given_["v.weight"]})
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_a_matrix_without_importance_counts_nothing_and_broken_ones_are_seen() -> None:
    given_ = saliencies(9)
    nothing = dict(given_, **{"v.weight": torch.zeros(6, 4)})
    alone = {name: x for name, x in given_.items() if name != "v.weight"}
    assert torch.equal(unit_scores(heads(), nothing), unit_scores(heads(), alone))
    assert unit_scores(heads(), {}).tolist() == [0, 0, 0]
    given_["q.weight"][0, 0] = torch.nan
    assert bool(unit_scores(heads(), given_).isnan().all())


def test_the_norm_is_never_zero() -> None:
    ones = {"q.weight": torch.full((6, 4), 1e-12)}
    scores = unit_scores(heads(), ones)
    assert all(a == b for a, b in pairwise(scores.tolist()))
    assert scores[0].item() == pytest.approx(8e-12 / (8e-12 * 3**0.5 + EPSILON))
