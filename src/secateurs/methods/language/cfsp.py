"""CFSP: how much each block turns its input says how many neurons it keeps, their activations say which.

Wang et al., "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
COLING 2025, arXiv 2409.13199. Unit: inner channels of the feed-forward layers of a transformer's blocks,
cut out; attention stays. When: after training, in forward passes over calibration data, without gradients. How:

    1. coarse   I_l = the mean over tokens of arccos(cos(x_l, x_l+1))/π, for what goes into block l and what comes out
    2. widths   u_l = sigmoid(a·13.1072·(I_l - mean I)), keep_l = (1 - p)·u_l/mean(u): the mean of the shares is 1 - p.
                If one would reach 1, their spread shrinks until the largest is 1 - p·(1 - 1/1.05)
    3. fine     "released": the norm of a neuron as the layer behind it sees it. "weight-aware": that times the sum of
                the neuron's shares in |W_down|·norm, |W_up| and |W_gate| (where there is a gate), over neurons

Defaults. a = 1, angular distance, the released score, any width; the published script rounds widths to multiples of
128 (round_to=128), of which at least one stays. It calibrates on 128 windows of 1,024 tokens of WikiText-2.

Not as in the published code. The published score divides each weight by the sum over the hidden size and then averages
over it, so that the weights cancel and activations alone rank: that is "released", without the detour. Importances are
means, so that more calibration data does not change the widths: 13.1072 is the published sum of 131,072 tokens over
10,000. Rounded widths never exceed the budget. Of "sparsity=30%" the units are inner channels; "params<=80%" and
"macs<=80%" count all of the model.

With `compensation=True` the biases take the means of what goes (`flap`). The recovery by low-rank adapters whose ranks
follow the importance of their blocks is a training of its own, after this or any other cut: `recover=GuidedLora(…)` of
`methods.language.guided_lora`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from ...core.apportion import apportion
from ...core.batch import take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...core.errors import OptionError
from ...criteria.block_influence import CHANGES, Change, block_changes
from ...criteria.face import check_finite
from ...planning import batches_of
from ...pruning import Pruned, prune
from ...recover.context import seeded
from ...running import claim
from ...solvers import blocks_of
from ..compensation import compensated
from ..offered import offered
from ..parameters import Between, OneOf, Switch, check

__all__ = ["METHOD", "Cfsp", "cfsp", "importance", "ranks"]

_STRENGTH = 13.1072


@dataclass(frozen=True)
class Cfsp:
    """Hyperparameters.

    Args:
        importance: how a block is weighed: "angular" (default), "cosine", "mse", "mae", or "none" for equal shares.
        strength: a, how far the shares of blocks lie apart (1).
        score: of a neuron, "released" (default) or "weight-aware".
        round_to: widths are multiples of this (1; the published script takes 128).
        compensation: whether the means of what goes are added to the biases (default not).
    """

    importance: Annotated[Change | Literal["none"], OneOf((*CHANGES, "none"))] = "angular"
    strength: Annotated[float, Between(0)] = 1.0
    score: Annotated[Literal["released", "weight-aware"], OneOf(("released", "weight-aware"))] = "released"
    round_to: Annotated[int, Between(1, whole=True)] = 1
    compensation: Annotated[bool, Switch()] = False

    def __post_init__(self) -> None:
        check(self)


def cfsp(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, options: Cfsp | None = None, **common: Any
) -> Pruned:
    """A smaller copy of `model`, whose blocks have feed-forward layers of different widths.

    Args:
        model, example_inputs, budget: as for `prune`; "sparsity=30%" is of all inner channels.
        options: hyperparameters.
        common: data, test, recover, scope, ignore, seed and the rest of `prune`'s arguments.

    Raises:
        DataError: calibration data are missing or empty.
        ModelError: there are no such channels, or a block does not keep the shape of its input.
        OptionError: a checkpoint of other hyperparameters.
    """
    how, common = options or Cfsp(), dict(common)
    if common.get("checkpoint") is not None:
        claim(Path(common["checkpoint"]), {"cfsp": asdict(how)})
    data = batches_of(common.pop("data", None))
    batches = take(None) if data is None else data
    patterns = {"scope": common.pop("scope", None), "ignore": common.pop("ignore", ())}
    blocks = offered(model, example_inputs, ("channel",), **patterns)
    check_finite(model)
    # A shuffling loader takes its order from the global random state.
    with seeded(common.get("seed", 0), "importance"):
        weighed = importance(model, batches, how.importance, seed=common.get("seed", 0))
    return prune(
        model,
        example_inputs,
        budget,
        data=data,
        criterion="input-norm" if how.score == "released" else "weight-aware",
        allocation="sigmoid",
        allocation_options={
            "importance": {group: weighed[block] for group, block in blocks.items()},
            "strength": how.strength * _STRENGTH,
        },
        repair=partial(compensated, data=batches) if how.compensation else None,
        scope=list(blocks),
        **{"floor": 1, "round_to": how.round_to, **common},
    )


def importance(
    model: nn.Module, data: Iterable[Any], change: Change | Literal["none"] = "angular", *, seed: int = 0
) -> dict[str, float]:
    """I_l of each block of `model` by its path; zeros where there is one block alone, or for "none".

    Args:
        model: with blocks as `solvers.blocks_of` finds them.
        data: calibration batches; tokens that an "attention_mask" leaves out do not count.
        change: see `criteria.block_influence.block_changes`.
        seed: of random numbers in the model.
    """
    blocks = blocks_of(model)
    if change == "none" or len(blocks) == 1:
        return dict.fromkeys(blocks, 0.0)
    return block_changes(model, blocks, take(data), change=change, seed=seed)


def ranks(
    importance: Mapping[str, float],
    mean_rank: int,
    *,
    costs: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """A rank of low-rank adapters for each block, in proportion to its importance, at the cost of `mean_rank` in each.

    All together cost as much as adapters of `mean_rank` everywhere, give or take half a rank of one block; if all cost
    the same, the ranks are `mean_rank` on average exactly. Every block has at least rank 1.

    Args:
        importance: per block, at least 0; if all are 0 the ranks are equal.
        mean_rank: at least 1.
        costs: parameters of one rank in each block; default: the same in all.
        most: the highest rank that each block can have; where it binds, others get more. Default: no limit.

    Raises:
        OptionError: a rank below 1, a negative importance, or no block.

    >>> ranks({"layers.0": 3.0, "layers.1": 1.0}, 4)
    {'layers.0': 6, 'layers.1': 2}
    >>> ranks({"layers.0": 3.0, "layers.1": 1.0}, 4, costs={"layers.0": 20, "layers.1": 40})
    {'layers.0': 8, 'layers.1': 2}
    """
    if mean_rank < 1 or not importance or not all(0 <= value < float("inf") for value in importance.values()):
        raise OptionError(
            f"ranks need a mean rank of at least 1 and a finite importance of at least 0 for each block, got "
            f"{mean_rank} and {dict(importance)}."
        )
    prices = dict.fromkeys(importance, 1) if costs is None else {block: costs[block] for block in importance}
    total = mean_rank * sum(prices.values())
    caps = {block: price * (total // price if most is None else most[block]) for block, price in prices.items()}
    even = dict.fromkeys(importance, 1.0)
    weights = {b: (importance if any(importance.values()) else even)[b] * price for b, price in prices.items()}
    return _whole(apportion(weights, min(total, sum(caps.values())), prices, caps), prices)


def _whole(spent: Mapping[str, int], prices: Mapping[str, int]) -> dict[str, int]:
    """Whole ranks for what each block may spend; the largest remainders get one more while that comes nearer."""
    found = {block: spent[block] // price for block, price in prices.items()}
    left = {block: spent[block] % price for block, price in prices.items()}
    rest = sum(left.values())
    for block in sorted(left, key=lambda block: -left[block] / prices[block]):
        if left[block] > 0 and prices[block] < 2 * rest:
            found[block] += 1
            rest -= prices[block]
    return found


METHOD = method(
    Method(
        name="cfsp",
        title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
        arxiv="2409.13199",
        units=("neuron",),
        when=("after training",),
        how="block widths by angular distance, neurons by the norm of their activations",
        run=cfsp,
        needs=("data",),
        claim="Widths by importance keep a lower perplexity than equal ones, and than Wanda-sp and magnitude-sp.",
    )
)
