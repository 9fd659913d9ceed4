"""Two processes over gloo: the same masks and weights as one, each having solved its share."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from secateurs.core.errors import DataError
from secateurs.in_layers import LayerSolver, Subject, prune_in_layers
from secateurs.solvers import Gram, Solved, least_squares, ranks, wanda_scores


class Block(nn.Module):
    """The second layer and the last of the experts are called on long batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.rare, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.experts, self.is_transposed = nn.Parameter(torch.randn(3, 8, 8)), True

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x)
        x = x + self.out(self.rare(x) if len(x) > 6 else x)
        return torch.cat([part @ self.experts[i] for i, part in enumerate(x.split(3))])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, 8) for size in (7, 4, 6, 5, 9)]


def pruned(on_block: Any = None, checkpoint: Any = None) -> tuple[dict[str, Tensor], list[str]]:
    mine: list[str] = []

    def solve(subject: Subject) -> Solved:
        mine.append(subject.where)
        mask = subject.comparison.keep(wanda_scores(subject.weight, subject.inputs.norm))
        return Solved(least_squares(subject.weight, subject.inputs.known_hessian, mask), mask)

    solver = LayerSolver("test", solve, full=True)
    made = prune_in_layers(
        net(), torch.ones(2, 8), "sparsity=50%", solver, data=batches(), measure=False, on_block=on_block,
        checkpoint=checkpoint,
    )  # fmt: skip
    weights = {name: parameter.detach() for name, parameter in made.model.named_parameters()}
    return weights | {f"mask {name}": mask for name, mask in made.masks.items()}, mine


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found, mine = pruned(checkpoint=Path(folder) / "kept")
    torch.save({"found": found, "mine": mine}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    alone, everything = pruned()
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(everything) == 12
    parts = [f"blocks.{block}.experts[{expert}]" for block in range(2) for expert in range(3)]
    assert sorted(name for name in everything if "[" in name) == parts
    assert sorted(both[0]["mine"] + both[1]["mine"]) == sorted(everything)
    assert both[0]["mine"]
    assert both[1]["mine"]
    for name, tensor in alone.items():
        assert torch.equal(both[0]["found"][name], both[1]["found"][name])
        if tensor.dtype == torch.bool:
            assert torch.equal(both[0]["found"][name], tensor)
        else:
            torch.testing.assert_close(both[0]["found"][name], tensor, rtol=1e-5, atol=1e-6)
    # Kept once, by the first process.
    assert len(list((tmp_path / "kept" / "blocks").iterdir())) == 2


def test_one_process_is_the_whole_world() -> None:
    gram = Gram()
    gram.add(nn.Linear(2, 1), torch.tensor([[1.0, 2.0]]))
    before = gram.hessian.clone()
    ranks.add_up(gram, (1, 2))
    assert torch.equal(gram.hessian, before)
    assert (ranks.world(), ranks.first(), ranks.rank_of(5), ranks.dealt([1, 2])) == ((0, 1), True, 0, [1, 2])


def test_too_few_batches_for_the_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: (1, 3))
    assert ranks.dealt(list(range(7))) == [1, 4]
    with pytest.raises(DataError, match="2 batches cannot be dealt to 3 processes"):
        ranks.dealt([0, 1])
