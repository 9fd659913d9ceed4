"""Sparsity that pays: each layer of a pruned model in the form that was measured to be fastest, with proof.

Zeros in a dense weight cost as much as other numbers. `sparse_runtime` runs the model once to see what each layer is
given, times every form that the layer's zeros allow (`formats`) in turn with the dense layer on those inputs, and
replaces a layer where a form wins by a margin. The whole is then timed in turn with the dense model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.batch import device_of, move
from ..core.errors import ModelError, OptionError
from ..graph.twin import shared_twin
from ..measure.latency import Latency, Spread, compare
from .agreement import agree, exporting, outputs
from .formats import DENSE, density, forms, is_sparse_layer, unfit
from .kernels import RowsLayer, as_matrix

__all__ = ["LayerChoice", "Runtime", "SparseLayer", "sparse_runtime"]

_OURS = "sparse"
# Takes models by name, inputs for all of them, `threads` and `seconds` for each; `measure.latency.compare`.
Timer = Callable[..., Mapping[str, Latency]]


@dataclass(frozen=True)
class LayerChoice:
    """The form of one layer.

    Args:
        layer: its qualified name.
        kind: its class.
        shape: of its weight as [outputs, inputs × kernel].
        density: the share of its weights that are not zero.
        inputs: shapes of the inputs that it was timed on; none where it was not.
        format: the form it has now, "dense" for the layer as it was.
        seconds: by form, median time of all its calls in one pass; empty where it was not timed.
        reason: why the dense form stays; empty where another one won.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    density: float
    inputs: tuple[tuple[int, ...], ...] = ()
    format: str = DENSE
    seconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def saved(self) -> float:
        """Seconds that the form saves in one pass; 0 where nothing was timed."""
        return self.seconds[DENSE] - self.seconds[self.format] if self.seconds else 0.0


@dataclass(frozen=True)
class Runtime:
    """A pruned model that uses its zeros, for inference.

    Args:
        model: runs wherever the dense one does; it shares its parameters and has the sparse forms beside them.
        layers: the choice for each layer that has sparse forms, in the model's order.
        timings: of one pass, taken in turn: "dense", "sparse" and what was asked for beside, with how many times
            faster than the dense model each is. Empty where choices were given.
    """

    model: nn.Module
    layers: tuple[LayerChoice, ...]
    timings: Mapping[str, Latency] = field(default_factory=dict)

    @property
    def choices(self) -> dict[str, str]:
        """Layer to format, for all that are not dense: pass it as `choices=` to build the same again unmeasured."""
        return {choice.layer: choice.format for choice in self.layers if choice.format != DENSE}

    @property
    def speedup(self) -> Spread | None:
        """How many times faster than the dense model, side by side; None where it was not timed."""
        timing = self.timings.get(_OURS)
        return None if timing is None else timing.speedup

    @property
    def verdict(self) -> str:
        """One sentence: how much faster it is than the dense model or, if it is not, why."""
        changed = f"{len(self.choices)} of {len(self.layers)} layers changed"
        if self.speedup is None:
            return f"Not timed: {changed} as the choices say."
        times = self.speedup.median
        if self.choices and times > 1:
            return f"{times:.2f} times faster than the dense model: {changed}."
        return f"Dense wins ({times:.2f} times as fast): {self._why_not()}."

    def _why_not(self) -> str:
        if not self.layers:
            return "no layer is of a kind that has sparse forms"
        if not self.choices:
            reason, often = Counter(choice.reason.partition(":")[0] for choice in self.layers).most_common(1)[0]
            return f"no layer changed; {often} of {len(self.layers)}: {reason}"
        saved, whole = sum(choice.saved for choice in self.layers), self.timings[DENSE].median
        return f"the layers that changed save {saved / whole:.1%} of the dense model's time, too little to be seen"


class SparseLayer(nn.Module):
    """A layer in another form; whatever else is asked of it, such as its `weight`, the dense one answers.

    Args:
        dense: the layer as it was.
        kernel: what computes its outputs.
    """

    def __init__(self, dense: nn.Module, kernel: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.kernel = kernel

    def forward(self, x: Tensor) -> Any:
        return self.kernel(x)

    def train(self, mode: bool = True) -> SparseLayer:
        """Itself, for inference.

        Raises:
            OptionError: training was asked for.
        """
        if mode:
            raise OptionError("a sparse runtime cannot be trained: train the dense model and build it again.")
        return super().train(False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("dense"), name)


def sparse_runtime(
    model: nn.Module,
    example_inputs: Any,
    *,
    choices: Mapping[str, str] | None = None,
    margin: float = 0.05,
    beside: Mapping[str, nn.Module] | None = None,
    threads: int | None = None,
    seconds: float = 0.2,
    tolerance: float | None = None,
    timer: Timer = compare,
) -> Runtime:
    """The `Runtime` of a pruned model: each layer in the form that was measured to be fastest on the example inputs.

    It is not saved: save the pruned model, and its `choices` as JSON, and build it again where it runs.

    Args:
        model: with zeros in its weights; it is left as it was. Gradients are neither needed nor computed.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keywords, of the size that matters:
            the choice at batch 1 is another than at batch 32. The result takes other sizes, too.
        choices: layer to format, as `Runtime.choices` has them; nothing is timed then.
        margin: a form replaces the dense one if that takes at least 1 + margin times as long. Default: 5%.
        beside: other models to time on the same inputs, as `{"onnxruntime": onnx_session(model, example_inputs)}`.
        threads: CPU threads within an op; default: as many as PyTorch uses now.
        seconds: time to spend on each form of each layer; 10 times that on each whole model. Default: 0.2.
        tolerance: the largest difference from the dense outputs that the proof allows, as a share of the largest.
            Default: 1e-4, or 2e-2 in half precision.
        timer: what times models side by side; default: `measure.latency.compare`.

    Raises:
        OptionError: a choice names no layer, or a format that the layer cannot have here; a margin below 0.
        ModelError: NaN or infinite weights, or a failing forward pass.
        ProofError: a form, or the whole, gives other outputs than the dense model.

    >>> layer = nn.Linear(8, 4).requires_grad_(False)
    >>> layer.weight[:, 1:] = 0
    >>> sparse_runtime(layer.eval(), torch.ones(2, 8), choices={"": "csr"}).choices
    {'': 'csr'}
    """
    if not margin >= 0:
        raise OptionError(f"margin must be at least 0, got {margin}.")
    twin = shared_twin(model).requires_grad_(False)
    inputs = move(example_inputs, device_of(twin))
    layers = {name: layer for name, layer in twin.named_modules() if is_sparse_layer(layer)}
    kept = {name: _density(name, layer) for name, layer in layers.items()}
    with exporting(twin):
        expected = _outputs(twin, inputs)
        given = _inputs_of({n: layer for n, layer in layers.items() if not unfit(layer, kept[n])}, twin, inputs)
        if choices is None:
            time = partial(timer, threads=threads, seconds=seconds)
            made = [_chosen(n, layer, kept[n], given[n], time, margin, tolerance) for n, layer in layers.items()]
        else:
            made = _given(layers, kept, given, choices, tolerance)
        kernels = {choice.layer: kernel for choice, kernel in made if kernel is not None}
        sparse = _assembled(twin, kernels)
        _let_columns_pass(sparse, inputs)
        agree(expected, outputs(sparse, inputs), "its sparse runtime", tolerance)
    found = tuple(choice for choice, _ in made)
    if choices is not None:
        return Runtime(sparse, found)
    contestants = {DENSE: model, _OURS: sparse}
    timings = timer({**contestants, **(beside or {})}, example_inputs, threads=threads, seconds=10 * seconds)
    return Runtime(sparse, found, timings)


def _density(name: str, layer: nn.Module) -> float:
    try:
        return density(layer)
    except ModelError as fault:
        raise ModelError(f"{fault} (layer {name!r}): a sparse form would hide that; mend the model first.") from fault


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    try:
        return outputs(model, inputs)
    except Exception as error:
        # The forward pass is the user's code, which may raise anything.
        said = f"{type(error).__name__}: {str(error).rstrip('. ')}"
        raise ModelError(
            f"the model does not run on the example inputs ({said}): give such with which it does."
        ) from error


@dataclass
class _Given:
    """One input of each shape that a layer was given, and how often."""

    inputs: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook before the layer's forward pass."""
        if args and isinstance(args[0], Tensor):
            shape = tuple(args[0].shape)
            self.inputs.setdefault(shape, args[0].detach().clone())
            self.calls[shape] += 1


def _inputs_of(layers: Mapping[str, nn.Module], model: nn.Module, inputs: Any) -> dict[str, _Given]:
    """What each of these layers is given when the model runs; nothing for any other."""
    given: dict[str, _Given] = defaultdict(_Given)
    with _hooked((layer, given[name].see) for name, layer in layers.items()):
        outputs(model, inputs)
    return given


@contextmanager
def _hooked(pairs: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Hooks before the forward pass of modules, inside."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _chosen(
    name: str,
    layer: nn.Module,
    kept: float,
    given: _Given,
    timer: Timer,
    margin: float,
    tolerance: float | None,
) -> tuple[LayerChoice, nn.Module | None]:
    """The choice for a layer by measurement, and the module that replaces it."""
    about = partial(_about, name, layer, kept, given)
    reason = unfit(layer, kept) or ("" if given.calls else "it did not run as a layer on these inputs")
    if reason:
        return about(reason=reason), None
    known = forms(layer)
    told = "".join(f"; {why}" for why in known.refused.values())
    if not known.makers:
        return about(reason=f"no form suits its zeros and its type {layer.weight.dtype}{told}"), None
    kernels = {DENSE: layer, **{form: make() for form, make in known.makers.items()}}
    for form, kernel in kernels.items():
        _prove(name, layer, form, kernel, given, tolerance)
    seconds = _seconds(kernels, given, timer)
    # Of equal times the earlier form wins, and the dense one comes first.
    best = min(seconds, key=seconds.__getitem__)
    if best == DENSE or seconds[DENSE] < (1 + margin) * seconds[best]:
        rival = min((form for form in seconds if form != DENSE), key=seconds.__getitem__)
        lead = f"no form wins by {margin:.0%}: {rival} takes {seconds[rival] / seconds[DENSE]:.2f} times as long"
        return about(seconds=seconds, reason=lead + told), None
    return about(format=best, seconds=seconds), kernels[best]


def _about(name: str, layer: nn.Module, kept: float, given: _Given, **found: Any) -> LayerChoice:
    return LayerChoice(name, type(layer).__name__, tuple(as_matrix(layer).shape), kept, tuple(given.calls), **found)


def _seconds(kernels: Mapping[str, nn.Module], given: _Given, timer: Timer) -> dict[str, float]:
    """Median seconds of all calls in one pass, by form."""
    total = dict.fromkeys(kernels, 0.0)
    for shape, x in given.inputs.items():
        timings = timer(kernels, (x,))
        for form, timing in timings.items():
            # Quotients within rounds bear a busy machine better than the times themselves.
            faster = 1.0 if timing.speedup is None else timing.speedup.median
            total[form] += given.calls[shape] * timings[DENSE].median / faster
    return total


def _prove(name: str, layer: nn.Module, form: str, kernel: nn.Module, given: _Given, tolerance: float | None) -> None:
    for x in given.inputs.values():
        agree([layer(x).cpu()], [kernel(x).cpu()], f"layer {name!r} as {form}", tolerance)


def _given(
    layers: Mapping[str, nn.Module],
    kept: Mapping[str, float],
    given: Mapping[str, _Given],
    choices: Mapping[str, str],
    tolerance: float | None,
) -> list[tuple[LayerChoice, nn.Module | None]]:
    """The choices that were given, each one proven.

    Raises:
        OptionError: all choices that cannot be, in one.
    """
    faults = [f"there is no layer {name!r} that has sparse forms" for name in choices if name not in layers]
    made: list[tuple[LayerChoice, nn.Module | None]] = []
    for name, layer in layers.items():
        form = choices.get(name, DENSE)
        about = partial(_about, name, layer, kept[name], given[name])
        if form == DENSE:
            made.append((about(reason="the choices given leave it dense"), None))
            continue
        known = forms(layer)
        if form in known.makers and not (reason := unfit(layer, kept[name])):
            kernel = known.makers[form]()
            _prove(name, layer, form, kernel, given[name], tolerance)
            made.append((about(format=form), kernel))
        else:
            reason = known.refused.get(form) or unfit(layer, kept[name]) or f"it can be {_listed(known.makers)}"
            faults.append(f"layer {name!r} cannot be {form!r} ({reason})")
    if faults:
        raise OptionError(f"the choices do not fit this model here: {'; '.join(faults)}. Leave choices out to measure.")
    return made


def _listed(formats: Mapping[str, Any]) -> str:
    return ", ".join([DENSE, *formats])


def _assembled(model: nn.Module, kernels: Mapping[str, nn.Module]) -> nn.Module:
    """The model with its layers replaced, in place, wherever they are used."""
    new = {id(model.get_submodule(name)): name for name in kernels}
    places = [(p, new[id(m)]) for p, m in model.named_modules(remove_duplicate=False) if id(m) in new]
    made = {name: SparseLayer(model.get_submodule(name), kernel) for name, kernel in kernels.items()}
    for path, name in places:
        if not path:
            return made[name].eval()
        model.set_submodule(path, made[name])
    return model.eval()


def _let_columns_pass(model: nn.Module, inputs: Any) -> None:
    """Where one `RowsLayer` feeds the next through elementwise ops alone, outputs stay as columns; else they do not.

    Found by running the model with columns everywhere and looking which layers are given some. Code that cannot take
    them (a `view` that joins axes) ends the run, and then all outputs are rows.
    """
    kernels = [m for m in model.modules() if isinstance(m, RowsLayer)]
    ran: list[RowsLayer] = []
    passing: set[int] = set()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if ran and args[0].dim() > 1 and args[0].numel() > 1 and args[0].stride(-1) > 1:
            passing.add(id(ran[-1]))
        assert isinstance(module, RowsLayer)
        ran.append(module)

    _set_columns(kernels, True)
    try:
        with _hooked((kernel, see) for kernel in kernels):
            outputs(model, inputs)
        _set_columns((k for k in kernels if id(k) not in passing), False)
        outputs(model, inputs)
    except RuntimeError:
        _set_columns(kernels, False)


def _set_columns(kernels: Iterable[RowsLayer], value: bool) -> None:
    for kernel in kernels:
        kernel.by_columns = value
