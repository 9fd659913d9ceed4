"""Dimension types: what prints is read back, and positions are those of a reshaped array."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.dims import ONE, Atom, Concat, Dim, Fixed, Product, atoms, concat, index, kept, parse, product, size
from secateurs.core.errors import OptionError

SIZES = {"a": 3, "b": 2, "h": 4}
any_atom = st.sampled_from([Atom(name, n) for name, n in SIZES.items()])
any_fixed = st.builds(Fixed, st.integers(0, 4))
any_dim: st.SearchStrategy[Dim] = st.recursive(
    any_atom | any_fixed,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: product(*parts))
        | st.lists(inner, max_size=3).map(lambda parts: concat(*parts))
    ),
    max_leaves=5,
)


@given(any_dim)
def test_what_is_printed_is_read_back(dim: Dim) -> None:
    assert parse(str(dim), SIZES) == dim


def test_constructors_return_the_simplest_equal_term() -> None:
    a, b = Atom("a", 3), Atom("b", 2)
    assert product(a) is a
    assert product() == ONE == product(Fixed(1), Fixed(1))
    assert product(a, Fixed(2), Fixed(3)) == Product((a, Fixed(6)))
    assert product(Fixed(2), a, Fixed(3)) == Product((Fixed(2), a, Fixed(3)))
    assert product(product(a, b), Fixed(1)) == Product((a, b))
    assert concat() == Fixed(0)
    assert concat(a) is a
    assert concat(concat(a, Fixed(1)), Fixed(2), Fixed(0)) == Concat((a, Fixed(3)))


def test_a_product_of_sums_prints_with_brackets() -> None:
    a, b = Atom("a", 3), Atom("b", 2)
    assert str(product(concat(a, b), Fixed(4))) == "(a+b)·4"
    assert str(concat(a, product(b, Fixed(4)))) == "a+b·4"


@given(any_dim, st.dictionaries(st.sampled_from(list(SIZES)), st.integers(0, 2)))
def test_the_size_is_that_of_the_formula(dim: Dim, counts: dict[str, int]) -> None:
    formula = str(dim).replace("·", "*")
    assert size(dim, counts) == eval(formula, {}, {**SIZES, **counts})  # noqa: S307 - the test's own text
    assert size(dim) == eval(formula, {}, SIZES)  # noqa: S307 - the test's own text


@given(any_dim, st.data())
def test_as_many_positions_stay_as_the_counts_say(dim: Dim, data: st.DataObject) -> None:
    masks = {n: torch.tensor(data.draw(st.lists(st.booleans(), min_size=k, max_size=k))) for n, k in SIZES.items()}
    stays = kept(dim, masks)
    assert stays.shape == (size(dim),)
    assert int(stays.sum()) == size(dim, {name: int(mask.sum()) for name, mask in masks.items()})


def test_positions_of_a_product_are_row_major() -> None:
    h, a = Atom("h", 4), Atom("a", 3)
    flat = product(h, Fixed(2), a)
    assert torch.equal(index(flat, "h").view(4, 2, 3), torch.arange(4)[:, None, None].expand(4, 2, 3))
    assert torch.equal(index(flat, "a").view(4, 2, 3), torch.arange(3).expand(4, 2, 3))
    mask = torch.tensor([True, False, True])
    assert torch.equal(kept(flat, {"a": mask}).view(4, 2, 3), mask.expand(4, 2, 3))


def test_positions_of_a_sum_follow_each_other() -> None:
    a, b = Atom("a", 3), Atom("b", 2)
    joined = concat(a, Fixed(1), product(b, Fixed(2)), a)
    assert index(joined, "a").tolist() == [0, 1, 2, -1, -1, -1, -1, -1, 0, 1, 2]
    assert index(joined, "b").tolist() == [-1, -1, -1, -1, 0, 0, 1, 1, -1, -1, -1]
    assert kept(joined, {"b": torch.tensor([False, True])}).int().tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]


def test_positions_stay_exactly_when_their_unit_does() -> None:
    a, h = Atom("a", 3), Atom("h", 4)
    dim = concat(product(h, concat(Fixed(2), Fixed(1))), product(Fixed(2), concat(h, Fixed(3))))
    mask = torch.tensor([True, False, False, True])
    units = index(dim, "h")
    assert torch.equal(kept(dim, {"h": mask}), (units < 0) | mask[units.clamp(min=0)])
    assert bool(kept(dim, {}).all())
    assert index(dim, a.name).eq(-1).all()


def test_atoms_come_from_left_to_right() -> None:
    assert [a.name for a in atoms(parse("h·(a+3)+b+a", SIZES))] == ["h", "a", "b", "a"]
    assert list(atoms(Fixed(3))) == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a)", "unexpected '\\)'"),
        ("(a", "no closing bracket before ''"),
        ("a+", "'' is no number and no known atom"),
        ("q·2", "'q' is no number and no known atom"),
        ("²", "'²' is no number"),
        ("(a+b)h", "unexpected 'h'"),
    ],
)
def test_text_outside_the_notation_is_refused(text: str, part: str) -> None:
    with pytest.raises(OptionError, match=part):
        parse(text, SIZES)
