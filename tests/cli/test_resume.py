"""A killed run goes on: with the same bits in the end, never by accident, never with other settings."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import run

WORDS = (
    *("prune", "things:net", "--budget", "macs<=50%", "--data", "things:batches", "--recover-epochs", "4"),
    *("--lr", "0.05", "--threads", "1", "--no-measure"),
)


@pytest.fixture
def killed(workplace: Path) -> Path:
    """The work folder of a run that was killed in the middle of its fine-tuning."""
    command = [sys.executable, "-m", "secateurs", *WORDS, "--out", "smaller"]
    # Slow batches: the kill must not come too late.
    process = subprocess.Popen(command, env={**os.environ, "TEST_PAUSE": "0.3"}, stderr=subprocess.PIPE, text=True)
    checkpoint = workplace / "smaller.work" / "recovery" / "training.safetensors"
    try:
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        _, told = process.communicate()
    assert process.returncode != 0, told
    assert checkpoint.exists(), told
    assert not (workplace / "smaller").exists()
    return workplace / "smaller.work"


def test_a_killed_run_resumes_to_the_same_bits(killed: Path, workplace: Path) -> None:
    plain = run(*WORDS, "--out", "smaller")
    assert plain.code == 1
    assert plain.error == (
        "error: smaller.work holds an unfinished run: go on with it by --resume, or delete it to start again."
    )
    other = run(*WORDS, "--out", "smaller", "--resume", "--lr", "0.01")
    assert other.code == 1
    assert "smaller.work holds a run with other settings: lr is 0.05 there and 0.01 here" in other.error

    resumed = run(*WORDS, "--out", "smaller", "--resume")
    assert resumed.code == 0, resumed.err
    assert not killed.exists()
    assert run(*WORDS, "--out", "whole").code == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("smaller", "whole")]
    assert weights[0] == weights[1]


def test_resuming_does_not_begin_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin of the test above: a checkpoint that is not read would give the same bits, too."""
    from secateurs.recover import finetune

    passes: list[int] = []
    whole = finetune._pass

    def stop_after_two(recipe: finetune._Run, epoch: int, before: int) -> finetune.Epoch:
        if len(passes) == 2:
            passes.append(-1)
            raise RuntimeError("pulled the plug")
        passes.append(epoch)
        return whole(recipe, epoch, before)

    monkeypatch.setattr(finetune, "_pass", stop_after_two)
    stopped = run(*WORDS, "--out", "smaller")
    assert stopped.code == 1
    assert "note: what is done so far is kept in smaller.work; --resume goes on from there." in stopped.err
    assert stopped.error == "error: unexpected RuntimeError: pulled the plug; --debug shows where."
    assert run(*WORDS, "--out", "smaller", "--resume").code == 0
    assert passes == [0, 1, -1, 2, 3]


def test_resume_without_anything_to_resume_begins(workplace: Path) -> None:
    words = ("prune", "things:net", "--budget", "macs<=50%", "--input", "1,1,8,8", "--no-measure", "--out", "smaller")
    assert run(*words, "--resume").code == 0
    assert Path("smaller/model.json").exists()


def test_a_work_folder_that_cannot_be_read_is_refused(workplace: Path) -> None:
    Path("smaller.work").mkdir()
    words = ("prune", "things:net", "--budget", "macs<=50%", "--input", "1,1,8,8", "--out", "smaller")
    ran = run(*words, "--resume")
    assert ran.code == 1
    assert "command.json cannot be read" in ran.error
    assert "delete smaller.work to start again" in ran.error
    shutil.rmtree("smaller.work")
