"""The catalogue of published systems: one record each, kept beside the code that is the system."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from .errors import OptionError, unknown_name

__all__ = ["Method", "catalogue", "get_method", "hyperparameters", "method"]

Unit = Literal[
    "weight", "block", "N:M", "channel", "head", "layer", "token", "sample", "context", "face", "cell", "neuron"
]
When = Literal["before training", "during training", "after training", "at run time"]


@dataclass(frozen=True)
class Method:
    """One published system (axes after Cheng et al. 2024, arXiv 2308.06767).

    Args:
        name: as in the catalogue, with hyphens.
        title: of the paper.
        arxiv: id of the paper; empty if it has none.
        units: what it removes.
        when: relative to training.
        how: criterion, allocation and schedule, in a few words.
        run: what a user calls: for a method applied to a model `(model, example_inputs, budget, **options) -> Pruned`,
            for one inside training the class or function that makes its pruner.
        needs: of "data", "labels", "gradients", "training", and "builder" if it starts from a function that makes
            untrained networks.
        fused: what it is combined with, as "distillation".
        claim: the paper's claim that `benchmarks` checks, one sentence.
    """

    name: str
    title: str
    arxiv: str
    units: tuple[Unit, ...]
    when: tuple[When, ...]
    how: str
    run: Callable[..., Any]
    needs: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    claim: str = ""

    @property
    def summary(self) -> str:
        """The first line of the docstring of the module that holds the system."""
        return (sys.modules[self.run.__module__].__doc__ or "").strip().partition("\n")[0]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        function = f"{self.run.__module__}.{self.run.__qualname__}"
        return {**vars(self), "run": function, "summary": self.summary}


def hyperparameters(run: Callable[..., Any]) -> Any:
    """The dataclass of a method's hyperparameters, the type of its argument `options`; None if it has none."""
    hint = get_type_hints(run).get("options")
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


_METHODS: dict[str, Method] = {}


def method(record: Method) -> Method:
    """Enters a record into the catalogue and returns it.

    Raises:
        OptionError: the name is taken.
    """
    if record.name in _METHODS:
        raise OptionError(
            f"method {record.name!r} is already in the catalogue, by {_METHODS[record.name].run.__module__}."
        )
    _METHODS[record.name] = record
    return record


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        OptionError: there is none; the message has the nearest three names.
    """
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    return _METHODS[name]


def catalogue() -> tuple[Method, ...]:
    """All methods, by name."""
    return tuple(_METHODS[name] for name in sorted(_METHODS))
