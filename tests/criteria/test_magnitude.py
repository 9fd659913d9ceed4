from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.errors import OptionError
from secateurs.core.units import WeightGroup
from secateurs.criteria import score
from tests.criteria.models import mlp


def line(*values: float) -> tuple[torch.nn.Module, list[WeightGroup]]:
    model = mlp(len(values), 1, dtype=torch.float64)
    model[0].weight.data = torch.tensor([values], dtype=torch.float64)
    return model, [WeightGroup("0.weight", (1, len(values)))]


def test_single_weights_score_their_size() -> None:
    model, groups = line(0.5, -2.0, 0.0, 1.0)
    assert score("magnitude", model, groups)["0.weight"].tolist() == [0.5, 2.0, 0.0, 1.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_a_unit_of_one_entry_has_its_size_under_every_norm(values: list[float], norm: float) -> None:
    model, groups = line(*values)
    found = score("magnitude", model, groups, norm=norm)["0.weight"].tolist()
    assert found == pytest.approx([abs(v) for v in values], rel=1e-5, abs=1e-30)


@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_a_block_scores_its_norm(values: list[float], norm: float) -> None:
    model, _ = line(*values)
    block = WeightGroup("0.weight", (1, 4), block=(1, 4))
    expected = float(torch.linalg.vector_norm(torch.tensor(values, dtype=torch.float64), norm))
    assert score("magnitude", model, [block], norm=norm)["0.weight"].item() == pytest.approx(
        expected, rel=1e-5, abs=1e-30
    )


@pytest.mark.parametrize("norm", [0, -1, float("nan")])
def test_norms_are_positive(norm: float) -> None:
    model, groups = line(1.0)
    with pytest.raises(OptionError, match=f"norm must be positive, got {norm}"):
        score("magnitude", model, groups, norm=norm)
