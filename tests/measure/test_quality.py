from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from secateurs.core.errors import DataError, OptionError
from secateurs.measure.quality import (
    Agreement,
    accuracy,
    agreement,
    auroc,
    ece,
    fgsm,
    fgsm_accuracy,
    max_softmax,
    nll,
    ood_auroc,
)

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
    target = torch.tensor([0, 0, 2, 2])
    assert [accuracy(logits, target, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


def test_of_equal_logits_the_earlier_class_leads():
    assert accuracy(torch.zeros(3, 3), torch.tensor([0, 1, 2])) == pytest.approx(1 / 3)
    assert accuracy(torch.zeros(3, 3), torch.tensor([0, 1, 2]), k=2) == pytest.approx(2 / 3)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.randoms())
def test_accuracy_against_a_stable_sort(rows, classes, k, random):
    logits = torch.tensor([[float(random.randint(0, 2)) for _ in range(classes)] for _ in range(rows)])
    target = torch.tensor([random.randrange(classes) for _ in range(rows)])
    named = [sorted(range(classes), key=lambda c, row=row: -row[c])[:k] for row in logits.tolist()]
    expected = sum(t in top for t, top in zip(target.tolist(), named, strict=True)) / rows
    assert accuracy(logits, target, k) == pytest.approx(expected)


def test_nll_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert nll(logits, torch.tensor([0, 0])) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_ece_of_two_bins_by_hand():
    # Invariant 8 of random pruning: |1 − 0.9| and |0.5 − 0.6|, each with half of the predictions.
    confidence, correct = torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 1, 1, 0])
    assert ece(confidence, correct) == pytest.approx(0.1)


def test_ece_averages_within_a_bin():
    # All four fall into one of two bins, whose accuracy equals its mean confidence.
    confidence, correct = torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([1, 1, 1, 0])
    assert ece(confidence, correct, bins=2) == pytest.approx(0.0)


def test_a_bin_has_its_upper_edge():
    correct = torch.tensor([1, 0])
    assert ece(torch.tensor([0.5, 0.5]), correct, bins=2) == 0.0
    assert ece(torch.tensor([0.5, 0.75]), correct, bins=2) == pytest.approx((0.5 + 0.75) / 2)
    assert ece(torch.tensor([0.0, 1.0]), torch.tensor([0, 1])) == 0.0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 20))
def test_ece_against_its_formula(predictions, bins):
    total = 0.0
    for b in range(bins):
        inside = [(c, ok) for c, ok in predictions if max(math.ceil(c * bins) - 1, 0) == b]
        if inside:
            share = sum(ok for _, ok in inside) / len(inside)
            total += len(inside) * abs(share - sum(c for c, _ in inside) / len(inside))
    confidence = torch.tensor([c for c, _ in predictions], dtype=torch.float64)
    assert ece(confidence, torch.tensor([ok for _, ok in predictions]), bins) == pytest.approx(total / len(predictions))


@pytest.mark.parametrize("score", [accuracy, nll])
def test_scores_of_nothing(score):
    with pytest.raises(DataError, match="of nothing is not defined"):
        score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_refused_options():
    with pytest.raises(DataError, match="of nothing is not defined"):
        ece(torch.zeros(0), torch.zeros(0))
    with pytest.raises(OptionError, match="bins must be at least 1, got 0"):
        ece(torch.ones(1), torch.ones(1), bins=0)
    with pytest.raises(OptionError, match="k must be at least 1, got 0"):
        accuracy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), k=0)


def test_auroc_by_hand():
    assert auroc(torch.tensor([0.9, 0.8]), torch.tensor([0.7, 0.1])) == 1.0
    assert auroc(torch.tensor([0.1]), torch.tensor([0.7, 0.2])) == 0.0
    same = torch.tensor([0.3, 0.5, 0.5, 0.9])
    assert auroc(same, same) == 0.5


@given(scores, scores)
def test_auroc_against_all_pairs(positive, negative):
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    found = auroc(torch.tensor(positive, dtype=torch.float32), torch.tensor(negative, dtype=torch.float32))
    assert found == pytest.approx(wins / len(positive) / len(negative))


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([float("nan")])])
def test_auroc_refuses_what_cannot_be_ordered(bad):
    with pytest.raises(DataError, match="the negative scores must be at least one number without NaN"):
        auroc(torch.zeros(1), bad)


def test_ood_auroc_by_hand():
    sure, unsure = [torch.tensor([[5.0, 0.0]])], [torch.tensor([[1.0, 0.0]]), torch.tensor([[9.0, 0.0]])]
    assert max_softmax(sure[0]).item() == pytest.approx(1 / (1 + math.exp(-5)))
    assert ood_auroc(nn.Identity(), sure, unsure) == 0.5
    assert ood_auroc(nn.Identity(), [(sure[0], None)], unsure[:1]) == 1.0
    with pytest.raises(DataError, match="the data outside is empty"):
        ood_auroc(nn.Identity(), sure, [])


class Dot(nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def total(output, target):
    return output.sum()


def test_fgsm_on_a_linear_loss_gains_eps_times_the_l1_norm():
    net, x = Dot(3.0, -2.0, 0.0, 0.5), torch.randn(1, 4, dtype=torch.float32)
    attacked = fgsm(net, x, None, 0.25, bounds=None, loss=total)
    assert (net(attacked) - net(x)).item() == pytest.approx(0.25 * 5.5, rel=1e-5)


def test_fgsm_steps_in_pixels_whatever_the_normalisation():
    net, x = Dot(3.0, -2.0), torch.full((1, 2, 1), 0.5)
    attacked = fgsm(net, x, None, 0.1, mean=[0.4, 0.4], std=[0.01, 5.0], loss=total)
    assert torch.allclose(attacked.flatten(), torch.tensor([0.6, 0.4]))


def test_fgsm_takes_the_gradient_where_the_model_sees_the_normalised_image():
    # The slope of (z − 1)² at z = (x − mean)/std: pixels at 0.5 become z = 2, then z = 0.
    def loss(output, target):
        return ((output - 1) ** 2).sum()

    x = torch.full((1, 1, 1), 0.5)
    assert fgsm(nn.Identity(), x, None, 0.1, mean=[0.3], std=[0.1], loss=loss).item() == pytest.approx(0.6)
    assert fgsm(nn.Identity(), x, None, 0.1, mean=[0.5], std=[0.1], loss=loss).item() == pytest.approx(0.4)


def test_fgsm_clips_to_bounds():
    x = torch.tensor([[0.95, 0.05]])
    assert fgsm(Dot(1.0, -1.0), x, None, 0.1, loss=total).tolist() == [[1.0, 0.0]]
    assert fgsm(Dot(1.0, -1.0), x, None, 0.1, loss=total, bounds=(0.0, 0.97)).flatten()[0].item() == pytest.approx(0.97)


def test_fgsm_leaves_the_model_and_the_image_alone():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train(), torch.rand(4, 3)
    before, image = {k: v.clone() for k, v in net.state_dict().items()}, x.clone()
    with torch.no_grad():
        attacked = fgsm(net, x, torch.tensor([0, 1, 0, 1]))
    assert (attacked != x).any()
    assert torch.equal(x, image)
    assert not attacked.requires_grad
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_fgsm_accuracy_by_hand():
    # Class 1 where the pixel exceeds 0.5: of three right answers the step of 0.1 turns the one within its reach.
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        net[1].bias.copy_(torch.tensor([0.5, -0.5]))
    data = [(torch.tensor([[0.55], [0.9]]), torch.tensor([1, 1])), (torch.tensor([[0.2]]), torch.tensor([0]))]
    assert fgsm_accuracy(net, data, 0.0) == 1.0
    assert fgsm_accuracy(net, data, 0.1) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="the evaluation data is empty"):
        fgsm_accuracy(net, [])


def test_fgsm_options():
    with pytest.raises(OptionError, match=r"eps must not be negative, got -0.1"):
        fgsm(nn.Identity(), torch.zeros(1, 1), None, -0.1)
    with pytest.raises(OptionError, match="std must be positive in every channel"):
        fgsm(nn.Identity(), torch.zeros(1, 1), None, 0.1, std=[0.0])


class Add(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.tensor(value)

    def forward(self, x):
        return x + self.value


def test_agreement_by_hand():
    data = [(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0, 0])), torch.tensor([[0.0, 1.0]])]
    found = agreement(nn.Identity(), Add([2.0, 0.0]), data)
    # (3, 4) and (5, 4); (1, 0) and (3, 0); (0, 1) and (2, 1).
    cosines = [31 / (5 * math.sqrt(41)), 1.0, 1 / math.sqrt(5)]
    assert found == Agreement(2.0, pytest.approx(sum(cosines) / 3), pytest.approx(1 / 3), 3)


def test_agreement_with_itself_and_with_nothing():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert agreement(nn.Identity(), nn.Identity(), [x]) == Agreement(0.0, pytest.approx(1.0), 1.0, 2)
    zero = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(zero.weight)
    assert agreement(nn.Identity(), zero, [x]).cosine == 0.5


def test_agreement_of_equal_infinities_and_of_nan():
    masked = torch.tensor([[float("-inf"), 1.0]])
    assert agreement(nn.Identity(), nn.Identity(), [masked]).max_difference == 0.0
    broken = agreement(nn.Identity(), Add([float("nan"), 0.0]), [torch.ones(1, 2), torch.ones(1, 2)])
    assert math.isnan(broken.max_difference)


def test_agreement_refuses_other_shapes_and_no_data():
    with pytest.raises(DataError, match=r"differ in shape: \(1, 2\) and \(1, 3\)"):
        agreement(nn.Identity(), nn.Linear(2, 3), [torch.zeros(1, 2)])
    with pytest.raises(DataError, match="the data is empty"):
        agreement(nn.Identity(), nn.Identity(), [])


def test_agreement_restores_training():
    nets = nn.Dropout(), nn.Dropout()
    assert agreement(*nets, [torch.ones(3, 8)]).max_difference == 0.0
    assert nets[0].training
    assert nets[1].training


def test_default_loss_of_fgsm_is_cross_entropy():
    net, x, y = nn.Linear(3, 4), torch.rand(2, 3), torch.tensor([1, 3])
    attacked = fgsm(net, x, y, 1e-3, bounds=None)
    assert F.cross_entropy(net(attacked), y) > F.cross_entropy(net(x), y)
