"""Fine-tuning: learns, keeps masks, repeats exactly, resumes exactly, and refuses nonsense."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateurs.core.errors import DataError, FileError, ModelError, OptionError
from secateurs.recover import Distillation, Progress, fine_tune
from secateurs.train import GradualMagnitude, Masks

KEEP = {"0.weight": torch.arange(40).view(10, 4) % 3 == 0}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 3))


def points(count: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def loader(**options: Any) -> DataLoader:
    return DataLoader(points(), batch_size=10, shuffle=True, **options)


def tune(model: nn.Module, data: Any = None, **options: Any) -> Any:
    return fine_tune(model, loader() if data is None else data, **{"epochs": 3, "lr": 0.1, **options})


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns() -> None:
    model = net()
    history = tune(model, epochs=20)
    assert history.loss < 0.5 * history.epochs[0].loss
    assert (history.steps, len(history.epochs)) == (120, 20)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam", "lr": 0.01}, {"optimizer": "adamw", "lr": 0.01}])
def test_masks_hold_and_are_let_go(options: dict[str, Any]) -> None:
    model = net()
    tune(model, masks=KEEP, weight_decay=0.01, **options)
    assert torch.equal(model[0].weight != 0, KEEP["0.weight"])
    assert not model[0].weight._post_accumulate_grad_hooks


def test_masks_of_a_pruner_are_masks() -> None:
    model = net()
    masks = Masks(model, KEEP)
    masks.remove()
    tune(model, masks=masks)
    assert torch.equal(model[0].weight != 0, KEEP["0.weight"])


def test_the_seed_decides_everything() -> None:
    results = []
    for noise, seed in ((5, 0), (6, 0), (6, 1)):
        model = net()
        torch.manual_seed(noise)
        random.seed(noise)
        numpy.random.seed(noise)
        tune(model, seed=seed)
        results.append(model)
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_every_pass_is_shuffled_anew() -> None:
    model, firsts = net(), []
    model.register_forward_pre_hook(lambda m, inputs: firsts.append(inputs[0][0]))
    tune(model)
    assert not torch.equal(firsts[0], firsts[6])


def test_global_random_states_and_training_flags_are_left_alone() -> None:
    model = net().eval()
    model[2].train()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    tune(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]
    assert [m.training for m in model] == [False, False, True, False, False]
    assert all(p.grad is None for p in model.parameters())


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[Progress], None]:
    def callback(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return callback


@pytest.mark.parametrize("generator", [False, True], ids=["global shuffle", "own generator"])
@pytest.mark.parametrize("length", [{"epochs": 4}, {"steps": 20}], ids=["epochs", "steps"])
@pytest.mark.parametrize("how", ["masks", "pruner", "teacher"])
def test_resumed_equals_uninterrupted(how: str, length: dict[str, int], generator: bool, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        own = {"generator": torch.Generator().manual_seed(9)} if generator else {}
        extra = {
            "masks": {"masks": KEEP},
            "pruner": {"pruner": lambda m, o: GradualMagnitude(m, o, sparsity=0.7, end=18, every=3)},
            "teacher": {"teacher": net()},
        }[how]
        return {"data": loader(**own), "epochs": None, "optimizer": "adam", "lr": 0.02, **length, **extra}

    whole = net()
    expected = tune(whole, **options())
    halved = net()
    with pytest.raises(Killed):
        tune(halved, **options(), checkpoint=tmp_path, on_step=kill_at(15))
    again = net()
    history = tune(again, **options(), checkpoint=tmp_path)
    assert history == expected
    assert equal(whole, again)
    finished = net()
    assert tune(finished, **options(), checkpoint=tmp_path) == expected
    assert equal(whole, finished)


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    tune(net(), checkpoint=tmp_path)
    with pytest.raises(FileError, match=r"another training \(lr 0.1 there, 0.2 here\); delete it"):
        tune(net(), checkpoint=tmp_path, lr=0.2)
    with pytest.raises(FileError, match=r"checkpoint of another model"):
        tune(nn.Sequential(nn.Linear(4, 3)), checkpoint=tmp_path)
    file = tmp_path / "training.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FileError, match=r"training.safetensors"):
        tune(net(), checkpoint=tmp_path)


def test_accumulated_batches_step_like_one_large_batch() -> None:
    inputs, target = points(24).tensors
    results = []
    for size, accumulate in ((12, 1), (4, 3)):
        model = nn.Sequential(nn.Linear(4, 3))
        torch.nn.init.ones_(model[0].weight)
        torch.nn.init.zeros_(model[0].bias)
        batches = [(inputs[i : i + size], target[i : i + size]) for i in range(0, 24, size)]
        history = tune(model, batches, accumulate=accumulate, schedule="constant")
        assert history.steps == 6
        results.append(model[0].weight.detach())
    torch.testing.assert_close(*results)


def test_the_last_step_of_a_pass_takes_what_is_left() -> None:
    batches = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)) for _ in range(5)]
    assert [e.steps for e in tune(net(), batches, accumulate=2).epochs] == [3, 3, 3]


def test_steps_cut_the_last_pass_short() -> None:
    seen: list[Progress] = []
    history = tune(net(), epochs=None, steps=8, on_step=seen.append)
    assert [e.steps for e in history.epochs] == [6, 2]
    assert [p.step for p in seen] == list(range(1, 9))
    assert seen[-1].share == 1.0
    assert [p.epoch for p in seen] == [0] * 6 + [1] * 2


def rates(schedule: Any, sized: bool = True, **options: Any) -> list[float]:
    seen: list[Progress] = []
    batches = list(loader())
    data = batches if sized else lambda epoch: iter(batches)
    tune(net(), data, schedule=schedule, on_step=seen.append, **options)
    return [p.lr for p in seen]


def test_rates() -> None:
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * t / 18)) for t in range(18)]
    assert rates("cosine") == pytest.approx(cosine)
    assert rates("constant") == [0.1] * 18
    assert rates("step", epochs=4) == pytest.approx([0.1] * 12 + [0.01] * 6 + [0.001] * 6)
    assert rates(lambda p: 1 - p, epochs=2) == pytest.approx([0.1 * (1 - t / 12) for t in range(12)])
    assert rates(lambda p: 1 - p, sized=False, epochs=2) == pytest.approx([0.1] * 6 + [0.05] * 6)


def test_groups_keep_their_proportion_of_rates() -> None:
    model = net()
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD([{"params": parameters[:1], "lr": lr / 10}, {"params": parameters[1:]}], lr=lr))
        return made[0]

    tune(model, optimizer=optimizer, schedule=lambda p: 0.5)
    assert [group["lr"] for group in made[0].param_groups] == pytest.approx([0.005, 0.05])


def test_data_by_epoch() -> None:
    asked: list[int] = []

    def data(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(epoch)
        yield torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)

    tune(net(), data)
    assert asked == [0, 1, 2]


def test_label_smoothing_is_a_mean_over_all_classes() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    inputs, target = points(10).tensors
    logs = torch.log_softmax(model(inputs), 1).detach()
    wanted = -(0.9 * logs[torch.arange(10), target] + 0.1 * logs.mean(1)).mean()
    history = tune(model, [(inputs, target)], epochs=1, label_smoothing=0.1)
    assert history.loss == pytest.approx(float(wanted))


def test_label_smoothing_of_maps_and_of_real_targets() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    inputs, target = torch.randn(2, 2, 4, 4), torch.randint(0, 3, (2, 4, 4))
    wanted = nn.functional.cross_entropy(model(inputs), target, label_smoothing=0.2).detach()
    history = tune(model, [(inputs, target)], epochs=1, label_smoothing=0.2)
    assert history.loss == pytest.approx(float(wanted), rel=1e-6)
    with pytest.raises(DataError, match=r"integer targets"):
        tune(model, [(inputs, inputs)], epochs=1, label_smoothing=0.2)


def test_a_teacher_alone_needs_no_labels_and_is_not_changed() -> None:
    teacher, student = net(), nn.Sequential(nn.Linear(4, 3))
    tune(teacher, epochs=15)
    teacher.train()
    before = copy.deepcopy(teacher)
    inputs = points().tensors[0]
    guide = copy.deepcopy(teacher).eval()(inputs).softmax(1).detach()

    def distance() -> float:
        return float((student(inputs).softmax(1) - guide).abs().mean().detach())

    start = distance()
    recorded: list[bool] = []
    teacher.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    tune(student, [inputs], epochs=40, teacher=teacher, distillation=Distillation(temperature=2.0, alpha=1.0))
    assert distance() < 0.6 * start
    assert set(recorded) == {False}
    assert equal(teacher, before)
    assert teacher.training
    with pytest.raises(DataError, match=r"the loss needs labels"):
        tune(student, [inputs], teacher=teacher)


def test_alpha_weighs_teacher_against_labels() -> None:
    inputs, target = points(10).tensors
    losses = {}
    for alpha in (0.0, 0.3, 1.0):
        torch.manual_seed(2)
        student = nn.Sequential(nn.Linear(4, 3))
        how = Distillation(temperature=2.0, alpha=alpha)
        losses[alpha] = tune(student, [(inputs, target)], epochs=1, teacher=net(), distillation=how).loss
    assert losses[0.3] == pytest.approx(0.7 * losses[0.0] + 0.3 * losses[1.0], rel=1e-5)
    assert losses[0.0] != pytest.approx(losses[1.0], rel=0.05)


def test_clipping_bounds_the_gradient() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    data = [(torch.tensor([[100.0]]), torch.tensor([[1e4]]))]
    plain = {"optimizer": lambda p, lr: torch.optim.SGD(p, lr), "schedule": "constant"}
    tune(model, data, epochs=1, clip_norm=0.5, **plain)
    assert float((model.weight - before).abs().detach()) == pytest.approx(0.05, rel=1e-3)


def test_autocast() -> None:
    seen: list[torch.dtype] = []
    model = net()
    model[4].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    tune(model, autocast=torch.bfloat16, epochs=1)
    assert set(seen) == {torch.bfloat16}


def test_a_pruner_inside_reaches_its_target() -> None:
    model = net()
    tune(model, pruner=lambda m, o: GradualMagnitude(m, o, sparsity=0.5, end=15, every=5, debug=True))
    assert int((model[0].weight == 0).sum()) == 20
    assert not model[0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "give either epochs= or steps="),
        ({"epochs": None}, "give either epochs= or steps="),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"lr": 0.0}, r"lr must be positive, got 0\.0"),
        ({"accumulate": 0}, "accumulate must be 1 or more"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"label_smoothing": 0.1, "loss": nn.MSELoss()}, "belongs to the default loss"),
        ({"masks": KEEP, "pruner": GradualMagnitude}, "not both"),
        ({"schedule": "cosin"}, "unknown learning-rate schedule 'cosin'; the nearest are cosine"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'; the nearest are adam"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(OptionError, match=message):
        tune(model, **options)
    assert equal(model, before)


def test_all_faults_come_together() -> None:
    with pytest.raises(OptionError, match=r"epochs must be 1 or more, got 0; lr must be positive, got -1"):
        tune(net(), epochs=0, lr=-1)


def test_an_iterator_that_is_spent_is_named() -> None:
    with pytest.raises(DataError, match=r"pass 1 over the training data has no batch"):
        tune(net(), iter(list(loader())))
    with pytest.raises(DataError, match=r"pass 0"):
        tune(net(), [])


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = nn.Linear(1, 1)
    before = copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"the loss is nan at step 1"):
        tune(model, [(torch.tensor([[torch.nan]]), torch.tensor([[1.0]]))])
    assert equal(model, before)


def test_frozen_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Sequential has no parameter with requires_grad=True"):
        tune(net().requires_grad_(False))
