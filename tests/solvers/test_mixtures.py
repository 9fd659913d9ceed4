"""The mixtures of transformers, whose experts are stacked: what each sees, and what goes of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.criteria.activation import wanda
from secateurs.solvers import grams_of, parts_of
from secateurs.solvers.stacks import input_axis
from secateurs.train.scope import stack_names
from tests.graph.test_experts import language_model

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "GPT-OSS", "Llama-4", "Granite-MoE")


def batches(padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(3, 97, (3, 12), generator=generator)} for _ in range(2)]
    if padded:
        for batch in made:
            batch["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [5], [8]])).long()
    return made


def experts_of(model: nn.Module) -> str:
    """The name of the last module with stacks."""
    return max(stack_names(model)).rpartition(".")[0]


def rows_of(module: nn.Module, args: tuple[Tensor, ...], counting: Tensor) -> list[Tensor]:
    """Per expert the tokens that it is given, of those that count."""
    if len(args) == 1:
        each = args[0].view(module.num_experts, -1, args[0].shape[-1])
        return [rows[(rows != 0).any(1) & counting] for rows in each]
    return [args[0][(args[1] == expert).any(1) & counting] for expert in range(module.num_experts)]


@pytest.mark.parametrize("way", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_expert_has_the_gram_of_its_tokens(name: str, padded: bool, way: str) -> None:
    model, _ = language_model(name)
    model.config._experts_implementation = way
    data, path = batches(padded), experts_of(model)
    seen = [batch["attention_mask"].bool() if padded else None for batch in data]
    module = model.get_submodule(path)
    given: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    stacks = [f"{path}.gate_up_proj", f"{path}.down_proj"]
    grams, _ = grams_of(model, data, stacks, seen=seen)
    assert model.config._experts_implementation == way
    counting = torch.ones(36, dtype=torch.bool) if seen[0] is None else seen[0].flatten()
    rows = [torch.cat(parts) for parts in zip(*(rows_of(module, args, counting) for args in given), strict=True)]
    weights = [list(parts_of(model, stack).values()) for stack in stacks]
    assert sum(map(len, rows)) == sum(grams[f"{stacks[0]}[{expert}]"].count for expert in range(8))
    for expert, x in enumerate(rows):
        if not len(x):
            assert grams[f"{stacks[0]}[{expert}]"].count == grams[f"{stacks[1]}[{expert}]"].count == 0
            continue
        made = x @ weights[0][expert].weight.T
        if name == "GPT-OSS":
            inner = module._apply_gate(made + module.gate_up_proj_bias[expert])
        else:
            gate, up = made.chunk(2, 1)
            inner = module.act_fn(gate) * up
        for stack, found in zip(stacks, (x, inner), strict=True):
            wide = found.detach().double()
            gram = grams[f"{stack}[{expert}]"]
            assert gram.count == len(wide)
            torch.testing.assert_close(gram.hessian[0], 2 * wide.T @ wide / len(wide), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("method", "budget"), [("wanda", "2:4"), ("sparsegpt", "sparsity=50%"), ("dsnot", "4:8")])
def test_of_each_expert_goes_what_was_asked(name: str, method: str, budget: str) -> None:
    model, inputs = language_model(name)
    made = sec.prune(model, inputs, budget, method=method, data=batches(), measure=False)
    of = {"2:4": 4, "4:8": 8}.get(budget)
    experts = 0
    for stack in stack_names(model):
        mask, before = made.masks[stack], model.get_parameter(stack)
        after = made.model.get_parameter(stack)
        assert torch.equal(after != 0, mask)
        for kept, old, new in zip(mask.movedim(input_axis(model, stack), -1), before, after, strict=True):
            if bool(kept.all()):
                assert torch.equal(old, new)
                continue
            experts += 1
            assert int(kept.sum()) == kept.numel() // 2
            assert of is None or kept.reshape(-1, of).sum(1).unique().tolist() == [of // 2]
    assert experts >= len(stack_names(model)) * 4


@pytest.mark.parametrize("name", ["GPT-OSS", "Mixtral"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria"])
def test_patterns_of_one_shot_run_along_the_inputs_of_experts(name: str, criterion: str) -> None:
    model, inputs = language_model(name)
    options: dict[str, Any] = {} if criterion == "magnitude" else {"data": batches()}
    options |= {"granularity": "weight", "criterion": criterion, "scope": "*.experts.*_proj"}
    plan = sec.plan(model, inputs, "2:4", **options)
    for stack, mask in plan.masks(model).items():
        runs = mask.movedim(input_axis(model, stack), -1).reshape(-1, 4)
        assert runs.sum(1).unique().tolist() == [2]
    assert set(plan.masks(model)) == set(stack_names(model))


@pytest.mark.parametrize("name", ["GPT-OSS", "Mixtral"])
def test_scores_of_experts_are_weights_times_the_norms_of_their_tokens(name: str) -> None:
    model, _ = language_model(name)
    stack = max(stack_names(model))
    found = wanda(model, [stack], data=batches(), seed=0)[stack]
    grams, _ = grams_of(model, batches(), [stack])
    for expert, (part, module) in enumerate(parts_of(model, stack).items()):
        gram = grams[part]
        norms = (gram.hessian[0].diagonal() * gram.count / 2).sqrt() if gram.count else torch.zeros(module.in_features)
        expected = (module.weight.abs() * norms).to(found)
        mine = found[expert].T if input_axis(model, stack) == 1 else found[expert]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
