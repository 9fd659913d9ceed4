"""The levels of each group on disk, and what the stitched model is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.batch import default_loss
from secateurs.core.errors import DataError, ModelError
from secateurs.core.select import top
from secateurs.graph.cut import cut
from secateurs.graph.infer import infer
from secateurs.graph.twin import twin
from secateurs.methods.language._database import Database, build, consumers_of
from secateurs.methods.language._trial import Trial
from secateurs.solvers import Gram, structured_obs
from tests.criteria.models import account, unruly
from tests.measure.test_latency_table import Block


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8), Block(6)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.head(x)


X = torch.ones(2, 4)
COUNTS = {"layers.0.parts.up": (8, 5, 2, 1), "layers.1.parts.up": (6, 3, 0)}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(3)]


def database_of(model: nn.Module, folder: Path, data: Any = None) -> Database:
    groups = infer(model, X, entangled=False).groups
    database = Database(folder, COUNTS, consumers_of(model, groups))
    build(model, database, batches() if data is None else data)
    return database


def inputs_of(model: nn.Module, layer: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for x, _ in batches():
        model(x)
    handle.remove()
    return torch.cat(seen).detach()


def test_levels_are_those_of_structured_obs_on_the_inputs_of_the_unpruned_model(net: nn.Module, tmp_path: Path) -> None:
    database = database_of(net, tmp_path)
    for group, counts in COUNTS.items():
        layer = group.replace("up", "down")
        gram = Gram()
        gram.add(net.get_submodule(layer), inputs_of(net, layer))
        weight = net.get_submodule(layer).weight.detach()
        goes = [counts[0] - count for count in counts]
        levels = structured_obs(weight, gram.hessian[0], torch.arange(counts[0])[:, None], goes)
        for count, level in zip(counts, levels, strict=True):
            torch.testing.assert_close(database.weight(net, group, count), level.weight)
        assert database.solved[group].order == levels[-1].removed


def test_the_first_level_is_the_weight_and_a_last_one_of_none_is_zero(net: nn.Module, tmp_path: Path) -> None:
    database = database_of(net, tmp_path)
    assert torch.equal(database.weight(net, "layers.1.parts.up", 6), net.layers[1].parts["down"].weight)
    assert not database.weight(net, "layers.1.parts.up", 0).any()
    assert database.solved["layers.1.parts.up"].errors[0] == 0
    assert database.solved["layers.1.parts.up"].errors[-1] == pytest.approx(1)


def test_priors_are_relative_errors_of_the_outputs(net: nn.Module, tmp_path: Path) -> None:
    database = database_of(net, tmp_path)
    x = inputs_of(net, "layers.0.parts.down")
    own = net.layers[0].parts["down"].weight.detach()
    for count, prior in zip(COUNTS["layers.0.parts.up"], database.solved["layers.0.parts.up"].errors, strict=True):
        weight = database.weight(net, "layers.0.parts.up", count)
        assert prior == pytest.approx(float((x @ (weight - own).T).norm() / (x @ own.T).norm()), rel=1e-4, abs=1e-6)


def test_the_latest_to_go_rank_highest_and_what_a_level_keeps_is_its_top(net: nn.Module, tmp_path: Path) -> None:
    database = database_of(net, tmp_path)
    for group, counts in COUNTS.items():
        for count in counts:
            keep = top(database.ranks(group), count)
            weight = database.weight(net, group, count)
            assert torch.equal(weight.any(0), keep)


def test_padding_does_not_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    noisy = torch.where(mask[..., None].bool(), x, 50.0)
    made = [
        database_of(net, tmp_path / str(number), [{"x": given, "attention_mask": mask}])
        for number, given in enumerate((x, noisy))
    ]
    for group in COUNTS:
        assert made[0].solved[group].errors == pytest.approx(made[1].solved[group].errors)


def test_the_model_is_left_as_it_was(net: nn.Module, tmp_path: Path) -> None:
    model = unruly(net)
    before = account(model)
    database = database_of(model, tmp_path)
    Trial(model, database, batches()).loss({"layers.0.parts.up": 2, "layers.1.parts.up": 0})
    assert account(model) == before


def test_without_data_there_is_no_database(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        database_of(net, tmp_path, [])


# -- what reads the units ----------------------------------------------------------------------------------------------


def consumers(model: nn.Module, x: Tensor) -> Any:
    return consumers_of(model, infer(model, x, entangled=False).groups)


def test_a_convolution_reads_a_channel_by_all_positions_of_its_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, (1, 2)))
    found = consumers(model, torch.ones(1, 1, 6, 6))["0"]
    assert found.layer == "2"
    assert found.structures.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_units_that_two_layers_read_are_left_alone() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.left(x) + self.right(x)

    with pytest.raises(ModelError, match="the units of stem are read by several layers"):
        consumers(Forked(), X)


def test_groups_that_share_a_tensor_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ModelError, match=r"0 and 2 share 2\.weight, .* ignore="):
        consumers(model, X)


# -- what a choice is worth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [{}, {"layers.0.parts.up": 2}, {"layers.0.parts.up": 5, "layers.1.parts.up": 3}])
def test_a_trial_has_the_loss_of_the_model_that_is_really_cut(
    kept: dict[str, int], net: nn.Module, tmp_path: Path
) -> None:
    database = database_of(net, tmp_path)
    trial = Trial(net, database, batches())
    trial.loss(dict.fromkeys(COUNTS, 1) | {"layers.1.parts.up": 0})
    found = trial.loss({name: kept.get(name, counts[0]) for name, counts in COUNTS.items()})
    weights = {f"{database.consumers[g].layer}.weight": database.weight(net, g, count) for g, count in kept.items()}
    keep = {group: top(database.ranks(group), count) for group, count in kept.items()}
    small = cut(twin(net, weights), infer(net, X, entangled=False), keep).eval()
    with torch.no_grad():
        wanted = sum(float(default_loss(small(x), y)) for x, y in batches()) / 3
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_loss_of_ones_own_is_asked(net: nn.Module, tmp_path: Path) -> None:
    trial = Trial(net, database_of(net, tmp_path), batches(), lambda output, target: output.sum() * 0 + 7)
    assert trial.loss({}) == 7


def test_without_labels_the_distance_from_the_unpruned_outputs_is_the_loss(net: nn.Module, tmp_path: Path) -> None:
    database = database_of(net, tmp_path)
    trial = Trial(net, database, [x for x, _ in batches()])
    assert trial.loss({}) == 0
    few, none = trial.loss({"layers.1.parts.up": 3}), trial.loss({"layers.1.parts.up": 0})
    assert 0 < few < none
    weights = {"layers.1.parts.down.weight": database.weight(net, "layers.1.parts.up", 0)}
    other = twin(net, weights).eval()
    with torch.no_grad():
        gaps = [(other(x) - net.eval()(x)).square().mean() / net(x).square().mean() for x, _ in batches()]
    assert none == pytest.approx(float(sum(gaps)) / 3, rel=1e-5)
