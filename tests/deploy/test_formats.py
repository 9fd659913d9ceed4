"""Which forms a layer's zeros, its type and the machine allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.core.errors import ModelError
from secateurs.deploy import formats
from secateurs.deploy.formats import block_size, density, forms, is_sparse_layer, no_2_4, unfit
from secateurs.deploy.kernels import BagProduct, BsrProduct, CsrProduct, MapLayer, RowsLayer, ShrunkLinear


def zeroed(layer: nn.Module, mask: torch.Tensor) -> nn.Module:
    layer.requires_grad_(False).weight.copy_(mask * (1 + torch.rand(mask.shape)))
    return layer


def checks(rows: int, columns: int, every: int = 3) -> torch.Tensor:
    """A weight in every third place, so that no row or column is empty."""
    return (torch.arange(rows)[:, None] + torch.arange(columns)) % every == 0


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv2d(2, 2, 1), True),
        (nn.Conv2d(2, 2, 1, groups=2), False),
        (nn.Conv1d(2, 2, 1), False),
        (nn.ConvTranspose2d(2, 2, 1), False),
        (nn.ReLU(), False),
        (nn.MultiheadAttention(4, 2).out_proj, True),
    ],
)
def test_kinds(layer: nn.Module, known: bool) -> None:
    assert is_sparse_layer(layer) is known


def test_a_subclass_with_its_own_forward_is_not_known() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert not is_sparse_layer(Scaled(2, 2))


def test_forms_of_a_linear_layer() -> None:
    found = forms(zeroed(nn.Linear(6, 6), checks(6, 6)))
    assert list(found.makers) == ["csr", "bag"]
    assert found.refused == {}
    made = {name: make() for name, make in found.makers.items()}
    assert all(isinstance(layer, RowsLayer) for layer in made.values())
    assert isinstance(made["csr"].product, CsrProduct)
    assert isinstance(made["bag"].product, BagProduct)


def test_forms_of_dead_rows_and_columns() -> None:
    mask = checks(6, 6).clone()
    mask[0] = False
    assert list(forms(zeroed(nn.Linear(6, 6), mask)).makers) == ["csr", "bag", "shrunk"]
    assert isinstance(forms(zeroed(nn.Linear(6, 6), mask.t())).makers["shrunk"](), ShrunkLinear)


def test_a_layer_of_zeros_is_only_shrunk() -> None:
    # Four inputs without any weight also keep the pattern 2:4.
    found = forms(zeroed(nn.Linear(4, 4), torch.zeros(4, 4)))
    assert list(found.makers) == ["shrunk"]
    assert list(found.refused) == ["2:4"]


def test_forms_of_convolutions() -> None:
    layer = zeroed(nn.Conv2d(6, 6, 1), checks(6, 6)[..., None, None])
    assert isinstance(forms(layer).makers["bag"](), MapLayer)
    named = zeroed(nn.Conv2d(6, 6, 1, padding="same"), checks(6, 6)[..., None, None])
    assert list(forms(named).makers) == []


def test_half_precision_has_no_product_on_a_cpu() -> None:
    layer = zeroed(nn.Linear(6, 6), checks(6, 6))
    assert list(forms(layer.bfloat16()).makers) == []
    assert list(forms(layer.double()).makers) == ["csr", "bag"]


def blocks(rows: int, columns: int, size: int, every: int = 3) -> torch.Tensor:
    return checks(rows, columns, every).repeat_interleave(size, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_blocks_are_found(size: int) -> None:
    mask = blocks(3, 6, size)
    assert block_size(mask.float()) == size
    layer = zeroed(nn.Linear(6 * size, 3 * size), mask)
    made = forms(layer).makers[f"bsr:{size}x{size}"]()
    assert isinstance(made.product, BsrProduct)


def test_blocks_with_few_holes_count_and_others_do_not() -> None:
    mask = blocks(3, 3, 4).float()  # three blocks of 16
    mask[0, 0] = 0
    assert block_size(mask) == 4
    mask[:4, :3] = 0
    assert block_size(mask) is None  # 48 stored for 36


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (3, 3)])
def test_sizes_that_blocks_do_not_divide(shape: tuple[int, int]) -> None:
    assert block_size(torch.ones(shape)) is None


def test_density() -> None:
    layer = zeroed(nn.Linear(4, 2), torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]))
    assert density(layer) == 3 / 8


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    getattr(layer, name)[0] = value
    with pytest.raises(ModelError, match=f"the {name} of a Linear has entries that are NaN or infinite"):
        density(layer)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_stays_dense() -> None:
    assert unfit(nn.Linear(2, 0), 0.0) == "it has no weights"


def test_layers_that_stay_dense() -> None:
    assert unfit(nn.Linear(2, 2), 1.0) == "none of its weights is zero"
    assert unfit(nn.Linear(2, 2), 0.96) == "hardly any of its weights are zero"
    assert unfit(nn.Linear(2, 2), 0.95) == ""
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert unfit(hooked, 0.1) == "it has hooks, which another form would not run"
    assert "parametrized" in unfit(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 0.1)
    assert unfit(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 0.1) == "its padding is 'circular'"


def two_of_four() -> nn.Module:
    return zeroed(nn.Linear(8, 8), torch.tensor([1, 0, 1, 0]).repeat(8, 2))


def test_two_of_four_is_refused_without_a_gpu() -> None:
    sentence = "2:4 kernels need a CUDA GPU of compute capability 8.0 or newer, and the model is on cpu"
    assert no_2_4(torch.device("cpu")) == sentence
    assert forms(two_of_four()).refused == {"2:4": sentence}
    assert forms(zeroed(nn.Linear(6, 6), checks(6, 6))).refused == {}
    assert forms(zeroed(nn.Linear(8, 8), torch.tensor([1, 1, 1, 0]).repeat(8, 2))).refused == {}


def test_two_of_four_is_refused_by_old_gpus_and_failing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert no_2_4(device) == "2:4 kernels need compute capability 8.0 or newer, and cuda:3 has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(formats, "_tried_2_4", lambda d: f"tried on {d}")
    assert no_2_4(device) == "tried on cuda:3"


def test_the_kernel_is_tried() -> None:
    # The kernel does not take tensors of a CPU: the trial says so instead of raising.
    assert formats._tried_2_4(torch.device("cpu")).startswith("the 2:4 kernel of cpu fails: ")


def test_a_kernel_with_wrong_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(off: float) -> object:
        return lambda weight, bias: lambda x: nn.functional.linear(x, weight) + off

    formats._tried_2_4.cache_clear()
    monkeypatch.setattr(formats, "SemiStructuredLayer", made(0))
    assert formats._tried_2_4(torch.device("cpu")) == ""
    formats._tried_2_4.cache_clear()
    monkeypatch.setattr(formats, "SemiStructuredLayer", made(1))
    assert formats._tried_2_4(torch.device("cpu")) == "the 2:4 kernel of cpu gives wrong results"
    formats._tried_2_4.cache_clear()


def test_two_of_four_where_the_kernel_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "no_2_4", lambda device: "")
    monkeypatch.setattr(formats, "SemiStructuredLayer", lambda weight, bias: ("packed", weight.dtype))
    found = forms(two_of_four())
    assert found.refused == {"2:4": "2:4 kernels take half precision, and the weight is torch.float32"}
    assert forms(two_of_four().half()).makers["2:4"]() == ("packed", torch.float16)
