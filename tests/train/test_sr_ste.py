"""N:M training: the straight-through gradient, its pull, and the pattern at every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.core.errors import BudgetError, OptionError
from secateurs.core.state import flatten, read_state, write_state
from secateurs.train import SRSTE, Masks, Pruner
from secateurs.train.sr_ste import Annealed, Compared, Every, Flips, flips_of, straight_through


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


# -- what AST does with it ---------------------------------------------------------------------------------------------

TWO_OF_FOUR = Comparison.of(Pattern(2, 4))


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def hidden(pruner: Pruner, model: nn.Module, name: str) -> Tensor:
    """The dense weight that waits."""
    with pruner.masks.revealed():
        return model.get_parameter(name).detach().clone()


def test_the_pull_of_the_specification() -> None:
    pull = Annealed(1e-4, 10_000)
    assert pull(0) == 0
    assert pull(5_000) == 5e-5
    assert [pull(step) for step in (10_000, 10_001, 10**6)] == [1e-4] * 3
    assert Annealed(0.5, 0)(0) == 0.5
    for wrong in ((-1.0, 5), (float("nan"), 5), (1.0, -5)):
        with pytest.raises(OptionError, match="a pull and the steps in which it rises must be 0 or more"):
            Annealed(*wrong)


def test_masks_are_due_at_the_start_and_every_so_often_until_there_is_no_time_left() -> None:
    def due(*settings: int | None) -> list[int]:
        return [step for step in range(25) if Every(0.5, *settings).due(step)]

    assert due() == list(range(25))
    assert due(10) == [0, 10, 20]
    assert due(10, 19) == [0, 10]
    assert due(30) == due(None) == due(10, -1) == [0]
    with pytest.raises(OptionError, match="masks change every 1 step or more, or never with every=None; got 0"):
        SRSTE(net(), SGD(net().parameters(), 0.1), every=0)


def test_a_pruned_weight_decays_and_a_kept_one_does_not() -> None:
    """No gradient, W = 1, λ = 0.1, a rate of 0.5: 0.95 where the mask is 0, 1 where it is 1."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = SGD(layer.parameters(), 0.5)
    pruner = SRSTE(layer, optimizer, pattern="1:2", pull=Annealed(0.1, 0), every=10)
    assert pruner.masks["weight"].tolist() == [[True, False]]
    (layer(torch.ones(1, 2)) * 0).sum().backward()
    optimizer.step()
    pruner.step()
    torch.testing.assert_close(hidden(pruner, layer, "weight"), torch.tensor([[1.0, 0.95]]))
    assert layer.weight.tolist() == [[1.0, 0.0]]
    # The complement of an integer mask makes both grow instead.
    mask = torch.tensor([0, 1], dtype=torch.int32)
    torch.testing.assert_close(1 - 0.5 * 0.1 * ~mask, torch.tensor([1.05, 1.10]))


@pytest.mark.parametrize("comparison", [TWO_OF_FOUR, Comparison(0.75, "row")], ids=str)
def test_ast_is_the_equation_written_out(comparison: Comparison) -> None:
    """AdamW by hand on dense weights: the pull is a part of the gradient, masks come from |w|·‖x‖ every third step."""
    model, twin = net().double(), net().double()
    norms = {"0.weight": torch.linspace(1, 3, 8).double()[None], "2.weight": torch.linspace(3, 1, 12).double()[None]}
    optimizer = AdamW(model.parameters(), 0.05, betas=(0.9, 0.95), weight_decay=0.1)
    pruner = straight_through(
        model, optimizer, matrices(model), comparison, pull=Annealed(0.3, 8), every=3, until=12, norms=norms
    )
    dense = {name: p.detach().clone() for name, p in twin.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in dense.items()} for _ in range(2))
    masks: dict[str, Tensor] = {}
    for step in range(20):
        if step % 3 == 0 and step <= 12:
            scores = {name: dense[name].abs() * norm for name, norm in norms.items()}
            if comparison.pattern:
                masks = {name: pattern_of(s, 2, 4) for name, s in scores.items()}
            else:
                masks = {n: s.argsort(1, descending=True).argsort(1) < s.shape[1] // 4 for n, s in scores.items()}
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(dense[name] * masks[name] if name in masks else dense[name])
        for name, p in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p)
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 8, generator=generator).double(), torch.randint(0, 4, (16,), generator=generator)
        gradients = torch.autograd.grad(nn.functional.cross_entropy(twin(x), y), list(twin.parameters()))
        for name, g in zip(dense, gradients, strict=True):
            if name in masks:
                g = g + 0.3 * min(step / 8, 1) * dense[name] * ~masks[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            first, second = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            dense[name] = dense[name] * (1 - 0.05 * 0.1) - 0.05 * first / (second.sqrt() + 1e-8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def test_the_gradient_is_that_of_the_masked_weight_also_where_the_mask_is_zero() -> None:
    model = net().double()
    pruner = straight_through(model, SGD(model.parameters(), 0.1), matrices(model), TWO_OF_FOUR)
    masked = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in ("0.weight", "2.weight")}
    x = torch.randn(5, 8, dtype=torch.float64)
    inner = torch.tanh(x @ masked["0.weight"].T + model[0].bias)
    (inner @ masked["2.weight"].T + model[2].bias).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    for name, weight in masked.items():
        torch.testing.assert_close(model.get_parameter(name).grad, weight.grad)
        assert bool((weight.grad[~pruner.masks[name]] != 0).all())


@given(st.sampled_from([TWO_OF_FOUR, Comparison(0.5, "row")]), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_counts_are_exact_after_every_refresh_and_masks_rest_in_between(
    comparison: Comparison, every: int, seed: int
) -> None:
    model = net(seed)
    optimizer = Adam(model.parameters(), 0.05)
    pruner = straight_through(
        model, optimizer, matrices(model), comparison, pull=Annealed(0.1, 4), every=every, debug=True
    )
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    for step in range(1, 9):
        train(model, optimizer, pruner, 1, step)
        for name, mask in pruner.masks.items():
            rows = mask.view(-1, 4) if comparison.pattern else mask
            assert (rows.sum(1) == rows.shape[1] // 2).all()
            assert torch.equal(model.get_parameter(name) != 0, mask)
            if step % every:
                assert torch.equal(mask, before[name])
            before[name] = mask.clone()


def test_flips_are_counted_against_the_masks_before_and_the_first() -> None:
    model = net()
    optimizer = Adam(model.parameters(), 0.05)
    pruner = straight_through(model, optimizer, matrices(model), TWO_OF_FOUR, every=2, counted=True)
    assert flips_of(pruner) == ()
    seen = [{name: mask.clone() for name, mask in pruner.masks.items()}]
    for step in range(1, 7):
        train(model, optimizer, pruner, 1, step)
        if step % 2 == 0:
            seen.append({name: mask.clone() for name, mask in pruner.masks.items()})

    def differing(a: int, b: int) -> int:
        return sum(int((seen[a][name] != seen[b][name]).sum()) for name in seen[0])

    wanted = tuple(Flips(2 * i, differing(i, i - 1), differing(i, 0)) for i in (1, 2, 3))
    assert flips_of(pruner) == wanted
    assert wanted[0].previous > 0
    pruner.finalize()
    assert flips_of(pruner) == wanted


def test_nothing_flips_where_nothing_moves_and_ties_go_to_the_earlier() -> None:
    model = net()
    for p in matrices(model).values():
        nn.init.constant_(p, 0.5)
    optimizer = SGD(model.parameters(), 0.0)
    pruner = straight_through(model, optimizer, matrices(model), TWO_OF_FOUR, every=1, counted=True)
    train(model, optimizer, pruner, 4)
    assert flips_of(pruner) == tuple(Flips(step, 0, 0) for step in (1, 2, 3, 4))
    for mask in pruner.masks.values():
        assert (mask.view(-1, 4) == torch.tensor([True, True, False, False])).all()


def test_a_stronger_pull_lets_fewer_entries_flip() -> None:
    def flips(pull: float) -> int:
        model = net()
        optimizer = SGD(model.parameters(), 0.3)
        pruner = straight_through(
            model, optimizer, matrices(model), TWO_OF_FOUR, pull=Annealed(pull, 15), every=3, counted=True
        )
        train(model, optimizer, pruner, 60)
        return sum(one.previous for one in flips_of(pruner)[5:])

    assert flips(0.0) > flips(0.5)


def test_counted_masks_resume_bit_for_bit(tmp_path: Path) -> None:
    def built() -> tuple[nn.Module, Optimizer, Pruner]:
        model = net()
        optimizer = AdamW(model.parameters(), 0.05)
        pruner = straight_through(
            model, optimizer, matrices(model), TWO_OF_FOUR, pull=Annealed(0.1, 9), every=2, counted=True
        )
        return model, optimizer, pruner

    for stop in (1, 7):
        whole, resumed = built(), built()
        train(*whole, stop)
        write_state(tmp_path / "state", {str(i): part.state_dict() for i, part in enumerate(whole)})
        stored = read_state(tmp_path / "state")
        for i, part in enumerate(resumed):
            part.load_state_dict(stored[str(i)])
        for parts in (whole, resumed):
            train(*parts, 5, first=stop)
        assert flips_of(whole[2]) == flips_of(resumed[2])
        for name, weight in whole[0].state_dict().items():
            assert torch.equal(weight, resumed[0].state_dict()[name])


class Conv1D(nn.Module):
    """The shape of Hugging Face's layer: weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def test_patterns_run_along_inputs_where_these_come_first() -> None:
    model = Conv1D(8, 6)
    dense = model.weight.detach().clone()
    pruner = straight_through(model, SGD(model.parameters(), 0.1), matrices(model), TWO_OF_FOUR)
    assert torch.equal(pruner.masks["weight"].T, pattern_of(dense.T, 2, 4))
    other = Conv1D(6, 8)
    with pytest.raises(OptionError, match="2:4 needs a number of inputs that 4 divides; weight has 6"):
        straight_through(other, SGD(other.parameters(), 0.1), matrices(other), TWO_OF_FOUR)


@pytest.mark.parametrize("axis", [1, 2])
def test_patterns_run_along_the_inputs_of_stacked_experts(axis: int) -> None:
    model = nn.Module()
    model.experts, model.is_transposed = nn.Parameter(torch.randn(3, 8, 12)), axis == 1
    dense = model.experts.detach().clone()
    pruner = straight_through(model, SGD(model.parameters(), 0.1), {"experts": model.experts}, TWO_OF_FOUR)
    rows = dense.movedim(axis, -1)
    expected = torch.stack([pattern_of(one, 2, 4) for one in rows])
    assert torch.equal(pruner.masks["experts"].movedim(axis, -1), expected)


def test_scores_of_half_precision_are_wider() -> None:
    """1 and 1.0078125 are neighbours in bfloat16; times 1.003 they would be equal there."""
    weight = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    rule = Compared(Comparison.of(Pattern(1, 2)), {"w": torch.tensor([[1.01, 1.003]])})
    assert (weight * torch.tensor([[1.01, 1.003]]).bfloat16()).unique().numel() == 1
    assert rule.keep("w", weight).tolist() == [[False, True]]


def test_rows_of_kernels_are_compared_whole() -> None:
    weight = torch.tensor([[[4.0, 1.0], [2.0, 3.0]], [[1.0, 2.0], [4.0, 3.0]]])
    kept = Compared(Comparison(0.5, "row")).keep("w", weight)
    assert kept.tolist() == [[[True, False], [False, True]], [[False, False], [True, True]]]
