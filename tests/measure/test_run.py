from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.errors import DataError, ModelError
from secateurs.measure._run import batches, evaluating, forward, slow_attention, watched


def test_evaluating_puts_every_flag_back_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    inside = []

    def look_and_fail():
        inside.extend(m.training for m in net.modules())
        raise KeyError

    with pytest.raises(KeyError), evaluating(net):
        look_and_fail()
    assert inside == [False] * 4
    assert [m.training for m in net.modules()] == [True, True, False, True]


def test_forward_says_what_was_given():
    with pytest.raises(ModelError, match=r"Linear fails on the inputs given \(shapes: \(1, 3\)\)"):
        forward(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(ModelError, match="shapes: no tensor"):
        forward(nn.Linear(2, 2), ())


def test_forward_moves_inputs_to_the_model():
    assert forward(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2)).is_meta
    assert forward(nn.BatchNorm1d(2, affine=False, device="meta").eval(), torch.zeros(1, 2)).is_meta
    assert forward(nn.ReLU(), torch.zeros(1, 2, device="meta")).is_meta


def test_batches_come_one_by_one():
    def endless():
        yield "first"
        raise AssertionError("the second batch was asked for")

    assert next(batches(endless(), "data")) == "first"
    assert list(batches(range(3), "data")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the test data is empty: at least one batch is needed"),
        (None, "must be an iterable of batches, got None"),
        (torch.zeros(2, 2), "got one Tensor; put a single batch in a list"),
        ({"x": 1}, "got one dict"),
    ],
)
def test_what_is_no_iterable_of_batches_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        list(batches(data, "test data"))


def test_watched_sees_calls_in_order_and_takes_its_hooks_away():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    seen = []
    with watched(net, lambda name, _: seen.append(f"+{name}"), lambda name, _, output: seen.append(f"-{name}")):
        net(torch.zeros(1, 2))
    net(torch.zeros(1, 2))
    assert seen == ["+", "+0", "-0", "+1", "+1.0", "-1.0", "-1", "-"]


def test_watched_leaves_modules_that_raise():
    net, left = nn.Sequential(nn.Linear(2, 2)), []
    with pytest.raises(RuntimeError), watched(net, leave=lambda name, _, output: left.append((name, output))):
        net(torch.zeros(1, 3))
    assert left == [("0", None), ("", None)]
    assert not net[0]._forward_hooks


def test_slow_attention_is_put_back():
    inside = []

    def look_and_fail():
        inside.append(torch.backends.mha.get_fastpath_enabled())
        raise KeyError

    with pytest.raises(KeyError), slow_attention():
        look_and_fail()
    assert inside == [False]
    assert torch.backends.mha.get_fastpath_enabled()


class Counting(nn.Module):
    """Writes to its buffers in evaluation mode: one in place, one anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean + x.mean(0)
        return x


@pytest.mark.parametrize("inference", [False, True])
def test_evaluating_puts_buffers_back(inference):
    with torch.inference_mode(inference):
        net = nn.Sequential(Counting())
    mean = net[0].mean
    with evaluating(net), torch.inference_mode():
        net(torch.ones(3, 2))
    assert net[0].mean is mean
    assert mean.tolist() == [0, 0]
    # A tensor made for inference alone can only be written to in that mode: what was done in place stays.
    assert net[0].calls.item() == (1 if inference else 0)
