"""The rules of the house that a linter cannot hold. Each guard has a twin that proves it can fail."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import secateurs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to older Pythons

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "secateurs"
SOURCES = sorted(SRC.rglob("*.py"))
PROSE = sorted(path for folder in (ROOT, ROOT / "docs", ROOT / "changes") for path in folder.glob("*.md"))
COMMANDS = [ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml", ROOT / "constraints.txt"]

HEAVY = {
    *("accelerate", "altair", "captum", "datasets", "diffusers", "faiss", "flwr", "jinja2", "langchain", "lightning"),
    *("matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pandas", "peft", "PIL", "plotly", "ray", "scipy"),
    *("sentence_transformers", "sklearn", "timm", "torchmetrics", "torchvision", "transformers", "trimesh", "zennit"),
}
MAX_LINES = 450


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- importing ---------------------------------------------------------------------------------------------------------


def heavy_after(statement: str) -> set[str]:
    """The heavy packages that `statement` imports in a fresh process, beyond those that torch itself brings."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["secateurs", "secateurs.methods", "secateurs.cli"])
def test_importing_is_light(module: str) -> None:
    assert heavy_after(f"import {module}") == set()


def test_heavy_imports_are_seen() -> None:
    assert "sklearn" in heavy_after("import secateurs, sklearn")


def foreign_imports(source: str, allowed: frozenset[str]) -> list[str]:
    """Absolute imports in `source`, wherever they stand, from outside the standard library and `allowed`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append(node.module)
    return [name for name in found if name.partition(".")[0] not in sys.stdlib_module_names | allowed]


# safetensors because a plan is saved as such.
CORE_MAY_IMPORT = frozenset({"torch", "numpy", "safetensors", "secateurs"})


@pytest.mark.parametrize("path", sorted((SRC / "core").glob("*.py")), ids=relative)
def test_core_imports_little(path: Path) -> None:
    assert foreign_imports(path.read_text(encoding="utf-8"), CORE_MAY_IMPORT) == []


def test_foreign_imports_are_seen() -> None:
    source = "import math, torch.nn\nfrom .dims import Dim\ndef f():\n    from transformers.models import bert"
    assert foreign_imports(source, CORE_MAY_IMPORT) == ["transformers.models"]


# -- what is public ----------------------------------------------------------------------------------------------------


def in_house_order(names: list[str]) -> list[str]:
    """`names` as ruff sorts `__all__`: CONSTANTS, Classes, functions; each in alphabetical order."""
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def visible(module: ModuleType) -> set[str]:
    """The public names of `module` but for its submodules and `from __future__ import annotations`."""
    names = {name for name in dir(module) if not name.startswith("_") and name != "annotations"}
    return {name for name in names if not inspect.ismodule(getattr(module, name))}


def test_the_face_is_what_can_be_seen() -> None:
    listed = getattr(secateurs, "__all__", [])
    assert {name for name in listed if not name.startswith("__")} == visible(secateurs)
    assert listed == in_house_order(listed)


def test_an_unlisted_name_is_visible() -> None:
    module = ModuleType("example")
    module.prune, module.core, module._hidden = print, ModuleType("example.core"), 1
    assert visible(module) == {"prune"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


def is_public(path: Path) -> bool:
    """Whether the module at `path` has no underscore in its qualified name and holds more than a docstring."""
    hidden = any(part.startswith("_") for part in module_name(path).split("."))
    return not hidden and any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text("utf-8")).body)


@pytest.mark.parametrize("name", [module_name(path) for path in SOURCES if is_public(path)])
def test_public_modules_name_what_they_offer(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []
    assert len(set(module.__all__)) == len(module.__all__)


# -- what the source may not contain -----------------------------------------------------------------------------------


def offences(source: str) -> list[str]:
    """What in `source` the house forbids, each as `line: what`."""
    found = [
        (number, word)
        for number, line in enumerate(source.splitlines(), 1)
        for word in re.findall(r"\b(?:TODO|FIXME|XXX|raise NotImplementedError)\b", line)
    ]
    for node in ast.walk(ast.parse(source)):
        found += [(node.lineno, what) for what in node_offences(node)]
    return [f"{number}: {what}" for number, what in sorted(found)]


def node_offences(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ExceptHandler):
        if node.type is None:
            yield "bare except"
        if all(isinstance(statement, ast.Pass) for statement in node.body):
            yield "except that only passes"
    elif isinstance(node, ast.Call):
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if re.search(r"\bpickle\.loads?$", name) or name in ("eval", "exec"):
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        yield from (f"{k}=True" for k in ("allow_pickle", "trust_remote_code") if keywords.get(k) == "True")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_has_nothing_forbidden(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert offences(text) == []
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("x = 1  # TODO later", "1: TODO"),
        ("def f():\n    raise NotImplementedError", "2: raise NotImplementedError"),
        ("try:\n    f()\nexcept:\n    g()", "3: bare except"),
        ("try:\n    f()\nexcept Exception:\n    pass", "3: except that only passes"),
        ("pickle.load(file)", "1: pickle.load"),
        ("eval('1')", "1: eval"),
        ("torch.load(path)", "1: torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "1: torch.load without weights_only=True"),
        ("np.load(path, allow_pickle=True)", "1: allow_pickle=True"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "1: trust_remote_code=True"),
    ],
)
def test_offences_are_seen(source: str, offence: str) -> None:
    assert offences(source) == [offence]


def test_allowed_source_is_no_offence() -> None:
    assert offences("model.eval()\ntorch.load(path, weights_only=True)\ntry:\n    f()\nexcept OSError:\n    g()") == []


# A path that only the author's machine has; the address of a page is none.
_ROOTS = "home|Users|root|mnt|media|opt|srv|tmp|var|work|private"
LOCAL_PATH = re.compile(rf"(?<![\w.:/])(?:/(?:{_ROOTS})/|[A-Z]:\\)[\w.~-]+")


@pytest.mark.parametrize("path", [*sources("src", "tests", "benchmarks"), *PROSE, *COMMANDS], ids=relative)
def test_no_file_names_a_local_path(path: Path) -> None:
    assert LOCAL_PATH.findall(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", ["home", "Users", "tmp"])
def test_local_paths_are_seen(folder: str) -> None:
    assert LOCAL_PATH.search(f'open("/{folder}/someone/model.safetensors")')
    assert not LOCAL_PATH.search(f"https://example.org/{folder}/someone/model.safetensors and out/{folder}/x")


# -- what the documents promise ----------------------------------------------------------------------------------------


def make_targets_named(text: str) -> set[str]:
    """Targets named as `make x` in code: a fenced block or between backquotes."""
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL)
    return {target for piece in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece)}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("path", PROSE, ids=relative)
def test_documents_name_commands_that_exist(path: Path) -> None:
    assert make_targets_named(path.read_text(encoding="utf-8")) <= make_targets()


def test_commands_in_documents_are_seen() -> None:
    text = "To make sure, run `make nothing`:\n```sh\nmake test\nmake demo PYTHON=python3.12\n```"
    assert make_targets_named(text) == {"nothing", "test", "demo"}
    assert {"test", "demo"} <= make_targets()


def test_ci_runs_the_test_command() -> None:
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras_named(text: str) -> set[str]:
    """Extras that an error or a document tells a person to install."""
    in_brackets = re.findall(r"secateurs\[([a-z,]+)\]", text)
    in_errors = re.findall(r"""MissingExtraError\([^()]*,\s*["']([a-z]+)["']\)""", text)
    return {extra for names in (*in_brackets, *in_errors) for extra in names.split(",")}


@pytest.mark.parametrize("path", [*SOURCES, *PROSE], ids=relative)
def test_extras_that_are_named_exist(path: Path) -> None:
    assert extras_named(path.read_text(encoding="utf-8")) <= set(PROJECT["optional-dependencies"])


def test_named_extras_are_seen() -> None:
    assert extras_named("pip install 'secateurs[onnx,vision]'") == {"onnx", "vision"}
    assert extras_named('raise MissingExtraError("flwr", "federated") from e') == {"federated"}
