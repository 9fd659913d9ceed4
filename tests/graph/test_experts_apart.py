"""Experts that are modules, or that Python walks through: found by trying, cut whole, never on a guess."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import BudgetError, ModelError, OptionError, ProofError
from secateurs.core.experts import ExpertGroup
from secateurs.criteria import score
from secateurs.deploy.huggingface import save_pretrained
from secateurs.deploy.store import load_model, save_model
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.mixtures.cut import ExpertStructure
from secateurs.graph.mixtures.infer import infer_experts
from secateurs.graph.plan import ModelPlan
from secateurs.measure.macs import macs
from tests.graph.mixtures import KINDS, OTHERS, WIDTH, Looped, Soft, Twice

X = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))


def made(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options).eval()


def found(model: nn.Module, inputs: Any = X) -> ExpertStructure:
    return infer_experts(model, inputs, lambda m: macs(m, inputs))


def never_known(model: Any, group: ExpertGroup, keep: Tensor, inputs: Tensor = X) -> Tensor:
    """What `model` says with biases or columns of its router that rule out what goes, written by hand."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        if hasattr(other, "w_gate"):
            other.w_gate = nn.Parameter(torch.cat([other.w_gate, -1e6 * (~keep)[None].float()]))
            other.w_noise = nn.Parameter(torch.cat([other.w_noise, torch.zeros(1, len(keep))]))
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
            other.experts = nn.ModuleList(_Narrow(e) for e in other.experts)
            return other(inputs)[..., :WIDTH]
        router = other.get_submodule(group.router.rpartition(".")[0])
        bias = torch.zeros(len(keep)) if router.bias is None else router.bias
        router.bias = nn.Parameter(bias.masked_fill(~keep, -1e6))
        if hasattr(router, "correction"):
            router.correction.masked_fill_(~keep, -1e6)
        return other(inputs)


class _Narrow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.inner(x[..., :WIDTH]), (0, 1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_what_is_left_is_what_a_router_would_do_that_never_knew_the_others(kind: str, data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 6), "experts")
    top = 1 if kind in ("Soft", "OneByOne") else data.draw(st.integers(1, min(2, experts - 1)), "top")
    model = made(KINDS[kind], experts=experts, top=top)
    (group,) = (structure := found(model)).groups
    assert (group.size, group.kind) == (experts, "expert")
    assert group.least >= (1 if kind == "Named" else top)
    size = data.draw(st.integers(group.least, experts), "stay")
    stays = data.draw(st.permutations(range(experts)), "which")[:size]
    keep = torch.zeros(experts, dtype=torch.bool).index_fill(0, torch.tensor(stays), True)
    smaller = cut(model, structure, {group.name: keep})
    torch.testing.assert_close(smaller(X), never_known(model, group, keep), atol=1e-5, rtol=1e-4)
    left = sum(p.numel() for p in smaller.parameters())
    assert left == structure.costs.total("params", {group.name: size})
    if group.blocks:
        assert len(smaller.get_submodule(group.name)._modules) == size
    for name in ("num_experts", "n"):
        assert getattr(smaller, name, size) == size


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_experts_are_kept_applied_and_saved(kind: str, tmp_path: Path) -> None:
    model = made(KINDS[kind])
    plan = sec.plan(model, X, "sparsity=50%", granularity="expert", floor=1)
    (name,) = plan.counts
    assert plan.counts == {name: 2}
    again = ModelPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.structure == plan.structure
    smaller, error = again.proven_cut(model)
    assert error < 1e-5
    assert plan.cost("params", relative=False) == sum(p.numel() for p in smaller.parameters())
    loaded = load_model(save_model(smaller, tmp_path / "m"), trust=("tests",))
    assert torch.equal(loaded(X), smaller(X))
    loaded.train()(X).sum().backward()
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "expert" in n or "gat" in n)
    masked = plan.mask(model)
    gone = [t for t, stays in plan.masks(model).items() if not stays.any()]
    assert all(not masked.get_parameter(t).any() for t in gone)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_mixture_stays_with_a_reason(kind: str) -> None:
    model = made(OTHERS[kind])
    structure = found(model)
    assert structure.groups == ()
    (frozen,) = structure.frozen
    assert (frozen.tensor, frozen.size) == ("experts", 4)
    assert frozen.reason.startswith(
        ("removing one is not as if its router", "the router cannot do without", "nothing that")
    )
    with pytest.raises(ModelError, match=r"nothing to prune in .* experts stays, (removing|the router|nothing)"):
        sec.plan(model, X, "sparsity=50%", granularity="expert")


def test_experts_that_did_not_run_stay() -> None:
    assert "nothing that the model computes on these inputs" in found(made(OTHERS["Idle"])).frozen[0].reason


def test_experts_that_others_share_stay() -> None:
    model = made(Looped)
    model.experts[1][0].weight = model.experts[0][0].weight
    assert [f.reason for f in found(model).frozen] == ["other modules share their parameters"]


def test_a_list_without_a_router_is_not_talked_about() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[1](self.blocks[0](x)))

    assert found(Chain(), torch.ones(1, 5)).frozen == ()


class Layers(nn.Module):
    """Two mixtures in layers as many as there are experts, whose numbers all look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Looped(experts=2, top=1) for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_layers_are_no_experts() -> None:
    structure = found(made(Layers))
    assert [(g.name, g.size, g.router) for g in structure.groups] == [
        (f"layers.{i}.experts", 2, f"layers.{i}.gate.weight") for i in range(2)
    ]


def test_scope_and_ignore_choose_among_routers() -> None:
    model = made(Layers)
    plan = sec.plan(model, X, "sparsity=50%", granularity="expert", scope="layers.0.*")
    assert plan.counts == {"layers.0.experts": 1}
    plan = sec.plan(model, X, "sparsity=50%", granularity="expert", ignore="layers.0.experts")
    assert plan.counts == {"layers.1.experts": 1}
    assert plan.cut(model).layers[1].num_experts == 1
    with pytest.raises(OptionError, match="nowhere"):
        sec.plan(model, X, "sparsity=50%", granularity="expert", scope="nowhere")


def test_what_has_a_place_for_each_expert_follows() -> None:
    model = made(KINDS["Kept"])
    keep = torch.tensor([True, False, True, True])
    (group,) = (structure := found(model)).groups
    assert {"scale", "gate.weight", "gate.bias"} < set(group.tensors)
    smaller = cut(model, structure, {"experts": keep})
    assert smaller.scale.shape == smaller.usage.shape == smaller.seen.shape == (3,)
    assert torch.isfinite(smaller.usage).all()
    assert smaller.train()(X).shape == X.shape
    assert int(smaller.seen.sum()) == 21
    assert ExpertStructure.from_dict(structure.to_dict(), structure.costs) == structure


def test_places_that_are_none_stay() -> None:
    """Eight experts, and as many inputs: the norm's scale has nothing to do with them."""

    class Normed(Looped):
        def __init__(self) -> None:
            super().__init__(experts=WIDTH, top=1)
            self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    model = made(Normed)
    (group,) = (structure := found(model)).groups
    assert "scale" not in group.tensors
    smaller = cut(model, structure, {"experts": torch.arange(WIDTH) < 3})
    assert (smaller.scale.shape, smaller.gate.weight.shape) == ((WIDTH,), (3, WIDTH))


def test_one_module_may_hold_several_mixtures() -> None:
    model = made(Twice)
    structure = found(model)
    assert structure.sizes == {"model": 3, "model#2": 5}
    keep = {"model": torch.arange(3) > 0, "model#2": torch.arange(5) % 2 == 0}
    smaller = cut(model, structure, keep)
    assert (len(smaller.three), len(smaller.five), smaller.second.out_features) == (2, 3, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.bias[0] = other.second.bias[1] = other.second.bias[3] = -1e6
    torch.testing.assert_close(smaller(X), other(X))


def test_as_many_stay_as_are_chosen() -> None:
    model = made(Looped, experts=5, top=3)
    assert found(model).groups[0].least == 3
    with pytest.raises(BudgetError):
        sec.plan(model, X, "sparsity=80%", granularity="expert", floor=1)


def test_costs_say_what_experts_cost() -> None:
    """Sent to as many as before, tokens cost as much, but for the router; with all experts for all, they do not."""
    sparse, dense = made(Looped), made(Soft)
    whole = macs(sparse, X)
    for model in (sparse, dense):
        structure = found(model)
        (group,) = structure.groups
        smaller = cut(model, structure, {group.name: torch.arange(4) < 2})
        assert structure.costs.total("macs", {group.name: 2}) == macs(smaller, X)
        assert structure.costs.total("bytes", {group.name: 2}) == sum(p.nbytes for p in smaller.parameters())
    assert found(sparse).costs.total("macs", {"experts": 2}) == whole - 2 * X[..., 0].numel() * WIDTH
    assert found(dense).costs.total("macs", {"paths": 2}) < 0.6 * macs(dense, X)


def test_the_proof_fails_where_the_cut_is_wrong() -> None:
    model = made(Looped)
    structure = found(model)
    keep = {"experts": torch.arange(4) < 3}
    smaller = cut(model, structure, keep)
    with pytest.raises(ProofError):
        prove(mask(model, structure.groups, keep), smaller, X)


def test_inspection_lists_experts() -> None:
    (group,) = sec.inspect(made(Looped), X, granularity="expert").groups
    assert (group.name, group.kind, group.size, group.makers[0]) == ("experts", "expert", 4, "experts.0")
    assert group.params_per_unit == 8 * 12 + 12 + 12 * 8 + 8 + 8 + 1


# -- criteria ----------------------------------------------------------------------------------------------------------


def slow_reap(model: Looped, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = model.gate(x).softmax(-1).topk(model.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    added, tokens = torch.zeros(model.num_experts), torch.zeros(model.num_experts)
    for row, w, c in zip(x, weights, chosen, strict=True):
        for weight, number in zip(w, c.tolist(), strict=True):
            added[number] += weight * model.experts[number](row).norm()
            tokens[number] += 1
    return added / tokens.clamp(min=1), tokens / len(x)


@torch.no_grad()
def test_reap_and_frequency_see_experts_that_are_modules() -> None:
    model = made(Looped)
    groups = found(model).groups
    reap, often = slow_reap(model, X.reshape(-1, WIDTH))
    data = [X[:1], X[1:]]
    torch.testing.assert_close(score("reap", model, groups, data=data)["experts"].float(), reap)
    torch.testing.assert_close(score("expert-frequency", model, groups, data=data)["experts"].float(), often)


@pytest.mark.parametrize("kind", ["Named", "Noisy", "OneByOne", "Biased"])
def test_weights_are_seen_however_they_are_multiplied(kind: str) -> None:
    model = made(KINDS[kind])
    groups = found(model).groups
    reap = score("reap", model, groups, data=[X])[groups[0].name]
    assert reap.shape == (4,)
    assert bool((reap > 0).any())


def test_experts_whose_weights_cannot_be_seen_are_named() -> None:
    for kind in ("Soft", "Stacked"):
        model = made(KINDS[kind])
        groups = found(model).groups
        with pytest.raises(ModelError, match=r"what the experts of .* add cannot be seen"):
            score("reap", model, groups, data=[X])


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random", "reap", "expert-frequency"])
def test_criteria_choose_experts(criterion: str) -> None:
    model = made(Looped)
    with torch.no_grad():
        for p in model.experts[2].parameters():
            p.mul_(1e-3)
        model.gate.weight[2] = 0
        model.gate.bias[2] = -9
    plan = sec.plan(
        model, X, "sparsity=20%", granularity="expert", criterion=criterion,
        data=[(X, torch.randn(3, 7, WIDTH))], loss=nn.functional.mse_loss, floor=1,
    )  # fmt: skip
    assert plan.counts == {"experts": 3}
    assert criterion == "random" or not plan.keep["experts"][2]


def test_magnitude_is_that_of_stacked_experts() -> None:
    """As it is for experts in one tensor [experts, …, …]."""
    model = made(Looped)
    (group,) = found(model).groups
    saliency = {n: p.detach().square() for n, p in model.named_parameters()}
    lifted = group.lift(saliency)
    stacked = torch.stack([e[2].weight.square() for e in model.experts]).sum((1, 2))
    torch.testing.assert_close(lifted["experts.*.2.weight"], stacked.detach())
    torch.testing.assert_close(lifted["gate.weight"], model.gate.weight.detach().square().sum(1))
    assert len(lifted) == 6


# -- models of transformers --------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
_SWITCH = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_JET = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
    "intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Switch Transformers": ("SwitchTransformersForConditionalGeneration", _SWITCH, 1),
    "JetMoE": ("JetMoeForCausalLM", _JET, 2),
}


def language_model(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    kind, sizes, _ = FAMILIES[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(3)
    inputs = {"input_ids": torch.randint(3, 97, (2, 9))}
    if "Switch" in kind:
        inputs["decoder_input_ids"] = torch.randint(3, 97, (2, 6))
    return model, inputs


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_experts_of_a_language_model_go(name: str, tmp_path: Path) -> None:
    model, inputs = language_model(name)
    plan = sec.plan(
        model, inputs, "sparsity=50%", granularity="expert", criterion="random", allocation="uniform", floor=1
    )
    assert plan.groups
    assert all(g.least == FAMILIES[name][2] and plan.counts[g.name] == g.size // 2 for g in plan.groups)
    smaller, error = plan.proven_cut(model)
    assert error < 1e-4
    whole, half = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    assert (plan.cost("params", relative=False), half < whole) == (half, True)
    field = "num_experts" if "Switch" in name else "num_local_experts"
    assert getattr(smaller.config, field) == getattr(model.config, field) // 2
    counted = [getattr(module, "num_experts", None) for module in smaller.modules()]
    assert {n for n in counted if n is not None} == {getattr(smaller.config, field)}
    logits = smaller(**inputs).logits
    save_pretrained(smaller, tmp_path / "hf", example_inputs=inputs)
    assert torch.equal(type(model).from_pretrained(tmp_path / "hf").eval()(**inputs).logits, logits)
    assert torch.equal(load_model(save_model(smaller, tmp_path / "m"))(**inputs).logits, logits)
    ids = inputs["input_ids"]
    with_cache = smaller.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(with_cache, smaller.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


@pytest.mark.slow
def test_a_fresh_process_gives_the_same(tmp_path: Path) -> None:
    model, inputs = language_model("Switch Transformers")
    smaller = sec.prune(model, inputs, "sparsity=50%", granularity="expert", measure=False, floor=1).model
    save_model(smaller, tmp_path / "m")
    torch.save(inputs, tmp_path / "x.pt")
    code = (
        "from tests.support.torchvision_shim import declare_missing_ops; declare_missing_ops()\n"
        "import torch; from secateurs.deploy.store import load_model\n"
        f"model, x = load_model({str(tmp_path / 'm')!r}), torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"torch.save(model(**x).logits.detach(), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), smaller(**inputs).logits)


def test_experts_that_code_takes_by_their_number_stay() -> None:
    """NLLB-MoE in transformers 5 takes the mask of the chosen for their numbers: expert 1 has all of them."""
    config = transformers.NllbMoeConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, num_experts=4, encoder_sparse_step=1,
        decoder_sparse_step=2, max_position_embeddings=64, decoder_start_token_id=2, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.NllbMoeForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.randint(3, 97, (2, 9)), "decoder_input_ids": torch.randint(3, 97, (2, 6))}
    with pytest.raises(ModelError, match=r"model.encoder.layers.0.ffn.experts stays, (removing one|nothing that)"):
        sec.plan(model, inputs, "sparsity=50%", granularity="expert")
