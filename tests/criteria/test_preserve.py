from __future__ import annotations

import pytest
import torch

from secateurs.criteria import observing, preserved
from tests.criteria.models import ConvNet, account, images, unruly


@pytest.mark.parametrize("train", [False, True])
def test_everything_is_put_back_when_the_body_raises(train: bool) -> None:
    model = unruly(ConvNet())
    (x, y), *_ = images(1)
    before = account(model)

    def body() -> None:
        with preserved(model, train=train):
            assert all(module.training == train for module in model.modules())
            torch.nn.functional.cross_entropy(model(x), y).backward()
            model.norm.running_mean = torch.zeros(4)
            torch.rand(3)
            raise KeyError("the body")

    with pytest.raises(KeyError, match="the body"):
        body()
    assert account(model) == before


def test_buffers_that_appear_or_vanish_are_put_back() -> None:
    model = ConvNet()
    before = account(model)
    with preserved(model):
        del model.norm.running_var
        model.register_buffer("cache", torch.ones(2))
        model.norm.running_mean.fill_(7)
    assert account(model) == before
    assert list(model.norm._buffers) == ["running_mean", "running_var", "num_batches_tracked"]


def test_an_expanded_buffer_is_no_obstacle() -> None:
    model = ConvNet()
    model.register_buffer("position", torch.arange(3)[None].expand(2, 3))
    with preserved(model):
        pass
    assert model.position.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_only_the_parameters_asked_for_require_gradients() -> None:
    model = unruly(ConvNet())
    flags = [p.requires_grad for p in model.parameters()]
    with preserved(model, differentiate=[model.first.bias]):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["first.bias"]
        assert all(p.grad is None for p in model.parameters())
    with preserved(model):
        assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in model.parameters()] == flags
    assert flags.count(False) == 1


def test_random_numbers_inside_follow_the_seed() -> None:
    model = ConvNet()
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(1)
        with preserved(model, seed=seed):
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_hooks_go_when_the_body_or_a_visitor_raises() -> None:
    model = unruly(ConvNet())
    before = account(model)

    def body() -> None:
        with observing(model, {"first": lambda *found: None}):
            assert account(model)["hooks"] != before["hooks"]
            raise KeyError("the body")

    with pytest.raises(KeyError, match="the body"):
        body()
    assert account(model) == before

    def visitor(*found: object) -> None:
        raise KeyError("the visitor")

    with pytest.raises(KeyError, match="the visitor"), observing(model, {"second": visitor}):
        model(images(1)[0][0])
    assert account(model) == before


def test_hooks_go_when_a_later_module_is_missing() -> None:
    model = ConvNet()
    before = account(model)
    with (
        pytest.raises(AttributeError, match="third"),
        observing(model, {"first": lambda *f: None, "third": lambda *f: None}),
    ):
        pass
    assert account(model) == before
