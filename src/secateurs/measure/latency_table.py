"""Seconds of the parts of a model at each level of their widths, measured here on parts that are really cut.

A speed-up that parameters or MACs promise is not what a machine gives; so a part, such as an attention or a
feed-forward layer, is timed at every level of a grid (ZipLM, Kurtic, Frantar and Alistarh 2023, arXiv 2302.04089).
Times of parts add up to the time of a model where they run one after the other, as on a CPU or in a stream of a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..core.batch import Call, device_of, leaves, move
from ..core.levels import Table
from ..core.units import ChannelGroup
from ..solvers.blocks import without_cache
from ._run import evaluating, forward
from .latency import compare

__all__ = ["Timer", "homes_of", "latency_table", "medians"]

# From modules and what each is called with, by name, to the seconds of each.
Timer = Callable[[Mapping[str, nn.Module], Mapping[str, Any]], Mapping[str, float]]
_WHOLE = "whole"


def medians(models: Mapping[str, nn.Module], inputs: Mapping[str, Any], *, seconds: float = 0.1) -> dict[str, float]:
    """Median seconds of each model, all measured in turn; see `compare`.

    Args:
        seconds: to spend on each.
    """
    return {name: found.median for name, found in compare(models, inputs, seconds=seconds).items()}


def latency_table(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    counts: Mapping[str, tuple[int, ...]],
    smaller: Callable[[str, int], nn.Module],
    example_inputs: Any,
    *,
    opaque: Collection[str] = (),
    timer: Timer = medians,
) -> Table:
    """The seconds of one forward pass of `model`, and of the module that holds each group at each of its levels.

    A module that is called several times counts as often. Modules alike in class, structure, shapes and inputs share
    their entries: they are measured once. All is measured in one run, in turn, so that drift hits all alike; memory is
    that of all copies of one module for each kind, about ten times the module for ZipLM's grid.

    Args:
        model: left as it was.
        groups: what can go.
        counts: per group its levels, the first its size.
        smaller: from a group's name and a count to a copy of the model in which that group alone is cut to it.
        example_inputs: of the batch size and sequence length that shall be fast.
        opaque: paths of modules that a cut replaces as a whole.
        timer: how long each takes; the names are of no meaning.

    Raises:
        ModelError: the forward pass fails.
    """
    homes = homes_of(model, groups, example_inputs, opaque)
    kinds: dict[Any, list[ChannelGroup]] = {}
    for group in groups:
        kinds.setdefault(_kind(model, group, counts[group.name], *homes[group.name][:2]), []).append(group)
    jobs: dict[str, nn.Module] = {_WHOLE: model}
    inputs: dict[str, Any] = {_WHOLE: example_inputs}
    for number, (leader, *_) in enumerate(kinds.values()):
        path, call, _times = homes[leader.name]
        for count in counts[leader.name]:
            whole = model if count == leader.size else smaller(leader.name, count)
            jobs[f"{number}/{count}"] = whole.get_submodule(path)
            inputs[f"{number}/{count}"] = call
    taken = timer(jobs, inputs)
    entries = {
        group.name: tuple(homes[group.name][2] * taken[f"{number}/{count}"] for count in counts[group.name])
        for number, members in enumerate(kinds.values())
        for group in members
    }
    return Table(taken[_WHOLE], {group.name: counts[group.name] for group in groups}, entries)


def homes_of(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any, opaque: Collection[str] = ()
) -> dict[str, tuple[str, Call, int]]:
    """Per group the path of the smallest module that is called and holds all of it, its first call, and their number.

    Args:
        model, groups, example_inputs, opaque: see `latency_table`.
    """
    wanted = {group.name: list(_ancestors(group.tensors, opaque)) for group in groups}
    calls: dict[str, Call] = {}
    times: Counter[str] = Counter()

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times[path] += 1
        calls.setdefault(path, Call(args, kwargs))

    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        stack.enter_context(torch.no_grad())
        for path in {path for paths in wanted.values() for path in paths}:
            hook = model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        forward(model, move(example_inputs, device))
    found = {name: next(path for path in paths if path in calls) for name, paths in wanted.items()}
    return {name: (path, calls[path], times[path]) for name, path in found.items()}


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
        if not any(path.startswith(f"{block}." if block else ".") or (not block and path) for block in opaque):
            yield path


def _kind(model: nn.Module, group: ChannelGroup, counts: tuple[int, ...], path: str, call: Call) -> Any:
    """What modules have in common that take the same time."""
    module = model.get_submodule(path)
    start = len(path) + 1 if path else 0
    members = tuple((m.tensor[start:], m.axis, m.role) for m in group.members)
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
    given = tuple((tuple(t.shape), t.dtype) for t in leaves((call.args, call.kwargs)))
    return repr(module), shapes, members, group.size, group.kind, counts, given
