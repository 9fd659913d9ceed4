"""Bias compensation of a cut: means that stay behind, biases that are created, and everything after the cut."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import DataError, ModelError, OptionError
from secateurs.deploy.huggingface import save_pretrained
from secateurs.graph.plan import ModelPlan
from secateurs.methods.compensation import compensated
from secateurs.methods.repair import repaired
from tests.criteria.models import account, mlp, unruly
from tests.methods.test_repair import NETWORKS

DOUBLE = torch.float64


def halved(model: nn.Module, x: Any, budget: str = "sparsity=50%", **options: Any) -> ModelPlan:
    return sec.plan(model, x, budget, **{"allocation": "uniform", "floor": 1, **options})


def layer(width: int = 8, bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return mlp(5, width, 3, bias=bias, activation=nn.GELU, dtype=DOUBLE), torch.randn(40, 5, dtype=DOUBLE)


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_of_what_goes_is_in_the_bias_of_what_consumed_it(bias: bool) -> None:
    model, x = layer(bias=bias)
    decided = halved(model, x)
    made = compensated(model, decided, [x[:15], x[15:]])
    goes = ~decided.keep["0"]
    with torch.no_grad():
        mean = model[1](model[0](x)).mean(0)
        moved = model[2].weight[:, goes] @ mean[goes]
        before = model[2].bias if bias else torch.zeros(3, dtype=DOUBLE)
        torch.testing.assert_close(made[2].bias, before + moved)
    assert torch.equal(made[2].weight, model[2].weight)
    assert torch.equal(made[0].weight, model[0].weight)
    assert (made[0].bias is None) == (not bias)


def test_a_channel_that_is_constant_is_not_missed() -> None:
    model, x = layer()
    with torch.no_grad():
        # Four units are constants, not zeros, and least in magnitude where they are produced.
        model[0].weight[::2] = 0
        model[0].bias[::2] = 1.5
    decided = halved(model, x, criterion_options={"members": "out"})
    assert decided.keep["0"].tolist() == [False, True] * 4
    cut = decided.cut(compensated(model, decided, [x]))
    assert torch.allclose(cut(x), model(x), atol=1e-12)
    assert not torch.allclose(decided.cut(model)(x), model(x), atol=1e-2)


def test_the_mean_output_is_as_before() -> None:
    model, x = layer(16)
    decided = halved(model, x)
    cut = decided.cut(compensated(model, decided, [x]))
    torch.testing.assert_close(cut(x).mean(0), model(x).mean(0))
    assert (decided.cut(model)(x).mean(0) - model(x).mean(0)).abs().max() > 1e-3


def test_biases_that_are_created_are_cut_with_the_units_that_they_belong_to(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = mlp(5, 8, 6, 3, activation=nn.GELU), torch.randn(30, 5)
    decided = halved(model, x)
    made = sec.prune(
        model, x, "sparsity=50%", allocation="uniform", floor=1, repair=partial(compensated, data=[x]), measure=False
    )
    assert [m.bias is None for m in made.model if isinstance(m, nn.Linear)] == [True, False, False]
    assert made.model[2].bias.shape == (3,)
    masked = decided.mask(compensated(model, decided, [x]))
    # Compensation of a unit that goes goes with it.
    assert torch.equal(masked[2].bias != 0, decided.keep["2"])
    torch.testing.assert_close(made.model(x), masked(x))
    back = sec.load(made.save(tmp_path / "saved"))
    assert torch.equal(back.model(x), made.model(x))
    assert made.plan.same_as(decided)
    # A plan of the model as it was still fits it, and any other model is refused as before.
    assert decided.cut(model)[2].bias is None
    other = mlp(5, 8, 6, 3, bias=True)
    other[0].weight = nn.Parameter(torch.zeros(9, 5))
    with pytest.raises(sec.core.errors.PlanError, match=r"0\.weight has shape \[9, 5\]"):
        decided.check(other)


def test_a_plan_knows_what_biases_cost_that_were_added() -> None:
    model, x = mlp(5, 8, 6, 3), torch.randn(30, 5)
    decided = halved(model, x)
    suited = decided.suited(compensated(model, decided, [x]))
    assert suited.cost("params", relative=False) == decided.cost("params", relative=False) + 3 + 3
    assert suited.cost("bytes", relative=False) == decided.cost("bytes", relative=False) + 4 * (3 + 3)
    assert decided.suited(model).structure is decided.structure


def test_patches_of_a_convolution_and_its_groups_have_means_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.Flatten()
    ).double()
    x = torch.randn(4, 3, 6, 6, dtype=DOUBLE) + 1
    decided = halved(model, x, scope="0")
    with torch.no_grad():
        cut, plain = decided.cut(compensated(model, decided, [x])), decided.cut(model)
        by_channel = [(m(x) - model(x)).view(4, 4, 36).mean((0, 2)) for m in (cut, plain)]
    assert by_channel[0].abs().max() < 1e-12
    assert by_channel[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "transposed"])
def test_only_biases_of_consumers_change_and_the_cut_is_proven(name: str) -> None:
    torch.manual_seed(2)
    build, shape, changed = NETWORKS[name]
    model, x = build().eval(), torch.randn(shape)
    decided = halved(model, x)
    made = compensated(model, decided, [x])
    known = dict(model.named_parameters())
    other = {n for n, p in made.named_parameters() if n not in known or not torch.equal(p, known[n])}
    assert other
    assert {n.removesuffix("bias") + "weight" for n in other} <= set(known)
    if changed:
        assert other == {weight.removesuffix("weight") + "bias" for weight in changed}
    with torch.no_grad():
        dense, cut, plain = model(x), decided.cut(made).eval()(x), decided.cut(model).eval()(x)
        # Over several layers, what is best for each is not always best for the last.
        if changed and len(changed) == 1:
            assert (cut - dense).square().sum() < (plain - dense).square().sum()


def test_pytorch_s_own_attention_gets_its_bias() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, bias=False).eval()
    x = torch.randn(3, 7, 16)
    decided = halved(model, x)
    made = compensated(model, decided, [x])
    assert made.self_attn.out_proj.bias is not None
    assert made.linear2.bias is not None
    decided.cut(made)


def test_padding_does_not_count() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24,
    )).eval()  # fmt: skip
    ids, mask = torch.randint(20, (1, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]])
    decided = halved(model, {"input_ids": ids}, granularity="channel", scope="*gate_proj")
    padded, short = (
        compensated(model, decided, [batch])
        for batch in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :4]})
    )
    one, other = (m.model.layers[0].mlp.down_proj.bias for m in (padded, short))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_it_follows_the_repair_of_the_weights() -> None:
    model, x = layer(16)
    decided = halved(model, x)
    both = compensated(repaired(model, decided, [x]), decided, [x])
    # What repaired weights give to inputs that go is nothing.
    torch.testing.assert_close(both[2].bias, model[2].bias)


def test_the_model_is_left_as_it_was() -> None:
    model, x = layer(bias=False)
    decided, model = halved(model, x), unruly(model)
    before = account(model)
    compensated(model, decided, [x])
    assert account(model) == before


def test_what_is_refused() -> None:
    model, x = layer()
    with pytest.raises(DataError, match="calibration data is empty"):
        compensated(model, halved(model, x), [])
    with pytest.raises(OptionError, match="consumers of removed channels; this plan removes single weights"):
        compensated(model, sec.plan(model, x, "sparsity=50%", granularity="weight"), [x])
    with pytest.raises(DataError, match="the inputs of 2 are NaN or infinite on the calibration data"):
        compensated(model, halved(model, x), [x * torch.nan])
    turned = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3, stride=2))
    image = torch.randn(2, 3, 9)
    with pytest.raises(ModelError, match=r"2 consumes what goes and cannot be compensated: its patches overlap"):
        compensated(turned, halved(turned, image), [image])


class Halves(nn.Module):
    """Two layers of one width, of which the second never runs unless the input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down[0](hidden) + self.down[1](hidden)[:0].sum() if len(x) > 5 else self.down[0](hidden)


def test_a_layer_that_saw_nothing_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Halves()
    decided = halved(model, torch.randn(9, 4))
    with pytest.warns(UserWarning, match=r"down\.1 saw no token of the calibration data and stays as it is"):
        made = compensated(model, decided, [torch.randn(3, 4)])
    assert torch.equal(made.down[1].bias, model.down[1].bias)
    assert not torch.equal(made.down[0].bias, model.down[0].bias)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def tiny(kind: str, **sizes: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A causal language model of two blocks."""
    import transformers

    common = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**common, **sizes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval(), {"input_ids": torch.randint(40, (2, 9))}


def test_flags_of_a_config_say_which_biases_there_are(tmp_path: Path) -> None:
    model, x = tiny("llama")
    made = sec.prune(
        model, x, "sparsity=50%", allocation="uniform", repair=partial(compensated, data=[x]), measure=False
    ).model
    assert (made.config.attention_bias, made.config.mlp_bias) == (True, True)
    assert (made.config.num_attention_heads, made.config.intermediate_size) == (2, 24)
    assert (model.config.attention_bias, model.config.mlp_bias) == (False, False)
    # The config can say biases of q, k, v and o only together: the first three are zeros.
    attention = made.model.layers[0].self_attn
    assert not attention.q_proj.bias.any()
    assert attention.k_proj.bias.shape == (8,)
    assert attention.o_proj.bias.abs().min() > 0
    save_pretrained(made, tmp_path / "m", example_inputs=x)
    loaded = type(made).from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, made.eval()(**x).logits)


def test_only_the_flags_that_are_needed_are_turned(tmp_path: Path) -> None:
    model, x = tiny("llama")
    made = sec.prune(
        model, x, "sparsity=50%", allocation="uniform", scope="*gate_proj", repair=partial(compensated, data=[x]),
        measure=False,
    ).model  # fmt: skip
    assert (made.config.attention_bias, made.config.mlp_bias) == (False, True)
    assert made.model.layers[0].self_attn.o_proj.bias is None
    save_pretrained(made, tmp_path / "m", example_inputs=x)


@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
def test_where_no_flag_says_it_only_what_is_needed_is_created(kind: str, tmp_path: Path) -> None:
    model, x = tiny(kind, head_dim=8)
    made = sec.prune(
        model, x, "sparsity=50%", allocation="uniform", repair=partial(compensated, data=[x]), measure=False
    )
    names = {name for name, _ in made.model.named_parameters()} - {name for name, _ in model.named_parameters()}
    parts = ("self_attn.o_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{part}.bias" for i in range(2) for part in parts}
    with pytest.raises(
        ModelError, match=r"makes no 'model\.layers\.0\.self_attn\.o_proj\.bias', and nothing in it can"
    ):
        save_pretrained(made.model, tmp_path / "m", example_inputs=x)
    back = sec.load(made.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(back.model.eval()(**x).logits, made.model.eval()(**x).logits)


def test_layers_of_different_widths_get_no_more_than_they_need(tmp_path: Path) -> None:
    model, x = tiny("llama")
    with torch.no_grad():
        for block, scale in zip(model.model.layers, (1.0, 9.0), strict=True):
            block.mlp.gate_proj.weight.mul_(scale)
    made = sec.prune(
        model, x, "sparsity=50%", scope="*gate_proj", criterion_options={"normalize": "none"},
        repair=partial(compensated, data=[x]), measure=False,
    )  # fmt: skip
    widths = [block.mlp.up_proj.out_features for block in made.model.model.layers]
    assert all(a != b for a, b in pairwise(widths))
    names = {name for name, _ in made.model.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert names
    assert all(name.endswith("mlp.down_proj.bias") for name in names)
    with pytest.raises(ModelError, match="save it with save_model"):
        save_pretrained(made.model, tmp_path / "m", example_inputs=x)
