"""Sharpness: estimators on known matrices, and the operator against the full Hessian."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.measure.hessian import hessian_operator, hutchinson_trace, sharpness, top_eigenvalue


def symmetric(seed: int = 0) -> Tensor:
    half = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half + half.T + 2 * torch.eye(6, dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator), torch.arange(n) % 3) for n in (8, 5)]


def full_hessian(model: nn.Module) -> Tensor:
    """From the definition, over all samples at once."""
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    values = [p.detach() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    sizes = [v.numel() for v in values]

    def loss(flat: Tensor) -> Tensor:
        parts = [p.view_as(v) for p, v in zip(flat.split(sizes), values, strict=True)]
        return F.cross_entropy(torch.func.functional_call(model.eval(), dict(zip(names, parts, strict=True)), x), y)

    return torch.autograd.functional.hessian(loss, torch.cat([v.flatten() for v in values]))


def test_a_diagonal_is_exact() -> None:
    h = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    found = hutchinson_trace(lambda v: h @ v, torch.ones(3))
    assert (found.value, found.steps, found.settled) == (6, 2, True)
    assert top_eigenvalue(lambda v: h @ v, torch.ones(3), tolerance=1e-9).value == pytest.approx(3, abs=1e-6)


def test_a_random_matrix_comes_near() -> None:
    h = symmetric()
    generator = torch.Generator().manual_seed(0)
    trace = hutchinson_trace(lambda v: h @ v, h[0], tolerance=1e-30, limit=20_000, generator=generator)
    assert trace.value == pytest.approx(float(h.trace()), rel=0.01)
    assert not trace.settled
    expected = max(torch.linalg.eigvalsh(h).tolist(), key=abs)
    top = top_eigenvalue(lambda v: h @ v, h[0], tolerance=1e-8, limit=2000)
    assert top.value == pytest.approx(expected, rel=1e-4)
    assert top.settled


def test_the_largest_may_be_negative_tiny_or_zero() -> None:
    h = torch.diag(torch.tensor([1.0, -5.0]))
    assert top_eigenvalue(lambda v: h @ v, torch.ones(2)).value == pytest.approx(-5, rel=1e-2)
    assert top_eigenvalue(lambda v: 1e-9 * (h @ v), torch.ones(2)).value == pytest.approx(-5e-9, rel=1e-2)
    nothing = top_eigenvalue(torch.zeros_like, torch.ones(2))
    assert (nothing.value, nothing.steps, nothing.settled) == (0, 1, True)


def test_what_does_not_settle_says_so() -> None:
    answers = iter([1.0, -1.0, 1.0, -1.0, 1.0])
    found = hutchinson_trace(lambda v: v * next(answers), torch.ones(2), limit=5)
    assert str(found).endswith("after 5 products, not settled")


def test_the_product_is_the_hessian_of_all_data() -> None:
    model = net()
    h = full_hessian(copy.deepcopy(model))
    with hessian_operator(model, batches()) as (product, keep):
        found = torch.stack([product(row) for row in torch.eye(len(keep))])
    torch.testing.assert_close(found, h, atol=1e-5, rtol=1e-4)
    figures = sharpness(model, batches(), tolerance=1e-7, limit=400)
    assert figures.eigenvalue.value == pytest.approx(max(torch.linalg.eigvalsh(h).tolist(), key=abs), rel=1e-3)
    assert figures.trace.value == pytest.approx(float(h.trace()), rel=0.1)


def test_masked_weights_are_no_variables() -> None:
    model = net()
    mask = torch.arange(12).view(4, 3) % 2 == 0
    model[0].weight.data *= mask
    h = full_hessian(copy.deepcopy(model))
    left = torch.cat([mask.flatten(), torch.ones(len(h) - 12, dtype=torch.bool)])
    inside = h[left][:, left]
    with hessian_operator(model, batches(), masks={"0.weight": mask}) as (product, keep):
        found = torch.stack([product(row) for row in torch.eye(len(keep))])
    torch.testing.assert_close(found[left][:, left], inside, atol=1e-5, rtol=1e-4)
    assert not found[~left].any()
    assert not found[:, ~left].any()
    figures = sharpness(model, batches(), masks={"0.weight": mask}, tolerance=1e-7, limit=300)
    assert figures.eigenvalue.value == pytest.approx(max(torch.linalg.eigvalsh(inside).tolist(), key=abs), rel=1e-3)


def test_names_restrict_and_the_model_is_left_alone() -> None:
    model = net().train()
    model[3].weight.requires_grad_(False)
    model[0].bias.grad = torch.ones(4)
    before = copy.deepcopy(model.state_dict())
    with hessian_operator(model, batches(), names=["3.bias"]) as (product, keep):
        moved = product(torch.ones(3))
    assert len(keep) == 3
    assert moved.abs().max() < 1e-6  # logits shifted together change nothing
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert model[0].bias.grad.tolist() == [1, 1, 1, 1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_seed_decides_and_it_prints() -> None:
    first, again, other = (sharpness(net(), batches(), limit=3, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert str(first).startswith("largest eigenvalue ")
    assert math.isfinite(first.trace.value)


def test_attention_has_second_derivatives() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    found = sharpness(layer, [(torch.randn(2, 3, 4), torch.randn(2, 3, 4))], limit=2)
    assert found.eigenvalue.value != 0


def test_nonsense_is_refused() -> None:
    model = net()
    with pytest.raises(OptionError, match="tolerance must be positive"):
        sharpness(model, batches(), tolerance=0)
    with pytest.raises(DataError, match="the data is empty"):
        sharpness(model, [])
    with pytest.raises(OptionError, match=r"unknown parameter '0\.wait'"):
        sharpness(model, batches(), names=["0.wait"])
    with pytest.raises(OptionError, match=r"unknown masked parameter '0\.wait'"):
        sharpness(model, batches(), masks={"0.wait": torch.ones(1)})
    with pytest.raises(ModelError, match="no weight is left"):
        sharpness(model, batches(), names=["3.bias"], masks={"3.bias": torch.zeros(3, dtype=torch.bool)})
