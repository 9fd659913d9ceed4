"""The table of times, with a clock that counts parameters: every figure is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.measure.latency_table import homes_of, latency_table, side_by_side
from tests.criteria.models import account, unruly

X = torch.ones(2, 4)


class Block(nn.Module):
    """x + down(up(x)); its layers are held in a container that is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"up": nn.Linear(4, width), "down": nn.Linear(width, 4)})
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        return x + scale * self.parts["down"](self.parts["up"](self.norm(x)).relu())


class Net(nn.Module):
    """Two blocks of one shape and one of another, which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8), Block(8), Block(6)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.layers, self.layers[2]):
            x = block(x, scale=2)
        return x


COUNTS = {"layers.0.parts.up": (8, 4, 1), "layers.1.parts.up": (8, 4, 1), "layers.2.parts.up": (6, 3)}


class Clock:
    """A second for each parameter; it remembers what it was given. The machine is as much slower as `drift` says."""

    def __init__(self, drift: float = 0.0) -> None:
        self.jobs: list[nn.Module] = []
        self.drift, self.pace = drift, 1.0

    def __call__(self, whole: nn.Module, smaller: nn.Module, inputs: Any) -> tuple[float, float]:
        assert inputs is X
        self.jobs.append(smaller)
        self.pace += self.drift
        return self.pace * size(whole), self.pace * size(smaller)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table_of(model: nn.Module, clock: Any, counts: Mapping[str, tuple[int, ...]] = COUNTS) -> Any:
    structure = infer(model, X, entangled=False)
    assert {group.name for group in structure.groups} == set(counts)

    def smaller(kept: Mapping[str, int]) -> nn.Module:
        return cut(model, structure, {name: torch.arange(structure.sizes[name]) < n for name, n in kept.items()})

    return latency_table(model, structure.groups, counts, smaller, X, timer=clock)


def test_every_level_is_measured_on_a_model_that_is_really_cut() -> None:
    model = Net()
    table = table_of(model, Clock())
    # A channel of a block has 4 + 4 weights and a bias.
    assert table.whole == size(model)
    assert table.above["layers.0.parts.up"] == pytest.approx((63, 27, 0))
    assert table.above["layers.2.parts.up"] == pytest.approx((27, 0))
    assert table.total({"layers.0.parts.up": 4, "layers.2.parts.up": 3}) == pytest.approx(size(model) - 36 - 27)
    with pytest.raises(OptionError, match=r"no entry for 5 units of layers\.0\.parts\.up"):
        table.total({"layers.0.parts.up": 5})


def test_modules_alike_are_measured_together() -> None:
    clock, model = Clock(), Net()
    table = table_of(model, clock)
    widths = [[block.parts["up"].out_features for block in job.layers] for job in clock.jobs]
    assert widths == [[4, 4, 6], [1, 1, 6], [8, 8, 3]]
    assert table.entries["layers.1.parts.up"] == table.entries["layers.0.parts.up"]


def test_modules_with_other_inputs_are_no_more_alike() -> None:
    class Shorter(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[2](self.layers[1](self.layers[0](x)[:1]))

    clock = Clock()
    table_of(Shorter(), clock)
    assert len(clock.jobs) == 2 + 2 + 1


def test_a_machine_that_slows_down_changes_no_quotient() -> None:
    steady, drifting = table_of(Net(), Clock()), table_of(Net(), Clock(drift=0.5))
    assert drifting.whole == pytest.approx(2 * steady.whole)
    for name, costs in drifting.entries.items():
        assert costs == pytest.approx([2 * cost for cost in steady.entries[name]])


def test_without_levels_the_whole_model_is_timed() -> None:
    assert table_of(Net(), Clock(), {name: levels[:1] for name, levels in COUNTS.items()}).whole == size(Net())


def test_the_model_is_left_as_it_was() -> None:
    model = unruly(Net())
    before = account(model)
    table_of(model, Clock())
    assert account(model) == before


def test_homes_are_the_smallest_modules_that_run() -> None:
    model = Net()
    groups = infer(model, X, entangled=False).groups
    homes = homes_of(model, groups, X)
    assert {name: path for name, (path, _) in homes.items()} == {name: name[:8] for name in COUNTS}
    _, call = homes["layers.0.parts.up"]
    assert torch.equal(call.args[0], X)
    assert call.kwargs == {"scale": 2}
    assert homes_of(model, groups, X, opaque=["layers.1.parts", "layers.2"])["layers.2.parts.up"][0] == "layers.2"
    assert {path for path, _ in homes_of(model, groups, X, opaque=[""]).values()} == {""}


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(ModelError, match="Net fails on the inputs given"):
        homes_of(Net(), infer(Net(), X, entangled=False).groups, torch.ones(2, 5))


def test_a_real_clock_times_both() -> None:
    taken = side_by_side(nn.Linear(4, 4), nn.Linear(4, 2), X, seconds=1e-4)
    assert len(taken) == 2
    assert min(taken) > 0
