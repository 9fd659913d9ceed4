"""Seconds from a model to the model cut at half its units, against Torch-Pruning and torch-kirigami.

The rivals are no dependency: `pip install --no-deps torch-pruning==1.6.1 torch-kirigami==0.2.1`; what is not installed
is left out. All run in one process on one thread, in turn: each round every contestant cuts a fresh copy of the same
model once, starting with another one, and quotients are taken within a round. `python -m benchmarks.speed [MODEL…]`; a
run of some models replaces only their rows.

Memory is measured in a process of its own: the peak of what is resident while `plan` and `cut` run, less what was
resident before, as a multiple of the model's tensors. Linux counts and resets that peak (`/proc/self/clear_refs`); a
small model is cut first, so that code loaded on the way does not count. The cut model itself does count.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from benchmarks.architectures import TimeUp, error_text, limited, rows_on_file
from benchmarks.record import holds, record
from benchmarks.rivals import hints_of, kirigami, torch_pruning
from secateurs import plan
from secateurs.graph.cut import cut
from secateurs.graph.plan import ModelPlan
from secateurs.measure.params import bytes_in_memory
from tests.support.torchvision_shim import declare_missing_ops

ROUNDS, LIMIT = 5, 60
MODELS = {
    "ResNet-50": "resnet50",
    "ResNet-152": "resnet152",
    "DenseNet-121": "densenet121",
    "ConvNeXt-T": "convnext_tiny",
    "ViT-B/16": "vit_b_16",
    "Swin-T": "timm/swin_tiny_patch4_window7_224",
}
OURS, PROVEN = "secateurs", "with proof"
TORCH_PRUNING, KIRIGAMI = "Torch-Pruning", "torch-kirigami"
COLUMNS = (
    "model", OURS, PROVEN, TORCH_PRUNING, KIRIGAMI, f"{TORCH_PRUNING} / secateurs", f"{TORCH_PRUNING} / with proof",
    f"{KIRIGAMI} / secateurs", "extra memory / model",
)  # fmt: skip
NONE = "–"

Seconds = dict[str, list[float]]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of `MODELS` with random weights, and one picture."""
    torch.manual_seed(0)
    source = MODELS[name]
    if source.startswith("timm/"):
        import timm

        model = timm.create_model(source.removeprefix("timm/"))
    else:
        import torchvision

        model = torchvision.models.get_model(source, weights=None)
    return model.eval(), torch.randn(1, 3, 224, 224)


def planned(model: nn.Module, picture: torch.Tensor) -> ModelPlan:
    """Traced, grouped, scored and decided."""
    return plan(model, picture, "sparsity=50%", granularity="channel", allocation="uniform")


def ours(model: nn.Module, picture: torch.Tensor) -> nn.Module:
    """The cut model without its proof."""
    made = planned(model, picture)
    assert made.structure is not None
    return cut(model, made.structure, made.keep)


def proven(model: nn.Module, picture: torch.Tensor) -> nn.Module:
    """The cut model, proven."""
    return planned(model, picture).cut(model)


def contestants(model: nn.Module, picture: torch.Tensor) -> dict[str, Callable[[nn.Module], object]]:
    """By column, what each does to a copy of the model. Hints are looked up here, outside the clock, by path."""
    hints = hints_of(model, picture)
    paths = {id(m): path for path, m in model.named_modules()}

    def hinted(fresh: nn.Module) -> None:
        own = {paths[id(m)]: n for m, n in hints.heads.items()}
        outputs = tuple(fresh.get_submodule(paths[id(m)]) for m in hints.outputs)
        heads = {fresh.get_submodule(path): n for path, n in own.items()}
        torch_pruning(fresh, picture, type(hints)(outputs, heads))

    every: dict[str, Callable[[nn.Module], object]] = {
        OURS: lambda fresh: ours(fresh, picture),
        PROVEN: lambda fresh: proven(fresh, picture),
    }
    if find_spec("torch_pruning"):
        every[TORCH_PRUNING] = hinted
    if find_spec("torch_kirigami"):
        every[KIRIGAMI] = lambda fresh: kirigami(fresh, picture)
    return every


def timed(model: nn.Module, every: dict[str, Callable[[nn.Module], object]]) -> tuple[Seconds, dict[str, str]]:
    """Seconds of each contestant in each round, and why the others were given up; the first round only warms up."""
    times: Seconds = {name: [] for name in every}
    failed: dict[str, str] = {}
    for turn in range(ROUNDS + 1):
        names = list(every)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            found = _seconds(every[name], copy.deepcopy(model))
            if isinstance(found, str):
                failed[name] = found
            elif turn:
                times[name].append(found)
    return times, failed


def _seconds(work: Callable[[nn.Module], object], fresh: nn.Module) -> float | str:
    """Seconds of one run, or why it has none."""
    gc.collect()
    gc.disable()
    try:
        with limited(LIMIT):
            start = perf_counter()
            work(fresh)
            return perf_counter() - start
    except TimeUp:
        return f"more than {LIMIT} s"
    except Exception as error:  # noqa: BLE001  (whatever it is, the table says it)
        return error_text(error)
    finally:
        gc.enable()


def row(name: str) -> tuple[str, ...]:
    """One line of the table."""
    model, picture = build(name)
    times, failed = timed(model, contestants(model, picture))

    def shown(column: str) -> str:
        if column in failed:
            return failed[column]
        return f"{median(times[column]):.2f}" if times.get(column) else NONE

    def quotient(other: str, mine: str) -> str:
        if other in failed or not times.get(other):
            return NONE
        return f"{median(a / b for a, b in zip(times[other], times[mine], strict=True)):.2f}"

    return (
        name,
        *(shown(column) for column in (OURS, PROVEN, TORCH_PRUNING, KIRIGAMI)),
        quotient(TORCH_PRUNING, OURS),
        quotient(TORCH_PRUNING, PROVEN),
        quotient(KIRIGAMI, OURS),
        f"{_memory_apart(name):.2f}",
    )


def _memory_apart(name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.speed", "--memory", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def extra_memory(name: str) -> float:
    """Peak of resident memory above the beginning while the model is planned and cut, as a multiple of the model."""
    warm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    small = torch.randn(1, 3, 8, 8)
    warm(small)
    ours(warm, small)
    model, picture = build(name)
    gc.collect()
    # What the allocator holds in reserve would hide the first allocations.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    ours(model, picture)
    return (_status("VmHWM") - before) / bytes_in_memory(model)


def _status(field: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _median_of(rows: Sequence[tuple[str, ...]], column: str) -> float | None:
    at = COLUMNS.index(column)
    figures = [float(line[at]) for line in rows if line[at] != NONE]
    return median(figures) if figures else None


def _said(rows: Sequence[tuple[str, ...]]) -> str:
    """What the table shows, against the claim."""
    times = _median_of(rows, f"{TORCH_PRUNING} / secateurs")
    both = _median_of(rows, f"{TORCH_PRUNING} / with proof")
    other = _median_of(rows, f"{KIRIGAMI} / secateurs")
    most = max(float(line[-1]) for line in rows)
    figures = [] if times is None else [f"{times:.1f} times faster than {TORCH_PRUNING}, median ({holds(times >= 5)})"]
    if both is not None:
        figures.append(f"{both:.1f} times with the proof")
    if other is not None:
        figures.append(f"{other:.1f} times faster than {KIRIGAMI} where that ends")
    figures.append(f"at most {most:.2f} times the model in extra memory ({holds(most <= 1.5)})")
    return f"Over {len(rows)} models: " + "; ".join(figures) + "."


def run(names: Sequence[str]) -> None:
    """Times the named models, or all, and records after each."""
    rows = rows_on_file("speed", COLUMNS)
    chosen = names or list(MODELS)
    for name in chosen:
        rows[name] = row(name)
        print(*rows[name], sep=" | ", flush=True)
        done = [rows[n] for n in MODELS if n in rows]
        record(
            "speed",
            system="core",
            claim="Tracing, grouping and one magnitude prune at half of all widths is at least 5 times faster than "
            "Torch-Pruning 1.6.1 (median), with at most 1.5 times the model's memory beside it.",
            held=_said(done),
            columns=COLUMNS,
            rows=done,
            data="random weights, one picture of 224×224; Swin-T is timm's, since Torch-Pruning does not end on "
            "torchvision's",
            seeds=(0,),
            note=f"Seconds, median of {ROUNDS} interleaved rounds after one to warm up; quotients are medians of those "
            "within a round. Torch-Pruning 1.6.1 is given head counts and the output layer, torch-kirigami 0.2.1 half "
            f"of each width; limit {LIMIT} s.",
            show=name == chosen[-1],
        )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--memory", action="store_true", help="print the extra memory of one model and nothing else")
    asked = parser.parse_args()
    for name in asked.names:
        if name not in MODELS:
            parser.error(f"{name} is none of {', '.join(MODELS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    declare_missing_ops()
    if asked.memory:
        print(extra_memory(asked.names[0]))
    else:
        run(asked.names)


if __name__ == "__main__":
    main()
