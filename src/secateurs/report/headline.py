"""The one sentence that says what got smaller and faster, and what did not."""

from __future__ import annotations

from .data import LatencySummary, Report, Side, Speedup
from .findings import key_metric, left, speedup
from .words import factor, file_size, listed, metric, plural, share, value

__all__ = ["headline", "setting"]

# Below this many times faster nobody would notice; above this share of MACs left nobody would expect more.
NOTICEABLE, EXPECTED = 1.05, 0.6
_WHY_NOT = "small widths and memory-bound layers take time that MACs do not count"


def headline(report: Report) -> str:
    """One plain sentence: what got smaller and faster, and what did not."""
    clauses = _masked(report) if report.form == "mask" else _cut(report)
    return "; ".join([*clauses, *_runtime(report)]) + "."


def _runtime(report: Report) -> list[str]:
    """What the sparse runtime gains, where it gains what somebody would notice."""
    if report.runtime is None or report.runtime.speedup is None or report.runtime.speedup[0] < NOTICEABLE:
        return []
    return [f"{factor(report.runtime.speedup[0])} faster in the sparse runtime"]


def _cut(report: Report) -> list[str]:
    clauses = [_sizes(report.before, report.after), _file(report.before, report.after)]
    times, after = speedup(report), report.after.latency
    missing = [] if times else ["latency"]
    if times and times.median < NOTICEABLE and _is_smaller(report):
        clauses[0] = f"Smaller, but not faster: {clauses[0]}"
    if times:
        clauses += [_speed(times, after), _reason(times, report)]
    return _with_quality(clauses, report, missing)


def _masked(report: Report) -> list[str]:
    after = report.after
    zeros = None if after.nonzero is None or not after.params else 1 - after.nonzero / after.params
    what = "the pruned parameters are zero" if zeros is None else f"{share(zeros)} of the parameters are zero"
    times = speedup(report)
    file = _file(report.before, after) if _shrank(report.before, after) else ""
    if not file and (times is None or times.median < NOTICEABLE):
        clauses = [f"{what}, but the file and the latency are those of the dense model"]
    else:
        clauses = [what, file or "but the file is that of the dense model"]
        clauses.append(_speed(times, after.latency) if times else "latency was not measured")
    clauses[0] = f"Masked, not smaller: {clauses[0]}"
    return _with_quality(clauses, report, [])


def _with_quality(clauses: list[str], report: Report, missing: list[str]) -> list[str]:
    quality = _quality(report)
    unknown = missing if quality else [*missing, "quality"]
    if unknown:
        clauses.append(f"{listed(unknown)} {'was' if len(unknown) == 1 else 'were'} not measured")
    return [clause for clause in [*clauses, quality] if clause]


def _is_smaller(report: Report) -> bool:
    shares = [left(getattr(report.before, f), getattr(report.after, f)) for f in ("macs", "params")]
    return any(part is not None and part < 1 for part in shares)


def _sizes(before: Side, after: Side) -> str:
    sizes = {"MACs": left(before.macs, after.macs), "parameters": left(before.params, after.params)}
    known = {noun: part for noun, part in sizes.items() if part is not None}
    if not known:
        return "What is left of the model is unknown"
    text = listed([f"all {noun}" if part == 1 else f"{share(part)} of the {noun}" for noun, part in known.items()])
    if all(part == 1 for part in known.values()):
        return f"Nothing was removed: {text} are left"
    return f"{text[0].upper()}{text[1:]} are left"


def _shrank(before: Side, after: Side) -> bool:
    part = left(before.disk_bytes, after.disk_bytes)
    return part is not None and part < 0.95


def _file(before: Side, after: Side) -> str:
    for noun, sizes in (
        ("the file", (before.disk_bytes, after.disk_bytes)),
        ("its memory", (before.bytes, after.bytes)),
    ):
        if sizes[0] is not None and sizes[1] is not None:
            return _resized(noun, sizes[0], sizes[1])
    return ""


def _resized(noun: str, before: int, after: int) -> str:
    if file_size(before) == file_size(after):
        return f"{noun} stays at {file_size(before)}"
    return f"{noun} {'grew' if after > before else 'shrank'} from {file_size(before)} to {file_size(after)}"


def _speed(times: Speedup, after: LatencySummary | None) -> str:
    where = setting(after)
    spread = f"between {factor(times.p10)} and {factor(times.p90)}"
    if times.p10 <= 1 <= times.p90:
        return f"measured {factor(times.median)} the speed{where}, which is within the noise ({spread})"
    if 1 / NOTICEABLE < times.median < NOTICEABLE:
        return f"measured {factor(times.median)} the speed{where}, which nobody would notice"
    if times.median < 1:
        return f"measured {factor(1 / times.median)} slower{where}"
    return f"measured {factor(times.median)} faster{where}"


def _reason(times: Speedup, report: Report) -> str:
    macs = left(report.before.macs, report.after.macs)
    expected = macs is not None and macs <= EXPECTED
    return _WHY_NOT if expected and times.median < NOTICEABLE else ""


def setting(latency: LatencySummary | None) -> str:
    """Where and how a latency was measured, with a blank before; empty if that is unknown.

    >>> setting(LatencySummary(0.01, 0.01, 0.01, threads=2, batch=64))
    ' on this CPU (2 threads, batch 64)'
    """
    if latency is None:
        return ""
    device = "this CPU" if latency.device == "cpu" else f"device {' '.join(latency.device.split())}"
    threads = "" if latency.threads is None else plural(latency.threads, "thread")
    batch = "" if latency.batch is None else f"batch {latency.batch}"
    detail = ", ".join(filter(None, (threads, batch)))
    return f" on {device} ({detail})" if detail else f" on {device}"


def _quality(report: Report) -> str:
    name = key_metric(report)
    if name is None:
        return ""
    before, after = report.before.quality.get(name), report.after.quality.get(name)
    if after is None:
        return ""
    if before is None:
        return f"{metric(name)} is {value(name, after)}"
    old, new = value(name, before), value(name, after)
    return f"{metric(name)} stays at {new}" if old == new else f"{metric(name)} went from {old} to {new}"
