"""Lightning runs the loop; weights are those of a loop of our own, bit for bit, and of one that was interrupted."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from secateurs.core.errors import MissingExtraError, OptionError, PlanError
from tests.support.loops import BUILDS, STEPS, adam, batches, net, plain_run, zeros

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import FSDPStrategy  # noqa: E402

from secateurs.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Module(pl.LightningModule):
    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.net = net(seed)

    def training_step(self, batch: Any, number: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Optimizer:
        return adam(self)


def fitted(
    folder: Path, module: Any, callback: Any, *others: Any, steps: int = STEPS, accumulate: int = 1,
    trainer: Any = None, data: Any = None, fit: dict[str, Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """The trainer, after so many optimizer steps."""
    trainer = trainer or pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        callbacks=[callback, *others], enable_checkpointing=bool(others), **options,
    )  # fmt: skip
    loader = DataLoader(data or batches(STEPS * accumulate), batch_size=None)
    trainer.fit(module, loader, **(fit or {}))
    return trainer


def pruning(name: str) -> PruningCallback:
    return PruningCallback(lambda module, optimizer: BUILDS[name](module.net, optimizer))


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", BUILDS)
def test_weights_are_those_of_a_loop_of_our_own(name: str, tmp_path: Path) -> None:
    module, callback = Module(), pruning(name)
    fitted(tmp_path, module, callback)
    assert callback.pruner.steps == STEPS
    assert zeros(module.net) == 180
    assert same(module.net, plain_run(name))


@pytest.mark.parametrize("name", ["gradual", "granet", "pdp"])
def test_accumulated_gradients_are_one_step(name: str, tmp_path: Path) -> None:
    module, callback = Module(), pruning(name)
    fitted(tmp_path, module, callback, accumulate=3)
    assert callback.pruner.steps == STEPS
    assert same(module.net, plain_run(name, accumulate=3))


class ByStep(Module):
    """Takes its batches by the number of the step: in the midst of an epoch Lightning does not resume a loader."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        return super().training_step(batches()[self.global_step], number)


@pytest.mark.parametrize("name", BUILDS)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, callback = ByStep(), pruning(name)
    every_fifth = ModelCheckpoint(tmp_path / "a", "{step}", every_n_train_steps=5, save_top_k=-1)
    fitted(tmp_path, whole, callback, every_fifth)
    again, resumed = ByStep(seed=8), pruning(name)
    options = {"ckpt_path": tmp_path / "a" / "step=5.ckpt", "weights_only": True}
    fitted(tmp_path, again, resumed, ModelCheckpoint(tmp_path / "b", every_n_train_steps=5), fit=options)
    assert resumed.pruner.steps == STEPS
    assert same(whole, again)
    for weight, mask in callback.pruner.masks.items():
        assert torch.equal(mask, resumed.pruner.masks[weight])


@pytest.mark.parametrize("name", ["value", "pdp"])
def test_training_goes_on_from_what_is_saved_after_its_end(name: str, tmp_path: Path) -> None:
    """Though finalized, values that wait and all: the callback keeps the state from before. Of the optimizer's state,
    which Lightning stores, PDP has cleared what its hard masks remove."""
    whole, callback = ByStep(), pruning(name)
    fitted(tmp_path, whole, callback)
    half, first = ByStep(), pruning(name)
    with pytest.warns(UserWarning, match=r"training ended at step 5, before step"):
        trainer = fitted(tmp_path, half, first, steps=5)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    again, options = ByStep(seed=8), {"ckpt_path": tmp_path / "ended.ckpt", "weights_only": True}
    fitted(tmp_path, again, pruning(name), fit=options)
    assert same(whole, again) == (name == "value")
    assert zeros(again.net) == 180


def test_each_fit_builds_a_pruner_of_its_own(tmp_path: Path) -> None:
    module, callback = Module(), pruning("gradual")
    trainer = fitted(tmp_path, module, callback)
    first = callback.pruner
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit_loop.max_epochs = 2
    fitted(tmp_path, module, callback, trainer=trainer)
    assert callback.pruner is not first
    assert callback.pruner.steps == STEPS
    assert zeros(module.net) == 180
    with pytest.raises(OptionError, match=r"has been finalized"):
        first.step()


def test_finalized_once_and_no_hook_stays(tmp_path: Path) -> None:
    module, callback = Module(), pruning("gradual")
    trainer = fitted(tmp_path, module, callback)
    assert not module.net[0].weight._post_accumulate_grad_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.teardown(trainer, module, "fit")
    with torch.no_grad():
        module.net[0].weight.fill_(1.0)
    callback.on_train_end(trainer, module)
    assert not (module.net[0].weight == 0).any()


def test_the_sparsity_is_logged(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(round(float(trainer.callback_metrics["sparsity"]), 4))

    callback = pruning("gradual")
    fitted(tmp_path, Module(), callback, Watch())
    assert seen[0] == 0.2
    assert seen[-1] == 0.75
    assert seen == sorted(seen)
    trainer = fitted(tmp_path, Module(), PruningCallback(callback._build, log=None))
    assert "sparsity" not in trainer.callback_metrics


def test_bfloat16(tmp_path: Path) -> None:
    module, callback = Module(), pruning("pdp")
    fitted(tmp_path, module, callback, precision="bf16-mixed")
    assert zeros(module.net) == 180


def test_a_step_that_the_scaler_skips_does_not_count(tmp_path: Path) -> None:
    data = batches()
    data[4] = (data[4][0] * torch.inf, data[4][1])
    module, callback = Module(), pruning("gradual")
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    fitted(tmp_path, module, callback, plugins=[scaler], data=data)
    assert callback.pruner.steps == STEPS - 1
    assert zeros(module.net) == 180


class Two(Module):
    """Two networks with an optimizer each; the second steps twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other = net(5)
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        return [adam(self.net), adam(self.other)]

    def training_step(self, batch: Any, number: int) -> None:
        x, y = batch
        for index, model in ((0, self.net), (1, self.other), (1, self.other)):
            optimizer = self.optimizers()[index]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()


@pytest.mark.parametrize("name", ["gradual", "pdp"])
def test_one_of_several_optimizers(name: str, tmp_path: Path) -> None:
    module = Two()
    callback = PruningCallback(lambda m, o: BUILDS[name](m.other, o), optimizer=1)
    fitted(tmp_path, module, callback, steps=3 * STEPS)
    assert callback.pruner.steps == 2 * STEPS
    assert zeros(module.other) == 180
    assert zeros(module.net) == 0


def test_a_callback_for_each_optimizer(tmp_path: Path) -> None:
    made = [PruningCallback(lambda m, o: BUILDS["gradual"](m.net, o)),
            PruningCallback(lambda m, o: BUILDS["pdp"](m.other, o), optimizer=1, log=None)]  # fmt: skip
    module = Two()
    trainer = fitted(tmp_path, module, *made, steps=3 * STEPS)
    assert zeros(module.other) == zeros(module.net) == 180
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    stored = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert [stored[callback.state_key]["step"] for callback in made] == [STEPS, 2 * STEPS]


def test_an_optimizer_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"optimizer=1, but configure_optimizers gives 1; they are counted from 0"):
        fitted(tmp_path, Module(), PruningCallback(BUILDS["gradual"], optimizer=1))


def test_strategies_that_shard_are_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy.__new__(FSDPStrategy)
    with pytest.raises(OptionError, match=r"FSDPStrategy shards parameters, and masks need whole ones: train on one"):
        pruning("gradual").setup(trainer, Module(), "fit")


def test_a_checkpoint_of_another_pruner(tmp_path: Path) -> None:
    fitted(tmp_path, Module(), pruning("pdp")).save_checkpoint(tmp_path / "pdp.ckpt")
    module = Module(seed=8)
    with pytest.raises(PlanError, match=r"the stored state is of another criterion than this pruner's"):
        fitted(tmp_path, module, pruning("gradual"), fit={"ckpt_path": tmp_path / "pdp.ckpt", "weights_only": True})
    assert not module.net[0].weight._post_accumulate_grad_hooks


def test_a_dense_checkpoint_gives_weights_to_a_pruner_that_begins(tmp_path: Path) -> None:
    fitted(tmp_path, Module(), pl.Callback(), steps=4).save_checkpoint(tmp_path / "dense.ckpt")
    module, callback = Module(seed=8), pruning("gradual")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted(tmp_path, module, callback, fit={"ckpt_path": tmp_path / "dense.ckpt", "weights_only": True})
    assert callback.pruner.steps == STEPS - 4
    assert zeros(module.net) == 180


def test_a_fit_that_was_broken_off_leaves_nothing_behind_in_the_next(tmp_path: Path) -> None:
    class Stumble(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if number == 5:
                raise RuntimeError("the power failed")

    module, callback = Module(), pruning("gradual")
    with pytest.raises(RuntimeError, match=r"the power failed"):
        fitted(tmp_path, module, callback, Stumble())
    assert callback.pruner.steps == 6
    with pytest.warns(UserWarning, match=r"training ended at step 6, before step 8"):
        fitted(tmp_path, module, callback)
    assert callback.pruner.steps == STEPS
    assert not module.net[0].weight._post_accumulate_grad_hooks


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, PruningCallback.__module__)
    with pytest.raises(MissingExtraError, match=r"lightning is needed here; .* 'secateurs\[lightning\]'"):
        importlib.import_module(PruningCallback.__module__)


def test_the_package_imports_neither() -> None:
    code = "import sys, secateurs.integrations; sys.exit(bool({'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
