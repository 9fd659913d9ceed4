"""How many of the same models other structured pruners cut: Torch-Pruning and torch-kirigami.

They are no dependency: `pip install --no-deps torch-pruning==1.6.1 torch-kirigami==0.2.1`, and what is not installed is
left out. `python -m benchmarks.rivals COLLECTION [NAME…]` runs torchvision (one model a family) or huggingface; a run
of some models replaces only their rows. Each attempt has a process of its own and 30 s of the processor (`--limit`),
since some never end. The verdict is that of `benchmarks.architectures`, but for the proof, which only secateurs has.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import multiprocessing
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from benchmarks.architectures import (
    COVERED,
    Entry,
    entries,
    error_text,
    named,
    rows_on_file,
    shapes,
    training_trouble,
    verdict,
)
from benchmarks.record import record
from secateurs.core.batch import call
from secateurs.graph.run import output_tensors
from secateurs.measure.params import parameters
from tests.support.torchvision_shim import declare_missing_ops

__all__ = ["Hints", "hints_of", "kirigami", "torch_pruning"]

MEMORY = 16 * 2**30
# One of each family of torchvision.
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg16_bn", "vit_b_16",
    "wide_resnet50_2", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18", "mvit_v2_s",
    "s3d", "swin3d_t",
)  # fmt: skip

Attempt = Callable[[nn.Module, Any], None]


@dataclass(frozen=True)
class Hints:
    """What a diligent user tells Torch-Pruning about a model.

    Args:
        outputs: layers whose outputs are the model's and must stay.
        heads: the number of heads in each projection of attention.
    """

    outputs: tuple[nn.Module, ...]
    heads: Mapping[nn.Module, int]


def hints_of(model: nn.Module, inputs: Any) -> Hints:
    """The hints that can be read off any model: its output layer, and head counts that attention modules hold."""
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and _PROJECTION.fullmatch(name):
            count = _head_count(model.get_submodule(parent), name)
            if count and module.out_features % count == 0:
                heads[module] = count
    return Hints(_output_layers(model, inputs), heads)


_PROJECTION = re.compile(r"(q|k|v|qkv|query|key|value|query_key_value|wqkv)(_?(proj|lin))?", re.IGNORECASE)
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads")
_SIZES = ("head_dim", "attention_head_size", "head_size")
_WIDTHS = ("all_head_size", "embed_dim", "inner_dim")


def _head_count(attention: nn.Module, name: str) -> int:
    config = getattr(attention, "config", None)
    names = (*_SHARED_COUNTS, *_COUNTS) if name[0] in "kKvV" else _COUNTS
    held = (getattr(holder, n, None) for n in names for holder in (attention, config))
    return next((count for count in held if type(count) is int), 0)


def _output_layers(model: nn.Module, inputs: Any) -> tuple[nn.Module, ...]:
    """The last linear layer or convolution that is as wide as an output."""
    with torch.no_grad():
        widths = {n for t in output_tensors(call(model, inputs)) for n in t.shape[1:]}
    fitting = [m for m in model.modules() if getattr(m, "out_features", getattr(m, "out_channels", None)) in widths]
    return tuple(fitting[-1:])


def torch_pruning(model: nn.Module, inputs: Any, hints: Hints, whole_heads: bool = True) -> None:
    """Cuts half of every width of `model`, in place, and sets the head counts of attention as its authors advise.

    Args:
        whole_heads: half of the heads go; otherwise half of each head.
    """
    import torch_pruning as tp

    heads = dict(hints.heads)
    # All dicts are given: the defaults are shared by all pruners and keep what was written into them.
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=list(hints.outputs), num_heads=heads, prune_num_heads=whole_heads,
        prune_head_dims=not whole_heads, head_pruning_ratio=0.5 if whole_heads else 0.0, in_channel_groups={},
        out_channel_groups={}, channel_groups={}, output_transform=_with_gradients,
    )  # fmt: skip
    pruner.step()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in heads:
            parent, _, name = path.rpartition(".")
            _mend(model.get_submodule(parent), name, heads[module], module.out_features)


def _with_gradients(output: Any) -> list[torch.Tensor]:
    """What a trace back from the output starts at; not the caches of attention, on which it would stop."""
    return [t for t in output_tensors(output) if t.requires_grad]


def _mend(attention: nn.Module, name: str, heads: int, width: int) -> None:
    size = width // heads // (3 if "qkv" in name.lower() or name == "query_key_value" else 1)
    counts = _SHARED_COUNTS if name[0] in "kKvV" else _COUNTS
    wanted = dict.fromkeys(counts, heads) | dict.fromkeys(_SIZES, size)
    if name[0] not in "kKvV":
        wanted |= dict.fromkeys(_WIDTHS, heads * size)
    for attribute, value in wanted.items():
        if type(getattr(attention, attribute, None)) is int:
            setattr(attention, attribute, value)


class _ByPosition(nn.Module):
    """A model called with keywords, as one called by position: symbolic tracing stops at `**kwargs`."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, first: Any, second: Any = None) -> Any:
        """The model's output for one or two inputs."""
        return self.model(**dict(zip(self.names, (first, second), strict=False)))


def kirigami(model: nn.Module, inputs: Any, share: float | None = 0.5) -> None:
    """Cuts `share` of every width of `model`, in place; with None, a quarter of its parameters from wherever."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, ParameterBudget, Pruner

    if isinstance(inputs, Mapping):
        model, inputs = _ByPosition(model, tuple(inputs)), tuple(inputs.values())
    placed = inputs if isinstance(inputs, tuple) else (inputs,)
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=placed))
    budget = ParameterBudget(max_params=parameters(model) * 3 // 4) if share is None else ChannelRatio(share)
    pruner.prune(pruner.discover_candidates(), budget=budget, strategy=Greedy(GroupMagnitude(p=1)))


def _without_heads(model: nn.Module, inputs: Any) -> None:
    torch_pruning(model, inputs, Hints(hints_of(model, inputs).outputs, {}))


def _with_heads(model: nn.Module, inputs: Any) -> None:
    torch_pruning(model, inputs, hints_of(model, inputs))


def _with_head_sizes(model: nn.Module, inputs: Any) -> None:
    torch_pruning(model, inputs, hints_of(model, inputs), whole_heads=False)


def _kirigami_by_parameters(model: nn.Module, inputs: Any) -> None:
    kirigami(model, inputs, None)


# By column: the package, and the ways that are tried until one covers the model.
WAYS: dict[str, tuple[str, tuple[Attempt, ...]]] = {
    "Torch-Pruning": ("torch_pruning", (_without_heads,)),
    "Torch-Pruning, head counts given": ("torch_pruning", (_with_heads, _with_head_sizes)),
    "torch-kirigami": ("torch_kirigami", (kirigami, _kirigami_by_parameters)),
}


def attempted(attempt: Attempt, entry: Entry) -> str:
    """The verdict on one attempt at one model, made in this process."""
    torch.manual_seed(0)
    model, inputs = entry.make()
    original = copy.deepcopy(model)
    try:
        attempt(model, inputs)
    except Exception as error:  # noqa: BLE001  (whatever it is, the table says it)
        return error_text(error)
    try:
        same = shapes(original, inputs) == shapes(model, inputs)
    except Exception as error:  # noqa: BLE001  (whatever it is, the table says it)
        return f"does not run after the cut: {error_text(error)}"
    trouble = training_trouble(model, inputs)
    if trouble and training_trouble(original, inputs):
        trouble = ""
    return verdict(1 - parameters(model) / parameters(original), same, trouble)


def _child(attempt: Attempt, entry: Entry, limit: int, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Time of the processor, which is as long on a busy machine; should this process outlive its parent, it still ends.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, 2 * limit))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        answer.send(attempted(attempt, entry))


def apart(attempt: Attempt, entry: Entry, limit: int) -> str:
    """`attempted` in a process of its own, ended after `limit` seconds of the processor, or ten times as many."""
    processes = multiprocessing.get_context("fork")
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_child, args=(attempt, entry, limit, theirs))
    child.start()
    theirs.close()
    try:
        return str(ours.recv()) if ours.poll(10 * limit) else f"takes more than {limit} s"
    except EOFError:
        child.join()
        return f"takes more than {limit} s" if child.exitcode == -signal.SIGXCPU else "ended its process"
    finally:
        child.kill()
        child.join()
        ours.close()


def cell(column: str, entry: Entry, limit: int) -> str:
    """The verdict of the first way that covers the model, else of the last; none is tried after one that never ends."""
    found = ""
    for attempt in WAYS[column][1]:
        found = apart(attempt, entry, limit)
        if found == COVERED or found.startswith("takes"):
            break
    return found


def run(collection: str, names: Sequence[str], limit: int) -> None:
    """Runs a collection, or those of its models that are named, and records after each.

    Raises:
        SystemExit: a name matches no model, or no rival is installed.
    """
    every = [e for e in entries(collection) if collection != "torchvision" or e.name in FAMILIES]
    chosen = named(every, names)
    installed = [c for c in WAYS if find_spec(WAYS[c][0])]
    if not installed:
        raise SystemExit("no rival is installed; see the module's docstring.")
    rows = rows_on_file(f"rivals_{collection}", ("model", *WAYS))
    for entry in chosen:
        known = dict(zip(WAYS, rows.get(entry.name, ("",))[1:], strict=False))
        known |= {column: cell(column, entry, limit) for column in installed}
        rows[entry.name] = (entry.name, *(known.get(column, "not tried") for column in WAYS))
        print(*rows[entry.name], sep=" | ", flush=True)
        _save(collection, [rows[e.name] for e in every if e.name in rows], limit, show=entry is chosen[-1])


def _save(collection: str, rows: Sequence[tuple[str, ...]], limit: int, show: bool) -> None:
    covered = {column: sum(r[i] == COVERED for r in rows) for i, column in enumerate(WAYS, 1)}
    record(
        f"rivals_{collection}",
        system="core",
        claim="Other structured pruners on the same models, half of every width.",
        held=f"Of {len(rows)} models, covered: " + ", ".join(f"{column} {n}" for column, n in covered.items()) + ".",
        columns=("model", *WAYS),
        rows=rows,
        data="random weights, inputs as in the table of architectures",
        seeds=(0,),
        note="Torch-Pruning 1.6.1 is always told which layer gives the output; where head counts are given, they are "
        "also set anew in the attention modules after the cut, and where halving the heads fails, halving each head is "
        "tried. torch-kirigami 0.2.1 is asked for half of each width, and where that fails, for three quarters of the "
        f"parameters. {limit} s of the processor and {MEMORY >> 30} GiB a try.",
        command=f"python -m benchmarks.rivals {collection}",
        show=show,
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collection", choices=("torchvision", "huggingface"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; default: all")
    parser.add_argument("--limit", type=int, default=30, metavar="SECONDS", help="a try; default 30")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    declare_missing_ops()
    # Imported once here, so that the processes of the attempts need not.
    for package in ("torchvision", "transformers", *dict(WAYS.values())):
        if find_spec(package):
            __import__(package)
    run(asked.collection, asked.names, asked.limit)


if __name__ == "__main__":
    main()
