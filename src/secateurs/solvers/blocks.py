"""The blocks of a model, and forward passes that pause before each of them.

A transformer is a list of blocks with code between them: masks, positions, caches, an encoder that feeds a decoder.
That code is the model's own and changes with each release of its library, so none of it is written here. Each batch
runs through the model's real forward in a thread of its own, which stops whenever a block is called and hands over the
real arguments. All passes stand before the same block; once it is solved they are given its outputs and go on to the
next. One thread runs at a time, so that nothing depends on their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from ..core.batch import Call, call, device_of, move, run, split
from ..core.errors import DataError, ModelError
from .gram import solvable

__all__ = ["Visit", "block_of", "blocks_of", "walk", "weight_of", "without_cache"]

Visit = Callable[[str, nn.Module, list[Call]], list[Any]]


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the blocks of `model`: what its outermost lists of composite modules hold, in the order written.

    A list counts if each of its members holds layers that can be solved; a Sequential must be of one class, too, so
    that a stem is no block. A model without such a list is one block, called "".

    >>> blocks_of(nn.ModuleDict({"head": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])}))
    ['layers.0']
    """
    return list(_blocks(model, "")) or [""]


def block_of(name: str, blocks: Iterable[str]) -> str | None:
    """Of the blocks the one in which the module or parameter called `name` lies, or which it is; None for none."""
    return next((block for block in blocks if not block or name == block or name.startswith(f"{block}.")), None)


def weight_of(layer: str) -> str:
    """The name of the weight of the module called `layer`."""
    return f"{layer}.weight".lstrip(".")


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
    if _lists_blocks(module):
        yield from (name for name, _ in children)
        return
    for name, child in children:
        yield from _blocks(child, name)


def _lists_blocks(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
        return False
    children = list(module.children())
    alike = isinstance(module, nn.ModuleList) or (len(children) > 1 and len({type(c) for c in children}) == 1)
    return alike and all(_composite(child) for child in children)


def _composite(module: nn.Module) -> bool:
    return not solvable(module) and any(solvable(inner) for inner in module.modules())


def walk(model: nn.Module, data: Iterable[Any], names: Sequence[str], visit: Visit) -> None:
    """Calls `visit(name, block, calls)` once for each block, in the order in which the forward passes reach them.

    `visit` returns the block's outputs, one for each call, with which the passes go on: of the block as it was, or as
    it is by then. Nothing that comes after the last block is run. A block that a pass reaches again, since it is
    shared, is run as it is by then.

    Args:
        model: in evaluation mode; what is not in a block is run without gradients.
        data: batches as in `core.batch`; labels are not needed.
        names: of the blocks; "" for the model itself.
        visit: may change the block.

    Raises:
        DataError: there is no batch.
        ModelError: the model fails on a batch, or the passes do not reach the same blocks, or never reach one.
    """
    device = device_of(model)
    # A model whose weights come and go has its first ones on meta, and its inputs where they are.
    inputs = [split(batch)[0] if device.type == "meta" else move(split(batch)[0], device) for batch in data]
    if not inputs:
        raise DataError("the calibration data is empty: at least one batch is needed.")
    with without_cache(model):
        if list(names) == [""]:
            visit("", model, [_as_call(one) for one in inputs])
        else:
            _walk(model, inputs, names, visit)


def _walk(model: nn.Module, inputs: Sequence[Any], names: Sequence[str], visit: Visit) -> None:
    left = set(names)
    with _paused(model, inputs, names) as passes:
        for one in passes:
            one.go_on()
        while left and not all(one.done for one in passes):
            name, calls = _standing(passes)
            block = model.get_submodule(name)
            if name in left:
                outputs = visit(name, block, calls)
                left.discard(name)
            else:
                with torch.no_grad():
                    outputs = [call(block, given) for given in calls]
            # The calls hold activations that nobody needs any more.
            del calls
            if left:
                for one, output in zip(passes, outputs, strict=True):
                    one.go_on(output)
    if left:
        some = ", ".join(sorted(left)[:3])
        raise ModelError(
            f"the forward passes never reach {some}, so there is nothing to solve by: give other calibration data, or "
            "leave these blocks out with ignore=."
        )


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, models of Hugging Face keep no keys and values: a block run twice would add its own twice."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _as_call(inputs: Any) -> Call:
    if isinstance(inputs, Call):
        return inputs
    if hasattr(inputs, "keys"):
        return Call((), dict(inputs))
    return Call(inputs if isinstance(inputs, tuple) else (inputs,), {})


def _standing(passes: Sequence[_Pass]) -> tuple[str, list[Call]]:
    """The block before which all passes stand, and what it is given."""
    places = {"the end" if one.done else one.place for one in passes}
    if len(places) > 1:
        raise ModelError(
            f"the batches take different ways through the model: some stand before {', '.join(sorted(places))}; give "
            "batches that do not, or fewer of them."
        )
    return passes[0].place, [one.given for one in passes]


@contextmanager
def _paused(model: nn.Module, inputs: Sequence[Any], names: Sequence[str]) -> Iterator[list[_Pass]]:
    """Passes of all inputs that have not begun; on leaving they are ended, and the model is as it was."""
    passes = [_Pass(model, one) for one in inputs]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_stopping(model.get_submodule(name), name))
        for one in passes:
            stack.callback(one.end)
        yield passes


@contextmanager
def _stopping(block: nn.Module, name: str) -> Iterator[None]:
    """Inside, a call of the block in the thread of a pass is handed over; elsewhere it is what it always was."""
    own, before = block.forward, vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        here = getattr(_HERE, "value", None)
        return own(*args, **kwargs) if here is None else here.hand_over(name, Call(args, kwargs))

    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


_HERE = threading.local()


class _Ended(BaseException):
    """Unwinds the thread of a pass that is not wanted any more; no `except Exception` of a model stops it."""


@dataclass(frozen=True, eq=False)
class _Arrival:
    """Where a pass got to: before a block with its arguments, or to its end, perhaps by an error."""

    place: str = ""
    given: Call | None = None
    error: BaseException | None = None


class _Pass:
    """One forward pass, in a thread that runs only while `go_on` waits for it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._to_pass: SimpleQueue[Any] = SimpleQueue()
        self._to_driver: SimpleQueue[_Arrival] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model, inputs), daemon=True)
        self._now = _Arrival()
        self.done = False

    @property
    def place(self) -> str:
        """The block before which it stands."""
        return self._now.place

    @property
    def given(self) -> Call:
        """What that block is called with."""
        assert self._now.given is not None
        return self._now.given

    def go_on(self, output: Any = None) -> None:
        """None; the pass has run to the next block or to its end, given the output of the block it stood before.

        Raises:
            Exception: what the model's code raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._to_pass.put(output)
        self._now = self._to_driver.get()
        self.done = self._now.given is None
        if self._now.error is not None:
            raise self._now.error

    def end(self) -> None:
        """None; the thread is gone."""
        if self._thread.ident is not None:
            self._to_pass.put(_Ended)
            self._thread.join()
            self._now = _Arrival()

    def hand_over(self, name: str, given: Call) -> Any:
        """The block's output, once the driver has it; called in the thread."""
        self._to_driver.put(_Arrival(name, given))
        # Else the thread would hold the activations that it handed over until the next block.
        del given
        output = self._to_pass.get()
        if output is _Ended:
            raise _Ended
        return output

    def _run(self, model: nn.Module, inputs: Any) -> None:
        _HERE.value = self
        error: BaseException | None = None
        try:
            # Gradient mode belongs to a thread.
            with torch.no_grad():
                run(model, inputs)
        except _Ended:
            return
        except BaseException as raised:  # noqa: BLE001
            # Whatever it is, it is raised again where the driver waits.
            error = raised
        self._to_driver.put(_Arrival(error=error))
