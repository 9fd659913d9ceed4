"""Saved models: atomic, checked, without pickle, and refused when anything is odd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateurs.core import folder as folder_module
from secateurs.core.errors import FileError, OptionError
from secateurs.deploy.store import load_extra, load_model, save_model
from tests.deploy import samples
from tests.deploy.samples import Net, again, same

X = torch.linspace(-1, 1, 8).reshape(2, 4)


def net(fill: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    nn.init.constant_(model[0].weight, fill)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(net(), tmp_path / "m")


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = Net(8)
    samples.narrow_linear(model.inner, model.outer, seed=2)
    assert same(model, again(model, tmp_path), X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    back = again(model, tmp_path)
    assert {tensor.dtype for tensor in back.parameters()} == {dtype}
    assert same(model, back, X.to(dtype))


def test_the_folder_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    save_model(net(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["model.json", "model.safetensors"]
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert sorted(weights) == sorted(net().state_dict())
    assert (weights["0.weight"] == 1).all()
    document = json.loads((tmp_path / "m" / "model.json").read_text())
    assert document["version"] == 1
    assert set(document["packages"]) == {"torch"}
    assert document["files"]["model.safetensors"]["bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    model = net()
    first, second = (save_model(model, tmp_path / name) / "model.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    save_model(net(), tmp_path / "m")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "plain", *(tmp_path / "m").iterdir())}
    assert len(modes) == 1


def test_loaded_weights_outlive_the_folder(tmp_path: Path) -> None:
    save_model(net(1.0), tmp_path / "m")
    back = load_model(tmp_path / "m")
    save_model(net(2.0), tmp_path / "m")
    assert (back[0].weight == 1).all()
    assert (load_model(tmp_path / "m")[0].weight == 2).all()


def test_the_device_is_chosen(tmp_path: Path) -> None:
    save_model(net(), tmp_path / "m")
    back = load_model(tmp_path / "m", device="meta")
    assert {tensor.device.type for tensor in back.state_dict().values()} == {"meta"}


def test_options_are_checked(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="takes a module, not OrderedDict: pass the model itself"):
        save_model(net().state_dict(), tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'gpu' is not a device: pass one such as 'cpu'"):
        load_model(saved, device="gpu")


def test_a_saved_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    save_model(net(3.0), tmp_path / "m")
    code = f"from secateurs.deploy.store import load_model; print(load_model({str(tmp_path / 'm')!r})[0].weight.sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "36." in done.stdout


# Extra files.


def test_extra_files_are_kept_beside_the_model(tmp_path: Path) -> None:
    extra = {"plan": {"keep": [1, 2]}, "notes.json": ["a"], "report.html": b"<p>"}
    save_model(net(), tmp_path / "m", extra=extra)
    assert sorted(os.listdir(tmp_path / "m"))[2:] == ["notes.json", "plan.json", "report.html"]
    assert load_extra(tmp_path / "m", "plan") == load_extra(tmp_path / "m", "plan.json") == {"keep": [1, 2]}
    assert load_extra(tmp_path / "m", "report.html") == b"<p>"
    with pytest.raises(FileError, match=r"has no extra file 'model.safetensors'; it has: notes.json, plan.json"):
        load_extra(tmp_path / "m", "model.safetensors")
    (tmp_path / "m" / "plan.json").write_text("{}")
    with pytest.raises(FileError, match=r"plan.json is truncated"):
        load_extra(tmp_path / "m", "plan")


@pytest.mark.parametrize("name", ["model", "model.json", "a/b", "../up", ".hidden", ""])
def test_extra_files_have_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="use a plain file name other than"):
        save_model(net(), tmp_path / "m", extra={name: 1})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_extra_values_are_json(tmp_path: Path, value: Any) -> None:
    with pytest.raises(OptionError, match=r"'plan.json' is not JSON .*; pass JSON values or bytes"):
        save_model(net(), tmp_path / "m", extra={"plan": value})


# Replacing.


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_model(net(1.0), folder)
    save_model(net(2.0), folder, extra={"plan": 1})
    save_model(net(3.0), folder)
    (folder / "thesis.tex").write_text("ten years")
    with pytest.raises(FileError, match=r"not part of a saved model .thesis.tex., and saving replaces the whole"):
        save_model(net(), folder)
    assert (load_model(folder)[0].weight == 3).all()
    with pytest.raises(FileError, match=r"thesis.tex is a file; choose a folder"):
        save_model(net(), folder / "thesis.tex")


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path) -> None:
    save_model(net(1.0), tmp_path / "m")
    broken = net(2.0)
    broken.act = lambda x: x
    with pytest.raises(FileError, match="attribute 'act'"):
        save_model(broken, tmp_path / "m")
    assert (load_model(tmp_path / "m")[0].weight == 1).all()


@pytest.mark.parametrize("broken", ["save_file", "_fingerprint"])
def test_a_failing_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    save_model(net(1.0), tmp_path / "m")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"secateurs.deploy.store.{broken}", full)
        with pytest.raises(FileError, match="No space left on device"):
            save_model(net(2.0), tmp_path / "m")
    assert (load_model(tmp_path / "m")[0].weight == 1).all()
    assert os.listdir(tmp_path) == ["m"]


SAVER = """
import sys, torch
from torch import nn
from secateurs.deploy.store import save_model
model = nn.Linear(700, 700)
print("ready", flush=True)
for fill in range(2, 100000):
    nn.init.constant_(model.weight, fill)
    nn.init.constant_(model.bias, fill)
    save_model(model, sys.argv[1])
"""


def test_kill_9_in_the_middle_of_saving(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # Once a model is there, the process is saving nearly all of the time, so it dies inside a save.
        while not folder.exists():
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    back = load_model(folder)
    values = back.weight.unique().tolist()
    assert len(values) == 1
    assert back.bias.unique().tolist() == values
    save_model(net(1.0), folder)
    assert os.listdir(tmp_path) == ["m"]
    assert (load_model(folder)[0].weight == 1).all()


def test_dying_between_the_renames_keeps_the_old_model_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    save_model(net(1.0), folder, extra={"plan": 1})
    os.rename(folder, folder_module._aside(folder))
    assert (load_model(folder)[0].weight == 1).all()
    assert load_extra(folder, "plan") == 1
    save_model(net(2.0), folder)
    assert (load_model(folder)[0].weight == 2).all()
    assert os.listdir(tmp_path) == ["m"]


# Reading what is odd.


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(FileError, match=message):
        load_model(folder)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "elsewhere", "holds no saved model: model.json is missing")
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors is missing; save the model again")
    (saved / "model.json").unlink()
    refused(saved, "holds no saved model: model.json is missing")


def test_truncated_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 5)
    refused(saved, f"model.safetensors is truncated: it has {size - 5} of {size} bytes; save or copy it again")


@pytest.mark.parametrize("position", [0, 20, -1])
def test_changed_weights(saved: Path, position: int) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    refused(saved, "model.safetensors was changed after it was saved: its checksum differs")


def test_truncated_json(saved: Path) -> None:
    path = saved / "model.json"
    for size in (0, 1, 100, path.stat().st_size - 2):
        os.truncate(path, size)
        refused(saved, "model.json is truncated or is not JSON") if size else refused(saved, "not JSON")


def test_other_json(saved: Path) -> None:
    (saved / "model.json").write_text("[1]")
    refused(saved, "is not a model saved by secateurs")
    (saved / "model.json").write_text("[" * 100_000)
    refused(saved, "is truncated or is not JSON")


def test_another_format_names_the_release_that_wrote_it(saved: Path) -> None:
    changed(saved, version=2, secateurs="9.1.0", surprise=1)
    refused(saved, "has the file format 2 of secateurs 9.1.0; this release reads format 1: install the release")


def test_unknown_fields_are_refused_with_their_origin(saved: Path) -> None:
    changed(saved, surprise=1)
    refused(saved, r"unknown field 'surprise'. It was written by secateurs .* with torch ")


def test_missing_fields_are_refused(saved: Path) -> None:
    document = json.loads((saved / "model.json").read_text())
    del document["files"]
    (saved / "model.json").write_text(json.dumps(document))
    refused(saved, "lacks the field 'files'")


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The folder with other tensors and a checksum that fits them."""
    from secateurs.deploy.store import _fingerprint

    save_file(tensors, folder / "model.safetensors")
    return changed(folder, files={"model.safetensors": _fingerprint(folder / "model.safetensors")})


def test_tensors_must_be_those_described(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    refused(rewritten(saved, {**tensors, "more": torch.zeros(1)}), "'more' is stored but not described")
    refused(
        rewritten(saved, {n: t for n, t in tensors.items() if n != "0.bias"}), "'0.bias' is described but not stored"
    )
    refused(rewritten(saved, {**tensors, "0.bias": torch.zeros(4)}), r"tensor '0.bias' should be float32 \[3\], but")


def test_weights_that_are_not_safetensors(saved: Path) -> None:
    from secateurs.deploy.store import _fingerprint

    torch.save({}, saved / "model.safetensors")
    changed(saved, files={"model.safetensors": _fingerprint(saved / "model.safetensors")})
    refused(saved, "model.safetensors is not a safetensors file")


@pytest.mark.parametrize(
    "model", [None, 3, [], {"uses": 3, "modules": {}, "tensors": {}}, {"uses": [3], "modules": {}, "tensors": {}}]
)
def test_nonsense_is_refused(saved: Path, model: Any) -> None:
    refused(changed(saved, model=model), "model.json cannot be loaded: .* It was written by secateurs")


def test_own_code_needs_trust(tmp_path: Path) -> None:
    folder = save_model(Net(), tmp_path / "m")
    with pytest.raises(
        FileError, match=r"uses code outside .*samples:Net.*; if you trust that code, pass trust=\('tests',\)"
    ):
        load_model(folder)
    assert same(Net(), load_model(folder, trust=["tests"]), X) is False
    with pytest.raises(OptionError, match=r"pass trust=\('tests',\), not 'tests'"):
        load_model(folder, trust="tests")


MAIN = """
import sys, torch
from torch import nn
from secateurs.deploy.store import load_model, save_model
class Net(nn.Module):
    def forward(self, x): return x + 1
save_model(Net(), sys.argv[1])
try:
    load_model(sys.argv[1])
except Exception as error:
    print(error)
print(load_model(sys.argv[1], trust=("__main__",))(torch.tensor(1)))
"""


def test_code_of_main_needs_trust(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MAIN, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert "pass trust=('__main__',)" in done.stdout
    assert "tensor(2)" in done.stdout
    with pytest.raises(FileError, match="'__main__:Net' does not lead to a class or function"):
        load_model(tmp_path / "m", trust=("__main__",))


def test_planted_code_does_not_run(saved: Path, tmp_path: Path) -> None:
    skeleton = json.loads((saved / "model.json").read_text())["model"]
    mark = tmp_path / "mark"
    for name in ("torch:os.system", "torch.hub:os.system", "posix:system", "builtins:eval", "torch:from_file"):
        skeleton["uses"].append(name)
        skeleton["modules"][""]["attributes"] = {
            "forward": {"$partial": {"$function": name}, "args": [f"touch {mark}"], "keywords": {}}
        }
        with pytest.raises(FileError):
            load_model(changed(saved, model=skeleton))
        skeleton["uses"].remove(name)
    assert not mark.exists()
