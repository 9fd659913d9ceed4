"""Tables of what levels cost, and the grids of levels."""

from __future__ import annotations

import pytest

from secateurs.core.errors import OptionError
from secateurs.core.levels import Table, counts_of_heads, counts_of_width

TABLE = Table(10.0, {"a": (4, 2, 1), "b": (8, 4)}, {"a": (3.0, 2.0, 2.5), "b": (5.0, 1.0)})


def test_a_total_is_the_whole_less_what_levels_save() -> None:
    assert TABLE.total({}) == TABLE.total({"a": 4, "b": 8}) == 10
    assert TABLE.total({"a": 2, "b": 4}) == 5
    assert TABLE.total({"a": 1}) == 9.5


def test_the_lowest_is_where_no_level_is_cheaper_even_if_a_smaller_one_is_slower() -> None:
    assert TABLE.lowest == 5
    assert TABLE.above == {"a": (1.0, 0.0, 0.5), "b": (4.0, 0.0)}


def test_nothing_is_interpolated() -> None:
    with pytest.raises(OptionError, match=r"no entry for 3 units of a; it has 4, 2, 1\."):
        TABLE.total({"a": 3})
    with pytest.raises(OptionError, match=r"no entry for 3 units of c; it has none\."):
        TABLE.total({"c": 3})


@pytest.mark.parametrize("entries", [{"a": (1.0,)}, {}, {"a": (1.0, 2.0), "b": ()}])
def test_a_table_with_holes_is_refused(entries: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(OptionError, match="one entry for each count"):
        Table(1.0, {"a": (2, 1)}, entries)


def test_the_grid_of_widths_is_that_of_the_paper() -> None:
    counts = counts_of_width(3072)
    assert len(counts) == 43
    assert counts[:4] == (3072, 2765, 2488, 2239)
    assert counts[-1] == 37
    assert list(counts) == sorted(set(counts), reverse=True)


def test_grids_keep_to_multiples_and_to_the_least() -> None:
    assert counts_of_width(16, steps=100, least=3)[-1] == 3
    assert counts_of_width(16, multiple=8) == (16, 8)
    assert counts_of_width(20, multiple=8) == (20, 16, 8)
    assert counts_of_width(8, least=0, steps=60)[-2:] == (1, 0)
    assert counts_of_heads(6, least=2, multiple=2) == (6, 4, 2)
    assert counts_of_heads(1) == (1,)


def test_grids_refuse_nonsense() -> None:
    with pytest.raises(OptionError, match="size 4, least 5, multiple 1"):
        counts_of_heads(4, least=5)
    with pytest.raises(OptionError, match="size 4, least 1, multiple 0"):
        counts_of_width(4, multiple=0)
    with pytest.raises(OptionError, match=r"factor in \(0, 1\)"):
        counts_of_width(4, factor=1.0)
