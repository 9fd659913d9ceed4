"""What layer-wise methods say that they take, against what their tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateurs.core.budget import Pattern
from secateurs.core.comparison import Comparison
from secateurs.in_layers import Inputs, Subject
from secateurs.methods.language.alps import Alps
from secateurs.methods.language.dsnot import DSnoT
from secateurs.methods.language.exact_obs import ExactOBS
from secateurs.methods.language.l_admm import LAdmm
from secateurs.methods.language.ria import Ria
from secateurs.methods.language.sparsegpt import SparseGPT
from secateurs.methods.language.wanda import Wanda
from secateurs.solvers import Gram
from tests.solvers.matrices import Largest

# Each with rows and columns at which its time is short and its figures matter: many weights, or a large Hessian.
CASES: dict[str, tuple[Any, int, int]] = {
    "wanda": (Wanda(), 8192, 512),
    "wanda, obs": (Wanda(update="obs"), 8192, 512),
    "wanda, admm": (Wanda(update="admm"), 4096, 256),
    "wanda, least-squares": (Wanda(update="least-squares"), 64, 512),
    "ria": (Ria(), 8192, 512),
    "dsnot": (DSnoT(), 4096, 256),
    "sparsegpt": (SparseGPT(), 8192, 512),
    "sparsegpt, wide": (SparseGPT(), 8, 2048),
    "l-admm": (LAdmm(iterations=2, refreshes=2), 4096, 256),
    "l-admm, wide": (LAdmm(iterations=2, refreshes=2), 8, 1024),
    "alps": (Alps(iterations=6), 4096, 256),
    "alps, wide": (Alps(iterations=6), 8, 1024),
    "exact-obs": (ExactOBS(), 64, 256),
}


@pytest.mark.parametrize("name", CASES)
def test_a_solver_takes_no_more_than_it_says(name: str) -> None:
    options, rows, columns = CASES[name]
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    gram = Gram(full=options.solver.full, dtype=torch.float32)
    gram.add(nn.Linear(columns, 1, device="meta"), torch.randn(2 * columns, columns))
    hessian = gram.hessian[0] if options.solver.full else None
    inputs = Inputs(gram.mean[0], gram.variance[0], gram.norm[0], hessian)
    known = weight.nbytes + (0 if hessian is None else hessian.nbytes)
    with Largest() as seen:
        options.solver.solve(Subject(weight, inputs, Comparison.of(Pattern(2, 4)), name))
    said = options.solver.workspace.bytes(rows * columns, columns)
    assert seen.most - known <= said
