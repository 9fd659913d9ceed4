"""The levels of every group, each with weights that make up for what went: ZipLM's database, kept on disk.

Of each level only the columns that stay are kept, in the dtype of the model and in a file of its own: for the 43 widths
of ZipLM nine times the consumer's weight, for twelve heads five and a half times, 1.2 GB for BERT-base in float32. They
lie in the system's folder for temporary files (TMPDIR) while the search runs. Memory while they are made: the float64
hessians, and one matrix with its levels, of one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.batch import Call, take
from ...core.errors import ModelError
from ...core.state import read_state, write_state
from ...core.units import ChannelGroup
from ...graph.twin import shared_twin
from ...solvers import (
    Gram,
    Level,
    blocks_of,
    from_matrix,
    grams_of,
    quadratic_error,
    solvable,
    structured_obs,
    to_matrix,
    walk,
)
from ...solvers.layerwise import seen_of

__all__ = ["Consumer", "Database", "Solved", "build", "consumers_of"]

_KIND = "level"


@dataclass(frozen=True, eq=False)
class Consumer:
    """The matrix that alone multiplies the units of a group.

    Args:
        layer: name of its module.
        structures: int64 [units, size], the columns of each unit.
    """

    layer: str
    structures: Tensor


@dataclass(frozen=True, eq=False)
class Solved:
    """What is known of the levels of one group.

    Args:
        errors: per level the prior ‖(W_s - W)·X‖/‖W·X‖.
        order: the units in the order in which they go; those that never go are not in it.
    """

    errors: tuple[float, ...]
    order: tuple[int, ...]


@dataclass(eq=False)
class Database:
    """Weights of levels in a folder, and what is known of them.

    Args:
        folder: has one file for each group and level but the first, which is the model's own weight.
        counts: per group the units kept at each level.
        consumers: per group.
        solved: per group; filled by `build`.
    """

    folder: Path
    counts: Mapping[str, tuple[int, ...]]
    consumers: Mapping[str, Consumer]
    solved: dict[str, Solved] = field(default_factory=dict)

    def ranks(self, group: str) -> Tensor:
        """How late each unit goes, as a share of the group in (0, 1]; 1 for those that never go: float [units]."""
        units = len(self.consumers[group].structures)
        ranks = torch.ones(units)
        for place, unit in enumerate(self.solved[group].order):
            ranks[unit] = (place + 1) / (units + 1)
        return ranks

    def weight(self, model: nn.Module, group: str, count: int) -> Tensor:
        """The consumer's weight at a level, in its shape; exactly zero where units went."""
        module = model.get_submodule(self.consumers[group].layer)
        own = module.get_parameter("weight").detach()
        if count == self.counts[group][0]:
            return own
        kept = read_state(self._file(group, count), _KIND)
        full = torch.zeros_like(to_matrix(module, own))
        full[0, :, kept["columns"].to(own.device)] = kept["weight"].to(own.device)
        return from_matrix(module, full, own.shape)

    def put(self, group: str, module: nn.Module, gram: Gram, damping: float) -> None:
        """None; the levels of a group are solved and kept, from the inputs of its consumer.

        Raises:
            ModelError: as `structured_obs`.
        """
        consumer, counts = self.consumers[group], self.counts[group]
        matrix, hessian = to_matrix(module, module.get_parameter("weight").detach())[0], gram.hessian[0]
        goes = [counts[0] - count for count in counts]
        levels = structured_obs(matrix, hessian, consumer.structures, goes, damping=damping, where=consumer.layer)
        whole = quadratic_error(torch.zeros_like(matrix), matrix, hessian)
        errors = []
        for count, level in zip(counts, levels, strict=True):
            wrong = quadratic_error(matrix, level.weight, hessian)
            errors.append((max(wrong, 0.0) / whole) ** 0.5 if whole > 0 else 0.0)
            if level.removed:
                self._keep(group, count, level)
        self.solved[group] = Solved(tuple(errors), levels[-1].removed)

    def _keep(self, group: str, count: int, level: Level) -> None:
        stays = torch.ones(level.weight.shape[1], dtype=torch.bool)
        stays[self.consumers[group].structures[list(level.removed)].flatten()] = False
        columns = stays.nonzero()[:, 0]
        kept = {"columns": columns, "weight": level.weight[:, columns.to(level.weight.device)].contiguous()}
        write_state(self._file(group, count), kept, _KIND)

    def _file(self, group: str, count: int) -> Path:
        return self.folder / f"{list(self.consumers).index(group):04}-{count:06}.safetensors"


def build(model: nn.Module, database: Database, data: Iterable[Any], *, damping: float = 0.01) -> None:
    """None; the database holds every level, solved on one pass of the data through the unpruned model.

    Args:
        model: left as it was.
        data: calibration batches; "attention_mask" tells padding, which does not count.
        damping: of the hessian; see `solvers.damped`.

    Raises:
        DataError: there is no batch.
        ModelError: a consumer cannot be solved, or is never reached.
    """
    batches = take(data)
    seen = seen_of(batches)
    groups = {consumer.layer: group for group, consumer in database.consumers.items()}
    homes = _homes(blocks_of(model), groups)

    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[Any]:
        inner = {layer.removeprefix(name).lstrip("."): layer for layer in homes[name]}
        grams, outputs = grams_of(block, calls, list(inner), seen=seen, outputs=True)
        for path in list(grams):
            gram = grams.pop(path)
            if not gram.count:
                raise ModelError(
                    f"{inner[path]} saw no token of the calibration data: give more, or leave it out with ignore=."
                )
            database.put(groups[inner[path]], block.get_submodule(path), gram, damping)
        return outputs

    walk(shared_twin(model), batches, list(homes), visit)


def _homes(blocks: Sequence[str], layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers by block; of blocks without any only those before the last that has some."""
    homes = {block: [layer for layer in layers if not block or layer.startswith(f"{block}.")] for block in blocks}
    last = max(number for number, found in enumerate(homes.values()) if found)
    return dict(list(homes.items())[: last + 1])


def consumers_of(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Consumer]:
    """Per group the one matrix that multiplies its units; groups that several layers read have none.

    Raises:
        ModelError: no group has one, or two groups share a tensor, so that neither has costs and errors of its own.
    """
    found = {group.name: consumer for group in groups if (consumer := _consumer(model, group)) is not None}
    if not found:
        names = ", ".join(group.name for group in groups[:3])
        raise ModelError(f"the units of {names} are read by several layers, or by one that is no matrix of its own.")
    for one, other in combinations([group for group in groups if group.name in found], 2):
        shared = sorted(set(one.tensors) & set(other.tensors))
        if shared:
            raise ModelError(
                f"{one.name} and {other.name} share {shared[0]}, so that neither has a cost of its own: leave one of "
                "them out with ignore=."
            )
    return found


def _consumer(model: nn.Module, group: ChannelGroup) -> Consumer | None:
    reading = [member for member in group.members if member.role == "in"]
    if len(reading) != 1 or reading[0].tensor.rpartition(".")[2] != "weight":
        return None
    layer = reading[0].tensor.rpartition(".")[0]
    module = model.get_submodule(layer)
    if not solvable(module):
        return None
    weight = module.get_parameter("weight")
    units = group.units_along(reading[0]).view([-1 if axis == reading[0].axis else 1 for axis in range(weight.dim())])
    matrices = to_matrix(module, units.expand(weight.shape))
    shared = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1
    if len(matrices) > 1 or shared:
        return None
    of_column = matrices[0, 0]
    columns = [(of_column == unit).nonzero()[:, 0] for unit in range(group.size)]
    return Consumer(layer, torch.stack(columns)) if len({len(c) for c in columns}) == 1 else None
