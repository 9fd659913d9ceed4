"""Nests in one safetensors file: what comes back, what is refused, and that a failed write leaves the old file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from secateurs.core import state
from secateurs.core.errors import FileError, OptionError
from secateurs.core.state import flatten, read_state, unflatten, write_state

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def same(a: Any, b: Any) -> bool:
    """Equal in type, in every key and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(q) for k, q in zip(a, b, strict=True)) and all(
            same(a[k], b[k]) for k in a
        )  # fmt: skip
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
KEYS = st.text("ab/#tensor", max_size=6) | st.integers(-3, 3)
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(tree=TREES)
def test_any_nest_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    write_state(path, tree)
    assert same(read_state(path), tree)
    assert same(unflatten(*flatten(tree)), tree)


def test_paths_that_read_the_same_are_kept_apart() -> None:
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "tensor": "a/b"}
    assert same(unflatten(*flatten(tree)), tree)


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    write_state(tmp_path / "a", {"nan": math.nan, "inf": -math.inf, "t": torch.tensor([math.nan, 1.0])})
    back = read_state(tmp_path / "a")
    assert math.isnan(back["nan"])
    assert back["inf"] == -math.inf
    assert back["t"].isnan().tolist() == [True, False]


def test_the_same_memory_is_stored_once_and_a_view_is_not_the_same() -> None:
    square = torch.arange(4.0).view(2, 2)
    tensors, _ = flatten({"a": square, "b": square, "turned": square.t(), "row": square[0]})
    assert list(tensors) == ["/a", "/turned", "/row"]
    assert tensors["/turned"].tolist() == [[0, 2], [1, 3]]


def test_the_tensors_taken_are_copies() -> None:
    x = torch.ones(2)
    tensors, _ = flatten([x])
    x.zero_()
    assert tensors["/0"].tolist() == [1, 1]


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_state(tmp_path / "new" / "deep" / "a.safetensors", [1])
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    write_state(path, {"w": torch.randn(50)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError, match=r"a\.safetensors cannot be read as training state .*truncated or damaged"):
        read_state(path)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere cannot be read as plan .* it is missing"):
        read_state(tmp_path / "nowhere", "plan")
    (tmp_path / "text").write_text("a note, not a model, and long enough to hold a length", encoding="utf-8")
    with pytest.raises(FileError, match="text cannot be read as training state"):
        read_state(tmp_path / "text")
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(FileError, match="other is a safetensors file but not training state of secateurs"):
        read_state(tmp_path / "other")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "a", {"w": torch.ones(2)}, "plan")
    assert read_state(tmp_path / "a", "plan")["w"].tolist() == [1, 1]
    with pytest.raises(FileError, match="a is a safetensors file but not training state of secateurs"):
        read_state(tmp_path / "a")


def test_a_file_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(state, "_VERSION", "99")
        write_state(tmp_path / "a", [1])
    with pytest.raises(FileError, match="holds training state of version '99'; this release reads '1' only"):
        read_state(tmp_path / "a")


@pytest.mark.parametrize("offset", [-1, -9])
def test_a_changed_byte_is_noticed(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a"
    write_state(path, {"w": torch.randn(5)})
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="was changed since it was written: its checksum does not match"):
        read_state(path)


def test_a_changed_number_in_the_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_state(path, {"step": 123456, "w": torch.ones(1)})
    path.write_bytes(path.read_bytes().replace(b"123456", b"123457"))
    with pytest.raises(FileError, match="its checksum does not match"):
        read_state(path)


def half(tensors: Any, draft: Path, metadata: Any) -> None:
    draft.write_bytes(b"half")
    raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_state(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(state, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        write_state(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_tree_that_cannot_be_stored_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_state(path, [1])
    with pytest.raises(OptionError):
        write_state(path, [object()])
    assert read_state(path) == [1]
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, {"b": {1, 2}}]}, "the state holds a set at /a/1/b; only tensors, numbers"),
        (object(), "the state holds a object at /; only"),
        ({"a": {(1, 2): 3}}, "the state has a key of type tuple at /a; use a string"),
        ({True: 1}, "the state has a key of type bool at /; use a string"),
        ({"f": torch.float32}, "the state holds a dtype at /f;"),
    ],
)
def test_other_types_are_refused_by_path(tree: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        flatten(tree)
