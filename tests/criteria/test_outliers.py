"""Outliers: a share of entries over a multiple of their mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.errors import OptionError
from secateurs.criteria.outliers import outlier_shares


def test_shares_are_of_all_entries_of_a_group_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    x = torch.randn(40, 6)
    with torch.no_grad():
        model[0].weight[2, 3] = 30
        inputs = (x, model[1](model[0](x)))
        scores = [(m.weight.abs() * t.norm(dim=0)).flatten() for m, t in zip((model[0], model[2]), inputs, strict=True)]
    both = torch.cat(scores)
    found = outlier_shares(model, {"all": ["0.weight", "2.weight"], "last": ["2.weight"]}, [x], times=2.0)
    assert found["all"] == pytest.approx(float((both > 2 * both.mean()).double().mean()))
    assert found["last"] == pytest.approx(float((scores[1] > 2 * scores[1].mean()).double().mean()))
    assert 0 < found["all"] < 1
    assert outlier_shares(model, {"all": ["0.weight", "2.weight"]}, [x])["all"] == 1 / 88 * round(
        88 * float((both > 5 * both.mean()).double().mean())
    )


def test_a_group_needs_a_known_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(OptionError, match=r"none of the weights of norm \(1\.weight\) is of a layer with known inputs"):
        outlier_shares(model, {"norm": ["1.weight"], "layer": ["0.weight"]}, [torch.ones(2, 3)])
