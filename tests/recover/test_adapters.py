"""Low-rank adapters: against the formulas written out entry by entry, against peft, and how they come and go."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import ModelError, OptionError
from secateurs.core.state import read_state, write_state
from secateurs.recover.adapters import KINDS, Adapters, adaptable, adapters_of, attach, merge, to_peft

MASKED = [kind for kind in KINDS if kind != "lora"]


class Conv1D(nn.Module):
    """Hugging Face's linear layer: its weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A Linear 6 → 5, a Conv1D 5 → 4, both with every other weight at zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Conv1D(4, 5)).to(dtype)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:, ::2] = 0
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() == 2}


def randomized(adapters: Adapters, seed: int = 1) -> Adapters:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in adapters.parameters():
            matrix.copy_(torch.randn(matrix.shape, generator=generator))
    return adapters


def by_hand(layer: nn.Module, kind: str, alpha: float, *, merged: bool) -> list[list[float]]:
    """The weight as [outputs][inputs], from the table in the specification."""
    rows = (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).tolist()
    down, up = layer.adapter.down.tolist(), layer.adapter.up.tolist()
    scale = alpha / len(down)
    for o, row in enumerate(rows):
        for i, weight in enumerate(row):
            product = sum(up[o][k] * down[k][i] for k in range(len(down)))
            stays = weight != 0 or (kind == "lora-prune" and not merged) or kind == "lora"
            row[i] = weight * product if kind == "scale-lora" else weight + (scale * product if stays else 0)
    return rows


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(kind: Any) -> None:
    model = net(dtype=torch.float64)
    randomized(attach(model, "*", kind, rank=3, alpha=5.0))
    given = torch.randn(7, 6, dtype=torch.float64)
    wanted = given
    for layer in model:
        if isinstance(layer, nn.ReLU):
            wanted = wanted.relu()
        else:
            wanted = wanted @ torch.tensor(by_hand(layer, kind, 5.0, merged=False), dtype=torch.float64).T + layer.bias
    torch.testing.assert_close(model(given), wanted)
    after = [by_hand(model[i], kind, 5.0, merged=True) for i in (0, 2)]
    assert merge(model) == ("0", "2")
    torch.testing.assert_close(model[0].weight, torch.tensor(after[0], dtype=torch.float64))
    torch.testing.assert_close(model[2].weight.T, torch.tensor(after[1], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["lora", "lora-prune", "mask-lora"])
def test_at_the_start_the_output_is_the_pruned_model_s_bit_for_bit(kind: Any) -> None:
    model, given = net(), torch.randn(9, 6)
    before = model(given)
    adapters = attach(model, "*", kind, rank=2)
    assert all(not adapter.up.any() for adapter in adapters.values())
    assert all(adapter.down.any() for adapter in adapters.values())
    assert torch.equal(model(given), before)


def test_scale_lora_starts_at_one() -> None:
    model = nn.Linear(32, 20)
    with torch.no_grad():
        model.weight[:, ::3] = 0
    given = torch.randn(9, 32)
    before = model(given)
    adapter = attach(model, "*", "scale-lora", rank=16)[""]
    # 16 · 0.25 · 0.25 is 1 exactly.
    assert torch.equal(adapter.product, torch.ones(20, 32))
    assert adapter.scale == 1
    assert torch.equal(model(given), before)


def test_down_is_drawn_as_kaiming_uniform_says_and_follows_from_the_seed() -> None:
    # a = √5 bounds it by 1/√inputs.
    def drawn(seed: int) -> list[Tensor]:
        return [a.down.detach() for a in attach(net(), "*", "lora", rank=4, seed=seed).values()]

    first, second = drawn(0)
    assert 0.9 < float(first.abs().max()) * 6**0.5 <= 1
    assert 0.8 < float(second.abs().max()) * 5**0.5 <= 1
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(drawn(0), (first, second), strict=True))
    assert not torch.equal(drawn(1)[0], first)


@pytest.mark.parametrize("kind", ["scale-lora", "mask-lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_keeps_outputs_and_zeros(kind: Any, dtype: torch.dtype) -> None:
    model, given = net(dtype=dtype), torch.randn(9, 6, dtype=dtype)
    zeros = {name: ~mask for name, mask in masks_of(model).items()}
    randomized(attach(model, "*", kind, rank=4))
    before = model(given)
    merge(model)
    torch.testing.assert_close(model(given), before)
    assert {name: ~mask for name, mask in masks_of(model).items()}.keys() == zeros.keys()
    assert all(torch.equal(model.get_parameter(name) == 0, zero) for name, zero in zeros.items())


def test_merging_lora_prune_changes_the_output_by_what_the_mask_removes() -> None:
    model = net(dtype=torch.float64)[0]
    mask = model.weight.detach() != 0
    adapter = randomized(attach(model, "*", "lora-prune", rank=3, alpha=6.0))[""]
    given = torch.randn(9, 6, dtype=torch.float64)
    before, lost = model(given), 2.0 * given @ (adapter.product * ~mask).T
    merge(model)
    torch.testing.assert_close(before - model(given), lost)
    assert float(lost.detach().abs().max()) > 1
    assert torch.equal(model.weight != 0, mask)


def test_plain_lora_fills_zeros() -> None:
    model = net()
    randomized(attach(model, "*", "lora", rank=3))
    merge(model)
    assert bool((model[0].weight != 0).all())


@given(st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(MASKED))
def test_zeros_survive_whatever_was_trained(rank: int, seed: int, kind: Any) -> None:
    model = net(seed)
    masks = masks_of(model)
    with randomized(attach(model, "*", kind, rank=rank, alpha=100.0, masks=masks), seed):
        merge(model)
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_weight_that_is_zero_and_stays_is_not_lost() -> None:
    model = net()
    masks = masks_of(model)
    with torch.no_grad():
        model[0].weight[0, 1] = 0
    randomized(attach(model, "*", "mask-lora", rank=2, masks=masks))
    with torch.no_grad():
        # A weight that becomes zero after the adapter was made stays in its mask.
        model[2].weight[0, 1] = 0
    merge(model)
    assert model[0].weight[0, 1].item() != 0
    assert model[2].weight[0, 1].item() != 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_trains_in_float32_and_merges_in_its_own(kind: Any) -> None:
    model = net(dtype=torch.bfloat16)
    masks = masks_of(model)
    adapters = randomized(attach(model, "*", kind, rank=2))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    given = torch.randn(9, 6).bfloat16()
    output = model(given)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    before = adapters["0"].merged(model[0].weight.detach())
    wide = adapters["0"].merged(model[0].weight.detach().float())
    merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, before)
    # Computed in float32 and rounded once.
    assert torch.equal(before, wide.bfloat16())
    if kind != "lora":
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    if kind != "lora-prune":
        torch.testing.assert_close(model(given), output, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind: Any) -> None:
    model = net(dtype=torch.float64)[0].requires_grad_(False)
    adapter = randomized(attach(model, "*", kind, rank=2, alpha=3.0))[""]
    given = torch.randn(4, 6, dtype=torch.float64)

    def output(down: Tensor, up: Tensor) -> Tensor:
        product = up @ down
        match kind:
            case "scale-lora":
                weight = model.weight * product
            case "mask-lora":
                weight = model.weight + 1.5 * product * (model.weight != 0)
            case _:
                weight = model.weight + 1.5 * product
        return given @ weight.T + model.bias

    down, up = (matrix.detach().clone().requires_grad_() for matrix in adapter.parameters())
    output(down, up).pow(3).sum().backward()
    model(given).pow(3).sum().backward()
    torch.testing.assert_close(adapter.down.grad, down.grad)
    torch.testing.assert_close(adapter.up.grad, up.grad)
    assert model.weight.grad is None


def test_dropout_is_of_the_adapter_s_inputs_in_training_only() -> None:
    model = nn.Linear(400, 3)
    adapter = randomized(attach(model, "*", rank=2, alpha=2.0, dropout=0.5))[""]
    given = torch.ones(1, 400)
    quiet = model.eval()(given)
    torch.testing.assert_close(quiet, given @ (model.weight + adapter.product).T + model.bias)
    torch.manual_seed(0)
    found = model.train()(given)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(given, 0.5)
    torch.testing.assert_close(found, given @ model.weight.T + model.bias + dropped @ adapter.product.T)
    assert not torch.allclose(found, quiet)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_multiplies_the_output_after_the_bias_and_is_merged(kind: Any) -> None:
    model, given = net(), torch.randn(9, 6)
    adapters = randomized(attach(model, "*", kind, rank=2))
    before = model[0](given)
    adapters["0"].gate = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5])
    assert torch.equal(model[0](given), before * adapters["0"].gate)
    assert "0.adapter.gate" in model.state_dict()
    output = model[0](given)
    merge(model)
    assert not model[0].weight[1].any()
    assert model[0].bias[1].item() == 0
    if kind != "lora-prune":
        torch.testing.assert_close(model[0](given), output)


# -- against peft ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0", "2"])
def test_plain_lora_is_peft_s(name: str) -> None:
    peft = pytest.importorskip("peft")
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 5)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), layer)
    given = torch.randn(9, 6)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=[name], lora_dropout=0.0, fan_in_fan_out=name == "2"),
    )
    randomized(attach(model, name, "lora", rank=3, alpha=5.0))
    loaded = peft.set_peft_model_state_dict(theirs, to_peft(model))
    assert not loaded.unexpected_keys
    assert torch.equal(model(given), theirs(given))
    merge(model)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model(given), merged(given))
    assert model.state_dict().keys() == merged.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[key])


def test_only_plain_lora_goes_to_peft() -> None:
    model = net()
    with pytest.raises(OptionError, match="the model carries no adapter"):
        to_peft(model)
    attach(model, "0", "mask-lora", rank=2)
    with pytest.raises(OptionError, match="0 carries mask-lora or a gate: merge it, or attach kind='lora'"):
        to_peft(model)


# -- how they come and go ----------------------------------------------------------------------------------------------


def test_a_failed_training_leaves_the_model_as_it_was() -> None:
    model, given = net(), torch.randn(3, 6)
    hooks = model[0].register_forward_hook(lambda *_: None)
    before, output = state_of(model), model(given)

    def training() -> None:
        with randomized(attach(model, "*", "mask-lora", rank=2)):
            assert not torch.equal(model(given), output)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        training()
    assert equal(state_of(model), before)
    assert torch.equal(model(given), output)
    assert len(model[0]._forward_hooks) == 1
    assert not model[2]._forward_hooks
    assert not model[0]._forward_hooks_with_kwargs
    assert all(parameter.requires_grad for parameter in model.parameters())
    hooks.remove()


def test_what_was_merged_is_not_undone() -> None:
    model, given = net(), torch.randn(3, 6)
    with randomized(attach(model, "*", "mask-lora", rank=2)) as adapters:
        output = model(given)
        assert adapters.merge() == ("0", "2")
        assert adapters.merge() == ()
    torch.testing.assert_close(model(given), output)
    assert adapters_of(model) == {}
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Conv1D"]


def test_two_sets_are_merged_and_removed_apart() -> None:
    model = net()
    first, second = attach(model, "0", "mask-lora", rank=2), attach(model, "2", "lora", rank=2)
    assert {name: adapter.kind for name, adapter in adapters_of(model).items()} == {"0": "mask-lora", "2": "lora"}
    second.remove()
    assert first.merge() == ("0",)
    assert state_of(model).keys() == state_of(net()).keys()
    assert list(first) == ["0"]
    assert len(first) == 1


def test_names_and_classes_of_the_layers_stay() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    attach(model, "*", "mask-lora", rank=2)
    assert [name for name, _ in model.named_parameters() if "adapter" not in name] == names
    assert isinstance(model[0], nn.Linear)
    assert str(model[0].adapter) == "Adapter(mask-lora, rank=2, scale=16)"


def test_a_copy_has_adapters_of_its_own() -> None:
    model, given = net(), torch.randn(3, 6)
    randomized(attach(model, "*", "scale-lora", rank=2))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(given), model(given))
    merge(twin)
    torch.testing.assert_close(twin(given), model(given))
    assert set(adapters_of(model)) == {"0", "2"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_saved_and_restored(kind: Any, tmp_path: Any) -> None:
    model, other, given = net(), net(), torch.randn(3, 6)
    randomized(attach(model, "*", kind, rank=2))
    write_state(tmp_path / "state.safetensors", dict(model.state_dict()), "test")
    attach(other, "*", kind, rank=2, seed=5)
    assert not torch.equal(other[0].adapter.down, model[0].adapter.down)
    other.load_state_dict(read_state(tmp_path / "state.safetensors", "test"))
    assert torch.equal(other(given), model(given))
    # A deep copy through torch's own format, with tensors alone.
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))


def test_hooks_that_were_there_see_what_the_layer_now_gives() -> None:
    model, given, seen = net(), torch.randn(3, 6), list[Tensor]()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    randomized(attach(model, "0", rank=2))
    model(given)
    assert torch.equal(seen[0], model[0](given))
    assert not torch.equal(seen[0], nn.functional.linear(given, model[0].weight, model[0].bias))


def test_a_layer_called_by_keyword() -> None:
    model, given = net()[0], torch.randn(3, 6)
    randomized(attach(model, "*", rank=2))
    assert torch.equal(model(input=given), model(given))


def test_an_encoder_s_fast_path_does_not_pass_adapters_by() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    given = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(given)
        randomized(attach(layer, "linear*", rank=2))
        assert not torch.allclose(layer(given), before, atol=1e-3)
        adapted = layer(given)
        merge(layer)
        torch.testing.assert_close(layer(given), adapted, rtol=1e-4, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dora"}, "unknown adapter kind 'dora'; the nearest are lora"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"rank": 6}, "rank 6 is too high: 0 allows at most 5; 2 allows at most 4"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": 0.1}, "dropout must be 0 for mask-lora, got 0.1"),
        ({"names": "encoder.*"}, "unknown layer 'encoder.\\*'; the nearest are"),
        ({"names": "1"}, "1 is a ReLU and carries no adapter: name Linear layers"),
        ({"masks": {"0.weight": torch.ones(5, 6)}}, r"the mask of 0.weight must be bool \[5, 6\], got torch.float32"),
        ({"masks": {"2.weight": torch.ones(4, 5).bool()}}, r"must be bool \[5, 4\], got torch.bool \[4, 5\]"),
        ({"masks": {"0.weight": torch.zeros(5, 6).bool()}}, "0.weight is not zero where its mask removes it"),
        ({"masks": {}}, "mask-lora keeps zeros, and no weight of 0, 2 has one: prune first, or use 'lora'"),
    ],
)
def test_options_are_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(OptionError, match=message):
        attach(model, **{"names": "*", "kind": "mask-lora", "rank": 2, **options})
    assert equal(state_of(model), before)


def test_a_shared_weight_is_refused() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ModelError, match="another module holds the weight of head too, and a merge would change both"):
        attach(model, "head", rank=2)


def test_a_module_used_twice_carries_one_adapter() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert len(randomized(attach(model, "*", rank=2))) == 1
    given = torch.randn(3, 4)
    output = model(given)
    assert merge(model) == ("0",)
    torch.testing.assert_close(model(given), output)


def test_a_second_adapter_is_refused() -> None:
    model = net()
    attach(model, "0", rank=2)
    with pytest.raises(ModelError, match="0 carries one already, which must be merged or removed first"):
        attach(model, "*", rank=2)
    assert set(adapters_of(model)) == {"0"}


def test_a_projection_that_is_never_called_is_refused() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    assert set(adaptable(model)) == {"1"}
    with pytest.raises(OptionError, match=r"0\.out_proj is a NonDynamicallyQuantizableLinear and carries no adapter"):
        attach(model, "0.out_proj", rank=2)


def test_weights_of_whole_numbers_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"is no floating-point matrix \(torch.int8, \[3, 3\]\)"):
        attach(model, "*", rank=2)


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    model = net()
    adapters = randomized(attach(model, "*", "mask-lora", rank=2))
    with torch.no_grad():
        adapters["2"].up[1, 0] = float("inf")
    before = state_of(model)
    with pytest.raises(ModelError, match="the merged weight of 2 is not finite"):
        merge(model)
    assert equal(state_of(model), before)
