"""What one process of several runs; a module of its own, since each imports it before anything else."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cli.running import run
from tests.support.torchvision_shim import declare_missing_ops

__all__ = ["WORDS", "started"]

WORDS = ("stream", "before", "--budget", "2:4", "--data", "texts:tokens", "--method", "wanda")


def started(rank: int, folder: str, port: int) -> None:
    """What torchrun does for each process; what the command printed is in the file of its rank."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ops = declare_missing_ops()
    ran = run(*WORDS, "--out", "two")
    Path(f"rank{rank}.txt").write_text(f"{ran.code}{ran.out}", encoding="utf-8")
    del ops
