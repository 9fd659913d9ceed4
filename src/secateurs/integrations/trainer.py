"""Train-time pruners as a callback of the Hugging Face Trainer; importing this file imports transformers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FileError, MissingExtraError, OptionError, PlanError
from ..core.state import read_state, write_state
from .attached import Attached, Build, TrainPruner, untouched

if find_spec("accelerate") is None:
    # The Trainer says so itself, but only when it is built.
    raise MissingExtraError("accelerate", "language")
try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "language") from error

__all__ = ["FILE", "PruningCallback"]

# What the state of the pruner is called in a checkpoint's folder.
FILE = "secateurs.safetensors"
_KIND = "pruner state"
# How far soft weights may be from what they were when other hardware computes them again; float32.
_TOLERANCE = 1e-3


class PruningCallback(TrainerCallback):
    """Prunes while a `transformers.Trainer` trains.

    Each `train` builds a pruner of its own, which steps after every optimizer step and is finalized when the training
    ends. Its state is written into each checkpoint's folder, and is read from there when training resumes and when the
    best model is loaded in the end.

    Args:
        build: from (model, optimizer) to a pruner, such as
            `lambda model, optimizer: sec.GradualMagnitude(model, optimizer, end=8000)`. Steps of schedules are
            optimizer steps that were taken: one skipped by a gradient scaler does not count.
        resume_from: the folder given as `resume_from_checkpoint`, where that is not in `output_dir`: the Trainer does
            not tell it to its callbacks.
        log: the name under which the sparsity is added to what the Trainer logs; None for not at all.

    Attributes:
        pruner: of the current or the last training; None before the first.

    Raises:
        OptionError: when a training begins: parameters that are sharded, or what `build` refuses.
        FileError: training resumes from a checkpoint without this pruner's state, or that file is damaged.
        PlanError: the state is of another pruner or of another checkpoint.
    """

    def __init__(self, build: Build, *, resume_from: str | Path | None = None, log: str | None = "sparsity") -> None:
        self._build, self._resume_from, self._name = build, resume_from, log
        self._attached: Attached | None = None

    @property
    def pruner(self) -> TrainPruner | None:
        return None if self._attached is None else self._attached.pruner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attached is not None:
            self._attached.finalize()
        _refuse_sharding(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not state.global_step:
            self._attached = Attached(self._build, model, optimizer)
            return
        stored = _read(_folder(args, state, self._resume_from), state.global_step)
        before = _copies(model)
        self._attached = Attached(self._build, model, optimizer, stored)
        _refuse_another(model, before)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._attached is not None and args.should_save:
            path = _checkpoint(args, state) / FILE
            write_state(path, {"step": state.global_step, "pruner": self._attached.state_dict()}, _KIND)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._name is None or self._attached is None:
            return
        # The history has a copy of the logs, made before callbacks see them.
        for record in (kwargs["logs"], *state.log_history[-1:]):
            record[self._name] = self._attached.sparsity

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attached is None or self._attached.finalized:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Its weights are in the model now, and masks of its own go with them.
            model, stored = kwargs["model"], _read(Path(state.best_model_checkpoint), None)
            with untouched(model.parameters()):
                self._attached.finalize()
            self._attached = Attached(self._build, model, kwargs["optimizer"], stored)
        self._attached.finalize()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _folder(args: TrainingArguments, state: TrainerState, given: str | Path | None) -> Path:
    """The checkpoint from which training resumes, as far as a callback can know."""
    named = given if given is not None else args.resume_from_checkpoint
    return Path(named) if isinstance(named, (str, Path)) else _checkpoint(args, state)


def _read(folder: Path, step: int | None) -> Mapping[str, Any]:
    """The state of the pruner in a checkpoint's folder, of that step."""
    path = folder / FILE
    if not path.is_file():
        raise FileError(
            f"training goes on from a checkpoint, but there is no {path}: give the checkpoint's folder as "
            "resume_from=, or start a new training from its weights if it was written without this callback."
        )
    stored = read_state(path, _KIND)
    if step is not None and stored["step"] != step:
        raise FileError(
            f"{path} is of step {stored['step']}, training resumes at step {step}: give the folder of that checkpoint "
            "as resume_from=."
        )
    found: Mapping[str, Any] = stored["pruner"]
    return found


def _refuse_sharding(args: TrainingArguments) -> None:
    asked = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
    # How Accelerate was configured, outside the arguments.
    kind = str(getattr(getattr(args, "distributed_state", None), "distributed_type", "")).rpartition(".")[2]
    asked += [kind] if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM") else []
    if asked:
        raise OptionError(
            f"{asked[0]} shards parameters, and masks need whole ones: train on one device or with plain data "
            "parallelism (DDP)."
        )


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def _refuse_another(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """None, if the state that was loaded is of the checkpoint whose weights these were: masking changed nothing.

    Raises:
        PlanError: a weight that is not what it was.
    """
    for name, parameter in model.named_parameters():
        now, then = parameter.detach().cpu().float(), before[name].float()
        if not torch.allclose(now, then, rtol=_TOLERANCE, atol=_TOLERANCE * float(then.abs().max())):
            raise PlanError(
                f"the pruner's state is of another checkpoint than the model's weights: it changes {name}; give the "
                "folder of the checkpoint that the training resumes from as resume_from=."
            )
