"""Train-time pruners as a callback of Lightning; importing this file imports it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..core.errors import MissingExtraError, OptionError
from .attached import Attached, Build, TrainPruner

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

__all__ = ["PruningCallback"]

_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class PruningCallback(Callback):
    """Prunes while a `lightning.pytorch.Trainer` trains.

    Each `fit` builds a pruner of its own, which steps after every optimizer step and is finalized when the training
    ends. Its state is in Lightning's checkpoints, and `fit(…, ckpt_path=…)` goes on from there; a checkpoint that was
    written without this callback gives weights to a pruner that begins. After a `fit` that was broken off, the model
    keeps its masks and their hooks until the next one, or until `pruner.finalize()`.

    The closure by which Lightning hands forward and backward pass to the optimizer is run before the optimizer's own
    step, as Lightning does for float16; an optimizer that calls it more than once cannot be used.

    Args:
        build: from (LightningModule, optimizer) to a pruner, such as
            `lambda module, optimizer: sec.GradualMagnitude(module, optimizer, end=8000)`. Steps of schedules are
            steps of this optimizer.
        optimizer: which of the optimizers of `configure_optimizers`, from 0.
        log: the name under which the sparsity is logged at every batch; None for not at all.

    Attributes:
        pruner: of the current or the last fit; None before the first.

    Raises:
        OptionError: when a fit starts: a strategy that shards parameters, no such optimizer, or what `build` refuses.
        PlanError: a checkpoint with the state of another pruner.
    """

    def __init__(self, build: Build, *, optimizer: int = 0, log: str | None = "sparsity") -> None:
        self._build, self._index, self._name = build, optimizer, log
        self._attached: Attached | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def pruner(self) -> TrainPruner | None:
        return None if self._attached is None else self._attached.pruner

    @property
    def state_key(self) -> str:
        """By which Lightning finds the state in a checkpoint: one for each optimizer."""
        return self._generate_state_key(optimizer=self._index)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # What a validation or an earlier fit read from a checkpoint is not for this fit.
        self._restored = None
        if stage == "fit" and isinstance(trainer.strategy, _SHARDING):
            raise OptionError(
                f"{type(trainer.strategy).__name__} shards parameters, and masks need whole ones: train on one device "
                "or with strategy='ddp'."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The model has its device and the weights of the checkpoint, the optimizer exists and gets its state after
        # this; `on_train_start` would come after a first validation.
        if self._attached is not None:
            self._attached.finalize()
        self._attached = Attached(self._build, pl_module, self._optimizer(trainer), self._restored)
        self._restored = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self._name is not None and self._attached is not None:
            pl_module.log(self._name, self._attached.sparsity, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._attached is not None:
            self._attached.finalize()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A fit that had nothing left to train never reaches on_train_end.
        if stage == "fit" and self._attached is not None:
            self._attached.finalize()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._attached is None else self._attached.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _optimizer(self, trainer: Trainer) -> Optimizer:
        found = trainer.optimizers
        if not 0 <= self._index < len(found):
            raise OptionError(
                f"optimizer={self._index}, but configure_optimizers gives {len(found)}; they are counted from 0."
            )
        return found[self._index]
