"""Weight norm: what stays of a weight is what it was, in both forms, and no direction is divided by zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import secateurs as sec
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.lengths import adjusted, weight_norms
from secateurs.graph.twin import twin
from tests.graph.proof import prove_op

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "by output": lambda layer: parametrizations.weight_norm(layer, dim=0),
    "by the second axis": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "by the last axis": lambda layer: parametrizations.weight_norm(layer, dim=3),
    "one length": lambda layer: parametrizations.weight_norm(layer, dim=None),
}


def net(way: Callable[[nn.Module], nn.Module], groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=groups), nn.ReLU()]
    first, second = way(layers[0]), way(layers[2])
    with torch.no_grad():
        for layer in (first, second) if way is not parametrizations.spectral_norm else ():
            layer.parametrizations.weight.original0.mul_(1.5)
    return nn.Sequential(first, layers[1], second, layers[3], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def plain(model: nn.Module) -> Any:
    """A copy with ordinary weights."""
    other = twin(model, {})
    for module in other.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return other


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_cut_weight_is_a_part_of_the_whole_one(way: str, data: st.DataObject) -> None:
    model = net(WAYS[way])
    structure = infer(model, IMAGES)
    assert structure.sizes == {"0": 12, "2": 8}
    keep = {
        name: torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any), name))
        for name, n in structure.sizes.items()
    }
    masked, smaller = mask(model, structure.groups, keep), cut(model, structure, keep)
    assert prove(masked, smaller, IMAGES) < 1e-5
    whole = model[2].weight[keep["2"]][:, keep["0"]]
    torch.testing.assert_close(smaller[2].weight, whole)
    torch.testing.assert_close(masked[2].weight[keep["2"]][:, keep["0"]], whole)
    assert not masked[2].weight[~keep["2"]].any()
    assert (smaller[0].out_channels, smaller[2].in_channels) == (int(keep["0"].sum()),) * 2
    # As if there had been no weight norm.
    other = plain(model)
    expected = cut(other, infer(other, IMAGES), keep)
    torch.testing.assert_close(smaller(IMAGES), expected(IMAGES))


def test_groups_of_a_convolution_go() -> None:
    model = net(WAYS["by the last axis"], groups=4)
    assert sec.prune(model, IMAGES, "params<=60%").model[2].groups < 4


def test_where_nothing_goes_a_length_stays() -> None:
    model = net(WAYS["by output"])
    structure = infer(model, IMAGES)
    assert adjusted(model, lambda _, whole: whole) == {}
    same = cut(model, structure, {"2": torch.ones(8, dtype=torch.bool)})
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in model.state_dict().items())


def test_lengths_speak_for_their_directions() -> None:
    """Zeros in a direction would be divided by, and its size says nothing."""
    model = net(WAYS["by output"])
    first, second = infer(model, IMAGES).groups
    assert {"0.parametrizations.weight.original0", "0.bias"} < set(first.tensors)
    assert "0.parametrizations.weight.original1" not in first.tensors
    assert [(m.axis, m.role) for m in first.members if m.tensor == "2.parametrizations.weight.original1"] == [(1, "in")]
    assert second.name == "2"
    assert [norm.axis for norm in weight_norms(model)] == [0, 0]


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_channels_are_scored_by_their_lengths(criterion: str) -> None:
    model = net(WAYS["by output"])
    with torch.no_grad():
        model[0].parametrizations.weight.original0[3] *= 1e-3
        model[0].parametrizations.weight.original1[3] *= 1e3
        model[0].bias[3] *= 1e-3
    data = [(IMAGES, torch.tensor([0, 1]))]
    plan = sec.plan(model, IMAGES, "params<=80%", criterion=criterion, data=data, scope="0")
    assert int(plan.scores["0"].argmin()) == 3
    assert not plan.keep["0"][3]


def test_the_rule() -> None:
    def normed(direction: Tensor, length: Tensor, x: Tensor) -> Tensor:
        return x @ torch._weight_norm(direction, length, 0).T

    torch.manual_seed(0)
    inputs = [torch.randn(5, 7), torch.rand(5, 1) + 0.5, torch.randn(3, 7)]
    run = prove_op(normed, inputs, [False, True, False])
    assert 5 in run.live().values()
    # Of the other axis some entries being zero is the same as their being gone.
    assert 7 in prove_op(normed, inputs, [True, False, False]).live().values()


def test_spectral_norm_goes_with_its_vectors() -> None:
    model = net(parametrizations.spectral_norm).eval()
    pruned = sec.prune(model, IMAGES, "params<=50%").model
    made = pruned[2].parametrizations.weight[0]
    assert made._u.shape == (pruned[2].out_channels,)
    assert made._v.shape == (pruned[2].in_channels * 9,)
    pruned.train()(IMAGES).sum().backward()
    assert pruned[2].parametrizations.weight.original.grad is not None
