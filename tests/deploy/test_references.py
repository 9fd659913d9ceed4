"""A saved model may name what computes, and nothing that acts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.core.errors import FileError
from secateurs.deploy.references import Kind, name_of, passive, resolve, untrusted
from tests.deploy import samples

ALLOWED: list[tuple[str, Kind, Any]] = [
    ("torch.nn.modules.linear:Linear", "module", nn.Linear),
    ("torch.nn.modules.linear:Linear", "value", nn.Linear),
    ("torch.nn.functional:gelu", "value", F.gelu),
    ("torch.nn.functional:max_pool2d", "value", F.max_pool2d),
    ("torch:relu", "value", torch.relu),
    ("torch.special:expit", "value", torch.special.expit),
    ("builtins:int", "value", int),
    ("builtins:len", "value", len),
]


@pytest.mark.parametrize(("name", "kind", "target"), ALLOWED)
def test_allowed_names(name: str, kind: Kind, target: Any) -> None:
    assert resolve(name, kind) is target


@pytest.mark.parametrize("target", [case[2] for case in ALLOWED])
def test_names_lead_back(target: Any) -> None:
    assert resolve(name_of(target), "value") is target


def test_compiled_functions_are_named_where_users_find_them() -> None:
    assert name_of(F.gelu) == "torch.nn.functional:gelu"
    assert name_of(torch.special.expit) == "torch.special:expit"
    assert name_of(torch.linalg.norm) == "torch.linalg:norm"


REFUSED: list[tuple[str, Kind]] = [
    # Outside the allowed packages.
    ("os:system", "value"),
    ("posix:system", "value"),
    ("subprocess:Popen", "object"),
    ("pickle:loads", "value"),
    ("importlib:import_module", "value"),
    ("functools:reduce", "value"),
    ("__main__:anything", "value"),
    # Reached through an allowed package.
    ("torch:os.system", "value"),
    ("torch.serialization:os.system", "value"),
    ("torch.serialization:pickle.loads", "value"),
    ("torch.hub:urlopen", "value"),
    ("secateurs.deploy.store:hashlib.sha256", "value"),
    # Builtins that act.
    ("builtins:eval", "value"),
    ("builtins:exec", "value"),
    ("builtins:open", "value"),
    ("builtins:getattr", "value"),
    ("builtins:__import__", "value"),
    ("builtins:type", "value"),
    # Functions of allowed packages that read, write or download.
    ("torch.serialization:load", "value"),
    ("torch:load", "value"),
    ("torch:from_file", "value"),
    ("torch.hub:load", "value"),
    ("torch:compile", "value"),
    ("secateurs.deploy.store:save_model", "value"),
    ("timm.models._factory:create_model", "value"),
    ("timm.models._helpers:load_checkpoint", "value"),
    ("torchvision.models._api:get_model", "value"),
    ("transformers.dynamic_module_utils:get_class_from_dynamic_module", "value"),
    ("transformers.modeling_utils:PreTrainedModel.save_pretrained", "value"),
    ("transformers.modeling_utils:PreTrainedModel.from_pretrained", "value"),
    ("collections:namedtuple", "value"),
    # Classes that act when they are made, called or die, where a value or plain object is asked for.
    ("torch._C:PyTorchFileWriter", "value"),
    ("torch.package.package_importer:PackageImporter", "value"),
    ("torch._C:Generator", "value"),
    # Not what the place needs.
    ("torch.nn.modules.linear:Linear", "object"),
    ("torch.nn.functional:gelu", "module"),
    ("collections:OrderedDict", "module"),
    ("torch.nn.modules.linear:Linear", "enum"),
    ("torch.nn.modules.linear:Linear", "record"),
    # Malformed.
    ("", "value"),
    ("torch", "value"),
    ("torch:", "value"),
    (":relu", "value"),
    ("torch.nn:Linear.__init__.__globals__", "value"),
    ("torch.nn:Linear; import os", "value"),
    ("torch..nn:Linear", "value"),
    (".torch:relu", "value"),
    ("torch:nosuchname", "value"),
    ("torch.nosuchmodule:name", "value"),
    ("torch.__main__:name", "value"),
]


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_refused_names(name: str, kind: Kind) -> None:
    with pytest.raises(FileError):
        resolve(name, kind)


def test_a_name_outside_the_packages_is_not_even_imported() -> None:
    code = (
        "import sys; from secateurs.deploy.references import resolve\n"
        "try: resolve('this:s', 'value')\n"
        "except Exception as error: print(type(error).__name__, 'this' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["FileError", "False"]


def test_trust_lifts_the_limits_for_the_named_package_only() -> None:
    name = "tests.deploy.samples:double"
    with pytest.raises(FileError, match="outside the packages"):
        resolve(name, "value")
    assert resolve(name, "value", ("tests",)) is samples.double
    assert resolve(name, "value", ("tests.deploy",)) is samples.double
    assert not untrusted([name], ("tests.deploy.samples",))
    for other in ("test", "tests.dep", "tests.deploy.samples.double", "samples", ""):
        with pytest.raises(FileError):
            resolve(name, "value", (other,))


def test_trust_in_a_package_does_not_cover_what_it_imports() -> None:
    with pytest.raises(FileError, match="in something that is not a class"):
        resolve("tests.deploy.samples:torch.load", "value", ("tests",))


def test_a_callable_object_needs_trust() -> None:
    name = name_of(samples.Callable)
    assert not passive(samples.Callable)
    assert passive(samples.Settings)
    assert resolve(name, "object", samples.HERE) is samples.Callable


def test_an_acting_function_says_how_to_allow_it() -> None:
    with pytest.raises(FileError, match=r"if you trust it, pass trust=\('torch.hub',\)"):
        resolve("torch.hub:load", "value")
    assert resolve("torch.hub:load", "value", ("torch.hub",)) is torch.hub.load


def test_missing_code_says_so() -> None:
    with pytest.raises(FileError, match="cannot be imported here"):
        resolve("torch.nosuchmodule:name", "value")
    with pytest.raises(FileError, match="does not lead to a class or function"):
        resolve("torch:nosuchname", "value")


def test_strangers_are_listed_in_order() -> None:
    names = ["torch:relu", "mine.a:B", "tests.x:Y", "torch.__main__:x", "builtins:int"]
    assert untrusted(names, ("tests",)) == ["mine.a:B", "torch.__main__:x"]
