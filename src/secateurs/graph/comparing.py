"""What several recordings of one module have in common, and what their differences tell.

Two batch sizes tell which integers grow with the batch, a run in training which constants follow `training`, a run in
float64 which dtypes follow the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..core.errors import ModelError

__all__ = ["Differs", "follow_dtype", "follow_training", "leading_batch", "merged", "overlaid", "training_by_name"]


class Differs(Exception):
    """Two recordings cannot be laid over each other."""


def leading_batch(leading: Sequence[Mapping[str, int]]) -> tuple[str | None, list[int]]:
    """The first tensor input whose leading axis differs between the calls, and its sizes."""
    for key in leading[0]:
        sizes = [each.get(key, 0) for each in leading]
        if len(set(sizes)) > 1:
            return key, sizes
    return None, []


def merged(trees: Sequence[dict[str, Any]], batches: Sequence[int]) -> dict[str, Any]:
    """What the recordings of several calls have in common; integers that follow the batch as `$batch`.

    Args:
        batches: the batch size of each; empty if it is the same in all.

    Raises:
        ModelError: they differ in anything else; the message names the step.
    """
    counts = [len(tree["steps"]) for tree in trees]
    if len(set(counts)) > 1:
        raise ModelError(f"the calls differ in length: they take {' and '.join(map(str, counts))} steps.")
    same: dict[str, Any] = {"steps": []}
    for name, what in {"inputs": "what it is called with", "output": "what it returns"}.items():
        same[name] = _combined([tree[name] for tree in trees], batches, what)
    for i, steps in enumerate(zip(*(tree["steps"] for tree in trees), strict=True)):
        where = f"step {i} ({steps[0]['function'] or steps[0]['child']})"
        same["steps"].append(_combined(steps, batches, where))
    return same


def _combined(nodes: Sequence[Any], batches: Sequence[int], where: str) -> Any:
    first = nodes[0]
    if all(type(n) is type(first) for n in nodes):
        if all(n == first for n in nodes):
            return first
        if isinstance(first, dict) and all(n.keys() == first.keys() for n in nodes):
            return {k: _combined([n[k] for n in nodes], batches, where) for k in first}
        if isinstance(first, list) and all(len(n) == len(first) for n in nodes):
            return [_combined(list(each), batches, where) for each in zip(*nodes, strict=True)]
    try:
        return _of_batch(nodes, batches)
    except Differs as error:
        raise ModelError(f"the calls differ in {where}: {nodes[0]} is {nodes[-1]} in another.") from error


def _of_batch(nodes: Sequence[Any], batches: Sequence[int]) -> Any:
    """An integer that is one multiple of the batch in every call."""
    if not batches or not all(type(n) is int for n in nodes):
        raise Differs
    shares = {Fraction(n, b) for n, b in zip(nodes, batches, strict=True)}
    if len(shares) > 1:
        raise Differs
    share = shares.pop()
    return {"$batch": [share.numerator, share.denominator]}


def overlaid(base: Any, plain: Any, other: Any, rule: Callable[[Any, Any], Any]) -> Any:
    """`base` with `rule` applied where two recordings, of which `plain` is one of those it stands for, differ."""
    if plain == other:
        return base
    if all(isinstance(v, dict) for v in (base, plain, other)) and plain.keys() == other.keys() == base.keys():
        return {k: overlaid(base[k], plain[k], other[k], rule) for k in plain}
    if all(isinstance(v, list) for v in (base, plain, other)) and len(plain) == len(other) == len(base):
        return [overlaid(*each, rule) for each in zip(base, plain, other, strict=True)]
    return rule(plain, other)


def follow_training(plain: Any, training: Any) -> Any:
    """Two constants, of which one belongs to training.

    Raises:
        Differs: they are more than constants.
    """
    if not all(isinstance(v, (bool, float)) for v in (plain, training)):
        raise Differs
    return {"$training": [training, plain]}


def follow_dtype(plain: Any, double: Any) -> Any:
    """The input's dtype where a run in float64 has that; of numbers that come from a dtype (its least) the recorded.

    Raises:
        Differs: the runs differ in something else.
    """
    if isinstance(plain, float) and isinstance(double, float):
        return plain
    if double != "float64" or not isinstance(plain, str):
        raise Differs
    return "input"


def training_by_name(base: dict[str, Any]) -> dict[str, Any]:
    """`base` with what is called `training` following the module; what is true in evaluation mode is always true."""
    steps = []
    for step in base["steps"]:
        named = {
            k: {"$training": [True, False]}
            for k, v in step["arguments"]["kwargs"].items()
            if k in _FLAGS and v is False
        }
        kwargs = {**step["arguments"]["kwargs"], **named}
        steps.append({**step, "arguments": {**step["arguments"], "kwargs": kwargs}})
    return {**base, "steps": steps}


_FLAGS = ("train", "training")
