"""The work folder beside a result: what a killed run needs to go on, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..core.errors import FileError, OptionError
from ..core.folder import write_json
from ..running import RUN

_SETTINGS = "command.json"


def checked_out(out: Path, model: str) -> Path:
    """`out`, if a result may be put there; found out before the work and not after it.

    Raises:
        FileError: it is a file, holds something else than a saved model, or is the model that is to be pruned.
    """
    if out.exists() and not out.is_dir():
        raise FileError(f"--out {out} is a file; choose a folder.")
    if Path(model).exists() and out.resolve() == Path(model).resolve():
        raise FileError(f"--out {out} is the model itself, which is never changed; choose another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / "model.json").is_file():
        raise FileError(f"--out {out} holds something else than a saved model; choose a new folder.")
    # Its neighbours are named after it, which "." and ".." are not fit for.
    return out.resolve() if out.name in ("", "..") else out


def checked_beside(place: Path) -> None:
    """None, if a folder for `from_pretrained` may be put there; found out before the work and not after it.

    Raises:
        FileError: something is there already.
    """
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise FileError(
            f"--export huggingface writes {place}, and that is not empty: delete it, or choose another --out."
        )


def opened(out: Path, given: Mapping[str, Any], beside: Sequence[str], resume: bool) -> Path:
    """The work folder of `out`: a new one, or that of the same run where it is to be resumed.

    Args:
        out: the folder of the result.
        given: the command's arguments by name, JSON values but for those beside.
        beside: names of arguments that the result does not depend on.
        resume: go on with what is there.

    Raises:
        FileError: there is one and it is not to be resumed, or it cannot be read.
        OptionError: it belongs to a run with other settings; they are named.
    """
    settings = {"secateurs": version("secateurs"), **{k: v for k, v in given.items() if k not in beside}}
    work = out.with_name(f"{out.name}.work")
    if not work.exists():
        write_json(work / _SETTINGS, settings)
        return work
    if not resume:
        raise FileError(f"{work} holds an unfinished run: go on with it by --resume, or delete it to start again.")
    before = _read(work / _SETTINGS)
    now = json.loads(json.dumps(settings))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        told = ", ".join(f"{name} is {before.get(name)!r} there and {now.get(name)!r} here" for name in different)
        raise OptionError(f"{work} holds a run with other settings: {told}; use those, or delete it to start again.")
    return work


def close(work: Path) -> None:
    """None; removes the work folder."""
    shutil.rmtree(work)


def close_if_unused(work: Path) -> bool:
    """Whether the run failed before it had anything worth keeping; its work folder is gone then."""
    unused = {path.name for path in work.iterdir()} <= {_SETTINGS, RUN}
    if unused:
        close(work)
    return unused


def _read(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}); delete {path.parent} to start again.") from error
    return settings
