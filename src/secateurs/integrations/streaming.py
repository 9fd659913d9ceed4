"""Checkpoints larger than memory: one block at a time is read from its shards, pruned and written to new ones."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import leaves, split, take
from ..core.budget import Budget
from ..core.comparison import Comparison
from ..core.errors import FileError, MissingExtraError, ModelError
from ..core.folder import write_json
from ..in_layers import LayerSolver, LayerwiseOptions, solved
from ..running import claim
from ..solvers import Gram, blocks_of, layer_of, tensor_of
from ..solvers.layerwise import BlockDone, Gathering, Propagate, layers_by_block, solve_blocks
from ..solvers.ranks import first, wait
from ..to_solve import layers_to_solve
from .footprint import beside, matrices_of
from .shards import Rows, Shards, write_index, write_shard

__all__ = ["Streamed", "prune_checkpoint"]

_PROGRESS = ".progress"
_REPORT = "secateurs.json"
# Files that go with a checkpoint: configs, tokenizers, templates, licences, code.
_SMALL = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken")
# Bytes from which on a tensor has a file of its own, so that copying holds little.
_LARGE = 2**26
# Names of `mallopt` options in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


@dataclass(frozen=True)
class Streamed:
    """What a run over a checkpoint did.

    Args:
        folder: of the new checkpoint.
        errors: per layer ‖WX − W'X‖²/‖WX‖² on the calibration data; 0 where the method does not gather products.
        sparsity: of the layers pruned.
        seconds: of this run.
        predicted_bytes: of memory at the peak, told before it began.
    """

    folder: Path
    errors: Mapping[str, float]
    sparsity: float
    seconds: float
    predicted_bytes: int


@dataclass(frozen=True)
class _Source:
    """A model without its weights, and where they are.

    Args:
        model: parameters on meta, buffers real.
        shards: of its checkpoint.
        names: the checkpoint's name of each tensor that it has, by the model's.
        blocks: names of the blocks.
        dtype: in which is computed; None for that of the checkpoint.
    """

    model: nn.Module
    shards: Shards
    names: Mapping[str, str]
    blocks: Sequence[str]
    dtype: torch.dtype | None

    def inside(self, block: str) -> dict[str, str]:
        """Of the block's tensors, the checkpoint's names by the block's own."""
        prefix = f"{block}."
        return {own.removeprefix(prefix): name for own, name in self.names.items() if own.startswith(prefix)}

    def outside(self) -> dict[str, str]:
        """Of the tensors in no block, the checkpoint's names by the model's."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        return {own: name for own, name in self.names.items() if not own.startswith(prefixes)}

    def needed(self) -> dict[str, str]:
        """Of `outside`, what is run before the last block: all but an output head with weights of its own."""
        tensors = _tensors(self.model)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        given = getattr(self.model, "get_input_embeddings", lambda: None)()
        late = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        late -= {id(p) for p in given.parameters()} if isinstance(given, nn.Module) else set()
        return {own: name for own, name in self.outside().items() if id(tensors[own]) not in late}


def prune_checkpoint(
    folder: str | Path,
    budget: str | Budget,
    out: str | Path,
    options: LayerwiseOptions,
    *,
    data: Iterable[Any],
    scope: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    dtype: torch.dtype | None = None,
    on_block: Callable[[BlockDone], None] | None = None,
    on_memory: Callable[[int], None] | None = None,
    trust_remote_code: bool = False,
) -> Streamed:
    """What was done: the checkpoint in `folder`, with the layers of its blocks pruned, is in `out`.

    In memory are the embeddings, one block, what is gathered of its inputs, and the activations of the calibration
    data. A run that was killed and is started again goes on at the block where it stopped, to the same bits.

    Args:
        folder: of a Hugging Face model in safetensors, in one file or several.
        budget: "sparsity=50%" or "2:4".
        out: a new folder; `from_pretrained` loads it. Zeros are stored as they are, in the checkpoint's own dtype.
        options: of a layer-wise method: `SparseGPT()`, `Wanda()`, `Alps()` …
        data: batches, as {"input_ids": …}.
        scope, ignore: patterns of layer names.
        dtype: in which blocks are computed; default: that of the checkpoint. float32 is slower for narrower ones and
            more exact.
        on_block: told of each block that is done.
        on_memory: told the predicted peak in bytes, before anything is read.
        trust_remote_code: run a model's own Python code.

    Raises:
        FileError: no checkpoint, a damaged one, or `out` holds something else.
        ModelError: the checkpoint's names are not the model's, or what `in_layers.prune_in_layers` raises.
        MissingExtraError: transformers or accelerate is not installed.
    """
    begun, place = perf_counter(), Path(out)
    _hand_back_memory()
    batches, asked, solver = take(data), Budget.parse(budget), options.solver
    source = _opened(Path(folder), dtype, trust_remote_code)
    comparisons = layers_to_solve(source.model, asked, solver.within, scope, ignore, stacks=True)
    layers = layers_by_block(source.model, comparisons)
    _check_out(place, source)
    peak = _predicted(source, layers, solver, batches)
    if on_memory is not None:
        on_memory(peak)
    settings = {
        "budget": str(asked), "method": solver.name, "options": repr(options), "layers": layers, "dtype": str(dtype),
        "source": source.shards.fingerprint(),
    }  # fmt: skip
    if first():
        claim(place / _PROGRESS, settings)
    _load(source.model, source.needed(), source.shards, source.dtype)
    run = _Run(source, place, layers, comparisons, solver, options.propagate)
    gathering = Gathering(full=solver.full, propagate=options.propagate)
    solve_blocks(source.model, batches, layers, run.solve, gathering, note=run.note, hold=run.hold, on_block=on_block)
    _unload(source.model)
    if first():
        run.finish()
    report = {"budget": str(asked), "method": solver.name, "sparsity": run.sparsity, "errors": run.errors}
    if first():
        write_json(place / _REPORT, report)
        shutil.rmtree(place / _PROGRESS)
    wait()
    return Streamed(place, run.errors, run.sparsity, perf_counter() - begun, peak)


class _Run:
    """The state of one run: which blocks are done, and what was found in them."""

    def __init__(
        self,
        source: _Source,
        out: Path,
        layers: Mapping[str, Sequence[str]],
        comparisons: Mapping[str, Comparison],
        solver: LayerSolver,
        propagate: Propagate,
    ) -> None:
        self._source, self._out, self._solver, self._propagate = source, out, solver, propagate
        self._comparisons = comparisons
        self._files = {block: f"model-{place:05}.safetensors" for place, block in enumerate(layers, 1)}
        # Of the layers of the block at hand: relative error, weights that went, and all weights.
        self._here: dict[str, list[float]] = {}
        self._counts: dict[str, list[float]] = {}

    @property
    def errors(self) -> dict[str, float]:
        """Per layer, the relative error."""
        return {layer: counts[0] for layer, counts in self._counts.items()}

    @property
    def sparsity(self) -> float:
        """The share of the weights of the layers pruned that went."""
        return sum(c[1] for c in self._counts.values()) / max(sum(c[2] for c in self._counts.values()), 1)

    def solve(self, name: str, module: nn.Module, gram: Gram) -> tuple[Tensor, float]:
        """The mask and the relative error of the layer, which is solved in place."""
        layer = name if name in self._comparisons else layer_of(name)
        return solved(module, gram, self._comparisons[layer], self._solver, name)

    def note(self, name: str, module: nn.Module, mask: Tensor, error: float) -> None:
        """None; the layer holds what the checkpoint's dtype can hold, and is counted."""
        weight = module.get_parameter("weight")
        # What is saved and what the next block sees are the same numbers, also for a run that resumes.
        weight.copy_(weight.to(self._source.shards.dtype(self._source.names[tensor_of(self._source.model, name)])))
        self._here[name] = [error, float(mask.numel() - int(mask.count_nonzero())), float(mask.numel())]

    @contextmanager
    def hold(self, name: str, block: nn.Module) -> Iterator[bool]:
        """See `solvers.layerwise.Hold`."""
        file, note = self._out / self._files[name], self._out / _PROGRESS / f"{self._files[name]}.json"
        # The note is written after the shard.
        finished = note.is_file()
        names, shards = self._source.inside(name), self._source.shards
        again = finished and self._propagate == "pruned"
        _load(block, names, Shards(self._out, [file.name], shards.stacks) if again else shards, self._source.dtype)
        self._here = json.loads(note.read_text(encoding="utf-8")) if finished else {}
        yield finished
        if not finished and first():
            held, stored = _tensors(block), {}
            for own, full in names.items():
                tensor = held.pop(own).detach()
                stored.update(shards.apart(full, tensor.to(shards.dtype(full))))
                # One tensor at a time is there twice.
                _put(block, own, tensor.to("meta"))
            write_shard(file, stored)
            write_json(note, self._here)
        wait()
        self._counts.update(self._here)
        _unload(block)

    def finish(self) -> None:
        """None; what lies in no block is copied, then the small files, and at last the index."""
        shards = self._source.shards
        where = {
            piece: file
            for block, file in self._files.items()
            for full in self._source.inside(block).values()
            for piece in shards.pieces(full)
        }
        outside = [piece for full in self._source.outside().values() for piece in shards.pieces(full)]
        for number, names in enumerate(_portions(shards, outside), 1):
            file = f"model-rest-{number:05}.safetensors"
            write_shard(self._out / file, {name: shards.read(name) for name in names})
            where.update(dict.fromkeys(names, file))
        for path in sorted(shards.folder.iterdir()):
            if path.is_file() and path.suffix in _SMALL and ".safetensors" not in path.name:
                shutil.copy2(path, self._out / path.name)
        write_index(self._out, where, sum(shards.bytes(name) for name in where))


def _hand_back_memory() -> None:
    """None; where the C library is GNU's, what a large tensor took goes back to the system with it, for good.

    By default the library keeps freed pieces of up to 32 MiB in pools, one for each thread, and over many blocks they
    grow to more than a block. It is asked for this once; other libraries and systems do so by themselves.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 2**20), (_TRIM_THRESHOLD, 2**20), (_ARENA_MAX, 1)):
            mallopt(option, value)


def _opened(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> _Source:
    try:
        accelerate = import_module("accelerate")
        hub = import_module(f"{__package__}.hub")
    except ImportError as error:
        raise MissingExtraError(error.name or "transformers", "language") from error
    shards = Shards(folder)
    with accelerate.init_empty_weights(include_buffers=False):
        model = hub.model_of(str(folder), random_weights=True, trust_remote_code=trust_remote_code).eval()
    blocks = blocks_of(model)
    if blocks == [""]:
        raise ModelError(f"{type(model).__name__} is no list of blocks, so that it cannot be held in parts.")
    names, shards = _names(model, shards)
    missing = [own for own in _tensors(model) if own not in names and own.startswith(tuple(f"{b}." for b in blocks))]
    if missing:
        raise ModelError(
            f"the checkpoint {folder} stores {missing[0]} under another name or form, which loading converts: load it "
            "whole with from_pretrained, and use prune."
        )
    return _Source(model, shards, names, blocks, dtype)


def _names(model: nn.Module, shards: Shards) -> tuple[dict[str, str], Shards]:
    """The checkpoint's name of each of the model's tensors that it has; it may leave out the base model's prefix.

    And the checkpoint with the stacks that it has in pieces, each by the model's name of it.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    forms = {own: (own, own.removeprefix(prefix), f"{prefix}{own}") for own in _tensors(model)}
    found = {own: next((form for form in known if form in shards), None) for own, known in forms.items()}
    names = {own: name for own, name in found.items() if name is not None}
    missing = [own for own in found if own not in names]
    if not missing:
        return names, shards
    changed = _changed(model, shards)
    stacks = {own: place for own, place in changed.items() if own in missing and not isinstance(place, str)}
    names |= {own: own if own in stacks else str(changed[own]) for own in missing if own in changed}
    return names, Shards(shards.folder, stacks=stacks)


def _changed(model: nn.Module, shards: Shards) -> dict[str, str | Rows]:
    """Where the checkpoint has what loading renames or stacks; of nothing where transformers has no such thing."""
    try:
        conversions = import_module(f"{__package__}.conversions")
    except ImportError:
        return {}
    found: dict[str, str | Rows] = conversions.stored_as(model, shards.names)
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a module: parameters and persistent buffers, the objects themselves."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _load(module: nn.Module, names: Mapping[str, str], shards: Shards, dtype: torch.dtype | None) -> None:
    for own, name in names.items():
        tensor = shards.read(name)
        wide = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        _put(module, own, wide)


def _unload(module: nn.Module) -> None:
    for own, tensor in _tensors(module).items():
        if isinstance(tensor, nn.Parameter):
            _put(module, own, torch.empty_like(tensor, device="meta"))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _portions(shards: Shards, names: Iterable[str]) -> Iterator[list[str]]:
    """The tensors a file: large ones alone, small ones together."""
    small: list[str] = []
    for name in names:
        if shards.bytes(name) >= _LARGE:
            yield [name]
        else:
            small.append(name)
    if small:
        yield small


def _predicted(
    source: _Source, layers: Mapping[str, Sequence[str]], solver: LayerSolver, batches: Sequence[Any]
) -> int:
    """Bytes of memory at the peak: embeddings, the largest block, and what stands beside it."""
    outside = sum(_bytes(source, name) for name in source.needed().values())
    matrices = matrices_of(source.model, [layer for inside in layers.values() for layer in inside], batches[0])
    tokens = [next(leaves(split(batch)[0])).numel() for batch in batches]
    itemsize = (source.dtype or torch.float32).itemsize
    peak = 0
    for block, inside in layers.items():
        held = sum(_bytes(source, name) for name in source.inside(block).values())
        here = [matrices[layer] for layer in inside]
        peak = max(peak, held + beside(here, solver, sum(tokens), max(tokens), itemsize))
    return outside + peak


def _bytes(source: _Source, name: str) -> int:
    if source.dtype is None:
        return source.shards.bytes(name)
    return source.shards.entries(name) * source.dtype.itemsize


def _check_out(out: Path, source: _Source) -> None:
    if out.exists() and out.resolve() == source.shards.folder.resolve():
        raise FileError(f"{out} is the checkpoint itself, which is never changed; choose another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / _PROGRESS).is_dir():
        raise FileError(f"{out} holds other files; choose a new folder.")
