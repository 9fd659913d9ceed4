"""What is minimised, put together by hand from its terms; the token loss from its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.errors import ModelError, OptionError
from secateurs.recover.distill import (
    Distillation,
    distillation_loss,
    hidden_states,
    shared_blocks,
    squarehead,
    token_loss,
)
from secateurs.recover.objective import training_objective


class Net(nn.Module):
    """Two blocks, then logits of each token; a block returns a tuple, as many do."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x + self.down(self.up(x).relu()), "and more"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Block(width), self.Block(width)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(6), Net(8)


def by_hand(student: list[Tensor], teacher: list[Tensor], seen: Tensor) -> float:
    terms = []
    for learnt, guide in zip(student, teacher, strict=True):
        errors = [
            float(((learnt[b, t] - guide[b, t]) ** 2).sum().detach())
            for b in range(seen.shape[0])
            for t in range(seen.shape[1])
            if seen[b, t]
        ]
        terms.append(sum(errors) / len(errors))
    return sum(terms) / len(terms)


def test_token_loss_is_the_mean_over_layers_and_tokens_that_count() -> None:
    student, teacher = [torch.randn(2, 5, 4) for _ in range(3)], [torch.randn(2, 5, 4) for _ in range(3)]
    found = token_loss(student, teacher, MASK.bool())
    assert float(found) == pytest.approx(by_hand(student, teacher, MASK), rel=1e-5)
    assert float(token_loss(student, teacher)) == pytest.approx(by_hand(student, teacher, torch.ones(2, 5)), rel=1e-5)


def test_a_student_like_its_teacher_loses_nothing() -> None:
    states = [torch.randn(2, 5, 4)]
    assert float(token_loss(states, states, MASK.bool())) == 0


def test_padding_changes_nothing_and_twice_the_error_of_a_token_counts_four_times() -> None:
    teacher, error = torch.randn(2, 5, 4), torch.zeros(2, 5, 4)
    error[0, 1] = torch.randn(4)
    padding = torch.where(MASK[..., None].bool(), 0.0, 9.0)
    once, noisy, twice = (
        float(token_loss([teacher + e], [teacher], MASK.bool())) for e in (error, error + padding, 2 * error)
    )
    assert noisy == once > 0
    assert twice == pytest.approx(4 * once, rel=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(1, 2, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    token_loss([student], [teacher]).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (student - teacher).detach())


def test_states_that_do_not_agree_are_refused() -> None:
    for student in ([], [torch.ones(1, 2, 3)], [torch.ones(1, 2, 4)] * 2):
        with pytest.raises(OptionError, match=r"hidden states must agree: the student has .* the teacher \[\[1, 2, 4"):
            token_loss(student, [torch.ones(1, 2, 4)])
    with pytest.raises(OptionError, match=r"weight of the token loss must be a number of at least 0, got -0\.5"):
        Distillation(tokens=-0.5)


@pytest.mark.parametrize(("alpha", "tokens", "hidden"), [(1.0, 0.5, 0.0), (0.3, 2.0, 0.7), (1.0, 0.0, 1.5)])
def test_the_objective_is_the_sum_of_its_terms(
    alpha: float, tokens: float, hidden: float, nets: tuple[nn.Module, nn.Module]
) -> None:
    student, teacher = nets
    x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    how = Distillation(temperature=2.0, alpha=alpha, tokens=tokens, hidden=hidden)
    loss = training_objective(student, None, 0.0, teacher, how, None)
    with hidden_states(student, ["layers.0", "layers.1"]) as learnt:
        output = student(x)
    with hidden_states(teacher, ["layers.0", "layers.1"]) as guides:
        guide = teacher(x)
    assert [state.shape for state in learnt] == [(2, 5, 4)] * 2
    wanted = alpha * distillation_loss(output, guide, 2.0, y)
    wanted = wanted + (1 - alpha) * F.cross_entropy(output.flatten(0, 1), y.flatten())
    wanted = wanted + tokens * by_hand(learnt, guides, torch.ones(2, 5)) + hidden * squarehead(learnt, guides)
    torch.testing.assert_close(loss((x, y)), wanted)
    assert not any(module._forward_hooks for net in nets for module in net.modules())


def test_the_objective_leaves_padding_out(nets: tuple[nn.Module, nn.Module]) -> None:
    how = Distillation(alpha=1.0, tokens=1.0)
    losses: list[Any] = []
    for weight in (0.0, 1.0):
        loss = training_objective(nets[0], None, 0.0, nets[1], Distillation(alpha=1.0, tokens=weight), None)
        torch.manual_seed(1)
        x = torch.randn(2, 5, 4)
        losses += [float(loss(batch).detach()) for batch in ({"x": x, "attention_mask": MASK}, {"x": x})]
    with hidden_states(nets[0], ["layers.0", "layers.1"]) as learnt:
        nets[0](x)
    with hidden_states(nets[1], ["layers.0", "layers.1"]) as guides:
        nets[1](x)
    assert how.tokens * by_hand(learnt, guides, MASK) == pytest.approx(losses[2] - losses[0], rel=1e-4)
    assert by_hand(learnt, guides, torch.ones(2, 5)) == pytest.approx(losses[3] - losses[1], rel=1e-4)


def test_models_without_blocks_in_common_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ModelError, match="Sequential has no list of blocks in common with its teacher"):
        shared_blocks(plain, plain)
    with pytest.raises(ModelError, match="no list of blocks in common"):
        shared_blocks(plain, Net(4))
    assert shared_blocks(Net(3), Net(4)) == ["layers.0", "layers.1"]
