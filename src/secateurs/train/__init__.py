"""Pruners that live inside a training loop, and what they share: masks and the choice of weights."""

from __future__ import annotations

from .magnitude import GlobalMagnitude, GradualMagnitude
from .masking import Masks
from .pruner import Pruner
from .random_sparse import RandomSparse, ranked_densities
from .regularize import slimming_penalty, soft_filter_step
from .scope import canonical_names, prunable_weights
from .update import Drawn, Moment, Ranked, Rule

__all__ = [
    "Drawn",
    "GlobalMagnitude",
    "GradualMagnitude",
    "Masks",
    "Moment",
    "Pruner",
    "RandomSparse",
    "Ranked",
    "Rule",
    "canonical_names",
    "prunable_weights",
    "ranked_densities",
    "slimming_penalty",
    "soft_filter_step",
]
