"""Pictures as a model wants them: folders of files, arrays of bytes, and single pictures of any library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..core.errors import DataError, MissingExtraError
from .batches import Batches
from .models import ImageFormat

__all__ = ["SUFFIXES", "folder_batches", "normalised", "pictures_of_bytes", "prepared"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_DATA_FREE = ImageFormat()


def folder_batches(folder: Path, wanted: ImageFormat | None, size: int, seed: int) -> Batches:
    """Batches (pictures, classes) of a folder that has one folder a class; classes count in the order of their names.

    Pictures are resized so that the central crop that the model wants keeps its share, and normalised.

    Args:
        folder: holds folders that hold pictures, at any depth.
        wanted: by the model; by default 224×224 colours, not normalised.
        size: pictures a batch.
        seed: of the order of training.

    Raises:
        DataError: there is no folder inside, or none with a picture; a file that is no picture, once it is read.
        MissingExtraError: Pillow is not installed.
    """
    _pillow()
    classes = sorted(place for place in folder.iterdir() if place.is_dir())
    files = [(path, label) for label, place in enumerate(classes) for path in _pictures(place)]
    if not files:
        raise DataError(
            f"{folder} holds no pictures; it must have one folder a class, each with {', '.join(SUFFIXES)} files in it."
        )
    form = wanted or _DATA_FREE

    def fetch(positions: list[int]) -> tuple[Tensor, Tensor]:
        x = torch.stack([prepared(_opened(files[i][0]), form) for i in positions])
        return x, torch.tensor([files[i][1] for i in positions])

    return Batches(len(files), fetch, size, seed)


def _pictures(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("Pillow", "vision") from error
    return Image


def _opened(path: Path) -> Any:
    try:
        with _pillow().open(path) as picture:
            picture.load()
            return picture
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture ({error}); mend or remove it.") from error


def prepared(picture: Any, wanted: ImageFormat) -> Tensor:
    """A picture of Pillow as the model wants it: float32 [channels, height, width], resized, cropped, normalised."""
    image = _pillow()
    picture = picture.convert("L" if wanted.channels == 1 else "RGB")
    height, width = wanted.size
    scale = max(math.floor(height / wanted.crop) / picture.height, math.floor(width / wanted.crop) / picture.width)
    # Rounding must not leave less than the crop needs.
    enlarged = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(enlarged, getattr(image.Resampling, wanted.interpolation.upper()))
    left, top = (enlarged[0] - width) // 2, (enlarged[1] - height) // 2
    pixels = numpy.asarray(picture.crop((left, top, left + width, top + height)))
    return normalised(pictures_of_bytes(pixels[None]), wanted)[0]


def pictures_of_bytes(pixels: numpy.ndarray[Any, Any]) -> Tensor:
    """Pictures float32 [n, channels, height, width] in [0, 1] from bytes [n, h, w], [n, h, w, c] or [n, c, h, w]."""
    x = torch.from_numpy(numpy.array(pixels)).float() / 255
    if x.dim() == 3:
        return x[:, None]
    if x.dim() == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3):
        return x.movedim(-1, 1)
    return x


def normalised(x: Tensor, wanted: ImageFormat | None) -> Tensor:
    """Pictures [n, channels, h, w] with the model's number of channels, mean and deviation."""
    if wanted is None or x.dim() != 4:
        return x
    if x.shape[1] == 1 and wanted.channels > 1:
        x = x.expand(-1, wanted.channels, -1, -1)
    if _fits(wanted.mean, x):
        x = x - torch.tensor(wanted.mean).view(1, -1, 1, 1)
    if _fits(wanted.std, x):
        x = x / torch.tensor(wanted.std).view(1, -1, 1, 1)
    return x


def _fits(values: Sequence[float], x: Tensor) -> bool:
    return len(values) in (1, x.shape[1])
