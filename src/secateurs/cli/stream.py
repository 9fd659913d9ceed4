"""`secateurs stream`: a checkpoint larger than memory in, a pruned checkpoint out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ._options import Output, Settings, TrustRemoteCode, filled, settings_of
from ._session import Stages, session

__all__ = ["stream"]


class Precision(str, Enum):
    """In which numbers blocks are computed."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def stream(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of a Hugging Face model in safetensors.", show_default=False)],
    budget: Annotated[str, typer.Option("--budget", help='"sparsity=50%" or "2:4".', show_default=False)],
    data: Annotated[
        str, typer.Option("--data", help="Text for calibration: a .txt file, or module:loader.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="A new folder, which from_pretrained loads.", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", help="A method that solves layer by layer, as sparsegpt, wanda or alps.")
    ] = "sparsegpt",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.")] = 8,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Batches for calibration.")] = 16,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a sequence.")] = 512,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="Layers to prune, by name or pattern; repeatable.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Layers to leave alone, by name or pattern; repeatable.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="In which blocks are computed.", show_default="as stored")
    ] = None,
    settings: Settings = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the text.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all")] = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Output,
) -> None:
    """Prune a checkpoint block by block, without ever holding the whole model.

    The predicted peak of memory is told first. A run that is killed goes on where it stopped when it is started again.
    Under torchrun the batches and the layers of a block are shared out among the processes.
    """
    # Of several processes one speaks.
    quiet = output.quiet or int(os.environ.get("RANK", "0")) > 0
    with session(**{**vars(output), "quiet": quiet}, threads=threads) as talk:
        import torch

        from ..core.errors import FileError
        from ..integrations import load_data
        from ..integrations.models import TextFormat
        from ..integrations.streaming import prune_checkpoint
        from ..solvers.ranks import first, joined

        if not folder.is_dir():
            raise FileError(
                f"there is no folder {folder}: give that of a Hugging Face model in safetensors; one of the hub is "
                "fetched by `hf download NAME --local-dir FOLDER`."
            )
        wanted = TextFormat(str(folder), length, False, trust_remote_code)
        batches = load_data(data, split="train", images=None, text=wanted, size=batch_size, seed=seed).sample(limit)
        with joined(), Stages(talk) as stages:
            stages.begin("solving")
            done = prune_checkpoint(
                folder,
                budget,
                out,
                _options(method, settings_of(settings)),
                data=batches,
                scope=scope or None,
                ignore=ignore or (),
                dtype=None if precision is None else getattr(torch, precision.value),
                on_block=stages.step,
                on_memory=lambda peak: talk.say(f"note: about {peak / 2**30:.2f} GiB of memory will be needed."),
                trust_remote_code=trust_remote_code,
            )
            others = not first()
        if others:
            return
        mean = sum(done.errors.values()) / max(len(done.errors), 1)
        record = {**vars(done), "folder": str(done.folder)}
        talk.result(
            record,
            f"{done.sparsity:.1%} of {len(done.errors)} layers went in {done.seconds:.0f} s; "
            + (f"mean relative error {mean:.4f}; " if mean else "")
            + f"written to {done.folder}.",
        )


def _options(method: str, given: Mapping[str, Any]) -> Any:
    """The hyperparameters of a layer-wise method.

    Raises:
        OptionError: the method does not solve layer by layer, or has no such hyperparameter.
    """
    from .. import methods as _room  # noqa: F401  (registers them)
    from ..core.catalogue import catalogue, get_method, hyperparameters
    from ..core.errors import OptionError

    record = hyperparameters(get_method(method).run)
    if record is None or not hasattr(record, "solver"):
        others = ", ".join(m.name for m in catalogue() if hasattr(hyperparameters(m.run), "solver"))
        raise OptionError(f"{method} needs the whole model; those that go block by block are {others}.")
    return filled(record, method, given)
