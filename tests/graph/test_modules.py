"""The attention that can lose heads computes what PyTorch's computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs as sec
from secateurs.core.errors import OptionError
from secateurs.graph.modules import MultiheadAttention
from secateurs.graph.twin import attention_swaps, swap_attention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 4, 5, 8, 2


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    own = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.5)
    other = copy.deepcopy(own)
    swap_attention(other, [""])
    assert type(other) is MultiheadAttention
    return own, other


def inputs(kdim: int = WIDTH, vdim: int = WIDTH, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, batch first."""
    return torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, KEYS, kdim), torch.randn(BATCH, KEYS, vdim)


def turned(qkv: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
    return qkv if options.get("batch_first") else tuple(t.transpose(0, 1) for t in qkv)


def agree(pairs: tuple[nn.Module, nn.Module], qkv: tuple[Tensor, ...], **call: Any) -> None:
    with torch.no_grad():
        wanted, got = (module(*qkv, **call) for module in pairs)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert (got[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-5)


def boolean(*shape: int) -> Tensor:
    """True is left out; the first key never is, so that no row is empty."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS = {
    "none": {},
    "bool": {"attn_mask": (boolean, (QUERIES, KEYS))},
    "float": {"attn_mask": (torch.randn, (QUERIES, KEYS))},
    "bool-3d": {"attn_mask": (boolean, (BATCH * HEADS, QUERIES, KEYS))},
    "float-3d": {"attn_mask": (torch.randn, (BATCH * HEADS, QUERIES, KEYS))},
    "padding": {"key_padding_mask": (boolean, (BATCH, KEYS))},
    "float-padding": {"key_padding_mask": (torch.randn, (BATCH, KEYS))},
    "both": {"attn_mask": (boolean, (QUERIES, KEYS)), "key_padding_mask": (boolean, (BATCH, KEYS))},
    "both-3d": {
        "attn_mask": (torch.randn, (BATCH * HEADS, QUERIES, KEYS)),
        "key_padding_mask": (torch.randn, (BATCH, KEYS)),
    },
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"kdim": 3, "vdim": 6, "batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3, "vdim": 6},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_outputs_and_weights_are_equal(options: dict[str, Any], mask: str) -> None:
    pairs, qkv = pair(**options), turned(inputs(**options), options)
    masks = {name: make(*shape) for name, (make, shape) in MASKS[mask].items()}
    agree(pairs, qkv, **masks)
    agree(pairs, qkv, average_attn_weights=False, **masks)
    agree(pairs, qkv, need_weights=False, **masks)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("masked", [False, True])
def test_unbatched_inputs(options: dict[str, Any], masked: bool) -> None:
    qkv = tuple(t[0] for t in inputs(**options))
    masks = {"attn_mask": boolean(HEADS, QUERIES, KEYS), "key_padding_mask": boolean(KEYS)} if masked else {}
    for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        agree(pair(**options), qkv, **call, **masks)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention(need_weights: bool, padded: bool) -> None:
    x = torch.randn(BATCH, KEYS, WIDTH)
    masks = {"attn_mask": torch.ones(KEYS, KEYS).triu(1).bool()}
    if padded:
        masks["key_padding_mask"] = boolean(BATCH, KEYS)
    pairs = pair(batch_first=True)
    agree(pairs, (x, x, x), need_weights=need_weights, is_causal=True, **masks)
    with torch.no_grad():
        later = x.clone()
        later[:, -1] += 1
        before, after = (pairs[1](t, t, t, is_causal=True, need_weights=need_weights, **masks)[0] for t in (x, later))
    torch.testing.assert_close(before[:, :-1], after[:, :-1])


@pytest.mark.parametrize("options", OPTIONS[4:6], ids=lambda o: "+".join(o))
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_attention_with_keys_of_its_own(options: dict[str, Any], need_weights: bool) -> None:
    qkv = turned((torch.randn(BATCH, KEYS, WIDTH),) * 3, options)
    mask = torch.ones(KEYS, KEYS).triu(1).bool()
    agree(pair(**options), qkv, need_weights=need_weights, is_causal=True, attn_mask=mask)


def test_causal_without_a_mask_is_refused() -> None:
    x = torch.randn(BATCH, KEYS, WIDTH)
    with pytest.raises(OptionError, match="is_causal is only a hint about attn_mask: give the mask as well"):
        pair()[1](x, x, x, is_causal=True)


def test_gradients_are_equal() -> None:
    own, other = pair(batch_first=True)
    qkv = inputs()
    for module in (own, other):
        module(*qkv)[0].square().sum().backward()
    for a, b in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    _, module = pair(dropout=0.9, batch_first=True)
    qkv = inputs()
    for call in ({}, {"need_weights": False}):
        still = [module.eval()(*qkv, **call)[0] for _ in range(2)]
        moving = [module.train()(*qkv, **call)[0] for _ in range(2)]
        assert still[0].equal(still[1])
        assert not moving[0].equal(moving[1])


def test_only_pytorchs_own_class_is_swapped() -> None:
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(4, 2), Own(4, 2), nn.Linear(2, 2)])
    assert attention_swaps(model) == ("0",)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_works_after_heads_were_cut(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=norm_first).eval()
    x = torch.randn(3, 5, 16)
    made = sec.prune(layer, x, "sparsity=50%", granularity="head", measure=False)
    attention = made.model.self_attn
    assert (attention.num_heads, tuple(attention.in_proj_weight.shape)) == (2, (24, 16))
    assert tuple(attention.out_proj.weight.shape) == (16, 8)
    masked = made.plan.mask(layer)
    padding = torch.zeros(3 if batch_first else 5, 5 if batch_first else 3, dtype=torch.bool)
    padding[0, -1] = True
    other = torch.randn(3, 5, 16)
    for call in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            torch.testing.assert_close(made.model.eval()(other, **call), masked.eval()(other, **call))
    made.model.train()(other).sum().backward()
    assert attention.in_proj_weight.grad is not None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_layers_works_with_padding_after_heads_were_cut() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 16)
    made = sec.prune(model, x, "sparsity=50%", granularity="head", measure=False)
    assert sum(each.self_attn.num_heads for each in made.model.layers) == 4
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, -2:] = True
    with torch.no_grad():
        got, wanted = (m.eval()(x, src_key_padding_mask=padding) for m in (made.model, made.plan.mask(model)))
    torch.testing.assert_close(got[~padding], wanted[~padding])
