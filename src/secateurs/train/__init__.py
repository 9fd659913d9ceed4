"""Pruners that live inside a training loop, and what they share: masks and the choice of weights."""

from __future__ import annotations

from .gates import Gated, GatePruner
from .gradual_units import GradualUnits
from .granet import SET, GraNet, RigL
from .magnitude import GlobalMagnitude, GradualMagnitude
from .masking import Masks
from .pdp import PDP
from .pruner import Pruner
from .random_sparse import RandomSparse, ranked_densities
from .regrowth import Grow, Prolonged, Regrowth, Share
from .regularize import slimming_penalty, soft_filter_step
from .sam import SAM, statistics_kept
from .scope import canonical_names, prunable_weights
from .sr_ste import SRSTE
from .update import Drawn, Moment, Ranked, Regrowing, Rule

__all__ = [
    "PDP",
    "SAM",
    "SET",
    "SRSTE",
    "Drawn",
    "GatePruner",
    "Gated",
    "GlobalMagnitude",
    "GraNet",
    "GradualMagnitude",
    "GradualUnits",
    "Grow",
    "Masks",
    "Moment",
    "Prolonged",
    "Pruner",
    "RandomSparse",
    "Ranked",
    "Regrowing",
    "Regrowth",
    "RigL",
    "Rule",
    "Share",
    "canonical_names",
    "prunable_weights",
    "ranked_densities",
    "slimming_penalty",
    "soft_filter_step",
    "statistics_kept",
]
