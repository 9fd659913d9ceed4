"""What all commands share: exit codes, errors in one sentence, JSON alone on the standard output, a light start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateurs
from secateurs.cli import _session
from secateurs.recover import Progress
from tests.cli.running import run

SRC = Path(secateurs.__file__).resolve().parent
COMMANDS = ("prune", "inspect", "methods", "report", "bench", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out


def test_help_lists_every_command() -> None:
    listed = run("--help").out
    assert [command for command in COMMANDS if command in listed] == list(COMMANDS)


def test_version() -> None:
    assert run("--version").out.startswith("secateurs ")


@pytest.mark.parametrize(
    "words",
    [("trim",), ("prune", "things:net"), ("prune", "a", "--budget", "b", "--out", "c", "--input", "1,x"), ("bench",)],
)
def test_misuse_exits_with_two(words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""


def test_a_failure_is_one_sentence(workplace: Path) -> None:
    ran = run("inspect", "things:nothing")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err == (
        "error: things:nothing returned a list; it must return a torch.nn.Module, or (module, example inputs).\n"
    )


def test_an_unexpected_error_is_one_sentence_too() -> None:
    with pytest.raises(_session.typer.Exit) as ended, _session.session(as_json=False, debug=False):
        raise ZeroDivisionError("division\n  by zero")
    assert ended.value.exit_code == 1
    sentence = _session._sentence(ZeroDivisionError("division\n  by zero"))
    assert sentence == "unexpected ZeroDivisionError: division by zero; --debug shows where."


def test_debug_lets_errors_through() -> None:
    with pytest.raises(ZeroDivisionError), _session.session(as_json=False, debug=True):
        raise ZeroDivisionError


def test_what_libraries_print_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with _session.session(as_json=True, debug=False) as talk:
        sys.stdout.write("chatter\n")
        talk.say("told")
        talk.result({"a": 1.5, "b": "ö"})
    captured = capsys.readouterr()
    assert captured.out == '{\n "a": 1.5,\n "b": "ö"\n}\n'
    assert captured.err == "chatter\ntold\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with _session.session(as_json=False, debug=False, quiet=True) as talk:
        talk.say("told")
        with _session.Stages(talk) as stages:
            stages.begin("planning")
        talk.result({}, "shown [bold] as it is")
    captured = capsys.readouterr()
    assert captured.out == "shown [bold] as it is\n"
    assert captured.err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with _session.session(as_json=True, debug=False) as talk, _session.Stages(talk) as stages:
        stages.begin("planning")
        stages.begin("recovering")
        stages.step(Progress(step=3, epoch=0, share=0.5, loss=1.25, lr=0.1))
        stages._bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "recovering" in captured.err
    assert "loss 1.250" in captured.err


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with _session.session(as_json=True, debug=False, threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_help_does_not_import_torch() -> None:
    """The package around is a stub here, so that this test is about the command line alone."""
    code = f"""
import sys, types
package = types.ModuleType("secateurs"); package.__path__ = [{str(SRC)!r}]; sys.modules["secateurs"] = package
from secateurs.cli import app
try:
    app(["prune", "--help"])
except SystemExit:
    print("torch" in sys.modules, "rich" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False", "True"]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "secateurs", "methods", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "secateurs methods" in done.stderr
