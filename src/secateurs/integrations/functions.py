"""`module:name`: functions of the user's, named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from functools import reduce
from typing import Any

from ..core.errors import OptionError

__all__ = ["is_function", "named"]


def is_function(spec: str) -> bool:
    """Whether `spec` reads `package.module:name`."""
    module, colon, name = spec.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def named(spec: str) -> Any:
    """What `package.module:name` stands for.

    Naming a module runs its code: name only those you trust. The current folder is searched first, and stays on
    the path, since a module may import its neighbours later.

    Raises:
        OptionError: there is no such module, or nothing of that name in it.
    """
    module, _, name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise OptionError(f"{spec}: {module} imports {error.name}, which is not installed.") from error
        raise OptionError(
            f"{spec}: there is no module {error.name!r} in the current folder or among the installed packages."
        ) from error
    try:
        return reduce(getattr, name.split("."), found)
    except AttributeError as error:
        raise OptionError(f"module {module!r} has nothing called {name!r}.") from error
