"""What the shape algebra finds in networks: units, the tensors that carry them, what is mended, what stays and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.dims import Fixed
from secateurs.core.errors import FileError, ModelError, OptionError, ProofError
from secateurs.graph.compact import on_kept
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.structure import Structure, fingerprint
from secateurs.graph.tracing import trace_model
from tests.graph import nets
from tests.graph.nets import check, drawn, random_keep
from tests.graph.oracle import components

images, tokens, rows = drawn(2, 3, 8, 8), drawn(2, 6, 8), drawn(2, 5)


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self._forward_function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._forward_function(self, *inputs, **named)


def conv(a: int, b: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, **options)


def between(layer: nn.Module, inner: int = 6, after: int | None = None) -> nn.Sequential:
    """A layer between two convolutions."""
    return nn.Sequential(conv(3, inner, 3, padding=1), layer, conv(after or inner, 4))


def kinds(structure: Structure) -> dict[str, tuple[str, int]]:
    return {g.name: (g.kind, g.size) for g in structure.groups}


def reasons(structure: Structure) -> list[str]:
    return [f.reason for f in structure.frozen if f.reason != "an axis of the model's output"]


def summed(width: int, function: Callable[[Tensor], Tensor]) -> Net:
    """The sum over a width of a function of it, which sees what zeroing leaves behind."""
    return Net(
        lambda m, x: m.head(function(m.up(x)).sum(1, keepdim=True)), up=nn.Linear(5, width), head=nn.Linear(1, 2)
    )


# Each: a network, its inputs, the groups it must have.
FOUND: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, tuple[str, int]]]] = {
    "concatenation with itself": (nets.CatWithItself, images, {"first": ("channel", 4)}),
    "flatten": (nets.LeNet, drawn(2, 2, 2, 2), {"conv": ("channel", 3)}),
    "shuffle": (nets.ChannelShuffle, images, {"first": ("channel", 2), "first#2": ("channel", 3)}),
    "nn.ChannelShuffle": (lambda: between(nn.ChannelShuffle(2)), images, {"0": ("channel", 2), "0#2": ("channel", 3)}),
    # The halves that `chunk` takes, and the two that a shuffle interleaves, shrink alike.
    "ShuffleNetV2": (
        nets.ShuffleUnit,
        images,
        {"stem": ("channel", 2), "branches.0.0": ("channel", 4), "branches.1.0": ("channel", 4)},
    ),
    "squeeze and excite": (nets.SqueezeExcite, images, {"conv": ("channel", 8), "reduce": ("channel", 3)}),
    "layer scale": (nets.LayerScale, rows, {"stem": ("channel", 6)}),
    "gated, fused": (lambda: nets.Gated(True), rows, {"up": ("channel", 7)}),
    "gated, two layers": (lambda: nets.Gated(False), rows, {"gate": ("channel", 7)}),
    "F.glu": (
        lambda: Net(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(5, 12), b=nn.Linear(6, 3)),
        rows,
        {"a": ("channel", 6)},
    ),
    "attention": (nets.Attention, drawn(2, 6, 12), {"q": ("head", 3)}),
    "fused attention kernel": (lambda: nets.Attention(fast=True), drawn(2, 6, 12), {"q": ("head", 3)}),
    "cross attention with a bias": (
        nets.CrossAttention,
        (drawn(2, 3, 8), drawn(2, 5, 8)),
        {"q": ("head", 4)},
    ),
    "fused qkv, 3 x heads": (lambda: nets.FusedQkv("3hd"), tokens, {"qkv": ("head", 2)}),
    "fused qkv, heads x 3": (lambda: nets.FusedQkv("h3d"), tokens, {"qkv": ("head", 2)}),
    "grouped queries, rotary": (nets.GroupedQuery, drawn(2, 6, 16), {"q": ("head", 2)}),
    "grouped queries, kernel": (lambda: nets.GroupedQuery(gqa=True), drawn(2, 6, 16), {"q": ("head", 2)}),
    "tied embeddings": (
        nets.TiedLanguageModel,
        torch.arange(10).view(2, 5),
        {"down": ("channel", 6), "up": ("channel", 9)},
    ),
    "shared layers": (nets.SelfShared, drawn(2, 4), {"stem": ("channel", 6), "first": ("channel", 5)}),
    "dense": (
        nets.Dense,
        images,
        {"stem": ("channel", 4), **{f"layers.{i}": ("channel", 3) for i in range(3)}},
    ),
    "a loop over a value": (
        nets.Loop,
        (drawn(2, 4), torch.tensor([2, 3])),
        {"stem": ("channel", 6)},
    ),
    "grouped convolution": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 12, 3, groups=4), nn.ReLU(), conv(12, 2)),
        images,
        {"0": ("channel", 4), "0#2": ("channel", 2), "1": ("channel", 3)},
    ),
    "depthwise with a multiplier": (
        lambda: nn.Sequential(conv(3, 4), conv(4, 12, 3, groups=4), nn.ReLU(), conv(12, 2)),
        images,
        {"0": ("channel", 4), "1": ("channel", 3)},
    ),
    "transposed grouped convolution": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(), conv(12, 2)),
        images,
        {"0": ("channel", 4), "0#2": ("channel", 2), "1": ("channel", 3)},
    ),
    "group norm": (lambda: between(nn.GroupNorm(3, 6)), images, {"0": ("channel", 3)}),
    "instance norm": (lambda: between(nn.InstanceNorm2d(6)), images, {"0": ("channel", 6)}),
    "instance norm, affine": (lambda: between(nn.InstanceNorm2d(6, affine=True)), images, {"0": ("channel", 6)}),
    "instance norm, tracking": (
        lambda: between(nn.InstanceNorm2d(6, track_running_stats=True)),
        images,
        {"0": ("channel", 6)},
    ),
    "batch norm without statistics": (
        lambda: between(nn.BatchNorm2d(6, track_running_stats=False)),
        images,
        {"0": ("channel", 6)},
    ),
    "PReLU": (lambda: between(nn.PReLU(6)), images, {"0": ("channel", 6)}),
    "pixel shuffle": (lambda: between(nn.PixelShuffle(2), 24, 6), images, {"0": ("channel", 6)}),
    "pixel unshuffle": (lambda: between(nn.PixelUnshuffle(2), 6, 24), images, {"0": ("channel", 6)}),
    "squeezed pixels": (
        lambda: Net(lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()), a=conv(3, 6), b=nn.Linear(6, 2)),
        images,
        {"a": ("channel", 6)},
    ),
    "parameters in a list": (
        lambda: Net(lambda m, x: x @ m.p[0] @ m.p[1], p=nn.ParameterList([torch.randn(5, 7), torch.randn(7, 2)])),
        rows,
        {"p": ("channel", 7)},
    ),
    "names that look like the notation": (
        lambda: Plus(),
        rows,
        {"layers.a+b": ("channel", 7)},
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2)),
        rows,
        {"0": ("channel", 6)},
    ),
    "nn.MultiheadAttention, weights unused": (
        lambda: Net(
            lambda m, x: m.b(m.m(x, x, x)[0]), m=nn.MultiheadAttention(8, 4, batch_first=True), b=nn.Linear(8, 2)
        ),
        tokens,
        {"m": ("head", 4), "m.out_proj": ("channel", 8)},
    ),
    "nn.TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 4, 16, batch_first=True),
        tokens,
        {"self_attn": ("head", 4), "linear1": ("channel", 16)},
    ),
    "nn.Transformer": (
        lambda: nn.Transformer(8, 4, 1, 1, 12, batch_first=True),
        (tokens, tokens),
        {
            "encoder.layers.0.self_attn": ("head", 4),
            "encoder.layers.0.linear1": ("channel", 12),
            "decoder.layers.0.self_attn": ("head", 4),
            "decoder.layers.0.multihead_attn": ("head", 4),
            "decoder.layers.0.linear1": ("channel", 12),
        },
    ),
    # Sizes held by the module are mended.
    "attribute": (nets.AttributeView, drawn(2, 4), {"first": ("channel", 12)}),
    "tuple and list": (nets.TupleView, drawn(2, 4), {"first": ("channel", 5), "first#2": ("channel", 9)}),
    "an assertion on a held size": (
        nets.Picky,
        drawn(2, 4),
        {"first": ("channel", 10), "second.linear": ("channel", 7)},
    ),
    "groups read from a shape": (lambda: nets.FunctionalConv(literal=False), images, {"stem": ("channel", 8)}),
    "an LSTM": (nets.Lstm, drawn(2, 4, 3), {"embed": ("channel", 6), "rnn": ("channel", 5), "up": ("channel", 8)}),
    "a GRU": (
        lambda: Net(
            lambda m, x: m.b(m.r(m.a(x))[0]), a=nn.Linear(8, 5), r=nn.GRU(5, 4, batch_first=True), b=nn.Linear(4, 2)
        ),
        tokens,
        {"a": ("channel", 5), "r": ("channel", 4)},
    ),
}


class Plus(nn.Module):
    """Layers whose names contain the operators of the notation of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a+b": nn.Linear(5, 7), "c·(d)": nn.Linear(7, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = F.relu(layer(x))
        return x


@pytest.mark.parametrize("name", FOUND)
def test_groups_are_found_and_cut(name: str) -> None:
    make, inputs, expected = FOUND[name]
    structure = check(make(), inputs)
    assert kinds(structure) == expected
    assert not structure.unknown


# Each: a network, its inputs, the start of the reason why nothing of it can go.
KEPT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a literal in F.conv2d": (
        nets.FunctionalConv,
        images,
        "a number in the code fixes its size: convolution in the model",
    ),
    "an insistence that nobody can mend": (
        lambda: nets.Picky(held=False),
        drawn(2, 4),
        "second does not run at another size: ValueError: I was promised 10 features",
    ),
    "groups of a functional norm": (
        lambda: Net(lambda m, x: m.b(F.group_norm(m.a(x), 4)), a=conv(3, 12), b=conv(12, 2)),
        images,
        "the model does not run at another size: RuntimeError: Expected number of channels in input to be divisible",
    ),
    "weights that Python chooses by value": (
        nets.Branching,
        torch.ones(2, 4),
        "right.weight did not run on these inputs, and Python decides by values what runs",
    ),
    "an op without a rule": (
        lambda: Net(lambda m, x: m.b(torch.linalg.qr(m.a(x))[0]), a=nn.Linear(5, 6), b=nn.Linear(2, 2)),
        rows,
        "linalg_qr has no rule, in the model",
    ),
    "an orthogonal weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2)),
        rows,
        "a part of an orthogonal weight is none",
    ),
    "a bilinear layer": (
        lambda: Net(lambda m, x: m.b(m.a(x), m.a(x)), a=nn.Linear(5, 6), b=nn.Bilinear(6, 6, 4)),
        rows,
        "_trilinear in b",
    ),
    "positions by number": (
        lambda: Net(lambda m, x: m.b(m.a(x)[:, 2, None]), a=nn.Linear(5, 6), b=nn.Linear(1, 2)),
        rows,
        "indexed at a fixed position: select in the model",
    ),
    "a range over the width": (
        lambda: Net(
            lambda m, x: m.b(m.a(x) + torch.arange(m.a(x).shape[1], device=x.device)),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 2),
        ),
        rows,
        "tied to a fixed axis: add in the model",
    ),
    "a plain tensor that no cut reaches": (
        lambda: Net(lambda m, x: m.b(m.a(x) * m.scale), a=nn.Linear(5, 6), b=nn.Linear(6, 2), scale=torch.ones(6)),
        rows,
        "tied to a fixed axis: mul in the model",
    ),
    "a mean by hand": (
        lambda: summed(6, lambda y: y / y.shape[1]),
        rows,
        "a factor computed from its size: div in the model",
    ),
    "a mean by a tensor": (
        lambda: summed(6, lambda y: y / torch.tensor(y.shape[1])),
        rows,
        "a factor computed from its size: div in the model",
    ),
    "a root of the width": (
        lambda: summed(6, lambda y: y * y.shape[1] ** -0.5),
        rows,
        "a factor computed from its size: mul in the model",
    ),
    "a full of the width": (
        lambda: summed(6, lambda y: y * torch.full((), y.shape[1] ** -0.5, device=y.device)),
        rows,
        "a factor computed from its size: full in the model",
    ),
    "a product with itself": (
        lambda: Net(
            lambda m, x: m.b((m.a(x).unsqueeze(2) * m.a(x).unsqueeze(1)).flatten(1)),
            a=nn.Linear(5, 3),
            b=nn.Linear(9, 2),
        ),
        rows,
        "it is flattened with itself",
    ),
    "an op more at this very size": (
        lambda: Net(
            lambda m, x: m.b((lambda y: y.tanh() if y.shape[1] == 6 else y)(m.a(x))),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 2),
        ),
        rows,
        "b does not run at another size: it calls t where it did not before",
    ),
    "an op more at the end": (
        lambda: Net(
            lambda m, x: (lambda y: m.b(y).tanh() if y.shape[1] == 6 else m.b(y))(m.a(x)),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 2),
        ),
        rows,
        "the model does not run at another size: it ends before it calls tanh",
    ),
    # Removing differs from zeroing.
    "softmax": (
        lambda: between(nn.Softmax(1)),
        images,
        "removing differs from zeroing: normalised over: _softmax in 1",
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        rows,
        "removing differs from zeroing: normalised over: native_layer_norm in 1",
    ),
    "mean": (
        lambda: summed(6, lambda y: y - y.mean(1, keepdim=True)),
        rows,
        "removing differs from zeroing: reduced over",
    ),
    "sum of something shifted": (
        lambda: summed(6, lambda y: y + 1),
        rows,
        "removing differs from zeroing: reduced over",
    ),
    "sum of something shifted by a tensor": (
        lambda: summed(6, lambda y: y + torch.ones(())),
        rows,
        "removing differs from zeroing: reduced over",
    ),
    "sum of something shifted in place": (
        lambda: summed(6, lambda y: (y.view(-1).add_(1), y)[1]),
        rows,
        "removing differs from zeroing: reduced over",
    ),
    "sum of sigmoids": (lambda: summed(6, torch.sigmoid), rows, "removing differs from zeroing: reduced over"),
    "sum of clamped": (lambda: summed(6, lambda y: y.clamp_max(-1)), rows, "removing differs from zeroing: reduced"),
    "sum of thresholded": (
        lambda: summed(6, lambda y: F.threshold(y, 0.1, 5.0)),
        rows,
        "removing differs from zeroing: reduced over",
    ),
    "sum of ones": (lambda: summed(6, lambda y: y**0), rows, "removing differs from zeroing: reduced over"),
    "division by zero": (
        lambda: Net(lambda m, x: m.b(m.a(x) / m.a(x).abs()), a=nn.Linear(5, 6), b=nn.Linear(6, 2)),
        rows,
        "removing differs from zeroing: undefined at zero: div in the model",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_understood_stays_with_its_reason(name: str) -> None:
    make, inputs, reason = KEPT[name]
    structure = infer(make(), inputs, entangled=False, record=False)
    assert structure.groups == ()
    assert any(r.startswith(reason) for r in reasons(structure)), reasons(structure)


def test_a_literal_view_freezes_its_width_only() -> None:
    x = torch.randn(2, 4)
    structure = check(nets.LiteralView(), x, structure=infer(nets.LiteralView(), x, record=False))
    assert kinds(structure) == {"mixing.0": ("channel", 6)}
    first = next(f for f in structure.frozen if f.tensor == "first.weight")
    assert (first.axis, first.size) == (0, 12)
    assert first.reason == "a number in the code fixes its size: view in the model"


def test_neutral_sums_go() -> None:
    for function in (torch.tanh, F.relu, lambda y: y.clamp(-1, 1), lambda y: y**2, lambda y: y * 3, F.gelu):
        assert kinds(check(summed(6, function), rows)) == {"up": ("channel", 6)}


def test_an_einsum_of_parameters_is_a_layer() -> None:
    net = Net(
        lambda m, x: torch.einsum("bh,ho->bo", F.relu(torch.einsum("bi,ih->bh", x, m.a)), m.b),
        a=nn.Parameter(torch.randn(5, 7)),
        b=nn.Parameter(torch.randn(7, 3)),
    )
    structure = infer(net, rows)
    (group,) = structure.groups
    assert (group.kind, group.size) == ("channel", 7)
    assert [(m.tensor, m.axis, m.role) for m in group.members] == [("a", 1, "out"), ("b", 0, "in")]


def test_attention_by_einsum() -> None:
    def attend(m: Net, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,mhd->bthd", x, w) for w in (m.q, m.k, m.v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
        return torch.einsum("bqhd,hdm->bqm", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), m.o)

    weights = {name: nn.Parameter(torch.randn(8, 3, 4)) for name in "qkv"}
    structure = check(Net(attend, **weights, o=nn.Parameter(torch.randn(3, 4, 8))), tokens)
    assert kinds(structure) == {"q": ("head", 3)}
    roles = {m.tensor: (m.axis, m.role) for m in structure.groups[0].members}
    assert roles == {"q": (1, "out"), "k": (1, "out"), "v": (1, "out"), "o": (0, "in")}


def test_a_kernel_that_only_a_real_run_reaches() -> None:
    """Python looks at a float, so the run is real and calls the fused kernel of the CPU."""

    class Gate(nets.Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.abs().max()) < 1e9 else x[..., :4]

    structure = check(Gate(fast=True), torch.randn(2, 6, 12))
    assert kinds(structure) == {"q": ("head", 3)}


def test_routing_by_values_is_rehearsed_on_the_same_route() -> None:
    """Experts that take rows by value: another size of the inner width must not change who gets what."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 8)
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            choice = self.router(x).argmax(-1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                chosen = (choice == number).nonzero().flatten()
                if len(chosen):
                    out = out.index_add(0, chosen, expert(x[chosen]))
            return out

    structure = check(Experts(), torch.randn(64, 5))
    assert kinds(structure) == {"experts.0.0": ("channel", 6), "experts.1.0": ("channel", 6)}


def test_decisions_on_values_behind_a_width_are_rehearsed_as_they_were() -> None:
    """The units that a rehearsal adds are zeros, so what Python reads is what it read before."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 2)
            for parameter in self.parameters():
                nn.init.constant_(parameter, -0.1 if parameter is self.down.weight else 0.1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(F.relu(self.up(x)))
            return y.tanh() if float(y.sum()) < 0 else y.sigmoid()

    structure = check(Deciding(), torch.ones(2, 5) * 9)
    assert kinds(structure) == {"up": ("channel", 6)}


def test_products_that_involve_no_free_width_cost_too() -> None:
    net = Net(
        lambda m, x: m.b(F.relu(m.a(x @ x.mT @ x))) * m.c(x[:, :1]),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 1),
        c=nn.Linear(1, 1),
    )
    structure = check(net, rows)
    assert structure.costs.total("macs") == 2 * 2 * 5 * 2 + 2 * 5 * 6 + 2 * 6 + 2


INTEGERS: dict[str, tuple[nn.Module, int, dict[str, int]]] = {
    "Conv2d": (conv(6, 5, 3), 5, {"in_channels": 4, "out_channels": 5, "groups": 1}),
    "depthwise": (conv(6, 6, 3, groups=6), 6, {"in_channels": 4, "out_channels": 4, "groups": 4}),
    "grouped": (conv(6, 12, 3, groups=6), 12, {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "transposed": (nn.ConvTranspose2d(6, 12, 3, groups=6), 12, {"in_channels": 4, "out_channels": 8, "groups": 4}),
    "BatchNorm2d": (nn.BatchNorm2d(6), 6, {"num_features": 4}),
    "InstanceNorm2d": (nn.InstanceNorm2d(6, affine=True), 6, {"num_features": 4}),
    "GroupNorm": (nn.GroupNorm(6, 6), 6, {"num_channels": 4, "num_groups": 4}),
    "PReLU": (nn.PReLU(6), 6, {"num_parameters": 4}),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_layers_follow(name: str) -> None:
    layer, after, expected = INTEGERS[name]
    model = nn.Sequential(conv(3, 6), layer, conv(after, 2))
    structure = infer(model, images)
    smaller = cut(model, structure, {"0": torch.arange(6) < 4})
    assert {attribute: getattr(smaller[1], attribute) for attribute in expected} == expected
    assert smaller(images).shape == model(images).shape


def test_rows_that_are_empty_do_not_stop_the_trace() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            none = self.up(x[x[:, 0] > 1e9]).view(-1, 6, 1).flatten(1)
            return self.down(torch.cat([none, F.relu(self.up(x))]))

    assert infer(Empty(), rows).fingerprint


# The invariants of SPA (arXiv 2403.18955).


def test_resnet_with_padded_shortcuts() -> None:
    """336 inner components and 64 residual ones, of which 16 span all stages, 16 the last two and 32 only the last."""
    structure = check(nets.ResNet20(), torch.randn(2, 3, 16, 16), seeds=1)
    inner = {g.name: g.size for g in structure.groups if ".conv1" in g.name}
    assert sum(inner.values()) == 3 * 16 + 3 * 32 + 3 * 64 == 336
    residual = {g.name: g for g in structure.groups if ".conv1" not in g.name}
    assert sum(g.size for g in residual.values()) == 64
    second, third = ("blocks.3.conv2", "blocks.3.conv2#2"), ("blocks.6.conv2", "blocks.6.conv2#2")
    assert [residual[name].size for name in ("conv1", *second, *third)] == [16, 8, 8, 16, 16]
    assert str(structure.tensors["blocks.3.conv2.weight"][0]) == f"{second[0]}+conv1+{second[1]}"
    assert str(structure.tensors["fc.weight"][1]) == f"{third[0]}+{second[0]}+conv1+{second[1]}+{third[1]}"
    (member,) = [m for m in residual["conv1"].members if m.tensor == "fc.weight"]
    assert residual["conv1"].units_along(member).tolist() == [-1] * 24 + list(range(16)) + [-1] * 24
    assert set(structure.recorded) == {"blocks.3", "blocks.6"}


def test_without_recordings_padded_channels_stay() -> None:
    structure = infer(nets.ResNet20(), torch.randn(2, 3, 16, 16), record=False)
    assert not structure.recorded
    assert sum(g.size for g in structure.groups if ".conv1" not in g.name) == 0


def positions(structure: Structure, group: str, unit: int) -> dict[tuple[str, int], list[int]]:
    """Where a unit lies: positions by tensor and axis."""
    found = next(g for g in structure.groups if g.name == group)
    lies = {(m.tensor, m.axis): (found.units_along(m) == unit).nonzero().flatten().tolist() for m in found.members}
    return {where: at for where, at in lies.items() if at}


def test_concatenation_with_itself_removes_both_copies() -> None:
    structure = infer(nets.CatWithItself(), images)
    for c in range(4):
        expected = {("first.weight", 0): [c], ("first.bias", 0): [c], ("second.weight", 1): [c, 4 + c]}
        assert positions(structure, "first", c) == expected


def test_flatten_removes_blocks_of_columns() -> None:
    structure = infer(nets.LeNet(), torch.randn(2, 2, 2, 2))
    assert positions(structure, "conv", 1)["fc.weight", 1] == [4, 5, 6, 7]


def test_shuffle_is_the_exact_permutation() -> None:
    """Source q·3+j lands on j·2+q: of source 1 the input column is 2, of source 3 it is 1."""
    structure = infer(nets.ChannelShuffle(), images)
    slow, fast = (lambda u: positions(structure, "first", u)), (lambda u: positions(structure, "first#2", u))
    for source in range(6):
        q, j = divmod(source, 3)
        (column,) = set(slow(q)["second.weight", 1]) & set(fast(j)["second.weight", 1])
        assert column == j * 2 + q
        assert set(slow(q)["first.weight", 0]) & set(fast(j)["first.weight", 0]) == {source}
    assert infer(nets.ChannelShuffle(), images).tensors["second.weight"][1] != structure.tensors["first.weight"][0]


def test_grouped_queries_share_components() -> None:
    structure = infer(nets.GroupedQuery(heads=8, shared=2, size=4), torch.randn(2, 6, 16))
    where = positions(structure, "q", 1)
    assert where["q.weight", 0] == list(range(16, 32))
    assert where["k.weight", 0] == where["v.weight", 0] == list(range(4, 8))
    assert where["out.weight", 1] == list(range(16, 32))


def test_group_components_sum_to_the_parameters_removed() -> None:
    """Every unit of every group in turn, counted on the types and on the cut model."""
    for model, inputs in [(nets.SqueezeExcite(), images), (nets.Dense(), images), (nets.Gated(True), rows)]:
        structure = infer(model, inputs)
        whole = sum(p.numel() for p in model.parameters())
        for group in structure.groups:
            keep = {group.name: torch.arange(group.size) != 1}
            left = sum(p.numel() for p in cut(model, structure, keep).parameters())
            assert structure.costs.unit("params", group.name, structure.sizes) == whole - left


TWINS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "concatenation": (nets.CatWithItself, images),
    "flatten": (nets.LeNet, drawn(2, 2, 2, 2)),
    "gate": (nets.SqueezeExcite, images),
    "layer scale": (nets.LayerScale, rows),
    "fused gate": (lambda: nets.Gated(True), rows),
    "gate of two": (lambda: nets.Gated(False), rows),
    "dense": (nets.Dense, images),
    "residual": (
        lambda: Net(
            lambda m, x: (lambda y: m.d(y + m.c(F.relu(m.n(m.b(y))))))(m.a(x)),
            a=conv(3, 6),
            b=conv(6, 5),
            n=nn.BatchNorm2d(5),
            c=conv(5, 6),
            d=conv(6, 2),
        ),
        images,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 6, 3, groups=6), nn.Hardswish(), conv(6, 4)
        ),
        images,
    ),
    "split": (
        lambda: Net(
            lambda m, x: (lambda a, b: m.b(F.relu(a)) + m.c(b))(*m.a(x).split(m.sizes, 1)),
            a=nn.Linear(5, 7),
            b=nn.Linear(3, 2),
            c=nn.Linear(4, 2),
            sizes=[3, 4],
        ),
        rows,
    ),
    "interleaved": (
        lambda: Net(
            lambda m, x: m.b(torch.stack([m.a(x), m.a(x) * 2], -1).flatten(1)), a=nn.Linear(5, 4), b=nn.Linear(8, 2)
        ),
        rows,
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_partition_is_that_of_propagated_nans(name: str) -> None:
    """The slow twin: a NaN put into one row of one weight shows which columns read it; linked slices are one unit."""
    make, inputs = TWINS[name]
    model = make().eval()
    structure = infer(model, inputs)
    units = set()
    for group in structure.groups:
        for unit in range(group.size):
            where = positions(structure, group.name, unit)
            units.add(frozenset((tensor, axis, i) for (tensor, axis), at in where.items() for i in at))
    assert units == components(model, inputs)
    assert units


# Options and input.


def test_only_the_kinds_asked_for_are_offered() -> None:
    model, x = nets.Attention(), torch.randn(2, 6, 12)
    assert kinds(infer(model, x, kinds=["head"])) == {"q": ("head", 3)}
    assert kinds(infer(model, x, kinds=["channel"])) == {}
    with pytest.raises(OptionError, match="unknown kind of unit 'heads'; the nearest are head"):
        infer(model, x, kinds=["heads"])


@pytest.mark.parametrize(("scale", "found"), [(0.5, {"q", "v"}), (None, {"q", "v"})])
def test_head_sizes_go_where_the_scale_does_not_depend_on_them(scale, found) -> None:
    def attend(m: Net, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (m.q, m.k, m.v))
        q = q * (scale or q.shape[-1] ** -0.5)
        return m.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    net = Net(attend, **{name: nn.Linear(8, 12) for name in "qkv"}, o=nn.Linear(12, 8))
    structure = check(net, tokens, structure=infer(net, tokens, kinds=["head-size"]))
    assert kinds(structure) == dict.fromkeys(found, ("head-size", 3))


ENTANGLED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)), rows),
    "rms norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.Linear(6, 2)), rows),
    "softmax": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(1), nn.Linear(6, 2)), rows),
    "mean": (lambda: Net(lambda m, x: m.b(m.a(x) * m.a(x).mean(1, True)), a=nn.Linear(5, 6), b=nn.Linear(6, 2)), rows),
    "sum of sigmoids": (lambda: Net(lambda m, x: m.a(x).sigmoid().sum(1, True), a=nn.Linear(5, 6)), rows),
    "channels of a group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(2, 12), nn.Conv2d(12, 2, 1)), images,
    ),
    "a residual stream": (nets.PreNorm, tokens),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTANGLED)
def test_entangled_widths_are_cut_and_proven(name: str) -> None:
    make, inputs = ENTANGLED[name]
    torch.manual_seed(0)
    model = make().eval()
    structure = infer(model, inputs, entangled=True)
    assert structure.doubted
    keep = {g.name: torch.arange(g.size) % 3 != 1 for g in structure.groups}
    smaller, masked = cut(model, structure, keep), mask(model, structure.groups, keep)
    assert prove(masked, smaller, inputs, on_kept(structure, keep)) < 1e-5
    with pytest.raises(ProofError):
        prove(masked, smaller, inputs)


def test_entangled_widths_are_offered_where_little_else_is() -> None:
    norm = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert kinds(infer(norm, rows)) == {"0": ("channel", 6)}
    assert kinds(infer(norm, rows, entangled=False)) == {}
    wide = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 2))
    assert kinds(infer(wide, rows)) == {"2": ("channel", 90)}
    assert kinds(infer(wide, rows, entangled=True)) == {"0": ("channel", 6), "2": ("channel", 90)}


def test_doubted_ops_survive_a_file() -> None:
    model = nets.PreNorm()
    structure = infer(model, tokens, entangled=True)
    assert Structure.from_dict(json.loads(json.dumps(structure.to_dict()))).doubted == structure.doubted


def test_restricting_fixes_the_other_groups_everywhere() -> None:
    model = nets.Dense()
    whole = infer(model, images)
    part = whole.restricted(["layers.1"])
    assert part.sizes == {"layers.1": 3}
    assert str(part.tensors["head.weight"][1]) == "7+layers.1+3"
    assert "layers.0.weight" not in part.tensors
    assert part.costs.total("params") == whole.costs.total("params")
    assert sum(f.reason == "left out by scope or ignore" for f in part.frozen) == 3
    check(model, images, structure=part)


def test_inference_leaves_the_model_and_the_random_state_alone() -> None:
    model = nets.SqueezeExcite().train()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    hook = model.conv.register_forward_hook(lambda *_: None)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    ids = [id(p) for p in model.parameters()]
    infer(model, images)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == ids
    assert model.conv.weight.grad is not None
    assert list(model.conv._forward_hooks) == [hook.id]
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_by_position_and_by_keyword() -> None:
    net = Net(lambda m, x, y=None: m.b(F.relu(m.a(x)) + y), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    expected = {"a": ("channel", 6)}
    extra = torch.randn(1)
    assert kinds(check(net, (rows, extra))) == kinds(check(net, {"x": rows, "y": extra})) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y},
        lambda y: (y, [y * 2]),
        lambda y: SimpleNamespace(logits=y, other=[y]),
        lambda y: torch.distributions.Normal(y, 1.0),
    ],
)
def test_outputs_in_any_container_are_fixed(wrap) -> None:
    net = Net(lambda m, x: wrap(m.b(F.relu(m.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    assert kinds(infer(net, rows)) == {"a": ("channel", 6)}


def test_an_output_without_tensors_is_refused() -> None:
    net = Net(lambda m, x: "nothing", a=nn.Linear(5, 6))
    with pytest.raises(ModelError, match="no tensor is found in the model's output, a str"):
        infer(net, rows)


def test_a_model_that_does_not_run_is_refused_with_the_shapes() -> None:
    with pytest.raises(ModelError, match=r"does not run on the example inputs \(tensor \[2, 6\]\): RuntimeError: mat1"):
        infer(nn.Linear(5, 3), torch.randn(2, 6))
    with pytest.raises(ModelError, match=r"\(x: tensor \[2, 5\], y: int\): TypeError"):
        infer(nn.Linear(5, 3), {"x": rows, "y": 3})


def test_torchscript_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^1 is TorchScript, whose code cannot follow a cut; prune the model before"):
        infer(nn.Sequential(nn.Linear(5, 6), torch.jit.script(nn.ReLU()), nn.Linear(6, 2)), rows)


def test_layers_without_a_shape_are_refused() -> None:
    with pytest.raises(ModelError, match="0 is a LazyLinear that has no sizes yet"):
        infer(nn.Sequential(nn.LazyLinear(6), nn.LazyLinear(2)), rows)


def test_unused_parameters_stay() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 2), spare=nn.Linear(6, 6))
    structure = infer(net, rows)
    assert kinds(structure) == {"a": ("channel", 6)}
    smaller = cut(net, structure, random_keep(structure))
    assert smaller.spare.weight.shape == (6, 6)


def test_attributes_that_equal_a_width_by_chance_stay() -> None:
    """Steps, a shift and a divisor of the same number as the width that is mended."""

    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.steps, self.shift, self.divisor = 8, 8, 8, 8
            self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(torch.roll(x, self.shift, 0)).view(x.shape[0], self.width)
            for _ in range(self.steps):
                y = torch.tanh(y)
            return self.down(y) / self.divisor

    structure = check(Chance(), rows)
    assert kinds(structure) == {"up": ("channel", 8)}
    assert {k for k in structure.edits if "." not in k} == {"width"}


def test_a_group_is_named_by_the_layer_that_produces_it_first() -> None:
    structure = infer(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), conv(6, 4), nn.Flatten(), nn.Linear(256, 2)), images)
    assert [g.name for g in structure.groups] == ["0", "2"]
    (first, _) = structure.groups
    assert [(m.tensor, m.role) for m in first.members if m.tensor.endswith("weight")] == [
        ("0.weight", "out"),
        ("1.weight", "out"),
        ("2.weight", "in"),
    ]


def test_buffers_go_with_their_channels() -> None:
    structure = infer(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), conv(6, 4)), images)
    assert {"1.running_mean", "1.running_var"} <= set(structure.tensors)
    assert "1.num_batches_tracked" not in structure.tensors


@pytest.mark.parametrize(
    "make", [nets.Dense, nets.ShuffleUnit, lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 2)), Plus]
)
def test_structures_survive_json(make) -> None:
    """Also where layers are called `0` or `a+b`, which read like numbers and sums."""
    structure = infer(make(), rows if make is Plus else images)
    again = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    assert again == structure
    assert structure.groups


@pytest.mark.parametrize("field", ["groups", "tensors", "edits", "costs", "frozen", "unknown", "fingerprint"])
def test_a_structure_with_a_missing_or_broken_field_is_refused(field) -> None:
    data = infer(nets.Dense(), images).to_dict()
    for broken in ({k: v for k, v in data.items() if k != field}, {**data, field: 3}):
        if field == "fingerprint" and field in broken:
            continue
        with pytest.raises(FileError, match="the structure of this plan cannot be read"):
            Structure.from_dict(broken)


def test_fingerprints_tell_names_and_shapes_apart() -> None:
    same = fingerprint(nn.Linear(3, 4))
    assert same == fingerprint(nn.Linear(3, 4))
    assert len({same, fingerprint(nn.Linear(4, 3)), fingerprint(nn.Sequential(nn.Linear(3, 4)))}) == 3


def test_ops_are_traced_on_shapes_where_python_asks_for_no_values() -> None:
    (trace,) = trace_model(nets.Dense(), images)
    assert not trace.real
    assert trace_model(nets.Branching(), torch.ones(2, 4))[0].real
    assert {op.module for op in trace.ops} == {"", "stem", "layers.0", "layers.1", "layers.2", "norm", "head"}
    for op in trace.ops:
        for dims in op.dims:
            assert all(isinstance(d, Fixed) or trace.solver.resolve(d) for d in dims)
