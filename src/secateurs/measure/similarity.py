"""How alike two networks see the same samples: linear centred kernel alignment of their outputs or features.

With the columns of X [samples, p] and Y [samples, q] centred (Kornblith et al., ICML 2019, arXiv 1905.00414),

    CKA = ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖)          of features, Frobenius norms
        = ⟨K, L⟩ / (‖K‖·‖L‖)              of Gram matrices K = XXᵀ, L = YYᵀ, centred on both sides

It is 1 for equal networks and does not see rotations, scales and shifts. With few samples against many features it is
too large; the debiased form replaces the three inner products by their unbiased estimates (Song et al., JMLR 2012; used
so by Nguyen, Raghu and Kornblith, arXiv 2010.15327). Two networks that are both wrong in the same way are alike, too:
read it beside their error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.batch import double, main_output, split
from ..core.errors import DataError, OptionError
from ._run import batches, evaluating, forward

__all__ = ["Form", "Similarity", "linear_cka", "output_similarity"]

Form = Literal["auto", "features", "gram"]
# Constant outputs leave rounding errors of float64 when centred; real outputs vary by far more than this share.
_CONSTANT = 1e-24


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False, form: Form = "auto") -> float:
    """Linear CKA of two representations of the same samples: in [0, 1], debiased in about [-1, 1].

    Args:
        x, y: [samples, …], what follows the first axis is flattened; computed in float64.
        debiased: with unbiased inner products; needs four samples.
        form: "features" costs samples·features², "gram" samples²·features; "auto" takes the cheaper one. Both give the
            same number.

    Raises:
        DataError: unequal or too few samples, or outputs that do not vary: 0/0.
        OptionError: an unknown form.
    """
    if form not in ("auto", "features", "gram"):
        raise OptionError(f"form must be auto, features or gram, got {form!r}.")
    x, y = _rows(x, y)
    _enough(len(x), debiased)
    if form == "features" or (form == "auto" and len(x) >= max(x.shape[1], y.shape[1])):
        seen = Similarity(debiased=debiased)
        seen.add(x, y)
        return seen.value
    x, y = (_centred(matrix, what) for matrix, what in ((x, "first"), (y, "second")))
    return _quotient(*_gram_products(x @ x.T, y @ y.T, debiased))


def output_similarity(
    first: nn.Module,
    second: nn.Module,
    data: Iterable[Any],
    *,
    softmax: bool = False,
    debiased: bool = False,
    limit: int | None = None,
) -> float:
    """Linear CKA of the outputs of two models over `data`, one batch at a time.

    Args:
        first, second: run in evaluation mode; compared are `.logits`, else the first floating-point output. Its first
            axis is that of the samples; of three axes the first two, since a token is a sample.
        data: batches; targets are not used.
        softmax: compare probabilities over the last axis (axis 1 of four or more) instead of logits.
        debiased: see `linear_cka`.
        limit: at most so many batches (101 in the code of arXiv 2305.18383).

    Raises:
        DataError: no data, too few samples, outputs of unequal shape or that do not vary.
        ModelError: a forward pass fails.
    """
    seen = Similarity(debiased=debiased)
    with evaluating(first), evaluating(second), torch.no_grad():
        for batch in islice(batches(data, "data"), limit):
            seen.add(*(_answers(forward(model, split(batch)[0]), softmax) for model in (first, second)))
    return seen.value


def _answers(output: Any, softmax: bool) -> Tensor:
    found = main_output(output).detach()
    if softmax:
        found = found.float().softmax(-1 if found.dim() <= 3 else 1)
    return found.flatten(0, 1) if found.dim() == 3 else found.flatten(1)


class Similarity:
    """Linear CKA over batches of the same samples: `add` each, then read `value`.

    Kept are sums of products of features in float64, about (p + q)² numbers. They are taken about the first batch's
    mean, so that a large common offset costs no digits.

    Args:
        debiased: see `linear_cka`.
    """

    def __init__(self, *, debiased: bool = False) -> None:
        self._debiased = debiased
        self._samples = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._square = [0.0, 0.0]
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """None; one batch: two tensors [samples, …] of what both say about the same samples.

        Raises:
            DataError: unequal numbers of samples, or other features than before.
        """
        x, y = _rows(x, y)
        if self._shift is None:
            self._shift = (x.mean(0), y.mean(0))
        if (x.shape[1], y.shape[1]) != tuple(len(shift) for shift in self._shift):
            raise DataError(
                f"a batch has {x.shape[1]} and {y.shape[1]} features, the first one had {len(self._shift[0])} and "
                f"{len(self._shift[1])}: all batches need as many."
            )
        self._samples += len(x)
        for place, matrix in enumerate((x, y)):
            self._square[place] += matrix.square().sum().item()
        x, y = x - self._shift[0], y - self._shift[1]
        for name, part in _moments(x, y).items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    @property
    def value(self) -> float:
        """CKA of all samples so far.

        Raises:
            DataError: too few samples, or outputs that do not vary.
        """
        _enough(self._samples, self._debiased)
        for place, what in enumerate(("first", "second")):
            _varying(self._scatter(what[0] * 2).trace().item(), self._square[place], what)
        product = self._unbiased if self._debiased else self._biased
        return _quotient(*(product(pair) for pair in ("fs", "ff", "ss")))

    def _scatter(self, pair: str) -> Tensor:
        """Σ (u - ū)(v - v̄)ᵀ."""
        u, v = pair[0], pair[1]
        return self._sums[pair] - torch.outer(self._sums[u], self._sums[v]) / self._samples

    def _biased(self, pair: str) -> float:
        return self._scatter(pair).square().sum().item()

    def _unbiased(self, pair: str) -> float:
        """The estimate of `_gram_products` from sums: K and L without their diagonals, k_i and l_i."""
        u, v = pair[0], pair[1]
        s, cross = self._sums, self._sums[pair]
        diagonals = s[f"{u}²{v}²"]
        both = cross.square().sum() - diagonals
        one, other = s[u].square().sum() - s[f"{u}²"], s[v].square().sum() - s[f"{v}²"]
        rows = s[u] @ cross @ s[v] - s[u] @ s[f"{u}{v}²"] - s[v] @ s[f"{v}{u}²"] + diagonals
        return _estimate(self._samples, both.item(), one.item(), other.item(), rows.item())


def _moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Sums over samples, named by what is multiplied: f and s for a row of the first and second matrix, ² its norm."""
    k, lengths = x.square().sum(1), y.square().sum(1)
    return {
        "f": x.sum(0), "s": y.sum(0), "f²": k.sum(), "s²": lengths.sum(),
        "fs": x.T @ y, "ff": x.T @ x, "ss": y.T @ y,
        "ff²": x.T @ k, "fs²": x.T @ lengths, "sf²": y.T @ k, "ss²": y.T @ lengths,
        "f²s²": k @ lengths, "f²f²": k @ k, "s²s²": lengths @ lengths,
    }  # fmt: skip


def _gram_products(k: Tensor, m: Tensor, debiased: bool) -> tuple[float, float, float]:
    pairs = ((k, m), (k, k), (m, m))
    if not debiased:
        xy, xx, yy = ((a * b).sum().item() for a, b in pairs)
        return xy, xx, yy
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    xy, xx, yy = (
        _estimate(len(k), (a * b).sum().item(), a.sum().item(), b.sum().item(), (a.sum(0) @ b.sum(0)).item())
        for a, b in pairs
    )
    return xy, xx, yy


def _estimate(n: int, both: float, one: float, other: float, rows: float) -> float:
    """n(n-3) times the unbiased HSIC (Song et al. 2012, eq. 5): tr KL + 1ᵀK1·1ᵀL1/((n-1)(n-2)) - 2·1ᵀKL1/(n-2)."""
    return both + one * other / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def _quotient(xy: float, xx: float, yy: float) -> float:
    if xx <= 0 or yy <= 0:
        raise DataError("the debiased variance of the outputs is not positive: there are too few samples to compare.")
    return xy / math.sqrt(xx * yy)


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() < 2 or y.dim() < 2 or len(x) != len(y):
        raise DataError(
            f"two representations need an equal number of samples along the first of two or more axes, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    return double(x.detach()).flatten(1), double(y.detach()).flatten(1).to(double(x.detach()).device)


def _centred(matrix: Tensor, what: str) -> Tensor:
    found = matrix - matrix.mean(0)
    _varying(found.square().sum().item(), matrix.square().sum().item(), what)
    return found


def _varying(scatter: float, square: float, what: str) -> None:
    if not scatter > _CONSTANT * square:
        raise DataError(f"the outputs of the {what} network are the same for all samples, so likeness is 0/0.")


def _enough(samples: int, debiased: bool) -> None:
    needed = 4 if debiased else 2
    if samples < needed:
        raise DataError(f"likeness needs at least {needed} samples, got {samples}: give more data.")
