"""secateurs prunes PyTorch models: smaller and faster on real hardware, with proof.

import secateurs as sec
cut = sec.prune(model, example_inputs, budget="macs<=50%")
cut.save("smaller")
"""

from .core.budget import Budget
from .core.errors import SecateursError
from .graph.plan import ModelPlan as Plan
from .planning import plan
from .pruning import FineTune, Pruned, load, prune
from .report.data import Report
from .train.magnitude import GlobalMagnitude, GradualMagnitude
from .train.random_sparse import RandomSparse

__all__ = [
    "Budget",
    "FineTune",
    "GlobalMagnitude",
    "GradualMagnitude",
    "Plan",
    "Pruned",
    "RandomSparse",
    "Report",
    "SecateursError",
    "load",
    "plan",
    "prune",
]
