"""Time is a fake clock here, which a model turns by itself: every figure is exact."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.measure import latency as room
from secateurs.measure.latency import Spread, compare, latency, layer_times


class Clock:
    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now


class Busy(nn.Module):
    """Takes the next of `seconds` at each call, over and over."""

    def __init__(self, clock, *seconds, name="busy"):
        super().__init__()
        self.clock, self.seconds, self.calls, self.name = clock, seconds, 0, name
        self.states = []

    def forward(self, x, scale=1):
        self.states.append((self.training, torch.is_grad_enabled(), gc.isenabled(), torch.get_num_threads()))
        self.clock.order.append(self.name)
        self.clock.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        return x * scale


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(room, "perf_counter", fake)
    return fake


X = torch.zeros(4, 3)


def test_percentiles_of_known_times(clock):
    # Times 1 … 11 in some order: percentiles 10, 50, 90 are 2, 6, 10.
    found = latency(Busy(clock, 5, 1, 11, 3, 2, 4, 10, 6, 9, 8, 7), X, repeats=11, warmup=0)
    assert (found.median, found.p10, found.p90) == (6.0, 2.0, 10.0)
    assert (found.device, found.batch, found.repeats, found.speedup) == ("cpu", 4, 11, None)
    assert found.threads == torch.get_num_threads()


def test_percentiles_between_two_times(clock):
    found = latency(Busy(clock, 1, 2), X, repeats=2, warmup=0)
    assert (found.median, found.p10, found.p90) == pytest.approx((1.5, 1.1, 1.9))


def test_warm_up_is_not_timed(clock):
    assert latency(Busy(clock, 100, 100, 1, 1, 1), X, repeats=3, warmup=2, seconds=1e9).p90 == 1.0


@pytest.mark.parametrize(
    ("seconds_a_run", "expected"),
    [(0.25, 8), (1.0, 3), (60.0, 3), (0.0, room.MOST)],
    ids=["fits", "few", "slow", "free"],
)
def test_repeats_fit_the_time_given(clock, seconds_a_run, expected):
    assert latency(Busy(clock, seconds_a_run), X, warmup=0, seconds=2.0).repeats == expected


def test_warm_up_stops_when_it_takes_too_long(clock):
    net = Busy(clock, 60.0)
    latency(net, X, warmup=5, seconds=2.0)
    assert net.calls == 1 + 3


def test_state_during_and_after(clock):
    net = Busy(clock, 1.0).train()
    threads = torch.get_num_threads()
    found = latency(net, X, threads=threads + 1, repeats=2, warmup=1)
    assert set(net.states) == {(False, False, False, threads + 1)}
    assert found.threads == threads + 1
    assert (net.training, torch.is_grad_enabled(), gc.isenabled(), torch.get_num_threads()) == (
        True,
        True,
        True,
        threads,
    )


def test_state_after_an_error():
    threads = torch.get_num_threads()
    net = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="Linear fails on the inputs given"):
        latency(net, X, threads=threads + 1)
    assert (net.training, gc.isenabled(), torch.get_num_threads()) == (True, True, threads)


def test_a_disabled_collector_stays_disabled(clock):
    gc.disable()
    try:
        latency(Busy(clock, 1.0), X, repeats=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_compare_takes_turns_and_starts_with_another_each_round(clock):
    models = {name: Busy(clock, 1.0, name=name) for name in "abc"}
    compare(models, X, repeats=4, warmup=0)
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"


def test_speedup_is_paired_within_rounds(clock):
    # The machine slows down from round to round; each round "fast" takes half as long.
    models = {"slow": Busy(clock, 2, 4, 40), "fast": Busy(clock, 1, 2, 20)}
    found = compare(models, X, repeats=3, warmup=0)
    assert found["slow"].speedup == Spread(1.0, 1.0, 1.0)
    assert found["fast"].speedup == Spread(2.0, 2.0, 2.0)
    assert (found["slow"].median, found["fast"].median) == (4.0, 2.0)


def test_spread_of_the_speedup(clock):
    models = {"dense": Busy(clock, 6.0), "cut": Busy(clock, 6, 3, 2)}
    speedup = compare(models, X, repeats=3, warmup=0)["cut"].speedup
    assert (speedup.median, speedup.p10, speedup.p90) == pytest.approx((2.0, 1.2, 2.8))


def test_time_is_given_per_model(clock):
    found = compare({"a": Busy(clock, 0.5), "b": Busy(clock, 0.5)}, X, warmup=0, seconds=2.0)
    assert found["a"].repeats == found["b"].repeats == 4


def test_inputs_by_model_or_as_keywords(clock):
    models = {"a": Busy(clock, 1.0), "b": Busy(clock, 1.0)}
    own = compare(models, {"a": torch.zeros(2, 1), "b": torch.zeros(8, 1)}, repeats=1)
    assert (own["a"].batch, own["b"].batch) == (2, 8)
    shared = compare(models, {"x": torch.zeros(5, 1), "scale": 2}, repeats=1)
    assert (shared["a"].batch, shared["b"].batch) == (5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
    ],
)
def test_options_outside_what_is_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        latency(nn.Identity(), X, **options)


def test_nothing_to_compare():
    with pytest.raises(OptionError, match="at least one model, got none"):
        compare({}, X)


@pytest.mark.parametrize("measure", [latency, layer_times])
def test_the_meta_device_takes_no_time(measure):
    with pytest.raises(ModelError, match="Linear is on the meta device, which computes nothing"):
        measure(nn.Linear(3, 2, device="meta"), X)


def test_real_time_is_positive():
    found = latency(nn.Linear(3, 2), X, repeats=3)
    assert 0 < found.p10 <= found.median <= found.p90


def test_layer_times_of_leaves_called_twice(clock):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = Busy(clock, 3.0)
            self.early = nn.Sequential(Busy(clock, 1.0, 2.0))
            self.idle = Busy(clock, 9.0)

        def forward(self, x):
            clock.now += 50.0
            return self.late(self.early(self.early(x)))

    net = Net().train()
    # "early.0" takes 1 + 2 seconds in every pass; the model's own 50 seconds belong to no leaf.
    found = layer_times(net, X, repeats=3, warmup=0)
    assert list(found.items()) == [("early.0", 3.0), ("late", 3.0)]
    assert net.training
    assert not net.late._forward_hooks


def test_layer_times_are_medians_after_warm_up(clock):
    assert layer_times(nn.Sequential(Busy(clock, 90, 1, 5, 3)), X, repeats=3, warmup=1) == {"0": 3.0}


def test_a_module_that_calls_none_of_its_children_is_a_leaf():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.zeros(1, 3, 4)
    assert set(layer_times(attention, (x, x, x), repeats=1)) == {""}
