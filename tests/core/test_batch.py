"""Batches: every shape that loaders and models hand over is fed, split and scored the same way."""

from collections import OrderedDict
from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.batch import call, default_loss, device_of, leaves, main_output, move, run, split, take
from secateurs.core.errors import DataError, ModelError


class Adder(nn.Module):
    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        return left if right is None else left + right


class Mapping:
    """What tokenizers return: a mapping in manner, not a dict."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def keys(self) -> Any:
        return self.values.keys()

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    note: str = ""


def test_a_model_is_called_with_a_tensor_a_tuple_or_keywords() -> None:
    model, one = Adder(), torch.ones(2)
    assert call(model, one).tolist() == [1, 1]
    assert call(model, (one, one)).tolist() == [2, 2]
    assert call(model, {"right": one, "left": 2 * one}).tolist() == [3, 3]
    assert call(model, Mapping(left=one, right=one)).tolist() == [2, 2]


def test_a_failing_forward_is_told_with_what_was_given() -> None:
    with pytest.raises(
        ModelError, match=r"^Linear fails on the inputs given \(shapes: \(1, 3\)\): .*Give inputs with"
    ) as told:
        run(nn.Linear(2, 2), torch.zeros(1, 3))
    assert isinstance(told.value.__cause__, RuntimeError)
    with pytest.raises(
        ModelError, match=r"shapes: no tensor\): .*not str\. Give tensors; of text a tokenizer makes them"
    ):
        run(nn.Embedding(2, 2), "once upon a time")


def test_an_error_of_ours_inside_a_forward_stays_as_it_is() -> None:
    ours = DataError("said already.")

    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ours

    with pytest.raises(DataError) as told:
        run(Refusing(), torch.zeros(1))
    assert told.value is ours


def test_a_batch_is_split_into_inputs_and_target() -> None:
    x, y, z = torch.ones(2), torch.zeros(2), torch.ones(3)
    for batch, inputs, target in [
        (x, x, None),
        ((x,), x, None),
        ([x, y], x, y),
        ((x, y), x, y),
        ({"ids": x, "labels": y}, {"ids": x, "labels": y}, None),
    ]:
        got = split(batch)
        assert got[0] is inputs or got[0] == inputs
        assert got[1] is target
    assert split((x, z, y)) == ((x, z), y)
    assert split(Mapping(ids=x)) == ({"ids": x}, None)


def test_the_models_own_loss_comes_first() -> None:
    own = torch.tensor(3.0)
    assert default_loss(Output(torch.ones(2, 3), own), torch.tensor([0, 1])) is own
    assert default_loss({"loss": own, "logits": torch.ones(2, 3)}, None) is own
    without = Output(torch.ones(2, 3))
    assert default_loss(without, torch.tensor([0, 1])).item() == pytest.approx(torch.tensor(3.0).log().item())


def test_the_loss_follows_the_target() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=rng)
    labels = torch.tensor([0, 2, 1, 1])
    assert default_loss(logits, labels) == F.cross_entropy(logits, labels)
    assert default_loss(logits, labels[:, None]) == F.cross_entropy(logits, labels)
    assert default_loss(logits[0], labels[0]) == F.cross_entropy(logits[0], labels[0])
    assert default_loss(logits, logits + 2.0).item() == pytest.approx(4.0)


def test_classes_are_last_for_tokens_and_second_for_pixels() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens, words = torch.randn(2, 5, 7, generator=rng), torch.randint(7, (2, 5), generator=rng)
    torch.testing.assert_close(default_loss(tokens, words), F.cross_entropy(tokens.transpose(1, 2), words))
    maps, pixels = torch.randn(2, 3, 4, 6, generator=rng), torch.randint(3, (2, 4, 6), generator=rng)
    torch.testing.assert_close(default_loss(maps, pixels), F.cross_entropy(maps, pixels))


def test_a_loss_without_a_target_is_refused() -> None:
    with pytest.raises(DataError, match="the loss needs labels"):
        default_loss(torch.ones(2, 3), None)


def test_the_main_output_is_the_logits_or_the_first_float() -> None:
    floats, integers = torch.ones(2), torch.ones(2, dtype=torch.int64)
    assert main_output(floats) is floats
    assert main_output(Output(floats)) is floats
    assert main_output((integers, {"x": [floats]})) is floats
    assert main_output(OrderedDict(ids=integers, hidden=floats)) is floats
    with pytest.raises(DataError, match="no floating-point tensor"):
        main_output((integers, None))


def test_leaves_are_found_in_order() -> None:
    x, y, z = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = {"a": x, "b": [y, ({"c": z}, 3, None)]}
    assert [leaf.numel() for leaf in leaves(tree)] == [1, 2, 3]
    assert [leaf.numel() for leaf in leaves(Output(y, z))] == [2, 3]


def test_a_tree_is_moved_whole() -> None:
    tree = {"a": torch.ones(1), "b": [torch.ones(2), (torch.ones(3), "text")]}
    moved = move(tree, "meta")
    assert [leaf.device.type for leaf in leaves(moved)] == ["meta"] * 3
    assert moved["b"][1][1] == "text"
    assert isinstance(moved["b"][1], tuple)
    assert tree["a"].device.type == "cpu"


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


def test_data_is_taken_as_far_as_needed() -> None:
    assert take(iter(range(5)), 2) == [0, 1]
    assert take([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(DataError, match="this needs calibration data: pass data="):
        take(None)
    with pytest.raises(DataError, match="the training data is empty"):
        take([], what="training data")


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Nested:
    inner: Output
    more: Output | None = None


SlottedOutput = make_dataclass("SlottedOutput", [("logits", Tensor), ("aux", Tensor)], slots=True)


def test_records_inside_records_and_records_with_slots_are_gone_through() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert [len(t) for t in leaves(Nested(Output(a, b), Output(c)))] == [1, 2, 3]
    assert [len(t) for t in leaves(SlottedOutput(a, c))] == [1, 3]


def test_a_named_tuple_stays_one_when_it_is_moved() -> None:
    moved = move((Pair(torch.ones(2), torch.ones(3)),), "meta")[0]
    assert isinstance(moved, Pair)
    assert (moved.left.device.type, moved.right.shape) == ("meta", (3,))


def test_what_is_no_iterable_is_no_data() -> None:
    with pytest.raises(DataError, match=r"calibration data must be an iterable of batches, got 5\."):
        take(5)  # type: ignore[arg-type]


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"a label is none of the model's 4 classes: Target 9 is out of bounds"):
        default_loss(torch.zeros(2, 4), torch.tensor([0, 9]))
