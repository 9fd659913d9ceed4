"""What wrappers hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateurs.core.errors import ModelError
from secateurs.core.wrapped import unwrapped


def test_the_model_inside_is_found_through_every_wrapper() -> None:
    inner = nn.Linear(2, 3)
    assert unwrapped(inner) is inner
    assert unwrapped(torch.compile(inner)) is inner
    assert unwrapped(nn.DataParallel(torch.compile(nn.DataParallel(inner)))) is inner


def test_a_module_with_a_child_of_that_name_is_no_wrapper() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)

    holder = Holds()
    assert unwrapped(holder) is holder


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, "a NoneType"), (nn.Linear, "the class Linear"), (nn.Linear(2, 3).state_dict(), "a OrderedDict")],
)
def test_what_is_no_model_is_refused(given: Any, found: str) -> None:
    with pytest.raises(ModelError, match=rf"that is built and holds its weights, got {found}\."):
        unwrapped(given)
