"""A decision applied to a model: as zeros, or as a physical cut that is proven equal to the zeros."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batch import call, device_of, move
from ..core.dims import kept
from ..core.errors import DataError, ModelError, PlanError, ProofError
from ..core.units import Group
from .compact import Reference, as_is, taken
from .depth.layers import LayerStructure, without
from .ids.numbers import renumber
from .lengths import WeightNorm, adjusted
from .mend import apply_edits
from .mixtures.cut import ExpertStructure, without_experts
from .recorded.fallback import install
from .run import output_tensors, running
from .structure import Structure, fingerprint
from .twin import attention_swaps, named_tensors, swap_attention, twin

__all__ = ["AnyStructure", "cut", "element_masks", "mask", "prove"]

AnyStructure = Structure | LayerStructure | ExpertStructure

# Float32 sums in another order differ by about this much; a larger difference is judged again, more closely.
_QUICK = 1e-5
_CLOSER = {torch.float64: 1e-8, torch.float32: 1e-4}
# Values looked at in each inner activation.
_SAMPLE = 4096


def element_masks(
    groups: Sequence[Group], keep: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """For each tensor in `shapes` that a decision touches, the bool mask of the entries that stay, in its full shape.

    Args:
        groups: what was decided on.
        keep: bool [units] for each group; a group without one stays whole.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        if group.name not in keep or bool(keep[group.name].all()):
            continue
        for name, stays in group.spread(keep[group.name]).items():
            if name in shapes:
                full = stays.expand(shapes[name])
                masks[name] = masks[name] & full if name in masks else full
    return {name: m.contiguous() for name, m in masks.items()}


def mask(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` in which every parameter entry of a removed unit is zero; buffers are untouched."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    masks = element_masks(groups, keep, shapes)
    own = dict(model.named_parameters())
    with torch.no_grad():
        zeroed = {name: own[name].detach() * m.to(own[name].device) for name, m in masks.items()}
        lengths = adjusted(model, lambda norm, whole: zeroed.get(norm.direction, whole))
        for name, length in lengths.items():
            zeroed[name] = length * masks[name].to(length) if name in masks else length
        return twin(model, zeroed)


def cut(model: nn.Module, structure: AnyStructure, keep: Mapping[str, Tensor]) -> nn.Module:
    """A smaller copy of `model`: removed units are sliced out of every tensor, or layers left out; integers follow.

    Args:
        structure: from `infer` `depth.infer_layers` or `experts.infer_experts` on a model of the same shapes.
        keep: bool [units] for each group; a group without one stays whole.

    Raises:
        PlanError: the structure belongs to a model of other names or shapes.
    """
    check_fits(model, structure)
    if isinstance(structure, LayerStructure):
        return without(model, structure, keep)
    if isinstance(structure, ExpertStructure):
        return without_experts(model, structure.mixtures, keep)
    counts = {name: int(m.sum()) for name, m in keep.items()}
    sliced: dict[str, Tensor] = {}
    with torch.no_grad():
        lengths = adjusted(model, lambda norm, whole: _without_entries(norm, whole, structure, keep))
        for name, tensor in named_tensors(model):
            if name in structure.tensors or name in lengths:
                whole = lengths.get(name, tensor.detach())
                less = taken(whole, [kept(d, keep) for d in structure.tensors.get(name, ())])
                shared = less.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                layout = _layout(tensor)
                sliced[name] = less.clone(memory_format=layout) if shared else less.contiguous(memory_format=layout)
    smaller = twin(model, sliced)
    changed = [n for n, t in named_tensors(model) if n in sliced and sliced[n].shape != t.shape]
    inside = [p for p in attention_swaps(model) if any(n.startswith(f"{p}." if p else "") for n in changed)]
    swap_attention(smaller, inside)
    install(smaller, structure.recorded)
    apply_edits(smaller, structure.edits, counts)
    renumber(smaller, structure.numbers, keep)
    return smaller


def _layout(tensor: Tensor) -> torch.memory_format:
    """Channels last where it is so laid out; a few shapes are both, and in order."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


def _without_entries(norm: WeightNorm, whole: Tensor, structure: Structure, keep: Mapping[str, Tensor]) -> Tensor:
    """A direction without what goes off the axis of its lengths."""
    stays = [kept(dim, keep) for dim in structure.tensors.get(norm.direction, ())]
    return taken(whole, [torch.ones_like(k) if axis == norm.axis else k for axis, k in enumerate(stays)])


def check_fits(model: nn.Module, structure: AnyStructure) -> None:
    """Refuse a model of other names or shapes than the structure was inferred from.

    Raises:
        PlanError: with the first tensor that differs.
    """
    if fingerprint(model) == structure.fingerprint:
        return
    shapes = {n: tuple(t.shape) for n, t in named_tensors(model)}
    for name, dims in structure.tensors.items():
        whole = tuple(kept(d, {}).numel() for d in dims)
        if name not in shapes:
            raise PlanError(f"this plan is for another model: it expects a tensor {name} of shape {list(whole)}.")
        if shapes[name] != whole:
            raise PlanError(
                f"this plan is for another model: {name} has shape {list(shapes[name])}, "
                f"the plan expects {list(whole)}."
            )
    raise PlanError("this plan is for another model: names or shapes of its tensors differ.")


def prove(
    masked: nn.Module,
    smaller: nn.Module,
    example_inputs: Any,
    reference: Reference = as_is,
    original: Callable[[str], str] = str,
    recode: Callable[[Any], Any] = lambda inputs: inputs,
    outputs: Mapping[int, Sequence[Tensor]] | None = None,
) -> float:
    """The largest relative difference between two forms of one decision, over outputs and inner activations.

    Both run in evaluation mode, on the same inputs and random numbers; neither is changed. Compared are the outputs,
    and of every module whose output has the same shape in both, a sample: a classifier initialised to zero would agree
    with anything. A difference that rounding might not explain is judged again in float64, where the two must agree to
    1e-8; a model that does not run in float64, in float32.

    Args:
        reference: how the masked model is run; see `compact.on_kept`.
        original: from the path of a module in the cut model to its path in the masked one.
        recode: from inputs of the masked model to those of the cut one, in which ids may have other numbers.
        outputs: of outputs that are smaller in the cut model, by number, bool masks of what it keeps, one an axis.

    Raises:
        ProofError: the cut model does not run, or the outputs differ in number, in shape or in value.
        DataError: the outputs are empty, or NaN throughout, and would agree with any.
        ModelError: the masked model does not run on the inputs.
    """
    terms = _Terms(reference, original, recode, outputs or {})
    try:
        error, where = _difference(masked, smaller, example_inputs, terms)
    except (NotImplementedError, RuntimeError, TypeError) as failure:
        raise ModelError(
            f"the model does not run on the plan's example inputs ({type(failure).__name__}: {failure}), so that a cut "
            "cannot be proven; give it the dtype and device that it was planned with."
        ) from failure
    if error <= _QUICK:
        return error
    for dtype, allowed in _CLOSER.items():
        pair = _cast(masked, dtype), _cast(smaller, dtype)
        try:
            error, where = _difference(*pair, _cast_tree(example_inputs, dtype), terms)
        except (RuntimeError, TypeError):
            continue
        if error <= allowed:
            return error
        break
    advice = "Please report this model; ignore= leaves the layers involved alone."
    if _draws(masked, example_inputs, reference):
        advice = (
            "Even in evaluation mode the model draws random numbers, of which a smaller one draws others: turn that "
            "off, as in F.dropout(x, training=self.training)."
        )
    raise ProofError(
        f"the cut model and the masked original differ by {error:.2e} in {where} (allowed {_CLOSER[torch.float64]:.0e} "
        f"of its spread), so the cut is not used. {advice}"
    )


def _draws(model: nn.Module, inputs: Any, reference: Reference) -> bool:
    """Whether the model's outputs depend on the state of the random numbers."""
    runs: list[list[Tensor]] = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            runs.append([w.values for w in _witnesses(model, inputs, reference).outputs])
    return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*runs, strict=True))


@dataclass(frozen=True)
class _Terms:
    """On what terms two forms are compared; see `prove`."""

    reference: Reference
    original: Callable[[str], str]
    recode: Callable[[Any], Any]
    outputs: Mapping[int, Sequence[Tensor]]


def _difference(masked: nn.Module, smaller: nn.Module, inputs: Any, terms: _Terms) -> tuple[float, str]:
    wanted = _witnesses(masked, inputs, terms.reference)
    if not any(bool(w.values.isfinite().any()) for w in wanted.outputs):
        raise DataError(
            "the model's outputs on the example inputs hold no finite number, so that a cut cannot be proven; give "
            "inputs as the model will see them: at least one, without NaN."
        )
    got = _witnesses_of_cut(smaller, terms.recode(inputs), terms.original)
    if len(wanted.outputs) != len(got.outputs):
        raise ProofError(f"the cut model has {len(got.outputs)} outputs, the original {len(wanted.outputs)}.")
    less = [_less(w, terms.outputs[i]) if i in terms.outputs else w for i, w in enumerate(wanted.outputs)]
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(less, got.outputs, strict=True))}
    for name, (a, b) in pairs.items():
        if a.shape != b.shape:
            raise ProofError(f"{name} of the cut model has shape {list(b.shape)}, of the original {list(a.shape)}.")
    # A module that runs more often in one form has calls without a counterpart, and nobody can tell which.
    often = {path for path, calls in wanted.calls.items() if got.calls.get(path) == calls}
    both = [(path, n) for path, n in wanted.inner if path in often and (path, n) in got.inner]
    inner = {f"{path}, call {n}": (wanted.inner[path, n], got.inner[path, n]) for path, n in both}
    pairs.update({name: (a, b) for name, (a, b) in inner.items() if a.shape == b.shape})
    worst, where = 0.0, "the output"
    for name, (a, b) in pairs.items():
        error = _relative(a.values, b.values)
        if error > worst:
            worst, where = error, name
    return worst, where


@dataclass(frozen=True)
class _Witness:
    """A tensor seen while a model ran: its shape, and all its values or an even sample of them, in float64."""

    shape: torch.Size
    values: Tensor


@dataclass(frozen=True)
class _Witnesses:
    """What a run shows: every output whole, and a sample of each module's first output at each of its calls."""

    outputs: list[_Witness]
    inner: dict[tuple[str, int], _Witness]
    calls: Mapping[str, int]


def _witness(tensor: Tensor, sample: bool) -> _Witness:
    flat = tensor.detach().flatten()
    if sample and flat.numel() > _SAMPLE:
        flat = flat[:: flat.numel() // _SAMPLE]
    return _Witness(tensor.shape, (torch.view_as_real(flat).flatten() if flat.is_complex() else flat).double().clone())


def _less(whole: _Witness, keeps: Sequence[Tensor]) -> _Witness:
    return _witness(taken(whole.values.view(whole.shape), keeps), sample=False)


def _witnesses_of_cut(model: nn.Module, inputs: Any, original: Callable[[str], str]) -> _Witnesses:
    try:
        return _witnesses(model, inputs, as_is, original)
    except Exception as error:
        raise ProofError(
            f"the cut model does not run on the example inputs ({type(error).__name__}: {error}), so it is not used. "
            "Please report this model; ignore= leaves the layers involved alone."
        ) from error


def _witnesses(model: nn.Module, inputs: Any, reference: Reference, original: Callable[[str], str] = str) -> _Witnesses:
    # What a forward pass leaves behind in buffers and attributes stays in this copy.
    model = twin(model, {name: p.detach() for name, p in model.named_parameters()}).eval()
    inner: dict[tuple[str, int], _Witness] = {}
    calls: Counter[str] = Counter()

    def look(path: str, output: Any) -> None:
        calls[path] += 1
        tensors = [t for t in output_tensors(output) if t.is_floating_point() and t.numel()]
        if tensors:
            inner[path, calls[path]] = _witness(tensors[0], sample=True)

    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(lambda _m, _i, out, path=path: look(original(path), out))
    device = device_of(model)
    # The state of the random numbers is put back, so both forms see the same.
    with (
        running(model) as module,
        reference(model, module),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        outputs = output_tensors(call(model, move(inputs, device)))
    return _Witnesses([_witness(t, sample=False) for t in outputs], inner, calls)


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the spread: a large constant must not hide a difference."""
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    # Of constant values only the rounding is left to compare, in units of their size.
    spread = max(float((a - a.mean()).abs().max()), 1e-3 * float(a.abs().max()), 1e-30)
    return float((a - b).abs().max()) / spread


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(dtype)


def _cast_tree(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, (tuple, list)):
        cast = [_cast_tree(v, dtype) for v in inputs]
        return type(inputs)(*cast) if hasattr(inputs, "_fields") else type(inputs)(cast)
    if hasattr(inputs, "items"):
        return {k: _cast_tree(v, dtype) for k, v in inputs.items()}
    return inputs
