"""Examples in docstrings, in CONTRIBUTING.md and on some pages of docs/tasks run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateurs

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


WITH_EXAMPLES = [module_name(path) for path in sorted(SRC.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


# What an example may use unsaid, beside the names of its own module.
KNOWN = {"torch": torch, "nn": nn, "sec": secateurs}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that what an example saves is gone with it."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), extraglobs=KNOWN, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_contributing_examples() -> None:
    """In one fresh process, because they enter new names into the registries."""
    blocks = python_blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert blocks
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["language", "training"])
def test_examples_of_a_task(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page, one after the other, in an empty folder."""
    blocks = python_blocks((ROOT / "docs" / "tasks" / f"{page}.md").read_text(encoding="utf-8"))
    assert blocks
    monkeypatch.chdir(tmp_path)
    # Times are no part of what is said there.
    monkeypatch.setitem(secateurs.prune.__kwdefaults__, "measure", False)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


def test_python_blocks_are_seen() -> None:
    assert python_blocks("```sh\nls\n```\n```python\nx = 1\n```\n") == ["x = 1\n"]
