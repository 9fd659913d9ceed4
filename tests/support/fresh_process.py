"""A program that knows folders only: it opens each language model, runs it, and writes down what it gives.

`python fresh_process.py saved|pretrained PLACE` goes through the folders of PLACE. Each has `model`, the folder to be
opened, `inputs.safetensors` and `note.json`; it gets `outputs.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["gives"]


def gives(model: Any, inputs: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """The logits and, of what generates, six tokens more, with and without cache."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    ids = inputs["input_ids"][:, :5]
    with torch.no_grad():
        found = {"logits": model(**inputs).logits.contiguous()}
        for use in (True, False) if causal else ():
            found[f"tokens, use_cache={use}"] = model.generate(input_ids=ids, use_cache=use, **options)
    return found


def _saved(folder: Path, _: dict[str, Any]) -> Any:
    import secateurs

    return secateurs.load(folder).model.eval()


def _pretrained(folder: Path, note: dict[str, Any]) -> Any:
    model = getattr(transformers, note["class"]).from_pretrained(folder, local_files_only=True).eval()
    assert "secateurs" not in sys.modules
    for name in note["pruned"]:
        layer = model.get_submodule(name)
        rows = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
        assert bool(((rows.reshape(-1, 4) != 0).sum(1) == 2).all()), f"{folder}: {name} is not 2:4"
    return model


def _main(how: str, place: Path) -> None:
    for folder in sorted(place.iterdir()):
        note = json.loads((folder / "note.json").read_text())
        model = {"saved": _saved, "pretrained": _pretrained}[how](folder / "model", note)
        inputs = load_file(folder / "inputs.safetensors")
        save_file(gives(model, inputs, note["causal"]), folder / "outputs.safetensors")


if __name__ == "__main__":
    # A program's own folder is where it looks for modules first. Held until it ends, as in the tests.
    from torchvision_shim import declare_missing_ops

    ops = declare_missing_ops()
    _main(sys.argv[1], Path(sys.argv[2]))
