"""Models that leave: saved and loaded again at any width, exported to ONNX, torch.export and Hugging Face."""

from __future__ import annotations

from .huggingface import save_pretrained
from .onnx import export_onnx
from .program import export_program
from .runtime import Runtime, sparse_runtime
from .store import load_extra, load_model, save_model

__all__ = [
    "Runtime",
    "export_onnx",
    "export_program",
    "load_extra",
    "load_model",
    "save_model",
    "save_pretrained",
    "sparse_runtime",
]
