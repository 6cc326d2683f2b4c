"""Remakes tables, pictures and the README's numbers from records alone."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import estimators, scaling_steps
from benchmarks.harness import PACKAGE_FOLDER, Record
from benchmarks.methods import BACKPROP, CONTRASTIVE
from benchmarks.registry import BENCHMARKS, Benchmark
from benchmarks.tables import memory, milliseconds, scientific

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def report(folder: Path, pictures: Path, *, check: bool) -> int:
    """Show the newest records of each benchmark, draw them, and bring the README up to date; the exit status."""
    records = load(folder)
    if not records:
        print(
            f"no records in {folder}: make some with `python -m benchmarks run all --records {folder}`", file=sys.stderr
        )
        return 1
    block = render_readme_block(records)
    readme = PACKAGE_FOLDER.parent / "README.md"
    if check:
        return _check(readme, block)
    for benchmark in BENCHMARKS.values():
        for rows in newest_runs(records, benchmark.name):
            print(f"{benchmark.show(rows)}\n\n")
        for path in draw(benchmark, [row for rows in newest_runs(records, benchmark.name) for row in rows], pictures):
            print(f"picture  {path}")
    if not readme.exists() or BEGIN not in readme.read_text(encoding="utf-8"):
        print(f"no README.md with `{BEGIN}` to write to; what would stand there:\n\n{block}")
        return 0
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), block), encoding="utf-8")
    print(f"numbers  {readme}")
    return 0


def load(folder: Path) -> list[Record]:
    """All records of a folder, smoke runs left out."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines if line.strip()]
    return [record for record in records if not record["smoke"]]


def newest_runs(records: Sequence[Record], benchmark: str) -> list[list[Record]]:
    """Of each precision the newest run of a benchmark, float32 first; a run with several precisions stays whole."""
    here = [record for record in records if record["benchmark"] == benchmark]
    newest: dict[str, str] = {}
    for record in sorted(here, key=lambda record: str(record["date"])):
        newest[record["precision"]] = record["run"]
    return [
        [record for record in here if record["run"] == run]
        for run in dict.fromkeys(newest[name] for name in sorted(newest))
    ]


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


def _check(readme: Path, block: str) -> int:
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if BEGIN in text and END in text and replace_block(text, block) == text:
        print("README.md agrees with the records")
        return 0
    print("README.md differs from the records: run `python -m benchmarks report`", file=sys.stderr)
    return 1


def render_readme_block(records: Sequence[Record]) -> str:
    """The README's numbers as Markdown: errors and times of every estimator, memory, and where they come from."""
    parts = []
    for rows in newest_runs(records, estimators.NAME):
        parts.append(_errors_table(rows))
    for rows in newest_runs(records, scaling_steps.NAME)[:1]:
        parts.append(scaling_steps.read(rows))
    parts.append(_provenance(records))
    return "\n\n".join(parts)


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
    return [
        f"† the status says that this number is not to be trusted. Temporary memory on {largest}: "
        f"{memory(sizes[CONTRASTIVE])} for the default contrast, {memory(sizes[BACKPROP])} for backprop."
    ]


def _provenance(records: Sequence[Record]) -> str:
    newest = max(records, key=lambda record: str(record["date"]))
    environment = newest["environment"]
    return (
        f"Measured {newest['date'][:10]} with jax {environment['jax']} on {environment['cpu_count']} cores of "
        f"{environment['device']}, seed {newest['seed']}. Remake: `python -m benchmarks` to measure anew, "
        "`python -m benchmarks report` to rewrite this block from the committed records (`benchmarks/results`)."
    )
