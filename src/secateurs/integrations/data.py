"""Data by name: an image folder, an `.npz` file, a text file, a Hugging Face data set, or `module:loader`."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from ..core.errors import DataError, MissingExtraError, OptionError
from .batches import Batches, Loader
from .functions import is_function, named
from .images import folder_batches, normalised, pictures_of_bytes, prepared
from .models import ImageFormat, TextFormat
from .text import block_batches, file_batches, sentence_batches

__all__ = ["Split", "load_data"]

Split = Literal["train", "test"]

_WHAT = (
    "DATA is a folder with one folder of pictures a class, an .npz file, a .txt file, the name of a Hugging Face data "
    "set or module:loader"
)
# In a file of several parts the names begin or end with the part; in a file of one they stand alone.
_INPUTS, _TARGETS = ("x", "images", "inputs"), ("y", "labels", "targets")
_PARTS = {"train": ("train",), "test": ("test", "validation", "val", "valid")}
_IMAGE, _LABEL, _TEXT = ("image", "img", "pixel_values"), ("label", "labels", "fine_label"), ("text", "sentence")


def load_data(
    spec: str,
    *,
    split: Split = "train",
    images: ImageFormat | None = None,
    text: TextFormat | None = None,
    size: int = 32,
    seed: int = 0,
) -> Batches | Loader:
    """The batches that `spec` names.

    Args:
        spec: one of
            a folder with one folder of pictures a class;
            an .npz file with arrays x and y, or x_train, y_train, x_test, y_test (also train_x, train_images and
            train_labels, images and labels, inputs and targets): bytes are pictures [n, h, w], [n, h, w, c] or
            [n, c, h, w] and are normalised for the model, other numbers are taken as they are; without y for
            calibration alone;
            a .txt file in UTF-8, for language models;
            the name of a Hugging Face data set, with @CONFIGURATION behind it where it has several;
            "module:loader", a function of nothing that returns an iterable of batches, called for each pass, or such an
            iterable itself. Its code runs; the current folder is searched first.
        split: which part, where the data has several.
        images, text: how the model wants them.
        size: samples a batch; a loader makes its own batches.
        seed: of the order of training.

    Raises:
        DataError: there is no such data, it is empty, or has not what it must have.
        OptionError: text for a model that reads none; a loader that is none.
        MissingExtraError: Pillow, transformers or datasets is not installed.
    """
    place = Path(spec)
    if not spec.strip() or (not place.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1)):
        raise DataError(f"there is no file or folder {spec!r}; {_WHAT}.")
    if place.is_dir():
        return folder_batches(place, images, size, seed)
    if place.suffix in (".npz", ".txt") or place.is_file():
        return _file(place, split, images, text, size, seed)
    if is_function(spec):
        return _loader(spec)
    return _hub(spec, split, images, text, size, seed)


def _file(
    place: Path, split: Split, images: ImageFormat | None, text: TextFormat | None, size: int, seed: int
) -> Batches:
    if not place.is_file():
        raise DataError(f"there is no file {place}; {_WHAT}.")
    if place.suffix == ".npz":
        return _arrays(place, split, images, size, seed)
    if place.suffix == ".txt":
        return file_batches(place, _readable(text, str(place)), size, seed)
    raise DataError(f"{place} is of no kind that can be read; {_WHAT}.")


def _readable(text: TextFormat | None, spec: str) -> TextFormat:
    if text is None:
        raise OptionError(f"{spec} is text, and no tokenizer of the model is known; give batches as module:loader.")
    return text


# -- arrays ------------------------------------------------------------------------------------------------------------


def _arrays(place: Path, split: Split, images: ImageFormat | None, size: int, seed: int) -> Batches:
    try:
        with numpy.load(place) as stored:
            x = _array(stored, _INPUTS, split)
            y = _array(stored, _TARGETS, split)
            names = ", ".join(stored.files) or "none"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read as arrays of numbers ({error}).") from error
    if x is None:
        raise DataError(f"{place} has no array called x or x_{split}; its arrays are: {names}.")
    if y is not None and len(y) != len(x):
        raise DataError(f"{place} has {len(x)} inputs but {len(y)} targets; there must be one target an input.")

    def fetch(positions: list[int]) -> Any:
        inputs = _inputs(x[positions], images)
        return inputs if y is None else (inputs, _targets(y[positions]))

    return Batches(len(x), fetch, size, seed)


def _array(stored: Any, names: Iterable[str], split: Split) -> numpy.ndarray[Any, Any] | None:
    """The first of the arrays that are called so for this part; training data may also stand alone."""
    for part in _PARTS[split]:
        for name in names:
            for key in (f"{name}_{part}", f"{part}_{name}"):
                if key in stored:
                    return numpy.asarray(stored[key])
    return next((numpy.asarray(stored[name]) for name in names if name in stored), None)


def _inputs(x: numpy.ndarray[Any, Any], images: ImageFormat | None) -> Tensor:
    if x.dtype == numpy.uint8:
        return normalised(pictures_of_bytes(x), images)
    return _numbers(x)


def _targets(y: numpy.ndarray[Any, Any]) -> Tensor:
    """Targets int64 or float32; classes in a column of their own count as a list."""
    targets = _numbers(y)

    column = targets.dim() == 2 and targets.shape[1] == 1 and not targets.is_floating_point()
    return targets[:, 0] if column else targets


def _numbers(values: numpy.ndarray[Any, Any]) -> Tensor:
    wanted = numpy.float32 if values.dtype.kind == "f" else numpy.int64
    return torch.from_numpy(values.astype(wanted))


# -- functions and hubs ------------------------------------------------------------------------------------------------


def _loader(spec: str) -> Loader:
    found = named(spec)

    def make() -> Iterable[Any]:
        # A DataLoader is an iterable; a function makes one.
        batches = found if hasattr(found, "__iter__") else found()
        if not hasattr(batches, "__iter__"):
            raise OptionError(f"{spec} returned a {type(batches).__name__}; it must return an iterable of batches.")
        return batches  # type: ignore[no-any-return]

    if not callable(found) and not hasattr(found, "__iter__"):
        raise OptionError(f"{spec} is a {type(found).__name__}; it must be a function that returns batches.")
    if isinstance(found, Iterator):
        raise OptionError(f"{spec} is spent after one pass; make it a function that returns a new one.")
    return Loader(make)


def _hub(spec: str, split: Split, images: ImageFormat | None, text: TextFormat | None, size: int, seed: int) -> Batches:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    name, _, configuration = spec.partition("@")
    try:
        parts = datasets.load_dataset(name, configuration or None)
    except Exception as error:
        # Many libraries meet here; each of their errors means that the data is not to be had.
        why = " ".join(str(error).split()).rstrip(".")[:200]
        raise DataError(f"there is neither a file {spec!r} nor a Hugging Face data set of that name: {why}.") from error
    part = next((p for p in _PARTS[split] if p in parts), None)
    if part is None:
        raise DataError(f"the data set {spec} has no part for {split}ing; its parts are {', '.join(parts)}.")
    return _columns(spec, parts[part], images, text, size, seed)


def _columns(
    spec: str, rows: Any, images: ImageFormat | None, text: TextFormat | None, size: int, seed: int
) -> Batches:
    """Batches from the columns of a data set that look like pictures, or like text, and their labels."""
    columns = rows.column_names
    image, label, words = (next((c for c in names if c in columns), None) for names in (_IMAGE, _LABEL, _TEXT))
    if image is not None and label is not None:
        form = images or ImageFormat()

        def fetch(positions: list[int]) -> tuple[Tensor, Tensor]:
            chosen = [rows[i] for i in positions]
            pictures = torch.stack([prepared(row[image], form) for row in chosen])
            return pictures, torch.tensor([row[label] for row in chosen])

        return Batches(len(rows), fetch, size, seed)
    if words is not None:
        wanted = _readable(text, spec)
        if label is not None and not wanted.causal:
            return sentence_batches(list(rows[words]), list(rows[label]), wanted, size, seed)
        return block_batches("\n\n".join(rows[words]), spec, wanted, size, seed)
    raise DataError(
        f"the data set {spec} has the columns {', '.join(columns)}; known are image and label, or text; give batches "
        "as module:loader."
    )
