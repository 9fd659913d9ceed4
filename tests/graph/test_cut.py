"""A decision as zeros and as a cut: equal, proven, and nothing of the original touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.dims import Atom, Fixed
from secateurs.core.errors import DataError, ModelError, PlanError, ProofError
from secateurs.core.units import ChannelGroup, Member, WeightGroup
from secateurs.graph.cut import cut, element_masks, mask, prove
from secateurs.graph.infer import infer
from secateurs.graph.structure import Structure
from tests.graph import nets
from tests.graph.nets import drawn, random_keep

images, rows = drawn(2, 3, 8, 8), drawn(8, 5)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def four_of_six(model: nn.Module) -> tuple[Structure, dict[str, Tensor]]:
    return infer(model, rows), {"0": torch.tensor([True, False, True, True, False, True])}


# What a cut does.


def test_a_cut_slices_every_tensor_and_mends_the_layers() -> None:
    model = small()
    structure, keep = four_of_six(model)
    smaller = cut(model, structure, keep)
    at = [0, 2, 3, 5]
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(smaller.state_dict()[name], model.state_dict()[name][at])
    assert torch.equal(smaller[3].weight, model[3].weight[:, at])
    assert torch.equal(smaller[3].bias, model[3].bias)
    assert (smaller[0].out_features, smaller[1].num_features, smaller[3].in_features) == (4, 4, 4)


def test_a_mask_zeroes_the_parameters_and_leaves_buffers() -> None:
    model = small()
    model[1].running_mean.normal_()
    structure, keep = four_of_six(model)
    masked = mask(model, structure.groups, keep)
    gone = [1, 4]
    assert not masked[0].weight[gone].any()
    assert not masked[1].bias[gone].any()
    assert not masked[3].weight[:, gone].any()
    assert torch.equal(masked[1].running_mean, model[1].running_mean)
    assert torch.equal(masked[0].weight[[0, 2, 3, 5]], model[0].weight[[0, 2, 3, 5]])


def test_keeping_everything_is_a_copy() -> None:
    model = small()
    structure, _ = four_of_six(model)
    for keep in ({}, {"0": torch.ones(6, dtype=torch.bool)}):
        smaller = cut(model, structure, keep)
        assert all(
            torch.equal(a, b) for a, b in zip(smaller.state_dict().values(), model.state_dict().values(), strict=True)
        )
        assert smaller[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_the_original_is_untouched_and_shares_nothing() -> None:
    model = small().train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[0].weight.grad = None
    model[3].weight.grad = torch.ones_like(model[3].weight)
    seen = []
    model[2].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    structure, keep = four_of_six(model)
    for made in (cut(model, structure, keep), mask(model, structure.groups, keep)):
        memory = {t.untyped_storage().data_ptr() for t in made.state_dict().values()}
        assert not memory & {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        assert not made[0].weight.requires_grad
        assert made[3].weight.requires_grad
        assert isinstance(made[0].weight, nn.Parameter)
        assert (made.training, made[1].training) == (True, False)
        assert len(made[2]._forward_hooks) == 1
        made(rows)
    prove(mask(model, structure.groups, keep), cut(model, structure, keep), rows)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n], t) for n, (i, t) in before.items())
    assert (model.training, model[1].training) == (True, False)
    assert torch.equal(model[3].weight.grad, torch.ones(3, 6))


def test_a_cut_trains() -> None:
    model = small()
    structure, keep = four_of_six(model)
    smaller = cut(model, structure, keep).train()
    optimizer = torch.optim.SGD(smaller.parameters(), 0.1)
    before = smaller[0].weight.detach().clone()
    F.cross_entropy(smaller(rows), torch.arange(8) % 3).backward()
    optimizer.step()
    assert not torch.equal(smaller[0].weight, before)


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    model = nets.TiedLanguageModel()
    ids = torch.arange(10).view(2, 5)
    structure = infer(model, ids)
    keep = {"down": torch.arange(6) % 2 == 0}
    smaller = cut(model, structure, keep)
    assert smaller.head.weight is smaller.embed.weight
    assert smaller.embed.weight.shape == (11, 3)
    assert smaller.embed.embedding_dim == 3
    masked = mask(model, structure.groups, keep)
    assert masked.head.weight is masked.embed.weight
    prove(masked, smaller, ids)


def test_modules_under_two_names_stay_one() -> None:
    model = nets.SelfShared()
    structure = infer(model, torch.randn(2, 4))
    smaller = cut(model, structure, random_keep(structure))
    assert smaller.first is smaller.again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype) -> None:
    for make, inputs in [(nets.SqueezeExcite, images), (nets.Attention, drawn(2, 6, 12)), (small, rows)]:
        model = make().to(dtype)
        inputs = inputs.to(dtype)
        structure = infer(model, inputs)
        keep = random_keep(structure)
        smaller = cut(model, structure, keep)
        assert {p.dtype for p in smaller.parameters()} == {dtype}
        assert prove(mask(model, structure.groups, keep), smaller, inputs) < 1e-5


def test_a_model_of_two_precisions_is_judged_in_float32(monkeypatch) -> None:
    """Half precision is too coarse to judge, and this model does not run in float64."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 6)).to(torch.bfloat16)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).float())

    model, x = Mixed(), rows.to(torch.bfloat16)
    structure = infer(model, x)
    keep = random_keep(structure)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model).double()(x.double())
    monkeypatch.setattr("secateurs.graph.cut._QUICK", -1.0)
    assert prove(mask(model, structure.groups, keep), cut(model, structure, keep), x) < 1e-4
    wrong = cut(model, structure, keep)
    with torch.no_grad():
        wrong.body[2].weight[0] += 0.1
    with pytest.raises(ProofError):
        prove(mask(model, structure.groups, keep), wrong, x)


def test_masks_of_several_groups_meet_on_one_tensor() -> None:
    a = ChannelGroup("a", 2, "channel", (Member("w", 0, Atom("a", 2), 2),))
    b = ChannelGroup("b", 3, "channel", (Member("w", 1, Atom("b", 3), 2, "in"),))
    keep = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True, False])}
    masks = element_masks([a, b], keep, {"w": torch.Size([2, 3])})
    assert masks["w"].tolist() == [[True, True, False], [False, False, False]]


def test_masks_leave_out_groups_that_stay_whole_and_tensors_not_asked_for() -> None:
    group = WeightGroup("w", (2, 2))
    assert element_masks([group], {"w": torch.ones(4, dtype=torch.bool)}, {"w": torch.Size([2, 2])}) == {}
    assert element_masks([group], {"w": torch.zeros(4, dtype=torch.bool)}, {"v": torch.Size([2, 2])}) == {}
    assert element_masks([group], {}, {"w": torch.Size([2, 2])}) == {}


def test_a_plan_for_another_model_names_the_tensor() -> None:
    structure, keep = four_of_six(small())
    wider = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(PlanError, match=r"another model: 0.weight has shape \[7, 5\], the plan expects \[6, 5\]\."):
        cut(wider, structure, keep)
    with pytest.raises(PlanError, match=r"another model: it expects a tensor 0.weight of shape \[6, 5\]"):
        cut(nn.ModuleDict({"x": small()}), structure, keep)
    with pytest.raises(PlanError, match="names or shapes of its tensors differ"):
        cut(nn.Sequential(*small(), nn.Linear(3, 3)), structure, keep)


# Fused attention.


def heads(model: nn.Module, inputs: object, kept: int) -> nn.Module:
    structure = infer(model, inputs, kinds=["head"])
    keep = {g.name: torch.arange(g.size) >= g.size - kept for g in structure.groups}
    assert keep
    smaller = cut(model, structure, keep)
    prove(mask(model, structure.groups, keep), smaller, inputs)
    return smaller


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_encoder_layers_run_after_heads_went(nested, grad) -> None:
    """Without gradients and in evaluation PyTorch's layers take a shortcut that knows nothing of cut heads."""
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
    tokens, padding = torch.randn(2, 6, 8), torch.arange(6)[None] >= torch.tensor([[4], [6]])
    for model in (layer, nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)):
        smaller = heads(model, tokens, 3)
        with torch.set_grad_enabled(grad):
            trained, running = smaller.train()(tokens), smaller.eval()(tokens)
            torch.testing.assert_close(trained, running)
            padded = smaller(tokens, src_key_padding_mask=padding)
        torch.testing.assert_close(padded[1], running[1])
        assert not torch.allclose(padded[0, :4], running[0, :4])


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_is_proven_on_padded_inputs() -> None:
    """PyTorch's encoder packs them for its shortcut, where it may take it; the proof may not."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 2)
    padding = torch.arange(6)[None] >= torch.tensor([[4], [6]])
    heads(model, {"src": torch.randn(2, 6, 8), "src_key_padding_mask": padding}, 3)


def test_attention_that_keeps_all_heads_stays_pytorchs() -> None:
    model = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    tokens = torch.randn(2, 6, 8)
    structure = infer(model, tokens)
    smaller = cut(model, structure, {"linear1": torch.arange(16) < 9})
    assert type(smaller.self_attn) is nn.MultiheadAttention
    assert heads(model, tokens, 2).self_attn.num_heads == 2


# The proof.


def test_the_proof_catches_a_wrong_type() -> None:
    """A structure whose one member is another atom cuts the wrong columns: values differ."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    structure = infer(model, rows)
    crossed = replace(structure, tensors={**structure.tensors, "4.weight": (Fixed(3), Atom("0", 6))})
    keep = {"0": torch.arange(6) < 4, "2": torch.arange(6) >= 2}
    masked = mask(model, structure.groups, keep)
    prove(masked, cut(model, structure, keep), rows)
    with pytest.raises(ProofError, match=r"differ by .* in (output 0|4, call 1) \(allowed 1e-08 of its spread\)"):
        prove(masked, cut(model, crossed, keep), rows)


def test_the_proof_catches_a_tensor_that_was_forgotten() -> None:
    model = small()
    structure, keep = four_of_six(model)
    forgotten = replace(structure, tensors={k: v for k, v in structure.tensors.items() if k != "3.weight"})
    with pytest.raises(ProofError, match=r"the cut model does not run on the example inputs .*RuntimeError"):
        prove(mask(model, structure.groups, keep), cut(model, forgotten, keep), rows)


def test_the_proof_catches_forgotten_statistics() -> None:
    model = small()
    model[1].running_mean.normal_()
    structure, keep = four_of_six(model)
    swapped = cut(model, structure, keep)
    swapped[1].running_mean = swapped[1].running_mean.flip(0)
    with pytest.raises(ProofError):
        prove(mask(model, structure.groups, keep), swapped, rows)


def test_the_proof_catches_an_output_of_another_shape_or_number() -> None:
    model = small()
    with pytest.raises(ProofError, match=r"output 0 of the cut model has shape \[8, 2\], of the original \[8, 3\]"):
        prove(model, nn.Linear(5, 2), rows)

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(ProofError, match="the cut model has 2 outputs, the original 1"):
        prove(nn.Linear(5, 2), Two(5, 2), rows)


def test_a_head_of_zeros_does_not_hide_a_difference() -> None:
    """A classifier initialised to zero says the same whatever comes in; its inputs are witnesses."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[3].weight)
    structure = infer(model, rows).restricted(["0"])
    keep = {"0": torch.arange(6) < 4}
    masked, smaller = mask(model, structure.groups, keep), cut(model, structure, keep)
    prove(masked, smaller, rows)
    with torch.no_grad():
        smaller[2].weight += 0.1
    with torch.no_grad():
        assert torch.equal(masked(rows), smaller(rows))
    with pytest.raises(ProofError, match="in 2, call 1"):
        prove(masked, smaller, rows)


def test_a_large_constant_does_not_hide_a_difference() -> None:
    model = small()
    nn.init.constant_(model[3].bias, 1e4)
    structure, keep = four_of_six(model)
    smaller = cut(model, structure, keep)
    with torch.no_grad():
        smaller[3].weight[0] += 0.01
    with pytest.raises(ProofError):
        prove(mask(model, structure.groups, keep), smaller, rows)


def test_rounding_is_no_difference() -> None:
    """Sums of 4096 entries in another order differ in float32, and not in float64."""
    model = nn.Sequential(nn.Linear(5, 4096), nn.ReLU(), nn.Linear(4096, 3))
    with torch.no_grad():
        model[2].weight *= torch.logspace(-4, 4, 4096)
    structure = infer(model, rows)
    keep = random_keep(structure, seed=3)
    assert prove(mask(model, structure.groups, keep), cut(model, structure, keep), rows) < 1e-5


def test_nans_in_the_same_places_agree_and_in_others_do_not() -> None:
    model = nn.Linear(5, 3)
    nans = torch.cat([rows, torch.full_like(rows, torch.nan)])
    assert prove(model, copy.deepcopy(model), nans) == 0.0
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bias[1] = torch.nan
    with pytest.raises(ProofError, match="differ by inf in output 0"):
        prove(model, broken, rows)


@pytest.mark.parametrize("nothing", [torch.full_like(rows, torch.nan), rows[:0]])
def test_outputs_without_a_number_prove_nothing(nothing: Tensor) -> None:
    model = nn.Linear(5, 3)
    with pytest.raises(DataError, match=r"hold no finite number.*at least one, without NaN"):
        prove(model, nn.Linear(5, 3), nothing)


def test_named_tuples_stay_what_they_are_where_a_proof_looks_closer() -> None:
    class Pair(NamedTuple):
        x: Tensor
        shift: Tensor

    class Reads(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.up, self.factor = nn.Linear(5, 3), factor

        def forward(self, pair: Pair) -> Tensor:
            return self.up(pair.x) * self.factor + pair.shift

    model, pair = Reads(1.0), Pair(rows, torch.ones(1))
    rounded = copy.deepcopy(model)
    rounded.factor = 1.001
    with pytest.raises(ProofError, match=r"in output 0|in up"):
        prove(model, rounded, (pair,))


def test_random_numbers_are_the_same_for_both_and_used_up_for_nobody() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(F.relu(self.up(x)))
            return y + torch.randn_like(y)

    model = Noisy()
    structure = infer(model, rows)
    keep = random_keep(structure)
    state = torch.get_rng_state()
    prove(mask(model, structure.groups, keep), cut(model, structure, keep), rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_run_leaves_behind_is_not_in_the_cut_model() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.seen.append(len(x))
            return self.down(F.relu(self.up(x)))

    model = Counting()
    structure = infer(model, rows)
    keep = random_keep(structure)
    smaller = cut(model, structure, keep)
    prove(mask(model, structure.groups, keep), smaller, rows)
    for left in (model, smaller):
        assert int(left.steps) == 0
        assert left.seen == []


def test_a_module_called_output_is_no_output() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.output(x)

    model = Named()
    structure = infer(model, rows)
    keep = {"output.0": torch.arange(6) < 4}
    prove(mask(model, structure.groups, keep), cut(model, structure, keep), rows)


def test_a_model_that_draws_in_evaluation_mode_is_told_so() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.up(x), 0.5))

    model = Forgetful()
    structure = infer(model, rows)
    keep = random_keep(structure, seed=1)
    before = torch.get_rng_state()
    with pytest.raises(ProofError, match=r"draws random numbers, .* as in F\.dropout\(x, training=self\.training\)\."):
        prove(mask(model, structure.groups, keep), cut(model, structure, keep), rows)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_of_another_dtype_than_the_plan_is_told_so() -> None:
    model = small()
    structure, keep = four_of_six(model)
    half = copy.deepcopy(model).half()
    with pytest.raises(ModelError, match=r"does not run on the plan's example inputs \(RuntimeError: .*dtype"):
        prove(mask(half, structure.groups, keep), cut(half, structure, keep), rows)


def test_weights_with_channels_last_stay_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)
    structure = infer(model, images)
    smaller = cut(model, structure, {"0": torch.tensor([True, False, True, True, False, True])})
    for at in (0, 2):
        assert smaller[at].weight.is_contiguous(memory_format=torch.channels_last)
        assert not smaller[at].weight.is_contiguous()
    turned = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    turned[0].weight = nn.Parameter(torch.randn(5, 6).t())
    structure = infer(turned, rows)
    assert all(p.is_contiguous() for p in cut(turned, structure, {"0": torch.arange(6) < 4}).parameters())
