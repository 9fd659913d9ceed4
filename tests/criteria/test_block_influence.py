from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.depth import LayerGroup
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.criteria import score
from secateurs.criteria.block_influence import block_changes
from tests.criteria.models import account, unruly


class Turn(nn.Module):
    """x + the layer's output; in place if asked."""

    def __init__(self, layer: nn.Module, in_place: bool = False) -> None:
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.layer(x)) if self.in_place else x + self.layer(x)


def blocks(count: int) -> LayerGroup:
    return LayerGroup("model", "", tuple(map(str, range(count))), ((),) * count)


def by_hand(model: nn.Sequential, batches: list[Tensor]) -> list[float]:
    """1 - the mean of the cosine, token by token, from the formula."""
    cosines: list[list[float]] = [[] for _ in model]
    with torch.no_grad():
        for x in batches:
            for i, block in enumerate(model):
                y = block(x.clone())
                for a, b in zip(x.double().flatten(0, -2), y.double().flatten(0, -2), strict=True):
                    a, b = a.tolist(), b.tolist()
                    dot = sum(p * q for p, q in zip(a, b, strict=True))
                    cosines[i].append(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b)))
                x = y
    return [1 - sum(found) / len(found) for found in cosines]


@pytest.mark.parametrize("in_place", [False, True])
def test_it_is_one_minus_the_mean_cosine_of_the_tokens(in_place: bool) -> None:
    model = nn.Sequential(*(Turn(nn.Linear(5, 5), in_place) for _ in range(3)))
    data = [torch.randn(2, 4, 5), torch.randn(1, 3, 5)]
    found = score("block-influence", model, [blocks(3)], data=[x.clone() for x in data])["model"]
    assert found.tolist() == pytest.approx(by_hand(model, data), rel=1e-5)
    assert found.min() > 0


def test_a_block_that_changes_nothing_has_none_and_one_that_turns_all_round_has_two() -> None:
    model = nn.Sequential(Turn(nn.Linear(3, 3)), Turn(nn.Linear(3, 3)))
    with torch.no_grad():
        model[0].layer.weight.zero_()
        model[0].layer.bias.zero_()
        model[1].layer.weight.copy_(-3 * torch.eye(3))
        model[1].layer.bias.zero_()
    x = torch.randn(6, 3)
    assert score("block-influence", model, [blocks(2)], data=[x])["model"].tolist() == pytest.approx([0, 2])
    assert score("block-influence", model, [blocks(2)], data=[torch.zeros(6, 3)])["model"].tolist() == [0, 0]


def test_pixels_of_images_are_the_tokens_of_a_convolutional_block() -> None:
    model = nn.Sequential(Turn(nn.Conv2d(4, 4, 3, padding=1)))
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        pairs = (t.movedim(1, -1).flatten(0, -2) for t in (x, model(x)))
        expected = 1 - float(torch.cosine_similarity(*pairs, dim=-1).mean())
    found = score("block-influence", model, [blocks(1)], data=[x])["model"]
    assert found.item() == pytest.approx(expected, rel=1e-5)
    other = score("block-influence", model, [blocks(1)], data=[x], axis=-1)["model"]
    assert other.item() != pytest.approx(expected, rel=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    model = unruly(nn.Sequential(Turn(nn.Linear(3, 3)), nn.Dropout()))
    before = account(model)
    score("block-influence", model, [LayerGroup("model", "", ("0",), ((),))], data=[torch.ones(2, 3)])
    assert account(model) == before


def test_data_layers_and_kept_shapes_are_needed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Turn(nn.Linear(4, 4)), Turn(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match=r"0 makes \[2, 4\] of its first input \[2, 3\]"):
        score("block-influence", model, [blocks(1)], data=[torch.ones(2, 3)])
    with pytest.raises(DataError, match="needs calibration data"):
        sec.plan(model, torch.ones(2, 3), "params<=80%", granularity="layer", criterion="block-influence")
    with pytest.raises(OptionError, match="'block-influence' scores layer groups, but"):
        sec.plan(
            model, torch.ones(2, 3), "params<=80%", criterion="block-influence", data=[torch.ones(2, 3)],
            granularity="weight",
        )  # fmt: skip


def test_the_block_of_least_influence_goes() -> None:
    model = nn.Sequential(*(Turn(nn.Linear(4, 4)) for _ in range(4)))
    with torch.no_grad():
        for i, size in enumerate((1.0, 0.01, 2.0, 0.5)):
            model[i].layer.weight.normal_(std=size)
    plan = sec.plan(
        model, torch.ones(1, 4), "sparsity=25%", granularity="layer", criterion="block-influence",
        data=[torch.randn(16, 4)],
    )  # fmt: skip
    assert plan.structure.gone(plan.keep) == ("1",)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], (0.0, 0.0, 0.0, 0.0)),
        ([[-1.0, 0.0], [0.0, -1.0]], (2.0, 1.0, 2.0, 1.0)),
        ([[0.0, -1.0], [1.0, 0.0]], (1.0, 0.5, 1.0, 1.0)),
        ([[4.0, 0.0], [0.0, 4.0]], (0.0, 0.0, 4.5, 1.5)),
    ],
)
def test_changes_of_a_token_that_is_kept_reversed_turned_and_stretched(
    to: list[list[float]], expected: tuple[float, ...]
) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(to))
    x = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    for change, value in zip(("cosine", "angular", "mse", "mae"), expected, strict=True):
        found = block_changes(model, ["0"], [x], change=change)["0"]
        assert found == pytest.approx(value, abs=1e-7)
        if change == "angular":
            assert block_changes(model, ["0"], [7 * x], change=change)["0"] == pytest.approx(value, abs=1e-7)


def test_padding_does_not_count() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Embedding(9, 4), Turn(nn.Linear(4, 4))

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.block(self.embed(input_ids))

    model, ids = Embedded().double(), torch.randint(9, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    whole = {"input_ids": ids[1:]}
    found = block_changes(model, ["block"], [{"input_ids": ids, "attention_mask": mask}, whole])["block"]
    short = [{"input_ids": ids[:1, :3]}, whole, whole]
    assert found == pytest.approx(block_changes(model, ["block"], short)["block"], rel=1e-9)
    assert found != pytest.approx(block_changes(model, ["block"], [{"input_ids": ids}, whole])["block"], rel=1e-6)


def test_blocks_can_be_scored_by_another_change() -> None:
    model = nn.Sequential(*(Turn(nn.Linear(5, 5)) for _ in range(2)))
    data = [torch.randn(4, 5)]
    found = score("block-influence", model, [blocks(2)], data=data, change="mae")["model"]
    assert found.tolist() == pytest.approx(list(block_changes(model, ["0", "1"], data, change="mae").values()))
    with pytest.raises(OptionError, match="change must be one of cosine, angular, mse, mae, got 'kl'"):
        block_changes(model, ["0"], data, change="kl")
