"""Encoding and decoding of plain values are inverse, and keep what is shared shared."""

from __future__ import annotations

import collections
import functools
import json
import math
import threading
import weakref
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.core.errors import FileError
from secateurs.deploy.decoding import Reader
from secateurs.deploy.encoding import Writer, settled
from tests.deploy import samples

NOWHERE = lambda _: "nowhere"  # noqa: E731


def there_and_back(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> str:
        tensors[str(len(tensors))] = tensor
        return str(len(tensors) - 1)

    write = Writer(NOWHERE, keep)
    node = settled(write(value))
    text = json.dumps(node, allow_nan=False)
    return Reader(nn.Module, tensors.__getitem__, list(write.uses), samples.HERE)(json.loads(text))


def alike(value: Any, other: Any) -> bool:
    """Equality that tells 1 from True and 0.0 from -0.0, and takes NaN for NaN."""
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return alike(list(value.items()), list(other.items()))
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(alike, value, other))
    if isinstance(value, set):
        return value == other and sorted(map(repr, value)) == sorted(map(repr, other))
    if isinstance(value, float):
        return repr(value) == repr(other)
    return bool(value == other)


def encoded(value: Any) -> Any:
    return settled(Writer(NOWHERE, NOWHERE)(value))


VALUES = [
    *(None, True, 7, 10**30, 0.1, -0.0, "text", "\ud800", "$tag"),
    *((), (1, (2, "a")), [], [1, [2]], {"a": {"b": 1}}, {"$x": 1, "y": 2}, {1: "a", (2, 3): None}),
    *({1, "a", 2.5}, frozenset({(1, 2)}), slice(1, None, 2), range(2, 9, 3), torch.Size([2, 3])),
    *(torch.float32, torch.bfloat16, torch.device("cuda", 1), torch.channels_last, torch.strided),
    *(samples.Colour.BLUE, samples.Level.LOW, samples.Point(1, [2]), samples.Frozen(3, ["a"])),
    *(collections.OrderedDict(b=1, a=2), collections.defaultdict(list, {"a": [1]}), collections.Counter("aab")),
    *(numpy.float32(0.1), numpy.int64(3), numpy.bool_(True)),
    *(nn.Linear, int, dict, samples.Net, samples.Colour, torch.Tensor),
    *(F.gelu, F.relu, F.silu, F.max_pool2d, torch.relu, torch.special.expit, torch.fft.fftn, torch.linalg.norm),
    *(F.scaled_dot_product_attention, torch.utils.checkpoint.checkpoint, samples.double, len, max),
]


@pytest.mark.parametrize(
    "value", VALUES, ids=[f"{number}-{type(value).__name__}" for number, value in enumerate(VALUES)]
)
def test_value_comes_back_equal_and_of_the_same_type(value: Any) -> None:
    assert alike(value, there_and_back(value))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_floats_that_json_lacks(value: float) -> None:
    assert repr(there_and_back(value)) == repr(value)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.integers() | st.text() | st.tuples(st.text(), st.booleans())


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner) | st.sets(KEYS)


def test_alike_can_fail() -> None:
    assert not any(
        alike(*pair) for pair in [(1, True), (0.0, -0.0), ([1], (1,)), ([1], [1, 2]), ({1}, {True}), ({1: 2}, {1: 3})]
    )


@given(st.recursive(PLAIN, nested, max_leaves=20))
def test_any_nesting_comes_back(value: Any) -> None:
    assert alike(value, there_and_back(value))


def test_plain_json_stays_plain() -> None:
    assert encoded({"a": [1, {"b": 2.5}], "c": None}) == {"a": [1, {"b": 2.5}], "c": None}
    assert encoded((3, 3)) == {"$tuple": [3, 3]}
    assert encoded(F.gelu) == {"$function": "torch.nn.functional:gelu"}
    assert encoded({"b", "a"}) == {"$set": ["a", "b"]}


def test_what_is_shared_is_shared_again() -> None:
    inner, config = [1], samples.settings(width=3)
    first, second, third = there_and_back([{"x": inner, "c": config}, inner, (config,)])
    assert first["x"] is second
    assert first["c"] is third[0]
    assert there_and_back([[1], [1]])[0] is not there_and_back([[1], [1]])[1]


def test_cycles_come_back() -> None:
    ring: list[Any] = [1]
    ring.append({"self": ring})
    parent, child = samples.settings(), samples.settings()
    vars(parent)["child"], vars(child)["parent"] = child, parent
    back = there_and_back(ring)
    assert back[1]["self"] is back
    again = there_and_back(parent)
    assert again.child.parent is again


def test_objects_are_filled_without_running_their_code() -> None:
    back = there_and_back(samples.settings(guarded=5, width=2))
    assert type(back) is samples.Settings
    assert vars(back) == {"guarded": 5, "width": 2}
    slotted = there_and_back(samples.Slotted([1], None))
    assert (slotted.left, slotted.right, hasattr(slotted, "unset")) == ([1], None, False)


def test_dicts_of_a_class_of_their_own() -> None:
    mapping = dict.__new__(samples.AttributeDict)
    dict.update(mapping, a=1)
    vars(mapping)["note"] = mapping
    back = there_and_back(mapping)
    assert (type(back), dict(back), back.note is back) == (samples.AttributeDict, {"a": 1}, True)
    frozen = collections.OrderedDict.__new__(samples.FrozenMapping)
    collections.OrderedDict.update(frozen, b=1, a=2)
    assert list(there_and_back(frozen).items()) == [("b", 1), ("a", 2)]


def test_partials_and_methods() -> None:
    partial = there_and_back(functools.partial(F.softmax, dim=-1))
    assert (partial.func, partial.args, partial.keywords) == (F.softmax, (), {"dim": -1})
    method = there_and_back(samples.settings().describe)
    assert method() == "settings"


def test_tensors_arrays_and_weak_references() -> None:
    tensor, array = torch.arange(3.0), numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    kept, reference, shared, same = there_and_back([tensor, weakref.ref(tensor), array, array])
    assert torch.equal(kept, tensor)
    assert torch.equal(reference(), tensor)
    assert shared is same
    assert shared.dtype == numpy.int16
    assert (shared == array).all()


UNSTORABLE = [
    (lambda x: x, "cannot be imported by its name; define it at the top of a module"),
    (threading.Lock(), "which is not plain data"),
    (torch.Generator(), "which is not plain data"),
    ([1].append, "cannot be imported by its name"),
    (samples.Flags.ONE | samples.Flags.TWO, "a combination of flags without a name"),
    (numpy.array(["a"]), "a numpy array of <U1; convert it to a list"),
    (numpy.datetime64("2020-01-01"), "convert it to a Python value"),
    (numpy.longdouble(1), "convert it to a Python value"),
    (functools.partial(F.relu, **{"$x": 1}), "the name '$x' is no string or begins with '$'; rename it"),
    (type("Local", (), {}), "define it at the top of a module"),
]


@pytest.mark.parametrize(("value", "message"), UNSTORABLE, ids=lambda case: repr(case)[:20])
def test_what_cannot_be_stored_says_why(value: Any, message: str) -> None:
    with pytest.raises(FileError, match=message.replace("$", r"\$")):
        encoded(value)


def test_a_dead_weak_reference_is_refused() -> None:
    reference = weakref.ref(torch.zeros(1))
    with pytest.raises(FileError, match="weak reference"):
        encoded(reference)


MALFORMED = [
    ({"$unknown": 1}, "unknown form"),
    ({"$tuple": [], "$list": []}, "unknown form"),
    ({"$ref": 3}, "which was not met before"),
    ({"$dtype": "save"}, "is not a dtype"),
    ({"$memory_format": "float32"}, "is not a memory_format"),
    ({"$device": "nowhere"}, "is not a device"),
    ({"$numpy": "object", "value": 1}, "not a number"),
    ({"$class": "torch.nn:Linear"}, "is used but not declared under 'uses'"),
    ({"$weakref": [1]}, "no tensor or module"),
]


@pytest.mark.parametrize(("node", "message"), MALFORMED, ids=lambda case: str(case)[:20])
def test_malformed_values_are_refused(node: Any, message: str) -> None:
    with pytest.raises(FileError, match=message):
        Reader(nn.Module, torch.Tensor, [], ())(node)


def test_enum_members_must_exist() -> None:
    name = "tests.deploy.samples:Colour"
    with pytest.raises(FileError, match="has no member 'GREEN'"):
        Reader(nn.Module, torch.Tensor, [name], samples.HERE)({"$enum": name, "member": "GREEN"})
