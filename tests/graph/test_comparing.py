"""What recordings tell together, on recordings of one step."""

from __future__ import annotations

from typing import Any

import pytest

from secateurs.core.errors import ModelError
from secateurs.graph.comparing import (
    Differs,
    follow_dtype,
    follow_training,
    leading_batch,
    merged,
    overlaid,
    training_by_name,
)


def recording(*args: Any, **kwargs: Any) -> dict[str, Any]:
    step = {"function": "torch.f", "child": "", "arguments": {"args": list(args), "kwargs": kwargs}}
    return {"inputs": {"$dict": {}}, "steps": [step], "output": None}


def arguments(tree: dict[str, Any]) -> Any:
    return tree["steps"][0]["arguments"]["args"]


def test_the_batch_is_the_first_leading_axis_that_differs() -> None:
    assert leading_batch([{"a": 3, "b": 2, "c": 4}, {"a": 3, "b": 4, "c": 8}]) == ("b", [2, 4])
    assert leading_batch([{"a": 3}, {"a": 3}]) == (None, [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [((7, 7), 7), ((2, 4), [1, 1]), ((6, 12), [3, 1]), ((1, 2), [1, 2]), ((3, 6), [3, 2])],
)
def test_integers_that_follow_the_batch(values: tuple[int, int], expected: Any) -> None:
    tree = merged([recording({"$tuple": [v]}) for v in values], [2, 4])
    assert arguments(tree) == [{"$tuple": [expected if isinstance(expected, int) else {"$batch": expected}]}]


@pytest.mark.parametrize(("first", "second"), [(3, 5), (0.5, 1.0), ("a", "b"), (2, 4.0), (None, 4), ([1], [1, 2])])
def test_other_differences_are_refused(first: Any, second: Any) -> None:
    with pytest.raises(ModelError, match=r"the calls differ in step 0 \(torch.f\): "):
        merged([recording(first), recording(second)], [2, 4])


def test_integers_that_differ_at_one_batch_size_are_refused() -> None:
    with pytest.raises(ModelError, match="2 is 4 in another"):
        merged([recording(2), recording(4)], [])


def test_recordings_of_other_lengths_are_refused() -> None:
    longer = recording(1)
    longer["steps"] *= 2
    with pytest.raises(ModelError, match="they take 1 and 2 steps"):
        merged([recording(1), longer], [])


def test_training_chooses_between_constants() -> None:
    base = recording({"$batch": [1, 1]}, 0.0, p=False)
    tree = overlaid(base, recording(2, 0.0, p=False), recording(2, 0.4, p=True), follow_training)
    assert tree == recording({"$batch": [1, 1]}, {"$training": [0.4, 0.0]}, p={"$training": [True, False]})
    with pytest.raises(Differs):
        overlaid(base, recording(2), recording(3), follow_training)


def test_dtypes_follow_where_float64_shows_in_both() -> None:
    plain = recording({"$dtype": "float32"}, {"$dtype": "float32"}, -3.4e38)
    double = recording({"$dtype": "float64"}, {"$dtype": "float32"}, -1.8e308)
    tree = overlaid(plain, plain, double, follow_dtype)
    assert tree == recording({"$dtype": "input"}, {"$dtype": "float32"}, -3.4e38)
    with pytest.raises(Differs):
        overlaid(plain, plain, recording(1, 2, 3), follow_dtype)


def test_flags_follow_training_by_name() -> None:
    tree = training_by_name(recording(False, training=False, train=True, inplace=False))
    assert tree == recording(False, training={"$training": [True, False]}, train=True, inplace=False)
