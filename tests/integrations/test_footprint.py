"""What a block takes beside its own tensors, from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.in_layers import LayerSolver, Workspace
from secateurs.integrations.footprint import Matrix, beside, matrices_of


def never(subject: Any) -> Any:
    raise AssertionError


SOLVER = LayerSolver("none", never, full=True, workspace=Workspace(weight=10, product=3, fixed=1000))
# Pieces of 5 tokens in float64 four times, and strips.
GATHERING = 4 * 5 * 20 * 8 + 2**13 * 20


def one(entries: int, columns: int, source: str = "", groups: int = 1) -> list[Matrix]:
    return [Matrix(entries, groups, columns, source or f"{entries} {columns}")]


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads what they give, and one that reads another first."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.asks = asks
        self.q, self.k, self.v = (nn.Linear(8, 4) for _ in range(3))
        self.out = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and bool((x > 0).all()):
            x = x + 1
        return self.out(self.q(x) + self.k(x) * self.v(x))


NAMES = ["q", "k", "v", "out"]


def sources(model: nn.Module, batch: Any) -> list[str]:
    return [matrix.source for inside in matrices_of(model.to("meta"), NAMES, batch).values() for matrix in inside]


def test_layers_that_read_one_tensor_share_their_products() -> None:
    assert sources(Attention(), torch.ones(2, 8)) == ["q", "q", "q", "out"]


def test_a_model_that_asks_for_numbers_has_each_layer_for_itself() -> None:
    assert sources(Attention(asks=True), torch.ones(2, 8)) == NAMES


def test_matrices_have_the_sizes_of_the_weights() -> None:
    found = matrices_of(Attention().to("meta"), NAMES, torch.ones(2, 8))
    assert found["q"] == [Matrix(32, 1, 8, "q")]
    assert found["out"] == [Matrix(32, 1, 4, "out")]
    assert found["q"][0].products == 8 * 64


def test_while_it_is_gathered_or_solved() -> None:
    small = [one(2, 20)]
    # Two numbers of a matrix take less to solve than to gather.
    tiny = replace(SOLVER, workspace=Workspace(weight=1, product=0, fixed=0))
    assert beside(small, tiny, 7, 5, 4) == 2 * 7 * 20 * 4 + 8 * 400 + GATHERING
    large = replace(SOLVER, workspace=Workspace(weight=10, product=3, fixed=10**6))
    assert beside(small, large, 7, 5, 4) == 2 * 7 * 20 * 4 + 8 * 400 + 2 + 10 * 2 + 3 * 400 + 10**6


def test_shared_products_count_once_and_are_gone_with_the_last_that_has_them() -> None:
    work = replace(SOLVER, workspace=Workspace(weight=0, product=0, fixed=10**9))
    both = [one(1, 20, "a"), one(1, 20, "a"), one(1, 20, "b")]
    assert beside(both, work, 0, 0, 4) == 2 * 8 * 400 + 2 + 10**9
    assert beside(both, replace(work, full=False), 0, 0, 4) == 3 + 10**9
    # The last alone has the most to do.
    steep = replace(SOLVER, workspace=Workspace(weight=10**7, product=0, fixed=0))
    last = [one(1, 20, "a"), one(5, 20, "b")]
    assert beside(last, steep, 0, 0, 4) == 8 * 400 + 6 + 5 * 10**7


def test_groups_are_solved_one_after_the_other() -> None:
    found = replace(SOLVER, workspace=Workspace(weight=10**6, product=0, fixed=0))
    assert beside([one(6, 20, groups=3)], found, 0, 0, 4) == 3 * 8 * 400 + 6 + 2 * 10**6


def test_masks_of_a_stack_are_joined_in_the_end() -> None:
    nothing = replace(SOLVER, full=False, workspace=Workspace(weight=0, product=0, fixed=0))
    stack = [one(10**6, 20)[0], one(10**6, 20)[0]]
    assert beside([stack, one(10, 20)], nothing, 0, 0, 4) == 3 * 2 * 10**6 + 10


@pytest.mark.parametrize("layers", [[], [[]]])
def test_a_block_without_layers_takes_nothing(layers: Any) -> None:
    assert beside(layers, SOLVER, 7, 5, 4) == 0
