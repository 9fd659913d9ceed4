"""The reference of a proof where removing is not zeroing: the masked model, with a few ops run on what is kept.

A layer norm over a width whose removed entries are zero still counts them in its mean. So while the masked original
runs, each op for which the trace found such a difference is given only the entries that stay, and what it returns is
put back among zeros. Everything else is the original code at its original sizes. So a router's softmax and top-k see
only the experts that stay, as if the logits of the others were minus infinity; the positions they return are those of
the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..core.dims import kept, size
from .ops import base_name, bound
from .recorded.fallback import install
from .records import Doubted
from .run import tensors_in
from .structure import Structure
from .twin import attention_swaps, swap_attention

__all__ = ["Reference", "as_is", "on_kept", "taken"]

# Given the model and the function that tells the running module: the state in which the model is run.
Reference = Callable[[nn.Module, Callable[[], str]], AbstractContextManager[Any]]


def as_is(model: nn.Module, module: Callable[[], str]) -> AbstractContextManager[Any]:
    """Runs the model with nothing changed."""
    return nullcontext()


def on_kept(structure: Structure, keep: Mapping[str, Tensor]) -> Reference:
    """A reference that runs the doubted ops of `structure` on the units that `keep` (bool [units], by group) marks."""
    ops = {(op.module, op.name, op.nth): op for op in structure.doubted if _cut(op, keep)}
    if not ops:
        return as_is

    @contextmanager
    def running(model: nn.Module, module: Callable[[], str]) -> Iterator[None]:
        # The ops were named while PyTorch's own attention, and code in the way, were replaced by their equals.
        swap_attention(model, attention_swaps(model))
        install(model, structure.recorded)
        with _OnKept(ops, keep, module):
            yield

    return running


class _OnKept(TorchDispatchMode):
    def __init__(
        self, ops: Mapping[tuple[str, str, int], Doubted], keep: Mapping[str, Tensor], module: Callable[[], str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it unannotated
        self._ops = ops
        self._keep = keep
        self._module = module
        self._calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = self._module(), base_name(func)
        op = self._ops.get((*key, self._calls[key]))
        self._calls[key] += 1
        return func(*args, **kwargs) if op is None else self._on_kept(func, bound(func, args, kwargs), op)

    def _on_kept(self, func: Any, arguments: dict[str, Any], op: Doubted) -> Any:
        inputs, outputs = iter(op.inputs), iter(op.outputs)
        axes = iter(op.into or [None] * len(op.outputs))

        def smaller(tensor: Tensor) -> Tensor:
            return taken(tensor, [kept(dim, self._keep) for dim in next(inputs)])

        def larger(tensor: Tensor) -> Tensor:
            if (axis := next(axes)) is not None:
                tensor = kept(axis, self._keep).nonzero().flatten().to(tensor.device)[tensor]
            return _put(tensor, [kept(dim, self._keep) for dim in next(outputs)])

        less = {name: tree_map_only(Tensor, smaller, value) for name, value in arguments.items()}
        counts = {name: int(stays.sum()) for name, stays in self._keep.items()}
        less.update(_sizes(op, less, counts))
        return tree_map_only(Tensor, larger, func(**less))


def _cut(op: Doubted, keep: Mapping[str, Tensor]) -> bool:
    return any(not bool(kept(dim, keep).all()) for dims in (*op.inputs, *op.outputs) for dim in dims)


def _sizes(op: Doubted, arguments: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """The sizes that an op is told beside its tensors, for what is kept."""
    x = next(iter(tensors_in(list(arguments.values()))))
    if "normalized_shape" in arguments:
        return {"normalized_shape": list(x.shape[-len(arguments["normalized_shape"]) :])}
    if op.name == "native_group_norm":
        groups = size(op.outputs[1][1], counts)
        return {"N": x.shape[0], "C": x.shape[1], "HxW": x[0, 0].numel(), "group": groups}
    return {}


def taken(tensor: Tensor, keeps: Sequence[Tensor]) -> Tensor:
    """The entries of `tensor` that bool `keeps`, one for each axis, mark; itself where all are marked."""
    for axis, stays in enumerate(keeps):
        if not bool(stays.all()):
            tensor = tensor.index_select(axis, stays.nonzero().flatten().to(tensor.device))
    return tensor


def _put(tensor: Tensor, keeps: Sequence[Tensor]) -> Tensor:
    for axis, stays in enumerate(keeps):
        if not bool(stays.all()):
            shape = (*tensor.shape[:axis], len(stays), *tensor.shape[axis + 1 :])
            where = stays.nonzero().flatten().to(tensor.device)
            tensor = tensor.new_zeros(shape).index_copy(axis, where, tensor)
    return tensor
