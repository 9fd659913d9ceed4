"""What a sparse runtime made of a pruned model, as a part of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .codec import settle

__all__ = ["RuntimeLayer", "RuntimeSummary"]


@dataclass(frozen=True)
class RuntimeLayer:
    """The form in which one layer runs.

    Args:
        name: qualified name.
        format: "dense" for the layer as it was, else as "csr".
        shape: of its weight as a matrix, outputs first.
        density: the share of its weights that are not zero.
        dense_seconds, seconds: of the dense form and of the one chosen in one pass; None if not timed.
        reason: why it stays dense; empty where it does not.
    """

    name: str
    format: str
    shape: tuple[int, ...] = ()
    density: float = 1.0
    dense_seconds: float | None = None
    seconds: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class RuntimeSummary:
    """A pruned model in its sparse runtime, beside the dense one.

    Args:
        verdict: one sentence: how much faster it is or, if it is not, why.
        seconds: median of one pass by contestant, taken in turn: "dense", "sparse", perhaps "onnxruntime".
        speedup: how many times faster than dense, side by side: median, 10th and 90th percentile; None if not timed.
        batch: number of samples; None if unknown.
        layers: those that have sparse forms, in the model's order.
    """

    verdict: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    speedup: tuple[float, float, float] | None = None
    batch: int | None = None
    layers: tuple[RuntimeLayer, ...] = ()

    def __post_init__(self) -> None:
        settle(self)

    @property
    def changed(self) -> tuple[RuntimeLayer, ...]:
        """The layers that do not run dense."""
        return tuple(layer for layer in self.layers if layer.format != "dense")
