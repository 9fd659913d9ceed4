"""`secateurs worth`: is pruning worth it here, or does a small network from scratch do as well?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Granularity, Input, Opening, Output, Threads
from ._session import session, table

if TYPE_CHECKING:
    from torch import nn

    from ..methods.channels.rethinking_value import Verdict

__all__ = ["worth"]

_FACTORY = "module:factory, a function of yours that makes the untrained large network; it is called once a seed."


def worth(
    model: Annotated[str, typer.Argument(help=_FACTORY, show_default=False)],
    *,
    budget: Annotated[str, typer.Option("--budget", help="What the architecture is pruned to, as macs<=50%.")],
    data: Annotated[str, typer.Option("--data", help="Training data, as for prune.")],
    test_data: Annotated[str, typer.Option("--test-data", help="Data that every arm is tested on.")],
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of the dense training.")] = 160,
    tune_epochs: Annotated[int, typer.Option("--tune-epochs", min=1, help="Of fine-tuning.")] = 40,
    tune_lr: Annotated[list[float] | None, typer.Option("--tune-lr", help="Rate of fine-tuning; repeatable.")] = None,
    lr: Annotated[float, typer.Option("--lr", help="Of training from scratch.")] = 0.1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many runs of every arm.")] = 3,
    granularity: Granularity = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    shape: Input = None,
    threads: Threads = None,
    output: Output,
) -> None:
    """Train the pruned architecture from scratch, and fine-tune it, and compare (arXiv 1810.05270).

    Every arm is shown with its mean and deviation over the seeds; nothing is chosen by the test data.
    """
    with session(**vars(output), threads=threads) as talk:
        from ..integrations import load_data
        from ..methods.channels.rethinking_value import Protocol, rethinking_value

        def build(seed: int) -> nn.Module:
            return Opening(shape, random_weights=True, seed=seed).load(model).model

        opened = Opening(shape, random_weights=True).load(model)
        formats: dict[str, Any] = {"images": opened.images, "text": opened.text, "size": batch_size, "seed": 0}
        train = load_data(data, split="train", **formats)
        tests = list(load_data(test_data, split="test", **formats))
        source = opened.with_examples(tests[0], 2).runnable()
        how = Protocol(
            epochs=epochs,
            lr=lr,
            tune_epochs=tune_epochs,
            tune_rates=tuple(tune_lr or Protocol().tune_rates),
            seeds=tuple(range(seeds)),
        )
        verdict = rethinking_value(
            build,
            source.example_inputs,
            budget,
            data=train,
            test=tests,
            options=how,
            on_arm=lambda arm: talk.say(str(arm)),
            **({} if granularity is None else {"granularity": granularity}),
        )
        talk.result(_record(verdict), _table(verdict))


def _record(verdict: Verdict) -> dict[str, Any]:
    arms = {a.name: {"mean": a.mean, "std": a.std, "accuracies": list(a.accuracies)} for a in verdict.arms}
    return {"worth_it": verdict.worth_it, "arms": arms}


def _table(verdict: Verdict) -> Any:
    rows = [[arm.name, f"{100 * arm.mean:.2f} %", f"± {100 * arm.std:.2f}"] for arm in verdict.arms]
    return table(("arm", "accuracy>", "deviation>"), rows, str(verdict).splitlines()[-1])
