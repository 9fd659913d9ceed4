"""PAT on a small Llama: what is masked in training is what is merged and cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import secateurs as sec
from secateurs.core.errors import BudgetError, ModelError, OptionError
from secateurs.methods.language import pat as module
from secateurs.methods.language.pat import Pat, pat
from secateurs.summary import quality_of
from secateurs.train.shared_mask import Operator

IDS = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS, "labels": IDS}] * 4
INPUTS = {"input_ids": IDS[:2, :6]}
SMALL = Pat(rank=4, operator=0.25)


def llama(*, tied: bool = False, eps: float = 0.01) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, rms_norm_eps=eps)).eval()


def run(model: nn.Module, budget: str = "sparsity=25%", epochs: int = 10, **changes: Any) -> Any:
    recover = sec.FineTune(epochs=epochs, lr=1e-2, weight_decay=0.0)
    chosen: dict[str, Any] = {"data": DATA, "test": DATA, "measure": False, "options": SMALL, "recover": recover}
    return pat(model, INPUTS, budget, **{**chosen, **changes})


@pytest.mark.parametrize("tied", [False, True])
def test_the_cut_model_is_the_masked_one(tied: bool) -> None:
    model = llama(tied=tied)
    made = run(model)
    masked = made.report.stages["pruned in training"]["nll"]
    assert quality_of(made.model, DATA)["nll"] == pytest.approx(masked, rel=1e-6)
    assert made.model.model.embed_tokens.weight.shape == (32, 12)
    assert made.model.lm_head.weight is not made.model.model.embed_tokens.weight
    assert made.model.config.tie_word_embeddings is False
    assert made.model.model.norm.variance_epsilon == pytest.approx(0.01 * 16 / 12)
    assert list(made.plan.counts.values()) == [12]
    assert abs(made.report.recipe["missed"]) <= 4
    assert model.config.tie_word_embeddings is tied
    assert not any("operator" in name or "mask" in name for name, _ in made.model.named_modules())


class Exact(nn.Module):
    """Llama's norm without its detour by float32, over as many entries as it is told."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.width = 16

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().sum(-1, keepdim=True) / self.width + self.variance_epsilon).rsqrt()


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_merged_equals_hard_masked_in_float64(eps: float) -> None:
    model = llama(eps=eps).double()
    structure = module.infer(model, INPUTS, kinds=("channel", "head"), entangled=True)
    for path in (
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    ):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Exact(model.get_submodule(path)))
    (wide,) = [group for group in structure.groups if group.size == 16]
    places = module._places(model, structure, wide)
    assert len(places.norms) == 5
    assert list(places.layers) == [
        "model.embed_tokens",
        *(f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")),
    ]
    mask = module.SharedMask(16, 12, 10).double().eval()
    with torch.no_grad(), module._operating(model, places, mask, SMALL, 0) as operators:
        mask.logits.normal_()
        for operator in operators.values():
            operator.double()
            operator.expand.normal_()
            operator.scale.normal_()
        masked = model(**INPUTS).logits
        places.merge(model, operators)
    stays = mask.stays()
    assert int(stays.sum()) == 12
    # By hand, without the library's cut: masked weights, and norms that divide by twelve.
    with torch.no_grad():
        for path, members in places.layers.items():
            for member in members:
                shape = [-1 if axis == member.axis else 1 for axis in range(member.rank)]
                model.get_parameter(member.tensor).mul_(stays.view(shape))
            assert path in operators
        assert float((model(**INPUTS).logits - masked).abs().max()) < 1e-10
        module.rescale(model, places.norms, 16, 12)
        for norm in [m for m in model.modules() if isinstance(m, Exact)]:
            norm.width = 12
        assert float((model(**INPUTS).logits - masked).abs().max()) < 1e-10


def test_it_starts_as_the_model_and_base_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, base = llama(), [], {}
    finalize = module.MaskPruner.finalize
    made = Operator.forward

    def look(self: Operator, x: Tensor) -> Tensor:
        if len(seen) < 5 and self.training:
            seen.append(torch.equal(made(self, x), x))
        return made(self, x)

    monkeypatch.setattr(Operator, "forward", look)
    built = module.MaskPruner.__init__

    def keep(self: Any, mask: Any, operators: Any, optimizer: Any, **options: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        base["logits"] = any(p is mask.logits for p in trained)
        base["count"] = len(trained)
        built(self, mask, operators, optimizer, **options)

    monkeypatch.setattr(module.MaskPruner, "__init__", keep)
    monkeypatch.setattr(module.MaskPruner, "finalize", lambda self: (base.update(done=True), finalize(self))[1])
    run(model, epochs=1, options=Pat(rank=4, operator=0.25, dropout=0.0))
    assert seen == [True] * 5
    assert base["done"]
    assert base["logits"]
    # Two matrices for each of 14 adapted layers, three parameters for each of 5 operators, and the logits.
    assert base["count"] == 2 * 14 + 3 * 5 + 1


def test_without_identity_loss_scales_do_not_train() -> None:
    first, other = (
        run(llama(), epochs=1, test=None, options=Pat(rank=4, operator=0.25, identity=on)) for on in (True, False)
    )
    assert not torch.equal(first.model(**INPUTS).logits, other.model(**INPUTS).logits)


def test_a_budget_of_parameters_and_the_place_of_the_original() -> None:
    model = llama(tied=True)
    made = run(model, "params<=70%", epochs=1, inplace=True)
    assert made.model is model
    assert made.plan.cost("params") <= 0.7
    assert model(**INPUTS).logits.shape == (2, 6, 32)
    assert model.model.embed_tokens.weight.shape[1] == next(iter(made.plan.counts.values()))


class Wide(nn.Module):
    def __init__(self, norm: nn.Module, start: nn.Module) -> None:
        super().__init__()
        self.start, self.norm, self.head = start, norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.start(x)))


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_what_cannot_be_merged_is_refused() -> None:
    x, options = torch.randn(2, 4), {"options": Pat(rank=1), "recover": sec.FineTune(steps=4), "data": [x_y()]}
    with pytest.raises(ModelError, match=r"norm \(LayerNorm\) normalises over the residual width and is no root-mean"):
        pat(Wide(nn.LayerNorm(8), nn.Linear(4, 8)), x, "sparsity=25%", **options)
    with pytest.raises(
        ModelError, match=r"start \(Free\) makes the width start, and an operator can be merged into lin"
    ):
        pat(Wide(nn.RMSNorm(8), Free()), x, "sparsity=25%", **options)
    with pytest.raises(BudgetError, match="PAT needs a share of the width or a cost"):
        pat(Wide(nn.RMSNorm(8), nn.Linear(4, 8)), x, "2:4", **options)
    with pytest.raises(
        OptionError, match="the mask needs 2 optimizer steps or more to become hard, got 1: train longer"
    ):
        pat(Wide(nn.RMSNorm(8), nn.Linear(4, 8)), x, "sparsity=25%", **{**options, "recover": sec.FineTune(steps=1)})


def x_y() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
