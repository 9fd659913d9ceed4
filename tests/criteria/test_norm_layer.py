from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.core.dims import Atom
from secateurs.core.errors import ModelError
from secateurs.core.units import ChannelGroup
from secateurs.criteria import score
from tests.criteria.models import ConvNet, first_channels, member, second_channels


def test_the_scale_is_the_score() -> None:
    model = ConvNet()
    model.norm.weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0])
    assert score("norm-scale", model, [first_channels()])["first"].tolist() == [0.5, 2.0, 0.0, 1.0]


def test_a_group_without_a_norm_is_named() -> None:
    text = r"group 'second' has no scale of a normalisation layer among its tensors \(second.weight, last.weight\)"
    with pytest.raises(ModelError, match=text):
        score("norm-scale", ConvNet(), [first_channels(), second_channels()])


class Shifted(nn.Module):
    """A norm of another library: its scale is one plus its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.BatchNorm1d(4), True),
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4, affine=True), True),
        (nn.GroupNorm(2, 4), True),
        (nn.LayerNorm(4), True),
        (nn.RMSNorm(4), True),
        (nn.PReLU(4), False),
        (Shifted(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scales_of_torch_norms_count(layer: nn.Module, known: bool) -> None:
    model = nn.ModuleDict({"lin": nn.Linear(3, 4), "after": layer})
    layer.weight.data = torch.tensor([1.0, -2.0, 3.0, 4.0])  # type: ignore[union-attr,operator]
    width = Atom("w", 4)
    group = ChannelGroup("w", 4, "channel", (member("lin.weight", 0, width, 2), member("after.weight", 0, width, 1)))
    if known:
        assert score("norm-scale", model, [group])["w"].tolist() == [1.0, 2.0, 3.0, 4.0]
    else:
        with pytest.raises(ModelError, match="group 'w' has no scale of a normalisation layer"):
            score("norm-scale", model, [group])


def test_norms_along_a_residual_stream_are_averaged() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
    model["a"].weight.data, model["b"].weight.data = torch.tensor([1.0, -4.0]), torch.tensor([3.0, 0.0])
    width = Atom("w", 2)
    group = ChannelGroup("w", 2, "channel", (member("a.weight", 0, width, 1), member("b.weight", 0, width, 1)))
    assert score("norm-scale", model, [group])["w"].tolist() == [2.0, 2.0]
    assert score("norm-scale", model, [group], combine="max")["w"].tolist() == [3.0, 4.0]
