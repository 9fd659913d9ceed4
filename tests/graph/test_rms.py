"""Norms over a width that is cut: found, told apart, and mended."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.errors import ModelError
from secateurs.graph.infer import infer
from secateurs.graph.rms import entangled, gain, norms_over, refuse_others, rescale


class Root(nn.Module):
    """A norm as model libraries write it; with `shift` its gain is 1 + weight."""

    def __init__(self, width: int, eps: float = 0.01, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon, self.shift = eps, shift

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return (self.shift + self.weight) * x * torch.rsqrt(variance + self.variance_epsilon)


class Block(nn.Module):
    """A residual stream of two contributions, with a norm before the second and one at the end."""

    def __init__(self, norm: type[nn.Module] = Root) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), norm(6), nn.Linear(6, 6)
        self.final, self.head = norm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.final(x + self.second(self.norm(x))))


X = torch.linspace(-1, 1, 8).view(2, 4)


def test_the_width_and_its_norms_are_found() -> None:
    model = Block()
    structure = infer(model, X, entangled=True)
    (wide,) = entangled(model, X, structure)
    assert wide.size == 6
    assert norms_over(structure, wide) == ("norm", "final")
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = infer(plain, X, entangled=True)
    assert entangled(plain, X, found) == ()
    assert norms_over(found, found.groups[0]) == ()


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_gain_of_a_norm_is_what_it_multiplies_by(shift: float) -> None:
    norm = Root(6, 1e-6, shift)
    found = gain(norm, 6)
    assert found is not None
    torch.testing.assert_close(found, (shift + norm.weight.detach()).double(), atol=1e-4, rtol=0)
    assert gain(nn.RMSNorm(6), 6) is not None


class Strange(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(5, 6), nn.Softmax(-1), Strange()])
def test_anything_else_has_none(module: nn.Module) -> None:
    assert gain(module, 6) is None


def test_others_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"norm \(LayerNorm\) normalises over the residual width and is no root-mean"):
        refuse_others(Block(nn.LayerNorm), ("norm",), 6)
    with pytest.raises(ModelError, match=r"norm \(RMSNorm\) has no weight of its own"):
        refuse_others(Block(lambda width: nn.RMSNorm(width, elementwise_affine=False)), ("norm",), 6)  # type: ignore
    refuse_others(Block(), ("norm", "final"), 6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_narrow_norm_gives_what_the_wide_one_gave(shift: float) -> None:
    wide = nn.ModuleDict({"norm": Root(8, 0.3, shift)}).double()
    stays = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    x = torch.randn(5, 8, dtype=torch.float64) * stays
    expected = wide["norm"](x).detach()
    rescale(wide, ("norm",), 8, 6)
    narrow = Root(6, wide["norm"].variance_epsilon, shift).double()
    with torch.no_grad():
        narrow.weight.copy_(wide["norm"].weight[stays])
    assert float((narrow(x[:, stays]).detach() - expected[:, stays]).abs().max()) < 1e-12
    assert narrow.variance_epsilon == pytest.approx(0.3 * 8 / 6)


def test_the_factor_of_a_quarter_less() -> None:
    model = nn.ModuleDict({"norm": nn.RMSNorm(4096, eps=1e-5)})
    rescale(model, ("norm",), 4096, 3072)
    assert model["norm"].weight.tolist()[:2] == pytest.approx([1.1547005] * 2)
    assert model["norm"].eps == pytest.approx(1e-5 * 4 / 3)
    assert math.sqrt(4096 / 3072) == pytest.approx(1.1547005)
