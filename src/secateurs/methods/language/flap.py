"""FLAP: what fluctuates least goes from all layers together, and its mean stays behind in the biases.

An, Zhao, Yu, Tang and Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
arXiv 2312.11983. Unit: attention heads (of grouped queries a key-value head with its queries) and the inner channels
of the feed-forward layers of its blocks, cut out. When: after training, in one pass over calibration data, without
gradients. How, for each layer W that consumes them and its inputs x:

    1. scores        WIFV_j = Var(x_j)·||W_:j||², what input j costs W in squared error if a constant takes its place;
                     IFV_j without the weights; WIFN_j the mean over rows of |w_ij|·||x_j||. Of heads it is squared.
    2. structure     AL-AM: z-scores over the inputs of each W, averaged over the positions of a head, and one ranking
                     of all layers, in which a unit counts for what its removal saves. UL-UM: the same share of every
                     layer, without z-scores
    3. compensation  b_i = Σ_{j goes} w_ij·E[x_j], the best of all constants, is added to the bias of W

Step 1's score is exact for one input; of several the loss is tr(W_S·Cov_S·W_Sᵀ), the sum of scores if they are
uncorrelated. Budgets are those of the whole library, and the costs of the model say what a head and a channel weigh.

Defaults. WIFV, AL-AM, compensation, squared scores of heads: the published code's. At least one unit of each layer
stays. The paper calibrates on 1,024 windows of 128 tokens of WikiText-2; give yours as data=.

Not as in the published code. Variances are exact, not those of an update that forgets the first sequence
(`criteria.fluctuation` has it as variance="released"); the unit at the threshold stays; a layer is never emptied. Its
structures with a number of heads fixed by hand are left out: scope= and ignore= say what is pruned. "params<=70%" is of
the whole model, embeddings too. Biases that are created are not counted there: one number an output of W.

The paper's baselines are compositions: Wanda-sp is `prune(…, criterion="fluctuation", criterion_options={"metric":
"wifn"}, allocation="uniform")`, magnitude-sp `prune(…, criterion="magnitude", criterion_options={"members": "in",
"norm": 2}, allocation="uniform")`; either takes `repair=partial(compensated, data=…)` of `methods.compensation`, too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from ...core.batch import take
from ...core.budget import Budget
from ...core.catalogue import Method, method
from ...criteria.fluctuation import METRICS, Metric
from ...planning import batches_of
from ...pruning import Pruned, prune
from ...running import claim
from ..compensation import compensated
from ..offered import offered
from ..parameters import OneOf, Switch, check

__all__ = ["METHOD", "Flap", "flap"]

Structure = Literal["AL-AM", "UL-UM"]
Units = Literal["heads and channels", "channels"]


@dataclass(frozen=True)
class Flap:
    """Hyperparameters.

    Args:
        metric: "wifv" (default), "ifv" or "wifn".
        structure: "AL-AM", z-scores ranked over all layers (default), or "UL-UM", the same share of each.
        compensation: whether the means of what goes are added to the biases (default).
        square_heads: whether the metric of heads is squared, as published (default).
        units: "heads and channels" (default) or "channels" alone.
    """

    metric: Annotated[Metric, OneOf(METRICS)] = "wifv"
    structure: Annotated[Structure, OneOf(("AL-AM", "UL-UM"))] = "AL-AM"
    compensation: Annotated[bool, Switch()] = True
    square_heads: Annotated[bool, Switch()] = True
    units: Annotated[Units, OneOf(("heads and channels", "channels"))] = "heads and channels"

    def __post_init__(self) -> None:
        check(self)

    @property
    def criterion_options(self) -> dict[str, Any]:
        """What the criterion "fluctuation" is given."""
        return {"metric": self.metric, "square_heads": self.square_heads, "standardize": self.structure == "AL-AM"}


def flap(
    model: nn.Module, example_inputs: Any, budget: str | Budget, *, options: Flap | None = None, **common: Any
) -> Pruned:
    """A smaller copy of `model`, without the heads and channels that fluctuate least, whose means its biases hold.

    Args:
        model, example_inputs, budget: as for `prune`; "params<=70%", "macs<=70%", "sparsity=30%" (of all units) …
        options: hyperparameters.
        common: data, test, recover, scope, ignore, seed and the rest of `prune`'s arguments. The plan does not hold
            the compensation: save the result.

    Raises:
        DataError: calibration data are missing or empty.
        ModelError: nothing of these units can go, or what consumes them has no inputs that can be looked at.
        OptionError: a checkpoint of other hyperparameters.
    """
    how, common = options or Flap(), dict(common)
    if common.get("checkpoint") is not None:
        claim(Path(common["checkpoint"]), {"flap": asdict(how)})
    data = batches_of(common.pop("data", None))
    kinds = ("channel",) if how.units == "channels" else ("channel", "head")
    patterns = {"scope": common.pop("scope", None), "ignore": common.pop("ignore", ())}
    groups = offered(model, example_inputs, kinds, **patterns)
    return prune(
        model,
        example_inputs,
        budget,
        data=data,
        criterion="fluctuation",
        criterion_options=how.criterion_options,
        allocation="global" if how.structure == "AL-AM" else "uniform",
        repair=partial(compensated, data=take(None) if data is None else data) if how.compensation else None,
        scope=list(groups),
        **{"floor": 1, **common},
    )


METHOD = method(
    Method(
        name="flap",
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        arxiv="2312.11983",
        units=("head", "channel"),
        when=("after training",),
        how="variance of inputs × column energy, z-scores ranked over layers, bias compensation",
        run=flap,
        needs=("data",),
        claim="Without retraining it keeps a lower perplexity than Wanda-sp and magnitude-sp, and compensation helps.",
    )
)
