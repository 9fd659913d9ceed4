"""Importing torchvision where its compiled operators cannot be loaded.

torchvision's wheel is built against one build of torch. Beside another (a CUDA wheel next to a CPU torch) its library
does not load, and `import torchvision` then fails while it describes operators that were never declared, although no
classification model uses one of them. Declared here without kernels, they let every model written in plain PyTorch
be imported and run; calling such an operator still fails and says that it has no kernel.

`declare_missing_ops()` must run before torchvision or timm is imported: tests get it from conftest, benchmarks call it
themselves (`from tests.support.torchvision_shim import declare_missing_ops`, run as `python -m benchmarks.…`).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

__all__ = ["SCHEMAS", "declare_missing_ops"]

_POOL = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
)


@cache
def declare_missing_ops() -> torch.library.Library | None:
    """The library that holds the declarations; None where torchvision is absent or brings working operators.

    The cache keeps the library alive: torch takes its declarations back when it is collected.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def _loads(folder: Path) -> bool:
    """Whether the compiled operators in `folder` load into this torch."""
    for path in folder.glob("_C.*"):
        try:
            torch.ops.load_library(path)
        except OSError:
            return False
        return True
    return False
