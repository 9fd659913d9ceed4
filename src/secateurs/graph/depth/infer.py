"""Which whole layers of a model can go, found from runs of it on the example inputs.

A unit is a module of an `nn.ModuleList` or `nn.Sequential` through which a residual stream goes (see `stream`). Before
it is offered, the model is run without it: nothing else may run than before, and nobody may look at what the block
returns beside the stream. What counts or numbers the blocks follows; where values can be computed, a model without
some of the blocks must agree with one in which they pass their input on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...core.batch import call, device_of
from ...core.cost import CostModel, Monomial
from ...core.depth import LayerGroup
from ...core.dims import Atom
from ...core.errors import ModelError, ProofError
from ..cut import prove
from ..run import Executing, output_tensors, place, running
from ..structure import Frozen, fingerprint
from ..twin import meta_twin, named_tensors, shared_twin
from .counted import config_edits, counting_attributes, numbering, without_chance
from .layers import Edits, LayerStructure, drop, original_paths, pass_on
from .stream import Block, Streams

__all__ = ["infer_layers"]

_Shape = tuple[int, ...]
_PLACE = "removing it differs from passing its input on: the code depends on its place"
_USED = "what it returns beside its first tensor is used"


def infer_layers(model: nn.Module, example_inputs: Any, macs: Mapping[str, float]) -> LayerStructure:
    """Which whole layers of `model` can go; the model is not changed.

    Of blocks within blocks the outer ones are units where all blocks of their container are, as in a transformer whose
    blocks are lists of sublayers; else the inner ones, as in a network of stages.

    Args:
        model: any module whose forward runs on the example inputs.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        macs: by module, as `measure.macs_by_module` counts them on these inputs.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    held = _held(model)
    stage, streams = _watched(model, example_inputs, held)
    found = {path: block for path, block in streams.blocks.items() if block.output is not None}
    frozen = {path: reason for path in found if (reason := _obstacle(model, path, streams.calls[path]))}
    chosen = _level(model, found, streams.calls)
    units: dict[str, list[str]] = {}
    edits = Edits()
    for container in dict.fromkeys(_parent(path) for path in chosen):
        blocks = [p for p in chosen if _parent(p) == container and p not in frozen]
        kept, found_edits, reasons = _Container(model, example_inputs, stage, container, found).tried(blocks)
        units[container] = kept
        edits = edits.joined(found_edits)
        frozen.update(reasons)
    groups = tuple(g for container, blocks in units.items() for g in _groups(model, container, blocks, macs))
    return LayerStructure(
        groups=groups,
        passing={block: found[block].output or {} for g in groups for block in g.blocks},
        edits=edits,
        costs=_costs(model, groups, macs),
        frozen=tuple(Frozen(path, 0, 1, why) for path, why in frozen.items() if path in chosen),
        fingerprint=fingerprint(model),
    )


def _held(model: nn.Module) -> dict[str, nn.Module]:
    """The children of lists and sequences of modules, by path; a module with several names under its first."""
    return {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(model.get_submodule(_parent(path)), (nn.ModuleList, nn.Sequential))
    }


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


@dataclass(frozen=True)
class _Log:
    """What a run did.

    Args:
        events: the modules that returned, by their path in the whole model, with the shape of their first output.
        outputs: shapes of the model's outputs.
    """

    events: tuple[tuple[str, _Shape], ...]
    outputs: tuple[_Shape, ...]

    def outside(self, gone: Collection[str]) -> _Log:
        """The log without what happened inside the blocks `gone`."""
        return replace(self, events=tuple(e for e in self.events if not any(_inside(e[0], b) for b in gone)))


class _Stage:
    """Copies of the model to run: on shapes only or, where Python asks for values, on real tensors."""

    def __init__(self, model: nn.Module, example_inputs: Any, on_shapes: bool) -> None:
        self._model = model
        self._inputs = place(example_inputs, "meta" if on_shapes else device_of(model))
        self._on_shapes = on_shapes
        self.whole = _Log((), ())

    def copy(self) -> nn.Module:
        """A copy of the model for a run of its own."""
        return meta_twin(self._model) if self._on_shapes else shared_twin(self._model)

    def run(self, copy: nn.Module, change: Callable[[nn.Module], Any], streams: Streams | None = None) -> _Log:
        """The log of `copy` after `change` was made to it; paths are those before."""
        events: list[tuple[str, _Shape]] = []

        def noting(path: str) -> Callable[..., None]:
            return lambda _module, _args, output: events.append((path, _first_shape(output)))

        for path, module in copy.named_modules():
            if path:
                module.register_forward_hook(noting(path))
        change(copy)
        with running(copy), streams or Executing():
            output = call(copy, self._inputs)
        return _Log(tuple(events), tuple(tuple(t.shape) for t in output_tensors(output)))


def _first_shape(output: Any) -> _Shape:
    return next((tuple(t.shape) for t in output_tensors(output)), ())


def _watched(model: nn.Module, example_inputs: Any, held: Mapping[str, nn.Module]) -> tuple[_Stage, Streams]:
    """A stage on which the whole model has run, and what was seen of the modules `held`.

    Raises:
        ModelError: the model does not run.
    """

    def watched(on_shapes: bool) -> tuple[_Stage, Streams]:
        stage = _Stage(model, example_inputs, on_shapes)
        copy = stage.copy()
        streams = Streams({path: copy.get_submodule(path) for path in held})
        stage.whole = stage.run(copy, lambda _: None, streams)
        return stage, streams

    try:
        return watched(True)
    except Exception as on_shapes:  # noqa: BLE001  (Python may ask shapes for values they do not have)
        try:
            return watched(False)
        except Exception as error:  # noqa: BLE001  (whatever it is, the user is told)
            raise ModelError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}"
            ) from on_shapes


def _obstacle(model: nn.Module, path: str, calls: int) -> str:
    """Why a block cannot be a unit, as far as the model as a whole shows it; empty if it can."""
    module = model.get_submodule(path)
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is module]
    if len(names) > 1:
        return f"the same block is also called {names[1]}"
    return f"it runs {calls} times in one forward pass" if calls > 1 else ""


def _level(model: nn.Module, found: Mapping[str, Block], calls: Mapping[str, int]) -> list[str]:
    """Of blocks that lie within others, those that are the units."""
    outer = {p for p in found if any(q != p and _inside(q, p) for q in found)}
    whole = Counter(_parent(p) for p in calls)
    blocks = Counter(_parent(p) for p in found)

    def stays(path: str) -> bool:
        holder = _parent(path)
        is_sequence = isinstance(model.get_submodule(path), (nn.ModuleList, nn.Sequential))
        return path not in outer or (not is_sequence and whole[holder] == blocks[holder] > 1)

    left = [p for p in found if stays(p)]
    units = [p for p in left if not any(q != p and _inside(p, q) for q in left)]
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return sorted(units, key=order.__getitem__)


class _Unread:
    """What nobody may look at."""

    def __bool__(self) -> bool:
        raise TypeError("a value that only the block itself computes is asked whether it is true")


class _Container:
    """The blocks of one container, tried."""

    def __init__(
        self, model: nn.Module, example_inputs: Any, stage: _Stage, container: str, found: Mapping[str, Block]
    ) -> None:
        self._model = model
        self._inputs = example_inputs
        self._stage = stage
        self._container = container
        self._found = found
        self._passing = {path: block.output or {} for path, block in found.items()}
        self._size = len(model.get_submodule(container)._modules)

    def tried(self, blocks: Sequence[str]) -> tuple[list[str], Edits, dict[str, str]]:
        """The blocks that can go, what follows them, and why the others stay."""
        if not blocks:
            return [], Edits(), {}
        if self._size == 1:
            return [], Edits(), {blocks[0]: f"nothing else is in {self._container or 'the model'}"}
        # Of blocks of which one is special, that is mostly the first.
        edits = self._edits(blocks[-1])
        reasons = self._refused(blocks, edits)
        if blocks[-1] in reasons and (counting := self._counting(blocks[-1], edits)) is not None:
            edits, reasons = counting, self._refused(blocks, counting)
        kept = [block for block in blocks if block not in reasons]
        if not kept:
            return [], Edits(), reasons
        # Every other one goes, so that all places behind change.
        some = self._removable(kept)[::2]
        for further in self._variants(some, edits):
            if not self._difference(some, further):
                return kept, further, reasons
        return [], Edits(), reasons | dict.fromkeys(kept, _PLACE)

    def _refused(self, blocks: Sequence[str], edits: Edits) -> dict[str, str]:
        """Those of `blocks` that cannot go, and why: all at once or, where that fails, in halves."""
        why = self._refusal(self._removable(blocks), edits)
        if not why or len(blocks) == 1:
            return dict.fromkeys(blocks, why) if why else {}
        half = len(blocks) // 2
        return self._refused(blocks[:half], edits) | self._refused(blocks[half:], edits)

    def _removable(self, blocks: Sequence[str]) -> list[str]:
        """All of `blocks`, but for one where the container would be empty."""
        return list(blocks[:-1] if len(blocks) == self._size > 1 else blocks)

    def _edits(self, block: str) -> Edits:
        edits = config_edits(self._model, self._container, block)
        numbers = numbering(self._model.get_submodule(self._container))
        return edits.joined(Edits(numbered={self._container: numbers} if numbers else {}))

    def _variants(self, gone: Sequence[str], edits: Edits) -> Iterator[Edits]:
        """`edits` with what nothing needs but must not lie, as they are, and without what may be numbers by chance."""
        keys = counting_attributes(self._model, self._container, named=True)
        own = [key for key in keys if _parent(key) == _parent(self._container) and key not in edits.counted]
        named = edits.joined(Edits(dict.fromkeys(own, self._container)))
        if own and not self._refusal(gone, named):
            yield named
        yield edits
        if (surer := without_chance(edits)) != edits:
            yield surer

    def _counting(self, block: str, edits: Edits) -> Edits | None:
        """`edits` and the first attribute with which the model runs with a block less; None if none helps."""
        for key in counting_attributes(self._model, self._container, named=False):
            tried = edits.joined(Edits({key: self._container}))
            if not self._refusal([block], tried):
                return tried
        return None

    def _refusal(self, gone: Sequence[str], edits: Edits) -> str:
        """Why the blocks cannot go; empty if they can."""
        expected = self._stage.whole.outside(gone)
        try:
            log = self._stage.run(self._stage.copy(), lambda copy: drop(copy, edits, gone))
        except Exception as error:  # noqa: BLE001  (the model's code may raise anything)
            return f"without it the model does not run: {type(error).__name__}: {_line(error)}"
        why = _other(expected, log)
        if why or not any(self._found[block].unread for block in gone):
            return why
        try:
            log = self._stage.run(self._stage.copy(), lambda copy: pass_on(copy, self._passing, gone, _Unread()))
        except Exception:  # noqa: BLE001  (the model's code may raise anything)
            return _USED
        return _other(expected, log.outside(gone), _USED)

    def _difference(self, gone: Sequence[str], edits: Edits) -> bool:
        """Whether a model without the blocks differs from one in which they pass their input on."""
        if any(t.is_meta for _, t in named_tensors(self._model)):
            return False
        passing = pass_on(shared_twin(self._model), self._passing, gone)
        shorter = drop(shared_twin(self._model), edits, gone)
        try:
            prove(passing, shorter, self._inputs, original=original_paths(self._model, gone))
        except ProofError:
            return True
        return False


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _other(expected: _Log, log: _Log, why: str = "") -> str:
    """In what two runs differ; empty if they do not."""
    if expected.outputs != log.outputs:
        return why or "without it the model returns other tensors"
    if expected.events != log.events:
        pairs = zip(expected.events, log.events, strict=False)
        path = next((a[0] for a, b in pairs if a != b), (*expected.events, *log.events)[-1][0])
        return why or f"without it other code runs: {path} is not reached as before"
    return ""


def _groups(model: nn.Module, container: str, blocks: Sequence[str], macs: Mapping[str, float]) -> list[LayerGroup]:
    """The blocks of a container, those of the same cost together."""
    classes: dict[tuple[float, ...], list[str]] = {}
    shares = _holders(model)
    for block in blocks:
        classes.setdefault(_cost(model, block, macs, shares), []).append(block)
    emptied = len(blocks) == len(model.get_submodule(container)._modules)
    return [
        LayerGroup(
            name=(container or "model") if i == 0 else f"{container or 'model'}#{i + 1}",
            container=container,
            blocks=tuple(members),
            owned=tuple(_owned(model, block, shares) for block in members),
            least=int(emptied and i == 0),
        )
        for i, members in enumerate(classes.values())
    ]


def _holders(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)


def _owned(model: nn.Module, block: str, shares: Mapping[int, int]) -> tuple[str, ...]:
    """The names of the parameters that no module outside the block holds."""
    module = model.get_submodule(block)
    own = _holders(module)
    return tuple(f"{block}.{name}" for name, p in module.named_parameters() if own[id(p)] == shares[id(p)])


def _cost(
    model: nn.Module, block: str, macs: Mapping[str, float], shares: Mapping[int, int]
) -> tuple[float, float, float]:
    """Parameters, MACs and bytes that go with a block."""
    owned = [model.get_parameter(name) for name in _owned(model, block, shares)]
    buffers = model.get_submodule(block).buffers()
    return (
        sum(p.numel() for p in owned),
        sum(n for path, n in macs.items() if _inside(path, block)),
        sum(t.numel() * t.element_size() for t in (*owned, *buffers)),
    )


def _costs(model: nn.Module, groups: Sequence[LayerGroup], macs: Mapping[str, float]) -> CostModel:
    tensors = [tensor for _, tensor in named_tensors(model)]
    wholes = (
        sum(p.numel() for p in model.parameters()),
        sum(macs.values()),
        sum(t.numel() * t.element_size() for t in tensors),
    )
    shares = _holders(model)
    each = [_cost(model, g.blocks[0], macs, shares) for g in groups]
    metrics = {}
    for i, (metric, whole) in enumerate(zip(("params", "macs", "bytes"), wholes, strict=True)):
        units = [Monomial(cost[i], (Atom(g.name, g.size),), g.name) for g, cost in zip(groups, each, strict=True)]
        rest = whole - sum(cost[i] * g.size for g, cost in zip(groups, each, strict=True))
        metrics[metric] = (*units, Monomial(rest, (), "the rest"))
    return CostModel(metrics)
