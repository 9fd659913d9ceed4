"""Templates: what is described as JSON is built again, and fits itself and nothing else."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from secateurs.core.errors import FileError, ModelError
from secateurs.graph.recorded.templates import built, check, described, fitted, mapped


class Pair(NamedTuple):
    first: Any
    second: Any


class Named:
    """No data: something that goes by a name."""


INTEGERS = st.integers(-9, 9)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.sampled_from([..., torch.float16, torch.channels_last, torch.strided, slice(1, None, 2)]),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


def refuse(value: Any) -> Any:
    raise AssertionError(f"{value!r} is plain data")


@given(VALUES)
def test_plain_data_comes_back_from_json(value: Any) -> None:
    node = json.loads(json.dumps(described(value, refuse), allow_nan=False))
    check(node, 0, "here")
    again = built(node, {})
    assert again == value
    assert type(again) is type(value)


@given(VALUES, VALUES)
def test_plain_data_fits_itself_and_nothing_else(value: Any, other: Any) -> None:
    pattern = described(value, refuse)
    fitted(pattern, value, {}, "it")
    assume(json.dumps(pattern) != json.dumps(described(other, refuse)))
    with pytest.raises(ModelError, match="it is not as it was"):
        fitted(pattern, other, {}, "it")


def test_named_things_are_found_where_they_were() -> None:
    a, b = Named(), Named()
    names = {id(a): {"$value": "a"}, id(b): {"$value": "b"}}
    value = {"x": (a, [b]), "y": Pair(a, 3)}
    pattern = described(value, lambda v: names[id(v)], lambda _: {"$ignored": "int"})
    assert pattern == {
        "$dict": {
            "x": {"$tuple": [{"$value": "a"}, [{"$value": "b"}]]},
            "y": {
                "$record": f"{__name__}:Pair",
                "fields": {"first": {"$value": "a"}, "second": {"$ignored": "int"}},
            },
        }
    }
    found: dict[str, Any] = {}
    fitted(pattern, {"x": (a, [b]), "y": Pair(a, 8)}, found, "it")
    assert found == {"a": a, "b": b}


@pytest.mark.parametrize("odd", [{"x": 1}, (1,), None, [2, 3]])
def test_a_name_stands_for_no_plain_value(odd: Any) -> None:
    with pytest.raises(ModelError):
        fitted({"$value": "a"}, odd, {}, "it")


def test_one_name_is_one_thing() -> None:
    pattern = [{"$value": "a"}, {"$value": "a"}]
    thing = Named()
    fitted(pattern, [thing, thing], {}, "it")
    with pytest.raises(ModelError):
        fitted(pattern, [thing, Named()], {}, "it")


def test_mapped_replaces_what_is_no_plain_data() -> None:
    thing = Named()
    assert mapped((thing, [1, {"a": thing}]), lambda v: v is thing) == (True, [1, {"a": True}])


@pytest.mark.parametrize(
    "node",
    [
        {"$code": "x"},
        {},
        {"$number": 2},
        {"$number": -1},
        {"$number": True},
        {"$dtype": "load"},
        {"$dtype": 3},
        {"$memory_format": "input"},
        {"$batch": [1, 0]},
        {"$batch": [{"$code": "x"}, 2]},
        {"$tuple": [1, {"$number": 7}]},
        {"$dict": {"a": {"$number": 7}}},
        {"$ellipsis": 1},
        {"$record": "os:system", "fields": {}},
        {"$record": "collections:Counter", "fields": {}},
        {"$record": "collections:OrderedDict.fromkeys", "fields": {}},
    ],
)
def test_malformed_nodes_are_refused(node: Any) -> None:
    with pytest.raises(FileError):
        check([node], 2, "here")


@pytest.mark.parametrize(
    "node",
    [
        {"$number": 1},
        {"$batch": [{"$number": 0}, 3]},
        {"$dtype": "input"},
        {"$training": [0.5, 0.0]},
        {"$value": "3.0"},
    ],
)
def test_well_formed_nodes_pass(node: Any) -> None:
    check([node], 2, "here")
