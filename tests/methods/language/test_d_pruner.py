"""D-Pruner: general importance, the fine-tuning that is thrown away, and a mask on the weights where it began."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.budget import Budget
from secateurs.core.comparison import Comparison
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.core.state import read_state
from secateurs.methods.language.d_pruner import DPruner, dual_importance, general_importance, masks_of
from secateurs.recover.finetune import fine_tune
from secateurs.to_solve import layers_to_solve

INPUTS = torch.zeros(2, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LAYERS = [f"blocks.{i}.{n}" for i in range(2) for n in ("up", "down")]
WEIGHTS = [f"{layer}.weight" for layer in LAYERS]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(seed: int = 1, shift: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 8, generator=generator) + shift for _ in range(3)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


def run(model: nn.Module | None = None, budget: str = "sparsity=50%", **changes: Any) -> sec.Pruned:
    how = DPruner(**{"epochs": 2, **changes.pop("how", {})})
    given = {"data": batches(), "general": batches(5, 1.0), "measure": False, **changes}
    return sec.prune(net() if model is None else model, INPUTS, budget, method="d-pruner", options=how, **given)


class Forbidden:
    """Batches that nobody may look at."""

    def __iter__(self) -> Any:
        raise AssertionError("open-domain data were read")


# -- general importance ------------------------------------------------------------------------------------------------


def test_general_importance_is_what_sparsegpt_ranks_by() -> None:
    model, data = net(), batches(5)
    found = general_importance(model, data, "sparsity=50%")
    x = torch.cat([x for x, _ in data]).double()
    hessian = 2 / len(x) * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(8)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    expected = model.blocks[0].up.weight.detach().double() ** 2 / upper.diagonal() ** 2
    torch.testing.assert_close(found["blocks.0.up.weight"].double(), expected, rtol=1e-4, atol=0)
    assert list(found) == WEIGHTS
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))


def test_later_blocks_see_what_the_budget_left_of_those_before() -> None:
    half, few = (general_importance(net(), batches(5), f"sparsity={s}%") for s in (50, 90))
    dense = general_importance(net(), batches(5), "sparsity=90%", options=DPruner(propagate="dense"))
    assert torch.equal(half["blocks.0.up.weight"], few["blocks.0.up.weight"])
    assert not torch.equal(half["blocks.1.up.weight"], few["blocks.1.up.weight"])
    assert not torch.equal(dense["blocks.1.up.weight"], few["blocks.1.up.weight"])


def test_a_small_block_is_chosen_on_weights_that_have_moved() -> None:
    whole, parts = (general_importance(net(), batches(5), options=DPruner(block=b))[WEIGHTS[0]] for b in (128, 4))
    assert torch.equal(whole[:, :4], parts[:, :4])
    assert not torch.equal(whole[:, 4:], parts[:, 4:])


def test_grouped_convolutions_and_transposed_matrices_keep_their_shapes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.turned = transformers.pytorch_utils.Conv1D(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.turned(self.grouped(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Mixed()
    data = [(torch.randn(4, 4, 6, 6), torch.randint(5, (4,))) for _ in range(2)]
    found = general_importance(model, data)
    assert {name: g.shape for name, g in found.items()} == {n: model.get_parameter(n).shape for n in found}
    made = sec.prune(model, data[0][0], "sparsity=50%", method="d-pruner", data=data, general=found, measure=False,
                     options=DPruner(epochs=1, blocks=4))  # fmt: skip
    # The inputs of the transposed matrix are its rows.
    assert made.masks["turned.weight"].sum(1).tolist() == [2, 3, 3, 2]
    assert made.masks["grouped.weight"].flatten(1).view(2, -1).sum(1).tolist() == [18, 18]


# -- the mask ----------------------------------------------------------------------------------------------------------


def test_what_stays_is_bit_for_bit_as_it_was() -> None:
    model, made = net(), run()
    for name, parameter in made.model.named_parameters():
        before = model.get_parameter(name)
        assert torch.equal(parameter, before * made.masks[name] if name in made.masks else before)
    assert list(made.masks) == WEIGHTS
    assert {int(mask.sum()) for mask in made.masks.values()} == {48}
    assert made.report.recipe["dual"]["of_all_parameters"] == 4 * 48 / sum(p.numel() for p in model.parameters())


def test_the_highest_dual_importance_stays() -> None:
    general = general_importance(net(), batches(5, 1.0), "sparsity=50%")
    found = dual_importance(net(), batches(), general, options=DPruner(epochs=2))
    made = run()
    for name in WEIGHTS:
        scores, mask = found.scores[name], made.masks[name]
        assert float(scores[~mask].max()) < float(scores[mask].min())
        assert torch.equal(made.plan.scores[name], scores.flatten())
    assert found.steps == made.report.recipe["dual"]["steps"] == 6
    assert run(general=general).plan.same_as(made.plan)


def test_runs_of_columns_have_the_same_share_each() -> None:
    made = run(how={"blocks": 4})
    whole = run()
    for name, mask in made.masks.items():
        shares = [float(part.float().mean()) for part in mask.chunk(4, 1)]
        assert shares == [0.5] * 4
        assert int(mask.sum()) == int(whole.masks[name].sum())
    assert any([float(p.float().mean()) for p in m.chunk(4, 1)] != [0.5] * 4 for m in whole.masks.values())


def test_a_pattern_holds_in_every_group() -> None:
    for mask in run(budget="2:4").masks.values():
        assert mask.view(-1, 4).sum(1).unique().tolist() == [2]


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(OptionError, match="needs a number of inputs that 5 divides"):
        run(budget="1:5", scope="*.up")


def test_another_budget_comes_from_the_same_scores() -> None:
    made = run()
    again = made.plan.rebudget("sparsity=75%")
    direct = masks_of(net(), {n: s.view(net().get_parameter(n).shape) for n, s in made.plan.scores.items()},
                      dict.fromkeys(LAYERS, Comparison(0.75)))  # fmt: skip
    assert {n: m.tolist() for n, m in again.masks(net()).items()} == {n: m.tolist() for n, m in direct.items()}


def test_an_allocation_says_how_much_of_which_layer() -> None:
    given = dict(zip(LAYERS, (0.25, 0.5, 0.75, 0.5), strict=True))
    made = run(allocation="given", allocation_options={"densities": given})
    assert [float(mask.float().mean()) for mask in made.masks.values()] == [0.25, 0.5, 0.75, 0.5]


def test_half_of_all_parameters_is_52_per_cent_of_the_layers_of_llama2_7b() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    layers = layers_to_solve(model, Budget.parse("sparsity=52%"), "matrix")
    linear = sum(model.get_submodule(name).weight.numel() for name in layers)
    total = sum(p.numel() for p in model.parameters())
    assert (linear, total) == (6_476_005_376, 6_738_415_616)
    assert layers["model.layers.0.mlp.up_proj"].removed * linear / total == pytest.approx(0.49975, abs=5e-6)


# -- domain and general ------------------------------------------------------------------------------------------------


def test_without_strength_only_the_domain_is_asked() -> None:
    alone = run(how={"strength": 0.0}, general=Forbidden())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(how={"strength": 0.0}, general=None).plan.same_as(alone.plan)
    assert not run(how={"strength": 0.0}, data=batches(9)).plan.same_as(alone.plan)
    assert alone.report.recipe["dual"]["penalty"] == 0


def test_strength_turns_the_mask_towards_the_general_importance() -> None:
    general = general_importance(net(), batches(5, 1.0), "sparsity=50%")
    target = masks_of(net(), general, dict.fromkeys(LAYERS, Comparison(0.5)))

    def agreement(strength: float) -> float:
        made = run(general=general, how={"strength": strength, "form": "sum"})
        return sum(int((made.masks[n] & target[n]).sum()) for n in WEIGHTS) / (4 * 48)

    none, some, much = (agreement(s) for s in (0.0, 1.0, 30.0))
    assert none < some < much


def test_the_penalty_is_measured_and_one_without_effect_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"changed the gradients by \de-\d\d of their size.* or take form='sum'"):
        slight = run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strong = run(how={"fisher_scale": 1e6})
        added = run(how={"form": "sum"})
    told = [made.report.recipe["dual"] for made in (slight, strong, added)]
    assert 0 < told[0]["penalty"] < 1e-3 < told[1]["penalty"]
    assert (told[2]["penalty"], told[0]["third"]) == (0, 0)


def test_a_sum_is_of_a_plain_training_and_the_general_importance() -> None:
    general = general_importance(net(), batches(5, 1.0))
    plain = dual_importance(net(), batches(), general, options=DPruner(epochs=2, strength=0.0))
    both = dual_importance(net(), batches(), general, options=DPruner(epochs=2, strength=0.5, form="sum"))
    for name, g in general.items():
        expected = plain.scores[name] / plain.scores[name].mean() + 0.5 * g / g.mean()
        torch.testing.assert_close(both.scores[name], expected)
    assert both.to_dict() == plain.to_dict()


def test_without_open_domain_data_the_domain_s_serve_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no general= data: the domain's data tell"):
        alone = run(general=None)
    assert alone.plan.same_as(run(general=batches()).plan)


def test_a_long_way_from_the_weights_that_are_masked_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"moved the weights by \d+% of their size, .* lower lr \(3\) or epochs \(2\)"):
        far = run(how={"lr": 3.0})
    near = run()
    assert near.report.recipe["dual"]["distance"] < 0.1 < far.report.recipe["dual"]["distance"]


def test_the_distance_is_that_of_the_tuned_copy() -> None:
    model, tuned = net(), net()
    found = dual_importance(model, batches(), {}, options=DPruner(epochs=1, strength=0.0), names=WEIGHTS)
    fine_tune(tuned, batches(), epochs=1, lr=0.03, optimizer=torch.optim.SGD, schedule="linear-warmup", clip_norm=1.0)
    pairs = [(model.get_parameter(n).detach(), tuned.get_parameter(n).detach()) for n in WEIGHTS]
    moved, whole = sum(float((a - b).square().sum()) for a, b in pairs), sum(float(a.square().sum()) for a, _ in pairs)
    assert found.distance == pytest.approx((moved / whole) ** 0.5, rel=1e-4)


def test_importance_that_is_mostly_cubed_weights_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="W³ is the largest part of the importance"):
        run(how={"form": "released"}, loss=lambda output, target: 1e-12 * output.sum())


def test_a_frozen_model_is_pruned_and_stays_frozen() -> None:
    model = net().requires_grad_(False)
    made = run(model)
    assert {int(mask.sum()) for mask in made.masks.values()} == {48}
    assert not any(p.requires_grad for m in (model, made.model) for p in m.parameters())


def test_a_layer_that_the_domain_does_not_reach_stays() -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x)) + 0 * self.blocks[1](x).sum()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"blocks\.1\.up had no gradient on the domain's data and stays"):
        made = run(Half())
    assert list(made.masks) == WEIGHTS[:2]


# -- what follows, and what is kept ------------------------------------------------------------------------------------


def test_recovery_keeps_the_mask() -> None:
    start, made = run(), run(recover=sec.FineTune(steps=6, lr=0.05), test=batches(9))
    assert list(made.report.stages) == ["one-shot", "recovered"]
    for name, mask in start.masks.items():
        assert torch.equal(made.model.get_parameter(name) != 0, mask)
        assert not torch.equal(made.model.get_parameter(name), start.model.get_parameter(name))


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [4, 8])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, at: int) -> None:
    recover = sec.FineTune(epochs=2, lr=0.05)
    whole = run(recover=recover)
    count = 0

    def dies(progress: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise _Killed

    with pytest.raises(_Killed):
        run(recover=recover, checkpoint=tmp_path, on_step=dies)
    kept = read_state(tmp_path / "general.safetensors", "general importance")
    assert set(kept) == set(WEIGHTS)
    resumed = run(recover=recover, checkpoint=tmp_path, general=Forbidden())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert resumed.plan.same_as(whole.plan)
    assert resumed.report.recipe == whole.report.recipe


def test_a_checkpoint_knows_its_options_and_its_general_importance(tmp_path: Path) -> None:
    general = general_importance(net(), batches(5))
    run(checkpoint=tmp_path, general=general)
    for changes in ({"how": {"strength": 0.2}}, {"general": {n: 2 * g for n, g in general.items()}}):
        with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
            run(checkpoint=tmp_path, **{"general": general, **changes})


def test_the_model_may_be_changed_in_place() -> None:
    model = net()
    assert run(model, inplace=True).model is model
    assert int((model.blocks[0].up.weight == 0).sum()) == 48


# -- language models ---------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def texts(seed: int, low: int, high: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(low, high, (4, 10), generator=generator) for _ in range(3)]
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 7:] = 0
    return [{"input_ids": i, "attention_mask": mask, "labels": i.masked_fill(mask == 0, -100)} for i in ids]


@pytest.mark.parametrize(("make", "matrices"), [(llama, 14), (gpt2, 8)])
@pytest.mark.parametrize("how", [{}, {"form": "released", "blocks": 4}])
def test_language_models(make: Any, matrices: int, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, domain = make(), texts(1, 0, 20)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made = sec.prune(model, None, "sparsity=50%", method="d-pruner", data=domain, general=texts(2, 20, 40),
                     test=domain, measure=False, options=DPruner(epochs=1, **how))  # fmt: skip
    assert len(made.masks) == matrices
    for name, parameter in made.model.named_parameters():
        mask = made.masks.get(name)
        assert torch.equal(parameter, before[name] if mask is None else before[name] * mask)
        assert mask is None or 2 * int(mask.sum()) == mask.numel()
    assert set(made.report.stages) == {"one-shot"}


def test_padding_is_no_part_of_the_importance() -> None:
    torch.manual_seed(0)
    model, domain = llama(), texts(1, 0, 20)
    other = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 39)} for b in domain]
    names = [f"{n}.weight" for n in layers_to_solve(model, Budget.parse("sparsity=50%"), "matrix")]
    how = DPruner(epochs=1, strength=0.0)
    first, second = (dual_importance(model, d, {}, options=how, names=names).scores for d in (domain, other))
    for name in names:
        torch.testing.assert_close(first[name], second[name])


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_data_without_a_label_that_counts_are_refused() -> None:
    empty = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in texts(1, 0, 20)]
    model = llama()
    with pytest.raises(DataError, match="the domain's data have no label that counts"):
        sec.prune(model, None, "sparsity=50%", method="d-pruner", data=empty, general=empty)
    with pytest.raises(DataError, match="pass data=, an iterable of batches"):
        run(data=None)
    with pytest.raises(DataError, match="the open-domain data is empty"):
        run(general=[])
    with pytest.raises(DataError, match="the loss needs labels"):
        run(data=[x for x, _ in batches()])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda g: g.pop(WEIGHTS[1]), r"blocks\.0\.down\.weight has none"),
        (lambda g: g.update({WEIGHTS[1]: torch.ones(8, 8)}), r"has shape \(8, 8\), not \(8, 12\)"),
        (lambda g: g[WEIGHTS[1]][0, 0].fill_(torch.nan), "is NaN or infinite somewhere"),
        (lambda g: g[WEIGHTS[1]][0, 0].fill_(-1), "is negative somewhere"),
    ],
)
def test_a_general_importance_that_does_not_fit_is_refused(change: Any, told: str) -> None:
    general = general_importance(net(), batches(5))
    change(general)
    with pytest.raises(OptionError, match=f"the general importance does not fit the model: .*{told}"):
        run(general=general)


def test_other_refusals() -> None:
    with pytest.raises(BudgetError, match="needs a budget such as sparsity=50%"):
        run(budget="params<=50%")
    with pytest.raises(OptionError, match="D-Pruner makes one decision: leave out sensitivities="):
        run(sensitivities=(0.5,), test=batches())
    with pytest.raises(ModelError, match="is not finite: lower lr or strength"):
        run(how={"strength": 1e38, "fisher_scale": 1e38, "epochs": 1}, data=batches()[:2])
