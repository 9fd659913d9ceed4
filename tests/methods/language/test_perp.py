"""PERP: few parameters trained after one pruning, with the zeros that there were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import ModelError, OptionError
from secateurs.methods.language import perp as module
from secateurs.methods.language.perp import Perp, Retraining, Trained, retrain, trained_share
from secateurs.pruning import Pruned
from secateurs.recover.adapters import adapters_of

INPUTS = torch.zeros(2, 8)
KINDS = ["mask-lora", "scale-lora", "lora-prune"]


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 16, bias=bias), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 12, bias=bias), nn.ReLU(),
        nn.Linear(12, 4),
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(16, 8, generator=generator) for _ in range(4)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def pruned(model: nn.Module | None = None, budget: str = "sparsity=50%", **options: Any) -> Pruned:
    how = {"allocation": "uniform", "granularity": "weight", "measure": False, **options}
    return sec.prune(net() if model is None else model, INPUTS, budget, **how)


def perp(budget: str = "sparsity=50%", model: nn.Module | None = None, **options: Any) -> Pruned:
    how = Perp(**{"rank": 4, "steps": 12, "lr": 0.01, **options})
    start = net() if model is None else model
    return sec.prune(start, INPUTS, budget, method="perp", data=batches(), options=how, measure=False)


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    values = dict(before.named_parameters())
    return {name for name, p in after.named_parameters() if name not in values or not torch.equal(p, values[name])}


def loss(model: nn.Module) -> float:
    return sum(nn.functional.cross_entropy(model(x), y).item() for x, y in batches())


# -- what trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "names"),
    [
        (("biases",), {"0.bias", "1.bias", "3.bias", "5.bias"}),
        (("norms",), {"1.weight", "1.bias"}),
        (("adapters",), {"0.weight", "3.weight", "5.weight"}),
        (("head",), {"5.weight"}),
        (("norms", "adapters"), {"1.weight", "1.bias", "0.weight", "3.weight", "5.weight"}),
        (("all",), {name for name, _ in net().named_parameters()}),
    ],
)
def test_only_what_was_chosen_moves_and_zeros_stay(train: Any, names: set[str]) -> None:
    start, made = pruned(), perp(train=train)
    assert moved(start.model, made.model) == names
    assert made.masks.keys() == start.masks.keys()
    for name, mask in start.masks.items():
        assert torch.equal(made.masks[name], mask)
        assert torch.equal(made.model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["sparsity=75%", "2:4"])
def test_sparsity_and_pattern_hold_before_and_after(kind: Any, budget: str) -> None:
    start, made = pruned(budget=budget), perp(budget, adapter=kind)
    assert loss(made.model) < loss(start.model)
    zeros = {name: p == 0 for name, p in start.model.named_parameters() if p.dim() == 2}
    assert all(torch.equal(made.model.get_parameter(name) == 0, zero) for name, zero in zeros.items())
    if budget == "2:4":
        for name in zeros:
            assert bool(((made.model.get_parameter(name) != 0).view(-1, 4).sum(1) == 2).all())
    else:
        assert sum(int(zero.sum()) for zero in zeros.values()) == 0.75 * (8 * 16 + 16 * 12 + 12 * 4)


def test_layers_are_ordinary_again() -> None:
    made = perp()
    assert adapters_of(made.model) == {}
    assert made.model.state_dict().keys() == net().state_dict().keys()
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    assert made.report.history.values[-1]["loss"] < made.report.history.values[0]["loss"]


def test_a_dense_head_gets_plain_lora() -> None:
    start = pruned(ignore="5.weight")
    model = copy.deepcopy(start.model)
    retrain(model, start.masks, batches(), options=Perp(train=("head", "adapters"), rank=4, steps=4, lr=0.01))
    assert moved(start.model, model) == {"0.weight", "3.weight", "5.weight"}
    assert bool((model[5].weight != 0).all())
    found = trained_share(model, start.masks, Perp(train=("head", "adapters"), rank=4))
    assert found.by == {"adapters": 4 * (24 + 28 + 16)}


def test_missing_biases_are_created_when_asked_for() -> None:
    plain = perp(model=net(bias=False))
    assert plain.model[0].bias is None
    made = perp(model=net(bias=False), missing_biases="create")
    assert made.model[0].bias.shape == (16,)
    assert bool(made.model[3].bias.any())
    assert made.report.recipe["trained"]["by"]["biases"] == 16 + 16 + 12 + 4


def test_a_failed_training_takes_away_what_it_added() -> None:
    start = pruned(net(bias=False))
    names = list(start.model.state_dict())
    broken = [(x / 0, y) for x, y in batches()]
    with pytest.raises(ModelError, match="the loss is nan"):
        retrain(start.model, start.masks, broken, options=Perp(rank=4, missing_biases="create"))
    assert list(start.model.state_dict()) == names
    assert adapters_of(start.model) == {}
    assert all(parameter.requires_grad for parameter in start.model.parameters())


# -- how it trains -----------------------------------------------------------------------------------------------------


def test_the_recipe_is_adamw_with_a_tenth_of_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    seen: list[dict[str, Any]] = []
    start = pruned()
    known = module.fine_tune

    def listening(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return known(*args, **kwargs)

    monkeypatch.setattr(module, "fine_tune", listening)
    how = Perp(rank=4, steps=20, lr=0.1)
    retrain(start.model, start.masks, batches(), options=how, on_step=lambda progress: rates.append(progress.lr))
    assert rates == pytest.approx([0, 0.05, *[0.1 * (20 - step) / 18 for step in range(2, 20)]])
    assert (seen[0]["optimizer"], seen[0].get("weight_decay", 0)) == ("adamw", 0)
    # None of the masked weights trains, so that nothing needs to hold their masks.
    assert seen[0]["masks"] is None


def test_the_recovery_alone_is_the_recipe_s() -> None:
    start, whole = pruned(), perp()
    retrain(start.model, start.masks, batches(), options=Perp(rank=4, steps=12, lr=0.01))
    assert moved(start.model, whole.model) == set()


def test_it_recovers_after_any_method() -> None:
    training = Retraining(steps=12, lr=0.01, how=Perp(rank=4))
    made = sec.prune(
        net(), INPUTS, "sparsity=50%", method="global-magnitude", data=batches(), recover=training, measure=False
    )
    assert all(torch.equal(made.model.get_parameter(name) != 0, mask) for name, mask in made.masks.items())
    assert made.report.history is not None


def test_another_training_may_be_given() -> None:
    own = sec.FineTune(epochs=2, lr=0.05)
    made = sec.prune(
        net(), INPUTS, "sparsity=50%", method="perp", data=batches(), recover=own, options=Perp(rank=4), measure=False
    )
    assert len(made.report.history.values) == 2


@pytest.mark.parametrize("train", [("biases", "norms", "adapters"), ("all",)])
def test_a_model_of_half_precision_stays_one(train: Any) -> None:
    start = pruned()
    model = start.model.bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()]
    before = sum(nn.functional.cross_entropy(model(x).float(), y).item() for x, y in data)
    retrain(model, start.masks, data, options=Perp(train=train, rank=4, steps=40, lr=1e-2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in start.masks.items())
    assert sum(nn.functional.cross_entropy(model(x).float(), y).item() for x, y in data) < before - 0.1


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_language_model_learns_by_its_own_loss(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "tie_word_embeddings": True},
        "Llama": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": False,
        },
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=32, bos_token_id=0, eos_token_id=0, **sizes)
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "labels": ids}] * 2
    how = Perp(rank=4, steps=15, lr=0.02)
    made = sec.prune(
        model, {"input_ids": ids}, "2:4", method="perp", data=data, test=data, options=how, ignore="lm_head.weight",
        measure=False,
    )  # fmt: skip
    assert made.report.after.quality["nll"] < made.report.stages["one-shot"]["nll"] - 0.05
    assert "lm_head.weight" not in made.masks
    assert all(torch.equal(made.model.get_parameter(name) != 0, mask) for name, mask in made.masks.items())
    assert adapters_of(made.model) == {}
    if family == "GPT2":
        with pytest.raises(ModelError, match="the weight of lm_head is that of an embedding too: leave 'head' out"):
            retrain(made.model, made.masks, data, options=Perp(train=("head",), rank=4))


# -- how much trains ---------------------------------------------------------------------------------------------------


def test_shares() -> None:
    made = perp(train=("biases", "norms", "adapters"), rank=2)
    # Biases 16 + 16 + 12 + 4, of which the norm's count as norms, too; norms 16 + 16; adapters 2·(24 + 28 + 16).
    assert made.report.recipe["trained"] == {
        "trained": 48 + 16 + 136,
        "parameters": 8 * 16 + 16 * 12 + 12 * 4 + 16 + 12 + 4 + 32,
        "by": {"biases": 48, "norms": 32, "adapters": 136},
        "share": 200 / 432,
    }
    assert trained_share(made.model, made.masks, Perp(train=("all",))) == Trained(432, 432, {"all": 432})


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_rank_that_a_layer_cannot_have() -> None:
    with pytest.raises(OptionError, match="rank 16 is too high: 0 allows at most 8; 3 allows at most 12; 5 allows"):
        perp(rank=16)


def test_without_data() -> None:
    with pytest.raises(OptionError, match="recover= needs training data"):
        sec.prune(net(), INPUTS, "sparsity=50%", method="perp", options=Perp(rank=4))


def test_layers_that_carry_no_adapter() -> None:
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    start = sec.prune(
        model, torch.zeros(2, 1, 8), "sparsity=50%", granularity="weight", scope="0.weight", measure=False
    )
    data = [(x[:, None], y) for x, y in batches()]
    with pytest.raises(
        OptionError, match="no pruned layer of Sequential can carry an adapter, which Linear layers can"
    ):
        retrain(start.model, start.masks, data, options=Perp(rank=4))
    retrain(start.model, start.masks, data, options=Perp(train=("biases",), steps=4))
    assert torch.equal(start.model[0].weight != 0, start.masks["0.weight"])


def test_a_checkpoint_of_other_hyperparameters(tmp_path: Any) -> None:
    def run(**options: Any) -> Pruned:
        how = Perp(**{"rank": 4, "steps": 8, **options})
        return sec.prune(
            net(), INPUTS, "sparsity=50%", method="perp", data=batches(), options=how, measure=False,
            checkpoint=tmp_path,
        )  # fmt: skip

    first = run()
    assert moved(first.model, run().model) == set()
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        run(rank=3)
