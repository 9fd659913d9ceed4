"""Dual importance: the penalty, the series, the counts, and what comes together over steps, against a slow twin."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from secateurs.core.errors import OptionError
from secateurs.recover.finetune import fine_tune
from secateurs.train.dual import DualImportance, Form, combined, keep_by_blocks, penalty, taylor

G = torch.tensor([0.1, -0.2])
ONES = torch.ones(2)


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_the_penalty_by_the_fisher_keeps_the_sign() -> None:
    added = penalty(G, ONES, G.square(), strength=0.1, lr=0.5)
    torch.testing.assert_close(added, torch.tensor([5e-5, -4e-4]))


def test_the_penalty_as_released_pushes_every_gradient_up() -> None:
    added = penalty(G, ONES, G / 1000, strength=0.1, lr=0.5)
    torch.testing.assert_close(added, torch.tensor([5e-7, 2e-6]))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_what_is_combined_has_no_units(first: float, second: float) -> None:
    domain, general = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[4.0, 1.0, 1.0]])
    made = combined(first * domain, second * general, 0.1)
    torch.testing.assert_close(made, domain / 2 + 0.1 * general / 2)


def test_what_is_zero_throughout_takes_no_part() -> None:
    assert combined(torch.zeros(2), torch.tensor([1.0, 3.0]), 2.0).tolist() == [1.0, 3.0]
    assert combined(torch.tensor([1.0, 3.0]), torch.zeros(2), 2.0).tolist() == [0.5, 1.5]


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_the_series_is_exact_on_a_quadratic(h: float, b: float, w: float) -> None:
    made = taylor(*torch.tensor([w, h * w + b, h], dtype=torch.float64))
    change = 0 - (h * w * w / 2 + b * w)
    assert -float(made.first + made.second) == pytest.approx(change, abs=1e-12)
    assert float(made.importance) == pytest.approx(abs(change), abs=1e-12)
    assert float(made.third) == 0


def test_the_series_of_one_weight() -> None:
    made = taylor(*torch.tensor([0.5, 1.3, 2.0]), cubic=True)
    found = [float(term) for term in (made.first, made.second, made.third)]
    assert found == pytest.approx([0.65, -0.25, 0.125])
    assert float(made.importance) == pytest.approx(0.525)
    assert -sum(found[:2]) == pytest.approx(-0.4)


# -- how many go -------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_percentile_without_ties_and_exact_with_them() -> None:
    scores = torch.randperm(100).double().view(10, 10)
    rank = 0.52 * 99
    assert rank == pytest.approx(51.48)
    released = scores.numpy() > numpy.percentile(scores.numpy(), 52)
    assert (~released).sum() == 52
    assert keep_by_blocks(scores, 0.52).tolist() == released.tolist()
    equal = torch.ones(10, 10)
    assert (equal.numpy() <= numpy.percentile(equal.numpy(), 52)).all()
    assert keep_by_blocks(equal, 0.52).flatten().tolist() == [True] * 48 + [False] * 52


def test_each_run_of_columns_has_the_same_share_and_the_matrix_its_own() -> None:
    scores = torch.arange(256.0).view(4, 64).T.reshape(4, 64)
    whole, parts = keep_by_blocks(scores, 0.5), keep_by_blocks(scores, 0.5, 32)
    assert parts.view(4, 32, 2).sum((0, 2)).tolist() == [4] * 32
    assert len(set(whole.view(4, 32, 2).sum((0, 2)).tolist())) > 1
    assert int(whole.sum()) == int(parts.sum()) == 128


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 45), st.integers(0, 99))
def test_counts_of_runs_add_up(rows: int, columns: int, blocks: int, percent: int) -> None:
    sparsity = percent / 100
    scores = torch.rand(rows, columns)
    kept = keep_by_blocks(scores, sparsity, blocks)
    assert kept.shape == scores.shape
    assert int(kept.sum()) == round((1 - sparsity) * rows * columns) == int(keep_by_blocks(scores, sparsity).sum())
    number = min(blocks, columns)
    edges = [columns * i // number for i in range(number + 1)]
    for a, b in pairwise(edges):
        share = (1 - sparsity) * rows * (b - a)
        assert abs(int(kept[:, a:b].sum()) - share) <= 1 + 1e-9
        gone, stay = scores[:, a:b][~kept[:, a:b]], scores[:, a:b][kept[:, a:b]]
        assert not gone.numel() or not stay.numel() or gone.max() <= stay.min()


# -- over the steps ----------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(5, 3, generator=generator) for _ in range(3)]
    return [(x, x[:, :2].argmax(1)) for x in inputs]


NAMES = ("0.weight", "2.weight")


def general() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(net().get_parameter(n).shape, generator=generator) for n in NAMES}


def gathered(model: nn.Module | None = None, given: Any = None, steps: int = 5, **how: Any) -> DualImportance:
    built: list[DualImportance] = []

    def build(trained: nn.Module, optimizer: Any) -> DualImportance:
        built.append(DualImportance(trained, optimizer, NAMES, general() if given is None else given, **how))
        return built[0]

    fine_tune(net() if model is None else model, batches(), steps=steps, lr=0.3, optimizer=SGD,
              schedule="linear", pruner=build)  # fmt: skip
    return built[0]


def slow(form: Form, strength: float, scale: float, clip: float | None) -> tuple[dict[str, list[float]], nn.Module]:
    """S and the trained model, weight by weight, from the formulas, in float64."""
    model = net().double()
    known = {n: [float(v) for v in g.flatten()] for n, g in general().items()}
    sums = {n: [0.0] * len(known[n]) for n in NAMES}
    squares = {n: [0.0] * len(known[n]) for n in NAMES}
    data = batches()
    for step in range(5):
        lr = 0.3 * (1 - step / 5)
        x, y = data[step % 3]
        model.zero_grad()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        for name in NAMES:
            weight = model.get_parameter(name)
            w, g = ([float(v) for v in t.flatten()] for t in (weight.detach(), weight.grad))
            squares[name] = [a + b * b for a, b in zip(squares[name], g, strict=True)]
            fisher = [a / (step + 1) * scale for a in squares[name]]
            for i in range(len(w)):
                if form == "released":
                    big = g[i] * 65536
                    big += strength * 2 * lr**2 * known[name][i] * big**2 / 1000
                    sums[name][i] += abs(big * w[i] + (big * w[i]) ** 2 / 2000 + w[i] ** 3)
                    g[i] = big / 65536
                    continue
                g[i] += 2 * strength * lr**2 * known[name][i] * g[i] * fisher[i]
                sums[name][i] += abs(g[i] * w[i] - 0.5 * fisher[i] * w[i] ** 2)
            weight.grad = torch.tensor(g, dtype=torch.float64).view_as(weight)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad * (min(1.0, clip / norm) if clip else 1.0)
    return sums, model


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize(
    ("form", "strength", "scale"),
    [("fisher", 0.0, 1.0), ("fisher", 50.0, 1.0), ("fisher", 50.0, 15.0), ("released", 0.1, 1)],
)
def test_the_sum_over_steps_is_that_of_the_formulas(form: Form, strength: float, scale: float, clip: Any) -> None:
    model = net()
    found = gathered(model, form=form, strength=strength, fisher_scale=scale, clip_norm=clip)
    expected, trained = slow(form, strength, scale, clip)
    for name in NAMES:
        torch.testing.assert_close(
            found.scores[name].flatten().double(), torch.tensor(expected[name], dtype=torch.float64), rtol=2e-4, atol=0
        )
        torch.testing.assert_close(
            model.get_parameter(name).double(), trained.get_parameter(name), rtol=1e-4, atol=1e-6
        )
    assert found.steps == 5


def test_without_strength_training_is_plain_and_the_general_importance_is_not_seen() -> None:
    plain, watched = net(), net()
    fine_tune(plain, batches(), steps=5, lr=0.3, optimizer=SGD, schedule="linear")
    first = gathered(watched, {}, strength=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    second = gathered(given={n: 1e6 * g for n, g in general().items()}, strength=0.0)
    assert all(torch.equal(first.scores[n], second.scores[n]) for n in NAMES)
    assert all(sums.added == 0 < sums.plain for sums in first.sums.values())
    third = gathered(strength=50.0)
    assert not any(torch.equal(first.scores[n], third.scores[n]) for n in NAMES)
    assert all(sums.added > 0 for sums in third.sums.values())


def test_terms_are_told_apart() -> None:
    model, names = net(), NAMES
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    one = gathered(model, form="released", strength=0.0, steps=1).sums
    gradients: dict[str, Tensor] = {}
    fresh = net()
    x, y = batches()[0]
    nn.functional.cross_entropy(fresh(x), y).backward()
    for name in names:
        gradients[name] = fresh.get_parameter(name).grad * 65536
        products = (gradients[name] * before[name]).abs()
        assert one[name].first == pytest.approx(float(products.sum()), rel=1e-5)
        assert one[name].second == pytest.approx(float(products.square().sum()) / 2000, rel=1e-5)
        assert one[name].third == pytest.approx(float(before[name].abs().pow(3).sum()), rel=1e-5)


def test_where_gradients_vanish_the_release_ranks_by_size() -> None:
    def nothing(output: Tensor, target: Tensor) -> Tensor:
        return 0 * output.sum()

    model = net()
    built: list[DualImportance] = []

    def build(trained: nn.Module, optimizer: Any) -> DualImportance:
        built.append(DualImportance(trained, optimizer, NAMES, general(), form="released"))
        return built[0]

    fine_tune(model, batches(), steps=3, lr=0.1, optimizer=SGD, loss=nothing, pruner=build)
    for name in NAMES:
        torch.testing.assert_close(built[0].scores[name], 3 * net().get_parameter(name).detach().abs().pow(3))
        assert (built[0].sums[name].first, built[0].sums[name].second) == (0, 0)


def test_half_precision_is_summed_in_float32() -> None:
    model = net().bfloat16()
    optimizer = SGD(model.parameters(), 0.1)
    found = DualImportance(model, optimizer, NAMES, general(), strength=1.0)
    x, y = batches()[0]
    nn.functional.cross_entropy(model(x.bfloat16()), y).backward()
    optimizer.step()
    assert {scores.dtype for scores in found.scores.values()} == {torch.float32}
    assert model.get_parameter("0.weight").dtype == torch.bfloat16


def test_a_weight_without_gradient_counts_as_one_of_gradient_zero() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    found = DualImportance(model, optimizer, NAMES, general())
    optimizer.step()
    found.step()
    assert not any(bool(scores.any()) for scores in found.scores.values())
    assert all(p.grad is None for p in model.parameters())


def test_afterwards_nobody_watches() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    found = DualImportance(model, optimizer, NAMES, general())
    scores = found.finalize()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(bool(s.any()) for s in scores.values())


def test_a_weight_that_is_not_trained_or_not_known_is_refused() -> None:
    model = net()
    with pytest.raises(OptionError, match=r"the optimizer does not train 2\.weight: its importance cannot"):
        DualImportance(model, SGD([model[0].weight], 0.1), NAMES, general())
    with pytest.raises(OptionError, match=r"there is no general importance of 2\.weight: give it, or strength=0"):
        DualImportance(model, SGD(model.parameters(), 0.1), NAMES, {"0.weight": torch.ones(4, 3)})
