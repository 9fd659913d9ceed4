"""The registry of criteria: one record each, found by name, with what the criterion needs and where it makes sense.

To add a criterion, write a function and name it:

    @criterion("spread", paper="…")
    def spread(model, names):                      # elementwise: one tensor of the parameter's shape for each name
        return {name: (w - w.mean()).abs() for name, w in values(model, names).items()}

An *elementwise* function takes `(model, names)` and returns saliencies that are lifted to units; a *unit* function
(`kind="unit"`) takes `(model, groups)` and returns scores per group itself. Either may name `data` (a list of batches),
`loss` and `seed` among its keyword-only parameters; every other keyword-only parameter is an option of the criterion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from ..core.errors import OptionError, unknown_name
from .lifting import Lift, resolve

__all__ = ["Criterion", "Need", "criteria", "criterion", "elementwise", "get_criterion"]

Need = Literal["inputs", "data", "labels"]
Function = Callable[..., dict[str, Tensor]]

_SUPPLIED = ("data", "loss", "seed")
_CRITERIA: dict[str, Criterion] = {}
# What others call them.
_OTHER_WORDS = {
    "l1": "'magnitude'", "l2": "'magnitude' with criterion_options={'norm': 2}", "norm": "'magnitude'",
    "bn": "'norm-scale'", "slimming": "'norm-scale'", "hessian": "'obs'", "gradient": "'taylor'",
}  # fmt: skip


@dataclass(frozen=True)
class Criterion:
    """One way to say how much a unit matters.

    Args:
        name: the key in the registry.
        function: see the module's docstring.
        kind: "elementwise" (a saliency per tensor entry, lifted by the face) or "unit" (a score per unit).
        needs: of "inputs" (one batch, for its shape only), "data" (batches) and "labels" (a loss on them).
        groups: the groups for which it makes sense: of "weight", "channel", "layer" and, for what makes sense
            for no other channel, "expert" and "embedding".
        signed: whether scores may be negative; then no mean, sum or maximum of them is a scale.
        lift: defaults of the lifting options.
        fixed: lifting options that belong to the definition, so that the caller cannot set them; of a "unit"
            criterion these are all but `normalize`.
        finish: `(reduced, **options) -> scores`, applied inside each tensor after reduction (the root of a norm).
        paper: where it was published.
    """

    name: str
    function: Function
    kind: Literal["elementwise", "unit"] = "elementwise"
    needs: tuple[Need, ...] = ()
    groups: tuple[Literal["weight", "channel", "layer", "expert", "embedding"], ...] = ("weight", "channel", "layer")
    signed: bool = False
    lift: Lift = field(default_factory=Lift)
    fixed: tuple[str, ...] = ()
    finish: Callable[..., Tensor] | None = None
    paper: str = ""

    @property
    def data_free(self) -> bool:
        """Whether it looks at no data (the shape of one batch does not count)."""
        return not {"data", "labels"} & set(self.needs)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the criterion's own options, apart from those of the lifting."""
        return tuple(p.name for p in self._parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in _SUPPLIED)

    def accepts(self, keyword: str) -> bool:
        """Whether the function can be given `keyword`."""
        return keyword in self._parameters or any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def evaluate(self, model: nn.Module, subject: Sequence[Any], supplied: Mapping[str, Any]) -> dict[str, Tensor]:
        """The function's result for `subject` (names or groups), given of `supplied` only the keywords it can take.

        Raises:
            OptionError: it returned no mapping.
        """
        found = self.function(model, subject, **{k: v for k, v in supplied.items() if self.accepts(k)})
        if not isinstance(found, Mapping):
            raise OptionError(
                f"criterion {self.name!r} returned {type(found).__name__}: it must return a dict of tensors by name."
            )
        return dict(found)


def criterion(name: str, **record: Any) -> Callable[[Function], Function]:
    """A decorator that enters a function under `name`; the other arguments are those of `Criterion`.

    Raises:
        OptionError: the name is taken.
    """

    def register(function: Function) -> Function:
        if name in _CRITERIA:
            raise OptionError(f"criterion {name!r} is already registered, by {_CRITERIA[name].function.__module__}.")
        _CRITERIA[name] = Criterion(name, function, **record)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """The criterion registered under `name`.

    Raises:
        OptionError: there is none; the message has the nearest three names.
    """
    if name not in _CRITERIA:
        if name in _OTHER_WORDS:
            raise OptionError(f"unknown criterion {name!r}; here it is {_OTHER_WORDS[name]}.")
        raise unknown_name("criterion", name, _CRITERIA)
    return _CRITERIA[name]


def criteria() -> tuple[Criterion, ...]:
    """All registered criteria, by name."""
    return tuple(_CRITERIA[name] for name in sorted(_CRITERIA))


def elementwise(function: Callable[[str, Tensor], Tensor], *, signed: bool = False) -> Criterion:
    """A criterion from a function of one tensor, `(name, values) -> saliency` of its shape; it is not registered.

    >>> elementwise(lambda name, values: values.square()).kind
    'elementwise'
    """

    def saliency(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: function(name, tensor.detach()) for name, tensor in resolve(model, names).items()}

    return Criterion(getattr(function, "__name__", "function"), saliency, signed=signed)
