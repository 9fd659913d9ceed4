"""AST as a method: masks that adapt, a teacher, a branch, and what is saved in the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.methods.language import ast as module
from secateurs.methods.language.ast import Ast, ast, input_norms
from secateurs.recover.booster import block_start, boosters_of
from secateurs.recover.distill import Distillation
from secateurs.recover.finetune import fine_tune
from secateurs.train.masking import Masks
from secateurs.train.pruner import Pruner
from secateurs.train.sr_ste import Annealed
from tests.methods.contract import INPUTS, batches, small

ALONE = Ast(kd=0.0, pull=0.0, adaptive=False)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 32, (2, 8), generator=generator) for _ in range(3)]
    return [{"input_ids": i, "labels": i} for i in ids]


def trained(model: nn.Module, how: Ast | None = None, budget: str = "2:4", steps: int = 8, **common: Any) -> sec.Pruned:
    recover = sec.FineTune(steps=steps, lr=1e-2, optimizer="adamw")
    return sec.prune(
        model,
        budget=budget,
        method="ast",
        options=how,
        measure=False,
        **{"recover": recover, "data": tokens(), **common},
    )


def on_digits(how: Ast, budget: str = "2:4", steps: int = 8, **common: Any) -> sec.Pruned:
    recover = sec.FineTune(steps=steps, lr=0.05, weight_decay=0.0, **common.pop("recover", {}))
    return ast(small(), INPUTS, budget, recover=recover, options=how, data=batches(), measure=False, **common)


def matrix(model: nn.Module, name: str, value: Tensor) -> Tensor:
    return value.T if isinstance(model, transformers.GPT2LMHeadModel) else value


# -- language models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("booster", ["none", "fold"])
def test_the_pattern_is_exact_after_saving_for_hugging_face(build: Any, booster: Any, tmp_path: Path) -> None:
    made = trained(build(), Ast(every=2, booster=booster, run=8, score="wanda"))
    made.model.save_pretrained(tmp_path)
    back = type(made.model).from_pretrained(tmp_path)
    assert len(made.masks) == (8 if build is gpt2 else 14)
    for name, mask in made.masks.items():
        weight = back.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert (matrix(back, name, mask).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    dense = [name for name, p in back.named_parameters() if p.dim() == 2 and name not in made.masks]
    assert all(any(word in name for word in ("wte", "wpe", "embed", "lm_head")) for name in dense)
    assert all(bool((back.get_parameter(name) != 0).all()) for name in dense)
    ids = tokens()[0]["input_ids"]
    torch.testing.assert_close(back.eval()(ids).logits, made.model.eval()(ids).logits)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_branch_that_stays_is_saved_and_loads_again(build: Any, tmp_path: Path) -> None:
    made = trained(build(), Ast(every=2, booster="keep", run=8, train_projection=build is llama))
    back = sec.load(made.save(tmp_path / "saved"))
    ids = tokens()[0]["input_ids"]
    assert torch.equal(back.model.eval()(ids).logits, made.model.eval()(ids).logits)
    assert set(boosters_of(back.model)) == {name.rpartition(".")[0] for name in made.masks}
    for name, mask in back.masks.items():
        assert torch.equal(back.model.get_parameter(name) != 0, mask)


def test_a_share_of_each_row() -> None:
    made = trained(llama(), budget="sparsity=75%")
    assert all((mask.sum(1) == mask.shape[1] // 4).all() for mask in made.masks.values())


# -- the training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pruner, dict[str, Any]]]:
    """The pruners that the method makes, and how."""
    made: list[tuple[Pruner, dict[str, Any]]] = []
    original = module.straight_through

    def noted(*arguments: Any, **options: Any) -> Pruner:
        made.append((original(*arguments, **options), options))
        return made[-1][0]

    monkeypatch.setattr(module, "straight_through", noted)
    return made


def test_defaults_are_the_recommended_command_s(pruners: list[tuple[Pruner, dict[str, Any]]]) -> None:
    on_digits(Ast(), steps=40)
    options = pruners[0][1]
    assert options["pull"] == Annealed(1e-4, 10)
    assert (options["every"], options["until"], options["norms"]) == (10, 30, {})
    on_digits(Ast(adaptive=False), steps=40)
    assert pruners[1][1]["every"] is None


def test_masks_change_only_when_asked_and_the_last_have_time_to_learn() -> None:
    made = on_digits(Ast(every=3, kd=0.0), steps=11)
    flips = made.report.recipe["flips"]
    assert [one["step"] for one in flips] == [3, 6]
    assert flips[0]["previous"] == flips[0]["initial"] > 0
    fixed = on_digits(Ast(adaptive=False, kd=0.0), steps=11)
    assert list(fixed.report.recipe["flips"]) == []
    magnitudes = sec.prune(small(), INPUTS, "2:4", measure=False)
    for name, mask in magnitudes.masks.items():
        assert torch.equal(fixed.masks[name], mask)
    assert any(not torch.equal(made.masks[name], mask) for name, mask in magnitudes.masks.items())


@pytest.mark.parametrize("kd", [0.0, 0.67])
def test_with_fixed_masks_it_is_ordinary_retraining(kd: float) -> None:
    """The weights that stay see the same gradients whether those that went wait outside or are gone."""
    made = on_digits(Ast(kd=kd, adaptive=False), steps=8)
    dense, twin = small(), small()
    with Masks(twin, made.masks):
        pass
    fine_tune(
        twin, batches(), steps=8, lr=0.05, masks=made.masks, teacher=dense if kd else None,
        distillation=Distillation(2.0, kd),
    )  # fmt: skip
    for name, p in twin.named_parameters():
        torch.testing.assert_close(made.model.get_parameter(name), p)


def test_the_pull_reaches_the_weights_that_wait_with_its_sign() -> None:
    """With a strong pull what was pruned shrinks, so that fewer of it come back."""
    weak, strong = (on_digits(Ast(every=2, kd=0.0, pull=p, rise=0.0), steps=40) for p in (0.0, 2.0))
    total = [sum(one["previous"] for one in made.report.recipe["flips"]) for made in (weak, strong)]
    assert total[1] < total[0]


def test_hidden_states_are_learnt_too() -> None:
    first = [trained(llama(), Ast(kd=0.5, squarehead=c, adaptive=False), steps=1) for c in (0.0, 1.0, 3.0)]
    losses = [made.report.history.values[0]["loss"] for made in first]
    assert losses[1] - losses[0] > 0
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    with pytest.raises(ModelError, match="tokens are compared at the ends of blocks"):
        on_digits(Ast(squarehead=1.0))


def test_with_a_teacher_alone_no_labels_are_needed() -> None:
    data = [x for x, _ in batches()]
    recover = sec.FineTune(steps=4, lr=0.05)
    made = ast(small(), INPUTS, "2:4", recover=recover, options=Ast(kd=1.0), data=data, measure=False)
    assert made.report.history.values[0]["loss"] > 0
    with pytest.raises(DataError, match="the loss needs labels"):
        ast(small(), INPUTS, "2:4", recover=recover, options=Ast(kd=0.5), data=data, measure=False)


# -- scores of inputs --------------------------------------------------------------------------------------------------


def test_norms_are_those_of_the_dense_model_s_inputs() -> None:
    model = small().train()
    data = batches()
    found = input_norms(model, data, ["0", "3"])
    assert model.training
    model.eval()
    x = torch.cat([x for x, _ in data]).double()
    torch.testing.assert_close(found["0.weight"], x.square().mean(0).sqrt().expand(16, 8))
    inner = model[2](model[1](model[0](x.float()))).double()
    torch.testing.assert_close(found["3.weight"], inner.square().mean(0).sqrt().expand(4, 16))


def test_padding_does_not_count_and_hugging_face_s_layers_have_their_inputs_first() -> None:
    model = gpt2().eval()
    ids = tokens()[0]["input_ids"]
    name = "transformer.h.0.mlp.c_fc"
    seen = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    found = input_norms(model, [{"input_ids": ids, "attention_mask": seen}], [name])[f"{name}.weight"]
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _o: caught.append(args[0].detach()))
    model(input_ids=ids, attention_mask=seen)
    handle.remove()
    wanted = caught[0].double()[seen.bool()].square().mean(0).sqrt()
    torch.testing.assert_close(found, wanted[:, None].expand(16, 64))


def test_wanda_scores_choose_what_wanda_chooses() -> None:
    made = on_digits(Ast(score="wanda", adaptive=False), steps=1)
    norms = input_norms(small(), batches(), ["0", "3"])
    model = small()
    for name, norm in norms.items():
        runs = (model.get_parameter(name).abs().double() * norm).unflatten(1, (-1, 4))
        ranked = runs.argsort(-1, descending=True).argsort(-1) < 2
        assert torch.equal(made.masks[name], ranked.flatten(1))
    few = on_digits(Ast(score="wanda", calibration=1, adaptive=False), steps=1)
    one = input_norms(model, batches()[:1], ["3"])["3.weight"]
    runs = (model.get_parameter("3.weight").abs().double() * one).unflatten(1, (-1, 4))
    assert torch.equal(few.masks["3.weight"], (runs.argsort(-1, descending=True).argsort(-1) < 2).flatten(1))


# -- the branch --------------------------------------------------------------------------------------------------------


def test_the_branch_starts_from_what_the_first_mask_takes_and_then_trains() -> None:
    dense = small()
    starts: dict[str, Tensor] = {}
    original = module.boost

    def noted(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        made = original(model, *arguments, **options)
        starts.update({name: booster.up.detach().clone() for name, booster in made.items()})
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "boost", noted)
        made = on_digits(Ast(booster="keep", run=4, every=2), steps=8)
    magnitudes = sec.prune(small(), INPUTS, "2:4", measure=False).masks
    for name in ("0", "3"):
        lost = dense.get_parameter(f"{name}.weight").detach() * ~magnitudes[f"{name}.weight"]
        torch.testing.assert_close(starts[name], block_start(lost, 4))
        assert not torch.equal(boosters_of(made.model)[name].up, starts[name])


def test_a_folded_branch_leaves_an_ordinary_model() -> None:
    kept, folded = (on_digits(Ast(booster=word, run=4), steps=6) for word in ("keep", "fold"))
    assert type(folded.model[0]) is nn.Linear
    assert set(folded.model.state_dict()) == set(small().state_dict())
    for name, mask in kept.masks.items():
        layer = name.rpartition(".")[0]
        wanted = (kept.model.get_parameter(name) + boosters_of(kept.model)[layer].product) * mask
        torch.testing.assert_close(folded.model.get_parameter(name).detach(), wanted.detach())


def test_flips_are_in_the_report_and_in_its_file(tmp_path: Path) -> None:
    made = on_digits(Ast(every=2), steps=9)
    back = sec.load(made.save(tmp_path / "saved"))
    assert [one["step"] for one in back.report.recipe["flips"]] == [2, 4, 6]
    assert back.report.to_dict() == made.report.to_dict()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    for budget in ("macs<=50%", "sparsity=50%,macs<=50%", "2:4,sparsity=50%"):
        with pytest.raises(BudgetError, match="AST needs a budget such as '2:4' or 'sparsity=50%', got"):
            on_digits(Ast(), budget)
    with pytest.raises(OptionError, match="this method prunes while it trains"):
        ast(small(), INPUTS, "2:4", data=batches())
    with pytest.raises(OptionError, match=r"over runs of 16 needs inputs that 16 divides; 0\.weight has 8"):
        on_digits(Ast(booster="keep"))
    with pytest.raises(OptionError, match=r"2:3 needs a number of inputs that 3 divides"):
        on_digits(Ast(), "2:3")
    with pytest.raises(ModelError, match="no block of"):
        ast(nn.Sequential(nn.Conv1d(4, 4, 1, groups=1), nn.Bilinear(4, 4, 4)), INPUTS, "2:4", scope="1", data=batches())


def test_the_model_given_is_left_alone() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    ast(model, INPUTS, "2:4", recover=sec.FineTune(steps=3, lr=0.1), options=ALONE, data=batches(), measure=False)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
