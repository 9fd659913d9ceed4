"""Recurrent layers, unrolled step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .table import Attributes, op

__all__: list[str] = []

_FUNCTIONS = {"Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "Relu": torch.relu}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_State = tuple[Tensor, ...]
_Step = Callable[[Tensor, _State], _State]


@op("RNN", "GRU", "LSTM")
def recurrent(
    a: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Any = None, lengths: Any = None, h0: Any = None, *rest: Any
) -> tuple[Tensor, ...]:
    """All hidden states [steps, directions, batch, units], and the last of each direction."""
    direction = a.text("direction", "forward")
    if lengths is not None or a.get("layout", 0) or a.get("clip") or a.get("input_forget", 0) or any(rest[1:]):
        raise a.refuse(f"{a.op} with sequence lengths, batch-first layout, clipping, peepholes or tied gates")
    c0 = rest[0] if rest else None
    outputs, lasts = [], []
    for d in range(w.shape[0]):
        backwards = direction == "reverse" or d == 1
        bias = w.new_zeros(2 * w.shape[1]) if b is None else b[d]
        zeros = x.new_zeros(x.shape[1], r.shape[2])
        start = [zeros if s is None else s[d] for s in ((h0, c0) if a.op == "LSTM" else (h0,))]
        states = _unrolled(_step(a, d, w[d], r[d], bias), x.flip(0) if backwards else x, tuple(start))
        hidden = torch.stack([s[0] for s in states])
        outputs.append(hidden.flip(0) if backwards else hidden)
        lasts.append(states[-1])
    return torch.stack(outputs, 1), *(torch.stack(last) for last in zip(*lasts, strict=True))


def _unrolled(step: _Step, x: Tensor, state: _State) -> list[_State]:
    states = []
    for row in x.unbind(0):
        state = step(row, state)
        states.append(state)
    return states


def _step(a: Attributes, direction: int, w: Tensor, r: Tensor, bias: Tensor) -> _Step:
    """One step of one direction: from the input and the state to the next state."""
    names = a.get("activations") or _DEFAULTS[a.op] * 2
    own = names[direction * len(_DEFAULTS[a.op]) :][: len(_DEFAULTS[a.op])]
    if not set(own) <= set(_FUNCTIONS):
        raise a.refuse(f"{a.op} with the activations {', '.join(own)}")
    functions: list[Callable[[Tensor], Tensor]] = [_FUNCTIONS[n] for n in own]
    wb, rb = bias.chunk(2)
    if a.op == "RNN":
        return lambda x, s: (functions[0](x @ w.t() + s[0] @ r.t() + wb + rb),)
    if a.op == "LSTM":
        return lambda x, s: _lstm((x @ w.t() + s[0] @ r.t() + wb + rb).chunk(4, 1), s[1], functions)
    before = bool(a.get("linear_before_reset", 0))
    return lambda x, s: (_gru(x @ w.t() + wb, s[0], r, rb, functions, before),)


def _lstm(gates: tuple[Tensor, ...], cell: Tensor, functions: list[Callable[[Tensor], Tensor]]) -> _State:
    f, g, h = functions
    i, o, forget, c = gates
    cell = f(forget) * cell + f(i) * g(c)
    return f(o) * h(cell), cell


def _gru(
    x: Tensor, h: Tensor, r: Tensor, rb: Tensor, functions: list[Callable[[Tensor], Tensor]], before: bool
) -> Tensor:
    f, g = functions
    (xz, xr, xh), (rz, rr, rh), (bz, br, bh) = x.chunk(3, 1), r.chunk(3), rb.chunk(3)
    z, reset = f(xz + h @ rz.t() + bz), f(xr + h @ rr.t() + br)
    new = g(xh + reset * (h @ rh.t() + bh)) if before else g(xh + (reset * h) @ rh.t() + bh)
    return (1 - z) * new + z * h
