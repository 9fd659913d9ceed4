"""LoRAPrune: scores from adapters against loops, blocks that are left out, and models that are cut, merged, proven."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES, family
from secateurs.core.errors import BudgetError, ModelError, OptionError
from secateurs.core.units import ChannelGroup
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.methods.language._adapted import with_adapters
from secateurs.methods.language.loraprune import Guide, LoraPrune, _left_out, _within, loraprune
from secateurs.recover.adapters import adapters_of, attach
from secateurs.recover.trainable import only_trained
from secateurs.train import GradualUnits
from tests.methods.contract import INPUTS, batches, small

CRITERIA = ("lora", "grad", "magnitude")
TUNED = {"steps": 12, "lr": 0.01, "optimizer": "adamw", "weight_decay": 0.0}
HOW = LoraPrune(rank=4, every=2)


def tokens(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 100, (4, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": part, "labels": part} for part in rows]


def built(name: str, **sizes: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name == "Llama":
        return family("llama", "AutoModelForCausalLM", ids, TEXT, num_key_value_heads=2, **sizes)()
    return FAMILIES[name]()


TEXT = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def ids() -> Any:
    return {"input_ids": torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))}


def run(name: str = "Llama", budget: str = "sparsity=50%", how: LoraPrune = HOW, **changes: Any) -> sec.Pruned:
    model, x = built(name)
    settings = {"data": tokens(), "recover": sec.FineTune(**TUNED), "measure": False, "options": how, **changes}
    return loraprune(model, x, budget, **settings)


@cache
def tuned(criterion: Any = "lora") -> sec.Pruned:
    """The run with all defaults, made once."""
    return run(how=LoraPrune(rank=4, every=2, criterion=criterion))


@pytest.fixture
def adapted() -> Iterator[tuple[nn.Module, tuple[ChannelGroup, ...], Any]]:
    """A Llama with query groups, adapters whose B is not zero, and gradients."""
    model, x = built("Llama")
    groups = infer(model, x, entangled=False).groups
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    adapters = attach(model, layers, "lora", rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad(), only_trained(model, "adapters"):
        for adapter in adapters.values():
            adapter.up.normal_(0, 0.1, generator=generator)
        yield model, groups, adapters


def backward(model: nn.Module) -> None:
    with torch.enable_grad():
        model.zero_grad()
        batch = tokens(1)[0]
        model.eval()(**batch).loss.backward()


def naive(model: nn.Module, block: int, criterion: str, gradients: dict[str, Tensor]) -> dict[str, list[float]]:
    """Steps 3 to 5 of the algorithm for one block, with loops: two query groups of 16 and 8 rows, 24 channels."""
    prefix = f"model.layers.{block}."
    rows = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 1, "up_proj": 1, "down_proj": 1}
    total = {"head": [0.0] * 2, "channel": [0.0] * 24}
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if not name.startswith(prefix) or own not in rows:
            continue
        part = adapters_of(model)[name]
        a, b, weight = part.down.detach(), part.up.detach(), module.weight.detach()
        if criterion == "lora":
            ghat = part.up.grad @ a + b @ part.down.grad - part.up.grad @ part.down.grad
        else:
            ghat = gradients[f"{name}.weight"] if criterion == "grad" else torch.ones_like(weight)
        of = (ghat * (weight + 2.0 * b @ a)).abs()
        of = of.T if own in ("o_proj", "down_proj") else of
        kind = "head" if "attn" in name else "channel"
        step = rows[own]
        sums = [float(of[i * step : (i + 1) * step].sum()) for i in range(len(total[kind]))]
        norm = sum(s * s for s in sums) ** 0.5 + 1e-8
        total[kind] = [t + s / norm for t, s in zip(total[kind], sums, strict=True)]
    return total


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_of_a_language_model_are_the_slow_twin_s(criterion: Any, adapted: Any) -> None:
    model, groups, adapters = adapted
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    backward(twin)
    gradients = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
    with Guide(model, groups, adapters, criterion) as guide:
        backward(model)
        found = guide()
        again = guide() if criterion == "grad" else None
    assert len(groups) == 6
    for group in groups:
        block = int(group.name.split(".")[2])
        assert found[group.name].tolist() == pytest.approx(
            naive(model, block, criterion, gradients)[group.kind], rel=1e-4
        )
    # Each gradient counts at one step, and none is left where clipping would find it.
    assert again is None or all(not bool(scores.any()) for scores in again.values())
    assert all(model.get_parameter(f"{layer}.weight").grad is None for layer in adapters)


def test_gradients_of_several_batches_add_up(adapted: Any) -> None:
    model, groups, adapters = adapted
    with Guide(model, groups, adapters, "grad") as guide:
        backward(model)
        once = guide.importance("model.layers.0.mlp.up_proj.weight")
        batch = tokens(1)[0]
        with torch.enable_grad():
            model(**batch).loss.backward()
        twice = guide.importance("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(twice, 2 * once)
    with torch.enable_grad():
        model(**batch).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_scaling_the_gradients_of_one_matrix_changes_no_ranking_while_b_is_zero(adapted: Any) -> None:
    model, groups, adapters = adapted
    for adapter in adapters.values():
        nn.init.zeros_(adapter.up)
    backward(model)
    guide = Guide(model, groups, adapters)
    before = guide()
    assert not bool(adapters["model.layers.1.mlp.gate_proj"].down.grad.any())
    adapters["model.layers.1.mlp.gate_proj"].up.grad.mul_(1000)
    after = guide()
    for name, scores in before.items():
        # All but for the constant in the norm.
        torch.testing.assert_close(after[name], scores, rtol=1e-3, atol=0)
        assert torch.equal(after[name].argsort(), scores.argsort())


def test_an_adapter_without_a_gradient_counts_nothing(adapted: Any) -> None:
    model, groups, adapters = adapted
    guide = Guide(model, groups, adapters)
    model.zero_grad()
    assert all(not bool(scores.any()) for scores in guide().values())


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_the_masked_model_is_the_merged_and_the_cut_one(name: str) -> None:
    model, x = built(name)
    structure = infer(model, x, entangled=False)
    layers = {t.rpartition(".")[0] for g in structure.groups for m in g.members if m.rank > 1 for t in (m.tensor,)}
    adapters = attach(model, sorted(layers), "lora", rank=4)
    with only_trained(model, "adapters") as chosen:
        optimizer = torch.optim.AdamW(chosen.values(), 0.05)
        schedule = LoraPrune(every=2).schedule(0.5, 12)
        groups = [ChannelGroup(g.name, g.size, g.kind, with_adapters(model, g.members)) for g in structure.groups]
        guide = Guide(model, structure.groups, adapters)
        halves = {g.name: g.size // 2 for g in groups}
        pruner = GradualUnits(model, optimizer, groups, schedule, guide, lambda scores: halves, debug=True)
        for batch in tokens(12):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            optimizer.step()
            pruner.step()
    keep = pruner.finalize()
    assert all(int(stays.sum()) == halves[n] for n, stays in keep.items())
    assert len(keep) == len(structure.groups)
    with torch.no_grad():
        masked = model.eval()(**x).logits
        adapters.merge()
        torch.testing.assert_close(model(**x).logits, masked, atol=1e-5, rtol=1e-4)
        less = cut(model, structure, keep)
        torch.testing.assert_close(less.eval()(**x).logits, masked, atol=1e-5, rtol=1e-4)
    assert size(less) < size(model)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_families_are_pruned_while_they_tune(name: str, tmp_path: Path) -> None:
    made = tuned() if name == "Llama" else run(name)
    blocks = {"Llama": ("model.layers.0.", "model.layers.1."), "GPT-2": ("transformer.h.0.",)}[name]
    assert {group.kind for group in made.plan.groups} == {"head", "channel"}
    # The last block keeps all it has.
    assert {g.name for g in made.plan.groups if g.name.startswith(blocks)} == set(made.plan.counts)
    assert len(made.plan.groups) == 2 * len(blocks)
    for group in made.plan.groups:
        assert made.plan.counts[group.name] == group.size // 2
    assert made.report.proof is not None
    assert made.report.proof < 1e-4
    assert not made.masks
    assert not adapters_of(made.model)
    back = sec.load(made.save(tmp_path / "saved")).model.eval()
    x = built(name)[1]
    with torch.no_grad():
        assert torch.equal(back(**x).logits, made.model.eval()(**x).logits)
    noted = made.report.recipe["loraprune"]
    assert (noted["observed"], noted["skipped"]) == (12, 0)
    # Four layers a block in GPT-2 and seven in Llama, of the last block too.
    assert noted["adapters"] == (21 if name == "Llama" else 8)


def test_criteria_take_other_units_and_the_plan_holds_their_scores() -> None:
    made = {c: tuned(c) for c in CRITERIA}
    kept = {c: [m.tolist() for m in m.plan.keep.values()] for c, m in made.items()}
    assert kept["lora"] != kept["magnitude"]
    assert kept["grad"] != kept["magnitude"]
    for one in made.values():
        assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in one.model.parameters())
    plan = made["lora"].plan
    assert plan.recipe.criterion_options == {"gradient": "lora"}
    for name, stays in plan.keep.items():
        assert float(plan.scores[name][stays].min()) > 0
        assert not bool(plan.scores[name][~stays].any())
    # What went scores nothing, so that the same budget is met by the same units.
    assert plan.rebudget("sparsity=50%").same_as(plan)


@pytest.mark.parametrize(
    ("how", "blocks"),
    [
        (LoraPrune(), [*range(3, 31)]),
        (LoraPrune(skip_first=0.06), [*range(1, 31)]),
        (LoraPrune(skip_first=0.0, skip_last=0), [*range(32)]),
        (LoraPrune(skip_first=0.5, skip_last=15), [16]),
        (LoraPrune(skip_last=40), []),
    ],
)
def test_the_first_tenth_and_the_last_block_are_left_out(how: LoraPrune, blocks: list[int]) -> None:
    names = [f"layers.{i}" for i in range(32)]
    left = _left_out(names, how)
    assert [i for i, name in enumerate(names) if name not in left] == blocks
    assert len(set(left)) == len(left)
    assert _left_out([""], how) == ()


def test_groups_lie_in_blocks_that_are_not_left_out_and_all_layers_are_adapted() -> None:
    model, x = built("Llama", num_hidden_layers=10, hidden_size=16)
    layers, structure = _within(model, x, LoraPrune(), None, ())
    assert sorted({int(g.name.split(".")[2]) for g in structure.groups}) == [*range(1, 9)]
    assert len(layers) == 70


def test_only_adapters_train_and_blocks_that_are_left_out_train_too() -> None:
    model, _ = built("GPT-2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = run("GPT-2")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    own = dict(made.model.named_parameters())
    for name, old in before.items():
        adapted_last = "h.1." in name and name.endswith("weight") and old.dim() == 2
        if "h.0." not in name:
            assert torch.equal(own[name], old) is not adapted_last
    adapters, whole = made.report.recipe["loraprune"]["trained"], sum(p.numel() for p in before.values())
    # Rank 4 times inputs and outputs of 64 to 192, 64 to 64, 64 to 256 and back, in two blocks.
    assert adapters == 2 * 4 * (256 + 128 + 320 + 320)
    assert adapters < whole / 10


def test_a_budget_of_parameters_is_of_the_whole_model() -> None:
    made = run(budget="params<=85%")
    assert 0.8 < made.plan.cost("params") <= 0.85
    assert sum(p.numel() for p in made.model.parameters()) <= 0.85 * sum(
        p.numel() for p in built("Llama")[0].parameters()
    )


def test_units_and_scope_choose_what_goes() -> None:
    heads = run(how=LoraPrune(rank=4, every=2, units="heads"))
    assert {g.kind for g in heads.plan.groups} == {"head"}
    channels = run(how=LoraPrune(rank=4, every=2, units="channels"), scope="*layers.1*")
    assert list(channels.plan.counts) == ["model.layers.1.mlp.gate_proj"]
    assert channels.plan.counts["model.layers.1.mlp.gate_proj"] == 12


def test_a_head_always_stays() -> None:
    made = run(how=LoraPrune(rank=4, every=2, units="heads", skip_last=0, allocation="global"))
    assert list(made.plan.counts.values()) == [1, 1, 1]
    with pytest.raises(BudgetError, match="the smallest decision keeps 3 of 6 units"):
        run(budget="sparsity=80%", how=LoraPrune(rank=4, every=2, units="heads", skip_last=0))


class _Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = tuned()

    def dies(progress: Any) -> None:
        if progress.step == 8:
            raise _Killed

    with pytest.raises(_Killed):
        run(checkpoint=tmp_path, on_step=dies)
    steps: list[int] = []
    resumed = run(checkpoint=tmp_path, on_step=lambda progress: steps.append(progress.step))
    assert steps == [*range(7, 13)]
    assert resumed.plan.same_as(whole.plan)
    assert all(torch.equal(resumed.plan.scores[n], scores) for n, scores in whole.plan.scores.items())
    assert resumed.report.recipe["loraprune"] == whole.report.recipe["loraprune"]
    pairs = zip(resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": LoraPrune(rank=4, every=11)}, "of 12 optimizer steps 10 lie between warm-up and cool-down, and units"),
        ({"how": LoraPrune(rank=64)}, "rank 64 is too high"),
        ({"recover": None}, "this method prunes while it trains: pass recover="),
        ({"budget": "2:4"}, "is a pattern of single weights"),
        ({"scope": "*layer.7*"}, "unknown pattern"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0.5, "cooldown": 0.5}, "warmup and cooldown must leave time between, got 0.5 and 0.5"),
        ({"allocation": "erk"}, "allocation 'erk' weighs shapes of weights, which heads and channels have not"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoraPrune(**options)


def test_models_without_what_it_needs_are_refused() -> None:
    model, x = built("Llama")
    arguments: dict[str, Any] = {"data": tokens(), "recover": sec.FineTune(**TUNED), "measure": False}
    with pytest.raises(ModelError, match=r"lies in model\.layers\.0, .*, which are left out: lower skip_first"):
        loraprune(model, x, "sparsity=50%", options=LoraPrune(rank=4, skip_first=0.99), **arguments)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ModelError, match=r"no channel or head in scope of Sequential lies in linear layers"):
        loraprune(conv, torch.randn(1, 3, 8, 8), "sparsity=50%", options=LoraPrune(rank=4), **arguments)


def test_layers_outside_blocks_carry_no_adapter() -> None:
    model, x = built("BERT")
    layers, structure = _within(model, x, LoraPrune(), None, ())
    # The classifier reads the pooler's units, which lie in no block.
    assert {name.split(".")[1] for name in layers} == {"encoder"}
    assert [group.kind for group in structure.groups] == ["head", "channel"]


def test_without_a_list_of_blocks_nothing_is_left_out() -> None:
    made = sec.prune(
        small(), INPUTS, "sparsity=50%", method="loraprune", options=LoraPrune(rank=4, every=2), data=batches(),
        recover=sec.FineTune(epochs=3, lr=0.05), measure=False,
    )  # fmt: skip
    assert made.plan.counts == {"0": 8}
    assert [tuple(p.shape) for p in made.model.parameters()] == [(8, 8), (8,), (8,), (8,), (4, 8), (4,)]
