"""Small networks, one for each pattern that the shape algebra follows, and the check that a cut of one is right."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.batch import call, leaves
from secateurs.graph.compact import on_kept
from secateurs.graph.cut import cut, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.structure import Structure
from secateurs.measure.macs import macs

__all__ = [
    "Attention",
    "AttributeView",
    "BlockA",
    "Branching",
    "CatWithItself",
    "ChannelShuffle",
    "CrossAttention",
    "Dense",
    "FunctionalConv",
    "FusedQkv",
    "Gated",
    "GroupedQuery",
    "LayerScale",
    "LeNet",
    "LiteralView",
    "Loop",
    "Lstm",
    "Picky",
    "PreNorm",
    "ResNet20",
    "SelfShared",
    "ShuffleUnit",
    "SqueezeExcite",
    "TiedLanguageModel",
    "TupleView",
    "check",
    "drawn",
    "random_keep",
    "removed_parameters",
]


def drawn(*shape: int) -> Tensor:
    """The same normal numbers at every import."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def random_keep(structure: Structure, seed: int = 0, least: int = 1) -> dict[str, Tensor]:
    """A random decision: of every group a random number of units, at least `least`, stays."""
    generator = torch.Generator().manual_seed(seed)
    keep: dict[str, Tensor] = {}
    for group in structure.groups:
        count = int(torch.randint(min(least, group.size), group.size + 1, (1,), generator=generator))
        keep[group.name] = torch.zeros(group.size, dtype=torch.bool)
        keep[group.name][torch.randperm(group.size, generator=generator)[:count]] = True
    return keep


def removed_parameters(structure: Structure, model: nn.Module, keep: dict[str, Tensor]) -> int:
    """Parameter entries that a decision removes, counted on the masks rather than on the types."""
    removed = 0
    parameters = dict(model.named_parameters())
    gone = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for group in structure.groups:
        for name, stays in group.spread(keep[group.name]).items():
            if name in gone:
                gone[name] |= ~stays.expand(gone[name].shape)
    removed = sum(int(g.sum()) for g in gone.values())
    return removed


def check(model: nn.Module, inputs: Any, *, seeds: int = 2, structure: Structure | None = None) -> Structure:
    """Cut `model` at random and assert all that must hold of a cut; the structure that was found."""
    before = {name: (t, t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    structure = structure or infer(model, inputs)
    for seed in range(seeds):
        keep = random_keep(structure, seed)
        smaller = cut(model, structure, keep)
        prove(mask(model, structure.groups, keep), smaller, inputs, on_kept(structure, keep))
        counts = {name: int(m.sum()) for name, m in keep.items()}
        left = sum(p.numel() for p in smaller.parameters())
        assert structure.costs.total("params", counts) == left
        assert sum(p.numel() for p in model.parameters()) - removed_parameters(structure, model, keep) == left
        assert structure.costs.total("macs", counts) == macs(smaller, inputs)
        stored = {id(t): t.nelement() * t.element_size() for t in smaller.state_dict(keep_vars=True).values()}
        assert structure.costs.total("bytes", counts) == sum(stored.values())
        _backward(smaller, inputs)
    assert structure.costs.total("macs") == macs(model, inputs)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t and torch.equal(t, value) for name, (t, value) in before.items())
    return structure


def _backward(model: nn.Module, inputs: Any) -> None:
    total = sum(t.float().square().mean() for t in leaves(call(model, inputs)) if t.is_floating_point())
    total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.shape == p.shape for g, p in ((p.grad, p) for p in model.parameters() if p.grad is not None))
    assert all(bool(g.isfinite().all()) for g in grads)


class BlockA(nn.Module):
    """A residual block whose shortcut pads channels and skips pixels (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.extra = (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(BlockA(a, b) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class CatWithItself(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 1)
        self.second = nn.Conv2d(2 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.cat([x, x], 1))


class LeNet(nn.Module):
    """A convolution flattened with its pixels into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class ChannelShuffle(nn.Module):
    """conv, shuffle of its channels over two groups, conv."""

    def __init__(self, width: int = 6, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(3, width, 1)
        self.second = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.second(x)


class ShuffleUnit(nn.Module):
    """Two units of ShuffleNetV2: half of the channels pass, the halves are shuffled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.branches = nn.ModuleList(self._branch(width // 2) for _ in range(2))
        self.head = nn.Conv2d(width, 5, 1)

    @staticmethod
    def _branch(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, branch(b)), 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int = 8, inner: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.reduce = nn.Conv2d(width, inner, 1)
        self.expand = nn.Conv2d(inner, width, 1)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(gate))))
        return self.head(x * gate)


class LayerScale(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.inner = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.gamma * self.inner(x))


class Gated(nn.Module):
    """A gated MLP, as one fused layer that is chunked, or as two layers."""

    def __init__(self, fused: bool, width: int = 5, inner: int = 7) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.up = nn.Linear(width, 2 * inner)
        else:
            self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.up(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(F.silu(gate) * up)


def _attend(q: Tensor, k: Tensor, v: Tensor, fast: bool) -> Tensor:
    if fast:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Attention with separate projections; sizes are read from tensors or held as attributes."""

    def __init__(self, width: int = 12, heads: int = 3, fast: bool = False, project: bool = True) -> None:
        super().__init__()
        self.num_heads, self.fast = heads, fast
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = _attend(q, k, v, self.fast).transpose(1, 2).reshape(b, t, -1)
        return self.head(x + self.out(y))


class CrossAttention(nn.Module):
    """Queries of one sequence over another, with a learned bias per head."""

    def __init__(self, width: int = 8, heads: int = 4, fast: bool = True) -> None:
        super().__init__()
        self.heads, self.fast = heads, fast
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(1, heads, 3, 5))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(context).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.k, self.v))
        if self.fast:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            y = (q @ k.mT / math.sqrt(q.shape[-1]) + self.bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class FusedQkv(nn.Module):
    """One layer for q, k and v, laid out as [3, heads, size] or as [heads, 3, size]."""

    def __init__(self, order: str, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.order, self.heads = order, heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.order == "3hd":
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(x).view(b, t, self.heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        return self.out(_attend(q, k, v, False).transpose(1, 2).reshape(b, t, -1))


class GroupedQuery(nn.Module):
    """Grouped-query attention with rotary embeddings, as in Llama."""

    def __init__(self, heads: int = 8, shared: int = 2, size: int = 4, width: int = 16, gqa: bool = False) -> None:
        super().__init__()
        self.size, self.repeats, self.gqa = size, heads // shared, gqa
        self.q = nn.Linear(width, heads * size, bias=False)
        self.k = nn.Linear(width, shared * size, bias=False)
        self.v = nn.Linear(width, shared * size, bias=False)
        self.out = nn.Linear(heads * size, width, bias=False)
        self.register_buffer("angles", torch.outer(torch.arange(6.0), 10.0 ** -torch.arange(size // 2).float()))

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.cat([self.angles, self.angles], -1)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        if self.gqa:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (
                y[:, :, None].expand(b, y.shape[1], self.repeats, t, self.size).reshape(b, -1, t, self.size)
                for y in (k, v)
            )
            y = _attend(q, k, v, False)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class PreNorm(nn.Module):
    """A residual stream with a normalised, gated branch; every width is behind a norm or in the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 10), nn.LayerNorm(10)
        self.up, self.inner, self.down = nn.Linear(10, 12), nn.RMSNorm(12), nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.inner(F.gelu(self.up(self.norm(x)))))
        return self.head(self.norm(x))


class TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 6, inner: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


class SelfShared(nn.Module):
    """One layer called twice, and one under two names."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.loop = nn.Linear(width, width)
        self.first = nn.Linear(width, 5)
        self.again = self.first
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu_(self.loop(x))
        return self.head(self.first(x) + self.again(x.square()))


class Dense(nn.Module):
    """Concatenation of all earlier outputs."""

    def __init__(self, growth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(4 + i * growth, growth, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(4 + 3 * growth)
        self.head = nn.Conv2d(4 + 3 * growth, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            seen.append(F.relu(layer(torch.cat(seen, 1))))
        return self.head(self.norm(torch.cat(seen, 1)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.rnn = nn.LSTM(6, 5, batch_first=True)
        self.up = nn.Linear(5, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(x))
        return self.head(F.relu(self.up(y[:, -1])))


class Branching(nn.Module):
    """Python looks at a value to decide which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.left, self.right = nn.Linear(6, 7), nn.Linear(6, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.left if float(x.sum()) > 0 else self.right
        return self.head(F.relu(layer(self.stem(x))))


class Loop(nn.Module):
    """As many steps as a value of an input says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(int(steps.max())):
            x = torch.tanh(self.step(x))
        return self.head(x)


class LiteralView(nn.Module):
    """A number in the code that nobody can mend."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 12)
        self.mixing = nn.Sequential(nn.Linear(12, 6), nn.ReLU())
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, 12)
        return self.head(self.mixing(x))


class AttributeView(nn.Module):
    """Sizes that are held as attributes, of this module and of its parent."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(4, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x).view(x.shape[0], self.width)))


class TupleView(nn.Module):
    """Sizes that are held in tuples and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [5, 9]
        self.shape = (14,)
        self.first = nn.Linear(4, 14)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.first(x).reshape(x.shape[0], *self.shape)).split(self.sizes, -1)
        return self.left(a) + self.right(b)


class FunctionalConv(nn.Module):
    """A depthwise convolution whose number of groups is written in the code."""

    def __init__(self, literal: bool = True) -> None:
        super().__init__()
        self.literal = literal
        self.stem = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.conv2d(x, self.weight, padding=1, groups=8 if self.literal else x.shape[1]))


class Picky(nn.Module):
    """Its forward asserts on a size that it holds."""

    def __init__(self, held: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 10)
        self.second = Insisting(10, held)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Insisting(nn.Module):
    def __init__(self, width: int, held: bool) -> None:
        super().__init__()
        self.expected = width if held else "10"
        self.linear = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != int(self.expected):
            raise ValueError(f"I was promised {self.expected} features")
        return F.relu(self.linear(x))
