from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.dims import Atom, Fixed, product
from secateurs.core.errors import ModelError, OptionError
from secateurs.core.units import ChannelGroup, WeightGroup
from secateurs.criteria import score
from secateurs.criteria.activation import input_norms, output_moments
from tests.criteria.models import ConvNet, first_channels, images, member, mlp, weight_groups


def test_wanda_of_a_linear_layer_entry_by_entry() -> None:
    model, data = nn.Sequential(nn.Linear(3, 2)), [torch.randn(2, 4, 3), torch.randn(1, 4, 3)]
    tokens = torch.cat([x.reshape(-1, 3) for x in data])
    weight = model[0].weight
    expected = [
        abs(weight[i, j].item()) * sum(t[j].item() ** 2 for t in tokens) ** 0.5 for i in range(2) for j in range(3)
    ]
    assert score("wanda", model, [WeightGroup("0.weight", (2, 3))], data=data)["0.weight"].tolist() == pytest.approx(
        expected
    )


def test_wanda_sees_the_input_of_each_layer() -> None:
    model, x = mlp(3, 5, 2), torch.randn(7, 3)
    found = score("wanda", model, weight_groups(model), data=[x])["2.weight"]
    expected = model[2].weight.abs() * model[1](model[0](x)).norm(dim=0)
    torch.testing.assert_close(found, expected.detach().flatten())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"stride": 2, "padding": (2, 1)},
        {"dilation": (1, 2), "padding": 2},
        {"groups": 2, "padding": 1},
        {"groups": 4, "stride": 3},
        {"padding": "same", "dilation": 2},
    ],
    ids=str,
)
def test_wanda_of_a_convolution_is_wanda_of_the_unfolded_layer(options: dict[str, object]) -> None:
    conv = nn.Conv2d(4, 8, 3, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 8, 9)
    padding = 2 if conv.padding == "same" else conv.padding
    columns = F.unfold(x, 3, dilation=conv.dilation, padding=padding, stride=conv.stride)
    norms = columns.transpose(1, 2).flatten(0, 1).norm(dim=0).view(conv.groups, 4 // conv.groups, 3, 3)
    rows = [conv.weight[o].abs() * norms[o // (8 // conv.groups)] for o in range(8)]
    found = score("wanda", nn.Sequential(conv), [WeightGroup("0.weight", tuple(conv.weight.shape))], data=[x])[
        "0.weight"
    ]
    torch.testing.assert_close(found, torch.stack(rows).detach().flatten())


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([0, 1, "same", "valid"]),
    st.sampled_from([1, 2]),
)
@example(nn.Conv2d, "zeros", 2, 1, 1, "same", 1)
def test_column_energies_are_the_derivative_of_a_convolution_of_squares(
    kind: type[nn.Conv2d], mode: str, kernel: int, stride: int, dilation: int, padding: int | str, groups: int
) -> None:
    """The sum of conv(x²) is linear in the weights; its derivative by a weight is the energy that the weight sees."""
    stride = 1 if padding == "same" else stride
    conv = kind(2, 4, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode).double()  # type: ignore[arg-type]
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]  # type: ignore[index]
    x = torch.randn(2, 2, *[6] * dims, dtype=torch.float64)
    (expected,) = torch.autograd.grad(conv(x.square()).sum(), conv.weight)
    norms = input_norms(nn.Sequential(conv), ["0.weight"], [x])["0.weight"]
    torch.testing.assert_close(norms.square().expand_as(conv.weight), expected)


def test_a_convolution_may_be_given_one_image() -> None:
    conv, x = nn.Conv2d(2, 3, 3), torch.randn(2, 6, 6)
    one = input_norms(nn.Sequential(conv), ["0.weight"], [x])["0.weight"]
    assert torch.equal(one, input_norms(nn.Sequential(conv), ["0.weight"], [x[None]])["0.weight"])
    assert output_moments(nn.Sequential(conv), ["0.weight"], [x])["0.weight"].count == 16


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2: a linear layer whose weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_transposed_linear_layers_agree_with_linear_ones() -> None:
    odd, plain = Conv1D(2, 3), nn.Linear(3, 2)
    plain.weight.data, plain.bias.data = odd.weight.data.T.clone(), odd.bias.data.clone()
    x = torch.randn(4, 5, 3)
    one = score("wanda", nn.Sequential(odd), [WeightGroup("0.weight", (3, 2))], data=[x])["0.weight"]
    two = score("wanda", nn.Sequential(plain), [WeightGroup("0.weight", (2, 3))], data=[x])["0.weight"]
    torch.testing.assert_close(one.view(3, 2).T, two.view(2, 3))
    width = Atom("w", 2)
    for name in ("activation-norm", "activation-variance"):
        first = score(
            name, nn.Sequential(odd), [ChannelGroup("w", 2, "channel", (member("0.weight", 1, width, 2),))], data=[x]
        )
        other = score(
            name, nn.Sequential(plain), [ChannelGroup("w", 2, "channel", (member("0.weight", 0, width, 2),))], data=[x]
        )
        torch.testing.assert_close(first["w"], other["w"])


def test_the_conv1d_of_hugging_face_is_known() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(2, 3)
    x = torch.randn(4, 3)
    torch.testing.assert_close(
        input_norms(nn.Sequential(layer), ["0.weight"], [x])["0.weight"], x.double().norm(dim=0)[:, None]
    )


def test_the_input_of_an_embedding_is_one_hot() -> None:
    model = nn.Sequential(nn.Embedding(4, 2))
    ids = torch.tensor([[0, 1, 1], [1, 1, 3]])
    found = score("wanda", model, [WeightGroup("0.weight", (4, 2))], data=[ids])["0.weight"]
    hot = F.one_hot(ids.flatten(), 4).float().norm(dim=0)
    torch.testing.assert_close(found.view(4, 2), (model[0].weight.abs() * hot[:, None]).detach())
    assert found.view(4, 2)[2].tolist() == [0.0, 0.0]


def test_wanda_refuses_layers_whose_input_it_does_not_know() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2))
    with pytest.raises(
        ModelError, match=r"'wanda' has no score for group '0.weight': none of its tensors \(0.weight\) is the weight"
    ):
        score("wanda", model, [WeightGroup("0.weight", (2, 3, 2, 2))], data=[torch.randn(1, 2, 4, 4)])


def test_wanda_of_channels_is_lifted_from_entries() -> None:
    model, data = ConvNet(), images()
    entries = score("wanda", model, weight_groups(model), data=data)
    found = score("wanda", model, [first_channels()], data=data, normalize="none", combine="sum")["first"]
    rows, columns = entries["first.weight"].view(4, -1).sum(1), entries["second.weight"].view(3, 4, -1).sum((0, 2))
    torch.testing.assert_close(found, rows + columns)


# -- relative importance -----------------------------------------------------------------------------------------------


def relative(matrix: Tensor) -> Tensor:
    """Entry by entry |w|/Σ of its column + |w|/Σ of its row."""
    out = torch.zeros_like(matrix)
    for i, row in enumerate(matrix.abs().tolist()):
        for j, size in enumerate(row):
            out[i, j] = size / sum(matrix.abs()[:, j].tolist()) + size / sum(row)
    return out


@pytest.mark.parametrize("power", [0.5, 0.0, 2.0])
def test_ria_of_a_linear_layer_entry_by_entry(power: float) -> None:
    model, data = nn.Sequential(nn.Linear(3, 2)), [torch.randn(2, 4, 3), torch.randn(1, 4, 3)]
    norms = torch.cat([x.reshape(-1, 3) for x in data]).norm(dim=0)
    found = score("ria", model, [WeightGroup("0.weight", (2, 3))], data=data, power=power)["0.weight"]
    torch.testing.assert_close(found, (relative(model[0].weight.detach()) * norms**power).flatten())


def test_half_a_power_is_the_default_of_ria() -> None:
    model, groups, data = nn.Linear(3, 2), [WeightGroup("weight", (2, 3))], [torch.randn(5, 3)]
    found = score("ria", model, groups, data=data)["weight"]
    assert torch.equal(found, score("ria", model, groups, data=data, power=0.5)["weight"])
    assert not torch.equal(found, score("ria", model, groups, data=data, power=1.0)["weight"])


def test_ria_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -3.0], [3.0, 0.0]])
    # Norms 4 and 9; rows sum to 4 and 3, columns to 4 and 3.
    data = [torch.tensor([[4.0, 0.0], [0.0, 9.0]])]
    found = score("ria", model, [WeightGroup("weight", (2, 2))], data=data)["weight"].view(2, 2)
    torch.testing.assert_close(found, torch.tensor([[(1 / 4 + 1 / 4) * 2, (1 + 3 / 4) * 3], [(3 / 4 + 1) * 2, 0.0]]))


def test_ria_of_a_grouped_convolution_is_that_of_each_matrix() -> None:
    conv, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6)
    model, shape = nn.Sequential(conv), (6, 2, 3, 3)
    norms = input_norms(model, ["0.weight"], [x])["0.weight"].expand(shape).float()
    parts = [relative(half.flatten(1)) for half in conv.weight.detach().split(3)]
    found = score("ria", model, [WeightGroup("0.weight", shape)], data=[x])["0.weight"].view(shape)
    torch.testing.assert_close(found, torch.cat(parts).view(shape) * norms.sqrt())


def test_ria_of_transposed_layers_and_embeddings() -> None:
    odd, plain, x = Conv1D(2, 3), nn.Linear(3, 2), torch.randn(4, 3)
    plain.weight.data = odd.weight.data.T.clone()
    one = score("ria", nn.Sequential(odd), [WeightGroup("0.weight", (3, 2))], data=[x])["0.weight"]
    two = score("ria", nn.Sequential(plain), [WeightGroup("0.weight", (2, 3))], data=[x])["0.weight"]
    torch.testing.assert_close(one.view(3, 2).T, two.view(2, 3))
    table = nn.Sequential(nn.Embedding(4, 2))
    found = score("ria", table, [WeightGroup("0.weight", (4, 2))], data=[torch.tensor([[0, 1, 1], [1, 1, 3]])])
    counts = torch.tensor([1.0, 4.0, 0.0, 1.0])
    expected = relative(table[0].weight.detach()) * counts.sqrt().sqrt()[:, None]
    torch.testing.assert_close(found["0.weight"].view(4, 2), expected)


def test_rows_and_columns_of_zeros_have_no_relative_importance() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    found = score("ria", model, [WeightGroup("weight", (2, 3))], data=[torch.ones(1, 3)])["weight"]
    torch.testing.assert_close(found, torch.tensor([0.0, 1 + 2 / 3, 1 + 1 / 3, 0.0, 0.0, 0.0]))


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(OptionError, match=r"power must be at least 0, got -0\.5"):
        score("ria", nn.Linear(3, 2), [WeightGroup("weight", (2, 3))], data=[torch.ones(1, 3)], power=-0.5)


# -- outputs -----------------------------------------------------------------------------------------------------------


def concatenated(model: nn.Module, module: nn.Module, data: list[Tensor], channel: int) -> Tensor:
    """All outputs of `module` as [observations, channels], kept in memory."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, out: kept.append(out.movedim(channel, -1).flatten(0, -2)))
    with torch.no_grad():
        for x in data:
            model.eval()(x)
    handle.remove()
    return torch.cat(kept).double()


@pytest.mark.parametrize(
    ("layer", "shape", "channel"),
    [
        (nn.Conv1d(3, 4, 2), (2, 3, 5), 1),
        (nn.Conv2d(3, 4, 2), (2, 3, 5, 5), 1),
        (nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4), 1),
        (nn.Linear(3, 4), (2, 5, 3), -1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_statistics_are_those_of_all_outputs(layer: nn.Module, shape: tuple[int, ...], channel: int) -> None:
    model, data = nn.Sequential(layer), [torch.randn(shape), 3 + torch.randn(shape), torch.randn(1, *shape[1:])]
    outputs = concatenated(model, layer, data, channel)
    group = ChannelGroup("w", 4, "channel", (member("0.weight", 0, Atom("w", 4), layer.weight.dim()),))  # type: ignore[union-attr,operator]
    variance = score("activation-variance", model, [group], data=data, normalize="none")["w"]
    norm = score("activation-norm", model, [group], data=data, normalize="none")["w"]
    torch.testing.assert_close(variance, torch.var(outputs, 0, correction=0).float())
    torch.testing.assert_close(norm, outputs.square().mean(0).sqrt().float())


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose1d(3, 4, 2)], ids=lambda m: type(m).__name__
)
def test_transposed_convolutions_make_channels_on_axis_one(layer: nn.Module) -> None:
    rank = layer.weight.dim()  # type: ignore[union-attr,operator]
    model, data = nn.Sequential(layer), [torch.randn(2, 3, *[4] * (rank - 2))]
    group = ChannelGroup("w", 4, "channel", (member("0.weight", 1, Atom("w", 4), rank),))
    outputs = concatenated(model, layer, data, 1)
    found = score("activation-variance", model, [group], data=data, normalize="none")["w"]
    torch.testing.assert_close(found, outputs.var(0, correction=0).float())


def test_grouped_transposed_convolutions_are_refused() -> None:
    """Their weight has fewer positions on axis one than the layer has outputs."""
    model, data = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2)), [torch.randn(1, 4, 3, 3)]
    group = ChannelGroup("w", 2, "channel", (member("0.weight", 1, Atom("w", 2), 4),))
    with pytest.raises(ModelError, match="'activation-variance' has no score for group 'w'"):
        score("activation-variance", model, [group], data=data)


def test_positions_of_a_head_are_summed() -> None:
    model, data = mlp(3, 6), [torch.randn(20, 3)]
    heads = ChannelGroup("h", 3, "head", (member("0.weight", 0, product(Atom("h", 3), Fixed(2)), 2),))
    outputs = model(data[0]).detach().double()
    variance = outputs.var(0, correction=0).view(3, 2)
    power = outputs.square().mean(0).view(3, 2)
    options = {"data": data, "normalize": "none"}
    torch.testing.assert_close(score("activation-variance", model, [heads], **options)["h"], variance.sum(1).float())
    torch.testing.assert_close(
        score("activation-variance", model, [heads], reduce="mean", **options)["h"], variance.mean(1).float()
    )
    torch.testing.assert_close(score("activation-norm", model, [heads], **options)["h"], power.sum(1).sqrt().float())


def test_only_layers_that_make_the_unit_count() -> None:
    model, data = ConvNet(), [x for x, _ in images()]
    outputs = concatenated(model, model.first, data, 1)
    found = score("activation-variance", model, [first_channels()], data=data, normalize="none")["first"]
    torch.testing.assert_close(found, outputs.var(0, correction=0).float(), rtol=1e-4, atol=1e-6)


def test_producers_of_a_residual_stream_are_combined_after_normalising() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.position = nn.Linear(2, 3), nn.Linear(3, 3), nn.Parameter(torch.randn(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + self.position
            return x + self.block(x)

    model, x, width = Residual(), torch.randn(9, 2), Atom("w", 3)
    parts = [
        member("stem.weight", 0, width, 2),
        member("block.weight", 0, width, 2),
        member("block.weight", 1, width, 2, "in"),
    ]
    group = ChannelGroup("w", 3, "channel", (*parts, member("position", 1, width, 2)))
    stem = model.stem(x).detach()
    block = model.block(stem + model.position).detach()
    expected = sum(v / v.mean() for v in (stem.var(0), block.var(0))) / 2
    torch.testing.assert_close(score("activation-variance", model, [group], data=[x])["w"], expected)


def test_a_unit_that_no_layer_makes_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    group = ChannelGroup("w", 3, "channel", (member("table", 1, Atom("w", 3), 2),))
    with pytest.raises(
        ModelError, match=r"'activation-norm' has no score for group 'w': none of its tensors \(table\)"
    ):
        score("activation-norm", Bare(), [group], data=[torch.randn(1, 2)])


def test_a_constant_channel_has_no_variance() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    model[0].bias.data = torch.tensor([5.0, 0.0])
    group = ChannelGroup("w", 2, "channel", (member("0.weight", 0, Atom("w", 2), 2),))
    data = [torch.randn(4, 2), torch.randn(3, 2)]
    assert score("activation-variance", model, [group], data=data)["w"][0].item() == pytest.approx(0, abs=1e-12)
    assert score("activation-norm", model, [group], data=data, normalize="none")["w"][0].item() == pytest.approx(5)


def test_a_layer_used_twice_is_seen_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(self.lin(x))

    model, x = Twice(), torch.randn(3, 2)
    moments = output_moments(model, ["lin.weight"], [x])["lin.weight"]
    both = torch.cat([model.lin(x), model.lin(model.lin(x))]).detach().double()
    assert moments.count == 6
    torch.testing.assert_close(moments.mean, both.mean(0), rtol=1e-6, atol=1e-6)


def test_inputs_given_by_keyword_are_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(input=x)

    x = torch.randn(3, 2)
    found = input_norms(Named(), ["lin.weight"], [x])["lin.weight"]
    torch.testing.assert_close(found, x.double().norm(dim=0)[None])
