"""A plan for a model: zeros or a cut, kept in a file, applied elsewhere to the bit, refused where it does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import FileError, ModelError, PlanError, ProofError
from secateurs.core.units import ChannelGroup
from secateurs.graph.plan import ModelPlan, digest
from tests.graph import nets
from tests.graph.nets import drawn

images, rows = drawn(2, 3, 8, 8), drawn(8, 5)
ids = torch.arange(10).view(2, 5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# Each: a network, its inputs, a budget, options of the plan.
PLANS: dict[str, tuple[Callable[[], nn.Module], Any, str, dict[str, Any]]] = {
    "channels of layers called 0, 2 and 4": (mlp, rows, "macs<=50%", {}),
    "channels and heads": (nets.Attention, drawn(2, 6, 12), "params<=80%", {}),
    "tied embeddings": (nets.TiedLanguageModel, {"ids": ids}, "params<=70%", {}),
    "buffers": (nets.Dense, (images,), "macs<=60%", {"round_to": 2}),
    "weights": (mlp, rows, "sparsity=75%", {"granularity": "weight"}),
    "blocks": (mlp, rows, "sparsity=50%", {"granularity": "block:4x1"}),
    "a pattern": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 8)),
        drawn(2, 4, 4, 4),
        "2:4",
        {},
    ),
    "half precision": (lambda: mlp().to(torch.bfloat16), rows.to(torch.bfloat16), "macs<=50%", {}),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_from_a_file_does_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    make, inputs, budget, options = PLANS[name]
    model = make()
    plan = sec.plan(model, inputs, budget, **options)
    before = state(model)
    again = ModelPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert again.groups == plan.groups
    assert again.costs == plan.costs
    assert again.structure == plan.structure
    assert again.recipe == plan.recipe
    assert again.same_as(plan)
    assert (again.fingerprint, again.digest, again.warnings) == (plan.fingerprint, plan.digest, plan.warnings)
    assert all(torch.equal(again.scores[g.name], plan.scores[g.name]) for g in plan.groups)
    elsewhere = copy.deepcopy(model)
    assert equal(state(plan.mask(model)), state(again.mask(elsewhere)))
    if plan.structure is not None:
        assert equal(state(plan.cut(model)), state(again.cut(elsewhere)))
    assert equal(state(model), before)
    assert str(again) == str(plan)


def test_a_plan_is_made_the_same_again() -> None:
    model = mlp()
    first, second = (sec.plan(model, rows, "macs<=40%", criterion="random", seed=3) for _ in range(2))
    assert first.same_as(second)
    assert not first.same_as(sec.plan(model, rows, "macs<=40%", criterion="random", seed=4))


def test_mask_and_cut_agree_and_the_figure_of_the_proof_is_returned() -> None:
    model = nets.SqueezeExcite().eval()
    plan = sec.plan(model, images, "macs<=50%")
    smaller, error = plan.proven_cut(model)
    assert 0 <= error < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(smaller.eval()(images), plan.mask(model)(images), rtol=1e-4, atol=1e-5)
    assert plan.masks(model)["conv.weight"].shape == model.conv.weight.shape


def test_a_wrong_structure_is_caught_when_the_plan_is_applied() -> None:
    model = mlp()
    plan = sec.plan(model, rows, "macs<=50%")
    assert plan.structure is not None
    forgotten = {name: dims for name, dims in plan.structure.tensors.items() if name != "2.weight"}
    with pytest.raises(ProofError, match="does not run"):
        replace(plan, structure=replace(plan.structure, tensors=forgotten)).cut(model)


def test_patterns_lie_along_the_inputs() -> None:
    """Of a linear layer along its columns, of a convolution along its input channels at each position of the kernel."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 8))
    plan = sec.plan(model, drawn(2, 8, 4, 4), "2:4")
    masks = plan.masks(model)
    assert set(masks) == {"0.weight", "2.weight"}
    assert (masks["2.weight"].view(8, 6, 4).sum(-1) == 2).all()
    assert (masks["0.weight"].view(6, 2, 4, 3, 3).sum(2) == 2).all()
    kept = plan.mask(model)[2].weight.abs().view(8, 6, 4)
    assert torch.equal(kept.sum(-1), model[2].weight.abs().view(8, 6, 4).topk(2).values.sum(-1))


def test_blocks_go_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    plan = sec.plan(model, drawn(2, 6), "sparsity=50%", granularity="block:4x3")
    mask = plan.masks(model)["0.weight"]
    for rows_ in (mask[:4], mask[4:8], mask[8:]):
        for block in (rows_[:, :3], rows_[:, 3:]):
            assert block.all() or not block.any()
    assert not mask.all()


def test_weights_cannot_be_cut_out() -> None:
    plan = sec.plan(mlp(), rows, "sparsity=50%", granularity="weight")
    with pytest.raises(PlanError, match=r"weight units are entries of a tensor and cannot be cut out .* use plan.mask"):
        plan.cut(mlp())


def test_a_tied_weight_is_decided_on_once() -> None:
    model = nets.TiedLanguageModel()
    plan = sec.plan(model, ids, "sparsity=50%", granularity="weight", scope=["*.weight", "head*"])
    assert [g.name for g in plan.groups].count("embed.weight") == 1
    assert "head.weight" not in [g.name for g in plan.groups]
    masked = plan.mask(model)
    assert masked.head.weight is masked.embed.weight


@pytest.mark.parametrize("options", [{}, {"granularity": "weight"}])
def test_a_plan_for_another_model_is_refused(options) -> None:
    plan = sec.plan(mlp(), rows, "sparsity=50%", **options)
    wider = nn.Sequential(nn.Linear(5, 17), nn.ReLU(), nn.Linear(17, 8), nn.ReLU(), nn.Linear(8, 3))
    for other, message in [
        (wider, r"0\.weight has shape \[17, 5\], the plan expects \[16, 5\]"),
        (nn.ModuleDict({"net": mlp()}), r"0\.weight"),
        (nn.Sequential(*mlp(), nn.Linear(3, 3)), "names or shapes of its tensors differ"),
    ]:
        for act in (plan.mask, plan.cut) if not options else (plan.mask,):
            with pytest.raises(PlanError, match=message):
                act(other)


def test_other_weights_of_the_same_shapes_are_welcome_unless_refused() -> None:
    model = mlp()
    plan = sec.plan(model, rows, "macs<=50%")
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight.mul_(2)
    assert plan.cut(trained)[0].weight.shape[0] == plan.counts["0"]
    plan.check(model, values=True)
    with pytest.raises(PlanError, match="other weights of the same shapes"):
        plan.check(trained, values=True)


def test_digests_see_names_dtypes_values_and_buffers() -> None:
    model = nn.BatchNorm1d(3)
    seen = {digest(model), digest(nn.Sequential(model)), digest(nn.BatchNorm1d(3).half())}
    with torch.no_grad():
        model.running_mean[0] = 1e-7
    assert len({*seen, digest(model)}) == 4
    assert digest(model) == digest(copy.deepcopy(model))


def test_another_budget_of_a_plan_fits_the_same_model(tmp_path) -> None:
    model = mlp()
    plan = sec.plan(model, rows, "macs<=80%")
    tighter = ModelPlan.load(plan.save(tmp_path / "plan")).rebudget("macs<=40%")
    assert isinstance(tighter, ModelPlan)
    assert tighter.same_as(sec.plan(model, rows, "macs<=40%"))
    assert sum(tighter.counts.values()) < sum(plan.counts.values())
    assert sum(p.numel() for p in tighter.cut(model).parameters()) == tighter.cost("params", relative=False)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """The file with its tensors and header changed, as a valid safetensors file."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return path


def more_stays(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("/keep"):
            tensor.fill_(255)


def other_axis(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    header["tree"] = header["tree"].replace("2.weight", "4.weight")


def other_kind(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    header["format"] = "secateurs training state"


def other_version(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    header["version"] = "99"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_stays, "checksum"),
        (other_axis, "checksum"),
        (other_kind, "not plan of secateurs"),
        (other_version, "version '99'"),
    ],
)
def test_a_tampered_file_is_refused(change, message, tmp_path) -> None:
    path = rewritten(sec.plan(mlp(), rows, "macs<=50%").save(tmp_path / "plan"), change)
    with pytest.raises(FileError, match=message):
        ModelPlan.load(path)


@pytest.mark.parametrize("left", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(left, tmp_path) -> None:
    path = sec.plan(mlp(), rows, "macs<=50%").save(tmp_path / "plan")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(FileError, match="missing, truncated or damaged"):
        ModelPlan.load(path)


# What cannot be planned.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_broken_weights_are_refused(value, granularity) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = value
    with pytest.raises(ModelError, match=r"2\.weight"):
        sec.plan(model, rows, "sparsity=50%", granularity=granularity)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_example_inputs_of_another_shape_are_refused_with_the_shapes(granularity) -> None:
    with pytest.raises(ModelError, match="2, 7"):
        sec.plan(mlp(), drawn(2, 7), "macs<=50%", granularity=granularity)


class Twice(nn.Module):
    """A width that goes into a bilinear layer, which is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.both = nn.Linear(5, 6), nn.Bilinear(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.up(x), self.up(x))


def test_a_model_without_a_free_width_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ModelError, match="nothing to prune in Linear at this granularity: an axis of the model's output"
    ):
        sec.plan(nn.Linear(5, 3), rows, "macs<=50%")
    with pytest.raises(ModelError, match="_trilinear in both"):
        sec.plan(Twice(), rows, "macs<=50%")


def test_an_ignored_layer_keeps_its_weights_as_they_are() -> None:
    model = nets.Dense()
    plan = sec.plan(model, images, "sparsity=30%", ignore="layers.1")
    assert [g.name for g in plan.groups] == ["layers.2"]
    assert all(isinstance(g, ChannelGroup) for g in plan.groups)
    assert torch.equal(plan.cut(model).layers[1].weight, model.layers[1].weight)
