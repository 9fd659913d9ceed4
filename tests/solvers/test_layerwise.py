"""The driver: what each layer is solved on, in which order, and what the next block sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.solvers import BlockDone, Gathering, Gram, layers_by_block, solve_blocks


class Block(nn.Module):
    """Two layers on one tensor, and one on their product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.q(x) * self.k(x))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.stem(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q", "k", "out")]


def nothing(module: nn.Module) -> tuple[Tensor, float]:
    """What a solver returns that removes nothing."""
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool), 0.0


def hessian(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return 2 * rows.T @ rows / len(rows)


def expected(model: Net, x: Tensor, factor: float, propagate: str, levels: bool) -> dict[str, Tensor]:
    """By hand: each layer's weight is multiplied by `factor` once it has been met."""
    found = {}
    with torch.no_grad():
        x = model.stem(x)
        for number, block in enumerate(model.layers):
            q, k, out = block.q.weight, block.k.weight, block.out.weight
            dense = (x @ q.T) * (x @ k.T)
            pruned = (x @ (q * factor).T) * (x @ (k * factor).T)
            found[f"layers.{number}.q"] = found[f"layers.{number}.k"] = hessian(x)
            found[f"layers.{number}.out"] = hessian(pruned if levels else dense)
            x = x + (dense @ out.T if propagate == "dense" else pruned @ (out * factor).T)
    return found


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_each_layer_is_solved_on_what_the_setting_says(propagate: str, levels: bool) -> None:
    torch.manual_seed(0)
    model = Net().double()
    data = [torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)]
    wanted = expected(model, torch.cat(data), 0.5, propagate, levels)
    seen: dict[str, Tensor] = {}

    def solve(name: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        seen[name] = gram.hessian[0]
        module.get_parameter("weight").mul_(0.5)
        return nothing(module)

    gathering = Gathering(dtype=torch.float64, propagate=propagate, levels=levels)  # type: ignore[arg-type]
    blocks: list[tuple[str, float]] = []

    def told(done: BlockDone) -> None:
        blocks.append((done.name, done.share))

    solve_blocks(model, data, layers_by_block(model, NAMES), solve, gathering, on_block=told)
    assert list(seen) == NAMES
    assert blocks == [("layers.0", 0.5), ("layers.1", 1.0)]
    for name, value in wanted.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-12, atol=1e-12)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    seen: dict[str, Tensor] = {}

    def solve(name: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        seen[name] = gram.hessian[0]
        return nothing(module)

    solve_blocks(model, [{"input_ids": x, "attention_mask": mask}], layers_by_block(model, NAMES), solve, Gathering())
    kept = model.stem(x)[mask.bool()]
    torch.testing.assert_close(seen["layers.0.q"], hessian(kept.detach()), rtol=1e-6, atol=1e-6)


def test_moments_alone_need_no_products() -> None:
    model, x = Net(), torch.randn(5, 4)

    def solve(name: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        if name == "layers.0.q":
            given = model.stem(x).double()
            torch.testing.assert_close(gram.norm[0], given.square().mean(0).sqrt())
            torch.testing.assert_close(gram.mean[0], given.mean(0))
            torch.testing.assert_close(gram.variance[0], given.var(0, correction=0))
        with pytest.raises(Exception, match="no observation"):
            _ = gram.hessian
        return nothing(module)

    solve_blocks(model, [x], layers_by_block(model, NAMES), solve, Gathering(full=False))


def test_a_layer_that_no_token_reaches_stays_with_a_warning() -> None:
    class Routed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(x)

    model = Net(1)
    model.layers[0] = Routed()
    solved: list[str] = []
    with pytest.warns(UserWarning, match=r"layers.0.q saw no token"):
        solve_blocks(
            model, [torch.randn(2, 4)], {"layers.0": ["layers.0.q", "layers.0.out"]},
            lambda name, module, gram: nothing(module), Gathering(), note=lambda name, *_: solved.append(name),
        )  # fmt: skip
    assert solved == ["layers.0.out"]


def test_a_block_that_was_solved_before_is_only_run() -> None:
    model, solved, held = Net(), list[str](), list[str]()

    @contextmanager
    def hold(name: str, block: nn.Module) -> Iterator[bool]:
        held.append(f"+{name}")
        yield name == "layers.0"
        held.append(f"-{name}")

    solve_blocks(
        model, [torch.randn(2, 4)], layers_by_block(model, NAMES), lambda name, module, gram: nothing(module),
        Gathering(), note=lambda name, *_: solved.append(name), hold=hold,
    )  # fmt: skip
    assert solved == NAMES[3:]
    assert held == ["+layers.0", "-layers.0", "+layers.1", "-layers.1"]


def test_what_is_no_number_is_refused_with_the_name_of_the_block() -> None:
    model = Net()
    with torch.no_grad():
        model.layers[1].out.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"layers.1 gives NaN or infinite values on batch 0"):
        solve_blocks(
            model,
            [torch.randn(2, 4)],
            layers_by_block(model, NAMES),
            lambda name, module, gram: nothing(module),
            Gathering(),
        )


def test_layers_outside_blocks_and_of_other_kinds_are_refused() -> None:
    model = Net()
    with pytest.raises(ModelError, match=r"stem lies in none of the blocks"):
        layers_by_block(model, ["stem"])
    with pytest.raises(ModelError, match=r"layers.0 is a Block, which is no linear layer"):
        layers_by_block(model, ["layers.0"])
    with pytest.raises(OptionError, match="propagate must be pruned or dense"):
        solve_blocks(model, [torch.randn(2, 4)], {}, lambda *_: None, Gathering(propagate="both"))  # type: ignore[arg-type]
