"""N:M training: the straight-through gradient, its pull, and the pattern at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.state import flatten, read_state, write_state
from secateurs.train import SRSTE, Masks, Pruner


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Optimizer, pruner: Pruner, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        pruner.step()


def pattern_of(weight: Tensor, keep: int, of: int) -> Tensor:
    """The slow twin: every `of` consecutive inputs sorted by |w|, earlier first among equals."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], of):
            places = sorted(range(start, start + of), key=lambda i: -abs(float(weight[row, i])))
            mask[row, places[:keep]] = True
    return mask


@pytest.mark.parametrize("pull", [0.0, 2e-4, 0.1])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 1e-2)])
def test_training_is_the_equation_written_out(pull: float, momentum: float, decay: float) -> None:
    """Dense weights kept by hand, their sparse copies in the model, and momentum SGD on the dense ones."""
    model, twin = net(), net()
    optimizer = SGD(model.parameters(), 0.2, momentum=momentum, weight_decay=decay)
    pruner = SRSTE(model, optimizer, pattern="2:4", pull=pull)
    dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in dense.items()}
    for step in range(25):
        masks = {name: pattern_of(w, 2, 4) for name, w in dense.items() if w.dim() == 2}
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(dense[name] * masks[name] if name in masks else dense[name])
        assert all(torch.equal(pruner.masks[name], mask) for name, mask in masks.items())
        for name, p in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p)
        gradients = torch.autograd.grad(loss(twin, step), list(twin.parameters()))
        for name, gradient in zip(dense, gradients, strict=True):
            pulled = pull * dense[name] * ~masks[name] if name in masks else 0
            speed[name] = momentum * speed[name] + gradient + pulled + decay * dense[name]
            dense[name] = dense[name] - 0.2 * speed[name]
        train(model, optimizer, pruner, 1, step)


def test_the_pattern_changes_while_training_and_a_pull_steadies_it() -> None:
    def flips(pull: float) -> int:
        model = net()
        optimizer = SGD(model.parameters(), 0.3)
        pruner = SRSTE(model, optimizer, pull=pull)
        count = 0
        for step in range(60):
            before = pruner.masks["0.weight"].clone()
            train(model, optimizer, pruner, 1, step)
            count += int((before ^ pruner.masks["0.weight"]).sum())
        return count

    assert flips(0.0) > flips(0.5) > 0


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4)]), st.sampled_from([SGD, Adam]), st.integers(0, 99))
def test_every_run_of_inputs_keeps_its_count_at_every_step(
    pattern: tuple[int, int], optimizer: type[Optimizer], seed: int
) -> None:
    keep, of = pattern
    model = net(seed)
    made = optimizer(model.parameters(), lr=0.05)
    pruner = SRSTE(model, made, pattern=f"{keep}:{of}", debug=True)
    for step in range(4):
        for name in ("0.weight", "2.weight"):
            weight = model.get_parameter(name)
            assert ((weight.view(-1, of) != 0).sum(1) == keep).all()
            assert torch.equal(weight != 0, pruner.masks[name])
        train(model, made, pruner, 1, step)


def test_kernels_have_patterns_along_their_inputs() -> None:
    model = nn.Conv2d(8, 4, 3)
    pruner = SRSTE(model, SGD(model.parameters(), 0.1))
    runs = pruner.masks["weight"].view(4, 2, 4, 3, 3).sum(2)
    assert (runs == 2).all()


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Optimizer, Pruner]:
        model = net()
        optimizer = SGD(model.parameters(), 0.2, momentum=0.9)
        return model, optimizer, SRSTE(model, optimizer)

    whole, resumed = built(), built()
    train(*whole, 7)
    write_state(tmp_path / "state", {str(i): part.state_dict() for i, part in enumerate(whole)})
    stored = read_state(tmp_path / "state")
    for i, part in enumerate(resumed):
        part.load_state_dict(stored[str(i)])
    for parts in (whole, resumed):
        train(*parts, 8, first=7)
    for one, other in zip(whole, resumed, strict=True):
        ours, theirs = flatten(one.state_dict()), flatten(other.state_dict())
        assert ours[1] == theirs[1]
        assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in ours[0].items())


def test_finalize_leaves_the_sparse_model() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.2)
    pruner = SRSTE(model, optimizer, pattern="1:4")
    train(model, optimizer, pruner, 3)
    masks = pruner.finalize()
    assert pruner.sparsity == 0.75
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert not optimizer._optimizer_step_pre_hooks


def test_layers_that_the_pattern_does_not_divide_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    assert set(SRSTE(model, SGD(model.parameters(), 0.1)).masks) == {"0.weight"}
    with pytest.raises(OptionError, match=r"2:4 needs a number of inputs that 4 divides; 1.weight has 6"):
        SRSTE(model, SGD(model.parameters(), 0.1), scope="*")
    with pytest.raises(OptionError, match=r"1:5 needs a number of inputs that 5 divides; 0.weight has 8"):
        SRSTE(model, SGD(model.parameters(), 0.1), pattern="1:5")


def test_what_makes_no_sense_is_refused() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(BudgetError, match=r"SR-STE needs a pattern such as '2:4', got 'sparsity=50%'"):
        SRSTE(model, optimizer, pattern="sparsity=50%")
    with pytest.raises(OptionError, match=r"pull must be 0 or more, .* got -1"):
        SRSTE(model, optimizer, pull=-1)
    with pytest.raises(OptionError, match=r"and 0 with revive='never', got 0.1"):
        Masks(model, {}, pull=0.1)
    pruner = SRSTE(model, optimizer)
    with pytest.raises(OptionError, match=r"revive='straight-through' needs optimizer.step without a closure"):
        optimizer.step(lambda: loss(model, 0))
    pruner.finalize()
