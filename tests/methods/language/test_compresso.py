"""Compresso on a small Llama and other networks: places, folding, budgets, and the prompt."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import secateurs as sec
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.methods.language.compresso import COLLABORATION, Compresso, compresso, with_prompt
from secateurs.summary import quality_of
from secateurs.train.gates import Gated

IDS = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS, "labels": IDS}] * 4
INPUTS = {"input_ids": IDS[:2, :6]}
FAST = Compresso(rank=4, gate_lr=0.5)


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # An ε that counts, so that its factor is seen.
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, rms_norm_eps=0.01)).eval()


def run(model: nn.Module, budget: str = "params<=70%", epochs: int = 15, **changes: Any) -> Any:
    recover = sec.FineTune(epochs=epochs, lr=1e-3, weight_decay=0.0, schedule="linear")
    chosen: dict[str, Any] = {"data": DATA, "test": DATA, "measure": False, "options": FAST, "recover": recover}
    return compresso(model, INPUTS, budget, **{**chosen, **changes})


@cache
def pruned(tied: bool) -> Any:
    return run(llama(tied=tied), epochs=60)


@pytest.mark.parametrize("tied", [False, True])
def test_the_cut_model_is_the_gated_one(tied: bool) -> None:
    made = pruned(tied)
    gated = made.report.stages["pruned in training"]["nll"]
    assert quality_of(made.model, DATA)["nll"] == pytest.approx(gated, rel=1e-6)
    assert made.report.proof < 1e-5
    assert made.plan.rebudget("params<=70%").same_as(made.plan)
    assert made.plan.rebudget("params<=50%").cost("params") <= 0.5
    kinds = {step.group.rpartition(".")[2] for step in made.plan.steps()}
    assert len(kinds) > 1
    width = next(g.name for g in made.plan.groups if g.size == 16)
    assert made.plan.counts[width] < 16


@pytest.mark.parametrize("tied", [False, True])
def test_the_budget_holds_and_the_expected_size_is_close(tied: bool) -> None:
    made = pruned(tied)
    left = made.plan.cost("params")
    assert left <= 0.7
    assert sum(p.numel() for p in made.model.parameters()) == pytest.approx(made.plan.cost("params", relative=False))
    assert left == pytest.approx(1 - made.report.recipe["expected_sparsity"], abs=0.05)


def test_gates_act_where_consumers_read_and_where_the_stream_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, set[str]]] = []
    made = Gated.__init__

    def look(self: Gated, model: nn.Module, groups: Any, *args: Any) -> None:
        seen.append({g.name: {m.tensor for m in g.members} for g in groups})
        made(self, model, groups, *args)

    monkeypatch.setattr(Gated, "__init__", look)
    run(llama(), epochs=1)
    (places,) = seen
    last = "model.layers.1"
    assert places[f"{last}.self_attn.q_proj"] == {
        f"{last}.self_attn.o_proj.weight",
        f"{last}.self_attn.o_proj.adapter.down",
    }
    assert places[f"{last}.mlp.gate_proj"] == {f"{last}.mlp.down_proj.weight", f"{last}.mlp.down_proj.adapter.down"}
    written = ("self_attn.o_proj", "mlp.down_proj")
    layers = {f"model.layers.{i}.{name}.{own}" for i in (0, 1) for name in written for own in ("weight", "adapter.up")}
    assert places["model.embed_tokens"] == {"model.embed_tokens.weight"} | layers


def test_with_open_gates_it_is_lora_and_no_base_weight_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = llama(), {}
    finalize = sec.train.gates.GatePruner.finalize

    def look(self: Any) -> Any:
        gated = self._gated
        found.update({n: p.detach().clone() for n, p in gated.model.named_parameters() if "adapter" not in n})
        found["adapters"] = [p for n, p in gated.model.named_parameters() if n.endswith("adapter.up")]
        return finalize(self)

    monkeypatch.setattr(sec.train.gates.GatePruner, "finalize", look)
    run(model)
    adapters = found.pop("adapters")
    assert all(bool((matrix != 0).any()) for matrix in adapters)
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_only_named_layers_are_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    made = run(model, "sparsity=20%", options=Compresso(rank=4, adapted=("*q_proj", "*v_proj"), granularity="channel"))
    stays = made.plan.keep["model.layers.0.mlp.gate_proj"]
    same = model.model.layers[0].mlp.gate_proj.weight[stays]
    assert torch.equal(made.model.model.layers[0].mlp.gate_proj.weight, same)
    kept = made.plan.keep["model.layers.0.self_attn.q_proj"].repeat_interleave(4)
    trained, first = (m.model.layers[0].self_attn.v_proj.weight for m in (made.model, model))
    assert not torch.equal(trained, first[kept])
    assert sum(made.plan.counts.values()) == round(0.8 * (2 * 24 + 2 * 2))


def test_a_budget_that_gates_cannot_reach_names_the_nearest() -> None:
    wide, training = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2)), sec.FineTune(epochs=1)
    with pytest.raises(BudgetError, match=r"asks for a sparsity of 0\.96\d+, and gates that never close for good") as e:
        compresso(wide, torch.randn(2, 4), "sparsity=96%", options=FAST, data=DATA, recover=training)
    assert e.value.nearest == "sparsity=95.2%"
    for budget in ("2:4", "params<=70%,macs<=50%", "latency<=50%"):
        with pytest.raises(BudgetError, match="Compresso needs one limit, such as"):
            run(llama(), budget)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def test_layer_norms_are_refused_and_not_in_the_way_of_channels() -> None:
    with pytest.raises(ModelError, match=r"norm \(LayerNorm\) normalises over the residual width .* granularity='chan"):
        compresso(Layered(), torch.randn(2, 4), "sparsity=30%", options=FAST, recover=sec.FineTune(epochs=1))


def test_shares_must_follow_each_other() -> None:
    with pytest.raises(OptionError, match="begin, end and fix must follow each other"):
        Compresso(begin=0.5, end=0.4)


def test_transposed_weights_are_gated_along_their_own_axes() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32)).eval()
    made = run(model, "sparsity=30%", epochs=8, options=replace(FAST, granularity="channel"))
    assert quality_of(made.model, DATA)["nll"] == pytest.approx(
        made.report.stages["pruned in training"]["nll"], rel=1e-6
    )
    with pytest.raises(ModelError, match=r"\(LayerNorm\) normalises over the residual width"):
        run(model, epochs=1)


# -- the prompt --------------------------------------------------------------------------------------------------------


def test_the_prompt_is_attended_to_and_not_learned() -> None:
    prompt = torch.tensor([7, 8, 9])
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    made = with_prompt(batch, prompt)
    assert made["input_ids"].shape == (4, 15)
    assert made["input_ids"][:, :3].tolist() == [[7, 8, 9]] * 4
    assert made["attention_mask"].tolist() == [[1] * 15] * 4
    assert made["labels"][:, :3].tolist() == [[-100] * 3] * 4
    assert torch.equal(made["labels"][:, 3:], IDS)
    assert set(with_prompt({"input_ids": IDS}, prompt)) == {"input_ids"}
    model = llama()
    logits = model(made["input_ids"]).logits[:, 3:-1]
    by_hand = nn.functional.cross_entropy(logits.reshape(-1, 32), IDS[:, 1:].flatten(), reduction="sum")
    first = nn.functional.cross_entropy(model(made["input_ids"]).logits[:, 2], IDS[:, 0], reduction="sum")
    torch.testing.assert_close(model(**made).loss, (by_hand + first) / IDS.numel())
    assert len(COLLABORATION.split(". ")) >= 6


def test_batches_that_cannot_be_lengthened_are_refused() -> None:
    for batch in ({"labels": IDS}, {"input_ids": IDS, "position_ids": IDS}):
        with pytest.raises(DataError, match="a prompt is put before batches of input_ids, attention_mask and labels"):
            with_prompt(batch, torch.tensor([1]))


def test_the_same_seed_gives_the_same_model_and_the_original_is_left_alone() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (run(model, epochs=2, seed=seed, test=None) for seed in (0, 0, 1))
    assert first.plan.same_as(again.plan)
    assert torch.equal(first.model(**INPUTS).logits, again.model(**INPUTS).logits)
    assert not all(torch.equal(first.plan.scores[n], s) for n, s in other.plan.scores.items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
