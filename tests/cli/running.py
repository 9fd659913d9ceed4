"""Running commands in this process, in a folder with a small model, its data and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from typer.testing import CliRunner

from secateurs.cli import app

__all__ = ["MODULE", "Ran", "run", "run_json", "workplace"]

# What `module:factory` and `module:loader` name in these tests; written into the folder in which they run.
MODULE = '''
import os, time
import torch
from torch import nn


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x):
        return self.body(x)


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )


def own():
    return Own(), torch.ones(2, 6)


def batches():
    """Four batches that can be told to take their time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        time.sleep(float(os.environ.get("TEST_PAUSE", 0)))
        x = torch.randn(16, 1, 8, 8, generator=generator)
        yield x, (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long()


def nothing():
    return []


def broken():
    raise RuntimeError("no luck today")
'''


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on the standard error, which is where an error stands."""
        return self.err.strip().splitlines()[-1]


def run(*words: str | Path) -> Ran:
    """The command line run with these words in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return Ran(result.exit_code, result.stdout, result.stderr)


def run_json(*words: str | Path) -> Any:
    """What a command that must succeed prints with --json, which must be JSON and nothing else."""
    ran = run(*words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a module `things` with models and loaders, and small.npz; gone from Python afterwards."""
    (tmp_path / "things.py").write_text(MODULE, encoding="utf-8")
    rng = numpy.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (48, 8, 8), dtype=numpy.uint8), rng.integers(0, 4, 48)
    numpy.savez(tmp_path / "small.npz", x=pixels, y=labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("things", None)
