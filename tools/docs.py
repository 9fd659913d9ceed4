"""Writes the generated pages of docs/ from the catalogue, the registries and the benchmark results.

`python -m tools.docs` writes them; `python -m tools.docs --check` fails where a page is stale.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

import secateurs.methods  # noqa: F401  (registers the catalogue)
from secateurs.core.allocate import allocations
from secateurs.core.catalogue import Method, catalogue
from secateurs.criteria import criteria

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"


def pages() -> dict[Path, str]:
    """Every generated page by path."""
    found = {DOCS / "systems" / f"{m.name}.md": system_page(m) for m in catalogue()}
    found[DOCS / "systems" / "README.md"] = systems_index()
    found[DOCS / "criteria.md"] = criteria_page()
    found[DOCS / "evidence.md"] = evidence_page()
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
                f"{method.run.__qualname__}{inspect.signature(method.run)}",
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
        "",
    ]
    body = [
        line for result in results_on_file() for line in evidence_of(result, f"## {result['name'].replace('_', ' ')}")
    ]
    return "\n".join([*head, *body]).rstrip() + "\n"


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
