"""Networks put together at random from the patterns of real ones: whatever is found in them can be cut, and rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.graph.infer import KINDS, infer
from secateurs.graph.structure import Structure
from tests.graph import nets
from tests.graph.nets import check

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Do(nn.Module):
    """Layers by name, and what is done with them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self._function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


# Blocks of a convolutional network: from a width to a module and the width after it.


def plain(draw: Draw, c: int) -> tuple[nn.Module, int]:
    after = draw(st.integers(2, 9))
    kernel = draw(st.sampled_from([1, 3]))
    layers: list[nn.Module] = [nn.Conv2d(c, after, kernel, padding=kernel // 2, bias=draw(st.booleans()))]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(after))
    layers.append(draw(st.sampled_from([nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.PReLU(after)])))
    return nn.Sequential(*layers), after


def residual(draw: Draw, c: int) -> tuple[nn.Module, int]:
    inner, after = plain(draw, c)
    return Do(lambda m, x: F.relu(x + m.b(m.a(x))), a=inner, b=nn.Conv2d(after, c, 1)), c


def depthwise(draw: Draw, c: int) -> tuple[nn.Module, int]:
    after = c * draw(st.integers(1, 2))
    return nn.Sequential(nn.Conv2d(c, after, 3, padding=1, groups=c), nn.Hardswish()), after


def grouped(draw: Draw, c: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if c % g == 0]))
    after = groups * draw(st.integers(1, 3))
    make = nn.ConvTranspose2d if draw(st.booleans()) else nn.Conv2d
    return make(c, after, 3, padding=1, groups=groups), after


def squeeze_excite(draw: Draw, c: int) -> tuple[nn.Module, int]:
    inner = draw(st.integers(1, 4))
    return Do(
        lambda m, x: x * torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3), keepdim=True))))),
        a=nn.Conv2d(c, inner, 1),
        b=nn.Conv2d(inner, c, 1),
    ), c


def dense(draw: Draw, c: int) -> tuple[nn.Module, int]:
    growth = draw(st.integers(1, 4))
    return Do(lambda m, x: torch.cat([x, F.relu(m.a(x))], 1), a=nn.Conv2d(c, growth, 3, padding=1)), c + growth


def twice(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return Do(lambda m, x: torch.cat([x, -x], 1)), 2 * c


def halves(draw: Draw, c: int) -> tuple[nn.Module, int]:
    first = draw(st.integers(1, c - 1)) if c > 1 else 1
    if c == 1:
        return nn.Identity(), c
    sizes = [first, c - first]
    return Do(
        lambda m, x: (lambda a, b: torch.cat([a, m.a(b)], 1))(*x.split(m.sizes, 1)),
        a=nn.Conv2d(c - first, c - first, 1),
        sizes=sizes,
    ), c


def shuffled(draw: Draw, c: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
    return Do(
        lambda m, x: x.view(x.shape[0], m.groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2), groups=groups
    ), c


def normalised(draw: Draw, c: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if c % g == 0]))
    return draw(st.sampled_from([nn.GroupNorm(groups, c), nn.InstanceNorm2d(c), nn.BatchNorm2d(c)])), c


def resized(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return draw(st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.ReflectionPad2d((1, 0, 0, 1))])), c


def padded(draw: Draw, c: int) -> tuple[nn.Module, int]:
    low, high = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return Do(lambda m, x: F.pad(x, (0, 0, 0, 0, low, high))), c + low + high


def scaled(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return Do(lambda m, x: x + m.gamma * m.a(x), a=nn.Conv2d(c, c, 1), gamma=nn.Parameter(torch.randn(c, 1, 1))), c


def shared(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return Do(lambda m, x: m.a(F.relu(m.a(x))), a=nn.Conv2d(c, c, 1)), c


def literal(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return Do(lambda m, x: x.reshape(x.shape[0], c, -1, x.shape[3])), c


def held(draw: Draw, c: int) -> tuple[nn.Module, int]:
    return Do(lambda m, x: x.reshape(x.shape[0], m.width, -1, x.shape[3]), width=c, also=c), c


PICTURES = [
    plain, plain, residual, depthwise, grouped, squeeze_excite, dense, twice, halves, shuffled, normalised, resized,
    padded, scaled, shared, literal, held,
]  # fmt: skip


@st.composite
def convolutional(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    layers, width = [], 3
    for block in [plain, *draw(st.lists(st.sampled_from(PICTURES), max_size=4))]:
        layer, width = block(draw, width)
        layers.append(layer)
    inputs = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        features = nn.Sequential(*layers).eval()(inputs)
    if draw(st.booleans()):
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features[0].numel(), 3)), inputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)), inputs


# Blocks over tokens: from a width to a module and the width after it.


def mlp(draw: Draw, d: int) -> tuple[nn.Module, int]:
    inner = draw(st.integers(2, 9))
    return Do(lambda m, x: x + m.b(F.gelu(m.a(x))), a=nn.Linear(d, inner), b=nn.Linear(inner, d)), d


def gated(draw: Draw, d: int) -> tuple[nn.Module, int]:
    layer = nets.Gated(draw(st.booleans()), width=d, inner=draw(st.integers(2, 7)))
    return nn.Sequential(layer), 3


def projection(draw: Draw, d: int) -> tuple[nn.Module, int]:
    after = draw(st.integers(2, 5)) * 2
    return nn.Sequential(nn.Linear(d, after, bias=draw(st.booleans())), nn.Tanh()), after


def layer_norm(draw: Draw, d: int) -> tuple[nn.Module, int]:
    return draw(st.sampled_from([nn.LayerNorm(d), nn.RMSNorm(d)])), d


def attention(draw: Draw, d: int) -> tuple[nn.Module, int]:
    heads = draw(st.sampled_from([h for h in (1, 2, 3, 4) if d % h == 0]))
    return nets.Attention(d, heads, fast=draw(st.booleans())), 4


def fused_attention(draw: Draw, d: int) -> tuple[nn.Module, int]:
    heads = draw(st.sampled_from([h for h in (1, 2, 3, 4) if d % h == 0]))
    return nets.FusedQkv(draw(st.sampled_from(["3hd", "h3d"])), d, heads), d


def grouped_queries(draw: Draw, d: int) -> tuple[nn.Module, int]:
    few = draw(st.integers(1, 3))
    return nets.GroupedQuery(few * draw(st.integers(1, 3)), few, 2, d, gqa=draw(st.booleans())), d


def own_attention(draw: Draw, d: int) -> tuple[nn.Module, int]:
    heads = draw(st.sampled_from([h for h in (1, 2, 3, 4) if d % h == 0]))
    layer = nn.MultiheadAttention(d, heads, batch_first=True, add_bias_kv=draw(st.booleans()))
    return Do(lambda m, x: x + m.a(x, x, x)[0], a=layer), d


def encoder_layer(draw: Draw, d: int) -> tuple[nn.Module, int]:
    heads = draw(st.sampled_from([h for h in (1, 2) if d % h == 0]))
    return nn.TransformerEncoderLayer(d, heads, 6, batch_first=True, norm_first=draw(st.booleans())), d


def mixed_along_tokens(draw: Draw, d: int) -> tuple[nn.Module, int]:
    """A depthwise convolution over the tokens, as in a Conformer."""
    return Do(lambda m, x: F.silu(m.a(x.transpose(1, 2))).transpose(1, 2), a=nn.Conv1d(d, d, 3, padding=1, groups=d)), d


def hard_wired_attention(draw: Draw, d: int) -> tuple[nn.Module, int]:
    """As in Swin: the number of heads, and what follows from it, stand in the code only."""
    heads = draw(st.sampled_from([h for h in (1, 2, 3, 4) if d % h == 0]))

    def attend(m: Do, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = m.qkv(x).view(rows, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (q * (width // heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return x + m.out((weights @ v).transpose(1, 2).reshape(rows, tokens, width))

    return Do(attend, qkv=nn.Linear(d, 3 * d), out=nn.Linear(d, d)), d


def recurrent(draw: Draw, d: int) -> tuple[nn.Module, int]:
    after = draw(st.integers(2, 6))
    layer = draw(st.sampled_from([nn.GRU, nn.LSTM]))(d, after, draw(st.integers(1, 2)), batch_first=True)
    return Do(lambda m, x: m.layer(x)[0], layer=layer), after


SEQUENCES = [
    mlp, gated, projection, projection, layer_norm, attention, fused_attention, grouped_queries, own_attention,
    encoder_layer, mixed_along_tokens, hard_wired_attention, recurrent,
]  # fmt: skip


@st.composite
def sequential(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    embedded = draw(st.booleans())
    width = 6
    layers: list[nn.Module] = [nn.Embedding(11, width) if embedded else nn.Linear(5, width)]
    for block in draw(st.lists(st.sampled_from(SEQUENCES), min_size=1, max_size=4)):
        layer, width = block(draw, width)
        layers.append(layer)
    layers.append(nn.Linear(width, 3))
    inputs = torch.randint(11, (2, 6)) if embedded else torch.randn(2, 6, 5)
    return nn.Sequential(*layers), inputs


def prove_network(model: nn.Module, inputs: Tensor) -> None:
    structure = check(model, inputs, seeds=1)
    assert infer(model, inputs) == structure
    assert structure.unknown == {}
    assert Structure.from_dict(json.loads(json.dumps(structure.to_dict()))) == structure
    check(model, inputs, seeds=1, structure=infer(model, inputs, kinds=KINDS, entangled=True))


@settings(max_examples=35)
@given(convolutional())
def test_convolutional_networks(network) -> None:
    prove_network(*network)


@settings(max_examples=25)
@given(sequential())
def test_networks_over_tokens(network) -> None:
    prove_network(*network)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(convolutional(), sequential()))
def test_many_networks(network) -> None:
    prove_network(*network)
