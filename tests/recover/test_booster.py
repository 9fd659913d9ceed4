"""SLoRB: the branch beside a pruned matrix, against matrix algebra."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateurs as sec
from secateurs.core.errors import ModelError, OptionError
from secateurs.deploy.formats import is_sparse_layer, unfit
from secateurs.deploy.store import load_model, save_model
from secateurs.recover import booster as module
from secateurs.recover.booster import BoostedLinear, Booster, block_start, boost, boosters_of, fold


def sums(inputs: int, run: int) -> Tensor:
    """P by its definition: ones at inputs r·k … r·k + k - 1 of row r."""
    return torch.tensor([[float(r * run <= j < (r + 1) * run) for j in range(inputs)] for r in range(inputs // run)])


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), Conv1D(6, 12), nn.ReLU(), nn.Linear(6, 4)).double()


def masks(model: nn.Module, names: tuple[str, ...] = ("0.weight", "2.weight")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) > 0.6 for name in names}


def pruned(train_projection: bool = False, run: int = 4) -> tuple[nn.Sequential, nn.Sequential, dict[str, Tensor]]:
    dense, kept = net(), masks(net())
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)
    boost(model, dense, kept, run=run, train_projection=train_projection)
    return dense, model, kept


# -- the start ---------------------------------------------------------------------------------------------------------


def test_means_and_sums_of_runs() -> None:
    lost = torch.tensor([[2.0, 0.0, 0.0, 4.0], [0.0, 0.0, -3.0, -5.0]])
    assert block_start(lost, 2).tolist() == [[1.0, 2.0], [0.0, -4.0]]
    assert block_start(lost, 2, "sum").tolist() == [[2.0, 4.0], [0.0, -8.0]]
    assert block_start(lost, 4).tolist() == [[1.5], [-2.0]]
    # 256 and 255 ones add up in float64 to what float16 cannot hold.
    assert block_start(torch.full((1, 512), 200.0, dtype=torch.float16), 512).item() == 200


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]), st.integers(0, 10**6))
def test_the_mean_is_the_least_squares_solution_and_never_adds_error(
    rows: int, blocks: int, run: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, blocks * run, generator=generator, dtype=torch.float64)
    lost = weight * (torch.rand(weight.shape, generator=generator) > 0.5)
    projection = sums(blocks * run, run).double()
    start = block_start(lost, run)
    wanted = torch.linalg.lstsq(projection.T, lost.T).solution.T
    torch.testing.assert_close(start, wanted, rtol=0, atol=1e-14)
    error = (lost - start @ projection).norm()
    assert error <= lost.norm() + 1e-14
    assert error <= (lost - (start + 0.01) @ projection).norm() + 1e-14
    assert error <= (lost - block_start(lost, run, "sum") @ projection).norm() + 1e-14


def test_a_sum_is_too_large() -> None:
    lost = torch.ones(1, 8)
    projection = sums(8, 4)
    assert float((lost - block_start(lost, 4) @ projection).norm()) == 0
    assert float((lost - block_start(lost, 4, "sum") @ projection).norm()) == pytest.approx(3 * 8**0.5)


def test_inputs_that_are_equal_in_each_run_get_the_dense_output() -> None:
    dense, model, kept = pruned()
    for place, name in ((0, "0.weight"), (2, "2.weight")):
        inputs = dense.get_parameter(name).shape[int(name == "0.weight")]
        given = torch.randn(5, inputs // 4, dtype=torch.float64).repeat_interleave(4, 1)
        torch.testing.assert_close(model[place](given), dense[place](given), rtol=0, atol=1e-14)
        bare = copy.deepcopy(dense[place])
        bare.weight.data *= kept[name]
        assert float((bare(given) - dense[place](given)).detach().abs().max()) > 0.1


# -- the branch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_projection", [False, True])
def test_a_boosted_layer_is_the_formula(train_projection: bool) -> None:
    dense, model, kept = pruned(train_projection)
    found = boosters_of(model)
    assert set(found) == {"0", "2"}
    for place, name, matrix in ((0, "0.weight", dense[0].weight), (2, "2.weight", dense[2].weight.T)):
        mask = kept[name] if place == 0 else kept[name].T
        projection = sums(matrix.shape[1], 4).double()
        start = (matrix * ~mask).unflatten(1, (-1, 4)).mean(-1)
        torch.testing.assert_close(found[str(place)].up, nn.Parameter(start.detach()))
        given = torch.randn(3, 5, matrix.shape[1], dtype=torch.float64)
        wanted = given @ (matrix * mask).T + given @ projection.T @ start.T + dense[place].bias
        torch.testing.assert_close(model[place](given), wanted)
        torch.testing.assert_close(found[str(place)].product, start @ projection)
    trained = {name for name, p in model.named_parameters() if "booster" in name and p.requires_grad}
    wanted_names = {"0.booster.up", "2.booster.up"}
    assert trained == wanted_names | ({"0.booster.down", "2.booster.down"} if train_projection else set())


def test_gradients_reach_both_matrices() -> None:
    _, model, _ = pruned(train_projection=True)
    with torch.no_grad():
        model[0].booster.down.add_(0.1)
    given = torch.randn(7, 8, dtype=torch.float64)
    up, down = (getattr(model[0].booster, name).detach().clone().requires_grad_() for name in ("up", "down"))
    (given @ down.T @ up.T + given @ model[0].weight.T + model[0].bias).pow(2).sum().backward()
    model[0](given).pow(2).sum().backward()
    torch.testing.assert_close(model[0].booster.up.grad, up.grad)
    torch.testing.assert_close(model[0].booster.down.grad, down.grad)


def test_names_bits_and_the_rest_of_the_model_stay() -> None:
    dense = net()
    model = copy.deepcopy(dense)
    layer, before = model[0], {name: p.tolist() for name, p in dense.state_dict().items()}
    boost(model, dense, masks(model, ("0.weight",)), run=2)
    assert model[0] is layer
    assert isinstance(layer, BoostedLinear)
    assert isinstance(layer.booster, Booster)
    assert str(layer.booster) == "Booster(run=2, rank=4)"
    after = model.state_dict()
    assert {name: after[name].tolist() for name in before} == before
    assert set(after) - set(before) == {"0.booster.up"}
    assert type(model[2]) is Conv1D


def test_half_precision_trains_its_branch_in_float32() -> None:
    dense = net().bfloat16()
    model = copy.deepcopy(dense)
    found = boost(model, dense, masks(model), run=4)
    assert {b.up.dtype for b in found.values()} == {torch.float32}
    assert model(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_its_branch(tmp_path: Path) -> None:
    _, model, _ = pruned()
    given = torch.randn(4, 8, dtype=torch.float64)
    save_model(model, tmp_path / "saved")
    back = load_model(tmp_path / "saved")
    assert torch.equal(back(given), model(given))
    assert set(boosters_of(back)) == {"0", "2"}


@pytest.mark.parametrize("train_projection", [False, True])
def test_folding_adds_what_the_masks_let_stay(train_projection: bool) -> None:
    _, model, kept = pruned(train_projection)
    wanted = {
        "0.weight": (model[0].weight + model[0].booster.product) * kept["0.weight"],
        "2.weight": (model[2].weight + model[2].booster.product.T) * kept["2.weight"],
    }
    assert fold(model, kept) == ("0", "2")
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight.detach())
        assert torch.equal(model.get_parameter(name) != 0, kept[name])
    assert [type(layer) for layer in model] == [type(layer) for layer in net()]
    assert boosters_of(model) == {}
    assert set(model.state_dict()) == set(net().state_dict())
    assert model(torch.randn(2, 8, dtype=torch.float64)).shape == (2, 4)


def test_folding_without_masks_keeps_the_function() -> None:
    _, model, _ = pruned()
    given = torch.randn(4, 8, dtype=torch.float64)
    before = model(given)
    fold(model, {})
    torch.testing.assert_close(model(given), before)
    assert bool((model[0].weight != 0).all())


def test_it_follows_any_one_shot_mask() -> None:
    dense = net().float()
    inputs, data = torch.randn(2, 8), [torch.randn(6, 8)]
    options: dict[str, Any] = {"measure": False, "ignore": ("2", "4")}
    made = sec.prune(dense, inputs, "2:4", method="wanda", data=data, **options)
    boost(made.model, dense, made.masks, run=2)
    lost = (dense[0].weight * ~made.masks["0.weight"]).detach()
    left = lost - made.model[0].booster.product
    assert left.norm() < lost.norm()


def test_no_sparse_form_runs_without_the_branch() -> None:
    _, model, _ = pruned()
    assert not is_sparse_layer(model[0])
    assert unfit(model[2], 0.5) == "it has a branch beside its weight, which another form would not run"


def test_what_makes_no_sense_is_refused() -> None:
    dense = net()
    kept = masks(dense)
    with pytest.raises(OptionError, match=r"over runs of 3 needs inputs that 3 divides; 0\.weight has 8"):
        boost(copy.deepcopy(dense), dense, kept, run=3)
    model, conv = copy.deepcopy(dense), nn.Conv2d(4, 4, 3)
    with pytest.raises(OptionError, match=r"over runs of 8 needs inputs that 8 divides; 2\.weight has 12"):
        boost(model, dense, kept, run=8)
    assert boosters_of(model) == {}
    with pytest.raises(OptionError, match=r"runs of 3 needs inputs that 3 divides, got 4"):
        block_start(torch.ones(1, 4), 3)
    with pytest.raises(OptionError, match="start of a booster"):
        block_start(torch.ones(1, 4), 2, "men")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no pruned layer of Conv2d is a Linear or a Conv1D"):
        boost(conv, conv, {"weight": torch.ones(4, 4, 3, 3, dtype=torch.bool)})
    boost(model, dense, kept, run=4)
    with pytest.raises(ModelError, match="0 has a booster already, which must be folded first"):
        boost(model, dense, kept, run=4)


def test_the_library_knows_the_boosted_layer_of_hugging_face_by_its_name() -> None:
    _, model, kept = pruned()
    assert type(model[2]) is module.Conv1D
    names = sec.plan(model, torch.randn(2, 8, dtype=torch.float64), "sparsity=50%", granularity="weight").keep
    assert set(kept) <= set(names)
