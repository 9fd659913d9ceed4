from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.measure.macs import macs
from secateurs.measure.params import (
    LayerRow,
    TensorRow,
    bytes_in_memory,
    layer_table,
    nonzeros,
    parameters,
    sparsity,
    tensor_table,
)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)))


def with_zeros(net, **zeros):
    """`net` with ones, and the first `zeros[name]` entries of each named parameter zero; __ stands for a dot."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        for name, count in zeros.items():
            net.get_parameter(name.replace("__", ".")).view(-1)[:count] = 0
    return net


def test_counts_and_sparsity_by_hand():
    net = with_zeros(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), **{"0__weight": 6, "1__bias": 1})
    assert parameters(net) == 15 + 8
    assert nonzeros(net) == 23 - 7
    assert sparsity(net) == pytest.approx(7 / 23)
    assert sparsity(net, ["0.weight", "1.weight"]) == pytest.approx(6 / 18)
    assert [(row.name, row.sparsity) for row in tensor_table(net)] == [
        ("0.weight", 0.5),
        ("0.bias", 0.0),
        ("1.weight", 0.0),
        ("1.bias", 0.5),
    ]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_sparsity_is_the_share_of_zeros(zeros):
    net = nn.ParameterList(torch.ones(3, 4) for _ in zeros)
    with torch.no_grad():
        for parameter, count in zip(net, zeros, strict=True):
            parameter.view(-1)[:count] = 0
    assert sparsity(net) == pytest.approx(sum(zeros) / (12 * len(zeros)))
    assert nonzeros(net) == parameters(net) - sum(zeros)


def test_row_of_a_tensor():
    net = with_zeros(nn.Linear(2, 3, bias=False, dtype=torch.float16), weight=2)
    assert tensor_table(net) == (TensorRow("weight", (3, 2), "float16", 6, 4),)


def test_nan_is_no_zero_and_minus_zero_is_one():
    net = nn.ParameterList([torch.tensor([float("nan"), -0.0, 1.0])])
    assert nonzeros(net) == 2


def test_tied_parameters_count_once_under_their_first_name():
    net = with_zeros(Tied(), embed__weight=3)
    assert parameters(net) == 15 + 9
    assert nonzeros(net) == 24 - 3
    assert [row.name for row in tensor_table(net)] == ["embed.weight", "inner.weight"]
    assert sparsity(net, ["head.weight"]) == sparsity(net, ["embed.weight", "head.weight"]) == pytest.approx(0.2)


def test_parameters_over_the_same_memory_count_once():
    net = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    assert parameters(net) == 8
    net[1].weight = nn.Parameter(net[0].weight.data)
    assert parameters(net) == 4
    assert bytes_in_memory(net) == 16


def test_meta_and_empty_tensors_are_not_taken_for_tied():
    with torch.device("meta"):
        net = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    assert parameters(net) == 8
    assert parameters(nn.ParameterList([torch.zeros(0), torch.zeros(0)])) == 0


def test_bytes_count_buffers_and_element_sizes():
    net = nn.Sequential(nn.Linear(2, 3).half(), nn.BatchNorm1d(3))
    # Nine halves; gamma, beta, mean and variance as floats; one int64 counter.
    assert bytes_in_memory(net) == 9 * 2 + 12 * 4 + 8


def test_a_model_without_parameters():
    assert (parameters(nn.ReLU()), sparsity(nn.ReLU()), bytes_in_memory(nn.ReLU())) == (0, 0.0, 0)


def test_values_on_the_meta_device_are_unknown():
    net = nn.Linear(2, 2, device="meta")
    assert tensor_table(net)[0].nonzero is None
    assert tensor_table(net)[0].sparsity is None
    for count in (nonzeros, sparsity):
        with pytest.raises(ModelError, match="weight is on the meta device, where values are unknown"):
            count(net)


def test_unknown_name_is_refused():
    with pytest.raises(OptionError, match=r"no parameter is called '0.wait'"):
        sparsity(nn.Sequential(nn.Linear(2, 2)), ["0.weight", "0.wait"])


def test_lazy_parameters_are_refused():
    net = nn.LazyLinear(2)
    for table in (parameters, tensor_table, bytes_in_memory):
        with pytest.raises(ModelError, match="weight has no shape yet: run the model once"):
            table(net)


def test_layer_table_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    net = with_zeros(net, **{"0__weight": 4, "4__bias": 1})
    assert layer_table(net, torch.zeros(2, 1, 3, 3)) == (
        LayerRow("0", "Conv2d", (2, 1, 2, 2), 8, 4, 2 * 8 * 4.0, (2, 2, 2, 2)),
        LayerRow("1", "BatchNorm2d", (2,), 4, 4, 0.0, (2, 2, 2, 2)),
        LayerRow("4", "Linear", (3, 8), 27, 26, 2 * 24.0, (2, 3)),
    )


def test_layer_table_is_in_forward_order_and_counts_tied_tensors_once():
    rows = layer_table(Tied(), torch.zeros(1, 2, dtype=torch.long))
    assert [(row.name, row.params, row.weight_shape, row.macs) for row in rows] == [
        ("embed", 15, (5, 3), 0.0),
        ("inner", 9, (3, 3), 18.0),
        ("head", 0, (5, 3), 30.0),
    ]


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.second = nn.Linear(4, 4)
        self.first = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.second(self.first(x, x, x)[0]) * self.scale


def test_layers_follow_the_forward_pass_and_uncalled_ones_their_parent():
    rows = layer_table(Backwards(), torch.zeros(1, 3, 4))
    assert [(row.name, row.weight_shape, row.output_shape) for row in rows] == [
        ("", (1,), (1, 3, 4)),
        ("first", (12, 4), (1, 3, 4)),
        ("first.out_proj", (4, 4), None),
        ("second", (4, 4), (1, 3, 4)),
    ]


@pytest.mark.parametrize("build", [Backwards, lambda: nn.LSTM(4, 5), lambda: nn.TransformerEncoderLayer(4, 2, 8)])
def test_layer_table_sums_to_the_model(build):
    net, x = build(), torch.zeros(2, 3, 4)
    rows = layer_table(net, x)
    assert sum(row.params for row in rows) == parameters(net)
    assert sum(row.nonzero for row in rows) == nonzeros(net)
    assert sum(row.macs for row in rows) == macs(net, x)


def test_layer_table_on_the_meta_device():
    (row,) = layer_table(nn.Linear(4, 2, device="meta"), torch.zeros(3, 4))
    assert row == LayerRow("", "Linear", (2, 4), 10, None, 24.0, (3, 2))
