"""From a model and a budget to zeros, layer by layer: each layer of each block is solved on what it sees."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .core.allocate import densities
from .core.batch import Loss, take
from .core.budget import Budget, Pattern
from .core.comparison import Comparison, Within
from .core.errors import BudgetError, ModelError, OptionError
from .core.plan import pack, unpack
from .core.state import read_state, write_state
from .criteria.face import check_finite
from .criteria.outliers import outlier_shares
from .graph.plan import digest
from .planning import plan_of_masks, recipe_of
from .pruning import FineTune, Pruned, completed
from .recover.context import seeded
from .running import Clock, Stage, claim
from .solvers import Gram, Solved, block_of, blocks_of, from_matrix, quadratic_error, solvable, to_matrix, weight_of
from .solvers.layerwise import BlockDone, Gathering, Propagate, layers_by_block, solve_blocks
from .solvers.ranks import first, wait
from .summary import Findings, quality_of
from .train.scope import divided_weights, inputs_first, prunable_weights

__all__ = [
    "Inputs",
    "LayerSolver",
    "LayerwiseOptions",
    "Outcome",
    "Subject",
    "layers_to_solve",
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
        hessian: (2/S)·Σ x·xᵀ [columns, columns]; None unless the solver asks for it.
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
class LayerSolver:
    """A layer-wise method.

    Args:
        name: for the plan and the report.
        solve: from a matrix to its pruned form.
        full: whether it needs the Hessian of the inputs.
        within: what an unstructured budget compares: all entries of a matrix, or those of a row.
    """

    name: str
    solve: Callable[[Subject], Solved]
    full: bool = False
    within: Within = "matrix"


@dataclass
class Outcome:
    """What solving found.

    Args:
        masks: bool, per parameter, in its shape.
        errors: per layer ‖WX − W'X‖²/‖WX‖² on the calibration data.
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
        ModelError: NaN or infinite weights or activations, or a layer that cannot be solved.
        OptionError: an argument outside what is allowed, or a checkpoint of another run.
    """
    if sensitivities or budgets:
        raise OptionError(f"{solver.name} makes one decision: leave out sensitivities= and budgets=.")
    batches = take(data)
    tests = None if test is None else take(test, what="test data")
    check_finite(model)
    recipe = recipe_of(
        budget, criterion=solver.name, allocation=allocation, allocation_options=allocation_options,
        granularity="weight", scope=scope, ignore=ignore, seed=seed,
    )  # fmt: skip
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and first():
        run = {"recipe": recipe.to_dict(), "model": digest(model), "settings": dict(settings or {})}
        claim(folder, run | {"propagate": propagate, "levels": levels})
    notes = Findings(model=name or type(model).__name__)
    clock = Clock(notes.seconds, on_stage)
    with clock("planning"):
        shares = dict(allocation_options or {})
        if allocation == "owl" and "outliers" not in shares:
            shares["outliers"] = _outliers(model, recipe.budget.pattern, scope, ignore, batches, seed)
        comparisons = layers_to_solve(model, recipe.budget, solver.within, scope, ignore, allocation, shares)
        made = copy.deepcopy(model)
    gathering = Gathering(full=True, propagate=propagate, levels=levels)
    with clock("solving"), seeded(seed, "solving"):
        outcome = solve_layers(made, batches, comparisons, solver, gathering, folder=folder, on_block=on_block)
    notes.errors = outcome.errors
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


def layers_to_solve(
    model: nn.Module,
    budget: Budget,
    within: Within,
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
) -> dict[str, Comparison]:
    """Per layer in a block, by module name, what goes of it.

    Raises:
        BudgetError: the budget is neither one sparsity nor a pattern.
        ModelError: no block has a layer that can be solved.
        OptionError: a pattern matches nothing, or does not divide a layer that `scope` names.
    """
    pattern, limit = budget.pattern, budget.limit("sparsity")
    if pattern is None and (limit is None or len(budget.limits) > 1):
        raise BudgetError(f"what is solved layer by layer needs a budget such as sparsity=50% or 2:4, got {budget}.")
    inside = _names_to_solve(model, pattern, scope, ignore)
    _warn_of_stacks(model)
    if pattern is not None:
        return dict.fromkeys(inside, Comparison.of(pattern))
    assert limit is not None
    shapes = {name: tuple(model.get_submodule(name).get_parameter("weight").shape) for name in inside}
    kept = densities(allocation, shapes, 1 - limit.value, **(allocation_options or {}))
    # Through the text, since 1 − 0.6 is not 0.4.
    return {name: Comparison(round(1 - density, 12), within) for name, density in kept.items()}


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
        return solved(module, gram, comparisons[name], solver, name)

    def note(name: str, module: nn.Module, mask: Tensor, error: float) -> None:
        outcome.masks[weight_of(name)] = mask
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
            whole += quadratic_error(matrix, torch.zeros_like(matrix), hessian)
    weight.copy_(from_matrix(module, _stacked(parts), weight.shape))
    return from_matrix(module, _stacked(masks), weight.shape), wrong / whole if whole else 0.0


def _stacked(parts: list[Tensor]) -> Tensor:
    """The matrices of all groups in one tensor; of a single one without a copy."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _warn_of_stacks(model: nn.Module) -> None:
    """None; says so where experts are stacked in tensors that no layer multiplies by, so that they stay dense."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and id(p) not in convolutions]
    blocks = blocks_of(model)
    inside = [name for name in stacks if block_of(name, blocks)]
    if inside:
        warnings.warn(
            f"what is stacked in {inside[0]} (and {len(inside) - 1} more) stays dense: experts in one tensor are no "
            "layers; granularity='expert' removes whole ones.",
            stacklevel=3,
        )


def _outliers(
    model: nn.Module,
    pattern: Pattern | None,
    scope: str | Sequence[str] | None,
    ignore: str | Sequence[str],
    data: Sequence[Any],
    seed: int,
) -> dict[str, float]:
    """Per layer the share of outliers in its block."""
    blocks = layers_by_block(model, _names_to_solve(model, pattern, scope, ignore))
    weights = {block: [weight_of(layer) for layer in inside] for block, inside in blocks.items() if inside}
    found = outlier_shares(model, weights, data, seed=seed)
    return {layer: found[block] for block, inside in blocks.items() for layer in inside}


def _names_to_solve(
    model: nn.Module, pattern: Pattern | None, scope: str | Sequence[str] | None, ignore: str | Sequence[str]
) -> list[str]:
    """The modules in blocks that can be solved and have a weight in scope, whose inputs the pattern divides."""
    weights = prunable_weights(model, scope, ignore)
    if pattern is not None:
        turned = inputs_first(model, weights)
        weights = divided_weights(weights, pattern.of, str(pattern), all_of_them=scope is not None, turned=turned)
    blocks = blocks_of(model)
    # Of an attention of PyTorch's own, the weights of its inputs are no module's.
    modules = [name.rpartition(".")[0] for name in weights if name.rpartition(".")[2] == "weight"]
    inside = [n for n in modules if solvable(model.get_submodule(n)) and block_of(n, blocks) is not None]
    if not inside:
        raise ModelError(f"no block of {type(model).__name__} has a layer to solve: look at scope= and ignore=.")
    return inside


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
        return {
            layer: {
                "weight": block.get_parameter(_inside(layer, name)).detach(),
                "mask": pack(self._outcome.masks[weight_of(layer)]),
                "error": self._outcome.errors[layer],
            }
            for layer in done
        }

    @torch.no_grad()
    def _restore(self, block: nn.Module, name: str, found: Mapping[str, Any]) -> None:
        for layer, state in found.items():
            weight = block.get_parameter(_inside(layer, name))
            weight.copy_(state["weight"])
            mask = unpack(state["mask"], weight.numel()).view(weight.shape)
            self._outcome.masks[weight_of(layer)] = mask
            self._outcome.errors[layer] = state["error"]


def _inside(layer: str, block: str) -> str:
    return weight_of(layer.removeprefix(block).lstrip("."))
