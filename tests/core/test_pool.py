"""Pools of weights and what goes from them in a round, against loops over the entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateurs.core.errors import OptionError
from secateurs.core.pool import Per, pools, prune_pools
from secateurs.core.pq import adaptive_keep, share_keep

PERS: tuple[Per, ...] = ("model", "layer", "neuron")
WEIGHTS = {
    "a": torch.tensor([[1.0, -2.0, 3.0, 40.0], [4.0, 3.0, -2.0, 1.0]]),
    "b": torch.tensor([[[5.0, 0.1]], [[-0.2, 6.0]], [[0.3, 0.3]]]),
}
ALL = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in WEIGHTS.items()}


def half(pool: Tensor, left: Tensor) -> Tensor:
    return share_keep(pool, 0.5, keep=left)


def sap(pool: Tensor, left: Tensor) -> Tensor:
    return adaptive_keep(pool, 1, 2, keep=left)


def lists(masks: dict[str, Tensor]) -> dict[str, list]:
    return {name: mask.int().tolist() for name, mask in masks.items()}


def test_pools() -> None:
    assert {name: list(rows.shape) for name, rows in pools(WEIGHTS, "neuron").items()} == {"a": [2, 4], "b": [3, 2]}
    assert {name: list(rows.shape) for name, rows in pools(WEIGHTS, "layer").items()} == {"a": [1, 8], "b": [1, 6]}
    (whole,) = pools(WEIGHTS, "model").values()
    assert whole.tolist() == [[1, -2, 3, 40, 4, 3, -2, 1, *torch.tensor([5, 0.1, -0.2, 6, 0.3, 0.3]).tolist()]]
    with pytest.raises(OptionError, match="no weights to divide into pools"):
        pools({}, "model")


def test_half_of_each_pool_by_hand() -> None:
    """Among equals the earlier stays."""
    assert lists(prune_pools(WEIGHTS, ALL, half, per="neuron")) == {
        "a": [[0, 0, 1, 1], [1, 1, 0, 0]],
        "b": [[[1, 0]], [[0, 1]], [[1, 0]]],
    }
    assert lists(prune_pools(WEIGHTS, ALL, half, per="layer")) == {
        "a": [[0, 0, 1, 1], [1, 1, 0, 0]],
        "b": [[[1, 0]], [[0, 1]], [[1, 0]]],
    }
    assert lists(prune_pools(WEIGHTS, ALL, half, per="model")) == {
        "a": [[0, 1, 1, 1], [1, 1, 0, 0]],
        "b": [[[1, 0]], [[0, 1]], [[0, 0]]],
    }


def test_what_went_stays_gone_even_beside_zeros() -> None:
    weights = {"a": torch.tensor([[0.0, 0.0, 9.0, 0.0]])}
    left = {"a": torch.tensor([[False, True, False, True]])}
    assert lists(prune_pools(weights, left, half)) == {"a": [[0, 1, 0, 0]]}
    assert lists(prune_pools(weights, left, sap)) == {"a": [[0, 1, 0, 1]]}
    # Not even a count above what is left brings anything back.
    assert lists(prune_pools(weights, left, lambda pool, mask: torch.tensor([3]))) == {"a": [[0, 1, 0, 1]]}


@given(st.sampled_from(PERS), st.integers(0, 2**16), st.data())
def test_masks_are_nested_and_counts_exact_over_rounds(per: Per, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (4, 9)), ("b", (3, 2, 5)))}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for _ in range(3):
        rows, left = pools(weights, per), pools(masks, per)
        after = prune_pools(weights, masks, sap, per=per)
        for name, mask in pools(after, per).items():
            for i in range(len(mask)):
                alive = rows[name][i][left[name][i]].abs()
                stay = int(adaptive_keep(alive, 1, 2))
                assert int(mask[i].sum()) == stay
                assert sorted(rows[name][i][mask[i]].abs().tolist()) == sorted(alive.tolist())[len(alive) - stay :]
        assert not any(bool((after[name] & ~masks[name]).any()) for name in masks)
        masks = after
    total = data.draw(st.integers(0, sum(int(mask.sum()) for mask in masks.values())))
    met = prune_pools(weights, masks, sap, per=per, total=total)
    assert sum(int(mask.sum()) for mask in met.values()) == total
    assert not any(bool((met[name] & ~masks[name]).any()) for name in masks)


def test_a_total_is_divided_as_the_rule_would() -> None:
    """Layers that would keep 8 and 1 keep 4 and 1 of five; zeros that are left may stay."""
    weights = {"even": torch.ones(8), "one": torch.tensor([9.0, *[0.0] * 7])}
    masks = {name: torch.ones(8, dtype=torch.bool) for name in weights}

    def counts(total: int | None) -> list[int]:
        return [int(mask.sum()) for mask in prune_pools(weights, masks, sap, total=total).values()]

    assert counts(None) == [8, 1]
    assert counts(9) == [8, 1]
    assert counts(5) == [4, 1]
    assert counts(12) == [8, 4]
    assert counts(0) == [0, 0]
    with pytest.raises(OptionError, match="17 weights cannot stay of 16 that are left"):
        counts(17)


def test_equal_rows_lose_equally_and_one_row_is_a_layer() -> None:
    row = torch.tensor([0.1, 5.0, 0.2, 0.3, 4.0, 0.1])
    same = prune_pools({"a": row.repeat(5, 1)}, {"a": torch.ones(5, 6, dtype=torch.bool)}, sap, per="neuron")["a"]
    assert 0 < int(same[0].sum()) < 6
    assert all(torch.equal(mask, same[0]) for mask in same)
    single = {"a": row[None]}, {"a": torch.ones(1, 6, dtype=torch.bool)}
    per_layer, per_neuron = (prune_pools(*single, sap, per=per)["a"] for per in ("layer", "neuron"))
    assert torch.equal(per_layer, per_neuron)
    assert torch.equal(per_layer[0], same[0])


def test_nan_weights_are_refused() -> None:
    with pytest.raises(OptionError, match="NaN"):
        prune_pools({"a": torch.tensor([float("nan"), 1.0])}, {"a": torch.ones(2, dtype=torch.bool)}, half)
