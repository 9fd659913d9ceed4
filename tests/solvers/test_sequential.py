"""One layer after the other: order, what each sees, and what is left of it all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import DataError, ModelError
from secateurs.solvers import Gram, call_levels, solve_in_order


class Branches(nn.Module):
    """q and k read one tensor, out reads their product; named against the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a_out, self.b_k, self.c_q, self.d_first = (nn.Linear(3, 3) for _ in range(4))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.d_first(x)
        return self.a_out(self.c_q(h) * self.b_k(h))


NAMES = ("a_out", "b_k", "c_q", "d_first")
DATA = [torch.randn(4, 3), (torch.randn(2, 3), torch.tensor([0, 1]))]


def test_levels_follow_the_calls_and_share_what_is_read() -> None:
    assert call_levels(Branches(), DATA, NAMES) == [("d_first",), ("c_q", "b_k"), ("a_out",)]
    assert call_levels(Branches(), DATA, ("a_out", "c_q")) == [("c_q",), ("a_out",)]
    assert call_levels(Branches(), DATA, ()) == []


def test_a_layer_that_only_a_later_batch_reaches_is_found() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.even(x) if len(x) % 2 == 0 else self.odd(x)

    data = [torch.randn(2, 3), torch.randn(3, 3)]
    assert call_levels(Routed(), data, ("odd", "even")) == [("even",), ("odd",)]
    with pytest.raises(ModelError, match=r"no call of odd was seen on the calibration data.*ignore="):
        call_levels(Routed(), data[:1], ("odd", "even"))


def test_each_layer_sees_what_the_solved_ones_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    data, seen = [torch.randn(5, 3), torch.randn(2, 3)], dict[str, Tensor]()

    def solve(name: str, module: nn.Module, gram: Gram) -> None:
        seen[name] = gram.hessian[0]
        with torch.no_grad():
            module.weight.mul_(2)

    solve_in_order(model, data, ["2", "0", "1"], solve)
    assert list(seen) == ["0", "1", "2"]
    x = torch.cat(data)
    for name in seen:
        torch.testing.assert_close(seen[name], 2 / 7 * (x.T @ x).double(), rtol=1e-5, atol=1e-5)
        x = model[int(name)](x).detach()


def test_a_layer_called_twice_is_solved_once_for_both() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(3, 3)
    model, x, counts = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 3), []
    solve_in_order(model, [x], ["0"], lambda name, module, gram: counts.append((name, gram.count)))
    assert counts == [("0", 8)]


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = Branches()

    def fails(name: str, module: nn.Module, gram: Gram) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match="d_first"):
        solve_in_order(model, DATA, NAMES, fails)
    with pytest.raises(RuntimeError):
        solve_in_order(model, [torch.randn(2, 5)], NAMES, fails)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 3)).train()
    x, found = torch.ones(50, 3), list[Tensor]()
    solve_in_order(model, [x], ["1"], lambda name, module, gram: found.append(gram.hessian))
    assert found[0].tolist() == [[[2.0] * 3] * 3]


def test_no_data_is_an_error() -> None:
    for nothing in ([], iter(())):
        with pytest.raises(DataError, match="the calibration data is empty"):
            call_levels(Branches(), nothing, NAMES)
