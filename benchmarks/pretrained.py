"""Which cut Hugging Face models `save_pretrained` can write, at a uniform half of all units.

`python -m benchmarks.pretrained [FAMILY…]` prints a line a family and granularity, then the table of
`docs/tasks/deploy.md`. Where a config cannot express the result, `save` and `sec.load` are tried in its place.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import FAMILIES
from secateurs import load, prune
from secateurs.core.batch import call
from secateurs.core.errors import FileError, ModelError, ProofError
from secateurs.deploy.huggingface import save_pretrained
from secateurs.graph.run import output_tensors
from tests.support.torchvision_shim import declare_missing_ops

__all__ = ["FOLDER", "GRANULARITIES", "LOAD", "NEITHER", "NOTHING", "fate", "table"]

GRANULARITIES = ("channel", "width", "head-size")
FOLDER, LOAD, NEITHER, NOTHING = "from_pretrained", "sec.load", "neither", "nothing to prune"


def fate(name: str, granularity: str) -> tuple[str, str]:
    """What loads the cut model of a family again, and what stood in the way of `from_pretrained`.

    Raises:
        AssertionError: what was loaded computes something else.
    """
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    try:
        cut = prune(
            model,
            inputs,
            "sparsity=50%",
            granularity=granularity,
            allocation="uniform",
            measure=False,
            recalibrate=False,
        )
    except ModelError as error:
        return NOTHING, str(error)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        try:
            save_pretrained(cut.model, folder)
        except (ModelError, ProofError) as error:
            try:
                loaded = load(cut.save(folder)).model
            except FileError as fault:
                return NEITHER, str(fault)
            assert _equal(cut.model, loaded, inputs), f"{name} comes back changed"
            return LOAD, str(error)
        assert _equal(cut.model, type(cut.model).from_pretrained(folder), inputs), f"{name} comes back changed"
        return FOLDER, ""


def _equal(model: Any, other: Any, inputs: Any) -> bool:
    found = []
    for form in (model, other):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(output_tensors(call(form.eval(), inputs)))
    # The loss of a masked autoencoder that masks nothing is no number.
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*found, strict=True))


def table(fates: Iterable[tuple[str, str]]) -> str:
    """Lines of Markdown: for each granularity, how many families have which fate."""
    counts = Counter(fates)
    lines = [f"| granularity | `{FOLDER}` | `{LOAD}` only | {NEITHER} | {NOTHING} |", "| --- | --- | --- | --- | --- |"]
    for granularity in GRANULARITIES:
        numbers = [counts[granularity, kind] for kind in (FOLDER, LOAD, NEITHER, NOTHING)]
        lines.append(f"| {granularity} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    declare_missing_ops()
    fates = []
    for granularity in GRANULARITIES:
        for name in asked.families or FAMILIES:
            kind, why = fate(name, granularity)
            fates.append((granularity, kind))
            print(f"{granularity}, {name}: {kind}. {why}", flush=True)
    print(table(fates))


if __name__ == "__main__":
    main()
