"""Soft masks that are functions of the weights: no parameters of their own, and gradients through both factors.

PDP: Cho, Adya, Naik, "PDP: Parameter-free Differentiable Pruning is All You Need", NeurIPS 2023, arXiv 2305.11203.
A softmax of w² against t², with t half-way between the smallest that stays and the largest that goes:

    m(w) = exp(w²/τ) / (exp(w²/τ) + exp(t²/τ)) = sigmoid((w² − t²)/τ),    ŵ = m(w)·w,
    ∂ŵ/∂w = m + (2·w²/τ)·m·(1 − m),

t being taken as a constant. Channels and blocks have the L2 norm of all their weights in place of |w|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.errors import ModelError, OptionError, PlanError
from ..core.finite import all_finite
from ..core.select import per_row
from ..core.units import Group
from .spread import Part, multiplied, parts_of

__all__ = [
    "Entries",
    "SoftWeights",
    "Softener",
    "Temperature",
    "Units",
    "border",
    "refuse_broken",
    "soft_mask",
    "steepness",
]

Tensors = Mapping[str, Tensor]
# Far above any factor that matters, and finite times zero is zero.
_HUGE = 1e30


@dataclass(frozen=True)
class Temperature:
    """τ for given thresholds.

    Args:
        value: τ itself, or its share of t² where `relative`.
        relative: a share makes the mask blind to the weights' scale: c·w has the mask of w.
        cap: the most by which the gradient of a weight at the threshold is multiplied, `1/2 + t²/(2·τ)`, more than
            1/2: τ is never so small that it is more.

    Raises:
        OptionError: a value that is not positive, or a cap of 1/2 or less.
    """

    value: float = 0.1
    relative: bool = True
    cap: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise OptionError(f"the temperature must be positive and finite, got {self.value}.")
        if not self.cap > 0.5:
            raise OptionError(f"the cap of the gradient's factor must be more than 0.5, got {self.cap}.")

    def __call__(self, threshold: Tensor) -> Tensor:
        """τ for each threshold, in its shape."""
        squared = threshold.square()
        chosen = self.value * squared if self.relative else torch.full_like(squared, self.value)
        return torch.maximum(chosen, squared / (2 * self.cap - 1)).clamp(min=torch.finfo(squared.dtype).tiny)


def border(magnitudes: Tensor, keep: int) -> Tensor:
    """t of each row, half-way between the `keep`-th largest of it and the next: [rows, 1].

    Args:
        magnitudes: [rows, n], n of at least 2; without NaN.
        keep: how many of a row lie above; taken as 1 or n − 1 if it is outside that range.
    """
    least = min(max(keep, 1), magnitudes.shape[1] - 1)
    # From the nearer end: the two lowest of one more than stay, or the two highest of one more than go.
    most = magnitudes.shape[1] - least
    upper = least <= most
    outer = magnitudes.topk(min(least, most) + 1, dim=1, largest=upper, sorted=False).values
    return outer.topk(2, dim=1, largest=not upper).values.sum(1, keepdim=True) / 2


def soft_mask(squares: Tensor, threshold: Tensor, temperature: Tensor) -> Tensor:
    """m in [0, 1] of squared magnitudes, 1/2 at the threshold; thresholds and temperatures broadcast."""
    return torch.sigmoid((squares - threshold.square()) / temperature)


def steepness(squares: Tensor, threshold: Tensor, temperature: Tensor) -> Tensor:
    """∂ŵ/∂w of single weights with these squares: `m + (2·w²/τ)·m·(1 − m)`."""
    mask = soft_mask(squares, threshold, temperature)
    # 1 − m rounds to zero long before its own sigmoid does.
    other = torch.sigmoid((threshold.square() - squares) / temperature)
    return mask + (2 * squares / temperature).clamp(max=_HUGE) * mask * other


class Softener(Protocol):
    """Which weights get soft masks, and how these follow from the weights."""

    @property
    def sizes(self) -> dict[str, int]:
        """By group, how many units are compared with each other."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that are multiplied by a mask."""

    def magnitudes(self, raw: Tensors) -> dict[str, Tensor]:
        """By group, what its units are compared by: float32 or wider [rows, size]."""

    def soften(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        """ŵ of every parameter that a group with a threshold multiplies, differentiable in `raw`."""

    def factors(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        """∂ŵ/∂w of the parameters of which each entry depends on itself alone."""

    def flat(self, name: str, rows: Tensor) -> Tensor:
        """Values [rows, size] of a group in the order of its units: [units]."""

    def spread(self, kept: Tensors) -> dict[str, Tensor]:
        """By parameter the bool mask of the entries that stay, from the units that stay in each group."""


@dataclass(frozen=True)
class Entries:
    """Single entries of weights, compared with all others of the tensor, or with those of the same few inputs.

    Args:
        shapes: of the weights, by name.
        temperature: of the masks.
        of: number of consecutive inputs compared with each other (M of N:M); None for the whole tensor.
        axes: of the inputs of each weight, by name, where it is not 1; see `scope.input_axes`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    temperature: Temperature
    of: int | None = None
    axes: Mapping[str, int] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: self.of or math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def magnitudes(self, raw: Tensors) -> dict[str, Tensor]:
        return {name: self._rows(_wide(raw[name]).abs(), name) for name in self.shapes}

    def soften(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        masks = {name: self._of_squares(soft_mask, raw[name], name, t) for name, t in borders.items()}
        return {name: (mask * raw[name]).to(raw[name].dtype) for name, mask in masks.items()}

    def factors(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        return {name: self._of_squares(steepness, raw[name], name, t) for name, t in borders.items()}

    def flat(self, name: str, rows: Tensor) -> Tensor:
        return self._back(rows, name).flatten()

    def spread(self, kept: Tensors) -> dict[str, Tensor]:
        return {name: units.view(self.shapes[name]) for name, units in kept.items()}

    def _of_squares(
        self, function: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor, name: str, threshold: Tensor
    ) -> Tensor:
        squares = self._rows(_wide(weight).square(), name)
        return self._back(function(squares, threshold, self.temperature(threshold)), name)

    def _rows(self, tensor: Tensor, name: str) -> Tensor:
        if self.of is None:
            return tensor.reshape(1, -1)
        return tensor.movedim(self.axes.get(name, 1), -1).reshape(-1, self.of)

    def _back(self, rows: Tensor, name: str) -> Tensor:
        shape = self.shapes[name]
        if self.of is None:
            return rows.view(shape)
        axis = self.axes.get(name, 1)
        return rows.view(*shape[:axis], *shape[axis + 1 :], shape[axis]).movedim(-1, axis)


@dataclass(frozen=True)
class Units:
    """Units of many entries, such as channels, rows or blocks, compared by their L2 norms within each group.

    The norm is that of the weights with two or more axes that make the unit. The mask multiplies these, and the
    biases and norm parameters that make the unit too: a batch norm would undo a factor of the weight before it.

    Args:
        groups: the units.
        shapes: of the model's parameters, by their first names.
        first: for every name of a parameter the first name of the same one; see `scope.canonical_names`.
        temperature: of the masks.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    first: Mapping[str, str]
    temperature: Temperature

    @property
    def sizes(self) -> dict[str, int]:
        return {group.name: group.size for group in self.groups}

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for group in self.groups for name, _ in self.parts(group)))

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        return {group.name: parts_of(group, self.first) for group in self.groups}

    def parts(self, group: Group) -> list[Part]:
        """The parameters that make the units of a group, each with the group as it lies along one of its axes."""
        return self._parts[group.name]

    def weights(self, group: Group) -> list[Part]:
        """Those of the parts whose norms count."""
        return [(name, part) for name, part in self.parts(group) if len(self.shapes[name]) > 1]

    def magnitudes(self, raw: Tensors) -> dict[str, Tensor]:
        return {group.name: self._squares(group, raw).sqrt()[None] for group in self.groups}

    def soften(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        masks: list[tuple[Part, Tensor]] = []
        for group in self.groups:
            if group.name not in borders:
                continue
            squares = self._squares(group, raw)
            threshold = borders[group.name].view(1).to(squares.device)
            mask = soft_mask(squares, threshold, self.temperature(threshold))
            masks += [(part, mask) for part in self.parts(group)]
        return multiplied(raw, masks)

    def factors(self, raw: Tensors, borders: Tensors) -> dict[str, Tensor]:
        return {}

    def flat(self, name: str, rows: Tensor) -> Tensor:
        return rows.view(-1)

    def spread(self, kept: Tensors) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for group in self.groups:
            for name, mask in group.spread(kept[group.name]).items():
                if name in self.first:
                    full = mask.expand(self.shapes[self.first[name]])
                    masks[self.first[name]] = masks.get(self.first[name], full) & full
        return masks

    def _squares(self, group: Group, raw: Tensors) -> Tensor:
        lifted = [part.lift({name: _wide(raw[name]).square()})[name] for name, part in self.weights(group)]
        return torch.stack(lifted).sum(0)


class SoftWeights:
    """Keeps ŵ in a model's parameters, and w outside it, where the optimizer's steps act on it.

    Forward passes, under whatever precision and with whatever layers, see ŵ. Gradients of single entries are those of
    w from the backward pass on, before any clipping or accumulation; those of coupled units become so right before the
    optimizer's step. Thresholds and masks are made anew after every optimizer step, so that all passes of one step,
    recomputed ones too, see the same.

    Args:
        model: its parameters are changed in place.
        softener: which of them, and how.
        optimizer: that trains them; all that are trained must be in it.

    Raises:
        OptionError: the optimizer holds not all of them.
    """

    def __init__(self, model: nn.Module, softener: Softener, optimizer: Optimizer) -> None:
        self._model, self._softener = model, softener
        self._keeps: dict[str, int] = {}
        self._raw: dict[str, Tensor] = {}
        self._borders: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        # Accelerate and Lightning wrap the optimizer that holds the state.
        inner = getattr(optimizer, "optimizer", optimizer)
        trained = {name: p for name, p in self._parameters().items() if p.requires_grad}
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        left = [name for name, p in trained.items() if id(p) not in held]
        if left:
            raise OptionError(f"the optimizer does not hold {', '.join(left[:3])}; give the one that trains them all.")
        self._hooks: list[RemovableHandle] = [p.register_hook(self._chain(name)) for name, p in trained.items()]
        self._hooks.append(inner.register_step_pre_hook(self._before))
        self._hooks.append(inner.register_step_post_hook(self._after))

    @torch.no_grad()
    def set(self, keeps: Mapping[str, int]) -> None:
        """None; from now on so many of the units compared with each other lie above the threshold; all: no mask."""
        self.reveal()
        self._keeps = dict(keeps)
        self._soften()

    @torch.no_grad()
    def reveal(self) -> None:
        """None; the parameters are w until the next `set` or optimizer step."""
        for name, raw in self._raw.items():
            self._model.get_parameter(name).copy_(raw)
        self._forget()

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """A context in which the parameters are w."""
        self.reveal()
        try:
            yield
        finally:
            with torch.no_grad():
                self._soften()

    def raw(self) -> dict[str, Tensor]:
        """w of every parameter by name."""
        return {name: self._raw.get(name, p.detach()) for name, p in self._parameters().items()}

    def kept(self) -> dict[str, Tensor]:
        """By group the bool [units] of those that stay in the hard mask; of each row exactly as many as set."""
        found: dict[str, Tensor] = {}
        for name, rows in self._softener.magnitudes(self.raw()).items():
            found[name] = self._softener.flat(name, per_row(rows, self._keeps.get(name, rows.shape[1])))
        return found

    def remove(self) -> None:
        """None; the parameters are w, and all hooks are gone."""
        self.reveal()
        self.forget()

    def forget(self) -> None:
        """None; the parameters are as they are, and all hooks are gone."""
        self._forget()
        self._keeps = {}
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Kept counts and what waits outside the model."""
        return {"keeps": dict(self._keeps), "raw": {name: raw.clone() for name, raw in self._raw.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """None; the parameters are soft as they were.

        Raises:
            PlanError: the state is of other parameters.
        """
        parameters = self._parameters()
        for name, raw in state["raw"].items():
            if name not in parameters or parameters[name].shape != raw.shape:
                raise PlanError(f"the stored state has soft weights {name} {list(raw.shape)}, which the model has not.")
        self._forget()
        for name, raw in state["raw"].items():
            parameters[name].copy_(raw)
        self._keeps = {name: int(keep) for name, keep in state["keeps"].items()}
        self._soften()

    def _forget(self) -> None:
        self._raw, self._borders, self._factors = {}, {}, {}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: self._model.get_parameter(name) for name in self._softener.tensors}

    def _soften(self) -> None:
        """ŵ in place of the w that the parameters are."""
        parameters = self._parameters()
        sizes = self._softener.sizes
        soft = {name: keep for name, keep in self._keeps.items() if keep < sizes[name]}
        if not soft:
            return
        refuse_broken(parameters)
        magnitudes = self._softener.magnitudes(parameters)
        self._borders = {name: border(magnitudes[name], keep) for name, keep in soft.items()}
        self._factors = self._softener.factors(parameters, self._borders)
        made = self._softener.soften(parameters, self._borders)
        self._raw = {name: parameters[name].detach().clone() for name in made}
        for name, value in made.items():
            parameters[name].copy_(value)

    def _chain(self, name: str) -> Callable[[Tensor], Tensor]:
        def times_the_factor(gradient: Tensor) -> Tensor:
            if name not in self._factors:
                return gradient
            return (gradient * self._factors[name].to(gradient.device)).to(gradient.dtype)

        return times_the_factor

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._raw:
            return
        if any(callable(a) for a in (*args[1:], *kwargs.values())):
            raise OptionError("soft masks need optimizer.step without a closure: call backward before it.")
        self._chain_coupled()
        self.reveal()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._soften()

    def _chain_coupled(self) -> None:
        """Gradients of w in place of those of ŵ, where one entry's mask depends on other entries."""
        parameters = {n: p for n, p in self._parameters().items() if n in self._raw and n not in self._factors}
        given = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not given:
            return
        with torch.enable_grad():
            raw = {name: w.to(parameters[name].device, copy=True).requires_grad_() for name, w in self._raw.items()}
            soft = self._softener.soften(raw, self._borders)
            asked = [raw[name] for name in given]
            found = torch.autograd.grad([soft[name] for name in given], asked, list(given.values()))
        for gradient, value in zip(given.values(), found, strict=True):
            gradient.copy_(value)


def refuse_broken(weights: Tensors) -> None:
    """None, if all numbers are numbers.

    Raises:
        ModelError: NaN or infinite weights, named.
    """
    for name, weight in weights.items():
        if not all_finite(weight):
            raise ModelError(f"NaN or infinite weights in {name}: training diverged, or began from a broken model.")


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
