"""Zeros on a CPU: 90% of the weights gone, single or in blocks of 4×1, in the sparse runtime against dense PyTorch.

`python -m benchmarks.sparse_runtime`: three minutes on one thread. The dense model, the sparse runtime and onnxruntime
(which runs the dense model; left out where it is not installed) take turns in one process.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.record import holds, record
from secateurs import plan
from secateurs.deploy.onnx import onnx_session
from secateurs.deploy.runtime import Runtime, sparse_runtime
from secateurs.measure.latency import Latency
from tests.support.torchvision_shim import declare_missing_ops

SPARSITY, SECONDS = "90%", 0.25
BATCHES = (1, 32)
GRANULARITIES = {"single weights": "weight", "blocks of 4×1": "block:4x1"}
RIVAL, NONE = "onnxruntime", "–"


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """784-2048-2048-10 and the shape of one sample."""
    layers = [nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)]
    return nn.Sequential(*layers).eval(), (784,)


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    """Six blocks of width 384 on 65 tokens, and the shape of one sample."""
    declare_missing_ops()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=384, depth=6, num_heads=6, num_classes=10)
    return model.eval(), (3, 64, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {"MLP 784-2048-2048-10": mlp, "ViT 6×384": vit}


def measured(dense: nn.Module, shape: tuple[int, ...], granularity: str, batch: int) -> Runtime:
    """The runtime of the model pruned at random initial weights, timed on random inputs."""
    x = torch.randn(batch, *shape)
    budget = f"sparsity={SPARSITY}"
    pruned = plan(dense, x[:1], budget, granularity=granularity, allocation="uniform").mask(dense)
    beside = {RIVAL: onnx_session(pruned, x)} if find_spec("onnxruntime") and find_spec("onnxscript") else {}
    return sparse_runtime(pruned, x, beside=beside, seconds=SECONDS)


def row(name: str, zeros: str, batch: int, runtime: Runtime) -> tuple[str, ...]:
    """One line of the table."""
    dense, sparse, rival = (runtime.timings.get(who) for who in ("dense", "sparse", RIVAL))
    assert dense is not None
    assert sparse is not None
    formats = Counter(choice.format for choice in runtime.layers)
    chosen = ", ".join(f"{often} {form}" for form, often in sorted(formats.items()))
    against = NONE if rival is None else f"{rival.median / sparse.median:.2f}"
    times = (f"{timing.median * 1e3:.2f}" if timing else NONE for timing in (dense, sparse, rival))
    return name, zeros, str(batch), *times, _spread(sparse), against, chosen


def _spread(timing: Latency) -> str:
    speed = timing.speedup
    assert speed is not None
    return f"{speed.median:.2f} ({speed.p10:.2f}–{speed.p90:.2f})"


def main() -> None:
    """Prunes each model both ways and times each batch size."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, slower, times = [], [], []
    for name, make in MODELS.items():
        for zeros, granularity in GRANULARITIES.items():
            torch.manual_seed(0)
            dense, shape = make()
            for batch in BATCHES:
                runtime = measured(dense, shape, granularity, batch)
                assert runtime.speedup is not None
                times.append(runtime.speedup.median)
                rows.append(row(name, zeros, batch, runtime))
                print(*rows[-1], sep=" | ", flush=True)
                if times[-1] <= 1:
                    slower.append(f"{name}, {zeros}, batch {batch}: {runtime.verdict}")
    said = f"{min(times):.2f} to {max(times):.2f} times as fast as dense PyTorch ({holds(not slower)})."
    record(
        "sparse_runtime",
        system="core",
        claim=f"With {SPARSITY} of the weights gone, the sparse runtime is faster than dense PyTorch on a CPU at batch "
        "1 and 32, for single weights and for blocks of 4×1.",
        held=" ".join([said, *slower]),
        columns=(
            *("model", "zeros", "batch", "dense, ms", "sparse, ms", "onnxruntime, ms"),
            *("times faster (p10–p90)", "onnxruntime / sparse", "layers by form"),
        ),
        rows=rows,
        data="random weights and inputs, evaluation mode; the three in turn in one process, one thread; medians",
        seeds=(0,),
        note="Forms are chosen layer by layer by measurement at the batch size of the row; onnxruntime runs the dense "
        "model. Sparsity is uniform over the layers.",
    )


if __name__ == "__main__":
    main()
