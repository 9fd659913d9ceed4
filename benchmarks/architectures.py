"""Coverage without hints: what comes of a model that is cut at half its units, given nothing but an example input.

`python -m benchmarks.architectures COLLECTION [NAME…]` runs one collection (torchvision, timm or huggingface) or some
of its models; without a collection, all three. Each row is recorded as soon as it is known, so a run that is stopped
keeps what it has, and a run of some models replaces only their rows. `… smallest [MODULE…]` looks again for the
smallest model of each timm module, without building any on a real device.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES, Case
from benchmarks.record import RESULTS, holds, record
from secateurs import prune
from secateurs.core.batch import call
from secateurs.graph.run import output_tensors
from secateurs.graph.structure import Frozen
from secateurs.measure.params import parameters
from tests.support.torchvision_shim import declare_missing_ops

__all__ = [
    "COLLECTIONS", "COLUMNS", "COVERED", "SKIPPED", "Entry", "TimeUp", "doubled", "entries", "error_text", "limited",
    "named", "rows_on_file", "shapes", "training_trouble", "verdict",
]  # fmt: skip

LIMIT, LARGEST, LEAST = 180, 700_000_000, 0.2
COVERED, SKIPPED = "covered", "skipped"
SMALLEST = Path(__file__).with_name("timm_smallest.json")
COLUMNS = (
    "model", "parameters", "groups", "recorded", "stay", "commonest reasons", "seconds", "gone", "proof",
    "same shapes", "trains", "verdict",
)  # fmt: skip
_SECONDS = COLUMNS.index("seconds")


class TimeUp(BaseException):
    """The time limit; no `Exception`, so that nothing under test takes it for an error of the model."""


@dataclass(frozen=True)
class Entry:
    """A model of a collection.

    Args:
        name: in the table.
        make: builds it with random weights, and its example inputs.
        parameters: where known before it is built.
    """

    name: str
    make: Case
    parameters: int = 0


@dataclass(frozen=True)
class Collection:
    """Models that are judged together.

    Args:
        title: in sentences.
        goal: the share of them to be covered.
        data: what they are and what they run on.
    """

    title: str
    goal: float
    data: str


COLLECTIONS = {
    "torchvision": Collection(
        "torchvision's classifiers, segmenters, video and optical-flow models",
        1.0,
        "all but detection and quantized models; random weights; pictures of 224×224 (Inception 299×299), clips of "
        "16 frames of 112×112 (MViT and S3D 224×224), RAFT pairs of 128×128",
    ),
    "timm": Collection(
        "the smallest model of each timm module", 0.95, "random weights; one picture of the model's default size"
    ),
    "huggingface": Collection(
        "the Hugging Face families", 0.97, "small models built from their configs (`benchmarks/families.py`)"
    ),
}


def entries(collection: str) -> list[Entry]:
    """The models of a collection, in the order of its table."""
    if collection == "huggingface":
        return [Entry(name, make) for name, make in FAMILIES.items()]
    return _torchvision_entries() if collection == "torchvision" else _timm_entries()


def _torchvision_entries() -> list[Entry]:
    from torchvision import models

    found = []
    for module in (models, models.segmentation, models.video, models.optical_flow):
        for name in models.list_models(module):
            known = models.get_model_weights(name).DEFAULT.meta["num_params"]
            found.append(Entry(name, partial(_torchvision_case, name), known))
    return found


def _torchvision_case(name: str) -> tuple[nn.Module, Any]:
    from torchvision import models

    options = {"weights_backbone": None} if name in models.list_models(models.segmentation) else {}
    model = models.get_model(name, weights=None, **options).eval()
    if name in models.list_models(models.optical_flow):
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if name in models.list_models(models.video):
        pixels = 224 if name.startswith(("mvit", "s3d")) else 112
        return model, torch.randn(1, 3, 16, pixels, pixels)
    pixels = 299 if name.startswith("inception") else 224
    return model, torch.randn(1, 3, pixels, pixels)


def _timm_entries() -> list[Entry]:
    known = json.loads(SMALLEST.read_text(encoding="utf-8"))
    return [
        Entry(f"{module}: {found['model']}", partial(_timm_case, found["model"]), found["parameters"])
        for module, found in known.items()
    ]


def _timm_case(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name).eval()
    return model, torch.randn(1, *model.default_cfg["input_size"])


def find_smallest(modules: Sequence[str]) -> None:
    """Writes the smallest model of each timm module, or of `modules`, with its parameters; ties go to the first."""
    import timm

    found = json.loads(SMALLEST.read_text(encoding="utf-8")) if modules and SMALLEST.exists() else {}
    for module in modules or timm.list_modules():
        sizes = {name: _size_on_meta(name) for name in timm.list_models(module=module)}
        name = min(sizes, key=sizes.__getitem__)
        found[module] = {"model": name, "parameters": sizes[name]}
        print(f"{module}: {name}, {_millions(sizes[name])}", flush=True)
    SMALLEST.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


def _size_on_meta(name: str) -> int:
    import timm

    with torch.device("meta"):
        return parameters(timm.create_model(name))


def row(entry: Entry) -> tuple[str, ...]:
    """One line of the table; what was found before a failure stands in it."""
    found = {"model": entry.name}
    try:
        with limited(LIMIT):
            found["verdict"] = _examined(entry, found)
    except TimeUp:
        found["verdict"] = f"takes more than {LIMIT} s"
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the table's subject)
        found["verdict"] = error_text(error)
    gc.collect()
    return tuple(found.get(column, "") for column in COLUMNS)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises `TimeUp` in the body after so many seconds of wall time."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _examined(entry: Entry, found: dict[str, str]) -> str:
    """The verdict; the other columns go into `found` as they become known."""
    if entry.parameters > LARGEST:
        found["parameters"] = _millions(entry.parameters)
        return f"{SKIPPED}: more than {_millions(LARGEST)} parameters"
    torch.manual_seed(0)
    model, inputs = entry.make()
    before = parameters(model)
    found["parameters"] = _millions(before)
    start = perf_counter()
    cut = prune(model, inputs, budget="sparsity=50%", granularity="channel", allocation="uniform", measure=False)
    found["seconds"] = f"{perf_counter() - start:.1f}"
    structure = cut.plan.structure
    assert structure is not None
    gone = 1 - parameters(cut.model) / before
    found |= {
        "groups": str(len(cut.plan.groups)),
        "recorded": str(len(structure.recorded)),
        "stay": str(len(structure.frozen)),
        "commonest reasons": commonest(structure.frozen),
        "gone": f"{gone:.0%}",
        "proof": f"{cut.report.proof:.0e}",
    }
    same = shapes(model, inputs) == shapes(cut.model, inputs)
    trouble = training_trouble(cut.model, inputs)
    blamed = bool(trouble) and not training_trouble(model, inputs)
    found |= {"same shapes": _yes(same), "trains": _yes(not trouble) if blamed or not trouble else "not before either"}
    return verdict(gone, same, trouble if blamed else "")


def verdict(gone: float, same: bool, trouble: str) -> str:
    """`COVERED`, or what is missing, in words.

    Args:
        gone: the share of parameters that went.
        same: whether the outputs have the shapes they had.
        trouble: why it does not train any more; empty if it does.
    """
    if not same:
        return "outputs of another shape"
    if trouble:
        return f"does not train after the cut: {trouble}"
    return COVERED if gone >= LEAST else f"only {gone:.1%} of the parameters gone"


def shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    """The shapes of all output tensors in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [tuple(t.shape) for t in output_tensors(call(model.eval(), inputs))]


def training_trouble(model: nn.Module, inputs: Any) -> str:
    """Why a step of training on a batch of two fails; empty if it does not. Leaves the model in training mode."""
    torch.manual_seed(0)
    try:
        outputs = [t for t in output_tensors(call(model.train(), doubled(inputs))) if t.requires_grad]
        if not outputs:
            return "no output has a gradient"
        torch.stack([t.abs().float().square().mean() for t in outputs]).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return "" if all(bool(g.isfinite().all()) for g in grads) else "a gradient is not finite"
    except Exception as error:  # noqa: BLE001  (whatever it is, it is what was asked)
        return error_text(error)
    finally:
        model.zero_grad(set_to_none=True)


def doubled(inputs: Any) -> Any:
    """Example inputs in which what was a batch of one is a batch of two: batch norm does not train on one row."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, inputs]) if inputs.dim() and len(inputs) == 1 else inputs
    if isinstance(inputs, tuple):
        return tuple(doubled(v) for v in inputs)
    return {k: doubled(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs


def commonest(frozen: Sequence[Frozen], most: int = 3) -> str:
    """The commonest reasons why widths stay, with their number; without the places, in which they differ."""
    counts = Counter(_without_place(f.reason) for f in frozen)
    return "; ".join(f"{n}× {reason}" for reason, n in counts.most_common(most))


def _without_place(reason: str) -> str:
    text = re.sub(r" in (the model|[\w.]+)$", "", _first_line(reason))
    return re.sub(r"\b[A-Za-z_]\w*(\.\w+)+", "…", text)


def error_text(error: BaseException) -> str:
    """The kind of an error and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {_first_line(str(error))}"


def _first_line(text: str, longest: int = 160) -> str:
    line = " ".join(text.strip().splitlines()[:1])
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count < 1e8 else f"{count / 1e6:.0f}M"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def rows_on_file(name: str, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The rows of a recorded table by their first column; none where nothing, or another table, was recorded."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"columns": [], "rows": []}
    return {line[0]: tuple(line) for line in content["rows"]} if content["columns"] == list(columns) else {}


def named(every: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """Those of `every` that `names` match, all without names; of a timm model, its module is a name too.

    Raises:
        SystemExit: a name matches none.
    """
    own = {name for entry in every for name in (entry.name, *entry.name.split(": "))}
    if missing := [name for name in names if name not in own]:
        raise SystemExit(f"no model of this collection is called {' or '.join(missing)}.")
    return [e for e in every if not names or {e.name, *e.name.split(": ")} & set(names)]


def run(collection: str, names: Sequence[str]) -> None:
    """Runs a collection, or those of its models that `names` match, and records after each.

    Raises:
        SystemExit: a name matches no model.
    """
    every = entries(collection)
    order = [entry.name for entry in every]
    chosen = named(every, names)
    rows = rows_on_file(f"architectures_{collection}", COLUMNS)
    for entry in chosen:
        rows[entry.name] = row(entry)
        print(f"{entry.name}: {rows[entry.name][-1]} ({rows[entry.name][_SECONDS] or '–'} s)", flush=True)
        _save(collection, [rows[name] for name in order if name in rows], len(order), show=entry is chosen[-1])


def _save(collection: str, rows: Sequence[tuple[str, ...]], every: int, show: bool) -> None:
    """Records `rows` of a collection of `every` models."""
    about = COLLECTIONS[collection]
    tried = [line for line in rows if not line[-1].startswith(SKIPPED)]
    covered = sum(line[-1] == COVERED for line in tried)
    skipped = f"; {len(rows) - len(tried)} skipped for their size" if len(tried) < len(rows) else ""
    waiting = f"; {every - len(rows)} not run yet" if len(rows) < every else ""
    reached = "no verdict yet" if waiting else holds(covered >= about.goal * len(tried))
    wanted = "all" if about.goal == 1 else f"at least {about.goal:.0%}"
    record(
        f"architectures_{collection}",
        system="core",
        claim=f"Without hints, half the units of {wanted} of {about.title} can be cut.",
        held=f"Covered {covered} of {len(tried)}{skipped}{waiting} ({reached}).",
        columns=COLUMNS,
        rows=rows,
        data=about.data,
        seeds=(0,),
        note=f"Covered: cut, proven equal to the masked model, outputs of the same shapes, at least {LEAST:.0%} of the "
        "parameters gone, and a training step on a batch of two works. Recorded: modules in whose Python code a size "
        "stands, replaced by a recording of it. Stay: widths that cannot go. Seconds: the whole of `prune`, proof and "
        f"report included, without measuring latency. Limit {LIMIT} s a model.",
        command=f"python -m benchmarks.architectures {collection}",
        show=show,
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", nargs="?", choices=(*COLLECTIONS, "smallest"), help="default: all three")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models, or timm modules; default: all")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    declare_missing_ops()
    if asked.collection == "smallest":
        find_smallest(asked.names)
        return
    for collection in [asked.collection] if asked.collection else COLLECTIONS:
        run(collection, asked.names)


if __name__ == "__main__":
    main()
