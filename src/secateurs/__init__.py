"""secateurs prunes PyTorch models: smaller and faster on real hardware, with proof.

import secateurs as sec
cut = sec.prune(model, example_inputs, budget="macs<=50%")
cut.save("smaller")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.budget import Budget
    from .core.errors import SecateursError
    from .graph.plan import ModelPlan as Plan
    from .inspection import inspect
    from .planning import plan
    from .pruning import FineTune, Pruned, load, prune
    from .report.data import Report
    from .report.inspection import Inspection
    from .train.granet import SET, GraNet, RigL
    from .train.magnitude import GlobalMagnitude, GradualMagnitude
    from .train.pdp import PDP
    from .train.random_sparse import RandomSparse
    from .train.sr_ste import SRSTE

__all__ = [
    "PDP",
    "SET",
    "SRSTE",
    "Budget",
    "FineTune",
    "GlobalMagnitude",
    "GraNet",
    "GradualMagnitude",
    "Inspection",
    "Plan",
    "Pruned",
    "RandomSparse",
    "Report",
    "RigL",
    "SecateursError",
    "inspect",
    "load",
    "plan",
    "prune",
]

# Where each name lives: it is imported when it is used, so that the command line answers before PyTorch is there.
_HOMES = {
    "Budget": "core.budget",
    "FineTune": "pruning",
    "GlobalMagnitude": "train.magnitude",
    "GraNet": "train.granet",
    "GradualMagnitude": "train.magnitude",
    "Inspection": "report.inspection",
    "PDP": "train.pdp",
    "Plan": "graph.plan",
    "Pruned": "pruning",
    "RandomSparse": "train.random_sparse",
    "Report": "report.data",
    "RigL": "train.granet",
    "SET": "train.granet",
    "SRSTE": "train.sr_ste",
    "SecateursError": "core.errors",
    "inspect": "inspection",
    "load": "pruning",
    "plan": "planning",
    "prune": "pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), "ModelPlan" if name == "Plan" else name)


def __dir__() -> list[str]:
    return list(__all__)
