"""Multiply–accumulates of a model, counted while it runs once.

One MAC is one multiplication with its addition; PyTorch's `FlopCounterMode` reports two FLOPs for it. Counted are the
products of matrices: convolutions (grouped, transposed, any number of axes), linear layers, `matmul` and `einsum`,
both products of attention (masks and causality save nothing), recurrent layers, bilinear forms, experts. Norms,
activations, additions, embeddings and pooling count nothing. The figure is for the inputs given: a batch of two
costs twice as much. `paper_flops` is another convention, kept apart under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.batch import leaves
from ..core.errors import ModelError
from ._mac_rules import RULES, Count
from ._run import evaluating, forward, slow_attention, watched

__all__ = ["Trace", "macs", "macs_by_module", "paper_flops", "trace"]


@dataclass(frozen=True)
class Trace:
    """What one forward pass did, by qualified module name, in the order in which modules were first entered.

    Args:
        macs: MACs of the ops that ran while the module was the innermost active one; they sum to the model's.
        shapes: shape of the first tensor in the module's output, at its first call; None where there is none.
        uncounted: names of ops from outside PyTorch for which there is no rule; any products inside are missing.
    """

    macs: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...] | None]
    uncounted: tuple[str, ...] = ()


def macs(model: nn.Module, example_inputs: Any, *, skip_zeros: bool = False) -> float:
    """MACs of one forward pass, in evaluation mode.

    Args:
        model: on any device; on "meta" nothing is computed and the count costs milliseconds.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords.
        skip_zeros: count only the products with non-zero entries of parameters, as a perfect sparse kernel would do.
            A mask that is multiplied onto a parameter at each call is not seen; make it permanent first.

    Raises:
        ModelError: the forward pass fails, or `skip_zeros` on the meta device, where values are unknown.

    >>> macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 10, 10))
    21600.0
    """
    return math.fsum(trace(model, example_inputs, skip_zeros=skip_zeros).macs.values())


def macs_by_module(model: nn.Module, example_inputs: Any, *, skip_zeros: bool = False) -> dict[str, float]:
    """MACs by qualified module name, in forward order, without modules that do none themselves; sums to `macs`.

    An op belongs to the innermost module running: attention called as a function counts for the block that calls it.
    Arguments and errors are those of `macs`.
    """
    counted = trace(model, example_inputs, skip_zeros=skip_zeros).macs
    return {name: value for name, value in counted.items() if value}


def trace(model: nn.Module, example_inputs: Any, *, skip_zeros: bool = False) -> Trace:
    """The `Trace` of one forward pass; arguments and errors are those of `macs`."""
    counter = _Counter(_nonzero_of(model) if skip_zeros else Tensor.numel)
    with evaluating(model), torch.no_grad(), slow_attention(), watched(model, counter.enter, counter.leave), counter:
        forward(model, example_inputs)
    return Trace(counter.macs, counter.shapes, tuple(sorted(counter.uncounted)))


class _Counter(TorchDispatchMode):
    """A dispatch mode that adds up MACs under the module on top of a stack."""

    def __init__(self, count: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self.count = count
        self.stack = [""]
        self.macs: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.uncounted: set[str] = set()

    def enter(self, name: str, module: nn.Module) -> None:
        self.stack.append(name)
        self.macs.setdefault(name, 0.0)

    def leave(self, name: str, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        if name not in self.shapes:
            self.shapes[name] = next((tuple(t.shape) for t in leaves(output)), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func._schema.name)
        if rule is None:
            return self._unlisted(func, args, kwargs)
        output = func(*args, **kwargs)
        self.macs[self.stack[-1]] += rule(_positional(func, args, kwargs), output, self.count)
        return output

    def _unlisted(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Under inference mode composite ops (linear, matmul …) arrive whole; run inside this mode, their parts show.
        if func.namespace != "prim":
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        if func.namespace not in ("aten", "prim", "prims"):
            self.uncounted.add(func._schema.name)
        return func(*args, **kwargs)


def _positional(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """`args` followed by the keyword arguments in the order of the schema, None where one is not given."""
    rest = func._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(argument.name) for argument in rest))


def _nonzero_of(model: nn.Module) -> Count:
    """A count of non-zeros for parameters of `model` and views of them, of all entries for other tensors."""
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        raise ModelError("skip_zeros needs the values of the parameters, but the model is on the meta device.")
    owned = {p.untyped_storage().data_ptr() for p in parameters}

    def count(tensor: Tensor) -> int:
        if tensor.untyped_storage().data_ptr() not in owned:
            return tensor.numel()
        return int(tensor.count_nonzero())

    return count


def paper_flops(model: nn.Module, example_inputs: Any, *, skip_zeros: bool = False) -> float:
    """FLOPs as the harness of "Rethinking the Value of Network Pruning" (arXiv 1810.05270) counts them.

    Kept only so that figures of that literature can be compared: a convolution counts 2·k·k·(cin/groups)·cout·H·W, and
    cout·H·W for its bias; a linear layer 2·in·out + out; `BatchNorm2d` twice and `ReLU` once the size of its output;
    `MaxPool2d` and `AvgPool2d` k·k times the size of the output. Only modules count: functional calls and all other
    layers are free, and so are attention's products. It is not twice `macs`.

    Args:
        model: in evaluation mode during the count.
        example_inputs: one image gives the published figures; a batch of n gives n times as much.
        skip_zeros: count only the non-zero weights of convolutions and linear layers.

    Raises:
        ModelError: as `macs`.
    """
    count = _nonzero_of(model) if skip_zeros else Tensor.numel
    total = [0.0]

    def leave(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor):
            total[0] += _paper_flops_of(module, output, count)

    with evaluating(model), torch.no_grad(), watched(model, leave=leave):
        forward(model, example_inputs)
    return total[0]


def _paper_flops_of(module: nn.Module, output: Tensor, count: Count) -> float:
    size = output.numel()
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 2 * count(module.weight) * size / module.out_channels + (size if module.bias is not None else 0)
    if isinstance(module, nn.Linear):
        return 2 * count(module.weight) * size / module.out_features + (size if module.bias is not None else 0)
    if isinstance(module, nn.BatchNorm2d):
        return 2 * size
    if isinstance(module, nn.ReLU):
        return size
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        kernel = module.kernel_size
        return size * (math.prod(kernel) if isinstance(kernel, tuple) else kernel**2)
    return 0
