"""The golden record: what 38 small configurations compute, spend and compile to.

A refactoring shows with it that it changed nothing. A redesign shows what it changed.

    python -m benchmarks.golden                     measure, print a table, write results/golden.json
    python -m benchmarks.golden --record            write the committed record instead
    python -m benchmarks.golden --against RECORD    print what changed since; exit status 1 if anything got worse
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import contrastive_meta as cm
from benchmarks.counting import measure_program
from benchmarks.golden_cases import CONFIGURATIONS, Configuration, Outcome
from benchmarks.golden_problems import build, exact
from benchmarks.harness import (
    COMMITTED_RECORDS,
    PICTURES,
    Progress,
    Record,
    environment,
    first_line,
    flatten,
    plain,
    precision,
    relative_error,
)

NAME = "golden.json"
# Counts that are exact on any machine: more of them is worse.
COUNTS = ("inner_sites", "outer_sites", "equations", "operations", "temporary_bytes", "num_gradients", "num_hvps")
_TRUSTED = 3.0  # an estimate within this factor of the true error

# Key, heading, and how a value is shown.
Column = tuple[str, str, Callable[[Any], str]]
COLUMNS: Sequence[Column] = (
    ("error", "error", lambda value: f"{value:.1e}"),
    ("error_estimate", "estimate", lambda value: f"{value:.1e}"),
    ("floor", "floor", lambda value: f"{value:.0e}"),
    ("status", "status", str),
    ("num_gradients", "gradients", str),
    ("num_hvps", "products", str),
    ("inner_sites", "inner", str),
    ("outer_sites", "outer", str),
    ("equations", "equations", str),
    ("operations", "operations", str),
    ("temporary_bytes", "bytes", str),
    ("seconds", "compile s", lambda value: f"{value:.1f}"),
    ("norm", "norm", lambda value: f"{value:.6g}"),
    ("hash", "hash", str),
)


def measure(configuration: Configuration) -> Record:
    """Compile and run one configuration, and hold it against the exact meta-gradient.

    `floor` is the relative error below which the precision cannot be held to account: ten roundings, or one rounding
    times the condition number of the inner Hessian. Of a batch, gradients and products are added up, and the worst
    status and the largest estimate are taken. What an interface does not report is None.
    """
    built = build(configuration.problem, configuration.x64)
    with precision(configuration.x64):

        def compute(meta_params: Any, task: Any) -> Outcome:
            return configuration.way(built.losses, meta_params, task)

        program = measure_program(compute, built.meta_params, built.task)
        outcome: Outcome = program.run(built.meta_params, built.task)
        record: Record = {key: getattr(program, key) for key in COUNTS[:5]} | {"seconds": round(program.seconds, 2)}
        record |= _reported(outcome.diagnostics)
        grad = flatten(outcome.grad)
        record["norm"] = float(np.linalg.norm(grad))
        record["hash"] = hashlib.sha256(grad.tobytes()).hexdigest()[:10]
    reference, condition = exact(built, outcome.params)
    record["error"] = relative_error(outcome.grad, reference)
    record["floor"] = float(np.finfo(np.float64 if configuration.x64 else np.float32).eps) * max(10.0, condition)
    return record


def _reported(diagnostics: cm.Diagnostics | None) -> Record:
    if diagnostics is None:
        return {"num_gradients": None, "num_hvps": None, "error_estimate": None, "status": None}
    return {
        "num_gradients": int(np.sum(diagnostics.num_gradients)),
        "num_hvps": int(np.sum(diagnostics.num_hvps)),
        "error_estimate": float(np.max(diagnostics.error_estimate)),
        "status": cm.Status(int(np.max(diagnostics.status))).name,
    }


def worse(old: Record, new: Record) -> list[str]:
    """What of a configuration got worse, in words."""
    if "exception" in new:
        return [] if "exception" in old else [f"raises {new['exception']}"]
    if "exception" in old:
        return []
    found = []
    # A number that is not finite is None: an error that cannot be told is no error to live with.
    if _number(new["error"]) > max(2 * _number(old["error"]), new["floor"]):
        found.append("error more than doubled")
    if old["error_estimate"] is not None and _distrust(old) <= _TRUSTED < _distrust(new):
        found.append(f"estimate off by a factor {_distrust(new):.1f}")
    if old["status"] != new["status"]:
        found.append("another status")
    for key in COUNTS:
        if old[key] is not None and new[key] is not None and new[key] > old[key]:
            found.append(f"more {key}")
    return found


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _distrust(record: Record) -> float:
    """The factor between estimated and true error, either way; what is below the floor counts as the floor."""
    estimate, error = (max(_number(record[key]), record["floor"]) for key in ("error_estimate", "error"))
    return max(estimate / error, error / estimate) if math.isfinite(estimate) and math.isfinite(error) else math.inf


def table(records: Mapping[str, Record]) -> str:
    """All records, a line each."""
    rows = [["configuration", *(heading for _, heading, _ in COLUMNS)]]
    for name, record in records.items():
        rows.append([name, *(_shown(record, column) for column in COLUMNS)])
        if "exception" in record:
            rows[-1][1] = "raised"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{name}: {r['exception']}" for name, r in records.items() if "exception" in r)])


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ]


def _shown(record: Record, column: Column) -> str:
    key, _, show = column
    return "-" if record.get(key) is None else show(record[key])


def comparison(old: Mapping[str, Record], new: Mapping[str, Record]) -> tuple[str, bool]:
    """What changed, a paragraph for each configuration that did; and whether anything got worse."""
    lines, same, bad = [], 0, 0
    for name, record in new.items():
        if name not in old:
            lines.append(f"{name}: new")
            continue
        before, flags = old[name], worse(old[name], record)
        changed = [
            f"  {heading:<11}{_shown(before, column):>20} -> {_shown(record, column)}"
            for column in COLUMNS
            if (heading := column[1]) != "compile s" and before.get(column[0]) != record.get(column[0])
        ]
        same, bad = same + (not changed), bad + bool(flags)
        if changed or flags:
            seconds = " -> ".join(str(either.get("seconds", "-")) for either in (before, record)) + " s to compile"
            lines += [f"{name} ({seconds})", *changed, *(f"  WORSE: {flag}" for flag in flags)]
    equal_grads = sum(name in old and old[name].get("hash") == record.get("hash") for name, record in new.items())
    lines.append(
        f"{len(new)} configurations: {same} unchanged, {equal_grads} with the same gradient to the bit, {bad} worse"
    )
    return "\n".join(lines), bad > 0


def load(path: Path) -> dict[str, Record]:
    """The records of a file by name."""
    records: dict[str, Record] = json.loads(path.read_text(encoding="utf-8"))["configurations"]
    return records


def save(path: Path, records: Mapping[str, Record]) -> None:
    """Write records, a line each; those of the file that were not measured now are kept."""
    records = (load(path) if path.exists() else {}) | dict(records)
    names = [configuration.name for configuration in CONFIGURATIONS if configuration.name in records]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(records[name], allow_nan=False)}" for name in names)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'{{"environment": {json.dumps(environment())},\n "configurations": {{\n{lines}\n}}}}\n'
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print as the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden", description="The golden record.")
    parser.add_argument("--record", action="store_true", help=f"write the committed {NAME}")
    parser.add_argument("--against", type=Path, default=None, help="a record to compare with")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    options = parser.parse_args(arguments)
    chosen = [configuration for configuration in CONFIGURATIONS if options.only in configuration.name]
    if not chosen:
        parser.error(f"no configuration's name contains {options.only!r}")
    old = load(options.against) if options.against is not None else {}
    path = (COMMITTED_RECORDS if options.record else PICTURES) / NAME
    records: dict[str, Record] = {}
    with Progress() as progress:
        progress.begin("golden record", len(chosen))
        for i, configuration in enumerate(chosen):
            progress.step(f"{i + 1:2} of {len(chosen)}: {configuration.name}")
            try:
                records[configuration.name] = plain(measure(configuration))
            except Exception as error:
                records[configuration.name] = {"exception": first_line(error)}
            save(path, records)
    bad = False
    if options.against is None:
        print(table(records))
    else:
        text, bad = comparison(old, records)
        print(text)
    print(f"record  {path}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
