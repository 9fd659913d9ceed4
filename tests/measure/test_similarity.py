"""Linear CKA: invariances, both forms, streams, and the unbiased estimate against its definition."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.core.errors import DataError, OptionError
from secateurs.measure.similarity import Similarity, linear_cka, output_similarity


def draw(seed: int, rows: int, features: int) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed: int, rows: int, p: int = 3, q: int = 5) -> tuple[Tensor, Tensor]:
    x = draw(seed, rows, p)
    return x, x @ draw(seed + 1, p, q) + 0.5 * draw(seed + 2, rows, q)


def test_a_known_number() -> None:
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert linear_cka(x, x * torch.tensor([1.0, 2])) == pytest.approx(20 / 544**0.5, abs=1e-12)
    assert linear_cka(x, x * torch.tensor([1.0, 2])) == pytest.approx(0.857493, abs=1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("form", ["features", "gram"])
def test_turned_scaled_and_shifted_is_the_same(debiased: bool, form: str) -> None:
    x = draw(0, 12, 4)
    turn = torch.linalg.qr(draw(1, 4, 4)).Q
    assert linear_cka(x, x, debiased=debiased, form=form) == pytest.approx(1, abs=1e-10)
    assert linear_cka(x, -3 * x @ turn + 100, debiased=debiased, form=form) == pytest.approx(1, abs=1e-9)


def test_orthogonal_samples_are_not_alike() -> None:
    x, y = torch.tensor([[1.0], [-1], [0], [0]]), torch.tensor([[0.0], [0], [1], [-1]])
    assert linear_cka(x, y) == 0


@given(seed=st.integers(0, 10_000), rows=st.integers(5, 30), debiased=st.booleans(), cut=st.integers(1, 4))
def test_forms_and_streams_agree(seed: int, rows: int, debiased: bool, cut: int) -> None:
    x, y = pair(seed, rows)
    stream = Similarity(debiased=debiased)
    for part in (slice(0, cut), slice(cut, None)):
        stream.add(x[part] + 7, y[part] - 7)
    gram = linear_cka(x, y, debiased=debiased, form="gram")
    assert linear_cka(x, y, debiased=debiased, form="features") == pytest.approx(gram, abs=1e-10)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(gram, abs=1e-10)
    assert stream.value == pytest.approx(gram, abs=1e-10)


def u_statistic(k: Tensor, m: Tensor) -> float:
    """The unbiased HSIC from its definition: the mean over all ordered quadruples of different samples."""
    n = len(k)
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(n), 4)]
    return float(torch.stack(terms).mean())


def test_the_debiased_form_is_its_definition() -> None:
    x, y = pair(3, 6)
    k, m = x @ x.T, y @ y.T
    expected = u_statistic(k, m) / (u_statistic(k, k) * u_statistic(m, m)) ** 0.5
    assert linear_cka(x, y, debiased=True) == pytest.approx(expected, abs=1e-10)


def test_debiasing_helps_where_samples_are_few() -> None:
    pairs = [(draw(2 * s, 20, 200), draw(2 * s + 1, 20, 200)) for s in range(20)]
    assert min(linear_cka(x, y) for x, y in pairs) > 0.8
    assert abs(sum(linear_cka(x, y, debiased=True) for x, y in pairs) / 20) < 0.05


def test_auto_takes_the_cheaper_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Similarity, "add", lambda *_: pytest.fail("features were used"))
    assert linear_cka(draw(0, 5, 6), draw(1, 5, 3)) > 0


def test_outputs_of_models_batch_by_batch() -> None:
    torch.manual_seed(0)
    a, b, data = nn.Linear(4, 3), nn.Linear(4, 3), [torch.randn(6, 4) for _ in range(3)]
    a.train()
    every = torch.cat(data)
    assert output_similarity(a, b, data) == pytest.approx(linear_cka(a(every), b(every)), abs=1e-6)
    assert output_similarity(a, b, data, limit=1) == pytest.approx(linear_cka(a(data[0]), b(data[0])), abs=1e-6)
    assert output_similarity(a, b, data, softmax=True) == pytest.approx(
        linear_cka(a(every).softmax(1), b(every).softmax(1)), abs=1e-6
    )
    assert a.training


def test_a_token_is_a_sample() -> None:
    torch.manual_seed(0)
    a, b, ids = nn.Embedding(9, 4), nn.Embedding(9, 4), torch.arange(8).view(2, 4)
    assert output_similarity(a, b, [ids]) == pytest.approx(linear_cka(a.weight[:8], b.weight[:8]), abs=1e-10)


@pytest.mark.parametrize("form", ["features", "gram"])
def test_constant_outputs_are_refused(form: str) -> None:
    x, constant = draw(0, 8, 3), torch.full((8, 3), 0.1)
    with pytest.raises(DataError, match="outputs of the second network are the same for all samples"):
        linear_cka(x, constant, form=form)
    with pytest.raises(DataError, match="outputs of the first network are the same"):
        linear_cka(constant, x, form=form)


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match=r"shapes \(3, 2\) and \(4, 2\)"):
        linear_cka(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(DataError, match="at least 2 samples, got 1"):
        linear_cka(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(DataError, match="at least 4 samples, got 3"):
        linear_cka(draw(0, 3, 2), draw(1, 3, 2), debiased=True)
    with pytest.raises(DataError, match="the data is empty"):
        output_similarity(nn.Linear(1, 1), nn.Linear(1, 1), [])
    with pytest.raises(OptionError, match="form must be"):
        linear_cka(draw(0, 3, 2), draw(0, 3, 2), form="fast")
    seen = Similarity()
    seen.add(draw(0, 3, 2), draw(1, 3, 2))
    with pytest.raises(DataError, match="a batch has 3 and 2 features, the first one had 2 and 2"):
        seen.add(draw(0, 3, 3), draw(1, 3, 2))


def test_the_debiased_form_may_have_no_value() -> None:
    x = torch.eye(4, dtype=torch.float64)
    with pytest.raises(DataError, match="too few samples"):
        linear_cka(x, x, debiased=True)
