"""CFSP: widths of blocks by how much they turn their input, neurons by the norm of their activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES
from secateurs.core.densities import sigmoid_densities
from secateurs.core.errors import ModelError, OptionError
from secateurs.criteria.block_influence import block_changes
from secateurs.methods.language.cfsp import Cfsp, cfsp, importance, ranks

DOUBLE = torch.float64


class Block(nn.Module):
    """x + scale·down(gelu(up(x))), with sixteen neurons."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    """Four blocks that turn their input more and less, between two other layers with a width of their own."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8))
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def stack(*scales: float) -> tuple[Stack, Tensor]:
    torch.manual_seed(0)
    return Stack(*(scales or (0.1, 3.0, 0.5, 1.0))).double().eval(), torch.randn(64, 5, dtype=DOUBLE)


def run(model: nn.Module, x: Tensor, budget: str = "sparsity=50%", options: Cfsp | None = None, **common: Any) -> Any:
    return cfsp(model, x, budget, options=options, data=[x[:40], x[40:]], measure=False, **common)


def widths(made: Any) -> list[int]:
    return [made.plan.counts[f"blocks.{i}.up"] for i in range(4)]


def test_widths_follow_the_importance_of_blocks_and_nothing_else_is_cut() -> None:
    model, x = stack()
    made = run(model, x)
    weighed = importance(model, [x])
    assert weighed == pytest.approx(block_changes(model, [f"blocks.{i}" for i in range(4)], [x], change="angular"))
    expected = sigmoid_densities(weighed, dict.fromkeys(weighed, 16), 0.5)
    assert list(made.plan.counts) == [f"blocks.{i}.up" for i in range(4)]
    assert sum(widths(made)) == 32
    assert all(abs(n - 16 * share) < 1 for n, share in zip(widths(made), expected.values(), strict=True))
    assert len(set(widths(made))) > 2


def test_the_neurons_of_greatest_norm_stay() -> None:
    model, x = stack()
    made = run(model, x)
    with torch.no_grad():
        hidden = model.stem(x)
        for i, block in enumerate(model.blocks):
            norms = nn.functional.gelu(block.up(hidden)).square().mean(0)
            kept = norms.topk(widths(made)[i]).indices.sort().values
            assert torch.equal(made.plan.keep[f"blocks.{i}.up"].nonzero().flatten(), kept)
            hidden = block(hidden)


@pytest.mark.parametrize("options", [Cfsp(importance="none"), Cfsp(strength=0)])
def test_without_importance_the_widths_are_equal(options: Cfsp) -> None:
    model, x = stack()
    assert widths(run(model, x, options=options)) == [8] * 4


@pytest.mark.parametrize("change", ["cosine", "mse", "mae"])
def test_other_measures_of_a_change(change: Any) -> None:
    model, x = stack()
    found = widths(run(model, x, options=Cfsp(importance=change)))
    assert sum(found) == 32
    assert found.index(max(found)) == 1


def test_more_of_the_same_data_changes_nothing() -> None:
    model, x = stack()
    one, two = (cfsp(model, x, "sparsity=50%", data=[x] * n, measure=False).plan for n in (1, 3))
    assert one.same_as(two)


def test_widths_are_multiples_of_which_one_stays_and_the_budget_holds() -> None:
    model, x = stack(0.01, 0.01, 8.0, 8.0)
    made = run(model, x, "sparsity=70%", options=Cfsp(round_to=4, strength=10))
    assert all(n % 4 == 0 and n >= 4 for n in widths(made))
    assert sum(widths(made)) <= round(0.3 * 64)


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_budgets_of_the_whole_model_are_met(metric: str) -> None:
    model, x = stack()
    made = run(model, x, f"{metric}<=70%")
    assert made.plan.cost(metric) <= 0.7
    assert made.plan.cost(metric) > 0.66


def test_weights_count_only_where_they_are_asked_for() -> None:
    model, x = stack()
    other, _ = stack()
    with torch.no_grad():
        # What a neuron's consumer does with it is nothing its norm knows of.
        other.blocks[3].down.weight[:, ::2] *= 1e-3
    aware, released = (
        [run(net, x, options=Cfsp(score=score, importance="none")).plan for net in (model, other)]
        for score in ("weight-aware", "released")
    )
    assert released[0].same_as(released[1])
    assert not aware[0].same_as(aware[1])


def test_compensation_is_an_option() -> None:
    model, x = stack()
    plain, made = run(model, x), run(model, x, options=Cfsp(compensation=True))
    assert plain.plan.same_as(made.plan)
    assert torch.equal(plain.model.blocks[0].down.bias, model.blocks[0].down.bias)
    with torch.no_grad():
        hidden = model.stem(x)
        lost = model.blocks[0](hidden).mean(0) - made.model.blocks[0](hidden).mean(0)
        assert lost.abs().max() < 1e-9


def test_silent_neurons_can_go_without_a_trace() -> None:
    model, x = stack()
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight[::2] = 0
            block.up.bias[::2] = 0
    made = run(model, x, options=Cfsp(importance="none"))
    torch.testing.assert_close(made.model(x), model(x))


def test_the_pooler_of_an_encoder_is_no_block() -> None:
    model, x = FAMILIES["BERT"]()
    made = cfsp(model, x, "sparsity=30%", data=[x], measure=False)
    assert list(made.plan.counts) == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]


def test_a_model_without_inner_channels_is_refused() -> None:
    with pytest.raises(ModelError, match="no channel of a block of Sequential can go by itself and lies in scope"):
        cfsp(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4), "sparsity=30%", data=[torch.ones(2, 4)])


def test_a_block_that_changes_the_shape_has_no_importance() -> None:
    class Grows(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(inputs, 16), nn.Linear(16, outputs)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    model, x = nn.Sequential(Grows(4, 6), Grows(6, 8)), torch.randn(3, 4)
    with pytest.raises(ModelError, match=r"0 makes \[3, 6\] of its first input \[3, 4\]"):
        cfsp(model, x, "sparsity=50%", data=[x])
    made = cfsp(model, x, "sparsity=50%", data=[x], options=Cfsp(importance="none"), measure=False)
    assert made.plan.counts == {"0.up": 8, "1.up": 8}


# -- ranks -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 64))
def test_ranks_cost_as_much_as_equal_ones_and_follow_the_importance(values: list[float], mean: int) -> None:
    weighed = {str(i): value for i, value in enumerate(values)}
    found = ranks(weighed, mean)
    assert sum(found.values()) == mean * len(values)
    assert min(found.values()) >= 1
    assert all(found[a] >= found[b] for a in found for b in found if weighed[a] > weighed[b] + 1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 40), st.integers(8, 30)), min_size=1, max_size=8),
    st.integers(1, 8),
)
def test_ranks_of_blocks_that_cost_differently_cost_as_much_as_equal_ones(
    blocks: list[tuple[float, int, int]], mean: int
) -> None:
    weighed, costs, most = ({str(i): block[side] for i, block in enumerate(blocks)} for side in range(3))
    found = ranks(weighed, mean, costs=costs, most=most)
    spent = sum(found[block] * cost for block, cost in costs.items())
    even = mean * sum(costs.values())
    assert abs(spent - even) <= max(costs.values()) / 2
    assert all(1 <= found[block] <= most[block] for block in found)


def test_ranks_where_no_block_can_have_more() -> None:
    assert ranks({"a": 3.0, "b": 1.0}, 8, most={"a": 5, "b": 6}) == {"a": 5, "b": 6}
    assert ranks({"a": 3.0, "b": 1.0}, 4, most={"a": 5, "b": 6}) == {"a": 5, "b": 3}
    # Of 160 proportions ask for 160·3/(3·10 + 30) = 8 ranks of 10 and 2.67 of 30; with 3 it is nearer than with 2.
    assert ranks({"a": 3.0, "b": 1.0}, 4, costs={"a": 10, "b": 30}) == {"a": 8, "b": 3}
    assert ranks({"a": 5.0, "b": 1.0}, 4, costs={"a": 10, "b": 30}) == {"a": 10, "b": 2}


def test_ranks_of_blocks_that_matter_alike_are_equal() -> None:
    assert ranks({"a": 0.0, "b": 0.0}, 8) == {"a": 8, "b": 8}
    assert ranks({"a": 3.0, "b": 1.0}, 4) == {"a": 6, "b": 2}
    for weighed, mean in (({"a": 1.0}, 0), ({}, 4), ({"a": -1.0}, 4), ({"a": float("nan")}, 4)):
        with pytest.raises(OptionError, match="ranks need a mean rank of at least 1"):
            ranks(weighed, mean)


def test_prune_knows_the_method_by_name() -> None:
    model, x = stack()
    made = sec.prune(model, x, "sparsity=50%", method="cfsp", data=[x[:40], x[40:]], measure=False)
    assert made.plan.same_as(run(model, x).plan)
