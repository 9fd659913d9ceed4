"""Models and data by name: timm, torchvision, Hugging Face, ONNX, folders, files and functions of your own.

The libraries behind them are optional and are imported when a name asks for them.
"""

from __future__ import annotations

from .batches import Batches, Loader
from .data import load_data
from .models import ImageFormat, LoadedModel, TextFormat, load_model_from
from .onnx import prune_onnx

__all__ = [
    "Batches",
    "ImageFormat",
    "LoadedModel",
    "Loader",
    "TextFormat",
    "load_data",
    "load_model_from",
    "prune_onnx",
]
