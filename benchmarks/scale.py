"""A model the shape of Llama 70B on the meta device: traced, grouped, scored at random and planned."""

from __future__ import annotations

import resource
from time import perf_counter

import torch

from benchmarks.record import holds, record
from secateurs import plan
from tests.support.torchvision_shim import declare_missing_ops

SECONDS, GIB = 60, 4
SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
ASKED = (("channel", "macs<=50%"), ("width", "params<=35B"))


def main() -> None:
    """Plans at two granularities and records seconds and the peak memory of the process."""
    declare_missing_ops()
    import transformers

    rows = []
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
        ids = torch.zeros(1, 16, dtype=torch.long, device="cpu")
    total = sum(p.numel() for p in model.parameters())
    for granularity, budget in ASKED:
        start = perf_counter()
        made = plan(model, {"input_ids": ids}, budget, criterion="random", granularity=granularity)
        seconds = perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        units = sum(g.size for g in made.groups)
        left = made.cost("params")
        rows.append((granularity, budget, len(made.groups), units, f"{left:.1%}", f"{seconds:.1f}", f"{peak:.2f}"))
    held = all(float(row[-2]) < SECONDS and float(row[-1]) < GIB for row in rows)
    record(
        "scale",
        system="graph",
        claim=f"A model of 70B parameters is traced, grouped and planned in under {SECONDS} s and {GIB} GiB.",
        held=f"{holds(held).capitalize()}: {max(r[-2] for r in rows)} s and {max(r[-1] for r in rows)} GiB at most.",
        columns=("granularity", "budget", "groups", "units", "parameters left", "seconds", "peak GiB"),
        rows=rows,
        data=f"LlamaForCausalLM of {total / 1e9:.1f}B parameters on the meta device, 16 ids; random scores",
        note="The peak is that of the whole process, PyTorch and transformers included.",
    )


if __name__ == "__main__":
    main()
