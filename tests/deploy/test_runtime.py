"""The choice follows what was measured, what is chosen is proven, and the result is the same model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateurs.core.errors import ModelError, OptionError, ProofError
from secateurs.deploy import runtime as module
from secateurs.deploy.kernels import CsrProduct, RowsLayer
from secateurs.deploy.runtime import Runtime, SparseLayer, sparse_runtime
from secateurs.measure.latency import Latency, Spread

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def pruned(model: nn.Module, density: float = 0.3, seed: int = 0) -> nn.Module:
    """The model with random zeros in every weight matrix, in evaluation mode; a weight in every row and column."""
    generator = torch.Generator().manual_seed(seed)
    for weight in (p.data for p in model.parameters() if p.dim() > 1):
        kept = torch.rand(weight.shape, generator=generator) < density
        rows, columns = torch.arange(max(weight.shape[:2])) % weight.shape[0], torch.arange(max(weight.shape[:2]))
        kept[rows, columns % weight.shape[1]] = True
        weight.mul_(kept)
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return pruned(nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 6)))


def clock(**times: float) -> Callable[..., Mapping[str, Latency]]:
    """Timings as told, 1 s for what is not; the asked time and threads do not matter."""

    def timer(models: Mapping[str, nn.Module], inputs: Any, **_: Any) -> dict[str, Latency]:
        taken = {name: times.get(name, 1.0) for name in models}
        first = taken[next(iter(models))]
        return {
            name: Latency(t, t, t, 1, "cpu", len(X), 3, Spread(first / t, first / t, first / t))
            for name, t in taken.items()
        }

    return timer


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing should be timed")


def built(model: nn.Module, inputs: Any = X, **options: Any) -> Runtime:
    """The runtime, whose outputs are the model's."""
    made = sparse_runtime(model, inputs, **{"timer": clock(csr=0.5, sparse=0.25), **options})
    with torch.no_grad():
        torch.testing.assert_close(made.model(inputs), model(inputs), atol=1e-5, rtol=1e-4)
    return made


def test_the_fastest_form_is_chosen() -> None:
    model = mlp()
    made = built(model, timer=clock(csr=0.5, bag=0.25, sparse=0.2))
    assert made.choices == {"0": "bag", "2": "bag"}
    first = made.layers[0]
    assert (first.layer, first.kind, first.shape, first.inputs) == ("0", "Linear", (18, 12), ((3, 12),))
    assert first.density == int(model[0].weight.count_nonzero()) / (18 * 12)
    assert (first.seconds, first.saved, first.reason) == ({"dense": 1.0, "csr": 0.5, "bag": 0.25}, 0.75, "")
    assert isinstance(made.model[0], SparseLayer)
    assert isinstance(made.model[1], nn.ReLU)
    assert made.speedup == Spread(5, 5, 5)
    assert made.verdict == "5.00 times faster than the dense model: 2 of 2 layers changed."


@pytest.mark.parametrize(("seconds", "wins"), [(0.96, False), (0.95, True)])
def test_a_form_must_win_by_the_margin(seconds: float, wins: bool) -> None:
    made = built(mlp(), timer=clock(bag=seconds))
    assert made.choices == ({"0": "bag", "2": "bag"} if wins else {})
    reason = "" if wins else "no form wins by 5%: bag takes 0.96 times as long"
    assert [choice.reason for choice in made.layers] == [reason] * 2
    assert built(mlp(), timer=clock(bag=0.8), margin=0.3).choices == {}


def test_of_equal_times_the_earlier_form_wins() -> None:
    assert built(mlp(), margin=0, timer=clock()).choices == {}
    assert set(built(mlp(), timer=clock(csr=0.5, bag=0.5)).choices.values()) == {"csr"}


@given(st.dictionaries(st.sampled_from(["dense", "csr", "bag"]), st.floats(1e-6, 10), min_size=3))
@settings(max_examples=25, deadline=None)
def test_what_is_chosen_is_never_slower(times: dict[str, float]) -> None:
    for choice in built(mlp(), timer=clock(**times)).layers:
        best = min(times.values())
        assert times[choice.format] == (
            best if times["dense"] >= 1.05 * best and choice.format != "dense" else times["dense"]
        )
        assert choice.saved >= 0


def test_every_call_of_a_layer_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) + self.layer(x[:1])

    def timer(models: Mapping[str, nn.Module], inputs: Any, **options: Any) -> Mapping[str, Latency]:
        one = isinstance(inputs, tuple) and len(inputs[0]) == 1
        return clock(csr=0.25 if one else 2.0)(models, inputs, **options)

    model = pruned(Twice())
    (choice,) = built(model, timer=timer).layers
    assert choice.inputs == ((3, 12), (1, 12))
    assert choice.seconds["dense"] == 3
    assert choice.seconds["csr"] == 4.25
    assert choice.format == "dense"


def test_the_callers_model_stays_as_it_was() -> None:
    model = mlp().train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    made = sparse_runtime(model, X, timer=clock(csr=0.5))
    assert made.choices
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in [*model.modules(), *made.model.modules()])
    assert not any(p.requires_grad for p in made.model.parameters())
    assert not made.model.training


def test_parameters_are_shared() -> None:
    model = mlp()
    assert built(model).model[0].weight.data_ptr() == model[0].weight.data_ptr()


def test_the_same_again_without_measuring() -> None:
    made = built(mlp())
    choices = json.loads(json.dumps(made.choices))
    again = built(mlp(), choices=choices, timer=never)
    assert again.choices == made.choices == {"0": "csr", "2": "csr"}
    assert (again.timings, again.speedup) == ({}, None)
    assert again.verdict == "Not timed: 2 of 2 layers changed as the choices say."
    partly = built(mlp(), choices={"2": "bag", "0": "dense"}, timer=never)
    assert partly.choices == {"2": "bag"}
    assert partly.layers[0].reason == "the choices given leave it dense"


def test_choices_that_cannot_be_are_refused_all_at_once() -> None:
    with pytest.raises(OptionError) as error:
        sparse_runtime(mlp(), X, choices={"9": "csr", "0": "bsr:4x4", "2": "2:4"}, timer=never)
    assert str(error.value) == (
        "the choices do not fit this model here: there is no layer '9' that has sparse forms; layer '0' cannot be "
        "'bsr:4x4' (it can be dense, csr, bag); layer '2' cannot be '2:4' (it can be dense, csr, bag). Leave choices "
        "out to measure."
    )


def test_2_4_is_refused_with_the_reason_in_choices_and_in_measuring() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False).eval()
    layer.weight[:, 2:4] = layer.weight[:, 6:] = 0
    layer.weight[:, 1] = torch.tensor([0.0, 1, 0, 1])
    x = torch.randn(2, 8)
    with pytest.raises(OptionError, match=r"layer '' cannot be '2:4' \(2:4 kernels need a CUDA GPU"):
        sparse_runtime(layer, x, choices={"": "2:4"})
    (choice,) = built(layer, x, timer=clock()).layers
    assert choice.reason.endswith(
        "; 2:4 kernels need a CUDA GPU of compute capability 8.0 or newer, and the model is on cpu"
    )


def test_a_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CsrProduct.forward
    monkeypatch.setattr(CsrProduct, "forward", lambda self, columns: right(self, columns) + 0.01)
    with pytest.raises(ProofError, match=r"output 0 of the model and of layer '0' as csr differ by up to 0\.01"):
        sparse_runtime(mlp(), X, timer=clock())
    with pytest.raises(ProofError, match="layer '0' as csr"):
        sparse_runtime(mlp(), X, choices={"0": "csr"})
    assert sparse_runtime(mlp(), X, timer=clock(), tolerance=0.1)


def test_a_wrong_whole_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = RowsLayer.forward
    monkeypatch.setattr(module, "_let_columns_pass", lambda *_: monkeypatch.setattr(RowsLayer, "forward", wrong))

    def wrong(self: RowsLayer, x: Tensor) -> Tensor:
        return forward(self, x) + 1

    with pytest.raises(ProofError, match="of its sparse runtime differ"):
        sparse_runtime(mlp(), X, timer=clock(csr=0.5))


def test_numbers_that_are_none_are_refused() -> None:
    model = mlp()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"the weight of a Linear has entries that are NaN or infinite \(layer '2'\)"):
        sparse_runtime(model, X, timer=never)


def test_a_failing_forward_pass() -> None:
    with pytest.raises(ModelError, match=r"the model does not run on the example inputs \(RuntimeError: mat1 and mat2"):
        sparse_runtime(mlp(), X[:, :5], timer=never)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"margin must be at least 0, got -0\.1"):
        sparse_runtime(mlp(), X, margin=-0.1)


class Odd(nn.Module):
    """A model with a layer for each reason to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Linear(12, 12)
        self.hooked = nn.Linear(12, 12)
        self.unused = nn.Linear(12, 12)
        self.short = nn.Linear(12, 12, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(self.hooked(self.full(x)).bfloat16()).float()


def test_why_layers_stay_dense() -> None:
    model = pruned(Odd())
    model.full.weight.data.fill_(1)
    model.hooked.register_forward_hook(lambda *_: None)
    made = sparse_runtime(model, X, timer=clock(csr=0.1))
    reasons = {choice.layer: choice.reason for choice in made.layers}
    assert reasons == {
        "full": "none of its weights is zero",
        "hooked": "it has hooks, which another form would not run",
        "unused": "it did not run as a layer on these inputs",
        "short": "no form suits its zeros and its type torch.bfloat16",
    }
    assert made.verdict == "Dense wins (1.00 times as fast): no layer changed; 1 of 4: none of its weights is zero."


def test_verdicts_where_dense_wins() -> None:
    none = sparse_runtime(nn.ReLU(), X, timer=clock(sparse=2.0))
    assert none.verdict == "Dense wins (0.50 times as fast): no layer is of a kind that has sparse forms."
    slower = built(mlp(), timer=clock(csr=0.99 / 1.05, sparse=1.25))
    assert slower.verdict == (
        "Dense wins (0.80 times as fast): the layers that changed save 11.4% of the dense model's time, too little to "
        "be seen."
    )


def test_the_commonest_reason_is_told() -> None:
    none = built(mlp(), timer=clock())
    assert none.verdict.endswith(": no layer changed; 2 of 2: no form wins by 5%.")


def test_layers_of_zeros_and_of_blocks() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8), nn.Linear(8, 8)).requires_grad_(False).eval()
    model[0].weight.zero_()
    model[1].weight[:4, :4] = model[1].weight[4:, 4:] = 0
    model[2].weight[:, 1] = 0
    made = built(model, timer=clock(**{"shrunk": 0.5, "bsr:4x4": 0.4}))
    assert made.choices == {"0": "shrunk", "1": "bsr:4x4", "2": "shrunk"}


def test_other_models_are_timed_beside() -> None:
    made = built(mlp(), beside={"other": mlp()}, timer=clock(csr=0.5, other=0.5))
    assert list(made.timings) == ["dense", "sparse", "other"]


def test_the_real_clock() -> None:
    made = sparse_runtime(mlp(), X, seconds=0.001)
    assert list(made.timings) == ["dense", "sparse"]
    assert all(set(choice.seconds) == {"dense", "csr", "bag"} for choice in made.layers)
    assert made.timings["sparse"].batch == 3


def test_other_sizes_than_the_example() -> None:
    model = mlp()
    made = built(model).model
    for shape in ((12,), (1, 12), (200, 12), (2, 5, 12)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(made(x), model(x))


def test_training_is_refused() -> None:
    made = built(mlp()).model
    with pytest.raises(OptionError, match="a sparse runtime cannot be trained: train the dense model"):
        made.train()
    assert made.eval() is made


def test_a_copy_of_the_runtime_runs() -> None:
    made = built(mlp()).model
    twin = copy.deepcopy(made)
    assert torch.equal(twin(X), made(X))
    twin[0].kernel.product.weight.values().zero_()
    assert not torch.equal(twin(X), made(X))


def test_a_layer_that_is_the_whole_model() -> None:
    made = built(pruned(nn.Linear(12, 6)))
    assert isinstance(made.model, SparseLayer)
    assert made.choices == {"": "csr"}


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    layer = nn.Linear(12, 12)
    made = built(pruned(nn.Sequential(layer, nn.ReLU(), layer)))
    assert isinstance(made.model[0], SparseLayer)
    assert made.model[0] is made.model[2]
    assert [choice.layer for choice in made.layers] == ["0"]


def test_what_else_is_asked_of_a_layer() -> None:
    layer = built(mlp()).model[0]
    assert (layer.weight.dtype, layer.in_features) == (torch.float32, 12)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = layer.nothing_like_it


class Hugging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Conv1D(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_conv1d_of_hugging_face() -> None:
    (choice,) = built(pruned(Hugging()), torch.randn(2, 5, 12)).layers
    assert (choice.format, choice.kind, choice.shape) == ("csr", "Conv1D", (6, 12))


def test_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))
    made = built(pruned(net), torch.randn(2, 3, 9, 9))
    assert made.choices == {"0": "csr", "2": "csr"}
    assert made.layers[0].shape == (6, 27)


@pytest.mark.parametrize("batch", [1, 4])
def test_transformer_layers_of_pytorch(batch: int) -> None:
    torch.manual_seed(0)
    model = pruned(nn.TransformerEncoderLayer(12, 2, 18, batch_first=True))
    made = built(model, torch.randn(batch, 5, 12))
    assert made.choices == {"self_attn.out_proj": "csr", "linear1": "csr", "linear2": "csr"}


def test_keywords() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, *, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.body(x)}

    made = sparse_runtime(Named(), {"x": X}, timer=clock(csr=0.5))
    assert made.choices == {"body.0": "csr", "body.2": "csr"}


class Joining(nn.Module):
    """A model whose code joins axes in a way that only rows allow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().view(-1).view(-1, 12))


def columns(made: Runtime) -> list[bool]:
    return [layer.by_columns for layer in made.model.modules() if isinstance(layer, RowsLayer)]


def test_columns_pass_between_layers_and_no_further() -> None:
    assert columns(built(mlp())) == [True, False]
    assert columns(built(pruned(Joining()))) == [False, False]
    between = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 6))
    assert columns(built(pruned(between))) == [False, False]
