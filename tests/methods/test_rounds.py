"""Deciding in rounds: shares, nesting, and scores of what is left."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from secateurs import plan
from secateurs.core.errors import OptionError
from secateurs.methods import rounds
from secateurs.methods.rounds import in_rounds
from tests.criteria.models import mlp


def seen_plans(monkeypatch: pytest.MonkeyPatch) -> list:
    """The plans of the rounds, as they are made."""
    made = []

    def noted(*args, **options):
        made.append(plan(*args, **options))
        return made[-1]

    monkeypatch.setattr(rounds, "plan", noted)
    return made


@pytest.mark.parametrize(
    ("budget", "shares"),
    [
        ("sparsity=75%", [1 - 0.25**0.25, 0.5, 1 - 0.25**0.75]),
        ("macs<=16%", [0.16**0.25, 0.4, 0.16**0.75]),
    ],
)
def test_a_constant_share_goes_in_each_round(budget: str, shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, x = seen_plans(monkeypatch), mlp(8, 40, 40, 4), torch.randn(2, 8)
    last = plan(model, x, budget, criterion=in_rounds("magnitude", 4, x, budget))
    assert [p.recipe.budget.limits[0].value for p in made] == pytest.approx(shares)
    assert last.recipe.criterion == "magnitude in 4 rounds"


def test_what_went_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made, model, x = seen_plans(monkeypatch), mlp(6, 30, 30, 3), torch.randn(12, 6)

    def redrawn(left: nn.Module, decided: object) -> nn.Module:
        """Other weights after each round, so that other units would go."""
        with torch.no_grad():
            for parameter in left.parameters():
                parameter.copy_(torch.randn_like(parameter))
        return left

    scores = in_rounds("magnitude", 5, x, "sparsity=80%", None, lambda m, p: redrawn(copy.deepcopy(m), p))
    made.append(plan(model, x, "sparsity=80%", criterion=scores))
    assert len(made) == 5
    for before, after in pairwise(made):
        assert sum(after.counts.values()) < sum(before.counts.values())
        assert all(bool((after.keep[name] <= before.keep[name]).all()) for name in before.keep)


def test_later_rounds_score_what_the_earlier_ones_left() -> None:
    """Two hidden units whose only large consumer goes in the first round are small in the second."""
    model = mlp(1, 2, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        # Unit 0 feeds the unit that goes, with a large weight; unit 1 the one that stays.
        model[2].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        model[4].weight.copy_(torch.tensor([[0.1, 5.0]]))
    x = torch.ones(1, 1, dtype=torch.float64)
    options = {"members": "in", "normalize": "none"}

    def kept(criterion, **more) -> list[list[bool]]:
        decided = plan(model, x, "sparsity=50%", criterion=criterion, floor=1, **more)
        return [mask.tolist() for mask in decided.keep.values()]

    assert kept("magnitude", criterion_options=options) == [[True, False], [False, True]]
    two = in_rounds("magnitude", 2, x, "sparsity=50%", options, floor=1)
    assert kept(two) == [[False, True], [False, True]]


def test_one_round_is_one_shot() -> None:
    torch.manual_seed(1)
    model, x = mlp(6, 12, 12, 3), torch.randn(4, 6)
    once = plan(model, x, "macs<=40%")
    assert plan(model, x, "macs<=40%", criterion=in_rounds("magnitude", 1, x, "macs<=40%")).same_as(once)


@pytest.mark.parametrize(
    ("budget", "named"), [("params<=5K", "params<=5K"), ("2:4", "2:4"), ("speedup>=2x", "speedup>=2x")]
)
def test_rounds_need_a_share(budget: str, named: str) -> None:
    with pytest.raises(OptionError, match=rf"rounds go down to a share of the model.*and {named} is none"):
        in_rounds("magnitude", 2, torch.ones(1, 3), budget)


def test_the_data_reach_the_criterion_in_every_round() -> None:
    torch.manual_seed(2)
    model = mlp(6, 12, 3)
    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    decided = plan(
        model, data[0][0], "sparsity=50%", data=data, criterion=in_rounds("snip", 3, data[0][0], "sparsity=50%")
    )
    assert sum(decided.counts.values()) == 6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_scores_are_finite_tensors() -> None:
    model, x = mlp(6, 12, 3), torch.randn(4, 6)
    found: dict[str, Tensor] = plan(
        model, x, "sparsity=50%", criterion=in_rounds("magnitude", 3, x, "sparsity=50%")
    ).scores
    assert all(bool(torch.isfinite(scores).all()) for scores in found.values())
