"""From a model and a budget to a plan: what is refused, and that a plan is the same anywhere."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sec
from secateurs import planning
from secateurs.core.errors import BudgetError, DataError, FileError, ModelError, OptionError, PlanError
from secateurs.core.state import read_state, write_state
from secateurs.graph.plan import ModelPlan
from secateurs.measure.params import bytes_in_memory, parameters
from secateurs.planning import Granularity, batches_of, plan, plan_of_masks, recipe_of

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


class Net(nn.Module):
    """Convolutions with a skip connection, and two heads of a classifier's width."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 16, 1)
        self.outer = nn.Conv2d(16, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        x = self.head(x.mean((2, 3)))
        return x if scale is None else x * scale


class Tied(nn.Module):
    """A language model of which the embedding is also the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(x + self.down(self.up(x).relu()))


def bits(model: nn.Module) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


# -- what a unit is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("channel", Granularity(kinds=("channel", "head"))),
        ("head", Granularity(kinds=("head",), entangled=False)),
        ("head-size", Granularity(kinds=("head-size",), entangled=True)),
        ("width", Granularity(kinds=("channel", "head"), entangled=True)),
        ("weight", Granularity()),
        ("block:4x1", Granularity(block=(4, 1))),
        ("block:16x32", Granularity(block=(16, 32))),
    ],
)
def test_granularities(text: str, wanted: Granularity) -> None:
    assert Granularity.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("heads", "head"), ("weigth", "weight"), ("block:4", "block:ROWSxCOLUMNS"), ("block:2x", "block:ROWSxCOLUMNS")],
)
def test_other_granularities_are_refused_with_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(OptionError, match=f"unknown granularity '{text}'; the nearest are {nearest}"):
        Granularity.parse(text)


def test_a_block_of_no_rows_is_refused() -> None:
    with pytest.raises(OptionError, match="block sizes must be positive"):
        plan(Net(), IMAGES, "sparsity=50%", granularity="block:0x4")


def test_defaults_are_filled_in() -> None:
    whole, pattern = recipe_of("macs<=50%"), recipe_of("2:4")
    assert (whole.granularity, whole.floor, whole.criterion, whole.allocation) == (
        "channel",
        0.1,
        "magnitude",
        "global",
    )
    assert (pattern.granularity, pattern.floor) == ("weight", 1)
    given = recipe_of("macs<=50%", scope="stem", ignore=["a", "b"], floor=2, data=[], loss=None)
    assert (given.scope, given.ignore, given.floor) == (("stem",), ("a", "b"), 2)


def test_a_criterion_may_be_a_function() -> None:
    assert recipe_of("macs<=50%", criterion=parameters).criterion == "parameters"


# -- combinations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["erk", "er", "erk+"])
@pytest.mark.parametrize("granularity", ["channel", "head-size"])
def test_rules_over_shapes_are_for_weights(rule: str, granularity: str) -> None:
    message = f"allocation {rule!r} weighs the shapes of weight tensors, and a {granularity} spans several; use uniform"
    with pytest.raises(OptionError, match=re.escape(message)):
        plan(Net(), IMAGES, "macs<=50%", allocation=rule, granularity=granularity)
    assert plan(Net(), IMAGES, "sparsity=50%", allocation=rule, granularity="weight").sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_tokens_are_refused(granularity: str) -> None:
    with pytest.raises(BudgetError, match="a budget of tokens is met by token pruning, not by removing weights"):
        plan(Net(), IMAGES, "tokens<=50%", granularity=granularity)


@pytest.mark.parametrize("budget", ["latency<=1ms", "speedup>=2x"])
@pytest.mark.parametrize("granularity", ["weight", "block:2x2"])
def test_zeros_save_no_time(budget: str, granularity: str) -> None:
    message = f"{budget} cannot be met with {granularity} units: zeros in a dense tensor cost as much time"
    with pytest.raises(BudgetError, match=message):
        plan(Net(), IMAGES, budget, granularity=granularity)


# -- scope -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, {"stem", "inner"}),
        ({"scope": "inner"}, {"inner"}),
        ({"scope": ["st*"]}, {"stem"}),
        ({"scope": "stem.weight"}, {"stem"}),
        # A pattern of the scope names producers; one to ignore, any tensor that would change.
        ({"ignore": "stem"}, {"inner"}),
        ({"ignore": "head"}, {"inner"}),
        ({"ignore": "norm"}, {"inner"}),
    ],
)
def test_scope_and_ignore_choose_groups(options: dict[str, Any], groups: set[str]) -> None:
    made = plan(Net(), IMAGES, "sparsity=25%", **options)
    assert {g.name for g in made.groups} == groups
    assert made.cut(Net())(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("option", ["scope", "ignore"])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_a_pattern_that_matches_nothing_lists_the_nearest(option: str, granularity: str) -> None:
    with pytest.raises(OptionError, match=r"pattern 'iner'; the nearest are inner"):
        plan(Net(), IMAGES, "sparsity=25%", granularity=granularity, **{option: "iner"})


def test_ignoring_everything_leaves_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match="nothing to prune in Net at this granularity"):
        plan(Net(), IMAGES, "sparsity=25%", ignore="*")


def test_layers_that_a_pattern_does_not_divide_stay_dense() -> None:
    model = Net()
    made = plan(model, IMAGES, "2:4")
    assert {g.name for g in made.groups} == {"inner.weight", "outer.weight", "head.weight"}
    assert made.sparsity == 0.5
    assert made.mask(model).stem.weight.equal(model.stem.weight)


@pytest.mark.parametrize(("model", "scope"), [(Net(), ["stem", "inner"]), (nn.Conv2d(3, 4, 1), None)])
def test_a_pattern_that_divides_nothing_asked_for_is_refused(model: nn.Module, scope: Any) -> None:
    with pytest.raises(OptionError, match=r"2:4 needs a number of inputs that 4 divides; (stem\.)?weight has 3"):
        plan(model, IMAGES, "2:4", scope=scope)


# -- models and inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_inputs_of_another_shape_are_refused_with_the_shapes(granularity: str) -> None:
    with pytest.raises(
        ModelError, match=r"(on the example|fails on the) inputs .*[\[(]2, 4, 8, 8[\])].*have 3 channels"
    ):
        plan(Net(), torch.ones(2, 4, 8, 8), "sparsity=25%", granularity=granularity)


def test_why_nothing_can_go_is_told() -> None:
    with pytest.raises(ModelError, match=r"nothing to prune in Linear at this granularity: .+\.$"):
        plan(nn.Linear(4, 3), torch.ones(1, 4), "sparsity=25%")
    with pytest.raises(ModelError, match=r"nothing to prune in Net at this granularity"):
        plan(Net(), IMAGES, "sparsity=25%", granularity="head")


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_inputs_may_be_a_tuple_or_a_dict(granularity: str) -> None:
    model, scale = Net(), torch.ones(5)
    made = [
        plan(model, inputs, "macs<=50%", granularity=granularity)
        for inputs in (IMAGES, (IMAGES, scale), {"x": IMAGES, "scale": scale})
    ]
    assert made[0].sparsity > 0
    assert made[0].same_as(made[1])
    assert made[0].same_as(made[2])
    if granularity == "channel":
        assert bits(made[2].cut(model)) == bits(made[0].cut(model))


def test_tied_embeddings_count_once() -> None:
    model, ids = Tied(), torch.arange(6).view(2, 3)
    wanted = 160 + 144 + 136
    channels = plan(model, ids, "params<=60%")
    weights = plan(model, ids, "sparsity=50%", granularity="weight")
    for made in (channels, weights):
        assert made.costs.total("params") == wanted == parameters(model)
        assert made.costs.total("bytes") == 4 * wanted == bytes_in_memory(model)
    smaller = channels.cut(model)
    assert smaller.out.weight is smaller.embed.weight
    assert parameters(smaller) == channels.cost("params", relative=False)
    assert len({g.name for g in weights.groups} & {"embed.weight", "out.weight"}) <= 1


def test_nothing_is_changed_by_planning() -> None:
    model = Net().train()
    before = bits(model)
    plan(model, IMAGES, "macs<=50%", data=[(IMAGES, torch.tensor([0, 1]))], criterion="taylor")
    assert bits(model) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_criterion_without_data_sees_the_example_inputs() -> None:
    """SynFlow needs the shape of a batch, not its values."""
    model = Net()
    made = plan(model, IMAGES, "macs<=50%", criterion="synflow")
    given = plan(model, IMAGES, "macs<=50%", criterion="synflow", data=[(torch.randn_like(IMAGES), None)])
    assert made.same_as(given)
    torch.testing.assert_close(made.scores, given.scores)
    assert made.scores["stem"].unique().numel() > 1


def test_a_criterion_with_data_does_not_take_the_example_inputs() -> None:
    with pytest.raises(DataError, match="this needs calibration data"):
        plan(Net(), IMAGES, "macs<=50%", criterion="wanda", granularity="weight")


def test_only_iterators_are_read() -> None:
    data = [(IMAGES, None)]
    assert batches_of(None) is None
    assert batches_of(data) is data
    taken = batches_of(iter(data))
    assert taken is not None
    assert [len(list(taken)), len(list(taken))] == [1, 1]
    for nothing in ([], iter([])):
        with pytest.raises(DataError, match="is empty"):
            batches_of(nothing)


# -- decisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["macs<=50%", "params<=60%", "sparsity=40%"])
@pytest.mark.parametrize("multiple", [4, 8])
def test_widths_are_multiples(budget: str, multiple: int) -> None:
    made = plan(Net(), IMAGES, budget, round_to=multiple)
    assert made.sparsity > 0
    # A group may also stay whole: 12 is no multiple of 8.
    assert all(made.counts[g.name] % multiple == 0 or made.counts[g.name] == g.size for g in made.groups)
    assert made.cut(Net()).inner.out_channels == made.counts["inner"]


@pytest.mark.parametrize(("floor", "fewest"), [(0.5, {"stem": 6, "inner": 8}), (3, {"stem": 3, "inner": 3})])
def test_the_floor_holds(floor: float, fewest: dict[str, int]) -> None:
    share = 1 - sum(fewest.values()) / 28
    made = plan(Net(), IMAGES, f"sparsity={math.floor(100 * share)}%", floor=floor)
    assert all(made.counts[name] >= n for name, n in fewest.items())
    with pytest.raises(BudgetError, match="Nearest feasible"):
        plan(Net(), IMAGES, f"sparsity={math.ceil(100 * share) + 5}%", floor=floor)


def test_costs_of_a_plan_are_those_of_the_cut_model() -> None:
    made = plan(Net(), IMAGES, "macs<=40%")
    smaller = made.cut(Net())
    assert parameters(smaller) == made.cost("params", relative=False)
    assert made.cost("macs") <= 0.4
    positions = IMAGES[:, 0].numel()
    a, b = made.counts["stem"], made.counts["inner"]
    assert made.cost("macs", relative=False) == positions * (27 * a + 2 * a * b) + 2 * 5 * a


def test_random_scores_follow_the_seed() -> None:
    model = Net()
    made = [plan(model, IMAGES, "macs<=50%", criterion="random", seed=seed) for seed in (0, 0, 1)]
    assert made[0].same_as(made[1])
    assert not made[0].scores["stem"].equal(made[2].scores["stem"])


def test_rebudgeting_does_not_score_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    loose, tight = (plan(model, IMAGES, b, granularity="weight") for b in ("sparsity=50%", "sparsity=80%"))
    monkeypatch.setattr(planning, "score", lambda *_, **__: pytest.fail("scored again"))
    assert loose.rebudget("sparsity=80%").same_as(tight)
    assert not loose.same_as(tight)


def test_masks_found_in_training_become_a_plan() -> None:
    model = Net()
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    made = plan_of_masks(model, IMAGES, {"head.weight": mask}, recipe_of("sparsity=50%", granularity="weight"))
    assert made.masks(model)["head.weight"].equal(mask)
    assert made.counts == {"head.weight": int(mask.sum())}
    assert made.cost("params", relative=False) == parameters(model) - int((~mask).sum())
    made.check(model, values=True)


# -- files -------------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"budget": "macs<=50%"},
    {"budget": "sparsity=70%", "granularity": "weight", "allocation": "erk"},
    {"budget": "sparsity=50%", "granularity": "block:2x3", "ignore": "head"},
    {"budget": "2:4"},
]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["budget"] + o.get("granularity", ""))
def test_a_plan_comes_back_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Net()
    made = plan(model, {"x": IMAGES}, **options)
    back = ModelPlan.load(made.save(tmp_path / "plan.safetensors"))
    assert back.same_as(made)
    assert {n: s.tolist() for n, s in back.scores.items()} == {n: s.tolist() for n, s in made.scores.items()}
    assert (back.recipe, back.groups, back.structure) == (made.recipe, made.groups, made.structure)
    assert (back.fingerprint, back.digest, str(back)) == (made.fingerprint, made.digest, str(made))
    assert back.example_inputs["x"].equal(IMAGES)
    for metric in ("params", "macs", "bytes"):
        assert back.cost(metric) == made.cost(metric)
    assert bits(back.mask(model)) == bits(made.mask(model))
    if made.structure is not None:
        assert bits(back.cut(model)) == bits(made.cut(model))
    if made.recipe.budget.pattern is None:
        assert back.rebudget("sparsity=30%").same_as(made.rebudget("sparsity=30%"))


class Inputs(NamedTuple):
    """Positional arguments with names."""

    x: Tensor
    scale: Tensor


def test_named_inputs_come_back_as_a_tuple(tmp_path: Path) -> None:
    made = plan(Net(), Inputs(IMAGES, torch.ones(5)), "macs<=50%")
    back = ModelPlan.load(made.save(tmp_path / "plan"))
    assert type(back.example_inputs) is tuple
    assert back.example_inputs[0].equal(IMAGES)
    assert bits(back.cut(Net())).keys() == bits(made.cut(Net())).keys()


@pytest.mark.parametrize("options", KINDS[:2], ids=["channel", "weight"])
def test_a_plan_for_another_model_is_refused_and_a_tensor_named(tmp_path: Path, options: dict[str, Any]) -> None:
    back = ModelPlan.load(plan(Net(), IMAGES, **options).save(tmp_path / "plan"))
    message = r"for another model: stem\.weight has shape \[13, 3, 3, 3\], the plan expects \[12, 3, 3, 3\]"
    with pytest.raises(PlanError, match=message):
        back.mask(Net(13))
    with pytest.raises(PlanError, match=r"this plan is for another model: .*stem\.weight"):
        back.check(Tied())


@pytest.mark.parametrize("options", KINDS[:2], ids=["channel", "weight"])
def test_other_values_are_refused_where_asked(options: dict[str, Any]) -> None:
    model = Net()
    made = plan(model, IMAGES, **options)
    made.check(model, values=True)
    with torch.no_grad():
        model.norm.running_mean[3] += 1e-3
    made.check(model)
    with pytest.raises(PlanError, match="this plan was made from other weights of the same shapes"):
        made.check(model, values=True)


def test_a_truncated_plan_is_refused(tmp_path: Path) -> None:
    path = plan(Net(), IMAGES, "macs<=50%").save(tmp_path / "plan.safetensors")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileError, match=r"plan\.safetensors cannot be read as plan .*truncated"):
        ModelPlan.load(path)


@pytest.mark.parametrize("entry", ["keep", "costs", "recipe", "scores", "structure"])
def test_a_plan_with_something_missing_is_refused(tmp_path: Path, entry: str) -> None:
    path = plan(Net(), IMAGES, "macs<=50%").save(tmp_path / "plan")
    tree = read_state(path, "plan")
    del tree[entry]
    write_state(path, tree, "plan")
    with pytest.raises(FileError, match=f"plan is not a plan that this release can read: KeyError.*{entry}"):
        ModelPlan.load(path)


def test_the_plan_of_the_first_face_is_this_one() -> None:
    assert sec.plan is plan


# -- what users try ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", sorted(planning._OTHER_WORDS))
def test_the_words_of_others_lead_to_the_granularity_here(word: str) -> None:
    with pytest.raises(OptionError, match=rf"unknown granularity '{word}'; here it is called '\w+'\."):
        Granularity.parse(word)
    assert Granularity.parse(planning._OTHER_WORDS[word])


def test_layers_that_cannot_go_anyway_may_be_ignored() -> None:
    model = nn.Sequential(Net(), nn.Linear(5, 4))
    free = plan(model, IMAGES, "sparsity=50%")
    assert plan(model, IMAGES, "sparsity=50%", ignore="1.bias").counts == free.counts
    with pytest.raises(OptionError, match=r"unknown pattern '2\.bias'"):
        plan(model, IMAGES, "sparsity=50%", ignore="2.bias")
    with pytest.raises(OptionError, match=r"unknown pattern 'Net\*'"):
        plan(model, IMAGES, "sparsity=50%", scope="Net*")


def test_a_plan_of_a_wrapped_model_is_that_of_the_model_inside() -> None:
    model = Net()
    made = plan(nn.DataParallel(torch.compile(model)), IMAGES, "macs<=50%")
    assert made.fingerprint == plan(model, IMAGES, "macs<=50%").fingerprint
    assert bits(made.cut(torch.compile(model))) == bits(made.cut(model))
    assert bits(made.mask(nn.DataParallel(model))) == bits(made.mask(model))
    assert made.masks(torch.compile(model)).keys() == made.masks(model).keys()
    made.check(torch.compile(model), values=True)


def test_samples_and_tensors_are_no_batches() -> None:
    for one in (IMAGES, {"x": IMAGES}):
        with pytest.raises(DataError, match=rf"got one {type(one).__name__}; put a single batch in a list"):
            batches_of(one)
    with pytest.raises(DataError, match=r"the single samples of a TensorDataset; use a DataLoader"):
        batches_of(TensorDataset(IMAGES))
    loader = DataLoader(TensorDataset(IMAGES))
    assert batches_of(loader) is loader


def test_of_a_quantized_model_the_order_is_said() -> None:
    class Linear(nn.Module):
        """In the manner of PyTorch's, whose weights are no parameters."""

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(8, 4)

    Linear.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    with pytest.raises(ModelError, match=r"its layers are quantized; prune first, then quantize\."):
        plan(nn.Sequential(Linear()), torch.ones(1, 8), "macs<=50%")
    with pytest.raises(ModelError, match=r"no layer has a free width\."):
        plan(nn.Sequential(nn.ReLU()), torch.ones(1, 8), "macs<=50%")
