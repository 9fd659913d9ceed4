"""Mixtures of experts as people write them, with experts that are modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "OTHERS", "WIDTH", "Mixture", "Twice"]

WIDTH = 8


def expert() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH))


class Mixture(nn.Module):
    """Experts in a list, and a router."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = experts, top
        self.gate = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(expert() for _ in range(experts))


class Looped(Mixture):
    """A loop over experts, each given its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number in range(self.num_experts):
            token, slot = torch.where(chosen == number)
            if len(token):
                out.index_add_(0, token, self.experts[number](flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class Kept(Looped):
    """A scale for each expert, and a count of its tokens that only training looks at."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__(experts, top)
        self.scale = nn.Parameter(torch.ones(experts))
        self.register_buffer("usage", torch.zeros(experts))
        self.register_buffer("seen", torch.zeros(experts, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            counts = self.gate(x).argmax(-1).flatten().bincount(minlength=self.num_experts)
            self.usage += counts
            self.seen += counts
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * self.scale[number] * self.experts[number](x)
        return out


class Named(nn.Module):
    """A dictionary of experts with names of their own, and masks."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.specialists = nn.ModuleDict({f"{'abcdefgh'[i]}_of_{experts}": expert() for i in range(experts)})

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best = logits.topk(self.top, dim=-1)[0][..., -1:]
        weights = logits.masked_fill(logits < best, -torch.inf).softmax(-1)
        out = torch.zeros_like(x)
        for number, specialist in enumerate(self.specialists.values()):
            mask = weights[..., number] > 0
            if mask.any():
                out[mask] += weights[..., number][mask][:, None] * specialist(x[mask])
        return out


class Soft(nn.Module):
    """All experts see all tokens."""

    def __init__(self, experts: int = 4, top: int = 1) -> None:
        super().__init__()
        self.gating = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, experts))
        self.paths = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gating(x).softmax(-1)
        return torch.einsum("...e,...ed->...d", weights, torch.stack([path(x) for path in self.paths], dim=-2))


class Noisy(nn.Module):
    """Shazeer's gate: its own matrices [inputs, experts], and noise in training."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.top, self.n = top, experts
        self.w_gate = nn.Parameter(torch.randn(WIDTH, experts))
        self.w_noise = nn.Parameter(torch.randn(WIDTH, experts))
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        clean, spread = x @ self.w_gate, nn.functional.softplus(x @ self.w_noise)
        logits = clean + torch.randn_like(clean) * spread if self.training else clean
        weights, chosen = logits.topk(self.top, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights.softmax(-1))
        out = torch.zeros_like(x)
        for number in range(self.n):
            out = out + gates[..., number : number + 1] * self.experts[number](x)
        return out


class OneByOne(Mixture):
    """Python asks each token for its expert, and experts know their place."""

    def __init__(self, experts: int = 4, top: int = 1) -> None:
        super().__init__(experts, 1)
        for number, each in enumerate(self.experts):
            each.place = number

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.gate(x).softmax(-1)
        rows = zip(x.reshape(-1, WIDTH), probabilities.reshape(-1, self.num_experts), strict=True)
        out = []
        for row, each in rows:
            chosen = self.experts[int(each.argmax())]
            assert chosen is self.experts[chosen.place]
            out.append(chosen(row) * each.max())
        return torch.stack(out).view_as(x)


class Biased(nn.Module):
    """DeepSeek's router: sigmoids, and a bias that only the choice sees."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.gate.register_buffer("correction", torch.randn(experts) / 5)
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).sigmoid()
        chosen = (scores + self.gate.correction).topk(self.top, dim=-1)[1]
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * self.experts[number](x)
        return out


class Stacked(nn.Module):
    """Matrices in a stack, walked through, as in JetMoE."""

    def __init__(self, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.experts, self.top = experts, top
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.weight = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).topk(self.top, dim=-1)
        counts = torch.zeros(len(flat), self.experts).scatter(1, chosen, 1).long().sum(0).tolist()
        order = chosen.flatten().sort(stable=True)[1]
        parts = flat[order // self.top].split(counts)
        made = torch.cat([nn.functional.linear(parts[i], self.weight[i]) for i in range(self.experts)])
        made = made * weights.softmax(-1).flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, order // self.top, made).view_as(x)


class Twice(nn.Module):
    """Two stacks of different sizes in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 5)
        self.three = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.five = nn.Parameter(torch.randn(5, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for router, stack in ((self.first, self.three), (self.second, self.five)):
            value, chosen = router(x).softmax(-1).max(-1)
            parts = [(x @ each) * (chosen == number)[..., None] for number, each in enumerate(stack.unbind())]
            x = x + sum(parts) * value[..., None]
        return x


KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Looped, Kept, Named, Soft, Noisy, OneByOne, Biased, Stacked)
}  # fmt: skip


class FirstAlways(Mixture):
    """The first expert is for all tokens, whatever the router says."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return self.experts[0](x) + sum(weights[..., i, None] * e(x) for i, e in enumerate(self.experts))


class Pairs(Mixture):
    """Neighbouring experts work together."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, each in enumerate(self.experts):
            out = out + each(x) * (chosen // 2 == number // 2)[..., None]
        return out


class Tasks(Mixture):
    """Heads for tasks that an input names; the other heads do not run."""

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.experts[task](x + self.gate.weight.sum() * 0)


class Idle(Mixture):
    """Experts that do not run on these inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 99:
            x = self.experts[0](x)
        return x + 0 * self.gate.weight.sum()


class Mean(Mixture):
    """An ensemble: nobody chooses."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([each(x) for each in self.experts]).mean(0) + self.gate(x).mean()


class Numbered(Mixture):
    """An expert's number is a value."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, each in enumerate(self.experts):
            out = out + (number + 1) * each(x) * (chosen == number)[..., None]
        return out


OTHERS: dict[str, Any] = {kind.__name__: kind for kind in (FirstAlways, Pairs, Tasks, Idle, Mean, Numbered)}
