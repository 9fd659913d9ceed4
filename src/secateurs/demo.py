"""The demonstration: a network that reads handwritten digits, pruned to half its MACs and to nine zeros of ten weights.

Everything is real and everything is measured here: scikit-learn's scans of digits, a residual network trained on three
quarters of them, and accuracy on the last quarter, which no decision sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import MissingExtraError, ProofError
from .core.folder import write_json
from .deploy.onnx import export_onnx
from .pruning import FineTune, Pruned, load, prune
from .recover.context import seeded
from .recover.finetune import fine_tune
from .report.data import Side

__all__ = ["Demonstration", "Digits", "DigitsNet", "Outcome", "digits", "run", "train"]

Tell = Callable[[str], None]
Batch = tuple[Tensor, Tensor]

_BUDGETS = {"half": "macs<=50%", "sparse": "sparsity=90%"}
# Kept widths are multiples of eight, as processors like them; weights are divided by layer shapes (Erdős–Rényi kernel).
_OPTIONS: dict[str, dict[str, Any]] = {
    "half": {"round_to": 8, "sensitivities": (0.25, 0.5, 0.75), "budgets": ("macs<=75%", "macs<=25%")},
    "sparse": {"granularity": "weight", "allocation": "erk"},
}


class _Block(nn.Module):
    """Two 3×3 convolutions with batch norm around which the signal may pass."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for pictures [n, 1, 8, 8]: three stages of one block each, then a linear layer.

    Args:
        widths: channels of each stage.
        classes: number of outputs.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.Sequential(
            _Block(widths[0], widths[0], 1), _Block(widths[0], widths[1], 2), _Block(widths[1], widths[2], 2)
        )
        self.head = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """Pictures and what they show.

    Args:
        train, test: pictures float32 [n, 1, 8, 8] with values in [0, 1], and their digits int64 [n].
    """

    train: Batch
    test: Batch

    @property
    def examples(self) -> Tensor:
        """128 training pictures, on which cuts are proven and models are timed."""
        return self.train[0][:128]

    def batches(self, size: int = 64) -> list[Batch]:
        """The training pictures in a fixed order, without the last incomplete batch."""
        x, y = self.train
        return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x) - size + 1, size)]

    def shuffled(self, _epoch: int) -> list[Batch]:
        """The training pictures in an order drawn from PyTorch's random state, which training sets for each pass."""
        order = torch.randperm(len(self.train[0]))
        return Digits((self.train[0][order], self.train[1][order]), self.test).batches()


def digits(seed: int = 0) -> Digits:
    """The 1,797 scans of handwritten digits that come with scikit-learn, split three to one with equal classes.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo") from error
    pictures, labels = load_digits(return_X_y=True)
    x = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    kept, held = train_test_split(range(len(y)), test_size=0.25, stratify=labels, random_state=seed)
    return Digits((x[kept], y[kept]), (x[held], y[held]))


def train(data: Digits, *, seed: int = 0, epochs: int = 10, on_step: Callable[[Any], None] | None = None) -> DigitsNet:
    """A `DigitsNet` trained on `data` with SGD and a cosine schedule."""
    with seeded(seed, "weights"):
        model = DigitsNet()
    fine_tune(model, data.shuffled, epochs=epochs, lr=0.05, weight_decay=5e-4, seed=seed, on_step=on_step)
    return model.eval()


@dataclass(frozen=True)
class Outcome:
    """A model on one side of a pruning, measured.

    Args:
        name: "dense", "half" or "sparse".
        budget: what was asked; empty for the dense model.
        accuracy: share of the test pictures read correctly.
        macs: of one forward pass of 128 pictures.
        params, nonzero: entries, and those that are not zero.
        disk_bytes: of the saved weights.
        speedup: how many times faster than the dense model, from runs side by side; None for the dense model.
    """

    name: str
    budget: str
    accuracy: float
    macs: float
    params: int
    nonzero: int
    disk_bytes: int
    speedup: float | None = None


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration found.

    Args:
        outcomes: the dense model and the two pruned ones.
        headlines: of their reports, by name.
        proof: largest relative difference between the outputs of the cut and the masked model.
        files: what was written, by what it is.
        notes: what could not be shown here, and why.
        seconds: taken in all.
    """

    outcomes: tuple[Outcome, ...]
    headlines: Mapping[str, str]
    proof: float
    files: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain JSON values."""
        return asdict(self)


def run(
    out: str | Path,
    *,
    seed: int = 0,
    epochs: int = 10,
    tell: Tell | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Demonstration:
    """What came of it: a network trained, pruned twice, repaired, proven, saved, loaded, exported and measured.

    Args:
        out: a folder; what an earlier demonstration left there is replaced.
        seed: of the split, the weights and the order of training.
        epochs: of the training; the repairs take half as many.
        tell: told what begins.
        on_step: called after every training step.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ProofError: what was loaded is not what was saved, or the cut is not equal to the zeros.
        FileError: `out` holds other files under the names used here.
    """
    start = perf_counter()
    say = tell or (lambda _text: None)
    place = Path(out)
    data = digits(seed)
    say("training a residual network on handwritten digits")
    model = train(data, seed=seed, epochs=epochs, on_step=on_step)
    pruned = {name: _pruned(name, model, data, seed, epochs, say, on_step) for name in _BUDGETS}
    files: dict[str, str] = {}
    for name, made in pruned.items():
        say(f"{name}: saving, loading and comparing bit by bit")
        made.save(place / name)
        files |= {name: str(place / name), f"{name}, report": str(place / name / "report.html")}
        _refuse_changes(made.model, load(place / name).model)
    say("half: exporting to ONNX and running it with onnxruntime")
    notes = []
    try:
        files["half, ONNX"] = str(export_onnx(pruned["half"].model, data.examples, place / "half.onnx"))
    except MissingExtraError as missing:
        notes.append(f"no ONNX file was made: {missing}")
    found = Demonstration(
        outcomes=_outcomes(pruned),
        headlines={name: made.report.headline() for name, made in pruned.items()},
        proof=pruned["half"].report.proof or 0.0,
        files={**files, "figures": str(place / "demo.json")},
        notes=tuple(notes),
        seconds=perf_counter() - start,
    )
    write_json(place / "demo.json", found.to_dict())
    return found


def _pruned(
    name: str, model: nn.Module, data: Digits, seed: int, epochs: int, say: Tell, on_step: Callable[[Any], None] | None
) -> Pruned:
    """The model pruned to one of the budgets and repaired; the test pictures choose nothing."""
    return prune(
        model,
        data.examples,
        _BUDGETS[name],
        data=data.batches(),
        test=[data.test],
        recover=FineTune(epochs=max(epochs // 2, 1), lr=0.02, data=data.shuffled),
        on_stage=lambda stage: say(f"{name} ({_BUDGETS[name]}): {stage}"),
        on_step=on_step,
        name="DigitsNet",
        seed=seed,
        **_OPTIONS[name],
    )


def _refuse_changes(saved: nn.Module, loaded: nn.Module) -> None:
    theirs = loaded.state_dict()
    for name, tensor in saved.state_dict().items():
        if not torch.equal(tensor, theirs[name]):
            raise ProofError(f"{name} comes back from the disk changed: do not use the saved model.")


def _outcomes(pruned: Mapping[str, Pruned]) -> tuple[Outcome, ...]:
    reports = {name: made.report for name, made in pruned.items()}
    dense = _outcome("dense", "", reports["half"].before, None)
    return dense, *(
        _outcome(name, report.budget, report.after, report.speedup.median if report.speedup else None)
        for name, report in reports.items()
    )


def _outcome(name: str, budget: str, side: Side, speedup: float | None) -> Outcome:
    return Outcome(
        name=name,
        budget=budget,
        accuracy=side.quality["accuracy"],
        macs=side.macs or 0.0,
        params=side.params,
        nonzero=side.nonzero or 0,
        disk_bytes=side.disk_bytes or 0,
        speedup=speedup,
    )
