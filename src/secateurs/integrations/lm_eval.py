"""Zero-shot and few-shot tasks of the Language Model Evaluation Harness, for models that are in memory.

The harness (Gao et al., EleutherAI) brings the tasks, their prompts and their metrics; papers on pruning report its
accuracies. Importing this file does not import it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import nn

from ..core.errors import DataError, MissingExtraError, ModelError, OptionError, unknown_name
from ..recover.context import modes_kept, seeded

__all__ = ["check_tasks", "evaluate_tasks", "task_quality"]

# What the harness calls its metrics, as a report writes them.
_WORDS = {"acc": "accuracy", "acc_norm": "normalised accuracy", "acc_mutual_info": "mutual-information accuracy"}


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The metrics of each task, in the order of the harness: {task: {metric: value}}.

    Metrics have the harness's names, as "acc" and "acc_norm"; where a task reads answers in several ways, the way
    stands behind in brackets. A group, as "mmlu", has an entry of its own beside its tasks. Standard errors are left
    out.

    Args:
        model: a transformers model with a language head; run in evaluation mode on its own device, its training flags
            are put back.
        tokenizer: the tokenizer itself, or its name or folder.
        tasks: names of the harness, as "arc_easy", or YAML files that define tasks of your own.
        limit: examples of each task; all by default.
        num_fewshot: examples in front of each question; by default what the task says, most often none.
        batch_size: examples that are run together; 8.
        seed: of the examples in front and of what a task draws.

    Raises:
        OptionError: no task, one that the harness does not know, or a number outside its range.
        ModelError: the model is none of transformers, or fails on a task.
        DataError: the examples of a task cannot be loaded.
        MissingExtraError: lm-eval is not installed.
    """
    _check_numbers(limit, num_fewshot, batch_size)
    manager = _manager(tasks)
    if not hasattr(model, "config") or not hasattr(model, "device"):
        raise ModelError(f"tasks are for language models of transformers; {type(model).__name__} is none.")
    with _quiet(), seeded(seed, "tasks"):
        loaded = _loaded(manager, tasks)
        with modes_kept(model), _tied_as_they_are(model):
            found = _run(model, tokenizer, loaded, manager, limit, num_fewshot, batch_size, seed)
    return {name: _numbers(values) for name, values in found.items() if _numbers(values)}


def check_tasks(tasks: Sequence[str]) -> None:
    """None; refuses what `evaluate_tasks` would refuse of the names, before anything is run.

    Raises:
        OptionError: no task, or one that the harness does not know.
        MissingExtraError: lm-eval is not installed.
    """
    _manager(tasks)


def task_quality(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What `evaluate_tasks` found as the quality of a report: one name for each task and metric.

    >>> task_quality({"arc_easy": {"acc": 0.5, "acc_norm": 0.25}})
    {'arc_easy accuracy': 0.5, 'arc_easy normalised accuracy': 0.25}
    """
    return {
        f"{task} {_WORDS.get(metric, metric)}": value
        for task, values in found.items()
        for metric, value in values.items()
    }


def _check_numbers(limit: int | None, num_fewshot: int | None, batch_size: int) -> None:
    # The harness reads a limit below 1 as a share, and 1 as one example.
    for name, number, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise OptionError(f"{name} must be a whole number of at least {least}, got {number!r}.")


def _manager(tasks: Sequence[str]) -> Any:
    """The harness's index of tasks, in which all of `tasks` are."""
    if isinstance(tasks, str) or not tasks:
        raise OptionError(f"tasks must be a list of at least one name, got {tasks!r}.")
    manager = _index()
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise OptionError(f"there is no file {task!r} that defines a task.")
        elif task not in manager.all_tasks:
            raise unknown_name("task of lm-eval", task, manager.all_tasks)
    return manager


@cache
def _index() -> Any:
    """All that the harness has, which takes seconds to read: thousands of files."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    with _quiet():
        return TaskManager()


def _loaded(manager: Any, tasks: Sequence[str]) -> list[Any]:
    """The tasks with their examples."""
    built = []
    for task in tasks:
        try:
            found = manager.load([task])
        except Exception as error:
            # Hub, network, data files and the task's own code each have errors of their own.
            raise DataError(f"the task {task} cannot be loaded ({_short(error)}).") from error
        groups = [group for group in found["groups"].values() if group.name == task]
        built += groups or list(found["tasks"].values())
    return built


def _run(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[Any],
    manager: Any,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        made = simple_evaluate(
            harness, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0,
            log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    except Exception as error:
        # The model's code and the harness raise errors of any kind.
        raise ModelError(f"{type(model).__name__} cannot be run on the tasks ({_short(error)}).") from error
    return {**made["results"], **made.get("groups", {})}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics alone: a key is "metric,filter", with "none" for the plain answer."""
    found = {}
    for key, value in values.items():
        metric, _, way = key.partition(",")
        if way and isinstance(value, (int, float)) and not metric.endswith("_stderr"):
            found[metric if way == "none" else f"{metric} ({way})"] = float(value)
    return found


@contextmanager
def _tied_as_they_are(model: nn.Module) -> Iterator[None]:
    """Inside, nobody ties the model's weights again: the harness does, and would undo what was pruned of one of two."""
    model.__dict__["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del model.__dict__["tie_weights"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness tells only what is wrong: it has a line for each task in its index."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _short(error: Exception) -> str:
    """Another library's message, which may go on for a page."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …").rstrip(".")
