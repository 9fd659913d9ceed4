"""Tasks of lm-eval before and after a run, as quality in its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..integrations import LoadedModel
    from ..report.data import Report
    from ._session import Stages

__all__ = ["answering", "with_answers"]

Answering = Callable[["Stages", "nn.Module"], dict[str, float]]


def answering(source: LoadedModel, tasks: Sequence[str] | None, limit: int | None, seed: int) -> Answering:
    """The function of the run's stages and a model that tells how the model does on the tasks; nothing without tasks.

    Raises:
        OptionError: an unknown task, or a model that does not predict the next token.
        MissingExtraError: lm-eval is not installed.
    """
    if not tasks:
        return lambda stages, model: {}
    from ..core.errors import OptionError
    from ..integrations.lm_eval import check_tasks, evaluate_tasks, task_quality
    from ..integrations.text import tokenizer_of

    check_tasks(tasks)
    if source.text is None or not source.text.causal:
        raise OptionError(
            f"--tasks needs a Hugging Face language model that predicts the next token; {source.name} is none."
        )
    tokenizer = tokenizer_of(source.text)

    def answer(stages: Stages, model: nn.Module) -> dict[str, float]:
        stages.begin("answering tasks")
        return task_quality(evaluate_tasks(model, tokenizer, tasks, limit=limit, seed=seed))

    return answer


def with_answers(report: Report, before: Mapping[str, float], after: Mapping[str, float]) -> Report:
    """The report with answers behind the quality of both sides, and of the last stage, which is the model itself."""
    stages = dict(report.stages)
    if stages:
        last = next(reversed(stages))
        stages[last] = {**stages[last], **after}
    return replace(
        report,
        before=replace(report.before, quality={**report.before.quality, **before}),
        after=replace(report.after, quality={**report.after.quality, **after}),
        stages=stages,
    )
