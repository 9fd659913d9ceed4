"""Whole layers as units: which are found, what goes with them, and that a cut is the model with them passed by."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.batch import call, main_output
from secateurs.core.depth import LayerGroup
from secateurs.core.errors import BudgetError, ModelError, OptionError, PlanError, ProofError
from secateurs.deploy import load_model, save_model
from secateurs.deploy.huggingface import save_pretrained
from secateurs.graph.depth.infer import infer_layers
from secateurs.graph.depth.layers import LayerStructure, renumbered
from secateurs.graph.depth.stream import Fields, passed
from secateurs.graph.plan import ModelPlan
from secateurs.measure.macs import macs, macs_by_module
from secateurs.measure.params import parameters
from tests.cli.running import run
from tests.graph.nets import drawn

rows, images = drawn(3, 8), drawn(2, 3, 32, 32)
WIDTH = 8


class Block(nn.Module):
    """x + out(relu(up(x)))."""

    def __init__(self, hidden: int = 6, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.up(x).relu())


class Net(nn.Module):
    """Blocks between two linear layers; what a block takes and returns is up to `step`."""

    def __init__(self, blocks: list[nn.Module], step: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(blocks)
        self.count = len(blocks)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.step is not None:
            return self.head(self.step(self, x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def found(model: nn.Module, inputs: Any = rows) -> LayerStructure:
    return infer_layers(model, inputs, macs_by_module(model, inputs))


def units(model: nn.Module, inputs: Any = rows) -> dict[str, tuple[str, ...]]:
    return {g.name: g.blocks for g in found(model, inputs).groups}


def frozen(model: nn.Module, inputs: Any = rows) -> dict[str, str]:
    return {f.tensor: f.reason for f in found(model, inputs).frozen}


def without(plan: ModelPlan, *gone: str) -> ModelPlan:
    """The plan that leaves out exactly these blocks."""
    keep = {g.name: torch.tensor([b not in gone for b in g.blocks]) for g in plan.groups}
    return replace(plan, keep=keep)


# What is found.


def test_blocks_with_a_residual_stream_are_units_and_other_modules_are_not() -> None:
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.LayerNorm(WIDTH), nn.Dropout())
    assert units(Net([Block(), plain, Block(), nn.Identity()])) == {"layers": ("layers.0", "layers.2")}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


class PostNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.out(self.up(x).relu())
        return x


class Shifted(nn.Module):
    """Adds a number of its own, not something made of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.expand_as(x)


class Highway(Gated):
    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).sigmoid()
        return (1 - share) * x + share * self.up(x)


class Wider(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@pytest.mark.parametrize(
    ("block", "is_unit"),
    [(Gated, False), (PostNorm, True), (InPlace, True), (Shifted, False), (Highway, True), (Wider, False)],
)
def test_a_stream_goes_through_norms_and_elementwise_ops_and_has_something_added(
    block: type[nn.Module], is_unit: bool
) -> None:
    model = Net([block(), block() if block is not Wider else nn.Identity()])
    if block is Wider:
        model.head.double()
    assert units(model) == ({"layers": ("layers.0", "layers.1")} if is_unit else {})


def test_a_sequence_that_is_the_model_is_a_container() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block())
    plan = sec.plan(model, rows, "params<=75%", granularity="layer")
    assert [(g.name, g.container, g.blocks, g.least) for g in plan.groups] == [("model", "", ("1", "2"), 0)]
    assert list(plan.cut(model)._modules) == ["0", "1"]


def test_of_stages_the_blocks_are_units_and_of_transformers_the_layers_not_their_parts() -> None:
    resnet = torchvision.models.resnet18().eval()
    plan = sec.plan(resnet, images, "macs<=60%", granularity="layer")
    assert {g.name: (g.blocks, g.least) for g in plan.groups} == {
        "layer1": (("layer1.0", "layer1.1"), 1),
        **{f"layer{i}": ((f"layer{i}.1",), 0) for i in (2, 3, 4)},
    }
    assert macs(plan.cut(resnet), images) == plan.cost("macs", relative=False)
    stage = nn.Sequential(Block(), Block())
    assert units(Net([nn.Linear(WIDTH, WIDTH), stage])) == {"layers.1": ("layers.1.0", "layers.1.1")}

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Block(), Block(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    assert units(Net([Parts(), Parts(), Parts()])) == {"layers": ("layers.0", "layers.1", "layers.2")}


def test_blocks_of_other_costs_are_groups_of_their_own_and_of_a_whole_container_one_stays() -> None:
    model = Net([Block(6), Block(4), Block(6)])
    structure = found(model)
    assert [(g.name, g.blocks, g.least) for g in structure.groups] == [
        ("layers", ("layers.0", "layers.2"), 1),
        ("layers#2", ("layers.1",), 0),
    ]
    for metric, whole in (("params", parameters(model)), ("macs", macs(model, rows))):
        assert structure.costs.total(metric) == whole
    assert structure.costs.total("params", {"layers": 1}) == parameters(model) - parameters(model.layers[0])
    assert structure.costs.total("macs", {"layers#2": 0}) == macs(model, rows) - macs(model.layers[1], rows)


# What is not offered, and why.


def test_a_block_that_runs_twice_or_has_two_names_stays() -> None:
    def twice(net: Net, x: Tensor) -> Tensor:
        return net.layers[1](net.layers[1](net.layers[0](x)))

    assert frozen(Net([Block(), Block()], twice))["layers.1"] == "it runs 2 times in one forward pass"
    shared = Block()
    assert frozen(Net([shared, Block(), shared])) == {"layers.0": "the same block is also called layers.2"}
    bert = transformers.AutoModel.from_config(transformers.AlbertConfig(**_SMALL, embedding_size=8)).eval()
    reasons = frozen(bert, {"input_ids": _IDS})
    assert list(reasons.values()) == ["it runs 4 times in one forward pass"]


def injected(net: Net, x: Tensor) -> Tensor:
    for i, layer in enumerate(net.layers):
        x = layer(x) if i != 1 else layer(net.stem(x))
    return x


def indexed(net: Net, x: Tensor) -> Tensor:
    return net.layers[2](net.layers[1](net.layers[0](x)))


def scaled(net: Net, x: Tensor) -> Tensor:
    for i, layer in enumerate(net.layers):
        x = layer(x / (i + 1))
    return x


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (injected, "without it other code runs: stem is not reached as before"),
        (indexed, "without it the model does not run: IndexError"),
        (scaled, "removing it differs from passing its input on: the code depends on its place"),
    ],
)
def test_a_block_whose_removal_changes_what_runs_stays(step: Callable[..., Tensor], reason: str) -> None:
    model = Net([Block(), Block(), Block()], step)
    reasons = frozen(model)
    assert any(reason in why for why in reasons.values())
    # Where the second block is given something else, the next one is when it goes, as when it passes that on.
    assert set(reasons) == ({"layers.0"} if step is injected else {f"layers.{i}" for i in range(3)})
    if step is not injected:
        with pytest.raises(ModelError, match=r"no layer of Net can go as a whole: layers\.0 stays, "):
            sec.plan(model, rows, "macs<=90%", granularity="layer")


def test_a_model_without_such_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no module of a list or sequence passes its input on with something added"):
        sec.plan(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), rows, "macs<=50%", granularity="layer")


def test_the_only_block_of_a_container_stays() -> None:
    assert frozen(Net([Block()])) == {"layers.0": "nothing else is in layers"}


# What a block takes and returns.


class Talkative(Block):
    """Returns its own hidden values, a constant and its second input beside the stream."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, int, Tensor | None]:
        hidden = self.up(x).relu()
        return x + self.out(hidden), hidden, 7, bias


def unread(net: Net, x: Tensor) -> Tensor:
    bias: Tensor | None = torch.ones(3)
    for layer in net.layers:
        x, _, seven, bias = layer(x, bias=bias)
        assert seven == 7
    return x + bias.sum()


def read(net: Net, x: Tensor) -> Tensor:
    total = x
    for layer in net.layers:
        x, hidden, *_ = layer(x)
        total = total + hidden.sum()
    return total + x


def test_what_a_block_returns_beside_the_stream_comes_from_its_input_or_must_not_be_read() -> None:
    model = Net([Talkative(), Talkative(), Talkative()], unread)
    assert units(model) == {"layers": ("layers.0", "layers.1", "layers.2")}
    plan = without(sec.plan(model, rows, "params<=90%", granularity="layer"), "layers.0")
    assert plan.proven_cut(model)[1] == 0
    bias = torch.ones(2)
    assert plan.mask(model).layers[0](rows, bias) == (rows, None, 7, bias)
    reasons = frozen(Net([Talkative(), Talkative()], read))
    assert set(reasons.values()) == {"what it returns beside its first tensor is used"}


class Named(Block):
    """Takes and returns more than a tensor."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"hidden": super().forward(state["hidden"]), "step": state["step"]}


def named(net: Net, x: Tensor) -> Tensor:
    state = {"hidden": x, "step": torch.ones(())}
    for layer in net.layers:
        state = layer(state)
    return state["hidden"] * state["step"]


def test_streams_inside_of_mappings_are_followed() -> None:
    model = Net([Named(), Named()], named)
    plan = without(sec.plan(model, rows, "params<=90%", granularity="layer"), "layers.1")
    assert plan.proven_cut(model)[1] == 0


def test_fields_are_read_by_name_place_and_attribute() -> None:
    fields = {"hidden": {"input": [0, "x"]}, "other": {"list": [{"unread": True}]}}
    made = passed({"fields": fields}, "?", rows)
    assert made["hidden"] is made[0] is made.hidden is rows
    assert made.other == made[1] == ["?"]
    with pytest.raises(AttributeError, match="third"):
        _ = Fields(a=1).third
    assert passed({"input": [1, "y", 0]}, None, rows, y=[3]) == 3
    assert passed({"input": [1, "y"]}, None, rows) is None


# What follows.


def counted(net: Net, x: Tensor) -> Tensor:
    for i in range(net.count):
        x = net.layers[i](x)
    return x


def test_a_number_of_blocks_that_the_code_reads_follows() -> None:
    model = Net([Block(), Block(), Block()], counted)
    plan = sec.plan(model, rows, "params<=75%", granularity="layer")
    assert plan.structure.edits.counted == {"count": "layers"}
    smaller = plan.cut(model)
    assert (smaller.count, len(smaller.layers), model.count) == (2, 2, 3)


class Numbered(Block):
    """Knows its place, and has a rate that happens to grow with it."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.layer_idx, self.rate = place, place + 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rate * self.out(self.up(x))


def test_places_are_renumbered_and_rates_are_not() -> None:
    model = Net([Numbered(i) for i in range(4)])
    plan = sec.plan(model, rows, "params<=70%", granularity="layer")
    assert plan.structure.edits.numbered == {"layers": ("layer_idx",)}
    smaller = without(plan, "layers.0", "layers.2").cut(model)
    assert [(b.layer_idx, b.rate) for b in smaller.layers] == [(0, 2), (1, 4)]
    assert [b.layer_idx for b in model.layers] == [0, 1, 2, 3]


def deeper(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x / net.depth + x[:, : net.block_size].sum()


def test_a_number_that_is_a_factor_is_left_alone_whatever_it_is_called() -> None:
    model = Net([Block(), Block(), Block()], deeper)
    model.depth = model.block_size = model.n_layers = 3
    plan = sec.plan(model, rows, "params<=75%", granularity="layer")
    assert plan.structure.edits.counted == {}
    model.step, model.depth, model.block_size = None, 2, 2
    plan = sec.plan(model, rows, "params<=75%", granularity="layer")
    assert plan.structure.edits.counted == {"n_layers": "layers"}
    assert plan.cut(model).n_layers == 2


def test_names_close_up_where_they_differ_in_a_number() -> None:
    names = ["stem", "block1", "block2", "block10", "0"]
    assert renumbered(names, ["block2"]) == {"stem": "stem", "block1": "block1", "block10": "block2", "0": "0"}
    vit = small_vit()
    plan = without(sec.plan(vit, images, "macs<=90%", granularity="layer"), "encoder.layers.encoder_layer_1")
    smaller = plan.cut(vit)
    assert list(smaller.encoder.layers._modules) == [f"encoder_layer_{i}" for i in range(3)]
    assert torch.equal(smaller.encoder.layers[1].ln_1.weight, vit.encoder.layers[2].ln_1.weight)
    assert type(smaller.encoder.layers) is nn.Sequential


def test_attributes_that_are_called_after_layers_follow() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).eval()
    x = drawn(2, 4, 8)
    plan = sec.plan(encoder, x, "params<=70%", granularity="layer")
    smaller = plan.cut(encoder)
    assert smaller.num_layers == len(smaller.layers) == 2


# Decisions.


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("share", [40, 55, 80, 95])
def test_a_budget_is_met_and_no_further_block_would_fit(metric: str, share: int) -> None:
    torch.manual_seed(share)
    model = Net([Block(6), Block(4), Block(6), Block(3), Block(4), Block(6)])
    plan = sec.plan(model, rows, f"{metric}<={share}%", granularity="layer")
    measure = {"macs": lambda m: macs(m, rows), "params": parameters}[metric]
    limit = share / 100 * measure(model)
    smaller = plan.cut(model)
    assert measure(smaller) == pytest.approx(plan.cost(metric, relative=False))
    assert measure(smaller) <= limit
    gone = plan.structure.gone(plan.keep)
    for block in gone:
        assert measure(without(plan, *(b for b in gone if b != block)).cut(model)) > limit


def test_the_lowest_go_and_scores_are_sums_over_the_parameters_of_a_block() -> None:
    model = Net([Block() for _ in range(5)])
    with torch.no_grad():
        for scale, block in zip((5, 1, 4, 2, 3), model.layers, strict=True):
            for p in block.parameters():
                p.fill_(scale)
    plan = sec.plan(
        model, rows, "sparsity=40%", granularity="layer", criterion_options={"normalize": "none", "norm": 1}
    )
    each = parameters(model.layers[0])
    assert plan.scores["layers"].tolist() == [5 * each, each, 4 * each, 2 * each, 3 * each]
    assert plan.structure.gone(plan.keep) == ("layers.1", "layers.3")
    assert str(plan).splitlines()[1] == "  layers: 2 of 5 layers go: layers.1, layers.3"
    assert plan.rebudget("sparsity=60%").structure.gone(plan.rebudget("sparsity=60%").keep) == (
        *("layers.1", "layers.3", "layers.4"),
    )


def test_a_lift_reduces_over_all_entries_of_a_block() -> None:
    group = LayerGroup("m", "m", ("m.0", "m.1", "m.2"), (("a", "b"), ("c",), ()))
    saliency = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(6.0), "c": torch.tensor([-4.0, -2.0])}
    for reduce, expected in (("sum", [9, -6, 0]), ("mean", [3, -3, 0]), ("max", [6, -2, 0])):
        assert group.lift(saliency, reduce)["m"].tolist() == expected
    assert group.lift({"other": torch.ones(2)}) == {}
    assert {n: bool(m) for n, m in group.spread(torch.tensor([True, False, True])).items()} == {
        "a": True, "b": True, "c": False,
    }  # fmt: skip


def test_scope_and_ignore_name_blocks_or_their_container() -> None:
    model = Net([Block() for _ in range(4)])
    plan = sec.plan(model, rows, "params<=70%", granularity="layer", ignore=["layers.0", "layers.3"])
    assert plan.groups[0].blocks == ("layers.1", "layers.2")
    assert plan.groups[0].least == 0
    assert plan.cost("params", relative=False) == parameters(plan.cut(model))
    assert sec.plan(model, rows, "params<=70%", granularity="layer", scope="layers").groups[0].size == 4
    with pytest.raises(OptionError, match="pattern 'layer 9'"):
        sec.plan(model, rows, "params<=70%", granularity="layer", scope="layer 9")


@pytest.mark.parametrize(
    ("budget", "options", "error", "text"),
    [
        ("2:4", {}, OptionError, "2:4 is a pattern of single weights; layers has layer units"),
        ("macs<=50%", {"allocation": "erk"}, OptionError, "weighs the shapes of weight tensors, and a layer spans"),
        ("macs<=50%", {"criterion": "norm-scale"}, OptionError, "scores channel groups, but 'layers' is a layer group"),
        ("tokens<=50%", {}, BudgetError, "met by token pruning"),
        ("macs<=5%", {}, BudgetError, "Nearest feasible: 'macs<="),
    ],
)
def test_combinations_without_sense_and_budgets_out_of_reach_are_refused(
    budget: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        sec.plan(Net([Block(), Block(), Block()]), rows, budget, granularity="layer", **options)


def test_every_set_of_blocks_is_cut_as_it_is_masked() -> None:
    model = Net([Block(3), Block(4), Block(3), Block(4)])
    plan = sec.plan(model, rows, "params<=90%", granularity="layer")
    blocks = [b for g in plan.groups for b in g.blocks]
    for number in range(4):
        for gone in itertools.combinations(blocks, number):
            some = without(plan, *gone)
            smaller, error = some.proven_cut(model)
            assert error == 0
            assert len(smaller.layers) == 4 - number
            assert torch.equal(smaller(rows), some.mask(model)(rows))


def test_a_masked_model_keeps_its_names_and_has_zeros_where_a_block_went(tmp_path: Path) -> None:
    model = Net([Block(), Block(), Block()])
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = without(sec.plan(model, rows, "params<=90%", granularity="layer"), "layers.1")
    masked = plan.mask(model)
    for name, p in masked.named_parameters():
        assert torch.equal(p, torch.zeros_like(p) if name.startswith("layers.1.") else before[name])
    expected = model.head(model.layers[2](model.layers[0](model.stem(rows))))
    torch.testing.assert_close(masked(rows), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not plan.masks(model)["layers.1.up.weight"].any()
    vit = small_vit()
    masked = sec.plan(vit, images, "macs<=80%", granularity="layer").mask(vit)
    assert torch.equal(load_model(save_model(masked, tmp_path / "masked"))(images), masked(images))


def test_a_parameter_that_others_hold_stays_as_it_is() -> None:
    model = Net([Block(), Block(), Block()])
    model.layers[1].out.weight = model.layers[0].out.weight
    plan = without(sec.plan(model, rows, "params<=95%", granularity="layer"), "layers.1")
    assert plan.mask(model).layers[0].out.weight.abs().sum() > 0
    assert parameters(plan.cut(model)) == plan.cost("params", relative=False)


def test_a_wrong_edit_is_caught_by_the_proof() -> None:
    model = Net([Numbered(i) for i in range(3)])
    plan = without(sec.plan(model, rows, "params<=90%", granularity="layer"), "layers.0")
    wrong = replace(plan.structure, edits=replace(plan.structure.edits, numbered={"layers": ("rate",)}))
    with pytest.raises(ProofError, match="differ by"):
        replace(plan, structure=wrong).cut(model)
    with pytest.raises(PlanError, match="another model"):
        plan.cut(Net([Numbered(0), Numbered(1)]))


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    model = Net([Talkative(4), Talkative(6), Talkative(6)], unread)
    plan = sec.plan(model, rows, "params<=70%", granularity="layer", ignore="layers.1")
    again = ModelPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert (again.structure, again.groups, again.costs) == (plan.structure, plan.groups, plan.costs)
    assert again.same_as(plan)
    assert str(again) == str(plan)
    assert again.rebudget("params<=90%").same_as(plan.rebudget("params<=90%"))
    assert torch.equal(again.cut(model)(rows), plan.cut(model)(rows))


def test_a_pruned_model_is_saved_loaded_and_reported(tmp_path: Path) -> None:
    vit = small_vit()
    cut = sec.prune(vit, images, "macs<=60%", granularity="layer", measure=False)
    back = sec.load(cut.save(tmp_path / "vit"))
    assert torch.equal(back.model(images), cut.model(images))
    assert back.plan.structure == cut.plan.structure
    gone = cut.plan.structure.gone(cut.plan.keep)
    assert cut.report.after.params == parameters(cut.model) == cut.plan.cost("params", relative=False)
    assert cut.report.form == "cut"
    assert not any(layer.name.startswith(f"{block}.") for layer in cut.report.layers for block in gone)
    assert any("encoder_layer_3." in layer.name for layer in cut.report.layers) == (gone[-1][-1] != "3")
    assert "layer" in (tmp_path / "vit" / "report.html").read_text()


def test_inspect_tells_the_blocks_and_what_one_costs() -> None:
    model = Net([Block(), Block(), Block()], counted)
    inspection = sec.inspect(model, rows, granularity="layer")
    (group,) = inspection.groups
    assert (group.name, group.kind, group.size) == ("layers", "layer", 3)
    assert group.makers == ("layers.0", "layers.1", "layers.2")
    assert group.params_per_unit == parameters(model.layers[0])


# Models of libraries.

_IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
_SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5).eval()


def of_config(kind: str, head: str, base: dict[str, Any] = _SMALL, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **{**base, **sizes}))
    # As drawn by the library, all is so small that a block hardly adds to its stream.
    for parameter in (p for p in model.parameters() if p.dim() > 1):
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


CAUSAL = "AutoModelForCausalLM"
TEXT = {"input_ids": _IDS}
# Each: a model, its inputs, and for each container the field of the config that counts its blocks.
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, str]]] = {
    "Llama": (
        lambda: of_config("llama", CAUSAL, num_key_value_heads=1), TEXT, {"model.layers": "num_hidden_layers"},
    ),
    "GPT-2": (lambda: of_config("gpt2", CAUSAL), TEXT, {"transformer.h": "n_layer"}),
    "BERT": (
        lambda: of_config("bert", "AutoModelForSequenceClassification"), TEXT,
        {"bert.encoder.layer": "num_hidden_layers"},
    ),
    "T5": (
        lambda: of_config(
            "t5", "AutoModelForSeq2SeqLM", d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_hidden_layers=2,
            decoder_start_token_id=0,
        ),
        {**TEXT, "decoder_input_ids": _IDS[:, :5]},
        {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"},
    ),
    "Mamba": (lambda: of_config("mamba", CAUSAL, state_size=4), TEXT, {"backbone.layers": "num_hidden_layers"}),
    "Gemma-3": (
        lambda: of_config(
            "gemma3_text", CAUSAL, num_key_value_heads=1, head_dim=8, sliding_window=3,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        TEXT, {"model.layers": "num_hidden_layers"},
    ),
    "ConvNeXt": (
        lambda: of_config(
            "convnext", "AutoModelForImageClassification", {}, hidden_sizes=[8, 16], depths=[2, 3], num_stages=2,
            num_labels=3,
        ),
        {"pixel_values": images}, {f"convnext.encoder.stages.{i}.layers": "depths" for i in range(2)},
    ),
}  # fmt: skip


@cache
def planned(name: str) -> tuple[nn.Module, ModelPlan, Any, dict[str, str]]:
    make, inputs, counted_by = MODELS[name]
    model = make()
    return model, sec.plan(model, inputs, "sparsity=50%", granularity="layer"), inputs, counted_by


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models_lose_layers_and_their_config_says_so(name: str, tmp_path: Path) -> None:
    model, plan, inputs, expected = planned(name)
    assert [g.name for g in plan.groups] == list(expected)
    smaller = plan.cut(model)
    for group, field in expected.items():
        lost = [block for block in plan.structure.gone(plan.keep) if block.startswith(f"{group}.")]
        left = len(model.get_submodule(group)) - len(lost)
        said = getattr(smaller.config, field)
        assert len(smaller.get_submodule(group)) == left
        assert left == (said if isinstance(said, int) else said[int(group.split(".")[3])])
    first = {f.tensor: f.reason for f in plan.structure.frozen}
    # The others use the position bias that the first computes.
    used = "what it returns beside its first tensor is used"
    assert first == ({f"{side}.block.0": used for side in ("encoder", "decoder")} if name == "T5" else {})
    save_pretrained(smaller, tmp_path / "folder")
    loaded = type(model).from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        expected_output = main_output(call(plan.mask(model).eval(), inputs))
        torch.testing.assert_close(main_output(call(loaded, inputs)), expected_output)


def generated(model: nn.Module, **options: Any) -> Tensor:
    return model.generate(_IDS, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mamba", "Gemma-3"])
def test_the_cache_of_a_cut_model_works_without_its_first_layer(name: str) -> None:
    model, plan, _, (group,) = planned(name)
    plan = without(plan, f"{group}.0", f"{group}.2")
    smaller = plan.cut(model)
    with_cache = generated(smaller, use_cache=True)
    assert torch.equal(with_cache, generated(smaller, use_cache=False))
    assert torch.equal(with_cache, generated(plan.mask(model), use_cache=False))


def test_lists_about_layers_lose_the_entries_of_those_that_go() -> None:
    model, plan, *_ = planned("Gemma-3")
    plan = without(plan, "model.layers.0", "model.layers.1")
    assert plan.cut(model).config.layer_types == ["full_attention", "sliding_attention"]
    kept = without(plan, "model.layers.1").cut(model).config.layer_types
    assert kept == ["full_attention", "full_attention", "sliding_attention"]


def test_a_model_on_the_meta_device_is_planned() -> None:
    config = transformers.LlamaConfig(**{**_SMALL, "num_hidden_layers": 12}, num_key_value_heads=1)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    structure = infer_layers(model, {"input_ids": _IDS}, {})
    assert {g.name: g.size for g in structure.groups} == {"model.layers": 12}
    assert structure.edits.numbered == {"model.layers": ("self_attn.layer_idx",)}


def test_the_command_line_has_the_same_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blocks.py").write_text(
        "import torch\nfrom tests.graph.test_depth import Block\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Linear(8, 8), *(Block() for _ in range(4)))\n"
    )
    words = ("--budget", "params<=60%", "--granularity", "layer", "--input", "2,8", "--no-measure", "--out", "smaller")
    ran = run("prune", "blocks:net", *words)
    assert ran.code == 0, ran.err
    made = sec.load("smaller", trust=("tests",))
    assert len(made.model) == 3
    assert made.plan.structure.groups[0].blocks == ("1", "2", "3", "4")
