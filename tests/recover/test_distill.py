"""Distillation's loss, written again from the definition."""

from __future__ import annotations

import math

import pytest
import torch

from secateurs.core.errors import OptionError
from secateurs.recover.distill import Distillation, distillation_loss, squarehead


def by_hand(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(v / temperature) for v in row]
        return [p / sum(powers) for p in powers]

    rows = []
    for s, t in zip(student, teacher, strict=True):
        rows.append(sum(q * math.log(q / p) for p, q in zip(softmax(s), softmax(t), strict=True)))
    return temperature**2 * sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss(temperature: float) -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    wanted = by_hand(student.tolist(), teacher.tolist(), temperature)
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)


def test_equal_outputs_cost_nothing() -> None:
    logits = torch.randn(3, 4)
    assert float(distillation_loss(logits, logits)) == pytest.approx(0, abs=1e-6)


def test_every_token_counts_alike_and_padding_not_at_all() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    target = torch.tensor([[1, 2, -100], [0, -100, -100]])
    kept = target != -100
    wanted = distillation_loss(student[kept], teacher[kept], 2.0)
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, target), wanted)
    torch.testing.assert_close(
        distillation_loss(student, teacher, 2.0), distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), 2.0)
    )


def test_segmentation_has_its_classes_on_axis_one() -> None:
    student, teacher = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    target = torch.zeros(2, 3, 3, dtype=torch.int64)
    wanted = distillation_loss(student.movedim(1, -1), teacher.movedim(1, -1), 2.0)
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, target), wanted)
    assert not torch.isclose(distillation_loss(student, teacher, 2.0), wanted)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"student's output has shape \[2, 3\], the teacher's \[2, 4\]"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    for wrong in ({"temperature": 0.0}, {"alpha": 1.1}):
        with pytest.raises(OptionError, match=r"temperature must be positive and alpha in \[0, 1\]"):
            Distillation(**wrong)


def test_the_number_of_the_specification() -> None:
    """KL of softmax(1, 0) from one half each is 0.110944; T² = 4."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(0.443776, abs=1e-6)
    assert float(distillation_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-7)
    shifted = distillation_loss(student + 3.0, teacher - 5.0, 2.0)
    torch.testing.assert_close(shifted, distillation_loss(student, teacher, 2.0))


def test_squarehead_is_the_relative_squared_error_of_every_layer() -> None:
    student = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])]
    teacher = [torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]])]
    wanted = 2 / (1 + 2**-7) + 4 / (4 + 2**-7)
    assert float(squarehead(student, teacher)) == pytest.approx(wanted, rel=1e-6)
    assert float(squarehead(teacher, teacher)) == 0
    leaf = torch.zeros(1, 2, requires_grad=True)
    guide = torch.ones(1, 2, requires_grad=True)
    squarehead([leaf], [guide]).backward()
    assert guide.grad is None
    assert float(leaf.grad[0, 0]) == pytest.approx(-1 / (1 + 2**-7))


def test_squarehead_refuses_what_does_not_agree() -> None:
    for wrong in ([], [torch.ones(2)]):
        with pytest.raises(OptionError, match="hidden states of student and teacher must agree"):
            squarehead(wrong, [torch.ones(3)] if wrong else [])
    with pytest.raises(OptionError, match="the weight of hidden states must be a number of at least 0, got -1"):
        Distillation(hidden=-1)
