"""Fine-tuning: a small training loop that keeps masks, listens to a teacher, and survives being killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..core.batch import Loss, device_of, move
from ..core.errors import DataError, FileError, ModelError, OptionError, unknown_name
from ..core.state import read_state, write_state
from ..train.masking import Masks
from ..train.sam import SAM, statistics_kept
from .context import modes_kept, seeded
from .distill import Distillation
from .objective import training_objective
from .schedules import Rate, get_rate

__all__ = ["Data", "Epoch", "History", "Progress", "StepPruner", "fine_tune", "one_pass"]

Data = Iterable[Any] | Callable[[int], Iterable[Any]]
MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]
_FILE = "training.safetensors"


class StepPruner(Protocol):
    """A train-time pruner, such as `GradualMagnitude` makes."""

    def step(self) -> None:
        """Called after every optimizer step."""

    def finalize(self) -> Any:
        """Called after the last one."""

    def state_dict(self) -> dict[str, Any]:
        """Stored with each checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called on resuming."""


@dataclass(frozen=True)
class Progress:
    """Where training is, after an optimizer step.

    Args:
        step: optimizer steps taken, from 1.
        epoch: passes over the data completed before this one, from 0.
        share: of the whole training, in (0, 1].
        loss: of this step's batches.
        lr: learning rate of this step.
    """

    step: int
    epoch: int
    share: float
    loss: float
    lr: float

    @property
    def detail(self) -> str:
        """In words."""
        return f"loss {self.loss:.3f}"


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: optimizer steps in it, their mean loss, and the last learning rate."""

    steps: int
    loss: float
    lr: float


@dataclass(frozen=True)
class History:
    """What happened in training, one record a pass over the data."""

    epochs: tuple[Epoch, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(epoch.steps for epoch in self.epochs)

    @property
    def loss(self) -> float:
        """Mean loss of the last pass."""
        return self.epochs[-1].loss


@dataclass(frozen=True)
class _Run:
    """Everything that stays the same during one training."""

    model: nn.Module
    data: Data
    objective: Callable[[Any], Tensor]
    optimizer: Optimizer
    rate: Rate
    lr: float
    epochs: int | None
    steps: int | None
    seed: int
    accumulate: int
    clip_norm: float | None
    autocast: torch.dtype | None
    pruner: StepPruner | None
    sam: SAM | None
    on_step: Callable[[Progress], None] | None
    settings: dict[str, Any] = field(default_factory=dict)


def fine_tune(
    model: nn.Module,
    data: Data,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float,
    optimizer: str | MakeOptimizer = "sgd",
    weight_decay: float = 0.0,
    schedule: str | Rate = "cosine",
    loss: Loss | None = None,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    masks: Mapping[str, Tensor] | None = None,
    pruner: Callable[[nn.Module, Optimizer], StepPruner] | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    sam: SAM | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> History:
    """The `History` of a training of `model`, in place; training flags are afterwards as before.

    The result follows from the arguments alone: every pass starts from random states derived from `seed` and its
    number, so that shuffling, augmentation and dropout repeat, and a run that resumes from its checkpoint ends like one
    that was never stopped.

    Args:
        model: trained where it is; batches are moved to its device.
        data: a re-iterable of batches (see `core.batch`), or a function from the number of the pass, from 0, to one.
        epochs: passes over the data; give this or `steps`.
        steps: optimizer steps, over as many passes as they take.
        lr: initial learning rate.
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", or a function `(parameters, lr) -> optimizer`, whose groups
            with `scheduled=False` keep their rate.
        weight_decay: of a named optimizer.
        schedule: "cosine" (to 0), "constant", "linear" (to 0), "linear-warmup" (the first tenth goes up), "step" (×0.1
            at ½ and ¾), or a function from progress in [0, 1) to a factor on every group's rate. Progress moves with
            every step where the length of the data is known, else with every epoch.
        loss: `(output, target) -> scalar`; default: `core.batch.default_loss`.
        label_smoothing: of the default cross-entropy, mean over all classes (0.1 in Global MP's recipe).
        teacher: a model whose outputs the model learns as well; evaluated without gradients and not changed.
        distillation: how; default `Distillation()`.
        masks: kept during training, as `Masks` does; they are let go at the end and the weights stay zero.
        pruner: builds a train-time pruner from model and optimizer; it is stepped, stored with checkpoints, finalized.
        accumulate: batches per optimizer step; the last step of a pass takes what is left.
        clip_norm: largest gradient norm; None for no limit.
        autocast: dtype of mixed precision, such as torch.bfloat16; None for none.
        sam: sharpness-aware minimisation: every step takes its batches twice, and running statistics follow the first
            time alone; None for none.
        seed: see above.
        checkpoint: a folder; the state is written there after every pass, and training resumes from it if there is one.
        on_step: called after every optimizer step, for a progress bar.

    Raises:
        OptionError: an argument outside what is allowed.
        DataError: a pass without batches, or labels missing.
        ModelError: the loss is not finite.
        FileError: the checkpoint is damaged or is of a training with other settings; delete it to start again.
    """
    _check(epochs, steps, accumulate, lr, label_smoothing, loss, masks, pruner)
    rate = get_rate(schedule)
    objective = training_objective(model, loss, label_smoothing, teacher, distillation or Distillation(), autocast)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameter with requires_grad=True, so it cannot be trained.")
    made = _optimizer(optimizer, parameters, lr, weight_decay)
    settings = {
        "epochs": epochs, "steps": steps, "lr": lr, "seed": seed, "accumulate": accumulate,
        "weight_decay": weight_decay, "label_smoothing": label_smoothing, "taught": teacher is not None,
        "optimizer": optimizer if isinstance(optimizer, str) else "own",
        "schedule": schedule if isinstance(schedule, str) else "own",
        "sam": None if sam is None else asdict(sam),
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        if teacher is not None:
            stack.enter_context(modes_kept(teacher))
            teacher.eval()
        if masks:
            stack.enter_context(Masks(model, masks)).watch(made)
        stepped = None if pruner is None else pruner(model, made)
        run = _Run(
            model,
            data,
            objective,
            made,
            rate,
            lr,
            epochs,
            steps,
            seed,
            accumulate,
            clip_norm,
            autocast,
            stepped,
            sam,
            on_step,
            settings,
        )
        history = _train(run, None if checkpoint is None else Path(checkpoint) / _FILE)
        if stepped is not None:
            stepped.finalize()
        made.zero_grad()
    return history


def _train(run: _Run, file: Path | None) -> History:
    history = _resumed(run, file) if file is not None and file.exists() else History()
    while not _finished(run, history):
        epoch = len(history.epochs)
        with seeded(run.seed, epoch):
            history = History((*history.epochs, _pass(run, epoch, history.steps)))
        if file is not None:
            write_state(file, _state(run, history))
    return history


def _finished(run: _Run, history: History) -> bool:
    if run.epochs is not None:
        return len(history.epochs) >= run.epochs
    return history.steps >= (run.steps or 0)


def one_pass(data: Data, epoch: int = 0) -> Iterable[Any]:
    """The batches of one pass over the data; passes are counted from 0."""
    return data(epoch) if callable(data) else data


def _length(batches: Iterable[Any]) -> int | None:
    """Number of batches where it is known; a DataLoader of an iterable data set has the method and refuses it."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _pass(run: _Run, epoch: int, before: int) -> Epoch:
    """One pass over the data, cut short when the asked number of steps is reached."""
    batches = one_pass(run.data, epoch)
    known = _length(batches)
    length = None if known is None else -(-known // run.accumulate)
    limit = None if run.steps is None else run.steps - before
    run.model.train()
    losses: list[float] = []
    factor = 1.0
    for index, group in enumerate(islice(_grouped(batches, run.accumulate), limit)):
        factor = run.rate(_share(run, epoch, before, index, length))
        losses.append(_step(run, group, factor, before + index + 1))
        if run.on_step is not None:
            share = _share(run, epoch, before, index + 1, length)
            run.on_step(Progress(before + index + 1, epoch, share, losses[-1], run.lr * factor))
    if not losses:
        raise DataError(
            f"pass {epoch} over the training data has no batch; give a re-iterable or a function of the pass."
        )
    return Epoch(len(losses), sum(losses) / len(losses), run.lr * factor)


def _step(run: _Run, batches: list[Any], factor: float, number: int) -> float:
    for group in run.optimizer.param_groups:
        # The key under which PyTorch's schedulers keep it too; it travels with the optimizer's state.
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (factor if group.get("scheduled", True) else 1.0)
    total = _gradients(run, batches, number)
    if run.sam is not None:
        with run.sam.perturbed(run.optimizer), statistics_kept(run.model):
            _gradients(run, batches, number)
    if run.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.clip_norm)
    run.optimizer.step()
    if run.pruner is not None:
        run.pruner.step()
    return total


def _gradients(run: _Run, batches: list[Any], number: int) -> float:
    """The mean loss of the batches; their mean gradient is that of the parameters."""
    run.optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        loss = run.objective(move(batch, device_of(run.model)))
        (loss / len(batches)).backward()
        total += float(loss.detach()) / len(batches)
    if total != total or total in (float("inf"), float("-inf")):
        raise ModelError(f"the loss is {total} at step {number}; lower the learning rate or look at the data.")
    return total


def _share(run: _Run, epoch: int, before: int, index: int, length: int | None) -> float:
    if run.steps is not None:
        return (before + index) / run.steps
    inside = index / length if length else 0.0
    return (epoch + inside) / (run.epochs or 1)


def _grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _optimizer(made: str | MakeOptimizer, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    if callable(made):
        return made(parameters, lr)
    match made:
        case "sgd":
            return SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
        case "adam":
            return Adam(parameters, lr, weight_decay=weight_decay)
        case "adamw":
            return AdamW(parameters, lr, weight_decay=weight_decay)
    raise unknown_name("optimizer", made, ("sgd", "adam", "adamw"))


def _state(run: _Run, history: History) -> dict[str, Any]:
    return {
        "settings": run.settings,
        "history": [asdict(epoch) for epoch in history.epochs],
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "pruner": None if run.pruner is None else run.pruner.state_dict(),
        "shuffle": {k: g.get_state() for k, g in _generators(run.data).items()},
    }


def _resumed(run: _Run, file: Path) -> History:
    state = read_state(file)
    different = [name for name, value in run.settings.items() if state["settings"].get(name) != value]
    if different:
        told = ", ".join(f"{n} {state['settings'].get(n)} there, {run.settings[n]} here" for n in different)
        raise FileError(f"{file} is the checkpoint of another training ({told}); delete it to start again.")
    try:
        run.model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise FileError(f"{file} is the checkpoint of another model ({error}); delete it to start again.") from error
    run.optimizer.load_state_dict(state["optimizer"])
    if run.pruner is not None and state["pruner"] is not None:
        run.pruner.load_state_dict(state["pruner"])
    for key, generator in _generators(run.data).items():
        if key in state["shuffle"]:
            generator.set_state(state["shuffle"][key])
    return History(tuple(Epoch(**epoch) for epoch in state["history"]))


def _generators(data: Data) -> dict[str, torch.Generator]:
    """The generators that a DataLoader was given, which go on from pass to pass."""
    own = {
        "loader": getattr(data, "generator", None),
        "sampler": getattr(getattr(data, "sampler", None), "generator", None),
    }
    return {key: generator for key, generator in own.items() if isinstance(generator, torch.Generator)}


def _check(
    epochs: int | None,
    steps: int | None,
    accumulate: int,
    lr: float,
    label_smoothing: float,
    loss: Loss | None,
    masks: Mapping[str, Tensor] | None,
    pruner: object | None,
) -> None:
    faults = []
    if (epochs is None) == (steps is None):
        faults.append("give either epochs= or steps=")
    faults += [
        f"{n} must be 1 or more, got {v}" for n, v in (("epochs", epochs), ("steps", steps)) if v is not None and v < 1
    ]
    if accumulate < 1:
        faults.append(f"accumulate must be 1 or more, got {accumulate}")
    if not lr > 0:
        faults.append(f"lr must be positive, got {lr}")
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if label_smoothing and loss is not None:
        faults.append("label_smoothing belongs to the default loss; put it into your loss= instead")
    if masks and pruner is not None:
        faults.append("give masks= or pruner=, not both: a pruner keeps its own masks")
    if faults:
        raise OptionError(f"cannot fine-tune: {'; '.join(faults)}.")
