"""Pruned models as ordinary Hugging Face folders, where their config can say what they have become.

A Hugging Face config holds one number for all layers. A model whose layers were cut alike fits into it; one with a
different width per layer does not, and no `from_pretrained` can load it: that one is saved with `save_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.batch import device_of
from ..core.errors import FileError, MissingExtraError, ModelError, ProofError
from ..core.folder import replace
from ..graph.configs.config import fit
from ..graph.twin import named_tensors
from .agreement import exporting, outputs

__all__ = ["save_pretrained"]


def save_pretrained(model: nn.Module, folder: str | Path, *, example_inputs: Any = None) -> Path:
    """The folder that `from_pretrained` of the model's class loads.

    Numbers of the config that the cut has made wrong (`intermediate_size`, say) are mended in the saved copy, if one
    number is right for all layers; the model keeps its own. The folder is loaded again and compared: all tensors bit
    for bit, and either the outputs or, without inputs, the numbers and classes of all modules.

    Args:
        model: a transformers model.
        folder: a new or an empty folder.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keywords, on which the loaded model must
            compute what the model does. Default: none, which refuses a model whose modules hold a number that the
            config does not give them, even if it is of no account.

    Raises:
        ModelError: it is no transformers model, or its config cannot express its widths; the message names one.
        ProofError: what `from_pretrained` loads is not the model.
        FileError: the folder holds files.
        MissingExtraError: transformers is not installed.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    >>> save_pretrained(BertModel(tiny).eval(), "smaller-bert").name
    'smaller-bert'
    """
    if not isinstance(model, _base_class()):
        raise ModelError(f"{type(model).__qualname__} is not a transformers model: save it with save_model.")
    place = Path(folder).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileError(f"{place} is not empty: choose a new folder.")
    config = _expressed(model, strictly=example_inputs is None)
    replace(place, lambda fresh: _write(model, config, fresh, example_inputs))
    return Path(folder)


def _base_class() -> Any:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise MissingExtraError("transformers", "language") from error
    return PreTrainedModel


def _expressed(model: Any, *, strictly: bool) -> Any:
    """A copy of the model's config from which a model with its very shapes is built and, strictly, its numbers."""
    found = fit(model)
    if found.left is None:
        raise ModelError(f"{type(model).__qualname__} cannot be built from its config: save it with save_model.")
    shapes = model.state_dict().keys()
    left = found.left
    wrong = [name for name, (made, has) in left.items() if strictly or name in shapes or None in (made, has)]
    # A size that differs says more than a tensor that is missing, for which it may be the reason.
    wrong.sort(key=lambda name: left[name][0] is None)
    if wrong:
        if left[wrong[0]][0] is None:
            raise ModelError(
                f"the config of {type(model).__qualname__} makes no {wrong[0]!r}, and nothing in it can: save it with "
                "save_model."
            )
        made, has = (list(side) if isinstance(side, tuple) else side for side in left[wrong[0]])
        raise ModelError(
            f"the config of {type(model).__qualname__} makes {wrong[0]!r} {made}, but it is {has}, and no one number "
            "of the config fits all layers: save it with save_model."
        )
    return found.config


def _write(model: Any, config: Any, folder: Path, example_inputs: Any) -> None:
    own = model.config
    try:
        model.config = config
        model.save_pretrained(folder)
    finally:
        model.config = own
    loaded = type(model).from_pretrained(folder, local_files_only=True, dtype=model.dtype)
    theirs = dict(named_tensors(loaded))
    for name, tensor in named_tensors(model):
        if name not in theirs or not torch.equal(tensor.cpu(), theirs[name]):
            raise ProofError(f"{name!r} comes back from from_pretrained changed: save the model with save_model.")
    if example_inputs is None:
        _same_code(model, loaded)
    else:
        _same_outputs(model, loaded.to(device_of(model)), example_inputs)


def _same_code(model: nn.Module, loaded: nn.Module) -> None:
    kinds = {path: type(module) for path, module in loaded.named_modules()}
    for path, module in model.named_modules():
        if type(module) is not kinds.get(path):
            raise ModelError(
                f"{path!r} runs other code since the cut, which a Hugging Face folder does not hold: save the model "
                "with save_model, or pass example_inputs= to have its own code compared."
            )


def _same_outputs(model: nn.Module, loaded: nn.Module, example_inputs: Any) -> None:
    found = []
    for form in (model, loaded):
        with exporting(form), torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(outputs(form, example_inputs))
    if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
        raise ProofError("what from_pretrained loads computes something else: save the model with save_model.")
