"""Folders that are replaced whole: whoever looks finds all of the old one or all of the new one.

A new folder is written beside the old one, brought to the disk, and renamed. A file system cannot exchange two folders
in one step everywhere, so an old folder steps aside first, under a name that `current` knows; a program killed between
the two renames leaves the old folder under that name, from which it is still read and to its place returned by the
next `replace`. One writer at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import FileError

__all__ = ["current", "replace", "replace_file", "write_json"]


def current(folder: Path) -> Path:
    """Where the folder's content is now: at its place, or aside after a program was killed while replacing it."""
    if not folder.exists() and _aside(folder).exists():
        return _aside(folder)
    return folder


def replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces the folder by what `write` puts into the empty folder that it is given.

    If `write` raises, the old folder stays as it is.

    Raises:
        FileError: the disk is full, or something else that the operating system refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = _cleared(folder)
        try:
            write(fresh)
            _sync_all(fresh)
            _exchange(folder, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be written ({error}); what was there before is untouched.") from error


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Replaces a file, and those that its writer puts beside it, by what `write` makes of the path that it is given.

    If `write` raises, the old file stays as it is. The file itself is put in place last.

    Raises:
        FileError: the disk is full, or something else that the operating system refuses.
    """
    fresh = _beside(path, "saving")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            write(fresh / path.name)
            _sync_all(fresh)
            for made in sorted(fresh.iterdir(), key=lambda made: made.name == path.name):
                os.replace(made, path.with_name(made.name))
            _sync(path.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error}).") from error


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """None; the file holds `content` as JSON, and the file before it is whole until then.

    Raises:
        FileError: as `replace_file` does.
    """

    def put(fresh: Path) -> None:
        fresh.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")

    replace_file(path, put)


def _beside(folder: Path, role: str) -> Path:
    return folder.with_name(f".{folder.name}.{role}")


def _aside(folder: Path) -> Path:
    return _beside(folder, "before")


def _cleared(folder: Path) -> Path:
    """A new empty folder beside `folder`, after what killed programs left there is put in order."""
    if current(folder) != folder:
        os.rename(_aside(folder), folder)
    _discard(folder)
    fresh = _beside(folder, "saving")
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir()
    return fresh


def _exchange(folder: Path, fresh: Path) -> None:
    aside = _aside(folder)
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(fresh, folder)
    except OSError:
        if aside.exists():
            os.rename(aside, folder)
        raise
    _sync(folder.parent)
    # The new folder is in place: what is left of the old one, the next save clears away as well.
    with contextlib.suppress(OSError):
        _discard(folder)


def _discard(folder: Path) -> None:
    """Deletes what stepped aside; renamed first, so that half of a folder is never taken for the one that did."""
    aside, discarded = _aside(folder), _beside(folder, "discarded")
    shutil.rmtree(discarded, ignore_errors=True)
    if aside.exists():
        os.rename(aside, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Brings a file or folder to the disk; Windows offers that for files only, open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
