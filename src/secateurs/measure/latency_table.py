"""Seconds of a model at each level of the widths of its parts, measured here on models that are really cut.

A speed-up that parameters or MACs promise is not what a machine gives; so attention and feed-forward layers are timed
at every level of a grid (ZipLM, Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089). Parts are timed where they work,
in the model: one by itself, with caches and memory to itself, takes another time than among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from torch import nn

from ..core.batch import Call, device_of, leaves, move
from ..core.levels import Table
from ..core.units import ChannelGroup
from ..solvers.blocks import without_cache
from ._run import evaluating, forward
from .latency import compare

__all__ = ["Timer", "homes_of", "latency_table", "side_by_side"]

# From a model, a smaller one and the inputs of both to the seconds of each.
Timer = Callable[[nn.Module, nn.Module, Any], tuple[float, float]]


def side_by_side(whole: nn.Module, smaller: nn.Module, inputs: Any, *, seconds: float = 0.3) -> tuple[float, float]:
    """Median seconds of both models, run in turn; those of the second from the quotient within each round.

    Args:
        seconds: to spend on each.
    """
    found = compare({"whole": whole, "smaller": smaller}, inputs, seconds=seconds)
    speedup = found["smaller"].speedup
    assert speedup is not None
    return found["whole"].median, found["whole"].median / speedup.median


def latency_table(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    counts: Mapping[str, tuple[int, ...]],
    smaller: Callable[[Mapping[str, int]], nn.Module],
    example_inputs: Any,
    *,
    opaque: Collection[str] = (),
    timer: Timer = side_by_side,
) -> Table:
    """The seconds of one forward pass of `model`, and what each group adds to them at each of its levels.

    Groups whose modules are alike in class, structure, shapes and inputs are measured together, once: all of them are
    cut to a level, and each has an equal share in what that saves. Every level is measured against the whole model, run
    in turn with it, so that drift hits both alike; memory is that of these two.

    Args:
        model: left as it was.
        groups: what can go.
        counts: per group its levels, the first its size.
        smaller: from kept counts of some groups to a copy of the model that is cut to them.
        example_inputs: of the batch size and sequence length that shall be fast.
        opaque: paths of modules that a cut replaces as a whole.
        timer: how long a model and a smaller one take.

    Raises:
        ModelError: the forward pass fails.
    """
    homes = homes_of(model, groups, example_inputs, opaque)
    kinds: dict[Any, list[str]] = {}
    for group in groups:
        kinds.setdefault(_kind(model, group, counts[group.name], *homes[group.name]), []).append(group.name)
    taken: dict[tuple[str, int], float] = {}
    wholes: list[float] = []
    for names in kinds.values():
        for count in counts[names[0]][1:]:
            before, after = timer(model, smaller(dict.fromkeys(names, count)), example_inputs)
            wholes.append(before)
            taken |= {(name, count): (after / before - 1) / len(names) for name in names}
    whole = median(wholes) if wholes else timer(model, model, example_inputs)[0]
    entries = {name: tuple(whole * taken.get((name, n), 0.0) for n in levels) for name, levels in counts.items()}
    return Table(whole, counts, entries)


def homes_of(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any, opaque: Collection[str] = ()
) -> dict[str, tuple[str, Call]]:
    """Per group the path of the smallest module that is called and holds all of it, and its first call.

    Args:
        model, groups, example_inputs, opaque: see `latency_table`.
    """
    wanted = {group.name: list(_ancestors(group.tensors, opaque)) for group in groups}
    calls: dict[str, Call] = {}

    def note(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, Call(args, kwargs))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        stack.enter_context(torch.no_grad())
        for path in {path for paths in wanted.values() for path in paths}:
            handle = model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
            stack.callback(handle.remove)
        forward(model, move(example_inputs, device_of(model)))
    found = {name: next(path for path in paths if path in calls) for name, paths in wanted.items()}
    return {name: (path, calls[path]) for name, path in found.items()}


def _ancestors(tensors: Sequence[str], opaque: Collection[str]) -> Iterator[str]:
    """The modules that hold all of the tensors, the smallest first; none that lies within an opaque one."""
    paths = [tensor.split(".")[:-1] for tensor in tensors]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    for length in range(len(common), -1, -1):
        path = ".".join(common[:length])
        if not any(path != block and (not block or path.startswith(f"{block}.")) for block in opaque):
            yield path


def _kind(model: nn.Module, group: ChannelGroup, counts: tuple[int, ...], path: str, call: Call) -> Any:
    """What modules have in common that take the same time."""
    module = model.get_submodule(path)
    start = len(path) + 1 if path else 0
    members = tuple((m.tensor[start:], m.axis, m.role) for m in group.members)
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
    given = tuple((tuple(t.shape), t.dtype) for t in leaves((call.args, call.kwargs)))
    return repr(module), shapes, members, group.size, group.kind, counts, given
