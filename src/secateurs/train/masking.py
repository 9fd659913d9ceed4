"""The one mechanism that keeps masks while a model trains.

Weights are stored masked, so forward passes, exports and `model.state_dict()` see the sparse model. A hook on each
parameter zeroes the gradient of what is masked after every backward pass, before any clipping or unscaling; a hook on
each watched optimizer masks weights and optimizer state again after every step, whatever the optimizer did. A listener
may ask for the gradient of single steps before that, masked entries included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.errors import ModelError, OptionError, PlanError, unknown_name
from .inplace import put_masked, zero_masked
from .scope import canonical_names

__all__ = ["Masks", "Pull", "Revive", "pack", "unpack"]

Pull = Callable[[int], float] | float
Wants = Callable[[int], bool]
Hears = Callable[[dict[str, Tensor]], None]
Revive = Literal["never", "value", "one-step", "straight-through"]


@dataclass(frozen=True)
class _Fate:
    """What happens to a masked weight between two mask updates.

    Args:
        gate: its gradient is zeroed.
        clear: its optimizer state is zeroed.
        remember: the value it has after an optimizer step is kept aside, for the next mask update.
        restore: that value is in place while the optimizer steps, so that momentum and weight decay act on it.
    """

    gate: bool
    clear: bool
    remember: bool
    restore: bool


_FATES: dict[str, _Fate] = {
    "never": _Fate(gate=True, clear=True, remember=False, restore=False),
    "value": _Fate(gate=True, clear=False, remember=True, restore=True),
    "one-step": _Fate(gate=False, clear=False, remember=True, restore=False),
    "straight-through": _Fate(gate=False, clear=False, remember=True, restore=True),
}


class Masks(Mapping[str, Tensor]):
    """A mapping from qualified parameter names to bool masks (True stays), kept on a model until `remove`.

    Use it as a context manager to have the hooks removed also when the body raises; the weights stay masked.

    Args:
        model: its parameters are masked at once, in place. Tied parameters share one mask, under their first name.
        masks: per parameter a bool mask that broadcasts to its shape.
        revive: the fate of a masked weight. "never": weight, gradient and optimizer state are exactly zero. "value":
            the gradient is zero, the value waits outside the model, is still moved by momentum and weight decay, and
            competes in the next mask update (Zhu & Gupta's code). "one-step": the gradient is not zeroed, and zero
            minus one optimizer step competes (TensorFlow Model Optimization). "straight-through": the value waits
            outside the model and is trained by the gradient that the masked weight gets (SR-STE, arXiv 2102.04010).
        pull: what of its own value is added to the gradient of a masked weight that waits: the λ of SR-STE, 0 for none,
            or a function from steps taken to λ; with "value" and "straight-through" only.
        debug: check before and after every optimizer step that what is masked is zero.

    Attributes:
        steps: steps taken by the optimizer watched first.

    Raises:
        OptionError: an unknown name, a mask that is not bool or does not broadcast, two different masks for one tied
            parameter, an unknown `revive`, or a `pull` where no value waits.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with Masks(layer, {"weight": torch.tensor([[True, False]])}) as masks:
    ...     masks.sparsity
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        revive: Revive = "never",
        pull: Pull = 0.0,
        debug: bool = False,
    ) -> None:
        if revive not in _FATES:
            raise OptionError(f"revive must be never, value, one-step or straight-through, got {revive!r}.")
        if (not callable(pull) and pull < 0) or (pull and not _FATES[revive].restore):
            raise OptionError(f"pull must be 0 or more, and 0 with revive={revive!r}, got {pull}.")
        self._model, self._fate, self._debug = model, _FATES[revive], debug
        self._revive, self._pull = revive, pull
        self._names = canonical_names(model)
        self._keep = self._checked(masks)
        self._hidden: dict[str, Tensor] = {}
        self._gates: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}
        self._optimizers: list[tuple[Optimizer, tuple[RemovableHandle, ...]]] = []
        self._listener: tuple[Wants, Hears] | None = None
        # Whether dense gradients wait for the listener, and the step of the last that it got.
        self._exposed, self._heard = False, 0
        # Whether what waits is in the parameters, where it must not be put a second time.
        self._open = False
        self.steps = 0
        if self._fate.remember:
            self._remember()
        self.apply()

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a parameter, on the parameter's device; change masks with `set` only."""
        first = self._names.get(name, name)
        if first not in self._keep:
            raise KeyError(name)
        return self._mask(first, self._model.get_parameter(first))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def __enter__(self) -> Masks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def sparsity(self) -> float:
        """Share of the masked parameters' entries that are removed; a tied parameter counts once."""
        total = sum(mask.numel() for mask in self._keep.values())
        return 1 - sum(int(mask.sum()) for mask in self._keep.values()) / total if total else 0.0

    def sparsities(self) -> dict[str, float]:
        """The removed share of each parameter."""
        return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in self._keep.items()}

    def watch(self, optimizer: Optimizer) -> Masks:
        """This object, after `optimizer` got hooks that mask again after each of its steps; any number may be watched.

        Raises:
            OptionError: an LBFGS, or an optimizer that holds none of the masked parameters.
        """
        # Accelerate and Lightning wrap the optimizer that holds the state.
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, LBFGS):
            raise OptionError(
                "LBFGS moves all weights along one line built from past steps, so masks do not hold; use SGD or Adam."
            )
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        if self._keep and not any(id(p) in held for _, p in self._parameters()):
            raise OptionError(
                "the optimizer holds none of the masked parameters; build it from the parameters of this very model."
            )
        if all(known is not inner for known, _ in self._optimizers):
            hooks = (inner.register_step_pre_hook(self._before), inner.register_step_post_hook(self._after))
            self._optimizers.append((inner, hooks))
        self.apply()
        return self

    def listen(self, wants: Wants, hears: Hears) -> None:
        """None; from now on `hears` gets the dense gradient of those optimizer steps that `wants` names.

        The gradients of such a step stay dense until it is taken: accumulated, unscaled and reduced as the optimizer
        sees them, and with their masked entries in the norm by which they are clipped. Then the masked entries go, and
        at all other steps nothing dense outlives the backward pass.

        Args:
            wants: from the number of an optimizer step, counted from 1, to whether its gradient is asked for.
            hears: called with the gradients by name; they are not its to keep.
        """
        self._listener = (wants, hears)

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """None; the given masks replace those of the same names. An entry that returns starts with what `revive` says:
        zero weight and state ("never"), its remembered value ("value", "one-step").

        Raises:
            OptionError: as in the constructor, or a name that had no mask.
        """
        checked = self._checked(masks)
        for name in checked:
            if name not in self._keep:
                raise unknown_name("masked parameter", name, self._keep)
        self._reveal()
        self._keep.update(checked)
        if self._fate.remember:
            self._remember()
        self.apply()
        if self._fate.gate:
            self._each(_mask_gradient)

    @torch.no_grad()
    def apply(self) -> None:
        """None; what is masked becomes exactly zero in weights and, where never revived, in all watched optimizers."""
        self._bind()
        self._each(zero_masked)
        for optimizer, _ in self._optimizers:
            self._clear(optimizer)
        self._open = False

    @contextmanager
    def revealed(self) -> Iterator[None]:
        """A context in which remembered values of masked weights are in place, so that a criterion can score them."""
        self._reveal()
        try:
            yield
        finally:
            # `set` in the body has done it already.
            if self._open:
                self.apply()

    def check(self) -> None:
        """None, if everything that is masked is zero.

        Raises:
            ModelError: naming the parameter whose weight, gradient or optimizer state is not zero where it is masked.
        """
        for name, parameter in self._parameters():
            for what, tensor in self._guarded(parameter):
                wrong = int((tensor.ne(0) & ~self._mask(name, parameter)).sum())
                if wrong:
                    raise ModelError(
                        f"{wrong} masked entries of the {what} of {name} are not zero: something else writes to them; "
                        "change masked weights only through the pruner, between optimizer steps."
                    )

    def remove(self) -> None:
        """None; all hooks are gone, the masked weights stay zero, remembered values are dropped."""
        for _, handle in self._gates.values():
            handle.remove()
        for _, handles in self._optimizers:
            for handle in handles:
                handle.remove()
        self._gates.clear()
        self._optimizers.clear()
        self._listener = None
        self._hidden.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Masks packed eight entries to a byte, shapes, and remembered values: plain tensors, fit for safetensors."""
        state: dict[str, Tensor] = {}
        for name, keep in self._keep.items():
            state[f"kept/{name}"] = pack(keep)
            state[f"shape/{name}"] = torch.tensor(keep.shape, dtype=torch.int64)
            if name in self._hidden:
                state[f"hidden/{name}"] = self._hidden[name][~keep.to(self._hidden[name].device)].clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """None; masks and remembered values are those of `state`, and the model is masked accordingly.

        Raises:
            PlanError: the state is of other parameters or shapes.
        """
        self._check_state(state)
        self._exposed, self._heard = False, 0
        for name, parameter in self._parameters():
            self._keep[name] = unpack(state[f"kept/{name}"], parameter.shape).to(parameter.device)
            if self._fate.remember:
                hidden = parameter.detach().clone()
                hidden[~self._keep[name]] = state[f"hidden/{name}"].to(hidden)
                self._hidden[name] = hidden
        self.apply()

    def _checked(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keep: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if name not in self._names:
                raise unknown_name("parameter", name, self._names)
            first, shape = self._names[name], self._model.get_parameter(name).shape
            if mask.dtype != torch.bool or not shape:
                raise OptionError(f"{name} {list(shape)} needs a bool mask and at least one axis, got {mask.dtype}.")
            if not _broadcasts(mask.shape, shape):
                raise OptionError(f"a mask of shape {list(mask.shape)} does not broadcast to {name} {list(shape)}.")
            full = mask.detach().expand(shape).to(self._model.get_parameter(name).device, copy=True).contiguous()
            if first in keep and not torch.equal(keep[first], full):
                raise OptionError(f"{name} is tied to {first} but has another mask; tied parameters share one mask.")
            keep[first] = full
        return keep

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        stored = {key.partition("/")[2] for key in state if key.startswith("kept/")}
        if stored != set(self._keep):
            wrong = sorted(stored ^ set(self._keep))
            raise PlanError(f"the stored masks and the model have different parameters: {', '.join(wrong[:3])} differ.")
        for name, parameter in self._parameters():
            shape = state[f"shape/{name}"].tolist()
            if shape != list(parameter.shape):
                raise PlanError(f"the stored mask of {name} has shape {shape}, the parameter {list(parameter.shape)}.")
            if self._fate.remember and f"hidden/{name}" not in state:
                raise PlanError(f"the stored masks have no remembered values of {name}; load them with revive='never'.")

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The masked parameters as they are now: a module may have been moved or given new ones."""
        for name in self._keep:
            yield name, self._model.get_parameter(name)

    def _mask(self, name: str, parameter: Tensor) -> Tensor:
        """The mask of a parameter, where that is now; finding a parameter by its name takes longer than all else."""
        if self._keep[name].device != parameter.device:
            self._keep[name] = self._keep[name].to(parameter.device)
        return self._keep[name]

    @torch.no_grad()
    def _each(self, action: Callable[[nn.Parameter, Tensor], Any]) -> None:
        for name, parameter in self._parameters():
            action(parameter, self._mask(name, parameter))

    def _bind(self) -> None:
        """Gates on every masked parameter that has none, or that is another object than the gated one."""
        for name, parameter in self._parameters():
            gated = self._gates.get(name)
            if not self._fate.gate or not parameter.requires_grad or (gated and gated[0] is parameter):
                continue
            if gated:
                gated[1].remove()
            self._gates[name] = (parameter, parameter.register_post_accumulate_grad_hook(self._gate(name)))

    def _gate(self, name: str) -> Callable[[Tensor], None]:
        def gate(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            if parameter.grad.layout is not torch.strided:
                raise ModelError(f"the gradient of {name} is sparse and cannot be masked; use sparse=False there.")
            if self._wanted():
                self._exposed = True
            else:
                zero_masked(parameter.grad, self._mask(name, parameter))

        return gate

    def _wanted(self) -> bool:
        """Whether the gradient that is being made is one to be heard dense."""
        step = self.steps + 1
        return self._listener is not None and self._heard != step and self._listener[0](step)

    def _tell(self) -> None:
        """The listener gets the gradient that it wants, which then is masked like any other."""
        # Exposed, and not merely wanted: a second optimizer may step when the first has counted the next step already.
        if self._listener is None or not self._exposed:
            return
        gradients = {name: parameter.grad for name, parameter in self._parameters() if parameter.grad is not None}
        self._listener[1](gradients)
        self._exposed, self._heard = False, self.steps + 1
        self._each(_mask_gradient)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = _has_closure(args, kwargs)
        if not closure:
            self._tell()
        if self._debug:
            self.check()
        if self._fate.restore:
            if closure:
                raise OptionError(
                    f"revive={self._revive!r} needs optimizer.step without a closure: call backward before it."
                )
            self._reveal()
            if pull := self._pull(self.steps) if callable(self._pull) else self._pull:
                self._each(lambda p, kept: None if p.grad is None else p.grad.add_(p * ~kept, alpha=pull))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            self._tell()
        self.steps += optimizer is self._optimizers[0][0]
        if self._fate.remember:
            self._remember()
        self.apply()
        if self._debug:
            self.check()

    @torch.no_grad()
    def _remember(self) -> None:
        for name, parameter in self._parameters():
            held = self._hidden.get(name)
            if held is not None and (held.dtype, held.device) == (parameter.dtype, parameter.device):
                held.copy_(parameter)
            else:
                self._hidden[name] = parameter.detach().clone()

    @torch.no_grad()
    def _reveal(self) -> None:
        for name, parameter in self._parameters() if self._hidden and not self._open else ():
            put_masked(parameter, self._mask(name, parameter), self._hidden[name].to(parameter))
        self._open = True

    def _clear(self, optimizer: Optimizer) -> None:
        if not self._fate.clear:
            return
        for name, parameter in self._parameters():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    zero_masked(value, self._mask(name, parameter).to(value.device))

    def _guarded(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        yield "weight", parameter.detach()
        if self._fate.gate and not self._exposed and parameter.grad is not None:
            yield "gradient", parameter.grad
        for optimizer, _ in self._optimizers if self._fate.clear else ():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield f"optimizer state {key!r}", value


def _mask_gradient(parameter: nn.Parameter, kept: Tensor) -> None:
    if parameter.grad is not None:
        zero_masked(parameter.grad, kept)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an optimizer step computes its gradients itself; the first argument is the optimizer."""
    return any(callable(a) for a in (*args[1:], *kwargs.values()))


def _broadcasts(mask: torch.Size, shape: torch.Size) -> bool:
    pairs = zip(mask[::-1], shape[::-1], strict=False)
    return len(mask) <= len(shape) and all(m in (1, s) for m, s in pairs)


def pack(mask: Tensor) -> Tensor:
    """The entries of a bool mask in row-major order, eight to a byte, lowest bit first: uint8 [⌈entries / 8⌉]."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of `shape` that `pack` packed.

    Raises:
        PlanError: the number of bytes does not fit the shape.
    """
    entries = torch.Size(shape).numel()
    if bits.numel() != -(-entries // 8):
        raise PlanError(f"{bits.numel()} bytes hold no mask of shape {list(shape)}, which needs {-(-entries // 8)}.")
    spread = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.flatten()[:entries].bool().view(shape)
