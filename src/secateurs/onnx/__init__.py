"""ONNX in, ONNX out: a file becomes a module that is pruned as any other, and is written with its new sizes."""

from __future__ import annotations

from .module import Input, OnnxModule, example_inputs
from .read import read_onnx
from .write import write_onnx

__all__ = ["Input", "OnnxModule", "example_inputs", "read_onnx", "write_onnx"]
