"""Writes the generated pages of docs/ from the catalogue, the registries and the benchmark results.

`python -m tools.docs` writes them; `python -m tools.docs --check` fails where a page is stale.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path

import secateurs.methods  # noqa: F401  (registers the catalogue)
from benchmarks.architectures import COLLECTIONS, COLUMNS, COVERED, SKIPPED
from secateurs.core.allocate import allocations
from secateurs.core.catalogue import Method, catalogue
from secateurs.criteria import criteria

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
# Results that have a page of their own.
APART = ("architectures_", "rivals_")


def pages() -> dict[Path, str]:
    """Every generated page by path."""
    found = {DOCS / "systems" / f"{m.name}.md": system_page(m) for m in catalogue()}
    found[DOCS / "systems" / "README.md"] = systems_index()
    found[DOCS / "criteria.md"] = criteria_page()
    found[DOCS / "evidence.md"] = evidence_page()
    found[DOCS / "architectures.md"] = architectures_page()
    return found


def system_page(method: Method) -> str:
    """The page of one system: its record, and the docstring of the file that is the system."""
    module = sys.modules[method.run.__module__]
    lines = (module.__doc__ or "").strip().splitlines()
    record = [
        ("paper", f"{method.title}" + (f" (arXiv {method.arxiv})" if method.arxiv else "")),
        ("removes", ", ".join(method.units)),
        ("when", ", ".join(method.when)),
        ("how", method.how),
        ("needs", ", ".join(method.needs) or "nothing but the model"),
        ("call", f"`{method.run.__module__}.{method.run.__qualname__}`"),
        ("claim", method.claim),
    ]
    results = [r for r in results_on_file() if r["system"] == method.name]
    return (
        "\n".join(
            [
                f"# {method.name}",
                "",
                lines[0],
                "",
                table(("", ""), record),
                "",
                *_paragraphs(lines[1:]),
                "",
                "## Call",
                "",
                "```python",
                f"{method.run.__qualname__}{_signature(method)}",
                "```",
                "",
                inspect.getdoc(method.run) or "",
                "",
                *(line for result in results for line in evidence_of(result, "## Evidence")),
            ]
        ).rstrip()
        + "\n"
    )


def _call_text(doc: str) -> list[str]:
    """A function's docstring: what it returns as text, arguments and errors as they stand."""
    first, _, rest = doc.partition("\n\n")
    return [first, "", "```text", rest, "```"] if rest else [first]


def _paragraphs(lines: list[str]) -> list[str]:
    """Docstring text; what is indented is an equation or a list and stays as it is, as a code block."""
    out: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if indented != inside and (indented or line.strip()):
            out.append("```")
            inside = indented
        out.append(line[4:] if indented else line)
    return [*out, "```"] if inside else out


def _signature(method: Method) -> str:
    """The call's arguments; a default that is a function goes by its name, since its address changes with each run."""
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", str(inspect.signature(method.run)))


def systems_index() -> str:
    """The table of all systems."""
    rows = [(f"[{m.name}]({m.name}.md)", ", ".join(m.units), ", ".join(m.when), m.how, m.summary) for m in catalogue()]
    return f"# Systems\n\n{table(('system', 'removes', 'when', 'how', 'in one line'), rows)}\n"


def criteria_page() -> str:
    """The tables of criteria and allocation rules."""
    scored = [
        (f"`{c.name}`", c.summary, ", ".join(c.groups), ", ".join(c.needs) or "nothing", ", ".join(c.options), c.paper)
        for c in criteria()
    ]
    divided = [
        (
            f"`{a.name}`",
            (inspect.getdoc(a.rule) or "").partition("\n")[0],
            "yes" if a.needs_scores else "no",
            ", ".join(a.options),
        )
        for a in allocations()
    ]
    return "\n".join(
        [
            "# Criteria and allocation rules",
            "",
            "Any criterion works with any allocation rule that makes sense for its unit.",
            "",
            "## Criteria: how much a unit matters",
            "",
            table(("name", "score", "groups", "needs", "options", "source"), scored),
            "",
            "## Allocation: how much from where",
            "",
            table(("name", "rule", "ranks scores", "options"), divided),
            "",
        ]
    )


def evidence_page() -> str:
    """All benchmark results: the claim, whether it held here, and the figures."""
    head = [
        "# Evidence",
        "",
        "Each table comes from the JSON that the command above it writes to `benchmarks/results/`. A claim that did",
        "not hold at this scale is listed as such. Accuracies are in per cent; ± is the sample standard deviation.",
        "Which models can be cut is on [a page of its own](architectures.md).",
        "",
    ]
    body = [
        line
        for result in results_on_file()
        if not result["name"].startswith(APART)
        for line in evidence_of(result, f"## {result['name'].replace('_', ' ')}")
    ]
    return "\n".join([*head, *body]).rstrip() + "\n"


_CALL = """# Architectures

What comes of this call on each model, given nothing but the model and an example input: no head counts, no lists of
layers to ignore.

```python
sec.prune(model, x, budget="sparsity=50%", granularity="channel", allocation="uniform")
```

Covered means: cut, proven equal to the masked model, outputs of the same shapes, at least 20% of the parameters gone,
and a training step on a batch of two works. The last section says [what a model must be](#what-a-model-must-be).

## In total
"""


def architectures_page() -> str:
    """Which models can be cut without hints: totals, tables, what is not covered, others, and the contract."""
    results = {result["name"]: result for result in results_on_file()}
    own = {c: results[f"architectures_{c}"] for c in COLLECTIONS if f"architectures_{c}" in results}
    others = {c: results[f"rivals_{c}"] for c in COLLECTIONS if f"rivals_{c}" in results}
    missed = [(c, row[0], row[-1]) for c, result in own.items() for row in result["rows"] if row[-1] != COVERED]
    lines = [
        _CALL,
        table(("models", "covered", "of", "share", "goal", "skipped", "seconds"), map(_total, own.items())),
        "",
        *_compared(own, others),
        *(line for result in own.values() for line in evidence_of(result, f"## {_spelled(result)}")),
        "## Not covered",
        "",
        table(("collection", "model", "reason"), missed) if missed else "Nothing that was run.",
        "",
        *(line for result in others.values() for line in evidence_of(result, f"## Others: {_spelled(result)}")),
        (ROOT / "tools" / "contract.md").read_text(encoding="utf-8"),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _spelled(result: dict) -> str:
    """The name of a result's collection."""
    return result["name"].partition("_")[2].replace("huggingface", "Hugging Face")


def _total(item: tuple[str, dict]) -> tuple:
    """One collection's line: covered, run, share, goal, skipped, and seconds of all cuts."""
    collection, result = item
    tried = [row for row in result["rows"] if not row[-1].startswith(SKIPPED)]
    covered = sum(row[-1] == COVERED for row in tried)
    seconds = sum(float(row[COLUMNS.index("seconds")] or 0) for row in tried)
    share = f"{covered / max(len(tried), 1):.1%}"
    goal = f"{COLLECTIONS[collection].goal:.0%}"
    return collection, covered, len(tried), share, goal, len(result["rows"]) - len(tried), f"{seconds:.0f}"


def _compared(own: dict[str, dict], others: dict[str, dict]) -> list[str]:
    """How many of the models that others were tried on each covers; only those that secateurs was run on, too."""
    rows = []
    columns: list[str] = []
    for collection in [c for c in others if c in own]:
        verdicts = {row[0]: row[-1] for row in own[collection]["rows"]}
        tried = [row for row in others[collection]["rows"] if row[0] in verdicts]
        columns = others[collection]["columns"][1:]
        counts = [sum(row[i] == COVERED for row in tried) for i in range(1, len(columns) + 1)]
        rows.append((collection, len(tried), sum(verdicts[row[0]] == COVERED for row in tried), *counts))
    if not rows:
        return []
    said = "Covered by others, of the models that both were run on:"
    return [said, "", table(("models", "of", "secateurs, no hints", *columns), rows), ""]


def evidence_of(result: dict, heading: str) -> list[str]:
    """One result as a section."""
    machine = result["environment"]
    return [
        heading,
        "",
        f"Claim: {result['claim']}",
        "",
        f"**Here: {result['held']}**",
        "",
        f"`{result['command']}` — {result['data']}"
        + (f"; seeds {', '.join(map(str, result['seeds']))}" if result["seeds"] else "")
        + ".",
        *([result["note"]] if result["note"] else []),
        f"Measured {machine['date']}: torch {machine['torch']}, {machine['cpu']}, {machine['threads']} threads.",
        "",
        table(result["columns"], result["rows"]),
        "",
    ]


def results_on_file() -> list[dict]:
    """All recorded results, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def table(columns, rows) -> str:
    """A Markdown table."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])


def main() -> int:
    """Writes the pages, or says which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages()[path], encoding="utf-8")
        sys.stderr.write(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
