"""Seconds and error of our SparseGPT and ALPS on one layer, against the papers' own code and two ports.

Rivals are no dependency. `pip install --target DIR --no-deps llmcompressor==0.14.0.1 loguru onnxsim==0.8.1` and DIR on
PYTHONPATH brings llm-compressor's and onnxsim's SparseGPT; only the files with their solvers are loaded. `--sparsegpt`
and `--alps` name clones of IST-DASLab/sparsegpt and mazumder-lab/ALPS, whose code asks for a GPU: on a machine without
one, what it sends there stays on the CPU. What is not there is left out.

All run in one process, in turn: each round every contestant prunes the same layer once, starting with another one.
`python -m benchmarks.solver_speed [--size 4096] [--rounds 3] [--threads 1 2] [--only sparsegpt]`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, holds, record
from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.solvers import alps, quadratic_error, sparsegpt

HALF, PATTERN = "50%", "2:4"
OURS = "secateurs"
COLUMNS = (
    "solver", "size", "sparsity", "threads", "contestant", "seconds", "CPU seconds", "seconds / secateurs",
    "relative error", "error / secateurs",
)  # fmt: skip
# Columns by which a line is known.
_KEY = 5
# What one input of the layer has in common with the next.
_CORRELATION = 0.9
_TOLERANCE = 1e-3
# A contestant: from the weight, its hessian and the sparsity to the pruned weight.
Prune = Callable[[Tensor, Tensor, str], Tensor]


def layer(size: int) -> tuple[Tensor, Tensor]:
    """A random weight and the Gram matrix of one and a half times as many AR(1) inputs: float32 [size, size] each."""
    torch.manual_seed(0)
    weight, features = torch.randn(size, size), torch.randn(size, size + size // 2)
    for i in range(1, size):
        features[i] = _CORRELATION * features[i - 1] + (1 - _CORRELATION**2) ** 0.5 * features[i]
    return weight, features @ features.T * (2 / features.shape[1])


def comparison(sparsity: str) -> Comparison:
    """What our solvers are told."""
    return Comparison(0.5) if sparsity == HALF else Comparison.of(Pattern(2, 4))


def ours(solve: Callable[..., Any], weight: Tensor, gram: Tensor, sparsity: str) -> Tensor:
    """By our solver."""
    made: Tensor = solve(weight, gram, comparison(sparsity)).weight
    return made


def llm_compressor(module: ModuleType, weight: Tensor, gram: Tensor, sparsity: str) -> Tensor:
    """By llm-compressor, whose hessian is used up."""
    linear, (n, m) = _linear(weight), (0, 0) if sparsity == HALF else (2, 4)
    return module.sparsify_weight(linear, {linear: gram.clone()}, 0.5, n, m, 128, 0.01, False)[1].data


def onnxsim(module: ModuleType, weight: Tensor, gram: Tensor, sparsity: str) -> Tensor:
    """By onnxsim, in NumPy and in float64, as it calls its own function."""
    n, m = (None, None) if sparsity == HALF else (2, 4)
    made = module._sparsegpt_prune_columns(weight.double().numpy(), gram.double().numpy(), 0.5, n, m, 0.01, 128)
    return torch.from_numpy(made).float()


def papers_sparsegpt(module: ModuleType, weight: Tensor, gram: Tensor, sparsity: str) -> Tensor:
    """By the paper's code."""
    linear = _linear(weight)
    solver = module.SparseGPT(linear)
    solver.H = gram.clone()
    with _on_the_cpu(), contextlib.redirect_stdout(io.StringIO()):
        solver.fasterprune(0.5, *((0, 0) if sparsity == HALF else (2, 4)))
    return linear.weight.data


def papers_alps(module: ModuleType, weight: Tensor, gram: Tensor, sparsity: str) -> Tensor:
    """By the paper's code."""
    linear = _linear(weight)
    with _on_the_cpu():
        solver = module.ALPS_prune(linear, 1, 1)
        solver.XtX = gram.clone()
        solver.ALPS_admm(0.5, *((0, 0) if sparsity == HALF else (2, 4)))
    return linear.weight.data


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear.requires_grad_(False)


@contextlib.contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Inside, without a GPU, what is sent to one stays where it is, and nobody waits for it."""
    if torch.cuda.is_available():
        yield
        return
    to = Tensor.to

    def moved(tensor: Tensor, place: Any, *rest: Any, **more: Any) -> Tensor:
        return tensor if str(place).startswith("cuda") else to(tensor, place, *rest, **more)

    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(Tensor, "to", moved),
    ):
        yield


def _file(name: str, path: Path) -> ModuleType:
    """The module in a file, with those beside it in reach."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def contestants(solver: str, asked: argparse.Namespace) -> dict[str, Prune]:
    """By name, those of a solver that are here."""
    if solver == "alps":
        every: dict[str, Prune] = {OURS: partial(ours, alps)}
        if asked.alps:
            every["paper's code"] = partial(papers_alps, _file("papers_alps", asked.alps / "alps.py"))
        return every
    every = {OURS: partial(ours, sparsegpt)}
    found = importlib.util.find_spec("llmcompressor")
    if found is not None and found.submodule_search_locations:
        folder = Path(found.submodule_search_locations[0]) / "modifiers" / "pruning" / "sparsegpt"
        every["llm-compressor"] = partial(llm_compressor, _file("sgpt_sparsify", folder / "sgpt_sparsify.py"))
    if importlib.util.find_spec("onnxsim") is not None:
        every["onnxsim"] = partial(onnxsim, importlib.import_module("onnxsim.pruning"))
    if asked.sparsegpt:
        every["paper's code"] = partial(papers_sparsegpt, _file("papers_sparsegpt", asked.sparsegpt / "sparsegpt.py"))
    return every


def timed(
    every: dict[str, Prune], weight: Tensor, gram: Tensor, sparsity: str, rounds: int
) -> dict[str, tuple[list[float], list[float], float]]:
    """Of each contestant the seconds of every round, those of the processor, and the relative error."""
    whole = quadratic_error(weight, torch.zeros_like(weight), gram)
    found: dict[str, tuple[list[float], list[float], float]] = {name: ([], [], 0.0) for name in every}
    names = list(every)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, busy = perf_counter(), process_time()
            made = every[name](weight, gram, sparsity)
            seconds, cpu = perf_counter() - start, process_time() - busy
            if sparsity == HALF:
                gone = float((made == 0).double().mean())
                assert abs(gone - 0.5) < 1e-3, f"{name} removes {gone}"
            found[name] = (
                [*found[name][0], seconds],
                [*found[name][1], cpu],
                quadratic_error(weight, made, gram) / whole,
            )
    return found


def rows_of(solver: str, size: int, sparsity: str, threads: int, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of one race."""
    seconds, _, least = found[OURS]
    return [
        (
            solver, str(size), sparsity, str(threads), name, f"{median(wall):.2f}", f"{median(cpu):.2f}",
            f"{median(a / b for a, b in zip(wall, seconds, strict=True)):.2f}", f"{error:.5f}", f"{error / least:.4f}",
        )
        for name, (wall, cpu, error) in found.items()
    ]  # fmt: skip


def said(rows: list[tuple[str, ...]]) -> str:
    """What the table shows, against the claim: by the processor's time, which other work hardly changes."""
    of_ours = {row[:4]: float(row[6]) for row in rows if row[4] == OURS}
    parts = []
    for solver, name in dict.fromkeys((row[0], row[4]) for row in rows if row[4] != OURS):
        theirs = [row for row in rows if (row[0], row[4]) == (solver, name)]
        times = [float(row[6]) / max(of_ours[row[:4]], 0.01) for row in theirs]
        errors = [float(row[9]) for row in theirs]
        verdict = holds(min(times) >= 1 and min(errors) >= 1 - _TOLERANCE)
        parts.append(
            f"{solver}: {name} takes {min(times):.1f} to {max(times):.1f} times as much of the processor, at "
            f"{min(errors):.4f} to {max(errors):.4f} times the error ({verdict})"
        )
    return ("; ".join(parts) or "no rival is installed") + "."


def main() -> None:
    """Runs what the command line asks for, and records after each race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns; 4096")
    parser.add_argument("--rounds", type=int, default=3, help="of SparseGPT, after one to warm up on a corner; 3")
    parser.add_argument("--alps-rounds", type=int, default=1, help="1: a round takes minutes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=("sparsegpt", "alps"))
    parser.add_argument("--sparsegpt", type=Path, metavar="PATH", help="a clone of IST-DASLab/sparsegpt")
    parser.add_argument("--alps", type=Path, metavar="PATH", help="a clone of mazumder-lab/ALPS")
    asked = parser.parse_args()
    weight, gram = layer(asked.size)
    rows = _on_file()
    for solver in [asked.only] if asked.only else ["sparsegpt", "alps"]:
        every, rounds = contestants(solver, asked), asked.alps_rounds if solver == "alps" else asked.rounds
        timed(every, weight[:64, :64], gram[:64, :64], HALF, 1)
        for threads in asked.threads:
            torch.set_num_threads(threads)
            for sparsity in (HALF, PATTERN):
                new = rows_of(solver, asked.size, sparsity, threads, timed(every, weight, gram, sparsity, rounds))
                rows.update({row[:_KEY]: row for row in new})
                for row in new:
                    print(*row, sep=" | ", flush=True)
                _write(list(rows.values()), asked)
    _write(list(rows.values()), asked, show=True)


def _on_file() -> dict[tuple[str, ...], tuple[str, ...]]:
    """The lines of earlier runs by their key, so that a run replaces only its own."""
    path = RESULTS / "solver_speed.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"columns": [], "rows": []}
    rows = [tuple(row) for row in known["rows"]] if tuple(known["columns"]) == COLUMNS else []
    return {row[:_KEY]: row for row in rows}


def _write(rows: list[tuple[str, ...]], asked: argparse.Namespace, show: bool = False) -> None:
    record(
        "solver_speed",
        system="sparsegpt",
        claim="SparseGPT and ALPS are at least as fast as the papers' own code and its ports, at an error that is at "
        "most 0.1% higher.",
        held=said(rows),
        columns=COLUMNS,
        rows=rows,
        data="one layer with as many rows as columns, random weights in float32; Gram matrix of one and a half times "
        f"as many AR(1) inputs with correlation {_CORRELATION}",
        seeds=(0,),
        note=f"Medians of {asked.rounds} interleaved rounds (ALPS: {asked.alps_rounds}) in one process; quotients are "
        "medians of those within a round. The machine is shared, so CPU seconds are the steadier figure. The error is "
        "tr((W-W')G(W-W')ᵀ)/tr(WGWᵀ), not damped. Over a matrix, the rivals' SparseGPT removes one weight more in "
        "each 128 columns than was asked for, and masks part ways from there.",
        show=show,
    )


if __name__ == "__main__":
    main()
