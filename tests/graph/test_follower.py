"""A run at other sizes beside its trace: hooks, and whose code it was that failed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.graph.infer import infer

rows = torch.randn(2, 8)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def test_what_hooks_do_after_a_forward_stands_in_nobodys_way() -> None:
    model = net()
    model[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    model[2].register_forward_pre_hook(lambda _module, inputs: (inputs[0].abs(),))
    model.register_forward_hook(lambda _module, _inputs, output: {"scores": output + 1})
    assert {group.name: group.size for group in infer(model, rows).groups} == {"0": 16, "2": 12}


def test_a_hook_with_a_number_fixes_the_width_that_it_touches_and_no_other() -> None:
    model = net()
    model[0].register_forward_hook(lambda _module, _inputs, output: output.view(2, 16) * 2)
    structure = infer(model, rows)
    assert [group.name for group in structure.groups] == ["2"]
    assert any(frozen.tensor == "0.weight" and "a number in the code" in frozen.reason for frozen in structure.frozen)


class Wired(nn.Module):
    """Code that refuses any other width, whose methods do not call their owner self."""

    def __init__(this) -> None:
        super().__init__()
        this.up, this.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(this, x: Tensor) -> Tensor:
        y = F.relu(this.up(x))
        if y.shape[1] != 16:
            raise ValueError("sixteen, please")
        return this.down(y)


def test_code_that_fails_is_blamed_on_its_module_whatever_that_is_called_in_it() -> None:
    structure = infer(nn.Sequential(Wired(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), rows, record=False)
    assert [group.name for group in structure.groups] == ["1"]
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert reasons["0.up.weight"] == "0 does not run at another size: ValueError: sixteen, please"


class Reading(nn.Module):
    """Reads a value, so that the model is traced on real tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.abs().sum()) > 0 else -x


class Stateful(nn.Module):
    """Has a number for the size of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x, torch.zeros(len(x), 16)))


def test_a_number_met_on_real_tensors_is_found_as_it_is_on_shapes() -> None:
    for model in (nn.Sequential(nn.Identity(), Stateful()), nn.Sequential(Reading(), Stateful())):
        structure = infer(model, rows)
        assert [group.name for group in structure.groups] == ["1.cell"]
        assert list(structure.recorded) == ["1"]
