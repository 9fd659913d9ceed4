"""Budgets: read what is printed, refuse what makes no sense, list every fault at once."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.core.budget import Budget, Limit, Pattern, nearest_limit, nearest_sparsity, units_kept
from secateurs.core.errors import BudgetError, OptionError

READ = {
    "macs<=50%": Limit("macs", "<=", 0.5, True),
    "macs<=1.5G": Limit("macs", "<=", 1.5e9, False),
    "params<=5M": Limit("params", "<=", 5e6, False),
    "params<=1.5B": Limit("params", "<=", 1.5e9, False),
    "params <= 12K": Limit("params", "<=", 12e3, False),
    "params<=1e6": Limit("params", "<=", 1e6, False),
    "latency<=3ms": Limit("latency", "<=", 0.003, False),
    "latency<=250us": Limit("latency", "<=", 0.00025, False),
    "latency<=1.5s": Limit("latency", "<=", 1.5, False),
    "latency<=40%": Limit("latency", "<=", 0.4, True),
    "speedup>=2x": Limit("speedup", ">=", 2.0, False),
    "speedup>=1.5": Limit("speedup", ">=", 1.5, False),
    "memory<=200MB": Limit("memory", "<=", 200e6, False),
    "memory<=1GiB": Limit("memory", "<=", 2.0**30, False),
    "memory<=3KiB": Limit("memory", "<=", 3 * 1024.0, False),
    "bytes<=4096": Limit("bytes", "<=", 4096.0, False),
    "bytes<=2KB": Limit("bytes", "<=", 2000.0, False),
    "sparsity=90%": Limit("sparsity", "=", 0.9, True),
    "sparsity>=12.3%": Limit("sparsity", ">=", 0.123, True),
    "sparsity=0.9": Limit("sparsity", "=", 0.9, True),
    "sparsity=0%": Limit("sparsity", "=", 0.0, True),
    "tokens<=25%": Limit("tokens", "<=", 0.25, True),
    "tokens<=128": Limit("tokens", "<=", 128.0, False),
    "MACs<=50%": Limit("macs", "<=", 0.5, True),
}


@pytest.mark.parametrize(("text", "limit"), READ.items())
def test_a_limit_is_read(text: str, limit: Limit) -> None:
    assert Budget.parse(text) == Budget((limit,))


def test_patterns_and_several_limits_are_read() -> None:
    assert Budget.parse("2:4") == Budget(pattern=Pattern(2, 4))
    assert Budget.parse("4:8").pattern == Pattern(4, 8)
    joined = Budget.parse("macs<=50%, params<=5M,latency<=3ms")
    assert [limit.metric for limit in joined.limits] == ["macs", "params", "latency"]
    assert Budget.parse("2:4,params<=50%") == Budget((Limit("params", "<=", 0.5, True),), Pattern(2, 4))


def test_a_budget_is_returned_as_it_is() -> None:
    budget = Budget.parse("macs<=50%")
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("params<=1500000", "params<=1.5M"),
        ("params<=1.5B", "params<=1.5G"),
        ("params<=999", "params<=999"),
        ("latency<=0.003s", "latency<=3ms"),
        ("latency<=30ns", "latency<=0.03us"),
        ("memory<=0.2GB", "memory<=200MB"),
        ("bytes<=12", "bytes<=12B"),
        ("sparsity=0.123", "sparsity=12.3%"),
        ("speedup>=2", "speedup>=2x"),
        ("macs<=29%", "macs<=29%"),
        ("2:4, macs<=7%", "macs<=7%,2:4"),
    ],
)
def test_a_budget_prints_in_its_largest_unit(text: str, printed: str) -> None:
    assert str(Budget.parse(text)) == printed


shares = st.floats(min_value=1e-6, max_value=1.0)
amounts = st.floats(min_value=1e-9, max_value=1e18)
limits = st.one_of(
    st.builds(
        Limit, st.sampled_from(["macs", "params", "bytes", "latency", "tokens"]), st.just("<="), shares, st.just(True)
    ),
    st.builds(Limit, st.sampled_from(["macs", "params", "memory", "tokens"]), st.just("<="), amounts, st.just(False)),
    st.builds(Limit, st.just("latency"), st.just("<="), st.floats(1e-12, 1e6), st.just(False)),
    st.builds(Limit, st.just("speedup"), st.just(">="), st.floats(1.0, 1e6), st.just(False)),
    st.builds(
        Limit, st.just("sparsity"), st.sampled_from(["=", ">="]), st.floats(0, 1, exclude_max=True), st.just(True)
    ),
)
patterns = st.integers(2, 64).flatmap(lambda of: st.builds(Pattern, st.integers(1, of - 1), st.just(of)))
budgets = st.lists(limits, min_size=1, max_size=4, unique_by=lambda limit: limit.cost).flatmap(
    lambda chosen: st.builds(Budget, st.just(tuple(chosen)), st.none() | patterns)
)


@given(budgets)
def test_what_is_printed_is_read_back(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


def test_every_fault_is_listed_at_once_with_what_is_allowed() -> None:
    text = "macs>=50%,parms<=3,sparsity=100%,latency<=3,4:2,params<=150%,tokens<=5x,speedup<=2x"
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    message = str(caught.value)
    for part in (
        "'macs>=50%': macs takes <=, not >=: write 'macs<=50%'",
        "unknown metric 'parms'; the nearest are params",
        "sparsity 100% would remove everything",
        "latency is given in ns, us, ms, s, %, not bare",
        "4:2 must keep at least 1",
        "params is over 100%",
        "tokens is given in bare numbers, K, M, G, B, T, %, not 'x'",
        "write 'speedup>=2x'",
        "allowed are macs<=50%, params<=5M",
    ):
        assert part in message
    assert isinstance(caught.value, OptionError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "neither a metric"),
        ("50%", "neither a metric"),
        ("macs<=", "neither a metric"),
        ("macs<=50%,", "neither a metric"),
        ("macs=50%", "write 'macs<=50%'"),
        ("macs<50%", "write 'macs<=50%'"),
        ("macs==50%", "write 'macs<=50%'"),
        ("speedup<=2x", "write 'speedup>=2x'"),
        ("sparsity<=90%", "write 'sparsity=90%'"),
        ("sparsity==90%", "write 'sparsity=90%'"),
        ("latency>=3ms", "write 'latency<=3ms'"),
        ("flops<=50%", "unknown metric 'flops'; the nearest is macs"),
        ("speedup>=0.5x", "asks for a slower model"),
        ("speedup>=200%", "not as a share"),
        ("sparsity=90", "cannot read budget 'sparsity=90': sparsity 9000% is no share that can be removed"),
        ("sparsity=90", "sparsity lies in [0%, 100%): write 'sparsity=90%'; allowed are"),
        ("sparsity=900", "sparsity lies in [0%, 100%); allowed"),
        ("sparsity=-5%", "is no share that can be removed"),
        ("macs<=0%", "macs must be more than 0"),
        ("params<=-3M", "params must be more than 0"),
        ("params<=1e999", "must be a finite number"),
        ("memory<=200", "memory is given in B, KB"),
        ("4:4", "must keep at least 1 and fewer than all"),
        ("0:4", "must keep at least 1 and fewer than all"),
        ("macs<=50%,macs<=1G", "macs is limited twice"),
        ("macs>=50%,macs<=1G", "macs is limited twice"),
        ("memory<=1GB,bytes<=50%", "bytes is limited twice"),
        ("2:4,4:8", "N:M pattern is limited twice"),
    ],
)
def test_nonsense_is_refused_with_the_reason(text: str, part: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert part in str(caught.value)


@given(st.text(alphabet="macsprty<>=:%.,0123456789KMGxe -", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError as error:
        refused = str(error)
    else:
        refused = ""
        assert Budget.parse(str(budget)) == budget
    assert not refused or repr(text) in refused


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"a budget is text or a Budget, got 0\.5"):
        Budget.parse(0.5)  # type: ignore[arg-type]


def test_objects_are_held_to_the_same_rules() -> None:
    with pytest.raises(BudgetError, match="write 'macs<=50%'"):
        Limit("macs", ">=", 0.5, True)
    with pytest.raises(BudgetError, match="it must be relative"):
        Limit("sparsity", "=", 0.5, False)
    with pytest.raises(BudgetError, match="unknown metric"):
        Limit("energy", "<=", 0.5, True)
    with pytest.raises(BudgetError, match="finite"):
        Limit("macs", "<=", math.nan, False)
    with pytest.raises(BudgetError, match="must keep at least 1"):
        Pattern(4, 4)
    with pytest.raises(BudgetError, match="asks for nothing"):
        Budget()
    with pytest.raises(BudgetError, match="bytes is limited twice"):
        Budget((Limit("bytes", "<=", 0.5, True), Limit("memory", "<=", 0.5, True)))


def test_a_limit_is_found_by_metric_or_alias() -> None:
    budget = Budget.parse("memory<=200MB,sparsity=90%")
    assert budget.limit("sparsity") == Limit("sparsity", "=", 0.9, True)
    assert budget.limit("bytes") == budget.limit("memory") == budget.limits[0]
    assert budget.limit("macs") is None
    assert budget.limits[0].cost == "bytes"
    assert Pattern(2, 4).sparsity == 0.5


def test_units_kept_rounds_halves_to_the_even_number() -> None:
    assert units_kept(0.5203125, 1000) == 480
    assert units_kept(0.75, 10) == 2
    assert units_kept(0.25, 10) == 8
    assert units_kept(0.9, 268_336) == 26_834
    assert units_kept(0.0, 7) == 7


@given(st.floats(1e-6, 0.999), st.sampled_from(["macs", "params", "speedup"]))
def test_the_nearest_limit_is_feasible_and_near(share: float, metric: str) -> None:
    asked = Limit("macs", "<=", 1e-9, True) if metric == "macs" else Limit("params", "<=", 1.0, False)
    if metric == "speedup":
        nearest = nearest_limit(Limit("speedup", ">=", 1e9, False), 1 + share)
        assert (1 + share) * 0.99 <= nearest.value <= 1 + share
        return
    value = share if metric == "macs" else share * 1e9
    nearest = nearest_limit(asked, value)
    assert value <= nearest.value <= value * 1.01
    assert len(str(nearest).removeprefix(f"{metric}<=").strip("%KMG").replace(".", "").strip("0")) <= 3


@given(st.integers(1, 10**6).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_the_nearest_sparsity_keeps_enough_and_hardly_more(case: tuple[int, int]) -> None:
    keep, total = case
    sparsity = nearest_sparsity(keep, total).value
    assert keep <= units_kept(sparsity, total) <= keep * 1.01 + 1


def test_what_is_given_for_a_budget_is_named_by_its_kind_where_it_is_long() -> None:
    with pytest.raises(BudgetError, match=r"a budget is text or a Budget, got a list; allowed are"):
        Budget.parse([0.123456] * 20)  # type: ignore[arg-type]
