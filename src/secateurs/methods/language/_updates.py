"""What may be done to the weights that stay, once a mask is chosen: any criterion goes with any of these."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...in_layers import Subject, Workspace
from ...solvers import Solved, admm, least_squares, sparsegpt

__all__ = ["UPDATES", "WORKSPACES", "Update", "updated"]

Update = Literal["none", "obs", "admm", "least-squares"]
UPDATES: tuple[Update, ...] = ("none", "obs", "admm", "least-squares")
WORKSPACES: dict[Update, Workspace] = {
    "none": Workspace(),
    "obs": Workspace(weight=16, product=1),
    "admm": Workspace(weight=60, product=24),
    "least-squares": Workspace(weight=24, product=24, fixed=448 * 2**20),
}


def updated(subject: Subject, mask: Tensor, how: Update) -> Solved:
    """The matrix with `mask`, and what stays of it moved to make up for what goes.

    Args:
        mask: bool [rows, columns], what stays.
        how: "none"; "obs", one sweep of SparseGPT; "admm", L-ADMM; "least-squares", the exact optimum, row by row.
    """
    weight, where = subject.weight, subject.where
    match how:
        case "obs":
            return sparsegpt(weight, subject.inputs.known_hessian, mask=mask, where=where, in_place=True)
        case "admm":
            return admm(weight, subject.inputs.known_hessian, None, mask=mask, where=where)
        case "least-squares":
            return Solved(least_squares(weight, subject.inputs.known_hessian, mask, where=where), mask)
    return Solved(weight * mask, mask)
