"""Small models, groups made by hand, and a full account of a model's state."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.core.depth import LayerGroup
from secateurs.core.dims import Atom, Dim, Fixed, product
from secateurs.core.units import ChannelGroup, Member, WeightGroup


def mlp(
    *widths: int, bias: bool = False, activation: type[nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """Linear layers of the given widths, named 0, 2, 4 … with activations between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=bias)] + [activation()] * (i < len(widths) - 2)
    return nn.Sequential(*layers).to(dtype)


class ConvNet(nn.Module):
    """conv(2→4) – norm – relu – conv(4→3) – pool – flatten – linear(12→5), with dropout before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 3, stride=2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(12, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.last(self.drop(x.flatten(1)))


def images(batches: int = 2, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches for `ConvNet`."""
    return [(torch.randn(size, 2, 6, 6), torch.randint(5, (size,))) for _ in range(batches)]


def vectors(
    *sizes: int, features: int, classes: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches of the given sizes for `mlp`."""
    return [(torch.randn(n, features, dtype=dtype), torch.randint(classes, (n,))) for n in sizes]


def member(tensor: str, axis: int, dim: Dim, rank: int, role: str = "out") -> Member:
    return Member(tensor, axis, dim, rank, role)  # type: ignore[arg-type]


def first_channels() -> ChannelGroup:
    """The four channels of `ConvNet.first` with all that carries them."""
    width = Atom("first", 4)
    norms = [member(f"norm.{n}", 0, width, 1) for n in ("weight", "bias", "running_mean", "running_var")]
    ends = member("first.weight", 0, width, 4), member("first.bias", 0, width, 1)
    return ChannelGroup("first", 4, "channel", (*ends, *norms, member("second.weight", 1, width, 4, "in")))


def second_channels() -> ChannelGroup:
    """The three channels of `ConvNet.second`, flattened with 2×2 pixels before `last`."""
    width = Atom("second", 3)
    into = member("last.weight", 1, product(width, Fixed(4)), 2, "in")
    return ChannelGroup("second", 3, "channel", (member("second.weight", 0, width, 4), into))


def layer_group(model: nn.Module, *blocks: str) -> LayerGroup:
    """The modules named as units, with all their parameters."""
    owned = (tuple(f"{block}.{name}" for name, _ in model.get_submodule(block).named_parameters()) for block in blocks)
    return LayerGroup("layers", "", blocks, tuple(owned))


def weight_groups(model: nn.Module) -> list[WeightGroup]:
    """One group of single weights for each parameter of two axes or more."""
    return [WeightGroup(n, tuple(p.shape)) for n, p in model.named_parameters() if p.dim() > 1]


def account(model: nn.Module) -> dict[str, Any]:
    """All that a criterion must leave as it was: values, identities, gradients, flags, hooks and the random state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = [len(table) for m in model.modules() for name, table in sorted(vars(m).items()) if name.endswith("_hooks")]
    return {
        "values": {name: (id(t), t.detach().clone().tolist()) for name, t in tensors.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.tolist()) for n, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "hooks": hooks,
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


def unruly(model: nn.Module) -> nn.Module:
    """`model` with mixed flags, some gradients, a frozen layer and a hook, so that restoring it is not trivial."""
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.grad = torch.randn_like(parameter)
    parameters[1].requires_grad_(False)
    model.train()
    list(model.modules())[2].eval()
    list(model.modules())[1].register_forward_hook(lambda module, args, output: None)
    return model
