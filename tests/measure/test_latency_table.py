"""The table of times, with a clock that counts parameters: every figure is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.measure.latency_table import homes_of, latency_table, medians
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
    """A second for each parameter; it remembers what it was given."""

    def __init__(self) -> None:
        self.jobs: dict[str, nn.Module] = {}
        self.inputs: Mapping[str, Any] = {}

    def __call__(self, models: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, float]:
        self.jobs, self.inputs = dict(models), inputs
        assert set(models) == set(inputs)
        return {name: float(size(model)) for name, model in models.items()}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table_of(model: nn.Module, clock: Any, counts: Mapping[str, tuple[int, ...]] = COUNTS) -> Any:
    structure = infer(model, X, entangled=False)
    assert {group.name for group in structure.groups} == set(counts)

    def smaller(name: str, count: int) -> nn.Module:
        return cut(model, structure, {name: torch.arange(structure.sizes[name]) < count})

    return latency_table(model, structure.groups, counts, smaller, X, timer=clock)


def test_every_level_is_measured_on_a_module_that_is_really_cut() -> None:
    clock, model = Clock(), Net()
    table = table_of(model, clock)
    # A channel of a block has 4 + 4 weights and a bias; 8 of the norm and 4 of the last bias stay.
    assert table.entries["layers.0.parts.up"] == (84.0, 48.0, 21.0)
    assert table.entries["layers.2.parts.up"] == (2 * 66.0, 2 * 39.0)
    assert table.whole == size(model)
    assert table.total({"layers.0.parts.up": 4, "layers.2.parts.up": 3}) == size(model) - 36 - 2 * 27
    with pytest.raises(OptionError, match=r"no entry for 5 units of layers\.0\.parts\.up"):
        table.total({"layers.0.parts.up": 5})


def test_modules_alike_are_measured_once_and_as_they_are_called() -> None:
    clock, model = Clock(), Net()
    table = table_of(model, clock)
    assert len(clock.jobs) == 1 + 3 + 2
    assert table.entries["layers.1.parts.up"] == table.entries["layers.0.parts.up"]
    assert all(isinstance(job, Block) for name, job in clock.jobs.items() if name != "whole")
    call = next(given for name, given in clock.inputs.items() if name != "whole")
    assert call.kwargs == {"scale": 2}
    assert call.args[0].shape == X.shape


def test_other_inputs_are_another_kind() -> None:
    class Shorter(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[2](self.layers[1](self.layers[0](x)[:1]))

    clock = Clock()
    table_of(Shorter(), clock)
    assert len(clock.jobs) == 1 + 3 + 3 + 2


def test_the_model_is_left_as_it_was() -> None:
    model = unruly(Net())
    before = account(model)
    table_of(model, Clock())
    assert account(model) == before


def test_homes_are_the_smallest_modules_that_run() -> None:
    model = Net()
    groups = infer(model, X, entangled=False).groups
    homes = homes_of(model, groups, X)
    assert {name: (path, times) for name, (path, _, times) in homes.items()} == {
        "layers.0.parts.up": ("layers.0", 1),
        "layers.1.parts.up": ("layers.1", 1),
        "layers.2.parts.up": ("layers.2", 2),
    }
    assert homes_of(model, groups, X, opaque=["layers.1.parts", "layers.2"])["layers.2.parts.up"][0] == "layers.2"
    assert {path for path, _, _ in homes_of(model, groups, X, opaque=[""]).values()} == {""}


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(ModelError, match="Net fails on the inputs given"):
        homes_of(Net(), infer(Net(), X, entangled=False).groups, torch.ones(2, 5))


def test_real_clocks_give_a_time_to_each() -> None:
    inputs = {"a": X, "b": torch.ones(3, 4)}
    taken = medians({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)}, inputs, seconds=1e-4)
    assert set(taken) == {"a", "b"}
    assert min(taken.values()) > 0
