"""Whole experts: what a router's positions point into is one axis, and goes as if the router had never known it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import secateurs as sec
from secateurs.core.errors import BudgetError, ModelError, OptionError, ProofError
from secateurs.criteria import score
from secateurs.deploy.huggingface import save_pretrained
from secateurs.graph.compact import on_kept
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.plan import ModelPlan
from secateurs.graph.structure import Structure
from tests.graph.proof import prove_op

transformers = pytest.importorskip("transformers")

EXPERTS, WIDTH, TOKENS = 6, 8, 11


# -- ways to route, in plain PyTorch -----------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A router and a matrix for each expert; `way` says how the tokens come to theirs."""

    def __init__(self, way: Callable[[Mixture, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts = self.expert_capacity = EXPERTS
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.matrices = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.table = nn.Embedding(EXPERTS, WIDTH)
        self.register_buffer("shift", torch.randn(EXPERTS) / 10)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x, self.router(x))


def gates_over_all(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    gates = torch.zeros_like(logits).scatter(-1, chosen, weights)
    return torch.einsum("te,eio,ti->to", gates, net.matrices, x)


def matrices_of_each(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    weights, chosen = logits.topk(2)
    made = x[:, None, None] @ net.matrices[chosen]
    return (made.squeeze(2) * weights.softmax(-1)[..., None]).sum(1)


def sigmoid_and_shift(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    scores = logits.sigmoid()
    chosen = (scores + net.shift).topk(2, sorted=False)[1]
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    return (
        torch.stack([x[:, None] @ net.matrices[c] for c in chosen.unbind(1)], 1).squeeze(2) * weights[..., None]
    ).sum(1)


def grouped(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    weights, chosen = logits.softmax(-1).topk(2)
    experts, order = chosen.flatten().sort()
    ends = torch.histc(experts.float(), bins=net.num_experts, min=0, max=net.num_experts - 1).cumsum(
        0, dtype=torch.int32
    )
    made = F.grouped_mm(x[order // 2], net.matrices, offs=ends) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // 2, made)


def counted(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    value, chosen = logits.max(-1)
    experts, order = chosen.sort()
    ends = torch.bincount(experts, minlength=net.num_experts).cumsum(0).int()
    made = F.grouped_mm(x[order], net.matrices, offs=ends)
    return made[order.argsort()] * value.sigmoid()[:, None]


def rows_of_a_table(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    chosen = logits.argmax(-1)
    return x * net.table(chosen) + net.matrices.index_select(0, chosen).sum(1)


WAYS = [gates_over_all, matrices_of_each, sigmoid_and_shift, grouped, counted, rows_of_a_table]


def looked_at(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    chosen = logits.argmax(-1)
    return x * net.table(chosen // 2)


def any_but_the_first(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    return x * logits.argmax(-1).bool()[:, None]


def told(net: Mixture, x: Tensor, logits: Tensor) -> Any:
    chosen = logits.argmax(-1)
    return x * net.table(chosen), chosen


def ranked(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    return x * net.table(logits.argsort(-1)[:, 0])


def walked(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    chosen = logits.argmax(-1)
    for expert in range(net.num_experts):
        out = out + (x @ net.matrices[expert]) * (chosen == expert)[:, None]
    return out


def mixture(way: Callable[[Mixture, Tensor, Tensor], Tensor]) -> tuple[Mixture, Tensor]:
    torch.manual_seed(0)
    return Mixture(way).eval(), torch.randn(TOKENS, WIDTH)


def experts_of(model: nn.Module, inputs: Any) -> Structure:
    return infer(model, inputs, kinds=["expert"], entangled=True)


class NeverKnown(TorchFunctionMode):
    """Runs a model as if its routers did not know some of the experts: their logits are minus infinity."""

    def __init__(self, gone: dict[int, Tensor]) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self._gone:
            return made.masked_fill(self._gone[id(args[1])], float("-inf"))
        return made


def never_known(model: nn.Module, inputs: Any, plan: ModelPlan | Structure, keep: dict[str, Tensor]) -> Any:
    """What `model` says if no router knew the experts that go."""
    gone = {}
    for group in plan.groups:
        router = next(m for m in group.members if m.rank == 2 and m.tensor.endswith("weight"))
        units = group.units_along(router)
        gone[id(model.get_parameter(router.tensor))] = ~keep[group.name][units]
    with torch.no_grad(), NeverKnown(gone):
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


KEEP = torch.tensor([True, False, True, False, True, True])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_route(way: Callable[..., Tensor]) -> None:
    net, x = mixture(way)
    structure = experts_of(net, x)
    (group,) = structure.groups
    assert (group.name, group.size, group.kind) == ("router", EXPERTS, "expert")
    assert {"router.weight", "router.bias"} < set(group.tensors)
    keep = {"router": KEEP}
    smaller = cut(net, structure, keep)
    assert (smaller.num_experts, smaller.router.out_features, smaller.expert_capacity) == (4, 4, EXPERTS)
    assert prove(mask(net, structure.groups, keep), smaller, x, on_kept(structure, keep)) < 1e-5
    torch.testing.assert_close(smaller(x), never_known(net, x, structure, keep))
    assert not torch.allclose(smaller(x), net(x))


def test_zeros_are_not_enough() -> None:
    """A router that still knows an expert of zeros sends tokens to it."""
    net, x = mixture(gates_over_all)
    structure = experts_of(net, x)
    with pytest.raises(ProofError):
        prove(mask(net, structure.groups, {"router": KEEP}), cut(net, structure, {"router": KEEP}), x)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (looked_at, "positions are looked up: floor_divide"),
        (any_but_the_first, "positions are looked up: _to_copy"),
        (told, "the model's output has positions along it"),
        (ranked, "ordered: sort"),
        (walked, "positions are looked up: eq"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_what_else_is_done_with_positions_fixes_the_experts(way: Callable[..., Any], reason: str) -> None:
    net, x = mixture(way)
    structure = experts_of(net, x)
    assert structure.groups == ()
    assert any(f.tensor == "router.weight" and f.reason.startswith(reason) for f in structure.frozen)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_experts_stay_where_nobody_asks_for_them(way: Callable[..., Tensor]) -> None:
    net, x = mixture(way)
    for entangled in (False, True):
        assert "expert" not in {g.kind for g in infer(net, x, entangled=entangled).groups}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: w.gather(1, x.topk(2)[1]),
        lambda x, w: torch.zeros_like(x).scatter(1, x.topk(2)[1], 1.0) * w,
        lambda x, w: torch.zeros_like(x).scatter_add(1, x.argmax(1, keepdim=True), x[:, :0].sum(1, keepdim=True)) + w,
        lambda x, w: w.T[x.max(1)[1]],
        lambda x, w: w.index_select(1, x.argmin(1)),
        lambda x, w: F.embedding(x.median(1)[1], w.T),
        lambda x, w: torch.histc(x.topk(2)[1].double(), x.shape[1], 0, x.shape[1] - 1).cumsum(0) * w,
        lambda x, w: w.gather(1, torch.cat([x.topk(2)[1].T, x.argmax(1)[None]]).T.contiguous().view(-1, 3)),
    ],
)
def test_rules_of_positions_give_the_shapes_they_say(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 7, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    run = prove_op(function, [x, w], [True, True], least=2)
    assert 7 in run.live().values()
    assert run.doubtful()


def test_as_many_stay_as_are_chosen() -> None:
    net, x = mixture(gates_over_all)
    assert experts_of(net, x).groups[0].least == 2
    plan = sec.plan(net, x, "sparsity=60%", granularity="expert", floor=1)
    assert plan.counts == {"router": 2}
    with pytest.raises(BudgetError):
        sec.plan(net, x, "sparsity=90%", granularity="expert", floor=1)


def test_what_is_chosen_one_after_the_other_counts_together() -> None:
    def twice(net: Mixture, x: Tensor, logits: Tensor) -> Tensor:
        first = logits.argmax(-1, keepdim=True)
        second = logits.scatter(-1, first, -math.inf).argmax(-1, keepdim=True)
        return x + net.table(torch.cat([first, second], 1)).sum(1)

    net, x = mixture(twice)
    (group,) = experts_of(net, x).groups
    assert group.least == 2


def test_a_structure_of_experts_is_written_and_read() -> None:
    net, x = mixture(grouped)
    structure = experts_of(net, x)
    again = Structure.from_dict(structure.to_dict())
    assert again == structure
    topk = next(op for op in again.doubted if op.name == "topk")
    assert again.groups[0].least == 2
    assert [str(dim) for dim in topk.into] == ["None", "router"]


# -- models of transformers --------------------------------------------------------------------------------------------

_SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
_ONE_GROUP = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1}
_ROUTED = {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "head_dim": 8, "n_shared_experts": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("mixtral", {"num_local_experts": 8}),
    "Qwen2-MoE": ("qwen2_moe", {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8}),
    "OLMoE": ("olmoe", {"num_experts": 8}),
    "DeepSeek-V2": ("deepseek_v2", {**_LATENT, **_ONE_GROUP}),
    "DeepSeek-V3": ("deepseek_v3", {**_LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}),
    "GLM-4-MoE": ("glm4_moe", {**_ROUTED, **_ONE_GROUP}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 8, "head_dim": 8}),
    "PhiMoE": ("phimoe", {"num_local_experts": 8}),
    "Granite-MoE": ("granitemoe", {"num_local_experts": 8}),
    "Llama-4": ("llama4_text", {"num_local_experts": 8, "intermediate_size_mlp": 48, "head_dim": 8}),
}


def expert_field(name: str) -> str:
    """The field of the family's config that says how many experts there are."""
    return next(
        field for field in FAMILIES[name][1] if field in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def language_model(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    kind, sizes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**_SMALL, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n or "bias" in n)):
            # Some routers begin as zeros, and nothing then tells one expert from another.
            if not tensor.any():
                tensor.normal_(std=0.1)
            elif tensor.dim() > 1:
                tensor.mul_(3)
    return model, {"input_ids": torch.randint(3, 97, (2, 9))}


def half(model: nn.Module, inputs: Any, **options: Any) -> ModelPlan:
    options = {"allocation": "uniform", "criterion": "random", **options}
    return sec.plan(model, inputs, "sparsity=50%", granularity="expert", **options)


# Routers of the same ops as others here are for another day.
_LATER = ("Qwen2-MoE", "OLMoE", "DeepSeek-V2", "GLM-4-MoE", "Granite-MoE")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in _LATER else n for n in FAMILIES])
def test_half_of_the_experts_of_a_language_model_go(name: str, tmp_path: Path) -> None:
    model, inputs = language_model(name)
    plan = half(model, inputs)
    assert plan.groups
    assert all(g.kind == "expert" and g.least == 2 for g in plan.groups)
    assert all(plan.counts[g.name] == g.size // 2 for g in plan.groups)
    smaller, error = plan.proven_cut(model)
    assert error < 1e-5
    logits = smaller(**inputs).logits
    expected = never_known(model, inputs, plan, dict(plan.keep)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, model(**inputs).logits, atol=1e-4)
    assert getattr(smaller.config, expert_field(name)) == 4
    for module in smaller.modules():
        assert getattr(module, "num_experts", 4) == 4
    save_pretrained(smaller, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-OSS"])
def test_a_cut_model_trains_generates_and_is_saved(name: str, tmp_path: Path) -> None:
    model, inputs = language_model(name)
    plan = half(model, inputs)
    file = plan.save(tmp_path / "plan.safetensors")
    smaller = ModelPlan.load(file).cut(model)
    ids = inputs["input_ids"]
    with_cache = smaller.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(with_cache, smaller.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    smaller.train()
    loss = smaller(**inputs, labels=ids).loss
    loss.backward()
    trained = [p for n, p in smaller.named_parameters() if "experts." in n or "router" in n or "gate.weight" in n]
    assert trained
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    torch.optim.SGD(smaller.parameters(), 0.1).step()
    assert smaller(**inputs, labels=ids).loss < loss


def test_with_the_loss_of_the_router() -> None:
    model, inputs = language_model("Mixtral")
    smaller = half(model, inputs).cut(model)
    made = smaller(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert made.aux_loss.isfinite()
    assert made.router_logits[0].shape[-1] == 4


def test_layers_that_keep_different_numbers_run_and_are_saved(tmp_path: Path) -> None:
    model, inputs = language_model("Mixtral")
    first, second = (g.name for g in experts_of(model, inputs).groups)
    plan = sec.plan(
        model, inputs, "sparsity=50%", granularity="expert", allocation="given",
        allocation_options={"densities": {first: 0.75, second: 0.25}},
    )  # fmt: skip
    assert plan.counts == {first: 6, second: 2}
    smaller = plan.cut(model)
    assert [layer.mlp.experts.num_experts for layer in smaller.model.layers] == [6, 2]
    assert smaller.config.num_local_experts == 8
    folder = sec.prune(
        model, inputs, "sparsity=50%", granularity="expert", allocation="given", measure=False,
        allocation_options={"densities": {first: 0.75, second: 0.25}},
    ).save(tmp_path / "cut")  # fmt: skip
    again = sec.load(folder).model
    assert torch.equal(again(**inputs).logits, smaller(**inputs).logits)


def test_groups_of_experts_stay_of_one_size() -> None:
    model, inputs = language_model("DeepSeek-V3")
    structure = experts_of(model, inputs)
    (group,) = structure.groups
    assert (group.size, group.least) == (4, 2)
    dim = structure.tensors["model.layers.1.mlp.gate.weight"][0]
    assert str(dim) == f"2·{group.name}"
    assert any("as many" in f.reason for f in structure.frozen) or "2·" in str(dim)


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_ways_to_run_experts(way: str) -> None:
    model, inputs = language_model("Qwen3-MoE")
    model.set_experts_implementation(way)
    plan = half(model, inputs)
    assert plan.proven_cut(model)[1] < 1e-5


def test_a_loop_over_experts_in_one_tensor_is_tried() -> None:
    """See test_experts_apart."""
    model, inputs = language_model("Qwen3-MoE")
    model.set_experts_implementation("eager")
    assert experts_of(model, inputs).groups == ()
    plan = half(model, inputs)
    assert plan.counts == {f"model.layers.{i}.mlp": 4 for i in range(2)}
    smaller, error = plan.proven_cut(model)
    assert error < 1e-4
    assert smaller.config.num_experts == 4
    assert smaller.model.layers[0].mlp.gate.num_experts == 4


def test_a_model_without_a_router_has_no_experts() -> None:
    with pytest.raises(ModelError, match="nothing is chosen along an axis of its parameters"):
        half(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(1, 4))


# -- criteria ----------------------------------------------------------------------------------------------------------


def slow_reap(model: Any, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """REAP and frequency token by token, from what each router says and the matrices of each expert."""
    added: dict[str, list[list[float]]] = {}
    for number, layer in enumerate(model.model.layers):
        added[f"model.layers.{number}.mlp.gate"] = [[] for _ in range(layer.mlp.experts.num_experts)]

    def hook(name: str, experts: Any) -> Callable[..., None]:
        def look(_module: nn.Module, args: Any, made: Any) -> None:
            for x, weights, chosen in zip(args[0].double(), made[1], made[2], strict=True):
                for weight, expert in zip(weights.double(), chosen.tolist(), strict=True):
                    gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
                    out = experts.down_proj[expert].double() @ (F.silu(gate) * up)
                    added[name][expert].append(float(weight * out.norm()))

        return look

    hooks = [
        layer.mlp.gate.register_forward_hook(hook(f"model.layers.{number}.mlp.gate", layer.mlp.experts))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in hooks:
        handle.remove()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    means = {n: torch.tensor([sum(of) / max(len(of), 1) for of in found]) for n, found in added.items()}
    return means, {n: torch.tensor([len(of) / tokens for of in found]) for n, found in added.items()}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "OLMoE"])
def test_reap_and_frequency_are_what_the_paper_says(name: str) -> None:
    model, inputs = language_model(name)
    batches = [inputs, {"input_ids": torch.randint(3, 97, (1, 7))}]
    groups = experts_of(model, inputs).groups
    reap, often = slow_reap(model, batches)
    torch.testing.assert_close(score("reap", model, groups, data=batches), reap, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(score("expert-frequency", model, groups, data=batches), often)
    assert float(often[groups[0].name].sum()) == pytest.approx(2)


def test_reap_counts_all_experts_of_a_unit() -> None:
    """In groups of experts a unit is one of each group."""
    model, inputs = language_model("DeepSeek-V3")
    (group,) = experts_of(model, inputs).groups
    found = score("expert-frequency", model, [group], data=[inputs])[group.name]
    assert found.shape == (4,)
    assert float(found.sum()) == pytest.approx(2)


def test_an_expert_without_tokens_goes_first() -> None:
    model, inputs = language_model("Mixtral")
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[3] = -100 * gate.weight[[0, 1, 2]].sum(0)
    groups = experts_of(model, inputs).groups
    found = score("reap", model, groups[:1], data=[inputs])[groups[0].name]
    often = score("expert-frequency", model, groups[:1], data=[inputs])[groups[0].name]
    assert torch.equal(found == 0, often == 0)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "reap", "expert-frequency"])
def test_criteria_choose_experts(criterion: str) -> None:
    model, inputs = language_model("Mixtral")
    data = [{**inputs, "labels": inputs["input_ids"]}]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = half(model, inputs, criterion=criterion, data=data)
    assert plan.counts == dict.fromkeys(plan.counts, 4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    for group in plan.groups:
        kept = plan.scores[group.name][plan.keep[group.name]]
        assert float(kept.min()) >= float(plan.scores[group.name][~plan.keep[group.name]].max())


def test_experts_whose_share_cannot_be_seen_are_named() -> None:
    model, inputs = language_model("Llama-4")
    groups = experts_of(model, inputs).groups
    with pytest.raises(ModelError, match="they are not given, for each token, its experts and their weights"):
        score("reap", model, groups, data=[inputs])
    net, x = mixture(gates_over_all)
    with pytest.raises(ModelError, match="cannot be seen: they are not given"):
        score("reap", net, experts_of(net, x).groups, data=[x])


def test_other_units_have_no_share() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(OptionError, match="criterion 'reap' scores expert groups, but '0' is a channel group"):
        sec.plan(net, torch.ones(1, 4), "params<=50%", criterion="reap", data=[torch.ones(2, 4)])


class Spatial(nn.Module):
    """The attention over pixels of CBAM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.look, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.out(x * self.look(seen).sigmoid())


def test_a_maximum_whose_position_nobody_asks_for_chooses_no_experts() -> None:
    structure = infer(Spatial(), torch.randn(2, 3, 8, 8))
    assert [(group.name, group.kind) for group in structure.groups] == [("stem", "channel")]
