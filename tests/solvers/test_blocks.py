"""Blocks: which they are, and forward passes that stand before each of them with their real arguments."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.batch import Call, call
from secateurs.core.errors import DataError, ModelError
from secateurs.solvers import blocks_of, walk
from secateurs.solvers.blocks import without_cache


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, str]:
        return x + self.fc(x) + shift, "more"


class Net(nn.Module):
    """Glue that no list of blocks shows: another shift for each, and a head that costs."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 2)
        self.ran_to_the_end = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, shift=torch.full((4,), float(number)))[0]
        self.ran_to_the_end += 1
        return self.head(x)


def dense(name: str, block: nn.Module, calls: list[Call]) -> list[object]:
    with torch.no_grad():
        return [call(block, given) for given in calls]


def test_blocks_are_what_the_outermost_lists_hold() -> None:
    assert blocks_of(Net()) == ["layers.0", "layers.1", "layers.2"]
    twice = nn.ModuleDict({"encoder": Net(1), "decoder": Net(2)})
    assert blocks_of(twice) == ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]
    inner = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([Block(), Block()])})])
    assert blocks_of(nn.ModuleDict({"h": inner})) == ["h.0"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Block()),
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        nn.Linear(2, 2),
    ],
)
def test_a_model_without_a_list_of_composite_modules_is_one_block(model: nn.Module) -> None:
    assert blocks_of(model) == [""]


def test_every_block_is_met_once_with_what_it_really_gets() -> None:
    torch.manual_seed(0)
    model, data = Net(), [torch.randn(2, 4), (torch.randn(5, 4), torch.tensor([0])), torch.randn(1, 4)]
    seen: list[tuple[str, list[Tensor], float]] = []

    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[object]:
        assert block is model.get_submodule(name)
        seen.append((name, [given.args[0] for given in calls], float(calls[0].kwargs["shift"][0])))
        return dense(name, block, calls)

    walk(model, data, blocks_of(model), visit)
    assert [(name, shift) for name, _, shift in seen] == [("layers.0", 0.0), ("layers.1", 1.0), ("layers.2", 2.0)]
    expected = [model.stem(batch[0] if isinstance(batch, tuple) else batch) for batch in data]
    for name, inputs, shift in seen:
        for one, other in zip(inputs, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        expected = [model.get_submodule(name)(x, shift=torch.full((4,), shift))[0] for x in expected]


def test_what_comes_after_the_last_block_is_not_run_and_nothing_is_left_behind() -> None:
    model, before = Net(), threading.active_count()
    walk(model, [torch.randn(2, 4)] * 3, blocks_of(model), dense)
    assert model.ran_to_the_end == 0
    assert threading.active_count() == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert model(torch.randn(2, 4)).requires_grad


def test_the_passes_go_on_with_what_the_visitor_returns() -> None:
    model = Net(2)
    inputs: dict[str, Tensor] = {}

    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[object]:
        inputs[name] = calls[0].args[0]
        return [(torch.full((2, 4), 7.0), "replaced") for _ in calls]

    walk(model, [torch.randn(2, 4)], blocks_of(model), visit)
    assert inputs["layers.1"].unique().tolist() == [7.0]


def test_a_shared_block_is_visited_once_and_run_as_it_is_by_then() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = nn.ModuleList([Block(), Block()])
            self.given: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            for number in (0, 0, 1):
                self.given.append(float(x.sum()))
                x = self.groups[number](x, shift=torch.zeros(4))[0]
            return x

    model, visited = Shared(), []

    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[object]:
        visited.append(name)
        with torch.no_grad():
            block.fc.weight.zero_()
            block.fc.bias.fill_(1)
        return dense(name, block, calls)

    walk(model, [torch.zeros(1, 4)], blocks_of(model), visit)
    assert visited == ["groups.0", "groups.1"]
    assert model.given == [0.0, 4.0, 8.0]


def test_a_model_of_one_block_is_visited_as_a_whole() -> None:
    model, got = nn.Linear(4, 2), []
    walk(model, [{"input": torch.zeros(1, 4)}, torch.zeros(2, 4)], [""], lambda n, b, c: got.extend(c) or [])
    assert [(len(one.args), sorted(one.kwargs)) for one in got] == [(0, ["input"]), (1, [])]


def test_an_error_in_the_model_comes_out_and_all_passes_end() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.stem(x), shift=torch.zeros(4))[0]
            raise RuntimeError("glue")

    model, before = Broken(), threading.active_count()
    with pytest.raises(ModelError, match=r"^Broken fails on the inputs given \(shapes: \(2, 4\)\): glue\. Give inputs"):
        walk(model, [torch.randn(2, 4)] * 3, blocks_of(model), dense)
    assert threading.active_count() == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_of_the_visitor_ends_all_passes() -> None:
    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[object]:
        raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        walk(Net(), [torch.randn(2, 4)] * 3, ["layers.0"], visit)
    assert threading.active_count() == before


def test_a_block_that_no_pass_reaches_is_named() -> None:
    class Skips(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.stem(x), shift=torch.zeros(4))[0]

    with pytest.raises(ModelError, match=r"never reach layers.1, layers.2.*ignore="):
        walk(Skips(), [torch.randn(2, 4)], blocks_of(Skips()), dense)


def test_batches_that_go_different_ways_are_refused() -> None:
    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[len(x) % 2](self.stem(x), shift=torch.zeros(4))[0]

    with pytest.raises(ModelError, match=r"different ways.*layers.0, layers.1"):
        walk(Routed(), [torch.randn(2, 4), torch.randn(3, 4)], blocks_of(Routed()), dense)


def test_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        walk(Net(), [], ["layers.0"], dense)


def test_caches_are_off_and_on_again() -> None:
    class Config:
        use_cache = True

    model = Net()
    model.config = Config()
    model.layers[0].config = model.config
    with without_cache(model):
        assert model.config.use_cache is False
    assert model.config.use_cache is True
