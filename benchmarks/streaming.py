"""A checkpoint of 1.5 billion parameters pruned block by block: peak memory against the bound, and a killed run."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from benchmarks.record import holds, record
from tests.support.torchvision_shim import declare_missing_ops

# Held until the process ends: without them transformers cannot be imported beside some builds of torchvision.
_OPS = declare_missing_ops()
GIB = 2**30
VOCABULARY = 32_000
# Hidden size, inner size, heads, key-value heads, blocks: as in Llama 3.2 1B, and as wide as a model of 7 B.
SHAPES = {"2048 wide": (2048, 8192, 32, 8, 24), "4096 wide": (4096, 8192, 32, 32, 9)}
METHODS = {"2048 wide": ("wanda",), "4096 wide": ("wanda", "sparsegpt")}


def config(shape: str) -> Any:
    """Of a Llama of that shape."""
    from transformers import LlamaConfig

    hidden, inner, heads, groups, blocks = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def checkpoint(shape: str, folder: Path) -> int:
    """Parameters of the random checkpoint that is now in the folder, one shard a block."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    from secateurs.integrations.shards import write_index, write_shard

    made = config(shape)
    made.save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(made)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    where, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            sizes = model.get_parameter(name).shape
            noise = torch.randn(sizes, generator=generator) * 0.02
            tensors[name] = (torch.ones(sizes) if len(sizes) == 1 else noise).bfloat16()
            where[name], total = file, total + noise.numel()
        write_shard(folder / file, tensors)
    write_index(folder, where, 2 * total)
    return total


def work(source: str, method: str, out: str) -> None:
    """None; prunes in this process and prints what it took, as JSON."""
    from secateurs.integrations.streaming import prune_checkpoint
    from secateurs.methods.language.sparsegpt import SparseGPT
    from secateurs.methods.language.wanda import Wanda

    torch.manual_seed(1)
    data = [{"input_ids": torch.randint(0, VOCABULARY, (2, 128))} for _ in range(8)]
    # What Python, PyTorch and transformers take by themselves, with one product done.
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.ones(512, 512) @ torch.ones(512, 512)
    before = peak()
    options = {"wanda": Wanda(), "sparsegpt": SparseGPT()}[method]
    done = prune_checkpoint(source, "2:4", out, options, data=data, dtype=torch.float32)
    print(json.dumps({"bytes": peak() - before, "seconds": done.seconds, "predicted": done.predicted_bytes}))


def peak() -> int:
    """Bytes of this process's memory at its largest so far."""
    # Not getrusage: its maximum survives exec, and with it that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def bound(shape: str) -> int:
    """Three times the largest block and the embeddings, in float32."""
    hidden, inner, heads, groups, _ = SHAPES[shape]
    narrow = hidden // heads * groups
    block = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner + 2 * hidden
    return 4 * (3 * block + VOCABULARY * hidden)


def started(source: Path, method: str, out: Path) -> subprocess.Popen[str]:
    """A process that prunes."""
    words = [sys.executable, "-m", "benchmarks.streaming", "work", str(source), method, str(out)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def killed_and_resumed(source: Path, method: str, out: Path, after: int) -> str:
    """What a run leaves that was killed once `after` blocks were done, and then started again."""
    process = started(source, method, out)
    while len(list((out / ".progress").glob("model-*.json"))) < after and process.poll() is None:
        sleep(0.05)
    # In the middle of the next block.
    threading.Event().wait(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started(source, method, out).communicate()
    return fingerprint(out)


def fingerprint(folder: Path) -> str:
    """Of names and bytes of all files."""
    sha = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        sha.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(2**24):
                sha.update(piece)
    return sha.hexdigest()


def main() -> None:
    """None; the table is on file."""
    rows, within = [], []
    with tempfile.TemporaryDirectory() as drafts:
        for shape in SHAPES:
            source = Path(drafts) / "source"
            total = checkpoint(shape, source)
            for method in METHODS[shape]:
                out, begun = Path(drafts) / "out", perf_counter()
                found = json.loads(started(source, method, out).communicate()[0].splitlines()[-1])
                same = "–"
                if shape == "2048 wide":
                    whole = fingerprint(out)
                    shutil.rmtree(out)
                    same = "yes" if killed_and_resumed(source, method, out, 3) == whole else "NO"
                within.append(found["bytes"] <= bound(shape))
                rows.append(
                    [
                        shape, f"{total / 1e9:.2f} B", method, f"{found['bytes'] / GIB:.2f}",
                        f"{found['predicted'] / GIB:.2f}", f"{bound(shape) / GIB:.2f}", f"{4 * total / GIB:.1f}",
                        f"{found['seconds']:.0f}", same,
                    ]
                )  # fmt: skip
                print(rows[-1], f"{perf_counter() - begun:.0f} s", flush=True)
                shutil.rmtree(out)
            shutil.rmtree(source)
    record(
        "streaming",
        system="library",
        claim="The peak stays below three blocks and the embeddings, and a killed run resumes to the same bytes.",
        held=f"The bound: {', '.join(f'{row[0]} {row[2]} {holds(ok)}' for row, ok in zip(rows, within, strict=True))}; "
        f"killed in its fourth block and started again, the files are the same: {rows[0][-1]}.",
        columns=(
            "Llama",
            "parameters",
            "method",
            "peak GiB",
            "predicted",
            "bound",
            "whole model, float32",
            "seconds",
            "resumed equal",
        ),
        rows=rows,
        data="random weights in bfloat16, computed in float32; 16 sequences of 128 random tokens",
        note="Peak resident memory beyond that of the imports. The bound counts blocks and embeddings in float32. "
        "SparseGPT works in the one float64 matrix that holds the Hessian of its layer.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:5])
    else:
        main()
