"""A folder is replaced whole, whatever fails and whenever the program dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from secateurs.core import folder as module
from secateurs.core.errors import FileError
from secateurs.core.folder import current, replace, replace_file


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it and nothing after it runs."""


def writer(text: str) -> Callable[[Path], None]:
    def write(fresh: Path) -> None:
        (fresh / "a").write_text(text)
        (fresh / "b").write_text(text)

    return write


def content(folder: Path) -> str:
    """What a reader finds; both files must tell the same."""
    place = current(folder)
    texts = {path.read_text() for path in place.iterdir()} if place.exists() else {"nothing"}
    assert len(texts) == 1
    assert not place.exists() or len(list(place.iterdir())) == 2
    return texts.pop()


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    replace(tmp_path / "x" / "y", writer("new"))
    assert content(tmp_path / "x" / "y") == "new"
    assert os.listdir(tmp_path / "x") == ["y"]


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "left").write_text("over")
    replace(target, writer("new"))
    assert sorted(os.listdir(target)) == ["a", "b"]
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("old", [True, False])
def test_a_failing_write_leaves_the_old_folder(tmp_path: Path, old: bool) -> None:
    target = tmp_path / "target"
    if old:
        replace(target, writer("old"))

    def fail(fresh: Path) -> None:
        (fresh / "a").write_text("half")
        raise OSError("no space left")

    with pytest.raises(FileError, match=r"cannot be written .no space left.; what was there before is untouched"):
        replace(target, fail)
    assert content(target) == ("old" if old else "nothing")
    assert os.listdir(tmp_path) == (["target"] if old else [])


@pytest.mark.parametrize("failing", [1, 2, 3])  # the old steps aside, the new takes its place, the old is discarded
def test_a_failing_rename_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "target"
    replace(target, writer("old"))
    rename, calls = os.rename, []

    def flaky(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise PermissionError("denied")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(FileError, match="denied") if failing < 3 else contextlib.nullcontext():
        replace(target, writer("new"))
    monkeypatch.undo()
    assert content(target) == ("new" if failing == 3 else "old")
    replace(target, writer("newer"))
    assert content(target) == "newer"


def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int) -> int:
    """Replaces "old" by "new" and dies before the system call `die_at`; the number of calls that were reached."""
    count = 0

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count >= die_at:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        # A dead process cleans nothing up, so every later call dies too.
        for name in ("rename", "fsync", "open"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
        with contextlib.suppress(Killed):
            replace(tmp_path / "target", writer("new"))
    return count


def test_dying_at_any_step_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    total = 1000
    for die_at in range(1, 1000):
        place = tmp_path / str(die_at)
        replace(place / "target", writer("old"))
        reached = steps(place, monkeypatch, die_at)
        found.append(content(place / "target"))
        replace(place / "target", writer("newer"))
        assert content(place / "target") == "newer"
        assert os.listdir(place) == ["target"]
        if reached < die_at:
            total = die_at
            break
    assert total > 10
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_a_file_is_replaced_with_its_companions(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("main")
        path.with_name(f"{path.name}.data").write_text("more")

    replace_file(tmp_path / "x" / "model.onnx", write)
    assert {path.name: path.read_text() for path in (tmp_path / "x").iterdir()} == {
        "model.onnx": "main",
        "model.onnx.data": "more",
    }


def test_a_failing_file_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(FileError, match="no space left"):
        replace_file(target, fail)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.onnx"]
