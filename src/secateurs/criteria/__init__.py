"""Criteria: how much a unit matters. Importing this package registers those that come with it."""

from __future__ import annotations

from ..core.moments import Moments
from . import (  # noqa: F401
    activation,
    block_influence,
    curvature,
    flow,
    fluctuation,
    frequency,
    gradient,
    magnitude,
    neurons,
    norm_layer,
    random,
    reap,
)
from .evidence import gradients, observe, observing
from .face import score
from .lifting import Lift
from .preserve import preserved
from .registry import Criterion, criteria, criterion, elementwise, get_criterion

__all__ = [
    "Criterion",
    "Lift",
    "Moments",
    "criteria",
    "criterion",
    "elementwise",
    "get_criterion",
    "gradients",
    "observe",
    "observing",
    "preserved",
    "score",
]
