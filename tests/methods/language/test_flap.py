"""FLAP: one ranking of z-scores, weighed by costs, and means that stay in the biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from benchmarks.families import FAMILIES
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.methods.language.cfsp import Cfsp
from secateurs.methods.language.flap import Flap, flap

OPTIONS = {"flap": Flap(), "cfsp": Cfsp(compensation=True)}


def tokens(batches: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 100, (4, 16), generator=generator)} for _ in range(batches)]


def family(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return FAMILIES[name]()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Qwen2", "BERT"])
def test_families_are_cut_run_and_come_back(name: str, method: str, tmp_path: Path) -> None:
    model, x = family(name)
    made = sec.prune(model, x, "sparsity=30%", method=method, options=OPTIONS[method], data=tokens(), measure=False)
    total = sum(group.size for group in made.plan.groups)
    assert sum(made.plan.counts.values()) == total - round(0.3 * total)
    assert all(count >= 1 for count in made.plan.counts.values())
    assert {group.kind for group in made.plan.groups} == ({"channel", "head"} if method == "flap" else {"channel"})
    # The proof is between the masked model and the cut one, both with their compensation.
    assert made.report.proof is not None
    assert made.report.proof < 1e-4
    back = sec.load(made.save(tmp_path / "saved")).model.eval()
    with torch.no_grad():
        assert torch.equal(back(**x).logits, made.model.eval()(**x).logits)
    if name != "BERT":
        ids = [m.generate(x["input_ids"][:, :5], max_new_tokens=4, do_sample=False) for m in (made.model, back)]
        assert torch.equal(*ids)


def test_a_head_weighs_what_its_removal_saves() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    plan = sec.plan(LlamaForCausalLM(config).eval(), {"input_ids": torch.ones(1, 4, dtype=torch.long)}, "sparsity=0%")
    sizes = {group.name: group.size for group in plan.groups}
    head, channel = (plan.costs.unit("params", name, sizes) for name in sizes)
    assert head / channel == pytest.approx(512 / 3)
    # LLaMA-7B in channels: 32 layers of 32 heads of this size and 11,008 channels.
    assert 32 * (32 * head / channel + 11008) == pytest.approx(527018.67, abs=0.005)


def test_one_ranking_is_blind_to_the_scale_of_a_layer_and_a_raw_one_is_not() -> None:
    model, x = family("Llama")
    with torch.no_grad():
        scaled, _ = family("Llama")
        # As much of what its consumer sees: the metric of the layer's channels grows by 25.
        scaled.model.layers[0].mlp.down_proj.weight.mul_(5)

    def counts(net: nn.Module, **options: Any) -> dict[str, int]:
        plan = sec.plan(
            net, x, "sparsity=30%", data=tokens(), criterion="fluctuation", criterion_options=options, floor=1,
            scope="*.mlp.gate_proj",
        )  # fmt: skip
        return plan.counts

    assert counts(model, standardize=True)["model.layers.0.mlp.gate_proj"] == pytest.approx(
        counts(scaled, standardize=True)["model.layers.0.mlp.gate_proj"], abs=6
    )
    assert counts(scaled)["model.layers.0.mlp.gate_proj"] == 128
    assert counts(model)["model.layers.0.mlp.gate_proj"] < 120


def test_uniform_takes_the_same_share_of_every_layer_and_ranks_without_scores_of_others() -> None:
    model, x = family("Llama")
    made = flap(model, x, "sparsity=50%", options=Flap(structure="UL-UM"), data=tokens(), measure=False)
    assert list(made.plan.counts.values()) == [1, 64, 1, 64]
    assert made.plan.recipe.criterion_options["standardize"] is False


def test_equal_shares_are_blind_to_the_scale_of_a_layer() -> None:
    """By four, so that scores are scaled without rounding."""
    (model, x), (scaled, _) = family("Llama"), family("Llama")
    with torch.no_grad():
        scaled.model.layers[1].mlp.down_proj.weight.mul_(4)
    one, other = (
        flap(net, x, "sparsity=50%", options=Flap(structure="UL-UM", compensation=False), data=tokens(), measure=False)
        for net in (model, scaled)
    )
    assert one.plan.same_as(other.plan)


@pytest.mark.parametrize("options", [Flap(), Flap(structure="UL-UM")])
def test_nothing_goes_when_nothing_is_asked(options: Flap) -> None:
    model, x = family("Llama")
    made = flap(model, x, "sparsity=0%", options=options, data=tokens(), measure=False)
    assert all(mask.all() for mask in made.plan.keep.values())
    assert all(torch.equal(p, made.model.get_parameter(n)) for n, p in model.named_parameters())


def test_the_biases_make_the_layers_output_right_on_average() -> None:
    model, x = family("OPT")
    data = tokens()
    made = {
        kept: flap(model, x, "params<=85%", options=Flap(compensation=kept), data=data, measure=False)
        for kept in (True, False)
    }
    assert made[True].plan.same_as(made[False].plan)

    def first(net: nn.Module) -> Tensor:
        """What the first feed-forward layer adds, over the same inputs in both: nothing before it has changed."""
        seen: list[Tensor] = []
        hook = net.model.decoder.layers[0].fc2.register_forward_hook(lambda _m, _i, out: seen.append(out))
        with torch.no_grad():
            for batch in data:
                net.eval()(**batch)
        hook.remove()
        return torch.cat([one.flatten(0, -2) for one in seen]).mean(0)

    assert made[True].plan.counts["model.decoder.layers.0.self_attn.q_proj"] == 4
    wanted = first(model)
    torch.testing.assert_close(first(made[True].model), wanted, rtol=1e-4, atol=1e-6)
    assert (first(made[False].model) - wanted).abs().max() > 1e-3


def test_only_channels_and_only_what_is_in_scope() -> None:
    model, x = family("BERT")
    made = flap(model, x, "sparsity=30%", options=Flap(units="channels"), data=tokens(), measure=False)
    assert list(made.plan.counts) == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    made = flap(model, x, "sparsity=30%", data=tokens(), measure=False, ignore="*.layer.0.*")
    assert list(made.plan.counts) == [
        f"bert.encoder.layer.1.{n}" for n in ("attention.self.query", "intermediate.dense")
    ]
    with pytest.raises(OptionError, match=r"unknown pattern 'nowhere'"):
        flap(model, x, "sparsity=30%", data=tokens(), scope="nowhere")


def test_heads_that_blocks_share_go_and_streams_stay() -> None:
    model, x = family("T5")
    made = flap(model, x, "sparsity=30%", data=[x], measure=False)
    shared = [group for group in made.plan.groups if group.kind == "head"]
    assert len(shared) == 3
    assert all(any(f"block.{i}." in t for t in group.tensors) for group in shared for i in range(2))
    inner = [group.name for group in made.plan.groups if group.kind == "channel"]
    assert len(inner) == 4
    assert all(name.endswith("DenseReluDense.wi") for name in inner)


def test_a_model_without_such_units_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(ModelError, match="no channel or head of a block of Sequential can go by itself"):
        flap(model, torch.randn(2, 4), "sparsity=30%", data=[torch.randn(2, 4)])


def test_data_are_needed_and_a_checkpoint_is_of_its_options(tmp_path: Path) -> None:
    model, x = family("Llama")
    with pytest.raises(DataError, match="needs calibration data"):
        flap(model, x, "sparsity=30%")
    flap(model, x, "sparsity=30%", data=tokens(1), checkpoint=tmp_path, measure=False)
    with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
        flap(model, x, "sparsity=30%", data=tokens(1), checkpoint=tmp_path, options=Flap(metric="ifv"))


BASELINES = {
    "wanda-sp": {"criterion": "fluctuation", "criterion_options": {"metric": "wifn"}},
    "magnitude-sp": {"criterion": "magnitude", "criterion_options": {"members": "in", "norm": 2}},
}


@pytest.mark.parametrize("options", BASELINES.values(), ids=BASELINES)
def test_the_baselines_are_compositions(options: dict[str, Any]) -> None:
    model, x = family("Llama")
    decided = sec.plan(model, x, "sparsity=50%", data=tokens(), allocation="uniform", floor=1, **options)
    assert list(decided.counts.values()) == [1, 64, 1, 64]
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    if options["criterion"] == "magnitude":
        kept = weight.norm(dim=0).topk(64).indices.sort().values
        assert torch.equal(decided.keep["model.layers.0.mlp.gate_proj"].nonzero().flatten(), kept)
