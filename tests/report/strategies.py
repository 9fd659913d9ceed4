"""Reports of every kind: nothing known, everything known, odd names, odd numbers."""

from __future__ import annotations

from hypothesis import strategies as st

from secateurs.report import (
    FrontPoint,
    FrozenWidth,
    GroupChange,
    LatencySummary,
    LayerChange,
    Recovery,
    Report,
    RuntimeLayer,
    RuntimeSummary,
    Scores,
    Side,
    Speedup,
)

numbers = st.floats(allow_nan=False) | st.floats(0, 1)
amounts = st.integers(0, 10**13)
positive = st.floats(1e-9, 1e9)
names = st.sampled_from(["fc.weight", "a.b", "", "<b>", 'x" onload="y', "é & ü"]) | st.text(max_size=6)
metrics = st.sampled_from(
    ["accuracy", "top5", "loss", "perplexity", "accuracy_low", "accuracy_high", "epoch", "<i>", ""]
)
qualities = st.dictionaries(metrics, numbers, max_size=4)
shapes = st.lists(st.integers(1, 99), max_size=4).map(tuple)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=2).map(tuple) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
latencies = st.builds(
    LatencySummary,
    *[st.floats(0, 1e3)] * 3,
    threads=st.none() | st.integers(1, 9),
    batch=st.none() | st.integers(1, 9),
    device=names,
)
sides = st.builds(
    Side,
    amounts,
    st.none() | amounts,
    st.none() | st.floats(0, 1e15),
    st.none() | amounts,
    st.none() | amounts,
    st.none() | latencies,
    qualities,
)
layers = st.builds(
    LayerChange,
    names,
    names,
    shapes,
    shapes,
    amounts,
    amounts,
    st.none() | amounts,
    st.floats(0, 1e12),
    st.floats(0, 1e12),
    st.none() | positive,
    st.none() | positive,
)
scores = st.builds(Scores, numbers, numbers, numbers, st.none() | numbers)
groups = st.integers(0, 99).flatmap(
    lambda size: st.builds(
        GroupChange,
        names,
        names,
        st.just(size),
        st.integers(0, size),
        st.lists(names, max_size=9).map(tuple),
        st.none() | scores,
    )
)
curves = st.lists(st.tuples(st.floats(0, 1), numbers), max_size=4).map(lambda points: tuple(sorted(points)))
shares = st.none() | st.floats(0, 2)
runtimes = st.builds(
    RuntimeSummary,
    names,
    st.dictionaries(names, positive, max_size=3),
    st.none() | st.tuples(positive, positive, positive),
    st.none() | st.integers(1, 99),
    st.lists(
        st.builds(
            RuntimeLayer,
            names,
            st.sampled_from(["dense", "csr", "bag"]),
            shapes,
            st.floats(0, 1),
            st.none() | positive,
            st.none() | positive,
            names,
        ),
        max_size=3,
    ).map(tuple),
)


def reports() -> st.SearchStrategy[Report]:
    """Any report; lists are short, so that many are tried."""
    return st.builds(
        Report,
        model=names,
        form=st.sampled_from(["cut", "mask"]),
        before=sides,
        after=sides,
        budget=names | st.sampled_from(["macs<=50%,latency<=3ms", "2:4", "sparsity=90%", "speedup>=2x", "tokens<=5%"]),
        recipe=st.dictionaries(names, values, max_size=3),
        layers=st.lists(layers, max_size=3).map(tuple),
        groups=st.lists(groups, max_size=3).map(tuple),
        frozen=st.lists(st.builds(FrozenWidth, names, amounts, amounts, names), max_size=3).map(tuple),
        proof=st.none() | numbers,
        warnings=st.lists(names, max_size=2).map(tuple),
        stages=st.dictionaries(names, qualities, max_size=3),
        sensitivity=st.dictionaries(names, curves, max_size=3),
        front=st.lists(st.builds(FrontPoint, names, shares, shares, st.none() | numbers), max_size=3).map(tuple),
        history=st.none()
        | st.builds(Recovery, st.sampled_from(["epoch", "step"]), st.lists(qualities, max_size=3).map(tuple)),
        speedup=st.none() | st.builds(Speedup, positive, positive, positive),
        predicted_speedup=st.none() | positive,
        runtime=st.none() | runtimes,
        environment=st.dictionaries(names | st.sampled_from(["date", "secateurs"]), values, max_size=3),
        seconds=st.dictionaries(names, st.floats(0, 1e6), max_size=2),
        command=st.none() | names,
    )
