"""SPA and OBSPA: group scores from any criterion, the three settings, and calibration with and without data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs import FineTune
from secateurs.core.errors import BudgetError, DataError, ModelError, OptionError
from secateurs.criteria import score
from secateurs.methods.calibration import noise
from secateurs.methods.channels.spa_obspa import Spa, spa_obspa
from secateurs.methods.repair import repaired
from tests.graph.nets import CatWithItself, LeNet


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


X = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def data(batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 2, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(batches)
    ]


def run(
    options: Spa | None = None, budget: str = "macs<=50%", model: nn.Module | None = None, **common: Any
) -> sec.Pruned:
    arguments = {"data": data(), "measure": False, **common}
    return spa_obspa(network() if model is None else model, X, budget, options=options, **arguments)


def trained(options: Spa, **common: Any) -> tuple[sec.Pruned, int]:
    """The result, and how many optimizer steps led to it."""
    steps: list[int] = []
    made = run(options, on_step=lambda progress: steps.append(progress.step), **common)
    return made, len(steps)


def state(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


class Untouchable:
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("data was read")


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_it_is_score_plan_repair_cut_and_norms() -> None:
    model = network()
    made = run(recalibrate=False)
    decided = sec.plan(model, X, "macs<=50%", data=data(), criterion="obs", criterion_options={"damping": 0.01})
    assert made.plan.same_as(decided)
    assert same(made.model, decided.cut(repaired(model, decided, data())))
    assert not same(made.model, decided.cut(model))
    assert not same(run().model, made.model)
    assert "repairing" in made.report.seconds


def test_without_repair_it_is_a_plain_cut() -> None:
    made = run(Spa("magnitude", repair="none"), data=None)
    assert same(made.model, sec.prune(network(), X, "macs<=50%", measure=False).model)


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": "max"}, {"reduce": "mean"}, {"normalize": "none"}, {"normalize": "minmax"}, {"combine": "prod"},
        {"combine": "first"}, {"reduce": "mean", "normalize": "gaussian", "combine": "sum"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("criterion", ["magnitude", "obs", "snip", "crop"])
def test_group_scores_follow_the_three_choices(criterion: str, options: dict[str, str]) -> None:
    model = network()
    made = run(Spa(criterion, repair="none", **options), model=model)  # type: ignore[arg-type]
    wanted = score(criterion, model, made.plan.groups, data=data(), **options)
    assert all(torch.equal(made.plan.scores[name], scores) for name, scores in wanted.items())


def test_scores_with_a_sign_are_not_divided_by_their_mean() -> None:
    made = run(Spa("grasp", repair="none"))
    assert any(bool((scores < 0).any()) for scores in made.plan.scores.values())
    with pytest.raises(OptionError, match="normalize must be none, minmax or gaussian"):
        run(Spa("grasp", normalize="mean"))


def test_damping_reaches_scores_and_repair() -> None:
    soft, hard = run(Spa(damping=1e-6), recalibrate=False), run(Spa(damping=1e6), recalibrate=False)
    assert not torch.equal(soft.plan.scores["0"], hard.plan.scores["0"])
    # Without bound the inputs count as uncorrelated, and the repair is the plain cut.
    plain = hard.plan.cut(network())
    for repaired_tensor, cut_tensor in zip(state(hard.model), state(plain), strict=True):
        torch.testing.assert_close(repaired_tensor, cut_tensor, rtol=1e-4, atol=1e-5)


def test_uniform_takes_the_same_share_everywhere() -> None:
    made = run(Spa(allocation="uniform"), "sparsity=50%")
    assert made.plan.counts == {"0": 4, "3": 3}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["snip", "grasp", "crop", "magnitude"])
def test_prune_then_train(criterion: str) -> None:
    fresh = network(7)
    made, steps = trained(Spa(criterion, repair="none"), model=fresh, recover=FineTune(epochs=2, lr=0.05))
    assert steps == 6
    assert not same(made.model, made.plan.cut(fresh))


def test_train_prune_and_fine_tune_in_rounds() -> None:
    made, steps = trained(Spa("magnitude", repair="none", rounds=3), recover=FineTune(epochs=1, lr=0.05))
    assert made.plan.recipe.criterion == "magnitude in 3 rounds"
    assert made.plan.cost("macs") <= 0.5
    assert steps == 3


def test_rounds_are_repaired_in_between() -> None:
    made = run(Spa(rounds=2), scope="0", recalibrate=False)
    assert set(made.plan.counts) == {"0"}
    assert same(made.model, made.plan.cut(repaired(network(), made.plan, data())))
    with pytest.raises(OptionError, match=r"rounds go down to a share of the model.*params<=100 is none"):
        run(Spa(rounds=2), "params<=100")


def test_by_its_name() -> None:
    made = sec.prune(network(), X, "macs<=50%", method="spa-obspa", data=data(), measure=False)
    assert same(made.model, run().model)


def test_stages_of_quality() -> None:
    made = run(test=data(1))
    assert list(made.report.stages) == ["one-shot", "batch-norm recalibrated"]


# -- calibration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "smooth"])
def test_without_data(kind: str) -> None:
    made = run(Spa(calibration=kind, samples=32), data=Untouchable(), seed=3)  # type: ignore[arg-type]
    drawn = noise(X, kind, 32, seed=3)  # type: ignore[arg-type]
    decided = sec.plan(network(), X, "macs<=50%", data=drawn, criterion="obs")
    assert made.plan.same_as(decided)
    assert same(made.model, decided.cut(repaired(network(), decided, drawn)))
    assert same(run(Spa(calibration=kind, samples=32), data=None, seed=3).model, made.model)  # type: ignore[arg-type]


def test_noise_calibrates_and_data_train() -> None:
    options = Spa(calibration="smooth", samples=16)
    assert trained(options, recover=FineTune(epochs=1, lr=0.05))[1] == 3
    assert trained(options, data=None, recover=FineTune(epochs=1, lr=0.05, data=data(2)))[1] == 2
    with pytest.raises(OptionError, match="recover= needs training data"):
        run(options, data=None, recover=FineTune(epochs=1, lr=0.05))


def test_other_images_will_do() -> None:
    other = [torch.rand(8, 2, 6, 6) + 3]
    made = run(data=other, recalibrate=False)
    assert same(made.model, made.plan.cut(repaired(network(), made.plan, other)))


def test_data_that_can_be_read_once_are_kept() -> None:
    assert same(run(data=iter(data())).model, run().model)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, Spa("magnitude")])
def test_no_data_is_an_error_unless_asked_for(options: Spa | None) -> None:
    with pytest.raises(DataError, match="this needs calibration data: pass data="):
        run(options, data=None)
    with pytest.raises(DataError, match="empty"):
        run(options, data=[])


def test_broken_data_are_refused_by_layer() -> None:
    with pytest.raises(ModelError, match="NaN or infinite values among the inputs of 3"):
        run(Spa("magnitude"), data=[torch.full((4, 2, 6, 6), torch.nan)])


@pytest.mark.parametrize(
    ("budget", "text"), [("sparsity=100%", "sparsity lies in"), ("macs<=0%", "must be more than 0")]
)
def test_wrong_shares_are_refused(budget: str, text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        run(budget=budget)


def test_a_checkpoint_of_other_hyperparameters_is_refused(tmp_path: Path) -> None:
    first = run(Spa("magnitude"), checkpoint=tmp_path)
    assert same(run(Spa("magnitude"), checkpoint=tmp_path).model, first.model)
    for other in (
        Spa("magnitude", repair="none"),
        Spa("magnitude", damping=0.1),
        Spa("magnitude", calibration="smooth"),
    ):
        with pytest.raises(OptionError, match="holds a run of another model, budget or options"):
            run(other, checkpoint=tmp_path)


def test_noise_for_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(OptionError, match="uniform noise stands in for floating-point inputs"):
        spa_obspa(model, tokens, "macs<=50%", options=Spa(calibration="uniform"))


# -- groups of the specification, repaired -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "consumer", "columns"),
    [
        (CatWithItself, (4, 3, 5, 5), "second.weight", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (LeNet, (20, 2, 2, 2), "fc.weight", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
    ids=["concatenated with itself", "flattened"],
)
def test_a_channel_owns_its_columns(
    build: type[nn.Module], shape: tuple[int, ...], consumer: str, columns: list[list[int]]
) -> None:
    torch.manual_seed(5)
    model = build()
    x = torch.randn(shape)
    for share in (0.3, 0.6):
        decided = sec.plan(model, x, f"sparsity={share:.0%}", data=[x], criterion="obs", floor=1)
        (keep,) = decided.keep.values()
        gone = [column for unit, owned in enumerate(columns) if not keep[unit] for column in owned]
        weight = repaired(model, decided, [x]).get_parameter(consumer).detach().movedim(1, 0)
        assert [i for i, column in enumerate(weight) if not column.any()] == sorted(gone)
