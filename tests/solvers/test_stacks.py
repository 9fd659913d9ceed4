"""Experts in one parameter: each is solved as the linear layer that it would be, on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sec
from secateurs.core.errors import ModelError
from secateurs.methods.language.sparsegpt import SparseGPT
from secateurs.methods.language.wanda import Wanda
from secateurs.solvers import grams_of, parts_of, tensor_of
from secateurs.solvers.stacks import input_axis, is_stack, joined, plain_experts
from secateurs.to_solve import layers_to_solve

EXPERTS, WIDTH, INNER = 4, 8, 12
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


# -- ways to multiply tokens, [tokens, inputs], by the matrices of their experts ---------------------------------------


def one_by_one(x: Tensor, chosen: Tensor, stack: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    order = chosen.argsort(stable=True)
    made = [product(x[(chosen == expert).nonzero()[:, 0]], stack[expert]) for expert in chosen.unique()]
    return torch.cat(made)[order.argsort()]


def by_mask(x: Tensor, chosen: Tensor, stack: Tensor) -> Tensor:
    made = x.new_zeros(len(x), stack.shape[1])
    for expert in range(len(stack)):
        made[chosen == expert] = x[chosen == expert] @ stack[expert].T
    return made


def grouped(x: Tensor, chosen: Tensor, stack: Tensor) -> Tensor:
    """`stack` is [experts, inputs, outputs]."""
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=len(stack)).cumsum(0).int()
    return F.grouped_mm(x[order], stack, offs=ends)[order.argsort()]


def all_at_once(x: Tensor, chosen: Tensor, stack: Tensor) -> Tensor:
    """A token that an expert has not is zero to it; `stack` is [experts, inputs, outputs]."""
    each = x * (chosen == torch.arange(len(stack))[:, None])[..., None]
    return torch.bmm(each, stack).sum(0)


def added(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(torch.ones(w.shape[1]), x, w)


# Way by name, and whether the stack's inputs are its second axis.
WAYS: dict[str, tuple[Way, bool]] = {
    "linear": (lambda x, c, w: one_by_one(x, c, w, F.linear), False),
    "product": (lambda x, c, w: one_by_one(x, c, w, torch.matmul), True),
    "from the left": (lambda x, c, w: one_by_one(x, c, w, lambda rows, one: (one @ rows.T).T), False),
    "with a sum": (lambda x, c, w: one_by_one(x, c, w, added), True),
    "einsum": (lambda x, c, w: one_by_one(x, c, w, lambda rows, one: torch.einsum("ti,oi->to", rows, one)), False),
    "by mask": (by_mask, False),
    "grouped": (grouped, True),
    "grouped, turned": (lambda x, c, w: grouped(x, c, w.transpose(1, 2)), False),
    "all at once": (all_at_once, True),
    "all at once, turned": (lambda x, c, w: all_at_once(x, c, w.mT), False),
}


class Experts(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.is_transposed = way, WAYS[way][1]
        up, down = torch.randn(EXPERTS, INNER, WIDTH), torch.randn(EXPERTS, WIDTH, INNER)
        self.up = nn.Parameter(up.mT.contiguous() if self.is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if self.is_transposed else down)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        multiply = vars(self).get("multiply", WAYS[self.way][0])
        return multiply(torch.relu(multiply(x, chosen, self.up)), chosen, self.down)


class Listed(nn.Module):
    """The same with a layer for each matrix."""

    def __init__(self, other: Experts) -> None:
        super().__init__()
        self.up = nn.ModuleList(parts_of(other, "up").values())
        self.down = nn.ModuleList(parts_of(other, "down").values())

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = chosen == expert
            made[rows] = self.down[int(expert)](torch.relu(self.up[int(expert)](x[rows])))
        return made


class Block(nn.Module):
    """Tokens go to experts in turn, whatever they are."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mix, self.experts, self.known = nn.Linear(WIDTH, WIDTH), experts, EXPERTS

    def forward(self, x: Tensor) -> Tensor:
        flat = (x + self.mix(x)).reshape(-1, WIDTH)
        return x + self.experts(flat, torch.arange(len(flat)) * 3 % self.known).view(x.shape)


class Net(nn.Module):
    def __init__(self, way: str = "linear") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(Experts(way)) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def net(way: str = "linear") -> Net:
    torch.manual_seed(0)
    return Net(way).eval()


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 10, WIDTH) for _ in range(2)]


def routed(block: Block, data: list[Any]) -> tuple[Tensor, Tensor]:
    """What the experts of the first block are given, token by token, and to which they go."""
    x = torch.cat([one.reshape(-1, WIDTH) for one in data])
    chosen = torch.cat([torch.arange(one.shape[0] * one.shape[1]) * 3 % block.known for one in data])
    return (x + block.mix(x)).detach(), chosen


# -- what is gathered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_each_expert_has_the_gram_of_the_tokens_that_it_is_given(way: str, data: list[Tensor]) -> None:
    block = net(way).blocks[0]
    grams, _ = grams_of(block, data, ["experts.up", "experts.down"])
    x, chosen = routed(block, data)
    ups = [part.weight for part in parts_of(block, "experts.up").values()]
    assert list(grams) == [f"experts.{name}[{e}]" for name in ("up", "down") for e in range(EXPERTS)]
    for expert in range(EXPERTS):
        rows = x[chosen == expert]
        inner = torch.relu(rows @ ups[expert].T + (way == "with a sum"))
        for name, given in (("up", rows), ("down", inner)):
            found, wide = grams[f"experts.{name}[{expert}]"], given.double()
            # A token that is zero to all of `up` is zero to `down`, too.
            known = wide[(wide != 0).any(1)] if "all at once" in way else wide
            assert found.count == len(known) > 3
            torch.testing.assert_close(found.hessian[0], 2 * known.T @ known / len(known), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.mean[0], known.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_padding_is_nobody_s_token(way: str, data: list[Tensor]) -> None:
    block = net(way).blocks[0]
    counts = torch.arange(10) < torch.tensor([[10], [4], [7]])
    grams, _ = grams_of(block, data[:1], ["experts.up", "experts.down"], seen=[counts])
    x, chosen = routed(block, data[:1])
    x, chosen = x[counts.flatten()], chosen[counts.flatten()]
    for expert in range(EXPERTS):
        assert grams[f"experts.up[{expert}]"].count == int((chosen == expert).sum())
        if "all at once" not in way:
            assert grams[f"experts.down[{expert}]"].count == int((chosen == expert).sum())
        rows = x[chosen == expert].double()
        torch.testing.assert_close(
            grams[f"experts.up[{expert}]"].hessian[0], 2 * rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
        )


def test_stacks_that_read_one_tensor_share_what_is_known_of_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Parameter(torch.randn(2, 3, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([F.linear(one, self.gate[i]) * F.linear(one, self.up[i]) for i, one in enumerate(x)])

    grams, _ = grams_of(Gated(), [torch.randn(2, 5, 4) for _ in range(2)], ["gate", "up"])
    assert all(grams[f"gate[{i}]"] is grams[f"up[{i}]"] for i in range(2))
    assert grams["gate[0]"] is not grams["gate[1]"]


# -- what is solved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["linear", "product", "grouped", "all at once"])
@pytest.mark.parametrize("budget", ["sparsity=50%", "2:4"])
@pytest.mark.parametrize("options", [Wanda(), SparseGPT(), SparseGPT(levels=True, propagate="dense")], ids=str)
def test_experts_are_solved_as_layers_of_their_own(way: str, budget: str, options: Any, data: list[Tensor]) -> None:
    model, twin = net(way), net(way)
    for block in twin.blocks:
        block.experts = Listed(block.experts)
    common = {"data": data, "measure": False, "options": options, "method": type(options).__name__.lower()}
    made, expected = (sec.prune(one, data[0], budget, **common) for one in (model, twin))
    for number, block in enumerate(made.model.blocks):
        for name in ("up", "down"):
            parts = parts_of(block, f"experts.{name}")
            mask = made.masks[f"blocks.{number}.experts.{name}"]
            assert mask.shape == getattr(block.experts, name).shape
            for expert, part in enumerate(parts.values()):
                layer = expected.model.blocks[number].experts.get_submodule(f"{name}.{expert}")
                kept = expected.masks[f"blocks.{number}.experts.{name}.{expert}.weight"]
                assert torch.equal(mask[expert].T if block.experts.is_transposed else mask[expert], kept)
                torch.testing.assert_close(part.weight, layer.weight, rtol=1e-4, atol=1e-5)
                assert int(kept.sum()) == kept.numel() // 2
                assert budget != "2:4" or kept.view(-1, 4).sum(1).unique().tolist() == [2]
    assert made.plan.sparsity == 0.5


def test_of_each_row_as_many_go_whatever_the_axis_of_the_rows(data: list[Tensor]) -> None:
    made = sec.prune(net("product"), data[0], "sparsity=25%", method="wanda", data=data, measure=False)
    assert made.masks["blocks.0.experts.up"].sum(1).unique().tolist() == [WIDTH * 3 // 4]


def test_the_report_and_the_plan_have_them(data: list[Tensor], tmp_path: Any) -> None:
    made = sec.prune(net(), data[0], "sparsity=50%", method="sparsegpt", data=data)
    errors = {layer.name: layer.error for layer in made.report.layers}
    assert 0 < errors["blocks.0.experts"] < 1
    assert torch.equal(made.plan.masks(net())["blocks.0.experts.up"], made.masks["blocks.0.experts.up"])
    made.save(tmp_path / "saved")
    again = sec.load(tmp_path / "saved", trust=("tests",)).model
    assert torch.equal(again.blocks[0].experts.up, made.model.blocks[0].experts.up)
    assert float((again.blocks[0].experts.up == 0).float().mean()) == 0.5


def test_an_expert_without_tokens_stays_and_is_named(data: list[Tensor]) -> None:
    model = net()
    for block in model.blocks:
        block.known = 2
    told = r"of the 4 experts in blocks\.0\.experts\.up, 2, 3 saw none of the 60 inputs that the data brings"
    with pytest.warns(UserWarning, match=told):
        made = sec.prune(model, data[0], "sparsity=50%", method="wanda", data=data, measure=False)
    before, after = model.blocks[0].experts.up, made.model.blocks[0].experts.up
    assert made.masks["blocks.0.experts.up"].float().mean((1, 2)).tolist() == [0.5, 0.5, 1, 1]
    assert torch.equal(after[2:], before[2:])
    assert torch.equal(after[:2] == 0, ~made.masks["blocks.0.experts.up"][:2])


def test_what_cannot_be_followed_stays_and_is_named(data: list[Tensor]) -> None:
    model = net()
    model.blocks[0].experts.multiply = lambda x, c, w: (x[:, None] * w[c]).sum(2)
    with pytest.warns(UserWarning, match=r"blocks\.0\.experts\.up is multiplied in no way that can be followed"):
        made = sec.prune(model, data[0], "sparsity=50%", method="wanda", data=data, measure=False)
    assert "blocks.0.experts.up" not in made.masks
    assert "blocks.1.experts.up" in made.masks
    assert torch.equal(made.model.blocks[0].experts.up, model.blocks[0].experts.up)


def test_a_part_of_a_matrix_is_not_taken_for_it(data: list[Tensor]) -> None:
    block = net().blocks[0]
    block.experts.multiply = lambda x, c, w: F.linear(x[:, :WIDTH], w[0, :8, :8])
    grams, _ = grams_of(block, data, ["experts.up", "experts.down"])
    assert not any(gram.count for gram in grams.values())


def test_a_stack_is_never_multiplied_along_its_outputs(data: list[Tensor]) -> None:
    model = net("product")
    model.blocks[1].experts.is_transposed = False
    model.blocks[1].experts.multiply = lambda x, c, w: one_by_one(x, c, w, torch.matmul)
    told = r"the inputs of blocks\.1\.experts\.up multiply its axis 1, not 2: set is_transposed = True"
    with pytest.raises(ModelError, match=told.replace(r"blocks\.1\.", "")):
        sec.prune(model, data[0], "sparsity=50%", method="wanda", data=data, measure=False)


def test_scope_and_ignore_name_them_by_parameter(data: list[Tensor]) -> None:
    def layers(**choice: Any) -> list[str]:
        return sorted(layers_to_solve(net(), sec.Budget.parse("2:4"), "row", stacks=True, **choice))

    assert layers(scope="*.experts.down") == ["blocks.0.experts.down", "blocks.1.experts.down"]
    assert layers(ignore="*.experts") == ["blocks.0.mix", "blocks.1.mix"]
    assert len(layers()) == 6
    with pytest.warns(UserWarning, match=r"stacked in blocks\.0\.experts\.down \(and 3 more\) stays dense"):
        modules = layers_to_solve(net(), sec.Budget.parse("2:4"), "row")
    assert sorted(modules) == ["blocks.0.mix", "blocks.1.mix"]


def test_densities_are_those_of_matrices() -> None:
    def found(rule: str, **options: Any) -> dict[str, float]:
        given = layers_to_solve(net(), sec.Budget.parse("sparsity=50%"), "row", None, (), rule, options, stacks=True)
        return {name: 1 - comparison.sparsity for name, comparison in given.items()}

    erk = found("erk")
    # (rows + columns) / (rows · columns), the same factor for all.
    ratio = ((WIDTH + INNER) / (WIDTH * INNER)) / (2 * WIDTH / WIDTH**2)
    assert erk["blocks.0.experts.up"] / erk["blocks.0.mix"] == pytest.approx(ratio)
    shares = {f"blocks.{i}.{n}": s for i, s in enumerate((0.25, 0.75)) for n in ("mix", "experts.up", "experts.down")}
    assert found("given", densities=shares) == pytest.approx(shares)


def test_blocks_with_more_outliers_keep_more_of_their_experts(data: list[Tensor]) -> None:
    model = net()
    with torch.no_grad():
        model.blocks[1].experts.up[:, :2, :2] *= 50
    made = sec.prune(
        model, data[0], "sparsity=50%", method="wanda", data=data, measure=False, allocation="owl",
        allocation_options={"spread": 0.2},
    )  # fmt: skip
    kept = {name: float(mask.float().mean()) for name, mask in made.masks.items()}
    assert kept["blocks.1.experts.up"] > 0.5 > kept["blocks.0.experts.up"]


# -- stacks as such ----------------------------------------------------------------------------------------------------


def test_parts_are_views_and_masks_join() -> None:
    for way in ("linear", "product"):
        experts = net(way).blocks[0].experts
        masks = [part.weight > 0 for part in parts_of(experts, "up").values()]
        assert masks[0].shape == (INNER, WIDTH)
        assert torch.equal(joined(experts, "up", masks), experts.up > 0)
        with torch.no_grad():
            next(iter(parts_of(experts, "up").values())).weight[:, 0] = 7
        assert bool((experts.up[0].select(0 if experts.is_transposed else 1, 0) == 7).all())


def test_a_name_is_a_module_s_or_a_parameter_s() -> None:
    model = net()
    assert tensor_of(model, "blocks.0.mix") == "blocks.0.mix.weight"
    assert tensor_of(model, "blocks.0.experts.up") == "blocks.0.experts.up"
    assert list(parts_of(model, "blocks.0.mix")) == ["blocks.0.mix"]


@pytest.mark.parametrize(
    ("up", "down", "declared", "axis"),
    [
        ((4, 24, 8), (4, 8, 12), None, 2),
        ((4, 8, 24), (4, 12, 8), None, 1),
        ((4, 8, 24), (4, 12, 8), False, 2),
        ((4, 24, 8), (4, 8, 12), True, 1),
        ((4, 16, 16), (4, 16, 8), None, 2),
        ((4, 16, 16), (4, 8, 16), None, 1),
        ((4, 8, 16), (4, 8, 8), None, 1),
        ((4, 16, 8), (4, 8, 8), None, 2),
        ((4, 12, 8), (4, 8, 12), None, 2),
    ],
)
def test_the_axis_of_inputs(up: tuple[int, ...], down: tuple[int, ...], declared: bool | None, axis: int) -> None:
    owner = nn.Module()
    owner.up, owner.down = nn.Parameter(torch.ones(up)), nn.Parameter(torch.ones(down))
    if declared is not None:
        owner.is_transposed = declared
    assert input_axis(owner, "up") == input_axis(owner, "down") == axis


def test_what_is_no_stack() -> None:
    assert is_stack(torch.ones(2, 3, 4))
    assert not any(map(is_stack, (torch.ones(1, 3, 4), torch.ones(3, 4), torch.ones(2, 3, 1), torch.ones(2, 2, 2, 2))))
    assert not is_stack(nn.UninitializedParameter())


def test_experts_are_plain_inside_only() -> None:
    class Config:
        _experts_implementation: str | None = "batched_mm"

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].config, model[1].config = Config(), Config()
    model[1].config._experts_implementation = "grouped_mm"

    def ways() -> list[str]:
        return [layer.config._experts_implementation for layer in model]

    def inside() -> None:
        with plain_experts(model):
            assert ways() == ["eager", "grouped_mm"]
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert ways() == ["batched_mm", "grouped_mm"]
