"""Remakes tables, pictures, the page of all of them and the numbers in README and docs from records alone."""

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import (
    beta_curves,
    doc_figures,
    estimators,
    gallery,
    plasticity,
    report_page,
    scaling_steps,
    sparse,
    speed,
    speed_scaling,
    speed_tables,
    trust,
    tuning,
)
from benchmarks.composition import attention, goals, hyperteacher, in_context, modules, preferences
from benchmarks.experiments import (
    analysis,
    bandit,
    bilevel_suite,
    omniglot,
    regularisation,
    sinusoids,
    spiking,
    where_to_learn,
)
from benchmarks.harness import PACKAGE_FOLDER, Record
from benchmarks.methods import BACKPROP, CONTRASTIVE, IMPLICIT_CG, TWICE
from benchmarks.registry import BENCHMARKS, Benchmark
from benchmarks.tables import memory, milliseconds, scientific, seeds_of

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Pages of docs/ that show the tables of benchmarks as they are.
_SHOWN: Mapping[str, Sequence[ModuleType]] = {
    "trust.md": (trust,),
    "records/tuning.md": (tuning,),
    "records/plasticity.md": (plasticity,),
    "sparse.md": (sparse,),
    "records/experiments.md": (sinusoids, regularisation),
    "records/omniglot.md": (omniglot,),
    "spiking.md": (spiking,),
    "where_to_learn.md": (where_to_learn,),
    "bandit.md": (bandit,),
    "records/bilevel_suite.md": (bilevel_suite,),
    "records/analysis.md": (analysis,),
    "hyperteacher.md": (hyperteacher,),
    "attention.md": (attention, in_context),
    "grid_worlds.md": (preferences, goals),
    "modules.md": (modules,),
}
# The four rows of README.md.
_README_ROWS = (CONTRASTIVE, TWICE, IMPLICIT_CG, BACKPROP)


def report(folder: Path, pictures: Path, *, check: bool) -> int:
    """Show the newest records of each benchmark, draw them, and bring the README up to date; the exit status."""
    records = load(folder)
    if not records:
        print(
            f"no records in {folder}: make some with `python -m benchmarks run all --records {folder}`", file=sys.stderr
        )
        return 1
    docs = PACKAGE_FOLDER.parent / "docs"
    pages = {PACKAGE_FOLDER.parent / "README.md": render_readme_block(records)}
    if docs.exists():
        pages[docs / "records" / "estimators.md"] = render_estimators_block(records)
    if newest_runs(records, speed.NAME):
        pages[docs / "records" / "speed.md"] = render_speed_block(records)
    for name, shown in _SHOWN.items():
        blocks = [render_shown_block(records, module) for module in shown if newest_runs(records, module.NAME)]
        if blocks:
            pages[docs / name] = "\n\n".join(blocks)
    if check:
        return max(_check(page, block) for page, block in pages.items())
    runs = {name: newest_runs(records, name) for name in BENCHMARKS}
    drawn = {}
    for name, benchmark in BENCHMARKS.items():
        for rows in runs[name]:
            print(f"{benchmark.show(rows)}\n\n")
        drawn[name] = draw(benchmark, [row for rows in runs[name] for row in rows], pictures)
        for path in drawn[name]:
            print(f"picture  {path}")
    page = pictures / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(report_page.render(runs, BENCHMARKS, drawn), encoding="utf-8")
    print(f"page     {page}")
    for page, block in pages.items():
        if not page.exists() or BEGIN not in page.read_text(encoding="utf-8"):
            print(f"no {page.name} with `{BEGIN}` to write to; what would stand there:\n\n{block}")
            continue
        page.write_text(replace_block(page.read_text(encoding="utf-8"), block), encoding="utf-8")
        print(f"numbers  {page}")
    if docs.exists():
        flat = {name: [row for part in runs[name] for row in part] for name in BENCHMARKS}
        drawn_for_docs = doc_figures.write(docs / "figures", flat[beta_curves.NAME], flat[analysis.NAME])
        for path in [*drawn_for_docs, *gallery.write(docs / "figures" / "gallery", flat)]:
            print(f"picture  {path}")
    return 0


def load(folder: Path) -> list[Record]:
    """All records of a folder, smoke runs left out; long ones may lie there compressed."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
    texts += [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.glob("*.jsonl.gz"))]
    records = [json.loads(line) for text in texts for line in text.splitlines() if line.strip()]
    return [record for record in records if not record["smoke"]]


def newest_runs(records: Sequence[Record], benchmark: str) -> list[list[Record]]:
    """Of each precision the newest run of each case, seed and budget of a benchmark, float32 first.

    A run of a few cases or seeds leaves what an earlier run measured of the others standing; a run with several
    precisions stays whole.
    """
    here = [record for record in records if record["benchmark"] == benchmark]
    newest: dict[tuple[str, str, Any, str], str] = {}
    for record in sorted(here, key=lambda record: str(record["date"])):
        newest[_part(record)] = record["run"]
    current = [record for record in here if newest[_part(record)] == record["run"]]
    runs = {
        name: tuple(dict.fromkeys(record["run"] for record in current if record["precision"] == name))
        for name in sorted({record["precision"] for record in current})
    }
    groups = dict.fromkeys(runs.values())
    whole = [group for group in groups if not any(set(group) < set(other) for other in groups)]
    return [[record for record in current if record["run"] in group] for group in whole]


def _part(record: Record) -> tuple[str, str, Any, str]:
    return record["precision"], str(record.get("case")), record.get("seed"), str(record.get("budget"))


def draw(benchmark: Benchmark, records: Sequence[Record], folder: Path) -> list[Path]:
    """The benchmark's pictures, or one line on how to get them."""
    if benchmark.draw is None or not records:
        return []
    try:
        return benchmark.draw(records, folder)
    except ImportError:
        print('no pictures: they need matplotlib, pip install ".[bench]"', file=sys.stderr)
        return []


def replace_block(text: str, block: str) -> str:
    """`text` with what stands between the two marks replaced."""
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _check(page: Path, block: str) -> int:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN in text and END in text and replace_block(text, block) == text:
        print(f"{page.name} agrees with the records")
        return 0
    print(f"{page.name} differs from the records: run `python -m benchmarks report`", file=sys.stderr)
    return 1


def render_readme_block(records: Sequence[Record]) -> str:
    """The README's numbers as Markdown: errors and times of four estimators in float32, memory, and their origin."""
    errors = newest_runs(records, estimators.NAME)[:1]
    rows = [row for row in errors[0] if row["method"] in _README_ROWS] if errors else []
    parts = [_errors_table(rows)] if rows else []
    lengths = newest_runs(records, scaling_steps.NAME)[:1]
    return "\n\n".join(
        [*parts, *map(scaling_steps.read, lengths), _provenance([*errors, *lengths], "python -m benchmarks")]
    )


def render_estimators_block(records: Sequence[Record]) -> str:
    """Errors and times of every estimator in both precisions, as Markdown."""
    errors = newest_runs(records, estimators.NAME)
    return "\n\n".join([*map(_errors_table, errors), _provenance(errors, "python -m benchmarks run estimators")])


def render_speed_block(records: Sequence[Record]) -> str:
    """What the speed records come to, as Markdown."""
    parts, timed = [], newest_runs(records, speed.NAME)
    for rows in timed:
        text = "\n".join(speed_tables.summary(rows))
        parts.append(f"In {rows[0]['precision']}, {seeds_of(rows)}:\n\n```text\n{text}\n```")
    for rows in newest_runs(records, speed_scaling.NAME):
        parts.append(f"```text\n{speed_scaling.show(rows)}\n```")
    return "\n\n".join([*parts, _provenance(timed, "python -m benchmarks run speed")])


def render_shown_block(records: Sequence[Record], module: ModuleType) -> str:
    """What the records of a benchmark come to, its table, as Markdown."""
    runs = newest_runs(records, module.NAME)
    shown = module.show([row for rows in runs for row in rows])
    return f"```text\n{shown}\n```\n\n{_provenance(runs, f'python -m benchmarks run {module.NAME}')}"


def _errors_table(rows: Sequence[Record]) -> str:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["case"]): _cell(row) for row in rows}
    precision = rows[0]["precision"]
    lines = [
        f"Relative error of the meta-gradient in {precision}, and time of one estimate:",
        "",
        f"| estimator | {' | '.join(cases)} |",
        f"|---|{'---|' * len(cases)}",
    ]
    for method in methods:
        lines.append(f"| {method} | {' | '.join(cells.get((method, case), '') for case in cases)} |")
    return "\n".join([*lines, "", *_memory_lines(rows)])


def _cell(row: Record) -> str:
    if row.get("relative_error") is None:
        return str(row["status"])
    mark = "" if row["status"] in ("CONVERGED", "FELL_BACK", "APPROXIMATE") else " †"
    return f"{scientific(row['relative_error'])}{mark}, {milliseconds(row['seconds'])} ms"


def _memory_lines(rows: Sequence[Record]) -> list[str]:
    largest = max(rows, key=lambda row: int(row["num_params"]))["case"]
    sizes = {row["method"]: row.get("temp_bytes") for row in rows if row["case"] == largest}
    if not (sizes.get(CONTRASTIVE) and sizes.get(BACKPROP)):
        return []
    dagger = (
        "† the status says that this number is not to be trusted. " if any("†" in _cell(row) for row in rows) else ""
    )
    return [
        f"{dagger}Temporary memory on {largest}: {memory(sizes[CONTRASTIVE])} for the default contrast, "
        f"{memory(sizes[BACKPROP])} for backprop."
    ]


def _provenance(runs: Sequence[Sequence[Record]], command: str) -> str:
    """When and where what is shown was measured, and how to make it again."""
    shown = [row for rows in runs for row in rows]
    newest = max(shown, key=lambda row: str(row["date"]))
    days = sorted({str(row["date"])[:10] for row in shown})
    # Claims are of all seeds, and have none of their own.
    by_seed = [row for row in shown if row.get("kind", "method") == "method"]
    by_seed = by_seed or [row for row in shown if row["kind"] != "claim"]
    measured, environment = " to ".join(dict.fromkeys([days[0], days[-1]])), newest["environment"]
    return (
        f"Measured {measured} with jax {environment['jax']} on {environment['cpu_count']} cores of "
        f"{environment['device']}, {seeds_of(by_seed)}. Remake: `{command}` to measure anew, "
        "`python -m benchmarks report` to rewrite this block from the committed records (`benchmarks/results`)."
    )
