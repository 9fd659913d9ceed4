from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from secateurs.core.errors import ModelError, OptionError
from secateurs.measure._mac_rules import RULES, _rule
from secateurs.measure.macs import macs, macs_by_module, trace


class Function(nn.Module):
    """A module out of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def on(device, *shape):
    return torch.zeros(*shape, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (lambda: nn.Linear(3, 4), (2, 5, 3), 2 * 5 * 3 * 4),
        (lambda: nn.Linear(3, 4, bias=False), (3,), 3 * 4),
        (lambda: nn.Conv1d(3, 4, 5), (2, 3, 9), 2 * 4 * 5 * 3 * 5),
        (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), (1, 4, 7, 6), 6 * 3 * 3 * 2 * 3 * 2),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 5, 5), 8 * 25 * 9),
        (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * 2 * 8),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (5, 2, 3), 2 * 10 * 16 * ((3 + 4) + (8 + 4))),
        (lambda: nn.GRU(3, 4, batch_first=True), (2, 5, 3), 10 * 12 * (3 + 4)),
        (lambda: nn.RNN(3, 4), (5, 2, 3), 10 * 4 * (3 + 4)),
    ],
)
def test_layers_by_hand(build, shape, expected, device):
    with torch.device(device):
        net = build()
    assert macs(net, on(device, *shape)) == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(2, 3), (3, 4)], 24),
        (torch.matmul, [(5, 2, 3), (5, 3, 4)], 120),
        (torch.matmul, [(2, 3), (3,)], 6),
        (torch.dot, [(7,), (7,)], 7),
        (torch.outer, [(3,), (4,)], 0),
        (torch.addr, [(3, 4), (3,), (4,)], 12),
        (torch.addmm, [(4,), (2, 3), (3, 4)], 24),
        (torch.addmv, [(2,), (2, 3), (3,)], 6),
        (torch.baddbmm, [(5, 2, 4), (5, 2, 3), (5, 3, 4)], 120),
        (torch.addbmm, [(2, 4), (5, 2, 3), (5, 3, 4)], 120),
        (lambda a, b: torch.einsum("bik,bjk->bij", a, b), [(5, 2, 3), (5, 4, 3)], 120),
        (F.bilinear, [(2, 3), (2, 4), (5, 3, 4)], 120),
        (F.relu, [(2, 3)], 0),
        (torch.add, [(2, 3), (2, 3)], 0),
        (torch.mm, [(0, 3), (3, 4)], 0),
        (torch.mm, [(2, 0), (0, 4)], 0),
    ],
)
def test_functions_by_hand(function, shapes, expected):
    assert macs(Function(function), tuple(torch.zeros(s) for s in shapes)) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("causal", [False, True])
def test_both_products_of_attention_count_and_masks_save_nothing(device, causal):
    attend = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    q, k, v = on(device, 2, 3, 5, 8), on(device, 2, 3, 7, 8), on(device, 2, 3, 7, 6)
    assert macs(attend, (q, k, v)) == 2 * 3 * 5 * 7 * (8 + 6)


def test_grouped_queries_count_every_query_head():
    attend = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    q, kv = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    assert macs(attend, (q, kv, kv)) == 4 * 5 * 5 * 16


def test_fused_attention_counts_the_size_of_values():
    rule = RULES["aten::_scaled_dot_product_flash_attention_for_cpu"]
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 6)
    assert rule((q, k, v), None, Tensor.numel) == 2 * 3 * 5 * 7 * (8 + 6)


def test_attention_over_packed_sequences():
    query, key = torch.zeros(5, 2, 8), torch.zeros(6, 2, 8)
    ends_q, ends_k = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 6])
    pairs = 2 * 4 + 3 * 2
    flash, efficient = RULES["aten::_flash_attention_forward"], RULES["aten::_efficient_attention_forward"]
    assert flash((query, key, key, ends_q, ends_k), None, Tensor.numel) == pairs * 2 * 16
    assert efficient((query, key, key, None, ends_q, ends_k), None, Tensor.numel) == pairs * 2 * 16
    whole = torch.zeros(3, 5, 2, 8), torch.zeros(3, 6, 2, 8)
    assert flash((whole[0], whole[1], whole[1], None, None), None, Tensor.numel) == 3 * 5 * 6 * 2 * 16
    package = RULES["flash_attn::_flash_attn_forward"]
    assert package((whole[0], whole[1], whole[1], 0.0, 1.0), None, Tensor.numel) == 3 * 5 * 6 * 2 * 16


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((6, 3), (2, 3, 4), 72), ((2, 5, 3), (2, 3, 4), 120), ((2, 5, 3), (3, 8), 120), ((5, 6), (6, 4), 120)],
)
def test_grouped_products(a, b, expected):
    # Rows over experts; batches; columns over groups; the inner axis over groups.
    assert RULES["aten::_grouped_mm"]((torch.zeros(a), torch.zeros(b)), None, Tensor.numel) == expected


def test_fused_recurrent_layers_of_accelerators():
    weights = [torch.zeros(16, 3), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)]
    assert RULES["aten::_cudnn_rnn"]((torch.zeros(5, 2, 3), weights), None, Tensor.numel) == 10 * 16 * 7


def test_a_second_rule_for_an_op_is_refused():
    with pytest.raises(OptionError, match="two rules count the MACs of aten::mm"):
        _rule("aten::mm")(lambda args, output, count: 0.0)


def test_ops_from_elsewhere_without_a_rule_are_named():
    library = torch.library.Library("secateurs_test", "FRAGMENT")
    library.define("squares(Tensor x) -> Tensor")
    library.impl("squares", lambda x: x @ x, "CPU")
    net = Function(lambda x: torch.ops.secateurs_test.squares(x) @ x)
    seen = trace(net, torch.zeros(2, 2))
    assert seen.uncounted == ("secateurs_test::squares",)
    assert seen.macs == {"": 8.0}
    assert trace(nn.Linear(2, 2), torch.zeros(2, 2)).uncounted == ()
    library._destroy()


@given(
    cin=st.integers(1, 4),
    cout=st.integers(1, 4),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
)
def test_convolutions_against_a_count_of_every_product(cin, cout, groups, kernel, stride, transposed):
    layer = nn.ConvTranspose1d if transposed else nn.Conv1d
    net = layer(cin * groups, cout * groups, kernel, stride, groups=groups)
    image = torch.zeros(1, cin * groups, 6)
    # One MAC for each (output channel, input channel of its group, tap, place where the kernel is laid).
    places = 6 if transposed else (6 - kernel) // stride + 1
    every = itertools.product(range(groups), range(cout), range(cin), range(kernel), range(places))
    assert macs(net, image) == sum(1 for _ in every)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", "swin_t"])
def test_half_of_pytorchs_flops(name):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        net, image = getattr(models, name)(weights=None).eval(), torch.zeros(1, 3, 224, 224)
    flops = FlopCounterMode(display=False)
    with flops, torch.no_grad():
        net(image)
    assert macs(net, image) == flops.get_total_flops() / 2


def test_published_macs():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        image = torch.zeros(1, 3, 224, 224)
        found = {name: macs(getattr(models, name)(), image) for name in ("resnet18", "mobilenet_v2")}
    # torchvision's model pages give 1.81 and 0.30 GMACs.
    assert {name: round(value / 1e9, 2) for name, value in found.items()} == {"resnet18": 1.81, "mobilenet_v2": 0.3}


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)


# Projections 4·8·8 and the two products of attention 2·3·8 for each of six tokens; then 8 → 16 → 8.
ENCODER_LAYER = {"self_attn": 6.0 * (4 * 64 + 48), "linear1": 6.0 * 128, "linear2": 6.0 * 128}


def test_pytorchs_fused_encoder_layer_is_opened():
    assert macs_by_module(encoder_layer(), torch.zeros(2, 3, 8)) == ENCODER_LAYER
    assert torch.backends.mha.get_fastpath_enabled()


def test_inference_mode_counts_the_same():
    with torch.inference_mode():
        assert macs_by_module(encoder_layer(), torch.zeros(2, 3, 8)) == ENCODER_LAYER


class Twice(nn.Module):
    """A layer called twice, one under two names, a product of its own, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(4, 4)
        self.early = nn.Linear(4, 4)
        self.alias = self.early
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.late(self.alias(self.early(x))) @ torch.ones(4, 2)


def test_macs_belong_to_the_innermost_module_in_forward_order():
    counted = macs_by_module(Twice(), torch.zeros(1, 4))
    assert list(counted.items()) == [("", 8.0), ("early", 32.0), ("late", 16.0)]
    assert sum(counted.values()) == macs(Twice(), torch.zeros(1, 4)) == 56


def test_shapes_of_first_outputs():
    seen = trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), torch.zeros(1, 1, 4, 4))
    assert seen.shapes == {"0": (1, 2, 2, 2), "1": (1, 8), "": (1, 8)}
    assert list(seen.macs) == ["", "0", "1"]


def test_skip_zeros_counts_products_with_nonzero_weights():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 1), nn.Unflatten(1, (1, 1)), nn.GRU(1, 1)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        net[0].weight[0] = 0
        net[2].weight[0, :5] = 0
        net[4].weight_ih_l0[0] = 0
    image = torch.zeros(1, 1, 3, 3)
    assert macs_by_module(net, image) == {"0": 32.0, "2": 8.0, "4": 6.0}
    assert macs_by_module(net, image, skip_zeros=True) == {"0": 16.0, "2": 3.0, "4": 5.0}
    assert macs(net, image, skip_zeros=True) == 24.0


@pytest.mark.parametrize("build", [lambda: nn.LSTM(2, 3), lambda: nn.ConvTranspose1d(2, 2, 2, groups=2)])
def test_skip_zeros_of_a_dense_model_is_macs(build):
    net, x = build(), torch.zeros(4, 2, 2)
    assert macs(net, x, skip_zeros=True) == macs(net, x) > 0


def test_skip_zeros_ignores_zeros_of_activations():
    assert macs(nn.Linear(3, 4), torch.zeros(2, 3), skip_zeros=True) == 24


def test_skip_zeros_needs_values():
    with pytest.raises(ModelError, match="meta device"):
        macs(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2), skip_zeros=True)


def test_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    net[2].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    macs(net, torch.randn(8, 4))
    assert [m.training for m in net.modules()] == [True, True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_failing_forward_is_a_model_error_and_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 4)).train()
    with pytest.raises(ModelError, match=r"Sequential fails on the inputs given \(shapes: \(1, 3\)\)") as caught:
        macs(net, torch.zeros(1, 3))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert net.training
    assert net[0].training
    assert not net[0]._forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_keyword_inputs_of_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    net = transformers.GPT2LMHeadModel(config)
    inputs = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    # Each of ten tokens: in each layer 12·16² in projections and 2·5·16 in attention; then the vocabulary.
    assert macs(net, inputs) == 10 * (2 * (12 * 256 + 160) + 16 * 50)
