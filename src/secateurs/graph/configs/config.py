"""A model's config after a cut: which of its numbers must change so that its class builds what the cut has made.

Some libraries build a model from a config object and go on reading it: for the size of a cache, in a forward, and when
the model is saved and built again. What a number of the config means is not looked up but tried: the class is built on
the meta device with another number, and what it builds is compared with the model. Numbers that only grow right
together, as heads and key-value heads do, are tried in pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

from torch import nn

from .building import (
    Built,
    Change,
    Field,
    Number,
    build,
    built,
    changed,
    fields,
    set_attribute,
    set_field,
    switches,
    unset,
)

# After so many tries a search ends with what it has; what can be found has been, in all families tried, after half.
_MOST = 250

__all__ = ["Fit", "fit", "mend_config"]


@dataclass(frozen=True)
class Fit:
    """The config that comes closest to a model.

    Args:
        config: a copy; the model's own is not changed.
        changes: of the fields whose number or flag is another one, the old and the new one.
        left: what the config makes otherwise than the model has it, as (made, has), shapes first; None if the class
            cannot be built from a config.
        bent: of these the integers that the config changes and the cut did not: nothing needed them.
    """

    config: Any
    changes: Mapping[Field, tuple[Any, Any]]
    left: Mapping[str, tuple[Any, Any]] | None
    bent: frozenset[str] = frozenset()


def fit(model: nn.Module, *, agreed: bool = False) -> Fit:
    """The numbers of the model's config that build its shapes, as near as one number for all layers comes.

    Args:
        agreed: leave a number alone unless it is right for everything that the class makes of it.
    """
    search = _Search(model)
    if search.first is None:
        return Fit(copy.deepcopy(model.config), {}, None)
    found = search.run()
    found = search.agreed(found) if agreed else found
    return Fit(found.config, search.changes(found), found.built.unlike(built(model)), found.bent)


def mend_config(model: nn.Module) -> Callable[[], None] | None:
    """A function that undoes what was mended, in place; None if nothing was.

    Mended are the fields of the model's config that one number fits in all layers, flags about biases that the model
    has got, and integers of modules that follow from those alone and that no forward pass needed so far, such as
    queries per key in a model of one key.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return None
    found = fit(model, agreed=True)
    if not found.changes:
        return None
    changes = found.changes.items()
    held = [(config, fields(config) | switches(config)) for config in _configs(model)]
    undo = [set_field(c, f, new) for c, known in held for f, (old, new) in changes if known.get(f) == old]
    undo += _follow(model, found)

    def put_back() -> None:
        for step in reversed(undo):
            step()

    return put_back


def _configs(model: nn.Module) -> list[Any]:
    """The configs that modules hold: some keep a copy of their own."""
    held = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in held if hasattr(config, "to_dict")}.values())


def _follow(model: nn.Module, found: Fit) -> list[Callable[[], None]]:
    """Sets integers of modules as the config makes them; gives the ways back.

    Where all shapes are as the config makes them, so are all integers: one that the cut has changed followed another
    of its value by chance.
    """
    left = found.left or {}
    whole = not left.keys() & model.state_dict().keys()
    undo = []
    for name, (made, has) in left.items():
        path, _, attribute = name.rpartition(".")
        if name in found.bent or (whole and type(made) is type(has) is int):
            undo.append(set_attribute(model.get_submodule(path), attribute, made))
    return undo


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """A config, what is built from it, and how far that is from the model.

    Args:
        wrong: what must change still.
        bent: integers that the cut left alone and this config makes otherwise: nothing needed them, or they are wrong.
    """

    config: Any
    built: Built
    wrong: frozenset[str]
    bent: frozenset[str]


class _Search:
    """Changes of a config, taken one or two at a time while they bring it nearer to the model."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = type(model)
        self._given = copy.deepcopy(model.config)
        self._own = built(model)
        self._idle: set[Field] = set()
        self._tries = 0
        self._config, self.first = self._switched(self._given, build(self._kind, self._given))

    def _switched(self, config: Any, made: Built | None) -> tuple[Any, Built | None]:
        """The config with those flags turned by which its class makes biases that the model has, and no others."""
        missing = self._own.shapes.keys() - made.shapes.keys() if made is not None else set()
        if not any(name.endswith("bias") for name in missing):
            return config, made
        for field, value in switches(config).items():
            other = changed(config, [(field, not value)])
            found = None if other is None else build(self._kind, other)
            if (
                made is not None
                and found is not None
                and made.shapes.keys() < found.shapes.keys() <= self._own.shapes.keys()
            ):
                config, made = other, found
        return config, made

    def run(self) -> _Trial:
        """The nearest that was found."""
        assert self.first is not None
        now = self._judged(self._config, self.first)
        if not now.wrong:
            return now
        spelt = self._spelt_out(now)
        now = spelt or now
        while (now.wrong or now.bent) and (better := self._better(now) or self._filled_in(now)):
            now = better
        return self._without_idle(now) if spelt else now

    def changes(self, found: _Trial) -> dict[Field, tuple[Any, Any]]:
        """Of the fields whose number or flag is another one, the old and the new one."""
        before, after = (fields(config) | switches(config) for config in (self._given, found.config))
        return {f: (before.get(f), new) for f, new in after.items() if before.get(f) != new}

    def agreed(self, found: _Trial) -> _Trial:
        """Without the changes of numbers of which something is made that the model has otherwise.

        While anything is left wrong, that an integer bends is no sign that nothing needs it: half as many key-value
        heads fit the shapes of keys of half the size.
        """
        if not found.wrong:
            return found
        assert self.first is not None
        for field in self.changes(found):
            without = self._without(found, [field])
            if without is not None and (found.wrong | found.bent) & _touched(found.built, without.built):
                found = without
        disputed = (found.wrong | found.bent) & _touched(found.built, self.first)
        return self._judged(self._config, self.first) if disputed else found

    def _without(self, found: _Trial, without: Sequence[Field]) -> _Trial | None:
        kept = [(field, new) for field, (_, new) in self.changes(found).items() if field not in without]
        return self._trial(changed(self._given, kept))

    def _trial(self, config: Any | None) -> _Trial | None:
        made = None if config is None else build(self._kind, config)
        return None if made is None else self._judged(config, made)

    def _judged(self, config: Any, made: Built) -> _Trial:
        unlike = made.unlike(self._own)
        bent = {name for name, (new, own) in unlike.items() if self._left_alone(name, own) and type(new) is int}
        wrong = {part for name, sides in unlike.items() if name not in bent for part in _parts(name, *sides)}
        return _Trial(config, made, frozenset(wrong), frozenset(bent))

    def _left_alone(self, name: str, own: Any) -> bool:
        return type(own) is int and self.first is not None and self.first.numbers.get(name) == own

    def _better(self, now: _Trial) -> _Trial | None:
        """The best next step: one that makes nothing else wrong before one that bends, few changes before many."""
        singles = {change: found for change in self._candidates(now) if (found := self._tried(now, [change]))}
        if found := _best(now, singles.values(), bending=False):
            return self._more(found, [change for change, trial in singles.items() if trial.wrong < now.wrong])
        bending = _best(now, singles.values(), bending=True)
        if not now.wrong:
            return bending
        live = [change for change, trial in singles.items() if now.built.shapes.keys() <= trial.built.shapes.keys()]
        related = [change for change in live if _touched(singles[change].built, now.built) & now.wrong]
        pairs = self._tried_together(now, _pairs(related, live))
        if found := _best(now, pairs, bending=False) or bending or _best(now, pairs, bending=True):
            return found
        return _best(now, self._tried_together(now, combinations(related, 3)), bending=True)

    def _tried_together(self, now: _Trial, several: Iterable[tuple[Change, ...]]) -> list[_Trial]:
        return [t for some in several if _alike(some, now.config) and (t := self._tried(now, some))]

    def _more(self, now: _Trial, changes: Sequence[Change]) -> _Trial:
        """After one step those others that help still, without asking again which is best."""
        for change in changes:
            found = self._tried(now, [change])
            now = (found and _best(now, [found], bending=False)) or now
        return now

    def _tried(self, now: _Trial, changes: Sequence[Change]) -> _Trial | None:
        self._tries += 1
        found = self._trial(changed(now.config, changes)) if self._tries <= _MOST else None
        if found is not None and len(changes) == 1 and found.built == now.built:
            self._idle.add(changes[0][0])
        return found

    def _candidates(self, now: _Trial) -> list[Change]:
        """Fields with a number that one of the sizes that are wrong may be made of, changed in the same proportion."""
        unlike = now.built.unlike(self._own)
        steps = _steps(unlike)
        # What a number is divided by grows where the quotient shrinks.
        steps += [(new, old) for old, new in _steps({name: unlike[name] for name in now.bent})]
        sizes = {n for shape in now.built.shapes.values() for n in shape}
        out: dict[Change, None] = {}
        for field, value in fields(now.config).items():
            if field in self._idle:
                continue
            if type(value) is int and value > 1:
                out |= {(field, value * new // old): None for old, new in steps if (value * new) % old == 0}
            elif type(value) is float and value > 0:
                out |= {(field, value * new / old): None for old, new in steps if old / value in sizes}
        return list(out)

    def _spelt_out(self, now: _Trial) -> _Trial | None:
        """The config with numbers given that its class works out from others unless they are, under the same name."""
        agreed: dict[str, set[Number]] = {}
        for name, value in self._own.numbers.items():
            agreed.setdefault(name.rpartition(".")[2], set()).add(value)
        given = {n: v.pop() for n, v in agreed.items() if len(v) == 1 and getattr(now.config, n, None) is None}
        numbers = [((name,), value) for name, value in given.items() if type(value) is int]
        found = self._trial(changed(now.config, numbers))
        return found if found is not None and found.built == now.built else None

    def _filled_in(self, now: _Trial) -> _Trial | None:
        """The best with a number where the config has none, which a size follows from until it is given."""
        sizes = dict.fromkeys(size for _, size in _steps(now.built.unlike(self._own)))
        found: list[_Trial] = []
        for field in unset(now.config):
            for size in sizes:
                trial = None if field in self._idle else self._tried(now, [(field, size)])
                if trial is None:
                    break
                found.append(trial)
        return _best(now, found, bending=False)

    def _without_idle(self, now: _Trial) -> _Trial:
        """Without the numbers that were given and do nothing."""
        given = [field for field, (old, _) in self.changes(now).items() if old is None]
        for some in (given, *([field] for field in given)):
            found = self._without(now, some)
            now = found if found is not None and found.built == now.built else now
        return now


def _touched(one: Built, other: Built) -> set[str]:
    """Names of all that differs, as in `_Trial.wrong`."""
    return {part for name, sides in one.unlike(other).items() for part in _parts(name, *sides)}


def _parts(name: str, made: Any, has: Any) -> list[str]:
    """Names for what differs: each axis on its own, where there are as many."""
    if not isinstance(made, tuple) or not isinstance(has, tuple) or len(made) != len(has):
        return [name]
    return [f"{name}[{axis}]" for axis, (one, other) in enumerate(zip(made, has, strict=True)) if one != other]


def _steps(unlike: Mapping[str, tuple[Any, Any]]) -> list[tuple[int, int]]:
    """The sizes that differ, as (made, has)."""
    found: dict[tuple[int, int], None] = {}
    for made, has in unlike.values():
        one, other = ((side,) if type(side) is int else side for side in (made, has))
        if isinstance(one, tuple) and isinstance(other, tuple):
            found |= {
                (old, new): None for old, new in zip(one, other, strict=False) if old != new and min(old, new) > 0
            }
    return list(found)


def _pairs(related: Sequence[Change], live: Sequence[Change]) -> list[tuple[Change, ...]]:
    """Pairs of changes of which one at least is related to what is wrong."""
    return [pair for pair in combinations(live, 2) if pair[0] in related or pair[1] in related]


def _alike(changes: Sequence[Change], config: Any) -> bool:
    """Whether the changes are of different fields and in one proportion."""
    before = fields(config)
    alike = {Fraction(new) / Fraction(before[field]) for field, new in changes}
    return len(alike) == 1 and len({field for field, _ in changes}) == len(changes)


def _best(now: _Trial, found: Iterable[_Trial], *, bending: bool) -> _Trial | None:
    """The trial with the least left that is wrong, of those that make nothing wrong that was right."""
    good = [
        trial
        for trial in found
        if (trial.wrong < now.wrong or (trial.wrong == now.wrong and trial.bent < now.bent))
        and (bending or trial.bent <= now.bent)
    ]
    return min(good, key=lambda t: (len(t.wrong), len(t.bent)), default=None)
