from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.measure.collapse import (
    Symptom,
    activation_table,
    collapse,
    dead_weights,
    effective_rank,
    few_units,
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


def images(batches=1, rows=16):
    return [torch.randn(rows, 3, 4, 4) for _ in range(batches)]


def kinds(symptoms):
    return [(s.layer, s.kind, s.fatal) for s in symptoms]


def test_a_healthy_network_has_no_symptom():
    assert collapse(network(), images(3)) == ()
    assert collapse(network(), images()[0]) == ()


def test_few_units_by_hand():
    found = few_units({"a": 1, "b": 5, "c": 0}, {"a": 100, "b": 100, "c": 8, "other": 4}, floor=0.05)
    assert kinds(found) == [("a", "few units", False), ("c", "few units", True)]
    assert (found[0].value, found[0].limit) == (0.01, 0.05)


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10)), st.floats(0, 1))
def test_few_units_are_those_below_the_floor(kept, floor):
    found = few_units(kept, dict.fromkeys(kept, 10), floor)
    assert [s.layer for s in found] == [name for name, count in kept.items() if count / 10 < floor]


def test_few_units_needs_sizes():
    with pytest.raises(OptionError, match="group 'b' has no positive size in sizes="):
        few_units({"a": 1, "b": 2}, {"a": 1, "b": 0})
    with pytest.raises(OptionError, match="group 'a' has no positive size"):
        collapse(network(), images(), kept={"a": 1})


def test_a_weight_of_zeros_is_fatal_and_makes_its_output_constant():
    net = network()
    nn.init.zeros_(net[3].weight)
    found = collapse(net, images())
    assert kinds(found) == [("3.weight", "zero weight", True), ("3", "constant", True), ("6", "constant", True)]
    assert all(s.value == 0 for s in found)


def test_zero_filters_are_counted():
    net = network()
    with torch.no_grad():
        net[3].weight[:2] = 0
    (found,) = collapse(net, images())
    assert kinds([found]) == [("3.weight", "zero filters", False)]
    assert found.value == 0.25
    assert str(found).startswith("3.weight: zero filters, 0.25 (limit 0). Share of filters that are all zero")


def test_filters_of_a_transposed_convolution_are_its_second_axis():
    net = nn.ConvTranspose2d(4, 8, 2)
    with torch.no_grad():
        net.weight[1] = 0
    assert dead_weights(net) == ()
    with torch.no_grad():
        net.weight[:, 1] = 0
    assert dead_weights(net)[0].value == 0.125


def test_few_weights_are_those_below_the_floor():
    net = nn.Linear(10, 10)
    with torch.no_grad():
        net.weight.copy_(torch.eye(10))
    assert dead_weights(net, floor=0.1) == ()
    assert kinds(dead_weights(net, floor=0.11)) == [("weight", "few weights", False)]


def test_a_cut_model_is_measured_against_its_reference():
    assert kinds(dead_weights(nn.Linear(10, 1), 0.01, nn.Linear(100, 100))) == [("weight", "few weights", False)]
    assert dead_weights(nn.Linear(10, 10), 0.01, nn.Linear(100, 100)) == ()


def test_padding_rows_biases_and_adapters_that_start_at_zero_are_no_symptom():
    net = nn.ModuleDict({"tokens": nn.Embedding(5, 3, padding_idx=0), "adapter": nn.Linear(3, 3)})
    nn.init.zeros_(net["adapter"].bias)
    assert dead_weights(net) == ()
    before = copy.deepcopy(net)
    nn.init.zeros_(before["adapter"].weight)
    assert dead_weights(before, reference=copy.deepcopy(before)) == ()
    assert kinds(dead_weights(before)) == [("adapter.weight", "zero weight", True)]


def test_an_emptied_batch_norm_is_a_constant_map():
    # The pitfall of networks with batch norm: no error, only a map that does not depend on the image.
    net = network()
    nn.init.zeros_(net[1].weight)
    assert kinds(collapse(net, images()))[0] == ("1", "constant", True)


def test_dead_channels_are_those_that_do_not_vary():
    net, x = nn.Linear(25, 25), torch.randn(16, 25)
    with torch.no_grad():
        net.weight[:23] = 0
    (row,) = activation_table(net, x)
    assert row.live == pytest.approx(0.08)
    assert "dead channels" not in [s.kind for s in collapse(net, x, live_floor=0.07)]
    assert kinds(collapse(net, x, live_floor=0.09))[-1] == ("", "dead channels", False)


def test_outputs_in_one_direction_have_low_rank():
    net = nn.Linear(6, 6)
    with torch.no_grad():
        net.weight.copy_(torch.outer(torch.randn(6), torch.randn(6)))
    (found,) = collapse(net, torch.randn(32, 6))
    assert kinds([found]) == [("", "low rank", False)]
    assert found.value == pytest.approx(1.0)


def test_rank_is_not_judged_on_few_samples():
    net = nn.Linear(6, 6)
    with torch.no_grad():
        net.weight.copy_(torch.outer(torch.randn(6), torch.randn(6)))
    assert collapse(net, torch.randn(7, 6)) == ()
    assert collapse(net, torch.randn(2, 50, 6)) == ()
    assert collapse(net, [torch.randn(4, 6), torch.randn(4, 6)]) != ()


def test_nan_is_reported_where_it_is_seen():
    net = network()
    with torch.no_grad():
        net[3].bias[0] = float("nan")
    found = collapse(net, images())
    assert kinds(found) == [("3", "not a number", True), ("6", "not a number", True)]
    assert math.isnan(found[0].value)


def test_what_was_low_in_the_reference_is_not_reported():
    net = network()
    nn.init.zeros_(net[1].weight)
    before = copy.deepcopy(net)
    assert collapse(net, images(), reference=before) == ()
    nn.init.zeros_(net[6].weight)
    assert kinds(collapse(net, images(), reference=before)) == [("6.weight", "zero weight", True)]
    healthy = network()
    assert collapse(net, images(), reference=healthy) != ()


def test_limits_are_arguments():
    x = torch.randn(32, 3, 4, 4)
    assert {s.kind for s in collapse(network(), x, rank_floor=1e9)} == {"low rank"}
    assert {s.kind for s in collapse(network(), x, spread_floor=1.1)} == {"constant"}
    assert {s.kind for s in collapse(network(), x, live_floor=1.1)} == {"dead channels"}
    assert {s.kind for s in collapse(network(), x, weight_floor=1.1)} == {"few weights"}


def test_only_the_first_batches_are_read():
    def data():
        yield from images(2)
        raise AssertionError("a third batch was asked for")

    assert collapse(network(), data(), batches=2) == ()


def test_activation_table_by_hand():
    net = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]))
    (row,) = activation_table(net, [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 6.0]])])
    # Outputs (1, 2, 0) and (3, 6, 0): variances 1, 4, 0; mean square 50/6; the live channels move together.
    assert (row.layer, row.finite, row.most) == ("", True, 1)
    assert row.spread == pytest.approx(math.sqrt((5 / 3) / (50 / 6)))
    assert row.live == pytest.approx(2 / 3)
    assert row.rank == pytest.approx(1.0)


def test_channels_of_convolutions_come_second():
    net = nn.Conv2d(1, 4, 1, bias=False)
    with torch.no_grad():
        net.weight[:3] = 0
    (row,) = activation_table(net, torch.randn(2, 1, 5, 5))
    assert row.live == 0.25


def test_one_sample_without_positions_and_embeddings_are_left_out():
    net = nn.Sequential(nn.Embedding(4, 6), nn.Flatten(), nn.Linear(12, 3))
    assert activation_table(net, torch.zeros(1, 2, dtype=torch.long)) == ()
    assert [row.layer for row in activation_table(net, torch.zeros(2, 2, dtype=torch.long))] == ["2"]


def test_constant_outputs_have_no_rank():
    (row,) = activation_table(nn.Linear(3, 4), torch.ones(9, 3))
    assert (row.spread, row.live, row.rank) == (pytest.approx(0.0, abs=1e-7), 0.0, 0.0)


def test_effective_rank_by_hand():
    independent = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert effective_rank(independent) == pytest.approx(2.0)
    # Scale and offset of a channel do not matter, nor do channels that do not vary.
    assert effective_rank(independent * torch.tensor([1.0, 1e6]) + 3) == pytest.approx(2.0)
    assert effective_rank(torch.cat([independent, torch.full((4, 3), 7.0)], 1)) == pytest.approx(2.0)
    assert effective_rank(torch.ones(4, 2)) == 0.0


@given(st.integers(1, 5), st.integers(6, 10))
def test_effective_rank_lies_between_one_and_the_rank(rank, channels):
    torch.manual_seed(rank * channels)
    samples = torch.randn(40, rank, dtype=torch.float64) @ torch.randn(rank, channels, dtype=torch.float64)
    assert 1 - 1e-9 <= effective_rank(samples) <= rank + 1e-9


def test_dict_batches_recurrent_outputs_and_fused_layers():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

        def forward(self, x, labels=None):
            return self.layer(self.lstm(x)[0])

    batch = {"x": torch.randn(8, 5, 4), "labels": torch.zeros(8)}
    net = Reader().requires_grad_(False)
    rows = activation_table(net, [batch])
    assert [row.layer for row in rows] == [
        "lstm",
        "layer.self_attn",
        "layer.norm1",
        "layer.linear1",
        "layer.linear2",
        "layer.norm2",
    ]
    assert collapse(net, [batch]) == collapse(net, batch) == ()


def test_model_is_left_as_it_was():
    net = network().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    collapse(net, images(), reference=network())
    assert all(m.training for m in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_errors():
    with pytest.raises(DataError, match="the data is empty"):
        collapse(network(), [])
    with pytest.raises(ModelError, match="Sequential fails on the inputs given"):
        collapse(network(), torch.randn(2, 1, 4, 4))


def test_symptoms_are_data():
    assert Symptom("a", "constant", 0.0, 1e-5, True, "Do.") == Symptom("a", "constant", 0.0, 1e-5, True, "Do.")
    assert str(Symptom("a", "constant", 0.0, 1e-5, True, "Do.")) == "a: constant, 0 (limit 1e-05). Do."
