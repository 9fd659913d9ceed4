"""Block after block: what its layers see is gathered, its layers are solved, and the next block is reached.

One driver for all that prunes a transformer layer by layer. Statistics are gathered once a block, or once a level of
it; what the next block sees comes from the block as it was ("dense") or as it is by then ("pruned").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batch import Call, call, leaves, split, take
from ..core.errors import ModelError, OptionError
from ..core.finite import all_finite
from .blocks import block_of, blocks_of, walk
from .gram import Gram, matrix_shape, solvable
from .ranks import add_up, agree, dealt, rank_of, world
from .sequential import call_levels, grams_of
from .stacks import joined, parts_of, stack_at, whole

__all__ = ["BlockDone", "Gathering", "Hold", "Propagate", "layers_by_block", "seen_of", "solve_blocks"]

Propagate = Literal["pruned", "dense"]
# From a layer and what is known of its inputs to its mask and its relative error; the weight is changed in place. Of a
# stack it is called with each part, by the part's name.
SolveLayer = Callable[[str, nn.Module, Gram], tuple[Tensor, float]]
# Told the layer, its mask and its error, before its block is run again; it may still change the weight.
NoteLayer = Callable[[str, nn.Module, Tensor, float], None]
# Brings the tensors of a block into memory and takes them away; gives whether the block was solved in an earlier run.
Hold = Callable[[str, nn.Module], AbstractContextManager[bool]]


@dataclass(frozen=True)
class BlockDone:
    """How far a run is.

    Args:
        name: of the block that is done; "" for a model that is one.
        number: of it, from 1.
        total: blocks in all.
    """

    name: str
    number: int
    total: int

    @property
    def share(self) -> float:
        """Of the blocks, in (0, 1]."""
        return self.number / self.total

    @property
    def detail(self) -> str:
        """In words."""
        return f"block {self.number} of {self.total}"


@dataclass(frozen=True)
class Gathering:
    """What is gathered of the inputs of each layer, and which activations go on to the next block.

    Args:
        full: products of different inputs, too, for solvers that need a Hessian.
        dtype: of the products; see `Gram`.
        propagate: "pruned", what the solved block gives, or "dense", what it gave before.
        levels: gather and solve the layers of a block one level after the other, each on what the solved ones before it
            give ("true sequential"); otherwise all layers of a block see the block as it was.
    """

    full: bool = True
    dtype: torch.dtype = torch.float32
    propagate: Propagate = "pruned"
    levels: bool = False


def layers_by_block(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """For each block of `blocks_of` that has some, in order, those of the modules and stacks `names` that lie in it.

    Raises:
        ModelError: one of them is in no block, or is of no kind whose inputs have a `Gram`.
    """
    blocks = {block: list[str]() for block in blocks_of(model)}
    for name in names:
        if stack_at(model, name) is None and not solvable(model.get_submodule(name)):
            kind = type(model.get_submodule(name)).__name__
            raise ModelError(f"{name} is a {kind}, which is no linear layer or convolution: leave it out with ignore=.")
        home = block_of(name, blocks)
        if home is None:
            raise ModelError(f"{name} lies in none of the blocks of {type(model).__name__}: leave it out with ignore=.")
        blocks[home].append(name)
    return blocks


def seen_of(data: Iterable[Any]) -> list[Tensor | None]:
    """Per batch the bool mask [samples, tokens] of what is no padding, from its "attention_mask"; None without one."""

    def mask(batch: Any) -> Tensor | None:
        inputs = split(batch)[0]
        found = inputs.get("attention_mask") if hasattr(inputs, "get") else None
        return found.bool() if isinstance(found, Tensor) and found.dim() == 2 and not bool(found.all()) else None

    return [mask(batch) for batch in data]


def solve_blocks(
    model: nn.Module,
    data: Sequence[Any],
    layers: Mapping[str, Sequence[str]],
    solve: SolveLayer,
    gathering: Gathering,
    *,
    note: NoteLayer | None = None,
    hold: Hold | None = None,
    on_block: Callable[[BlockDone], None] | None = None,
) -> None:
    """None; `solve(name, module, gram)` has been called once for each layer, and has changed its weight in place.

    A layer that no batch reaches (an expert that no token is routed to) is left as it is, with a warning. Where several
    processes were started, each runs its share of the batches and solves its share of a block's layers (`ranks`). The
    experts of a stack are solved one by one, each on what it is given; the error of a stack is the mean of theirs.

    Args:
        model: a copy that may be changed, the same in every process.
        data: batches as in `core.batch`, the same in every process; "attention_mask" tells padding, which does not
            count.
        layers: names of modules and stacks (see `stacks`) by block, as `layers_by_block` gives them; blocks without
            layers are only run.
        solve: called without gradients.
        note: told what was found, in every process.
        gathering: what of.
        hold: for models larger than memory; default: all is in memory, nothing was solved.
        on_block: told of each block that is done.

    Raises:
        DataError: there is no batch.
        ModelError: a block is never reached, or gives NaN or infinite values.
    """
    if gathering.propagate not in ("pruned", "dense"):
        raise OptionError(f"propagate must be pruned or dense, got {gathering.propagate!r}.")
    data = dealt(take(data))
    seen = seen_of(data)
    model.eval()
    done: list[str] = []
    tasks = (solve, note or (lambda *_: None))

    def visit(name: str, block: nn.Module, calls: list[Call]) -> list[Any]:
        inner = {layer.removeprefix(name).lstrip("."): layer for layer in layers[name]}
        with (hold or _in_memory)(name, block) as finished:
            outputs = _outputs(block, calls) if finished else _solved(block, calls, inner, tasks, gathering, seen)
        _check_outputs(name, outputs)
        done.append(name)
        if on_block is not None:
            on_block(BlockDone(name, len(done), len(layers)))
        return outputs

    walk(model, data, list(layers), visit)


def _solved(
    block: nn.Module,
    calls: list[Call],
    inner: Mapping[str, str],
    tasks: tuple[SolveLayer, NoteLayer],
    gathering: Gathering,
    seen: Sequence[Tensor | None],
) -> list[Any]:
    """The outputs with which the forward passes go on, of a block whose layers have been solved."""
    dense = gathering.propagate == "dense"
    outputs: list[Any] = []
    for number, level in enumerate(call_levels(block, calls, list(inner)) if gathering.levels else [tuple(inner)]):
        want = dense and not number
        grams, made = grams_of(
            block, calls, level, full=gathering.full, dtype=gathering.dtype, seen=seen, outputs=want
        )  # fmt: skip
        outputs = made if want else outputs
        with torch.no_grad():
            _solve_level(block, {name: inner[name] for name in level}, grams, *tasks)
    return outputs if dense and inner else _outputs(block, calls)


def _solve_level(
    block: nn.Module, level: Mapping[str, str], grams: dict[str, Gram], solve: SolveLayer, note: NoteLayer
) -> None:
    """None; each layer is solved by the process whose turn it is, and all of them know what it found."""
    parts = {name: parts_of(block, name) for name in level}
    every = {part: module for inside in parts.values() for part, module in inside.items()}
    for gram, part in {id(gram): (gram, part) for part, gram in grams.items()}.values():
        add_up(gram, matrix_shape(every[part]))
    for name, inside in parts.items():
        _warn_of_unseen(level[name], [grams[part].count for part in inside])
    seen = [part for part in every if grams[part].count]
    full = {part: level[name] + part.removeprefix(name) for name, inside in parts.items() for part in inside}
    found: dict[str, tuple[Tensor, float]] = {}
    for number, part in enumerate(seen):
        gram = grams.pop(part)
        if rank_of(number) == world()[0]:
            found[part] = solve(full[part], every[part], gram)
    for number, part in enumerate(seen):
        weight = every[part].get_parameter("weight")
        mask, error = found.get(part, (torch.empty_like(weight, dtype=torch.bool), 0.0))
        # A byte is what every backend can send.
        bits, errors = mask.to(torch.uint8), torch.tensor([error], dtype=torch.float64)
        agree([weight, bits, errors], rank_of(number))
        found[part] = bits.bool(), float(errors)
    for name, inside in parts.items():
        shares = [found[part][1] for part in inside if part in found]
        if shares:
            # An expert that saw nothing stays.
            masks = [found[p][0] if p in found else _everything(module) for p, module in inside.items()]
            note(level[name], whole(block, name), joined(block, name, masks), fmean(shares))


def _everything(module: nn.Module) -> Tensor:
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool)


def _warn_of_unseen(layer: str, counts: Sequence[int]) -> None:
    """None; says so if a layer, or some experts of a stack, saw nothing; `counts` are the tokens of its parts."""
    missing = [number for number, count in enumerate(counts) if not count]
    if len(missing) == len(counts):
        told = "saw no token of the data" if len(counts) == 1 else "is multiplied in no way that can be followed"
        warnings.warn(f"{layer} {told} and stays as it is.", stacklevel=3)
    elif missing:
        some = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        warnings.warn(
            f"of the {len(counts)} experts in {layer}, {some} saw none of the {sum(counts)} inputs that the data "
            "brings, and stay as they are: give more data.",
            stacklevel=3,
        )


@torch.no_grad()
def _outputs(block: nn.Module, calls: Iterable[Call]) -> list[Any]:
    return [call(block, given) for given in calls]


def _check_outputs(name: str, outputs: Sequence[Any]) -> None:
    for number, output in enumerate(outputs):
        if any(leaf.is_floating_point() and not all_finite(leaf) for leaf in leaves(output)):
            raise ModelError(
                f"{name or 'the model'} gives NaN or infinite values on batch {number}: look at the data, or run the "
                "model in float32 or bfloat16."
            )


def _in_memory(name: str, block: nn.Module) -> AbstractContextManager[bool]:
    return nullcontext(False)
