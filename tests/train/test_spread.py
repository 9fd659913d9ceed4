"""Numbers of units laid along tensors."""

from __future__ import annotations

import torch

from secateurs.core.dims import Atom, Fixed, concat, product
from secateurs.core.units import ChannelGroup, WeightGroup
from secateurs.train.spread import multiplied, parts_of
from tests.criteria.models import member

WIDTH = Atom("a", 2)
FIRST = {"w": "w", "also": "w", "v": "v"}


def test_parts_are_by_role_and_first_name() -> None:
    members = (member("also", 0, WIDTH, 2), member("w", 0, WIDTH, 2), member("v", 1, WIDTH, 2, "in"))
    group = ChannelGroup("a", 2, "channel", (*members, member("unknown", 0, WIDTH, 1)))
    assert [name for name, _ in parts_of(group, FIRST)] == ["w"]
    assert [name for name, _ in parts_of(group, FIRST, ("in",))] == ["v"]
    assert [name for name, _ in parts_of(group, FIRST, ("out", "in"))] == ["w", "v"]
    assert parts_of(WeightGroup("also", (2, 2)), FIRST)[0][0] == "w"


def test_factors_of_two_axes_multiply_and_what_carries_no_unit_stays() -> None:
    rows = ChannelGroup("a", 2, "head", (member("w", 0, product(WIDTH, Fixed(2)), 2),))
    other = Atom("b", 1)
    columns = ChannelGroup("b", 1, "channel", (member("w", 1, concat(other, Fixed(2)), 2),))
    factors = [(part, torch.tensor([2.0, 3.0])) for part in parts_of(rows, FIRST)]
    factors += [(part, torch.tensor([10.0])) for part in parts_of(columns, FIRST)]
    made = multiplied({"w": torch.ones(4, 3, dtype=torch.float64)}, factors)["w"]
    assert made.dtype == torch.float64
    assert made.tolist() == [[20, 2, 2], [20, 2, 2], [30, 3, 3], [30, 3, 3]]
