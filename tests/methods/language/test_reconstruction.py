"""Reconstruction as a recovery: block after block nearer to the dense one, zeros kept, resumed to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import OptionError
from secateurs.core.state import read_state
from secateurs.methods.language.perp import Perp, Reconstruction
from secateurs.recover import reconstruct as room


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = Mlp(), Mlp()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x + self.first(self.norm(x))
        return x + self.second(x), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 8) for _ in range(3)]


def pruned(recover: Any = None, **options: Any) -> sec.Pruned:
    chosen = {"method": "wanda", "measure": False, **options}
    return sec.prune(net(), budget="sparsity=50%", data=batches(), recover=recover, **chosen)


def gap(model: nn.Module) -> float:
    dense = net()
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().mean()) for x in batches())


@pytest.mark.parametrize("train", [("biases",), ("adapters",), ("biases", "norms", "adapters")])
@pytest.mark.parametrize("parts", ["blocks", "halves", "layers"])
def test_outputs_come_nearer_and_zeros_stay(parts: Any, train: Any) -> None:
    before = pruned()
    made = pruned(Reconstruction(steps=60, lr=0.01, parts=parts, how=Perp(rank=4, train=train)))
    assert gap(made.model) < 0.95 * gap(before.model)
    for name, mask in made.masks.items():
        assert torch.equal(made.model.get_parameter(name) != 0, mask)
        assert torch.equal(mask, before.masks[name])
    assert torch.equal(made.model.head.weight, net().head.weight)
    assert type(made.model.blocks[0].first.up) is nn.Linear


@pytest.mark.parametrize(("parts", "count"), [("blocks", 2), ("halves", 4), ("layers", 8)])
def test_a_history_has_one_record_a_part_in_the_order_of_the_calls(
    parts: Any, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = room.reconstruct

    def noted(part: nn.Module, *args: Any, **options: Any) -> tuple[float, float]:
        seen.append([name for name, _ in part.named_children()])
        return real(part, *args, **options)

    monkeypatch.setattr("secateurs.methods.language.perp.reconstruct", noted)
    made = pruned(Reconstruction(steps=2, lr=0.01, parts=parts, how=Perp(rank=2)))
    assert made.report.history is not None
    assert len(made.report.history.values) == len(seen) == count


def test_the_target_is_the_dense_block_on_the_inputs_of_the_reconstructed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    real = room.reconstruct

    def noted(part: nn.Module, calls: Any, targets: Any, **options: Any) -> tuple[float, float]:
        given.append((calls[0].args[0], targets[0]))
        return real(part, calls, targets, **options)

    monkeypatch.setattr("secateurs.methods.language.perp.reconstruct", noted)
    made = pruned(Reconstruction(steps=5, lr=0.01, how=Perp(rank=2)))
    dense, x = net(), batches()[0]
    with torch.no_grad():
        after = made.model.blocks[0](x)[0]
        assert torch.equal(given[0][0], x)
        assert torch.equal(given[0][1], dense.blocks[0](x)[0])
        torch.testing.assert_close(given[1][0], after)
        torch.testing.assert_close(given[1][1], dense.blocks[1](after)[0])


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Reconstruction(steps=5, lr=0.01, how=Perp(rank=2))
    whole = pruned(how)
    calls: list[int] = []
    real = room.reconstruct

    def dies_at_the_second(*args: Any, **options: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("secateurs.methods.language.perp.reconstruct", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pruned(how, checkpoint=tmp_path)
    made = pruned(how, checkpoint=tmp_path)
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), whole.model.parameters(), strict=True))
    assert made.report.history == whole.report.history
    kept = sorted((tmp_path / "recovery").iterdir())
    assert [len(read_state(file, "reconstructed block")["records"]) for file in kept] == [1, 1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 1}, "takes steps, adamw"),
        ({"steps": 1, "optimizer": "sgd"}, "takes steps, adamw"),
        ({"steps": 1, "how": Perp(train=("head",))}, "of what trains biases, norms and adapters"),
        ({"steps": 1, "parts": "thirds"}, "parts must be blocks, halves or layers"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Reconstruction(**options)
