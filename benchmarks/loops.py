"""What training loops, networks and batches of tasks cost: beside other libraries, and beside what is aimed at."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures, loops_batch, loops_cnn, loops_digits
from benchmarks.harness import Record, Session
from benchmarks.loops_few_shot import MAML
from benchmarks.tables import decimals, lay_out, milliseconds, scientific, seeds_of, wrap

NAME = "loops"
ABOUT = (
    "training loops with warm starts, a CNN in batches of tasks, batches over single calls: against what is aimed at"
)

_PARTS = {module.CASE: module.run for module in (loops_digits, loops_batch, loops_cnn)}


def run(session: Session) -> None:
    """The parts that `--only` names, or all: digits, batch, cnn."""
    unknown = set(session.cases) - set(_PARTS)
    if unknown:
        raise SystemExit(f"loops has no part {', '.join(sorted(unknown))}; known are: {', '.join(_PARTS)}")
    for name, part in _PARTS.items():
        if name in (session.cases or _PARTS):
            part(session)


def show(records: Sequence[Record]) -> str:
    """A table for each problem, and what was aimed at beside what was measured."""
    measured = [record for record in records if record["kind"] == "method"]
    blocks = []
    for case, table in ((loops_digits.CASE, _digits), (loops_batch.CASE, _batch), (loops_cnn.CASE, _cnn)):
        of_case = [record for record in measured if record["case"] == case]
        for problem, precision in dict.fromkeys((record["problem"], record["precision"]) for record in of_case):
            here = [r for r in of_case if (r["problem"], r["precision"]) == (problem, precision)]
            commit = str(here[0]["environment"].get("commit"))
            title = f"{case}: {problem}  [{precision}, {seeds_of(here)}, commit {_short(commit)}]"
            failed = [
                f"{r['method']}: {r['status']}, {r['error']}" for r in here if "error" in r and "seconds" not in r
            ]
            rows = [r for r in here if "seconds" in r]
            blocks.append("\n".join([title, "", table(rows), *map(wrap, failed)]))
    return "\n\n\n".join([*blocks, _aims([record for record in records if record["kind"] == "aim"])])


def _short(commit: str) -> str:
    number, _, changes = commit.partition("+")
    return number[:7] + ("+" + changes if changes else "")


def _digits(rows: Sequence[Record]) -> str:
    """A training loop's methods; times of a step are medians, ratios medians of those of the same step."""
    first, second = loops_digits.YARDSTICKS
    header = [
        "method",
        "ms",
        "/ CG",
        "/ jaxopt",
        "gradients",
        "products",
        "compile CPU s",
        "operations",
        "loss",
        "error",
    ]
    table = [
        [
            row["method"],
            milliseconds(row["seconds"]),
            decimals(row["over"].get(first), 2),
            decimals(row["over"].get(second), 2),
            _count(row.get("num_gradients")),
            _count(row.get("num_hvps")),
            decimals(row["compile_cpu_seconds"], 1),
            f"{row['operations']:,}",
            f"{row['outer_loss']:.5f}",
            scientific(row["error"]),
        ]
        for row in rows
    ]
    told = [
        f"{row['method']}: {_statuses(row['statuses'])}"
        + ("." if row["estimate"] is None else f"; estimate {scientific(row['estimate'])}, ")
        + ("" if row["estimate"] is None else f"over the true error {decimals(row['estimate_over_error'], 2)}.")
        for row in rows
        if "statuses" in row
    ]
    return "\n".join([lay_out(header, table, left=(0,)), "", *map(wrap, told)])


def _batch(rows: Sequence[Record]) -> str:
    header = ["call", "ms", "/ one", "/ single calls", "executed", "alone", "reported", "compile CPU s", "operations"]
    table = [
        [
            row["method"],
            milliseconds(row["seconds"]),
            decimals(row.get("over_one"), 2),
            decimals(row.get("over_sum"), 2),
            _count(row.get("executed")),
            _count(row.get("executed_alone")),
            _count(row["num_gradients"]),
            decimals(row["compile_cpu_seconds"], 1),
            f"{row['operations']:,}",
        ]
        for row in rows
    ]
    return lay_out(header, table, left=(0,))


def _cnn(rows: Sequence[Record]) -> str:
    header = ["method", "ms", "/ MAML", "gradients", "/ plain ones", "compile CPU s", "operations", "loss", "statuses"]
    table = [
        [
            row["method"],
            milliseconds(row["seconds"]),
            decimals(row.get("over", {}).get(MAML), 2),
            _count(row["num_gradients"]),
            decimals(row.get("over_plain"), 2),
            decimals(row["compile_cpu_seconds"], 1),
            f"{row['operations']:,}",
            decimals(row.get("outer_loss"), 3),
            _statuses(row.get("statuses", {})),
        ]
        for row in rows
    ]
    return lay_out(header, table)


def _aims(records: Sequence[Record]) -> str:
    header = ["at most", "aimed at", "measured", "reached"]
    rows = [
        [
            f"{record['aim']} [{record['precision']}]",
            f"{record['target']:g}",
            decimals(record["measured"], 2),
            "-" if record["measured"] is None else "yes" if record["measured"] <= record["target"] else "no",
        ]
        for record in records
    ]
    reached = sum(row[-1] == "yes" for row in rows)
    known = sum(row[-1] != "-" for row in rows)
    return "\n".join([lay_out(header, rows), "", f"{reached} of {known} aims that could be measured are reached."])


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _statuses(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Times of the steps of the training loops."""
    rows = [r for r in records if r["case"] == loops_digits.CASE and r["kind"] == "method" and "seconds" in r]
    return [figures.draw_loops(rows, folder / "loops.png")] if rows else []
