"""What came of a pruning run: as data, as a sentence, as text and as one self-contained page."""

from __future__ import annotations

from .data import (
    FrontPoint,
    FrozenWidth,
    GroupChange,
    LatencySummary,
    LayerChange,
    Recovery,
    Report,
    Scores,
    Side,
    Speedup,
)
from .runtime import RuntimeLayer, RuntimeSummary

__all__ = [
    "FrontPoint",
    "FrozenWidth",
    "GroupChange",
    "LatencySummary",
    "LayerChange",
    "Recovery",
    "Report",
    "RuntimeLayer",
    "RuntimeSummary",
    "Scores",
    "Side",
    "Speedup",
]
