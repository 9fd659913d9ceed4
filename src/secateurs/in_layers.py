"""From a model and a budget to zeros, layer by layer: each layer of each block is solved on what it sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .core.batch import Loss, take
from .core.budget import Budget
from .core.comparison import Comparison, Within
from .core.errors import ModelError, OptionError
from .core.plan import pack, unpack
from .core.state import read_state, write_state
from .criteria.face import check_finite
from .graph.plan import digest
from .planning import plan_of_masks, recipe_of
from .pruning import FineTune, Pruned, completed
from .recover.context import seeded
from .running import Clock, Stage, checkpoint_folder, claim
from .solvers import Gram, Solved, from_matrix, layer_of, quadratic_error, tensor_of, to_matrix
from .solvers.layerwise import BlockDone, Gathering, Propagate, layers_by_block, solve_blocks
from .solvers.ranks import first, wait
from .summary import Findings, quality_of
from .to_solve import layers_to_solve, outliers_of_blocks

__all__ = [
    "Inputs",
    "LayerSolver",
    "LayerwiseOptions",
    "Outcome",
    "Subject",
    "Workspace",
    "prune_in_layers",
    "prune_with",
    "solve_layers",
]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of the inputs that a matrix multiplies; each float64.

    Args:
        mean, variance: [columns].
        norm: [columns], the root of the mean square.
        hessian: (2/S)·Σ x·xᵀ [columns, columns]; None unless the solver asks for it. It is symmetric to the bit, and a
            solver that works in its memory leaves it as it was, since other layers may have the same.
    """

    mean: Tensor
    variance: Tensor
    norm: Tensor
    hessian: Tensor | None

    @property
    def known_hessian(self) -> Tensor:
        """The Hessian, of a solver that asked for it."""
        assert self.hessian is not None
        return self.hessian


@dataclass(frozen=True, eq=False)
class Subject:
    """One matrix to be pruned.

    Args:
        weight: [rows, columns].
        inputs: that its columns multiply.
        comparison: how much goes, and what is compared.
        where: name of the layer.
    """

    weight: Tensor
    inputs: Inputs
    comparison: Comparison
    where: str


@dataclass(frozen=True)
class Workspace:
    """Bytes of memory that solving a matrix in float32 takes at the most, beside its weight and its Hessian.

    Args:
        weight: for each of its weights.
        product: for each entry of its Hessian.
        fixed: whatever its size.
    """

    weight: int = 12
    product: int = 0
    fixed: int = 2**25

    def bytes(self, weights: int, columns: int) -> int:
        """Of a matrix with so many of them."""
        return self.weight * weights + self.product * columns**2 + self.fixed


@dataclass(frozen=True)
class LayerSolver:
    """A layer-wise method.

    Args:
        name: for the plan and the report.
        solve: from a matrix to its pruned form.
        full: whether it needs the Hessian of the inputs.
        within: what an unstructured budget compares: all entries of a matrix, or those of a row.
        workspace: what it takes, as measured.
    """

    name: str
    solve: Callable[[Subject], Solved]
    full: bool = False
    within: Within = "matrix"
    workspace: Workspace = Workspace()


@dataclass
class Outcome:
    """What solving found.

    Args:
        masks: bool, per parameter, in its shape.
        errors: per layer ‖WX − W'X‖²/‖WX‖² on the calibration data; of a stack of experts the mean over them.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def prune_in_layers(
    model: nn.Module,
    example_inputs: Any,
    budget: str | Budget,
    solver: LayerSolver,
    *,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    loss: Loss | None = None,
    recover: FineTune | None = None,
    recalibrate: bool = True,
    measure: bool = True,
    sensitivities: Sequence[float] = (),
    budgets: Sequence[str] = (),
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    on_stage: Stage | None = None,
    on_step: Callable[[Any], None] | None = None,
    on_block: Callable[[BlockDone], None] | None = None,
    name: str | None = None,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 0,
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
    propagate: Propagate = "pruned",
    levels: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Pruned:
    """A copy of `model` in which every layer of every block has been solved, reported as `prune` does.

    Args:
        model: any; its blocks are those of `solvers.blocks_of`, and what lies outside them stays as it is.
        budget: a sparsity of the layers' weights, or an N:M pattern.
        solver: what is done to a matrix.
        data: calibration batches, all held at once together with one block's activations.
        sensitivities, budgets: refused, since nothing is scored once from which other decisions could be made.
        checkpoint: a folder that keeps every block that is done.
        on_block: told of each.
        allocation, allocation_options: a density rule of `core.allocate`; uniform is what papers do. "owl" measures the
            outliers of each block on `data`, unless they are given (Yin et al. 2024, arXiv 2310.05175).
        propagate, levels: see `solvers.layerwise.Gathering`.
        settings: the method's own, by which a checkpoint knows its run.
        others: as for `prune`.

    Raises:
        BudgetError: a budget that is neither a sparsity nor a pattern.
        DataError: there is no data.
        ModelError: weights that are not loaded, NaN or infinite weights or activations, or a layer that cannot be
            solved.
        OptionError: an argument outside what is allowed, or a checkpoint of another run.
    """
    if sensitivities or budgets:
        raise OptionError(f"{solver.name} makes one decision: leave out sensitivities= and budgets=.")
    batches = take(data)
    tests = None if test is None else take(test, what="test data")
    _check_loaded(model)
    check_finite(model)
    recipe = recipe_of(
        budget, criterion=solver.name, allocation=allocation, allocation_options=allocation_options,
        granularity="weight", scope=scope, ignore=ignore, seed=seed,
    )  # fmt: skip
    folder = checkpoint_folder(checkpoint)
    if folder is not None and first():
        run = {"recipe": recipe.to_dict(), "model": digest(model), "settings": dict(settings or {})}
        claim(folder, run | {"propagate": propagate, "levels": levels})
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    with clock("planning"):
        shares = dict(allocation_options or {})
        if allocation == "owl" and "outliers" not in shares and recipe.budget.pattern is None:
            shares["outliers"] = outliers_of_blocks(model, recipe.budget.pattern, scope, ignore, batches, seed)
        comparisons = layers_to_solve(
            model, recipe.budget, solver.within, scope, ignore, allocation, shares, stacks=True
        )  # fmt: skip
        made = copy.deepcopy(model)
    gathering = Gathering(full=True, propagate=propagate, levels=levels)
    with clock("solving"), seeded(seed, "solving"):
        outcome = solve_layers(made, batches, comparisons, solver, gathering, folder=folder, on_block=on_block)
    notes.errors = _by_module(made, outcome.errors)
    made.train(model.training)
    if tests is not None:
        with clock("testing"):
            notes.quality["before"] = quality_of(model, tests)
            notes.quality["one-shot"] = quality_of(made, tests)
    plan = plan_of_masks(made, example_inputs, outcome.masks, recipe)
    return completed(
        model, made, plan, outcome.masks, example_inputs, notes, clock, data=batches, tests=tests,
        loss=loss, recover=recover, recalibrate=recalibrate, measure=measure, inplace=inplace, folder=folder,
        on_step=on_step,
    )  # fmt: skip


def _check_loaded(model: nn.Module) -> None:
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ModelError(
            f"{absent!r} is on the meta device and has no values: load the weights first, or prune the checkpoint with "
            "`secateurs stream`."
        )


class LayerwiseOptions(Protocol):
    """Hyperparameters of a layer-wise method, such as `SparseGPT`; those that are not layer-wise have no `solver`."""

    @property
    def solver(self) -> LayerSolver:
        """What is done to a matrix."""

    @property
    def propagate(self) -> Propagate:
        """What the next block sees."""


def prune_with(
    how: LayerwiseOptions, model: nn.Module, example_inputs: Any, budget: str | Budget, **common: Any
) -> Pruned:
    """A copy of `model` in which a published method has solved every layer of every block.

    Args:
        how: its hyperparameters. They, and `levels` among them where they have it, tell a checkpoint its run.
        model, example_inputs: as for `prune`.
        budget: a sparsity of the layers' weights, as "sparsity=50%", or an N:M pattern, as "2:4".
        common: other arguments of `prune_in_layers`.

    Raises:
        BudgetError: a budget that is neither a sparsity nor a pattern.
        DataError: calibration data are missing or empty.
        ModelError: NaN or infinite weights or activations, or a hessian that no damping makes positive definite: the
            message has the layer and its condition.
        OptionError: an argument outside what is allowed, or a checkpoint of another run.
    """
    settings = dict(vars(how))
    own: dict[str, Any] = {"propagate": how.propagate, "levels": settings.get("levels", False), "settings": settings}
    return prune_in_layers(model, example_inputs, budget, how.solver, **own, **common)


def solve_layers(
    model: nn.Module,
    data: Sequence[Any],
    comparisons: Mapping[str, Comparison],
    solver: LayerSolver,
    gathering: Gathering,
    *,
    folder: Path | None = None,
    on_block: Callable[[BlockDone], None] | None = None,
) -> Outcome:
    """What was found in solving the layers of `model`, whose weights are changed in place.

    Args:
        comparisons: per layer what goes.
        folder: where each block that is done is kept, and found again by a run that goes on.
        others: see `solvers.layerwise.solve_blocks`.
    """
    outcome = Outcome()

    def solve(name: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        return solved(module, gram, comparisons[name if name in comparisons else layer_of(name)], solver, name)

    def note(name: str, module: nn.Module, mask: Tensor, error: float) -> None:
        outcome.masks[tensor_of(model, name)] = mask
        outcome.errors[name] = error

    layers = layers_by_block(model, comparisons)
    hold = None if folder is None else _Kept(folder, layers, outcome, gathering.propagate).hold
    solve_blocks(model, data, layers, solve, gathering, note=note, hold=hold, on_block=on_block)
    return outcome


@torch.no_grad()
def solved(
    module: nn.Module, gram: Gram, comparison: Comparison, solver: LayerSolver, where: str
) -> tuple[Tensor, float]:
    """The mask of the weight of `module`, which has been solved in place, and the relative error of its outputs."""
    weight = module.get_parameter("weight").detach()
    parts, masks, wrong, whole = [], [], 0.0, 0.0
    hessians = gram.hessian if gram.full else [None] * len(gram.norm)
    for matrix, mean, variance, norm, hessian in zip(
        to_matrix(module, weight), gram.mean, gram.variance, gram.norm, hessians, strict=True
    ):
        comparison.check(matrix, where)
        found = solver.solve(Subject(matrix, Inputs(mean, variance, norm, hessian), comparison, where))
        parts.append(found.weight)
        masks.append(found.mask)
        if hessian is not None:
            wrong += quadratic_error(matrix, found.weight, hessian)
            whole += quadratic_error(matrix, matrix.new_zeros(()).expand_as(matrix), hessian)
    weight.copy_(from_matrix(module, _stacked(parts), weight.shape))
    return from_matrix(module, _stacked(masks), weight.shape), wrong / whole if whole else 0.0


def _by_module(model: nn.Module, errors: Mapping[str, float]) -> dict[str, float]:
    """The error of each module that was solved; of one that holds stacks the mean of theirs."""
    found: dict[str, list[float]] = {}
    for layer, error in errors.items():
        module = layer.rpartition(".")[0] if tensor_of(model, layer) == layer else layer
        found.setdefault(module, []).append(error)
    return {module: fmean(inside) for module, inside in found.items()}


def _stacked(parts: list[Tensor]) -> Tensor:
    """The matrices of all groups in one tensor; of a single one without a copy."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


class _Kept:
    """Blocks that are done, in a folder: weights, masks and errors, one file each."""

    def __init__(
        self, folder: Path, layers: Mapping[str, Sequence[str]], outcome: Outcome, propagate: Propagate
    ) -> None:
        self._folder, self._layers, self._outcome, self._propagate = folder / "blocks", layers, outcome, propagate
        self._places = {block: place for place, block in enumerate(layers)}

    @contextmanager
    def hold(self, name: str, block: nn.Module) -> Iterator[bool]:
        """See `solvers.layerwise.Hold`."""
        file = self._folder / f"{self._places[name]:04}.safetensors"
        found = read_state(file, "block") if file.exists() else None
        if found is not None and self._propagate == "pruned":
            self._restore(block, name, found)
        yield found is not None
        if found is None:
            if first():
                write_state(file, self._state(block, name), "block")
            wait()
        elif self._propagate == "dense":
            self._restore(block, name, found)

    def _state(self, block: nn.Module, name: str) -> dict[str, Any]:
        done = [layer for layer in self._layers[name] if layer in self._outcome.errors]
        weights = {layer: _inside(block, layer, name) for layer in done}
        return {
            layer: {
                "weight": block.get_parameter(weight).detach(),
                "mask": pack(self._outcome.masks[f"{name}.{weight}".lstrip(".")]),
                "error": self._outcome.errors[layer],
            }
            for layer, weight in weights.items()
        }

    @torch.no_grad()
    def _restore(self, block: nn.Module, name: str, found: Mapping[str, Any]) -> None:
        for layer, state in found.items():
            inside = _inside(block, layer, name)
            weight = block.get_parameter(inside)
            weight.copy_(state["weight"])
            mask = unpack(state["mask"], weight.numel()).view(weight.shape)
            self._outcome.masks[f"{name}.{inside}".lstrip(".")] = mask
            self._outcome.errors[layer] = state["error"]


def _inside(block: nn.Module, layer: str, name: str) -> str:
    """The block's own name of the weight of a layer in it; `name` is the block's."""
    return tensor_of(block, layer.removeprefix(name).lstrip("."))
