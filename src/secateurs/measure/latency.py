"""Seconds that a model takes, with their spread, and two or more models compared in one run.

Timings on a shared machine drift: compare models only through `compare`, which runs them in turn and takes the
quotient of times within each round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ..core.batch import device_of, leaves, move
from ..core.errors import ModelError, OptionError
from ._run import evaluating, forward, watched

__all__ = ["Latency", "Spread", "compare", "latency", "layer_times"]

FEWEST, MOST = 3, 1000


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of repeated measurements."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Args:
        median, p10, p90: in seconds, over the repeats.
        threads: CPU threads within an op.
        device: where the model is, as "cpu" or "cuda:0".
        batch: first size of the first input tensor; 1 where there is none.
        repeats: number of timed runs.
        speedup: in `compare`, how many times faster than the first model, taken within each round; None in `latency`.
    """

    median: float
    p10: float
    p90: float
    threads: int
    device: str
    batch: int
    repeats: int
    speedup: Spread | None = None


def latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    repeats: int | None = None,
    warmup: int = 3,
    seconds: float = 2.0,
) -> Latency:
    """The `Latency` of one forward pass, in evaluation mode and without gradients.

    Args:
        model: left as it was; inputs are moved to its device before the clock starts.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        threads: CPU threads within an op; by default as many as PyTorch uses now. Restored afterwards.
        repeats: timed runs; by default as many as fit into `seconds`, from 3 to 1000.
        warmup: runs before, not timed; fewer (at least one) where they outlast `seconds`.
        seconds: time to spend on timed runs, where `repeats` is not given.

    Raises:
        OptionError: an option that is not positive.
        ModelError: the forward pass fails.
    """
    times = _measure([(model, example_inputs)], threads, repeats, warmup, seconds)
    return _summary(model, example_inputs, times[0], threads)


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    threads: int | None = None,
    repeats: int | None = None,
    warmup: int = 3,
    seconds: float = 2.0,
) -> dict[str, Latency]:
    """The `Latency` of each model by name, measured round robin; `speedup` is against the first.

    Every round runs each model once, starting with another one, so that drift and order hit all alike.

    Args:
        models: name to model; the first is what the others are compared with.
        example_inputs: for all models, or a dict with the names of the models as its keys.
        threads, warmup: as in `latency`.
        repeats: rounds; by default as many as fit.
        seconds: time to spend on timed runs for each model, where `repeats` is not given.

    Raises:
        OptionError: no model, or an option that is not positive.
        ModelError: a forward pass fails.
    """
    if not models:
        raise OptionError("compare needs at least one model, got none.")
    own = isinstance(example_inputs, Mapping) and set(example_inputs) == set(models)
    inputs = [example_inputs[name] if own else example_inputs for name in models]
    times = _measure(list(zip(models.values(), inputs, strict=True)), threads, repeats, warmup, seconds)
    return {
        name: _summary(model, given, taken, threads, times[0])
        for (name, model), given, taken in zip(models.items(), inputs, times, strict=True)
    }


def layer_times(
    model: nn.Module, example_inputs: Any, *, threads: int | None = None, repeats: int = 10, warmup: int = 2
) -> dict[str, float]:
    """Median seconds by qualified name, in forward order, of the modules that call no other module.

    A module called several times in one pass counts the sum of its calls. Hooks and, on accelerators, waiting for
    each layer cost time: the figures tell layers apart and do not add up to `latency`.

    Args:
        model: left as it was.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        threads: as in `latency`.
        repeats: timed runs.
        warmup: runs before, not timed.

    Raises:
        OptionError: an option that is not positive.
        ModelError: the forward pass fails.
    """
    _check(threads, repeats, warmup, 1.0)
    device = _device(model)
    inputs = move(example_inputs, device)
    clock = _LayerClock(device)
    with _steady([model], threads):
        for _ in range(warmup):
            forward(model, inputs)
        with watched(model, clock.enter, clock.leave):
            for _ in range(repeats):
                forward(model, inputs)
                clock.next_run()
    return {name: _spread(runs).median for name, runs in clock.runs.items()}


class _LayerClock:
    """Seconds of each module that calls no other, one figure a run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stack: list[list[Any]] = []  # start, whether a child was called
        self.now: dict[str, float] = {}
        self.runs: dict[str, list[float]] = {}

    def enter(self, name: str, module: nn.Module) -> None:
        if self.stack:
            self.stack[-1][1] = True
        _synchronise(self.device)
        self.stack.append([perf_counter(), False])

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        _synchronise(self.device)
        start, is_parent = self.stack.pop()
        if not is_parent:
            self.now[name] = self.now.get(name, 0.0) + perf_counter() - start

    def next_run(self) -> None:
        for name, taken in self.now.items():
            self.runs.setdefault(name, []).append(taken)
        self.now = {}


def _measure(
    jobs: Sequence[tuple[nn.Module, Any]], threads: int | None, repeats: int | None, warmup: int, seconds: float
) -> list[list[float]]:
    """Seconds of each job in each round."""
    _check(threads, repeats, warmup, seconds)
    ready = [(model, move(inputs, _device(model)), _device(model)) for model, inputs in jobs]
    with _steady([model for model, _ in jobs], threads):
        for job in ready:
            _warm(*job, warmup, seconds)
        return _rounds([partial(_seconds, *job) for job in ready], repeats, seconds * len(jobs))


def _rounds(jobs: Sequence[Callable[[], float]], repeats: int | None, seconds: float) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in jobs]
    end = perf_counter() + seconds
    done = 0
    while done < (repeats or FEWEST) or (repeats is None and done < MOST and perf_counter() < end):
        for turn in range(len(jobs)):
            job = (done + turn) % len(jobs)
            times[job].append(jobs[job]())
        done += 1
    return times


def _warm(model: nn.Module, inputs: Any, device: torch.device, warmup: int, seconds: float) -> None:
    end = perf_counter() + seconds
    for run in range(warmup):
        if run and perf_counter() >= end:
            break
        forward(model, inputs)
    _synchronise(device)


def _seconds(model: nn.Module, inputs: Any, device: torch.device) -> float:
    if device.type == "cuda":
        return _cuda_seconds(model, inputs, device)
    _synchronise(device)
    start = perf_counter()
    forward(model, inputs)
    _synchronise(device)
    return perf_counter() - start


def _cuda_seconds(model: nn.Module, inputs: Any, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        forward(model, inputs)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _device(model: nn.Module) -> torch.device:
    device = device_of(model)
    if device.type == "meta":
        raise ModelError(
            f"{type(model).__name__} is on the meta device, which computes nothing: move it to a real one."
        )
    return device


def _synchronise(device: torch.device) -> None:
    """Waits until the device has done all its work; nothing to wait for on the CPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def _steady(models: Sequence[nn.Module], threads: int | None) -> Iterator[None]:
    """Evaluation mode, no gradients, `threads` threads and no garbage collection; all put back afterwards."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        # Not inference mode: what a model caches in it could never be trained again.
        stack.enter_context(torch.no_grad())
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            gc.collect()
            gc.disable()
            yield
        finally:
            torch.set_num_threads(before)
            if collecting:
                gc.enable()


def _check(threads: int | None, repeats: int | None, warmup: int, seconds: float) -> None:
    for name, value, least in (("threads", threads, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value is not None and value < least:
            raise OptionError(f"{name} must be at least {least}, got {value}.")
    if not seconds > 0:
        raise OptionError(f"seconds must be positive, got {seconds}.")


def _summary(
    model: nn.Module, inputs: Any, times: list[float], threads: int | None, first: list[float] | None = None
) -> Latency:
    spread = _spread(times)
    speedup = None if first is None else _spread([a / max(b, 1e-12) for a, b in zip(first, times, strict=True)])
    return Latency(
        spread.median,
        spread.p10,
        spread.p90,
        threads=threads or torch.get_num_threads(),
        device=str(_device(model)),
        batch=next((t.shape[0] for t in leaves(inputs) if t.dim()), 1),
        repeats=len(times),
        speedup=speedup,
    )


def _spread(values: Sequence[float]) -> Spread:
    """Percentiles with linear interpolation between neighbours."""
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())
