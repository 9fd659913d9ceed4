from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateurs.core.errors import OptionError
from secateurs.integrations.functions import is_function, named


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "gadgets.py").write_text("class Box:\n    lid = 3\n", encoding="utf-8")
    (tmp_path / "hungry.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("gadgets", "hungry"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "told"),
    [("a:b", True), ("a.b:c.d", True), ("a", False), ("a:", False), (":b", False), ("a/b:c", False), ("C:\\x", False)],
)
def test_what_reads_like_a_function(spec: str, told: bool) -> None:
    assert is_function(spec) is told


def test_the_current_folder_is_searched(here: Path) -> None:
    assert named("gadgets:Box.lid") == 3
    assert str(here) in sys.path
    assert named("os.path:join")("a", "b")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("widgets:box", "widgets:box: there is no module 'widgets' in the current folder or among the installed"),
        ("os.nowhere:x", "there is no module 'os.nowhere'"),
        ("hungry:x", "hungry:x: hungry imports no_such_package, which is not installed."),
        ("gadgets:lid", "module 'gadgets' has nothing called 'lid'."),
    ],
)
def test_what_cannot_be_found(spec: str, sentence: str) -> None:
    with pytest.raises(OptionError) as refused:
        named(spec)
    assert sentence in str(refused.value)
