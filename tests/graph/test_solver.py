"""The solver against values: what the types say stays is what stays of an array that went the same way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from secateurs.core.dims import Atom, Concat, Dim, Fixed, Product, atoms, concat, kept, product, size
from secateurs.graph.solver import Solver

SHAPES = [(4,), (6,), (8,), (12,), (2, 6), (4, 6), (8, 3), (2, 4, 3), (6, 4)]


class World:
    """Arrays of entry numbers beside their types, and a solver that sees only the types."""

    def __init__(self) -> None:
        self.solver = Solver()
        self.sources: list[tuple[Dim, ...]] = []
        self.arrays: list[np.ndarray] = []
        self.types: list[tuple[Dim, ...]] = []
        self.entries = 0

    def source(self, shape: tuple[int, ...]) -> None:
        dims = tuple(self.solver.fresh(n) for n in shape)
        self.sources.append(dims)
        self.put(self.entries + np.arange(math.prod(shape)).reshape(shape), dims)
        self.entries += math.prod(shape)

    def put(self, array: np.ndarray, dims: tuple[Dim, ...]) -> None:
        self.arrays.append(array)
        self.types.append(dims)

    def masks(self, draw: Callable[[int], list[bool]]) -> dict[str, Tensor]:
        live = {a.name: a.n for dims in self.sources for d in dims for a in atoms(self.solver.resolve(d))}
        return {name: torch.tensor(draw(n)) for name, n in live.items()}

    def check(self, masks: dict[str, Tensor]) -> None:
        """Every array keeps, by its types, exactly the entries that its sources keep by theirs."""
        stays = np.concatenate([self._outer(dims, masks).flatten() for dims in self.sources])
        for array, dims in zip(self.arrays, self.types, strict=True):
            assert tuple(map(size, dims)) == array.shape
            assert tuple(size(self.solver.resolve(d)) for d in dims) == array.shape
            np.testing.assert_array_equal(self._outer(dims, masks), stays[array])

    def _outer(self, dims: tuple[Dim, ...], masks: dict[str, Tensor]) -> np.ndarray:
        out = np.ones((), dtype=bool)
        for dim in dims:
            out = out[..., None] & kept(self.solver.resolve(dim), masks).numpy()
        return out


def reshape(world: World, at: int, sizes: tuple[int, ...]) -> None:
    dims = world.solver.reshape(world.types[at], sizes, "a reshape")
    world.put(world.arrays[at].reshape(sizes), tuple(dims))


def transpose(world: World, at: int, order: tuple[int, ...]) -> None:
    world.put(world.arrays[at].transpose(order), tuple(world.types[at][i] for i in order))


def cut_out(world: World, at: int, axis: int, start: int, stop: int) -> None:
    dims = list(world.types[at])
    dims[axis] = world.solver.cut_at(dims[axis], start, stop, "a slice")
    world.put(world.arrays[at].take(range(start, stop), axis), tuple(dims))


def join(world: World, left: int, right: int, axis: int) -> None:
    pairs = list(zip(world.types[left], world.types[right], strict=True))
    dims = [concat(a, b) if i == axis else world.solver.unify_all([a, b], "cat") for i, (a, b) in enumerate(pairs)]
    world.put(np.concatenate([world.arrays[left], world.arrays[right]], axis), tuple(dims))


@st.composite
def factorings(draw: st.DrawFn, n: int) -> tuple[int, ...]:
    """A shape with `n` entries."""
    sizes: list[int] = []
    while n > 1 and len(sizes) < 3:
        sizes.append(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])))
        n //= sizes[-1]
    return (*sizes, n) if n > 1 or not sizes else tuple(sizes)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)):
        world.source(shape)
    for _ in range(draw(st.integers(1, 7))):
        at = draw(st.integers(0, len(world.arrays) - 1))
        array = world.arrays[at]
        kind = draw(st.sampled_from(["reshape", "transpose", "slice", "cat", "tie"]))
        if kind == "reshape":
            reshape(world, at, draw(factorings(array.size)))
        elif kind == "transpose":
            transpose(world, at, tuple(draw(st.permutations(range(array.ndim)))))
        elif kind == "slice" and array.ndim:
            axis = draw(st.integers(0, array.ndim - 1))
            start = draw(st.integers(0, array.shape[axis] - 1))
            cut_out(world, at, axis, start, draw(st.integers(start + 1, array.shape[axis])))
        elif kind == "cat" and array.ndim:
            axis = draw(st.integers(0, array.ndim - 1))
            rest = [i for i, b in enumerate(world.arrays) if _joins(array, b, axis)]
            join(world, at, draw(st.sampled_from(rest)), axis)
        elif kind == "tie":
            other = draw(st.sampled_from([i for i, b in enumerate(world.arrays) if b.shape == array.shape]))
            for a, b in zip(world.types[at], world.types[other], strict=True):
                world.solver.unify(a, b, "an addition")
    return world


def _joins(a: np.ndarray, b: np.ndarray, axis: int) -> bool:
    return a.ndim == b.ndim and all(m == n for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis)


@given(worlds(), st.randoms(use_true_random=False))
def test_what_types_keep_is_what_values_keep(world, random) -> None:
    world.check(world.masks(lambda n: [random.random() < 0.6 for _ in range(n)]))


@given(worlds(), st.data())
def test_unify_is_idempotent_and_symmetric(world, data) -> None:
    dims = [d for dims in world.types for d in dims]
    a = data.draw(st.sampled_from(dims))
    b = data.draw(st.sampled_from([d for d in dims if size(d) == size(a)]))
    world.solver.unify(a, b, "once")
    first, second = world.solver.resolve(a), world.solver.resolve(b)
    # The two sides are one set of positions, though a product of a sum may be written in two ways.
    masks = world.masks(lambda n: [i % 3 != 1 for i in range(n)])
    assert torch.equal(kept(first, masks), kept(second, masks))
    world.solver.unify(b, a, "twice")
    world.solver.unify(a, b, "three times")
    assert (world.solver.resolve(a), world.solver.resolve(b)) == (first, second)


@given(st.lists(st.sampled_from([2, 3, 5]), min_size=2, max_size=5), st.data())
def test_refinements_do_not_depend_on_the_order(primes, data) -> None:
    """Views that merge the factors of one axis in different ways have one common refinement, whichever comes first."""
    cuts = st.sets(st.integers(1, len(primes) - 1))
    views = [_merged(primes, data.draw(cuts)) for _ in range(3)]

    def run(order: list[int]) -> list[int]:
        solver = Solver()
        width = solver.fresh(math.prod(primes))
        for i in order:
            solver.reshape([width], views[i], "a view")
        return [a.n for a in atoms(solver.resolve(width))]

    assert run([0, 1, 2]) == run(data.draw(st.permutations(range(3))))
    assert math.prod(run([0, 1, 2])) == math.prod(primes)


def _merged(primes: list[int], cuts: set[int]) -> list[int]:
    edges = [0, *sorted(cuts), len(primes)]
    return [math.prod(primes[a:b]) for a, b in itertools.pairwise(edges)]


def test_a_view_splits_an_atom_into_a_product() -> None:
    solver = Solver()
    width = solver.fresh(12)
    heads, inner = solver.reshape([width], [3, 4], "heads")
    assert (size(heads), size(inner)) == (3, 4)
    assert solver.resolve(width) == Product((heads, inner))


def test_two_views_of_one_axis_give_their_common_refinement() -> None:
    solver = Solver()
    width = solver.fresh(12)
    solver.reshape([width], [3, 4], "as heads")
    solver.reshape([width], [6, 2], "as pairs")
    assert [a.n for a in atoms(solver.resolve(width))] == [3, 2, 2]


def test_views_without_a_common_refinement_freeze_with_the_reason() -> None:
    solver = Solver()
    width = solver.fresh(12)
    solver.reshape([width], [3, 4], "as heads")
    assert solver.reshape([width], [4, 3], "the other way") == [Fixed(4), Fixed(3)]
    assert solver.resolve(width) == Fixed(12)
    assert solver.reason(width.name) == "reshaped across its boundaries: the other way"


def test_what_a_bad_view_does_not_cross_stays_free() -> None:
    solver = Solver()
    rows, left = solver.fresh(4), solver.fresh(6)
    solver.reshape([left], [3, 2], "pairs")
    assert solver.reshape([rows, left], [8, 3], "across the pairs") == [product(rows, Fixed(2)), Fixed(3)]
    assert solver.resolve(left) == Fixed(6)


def test_a_reshape_that_fails_late_keeps_what_it_had() -> None:
    solver = Solver()
    batch, width = solver.fresh(5), solver.fresh(6)
    first, *rest = solver.reshape([batch, width, Fixed(2)], [5, 4, 3], "a bad view")
    assert first == batch
    assert rest == [Fixed(4), Fixed(3)]
    assert solver.reason("#2") == "reshaped across its boundaries: a bad view"
    assert solver.reason("#1") is None


def test_flattening_and_unflattening_returns_the_same_types() -> None:
    solver = Solver()
    dims = [solver.fresh(3), solver.fresh(4)]
    (flat,) = solver.reshape(dims, [12], "flatten")
    assert solver.reshape([flat], [3, 4], "unflatten") == dims


def test_ones_come_and_go_in_a_reshape() -> None:
    solver = Solver()
    width = solver.fresh(6)
    assert solver.reshape([Fixed(1), width], [6, 1, 1], "ones") == [width, Fixed(1), Fixed(1)]


def test_an_empty_tensor_is_reshaped_to_its_sizes() -> None:
    solver = Solver()
    assert [size(d) for d in solver.reshape([Fixed(0), Fixed(4)], [2, 0], "empty")] == [2, 0]


def test_slices_split_an_atom_into_a_sum() -> None:
    solver = Solver()
    width = solver.fresh(10)
    middle = solver.cut_at(width, 2, 7, "a slice")
    assert str(solver.resolve(width)) == "#2+#4+#5"
    assert solver.resolve(middle) == Atom("#4", 5)


def test_a_slice_through_a_product_freezes_it_with_the_reason() -> None:
    solver = Solver()
    dim = product(solver.fresh(3), solver.fresh(4))
    assert solver.cut_at(dim, 0, 6, "half") == Fixed(6)
    assert solver.reason("#1") == solver.reason("#2") == "sliced inside a product: half"


def test_halves_of_a_product_cut_its_slow_factor() -> None:
    solver = Solver()
    dim = product(solver.fresh(4), Fixed(3))
    assert solver.cut_at(dim, 6, 12, "half") == product(Atom("#3", 2), Fixed(3))


def test_rows_of_a_concatenation_are_tied() -> None:
    """Channel shuffle over two groups of a concatenation of two: the parts become one."""
    solver = Solver()
    a, b = solver.fresh(4), solver.fresh(4)
    slow, fast = solver.reshape([concat(a, b)], [2, 4], "shuffle")
    assert slow == Fixed(2)
    assert solver.resolve(a) == solver.resolve(b) == solver.resolve(fast)


def test_freezing_keeps_the_first_reason_and_reaches_refinements() -> None:
    solver = Solver()
    width = solver.fresh(12)
    heads, inner = solver.reshape([width], [3, 4], "heads")
    solver.freeze(inner, "first")
    solver.freeze(width, "second")
    assert solver.resolve(width) == Fixed(12)
    assert (solver.reason(inner.name), solver.reason(heads.name)) == ("first", "second")


def test_unequal_sizes_freeze_both() -> None:
    solver = Solver()
    a, b = solver.fresh(4), solver.fresh(6)
    solver.unify(a, b, "a mistake")
    assert solver.resolve(a) == Fixed(4)
    assert solver.resolve(b) == Fixed(6)
    assert solver.reason(a.name) == "two layouts that do not align: a mistake"


def test_tying_to_a_number_freezes() -> None:
    solver = Solver()
    a = solver.fresh(4)
    solver.unify(Fixed(4), a, "an input")
    assert solver.resolve(a) == Fixed(4)
    assert solver.reason(a.name) == "tied to a fixed axis: an input"


@pytest.mark.parametrize("refine_first", [False, True])
def test_entanglement_is_inherited_by_refinements(refine_first) -> None:
    solver = Solver()
    width = solver.fresh(12)
    views = solver.reshape([width], [3, 4], "heads") if refine_first else []
    solver.entangle(width, "normalised over")
    views = views or solver.reshape([width], [3, 4], "heads")
    assert [solver.is_entangled(v.name) for v in views] == ["normalised over"] * 2
    assert solver.is_entangled(solver.fresh(5).name) is None


def test_a_product_turned_round_is_one_digit_repeated() -> None:
    """a·b = b·a for powers of two leaves one binary digit: the same in every place."""
    solver = Solver()
    a, b = solver.fresh(2), solver.fresh(4)
    solver.unify(product(a, b), product(b, a), "turned round")
    digits = list(atoms(solver.resolve(product(a, b))))
    assert len(digits) == 3
    assert len(set(digits)) == 1


def test_deep_chains_resolve() -> None:
    """A residual stream of many blocks is one long chain of ties."""
    solver = Solver()
    dims = [solver.fresh(8) for _ in range(600)]
    for a, b in itertools.pairwise(dims):
        solver.unify(b, a, "a residual")
    assert {solver.resolve(d) for d in dims} == {dims[0]}


def test_terms_are_in_normal_form() -> None:
    solver = Solver()
    a, b = solver.fresh(2), solver.fresh(4)
    (flat,) = solver.reshape([concat(a, b), Fixed(3)], [18], "flatten")
    assert flat == Concat((Product((a, Fixed(3))), Product((b, Fixed(3)))))
