"""CFSP's recovery: low-rank adapters in all blocks of a cut model, of higher rank where blocks do more to their input.

Wang et al., "CFSP", COLING 2025, arXiv 2409.13199. How, for any model that was cut, and the dense one that it was:

    1. importance  of each block of the dense model, on the first batches of the training data (`cfsp.importance`)
    2. ranks       in proportion to it; all adapters together have as many parameters as with one rank everywhere
                   (`cfsp.ranks`), although blocks differ in width after the cut
    3. train       the adapters of all linear layers of the blocks; all else is frozen
    4. merge       ordinary layers again

The published code has no recovery, so that the training is ours: rank 8, alpha 16, AdamW at 1e-4 are those of other
recoveries of cut language models by LoRA. Every adapter has the scale alpha / rank of the mean rank, so that blocks
differ in rank alone. `importance="none"` gives the same rank to each block, which is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from ...core.errors import ModelError, OptionError
from ...core.state import read_state, write_state
from ...criteria.block_influence import CHANGES, Change
from ...pruning import FineTune
from ...recover.adapters import adaptable, attach
from ...recover.context import seeded
from ...recover.finetune import Data, History, one_pass
from ...recover.trainable import is_tied, only_trained
from ...running import other_run
from ...solvers import blocks_of
from ..parameters import Between, OneOf, check
from .cfsp import importance, ranks

__all__ = ["GuidedLora", "adapted_layers", "ranks_of"]

_FILE, _KIND = "ranks.safetensors", "adapter ranks"


@dataclass(frozen=True)
class GuidedLora(FineTune):
    """The recovery after any method that cuts: a `FineTune` of adapters whose ranks follow the importance of blocks.

    >>> GuidedLora(steps=200, rank=4).optimizer
    'adamw'

    Args:
        rank: of adapters in a block of mean importance (8).
        alpha: the scale of all adapters is alpha / rank (16).
        importance: how a block is weighed: "angular" (default), "cosine", "mse", "mae", or "none" for equal ranks.
        calibration: batches of the first pass on which it is measured (128).
        others: as for `FineTune`.
    """

    lr: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    schedule: str = "linear-warmup"
    rank: Annotated[int, Between(1, whole=True)] = 8
    alpha: Annotated[float, Between(0, closed="neither")] = 16.0
    importance: Annotated[Change | Literal["none"], OneOf((*CHANGES, "none"))] = "angular"
    calibration: Annotated[int, Between(1, whole=True)] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    def run(
        self, model: nn.Module, teacher: nn.Module, data: Data, *, masks: Mapping[str, Tensor] | None = None,
        seed: int = 0, checkpoint: str | Path | None = None, **options: Any,
    ) -> History:  # fmt: skip
        """The history of training the adapters of `model`, which has ordinary layers afterwards.

        Raises:
            ModelError: the model has other blocks than the teacher, or none with a layer that can carry an adapter.
            OptionError: there are masks, or a checkpoint of other hyperparameters.
        """
        if masks:
            raise OptionError(
                "GuidedLora's adapters would fill the zeros of single weights: recover by Retraining of "
                "methods.language.perp."
            )
        plain = FineTune(**{f.name: getattr(self, f.name) for f in fields(FineTune)})
        found = self._ranks(model, teacher, data, seed, None if checkpoint is None else Path(checkpoint) / _FILE)
        layers = adapted_layers(model)
        with ExitStack() as stack:
            attached = [
                stack.enter_context(
                    attach(model, layers[block], rank=rank, alpha=rank * self.alpha / self.rank, seed=seed)
                )
                for block, rank in found.items()
            ]
            stack.enter_context(only_trained(model, "adapters"))
            history = plain.run(model, teacher, data, seed=seed, checkpoint=checkpoint, **options)
            for adapters in attached:
                adapters.merge()
        return history

    def _ranks(self, model: nn.Module, teacher: nn.Module, data: Data, seed: int, file: Path | None) -> dict[str, int]:
        """The ranks, or those that were kept: a loader may have gone on since."""
        asked = {name: getattr(self, name) for name in ("rank", "alpha", "importance", "calibration")}
        if file is not None and file.exists():
            kept = read_state(file, _KIND)
            if kept["asked"] != asked:
                raise other_run(file.parent)
            return {block: int(rank) for block, rank in kept["ranks"].items()}
        # A shuffling loader takes its order from the global random state.
        with seeded(seed, "importance"):
            batches = list(islice(one_pass(self.training_data(data)), self.calibration))
            weighed = importance(teacher, batches, self.importance, seed=seed)
        found = ranks_of(model, weighed, self.rank)
        if file is not None:
            write_state(file, {"asked": asked, "ranks": found}, _KIND)
        return found


def adapted_layers(model: nn.Module) -> dict[str, list[str]]:
    """The layers of each block that can carry an adapter and whose weight is theirs alone; blocks without are left out.

    Raises:
        ModelError: there is no such block.
    """
    free = [name for name in adaptable(model) if not is_tied(model, name)]
    found = {
        block: [name for name in free if f"{name}.".startswith(f"{block}.".lstrip("."))] for block in blocks_of(model)
    }
    layers = {block: names for block, names in found.items() if names}
    if not layers:
        raise ModelError(f"no block of {type(model).__name__} has a linear layer, so no adapter can train.")
    return layers


def ranks_of(model: nn.Module, importance: Mapping[str, float], mean_rank: int) -> dict[str, int]:
    """The rank of each block of a cut model; all adapters together cost what those of `mean_rank` everywhere would.

    Args:
        model: with linear layers of any widths.
        importance: of its blocks by path, at least 0.
        mean_rank: at least 1. No block gets more than its smallest layer allows.

    Raises:
        ModelError: a block without importance.
        OptionError: as `cfsp.ranks` does.
    """
    layers = adapted_layers(model)
    unknown = [block for block in layers if block not in importance]
    if unknown:
        raise ModelError(
            f"{unknown[0] or 'the model'} is no block of the dense model, so nothing says what it does there: recover "
            "by a plain FineTune."
        )
    shapes = {
        b: [model.get_submodule(name).get_parameter("weight").shape for name in names] for b, names in layers.items()
    }
    costs = {block: sum(map(sum, found)) for block, found in shapes.items()}
    most = {block: min(map(min, found)) for block, found in shapes.items()}
    return ranks({block: importance[block] for block in layers}, mean_rank, costs=costs, most=most)
