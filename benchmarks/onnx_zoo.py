"""Exported networks at half their MACs, ONNX in and ONNX out, against the structured pruning of onnxsim.

Every network is written by PyTorch's exporters with a batch of any size. Ours: `prune_onnx(file, "macs<=50%")`, whose
result onnxruntime has run with the cut model's result. onnxsim's: heads and channels at sparsity 0.5. Either covers a
network if the new file runs under onnxruntime on a batch of another size, keeps the shapes of its outputs, and has at
least 20% fewer parameters. Names of networks on the command line choose among them.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from benchmarks.record import record
from benchmarks.zoo import Case
from secateurs.core.errors import SecateursError
from secateurs.integrations.onnx import prune_onnx
from secateurs.onnx import example_inputs, read_onnx
from tests.onnx.exported import Logits
from tests.support.torchvision_shim import declare_missing_ops

_GONE = 0.2
Prune = Callable[[Path, Path], None]


def vision(name: str, pixels: int = 64) -> Case:
    """A torchvision classifier of ten classes with random weights and two random pictures."""

    def make() -> tuple[nn.Module, Any]:
        import torchvision

        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **extra), torch.randn(
            2, 3, pixels, pixels
        )

    return make


def language(model: str, config: str, **sizes: Any) -> Case:
    """A Hugging Face model of two layers of width 64, and two rows of 16 random ids."""

    def make() -> tuple[nn.Module, Any]:
        import transformers

        common = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        built = getattr(transformers, config)(**{**common, "vocab_size": 200, "use_cache": False, **sizes})
        return Logits(getattr(transformers, model)(built)), torch.randint(5, 200, (2, 16))

    return make


VISION = (
    "squeezenet1_1", "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
    "swin_t",
)  # fmt: skip
ZOO: dict[str, Case] = {
    **{name: vision(name) for name in VISION},
    "bert": language("BertModel", "BertConfig"),
    "roberta": language("RobertaModel", "RobertaConfig"),
    "distilbert": language("DistilBertModel", "DistilBertConfig", dim=64, n_heads=4, n_layers=2, hidden_dim=256),
    "electra": language("ElectraModel", "ElectraConfig", embedding_size=64),
    "gpt2": language("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_head=4, n_layer=2),
    "llama": language("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2),
}
# The older exporter is faster; it has no op that the masks of these are made with.
NEWER = ("gpt2", "llama")


def export(name: str, path: Path) -> None:
    """Write the network, its batch of any size."""
    torch.manual_seed(0)
    model, example = ZOO[name]()
    with torch.no_grad():
        # As after training: exporters store equal tensors once, and tools may trip over what is then shared.
        for tensor in model.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))
    shared: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    if name in NEWER:
        options = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    else:
        options = {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (example,), str(path), **shared, **options)


def run(path: Path, inputs: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    """What onnxruntime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}))


def numbers(path: Path) -> int:
    """Floating-point numbers in the file's initializers."""
    tensors = (onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    return sum(t.size for t in tensors if t.dtype.kind == "f")


def ours(path: Path, out: Path) -> None:
    """Half the MACs."""
    prune_onnx(path, "macs<=50%", out, measure=False)


def theirs(path: Path, out: Path) -> None:
    """Heads and channels at sparsity 0.5."""
    import onnxsim

    smaller = onnxsim.apply_attention_head_pruning(onnx.load(path), sparsity=0.5)
    onnx.save(onnxsim.apply_structured_pruning(smaller, sparsity=0.5), out)


def outcome(prune: Prune, path: Path, out: Path) -> tuple[str, bool]:
    """The share of parameters that is left and the seconds, or why there is no result; and whether it counts."""
    inputs = example_inputs(read_onnx(path), batch=3, seed=1, sizes={"d1": 16})
    start = perf_counter()
    try:
        prune(path, out)
    except SecateursError as error:
        return f"{type(error).__name__}: {str(error)[:80]}", False
    except Exception as error:  # noqa: BLE001  (whatever the rival raises is its result)
        return f"{type(error).__name__}: {str(error)[:80]}", False
    seconds = perf_counter() - start
    try:
        same = [a.shape for a in run(out, inputs)] == [a.shape for a in run(path, inputs)]
    except Exception as error:  # noqa: BLE001  (a file that does not run is a result, too)
        return f"does not run: {str(error)[:80]}", False
    left = numbers(out) / numbers(path)
    return f"{left:.0%} in {seconds:.1f} s{'' if same else ', other shapes'}", same and left <= 1 - _GONE


def row(name: str, rivals: dict[str, Prune], folder: Path) -> tuple[Any, ...]:
    """One line of the table: for each tool the parameters left, and whether the network is covered."""
    path = folder / f"{name}.onnx"
    export(name, path)
    cells: list[Any] = [name]
    for tool, prune in rivals.items():
        cells.extend(outcome(prune, path, folder / f"{name}-{tool}.onnx"))
    return tuple(cells)


def main(names: list[str]) -> None:
    """Runs the networks and records the table, if all of them and the rival were there."""
    declare_missing_ops()
    rivals: dict[str, Prune] = {"secateurs": ours}
    if importlib.util.find_spec("onnxsim") is not None:
        rivals["onnxsim"] = theirs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or ZOO:
            rows.append(row(name, rivals, Path(folder)))
            print(*rows[-1], sep=" | ", flush=True)
    covered = [sum(r[2 + 2 * i] for r in rows) for i in range(len(rivals))]
    if names or len(rivals) < 2:
        print(dict(zip(rivals, covered, strict=True)), "of", len(rows))
        return
    record(
        "onnx_zoo",
        system="core",
        claim="More of the exported zoo is covered than by the pruning of onnxsim; every result verified.",
        held=f"{covered[0]} of {len(rows)} against {covered[1]}.",
        columns=("network", "secateurs: parameters left", "covered", "onnxsim: parameters left", "covered"),
        rows=rows,
        data="random weights; pictures of 64×64, rows of 16 ids",
        note="Ours: macs<=50%. onnxsim: heads and channels at sparsity 0.5. Covered: runs, same shapes, 20% gone.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
