"""Temporary memory and time against the number of inner steps: flat for contrast and implicit, growing for backprop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contrastive_meta as cm
from benchmarks import figures
from benchmarks.cases import LOGISTIC, prepare
from benchmarks.harness import Record, Session, first_line, precision, relative_error
from benchmarks.methods import BACKPROP, CHECKPOINTED, CONTRASTIVE, IMPLICIT_CG, TWICE, all_methods
from benchmarks.tables import lay_out, memory, milliseconds, scientific, wrap

NAME = "scaling_steps"
ABOUT = "compiled temporary memory and time against 10 to 10,000 inner steps: contrast, implicit CG, backprop"

_METHODS = (CONTRASTIVE, TWICE, IMPLICIT_CG, BACKPROP, CHECKPOINTED)


def run(session: Session) -> None:
    """Logistic regression on breast cancer; every number of steps is a program of its own."""
    lengths = (10, 100) if session.smoke else (10, 100, 1000, 10_000)
    measure(session, lengths, (CONTRASTIVE, BACKPROP) if session.smoke else _METHODS)


def measure(session: Session, lengths: Sequence[int], chosen: Sequence[str], **fields: str) -> None:
    """Memory, time and error of each method at each number of inner steps; `fields` go into every record."""
    x64 = bool(session.x64)
    session.progress.begin(f"{LOGISTIC.name}: the reference", 1)
    prepared = prepare(LOGISTIC, session, x64)
    instance = prepared.instance
    for num_steps in lengths:
        methods = all_methods(prepared.tuning._replace(num_steps=num_steps))
        calls = {
            name: (_estimate, (methods[name].estimator, instance.problem, instance.meta_params, instance.task))
            for name in chosen
        }
        with precision(x64):
            measured = session.measure(f"{num_steps} inner steps", calls, repeats=3)
        for name, outcome in measured.items():
            common = {"case": LOGISTIC.name, "title": LOGISTIC.title, "method": name, "num_steps": num_steps, **fields}
            if isinstance(outcome, Exception):
                session.record(x64=x64, status="RAISED", error=first_line(outcome), **common)
                continue
            told = outcome.output.diagnostics
            session.record(
                x64=x64,
                status=cm.Status(int(told.status)).name,
                num_gradients=int(told.num_gradients),
                num_hvps=int(told.num_hvps),
                relative_error=relative_error(outcome.output.grad, prepared.reference),
                seconds=outcome.seconds,
                spread=outcome.spread,
                compile_seconds=outcome.compile_seconds,
                temp_bytes=outcome.temp_bytes,
                **common,
            )


def _estimate(
    estimator: cm.MetaGradientEstimator, problem: cm.BilevelProblem, meta_params: Any, task: Any
) -> cm.MetaGradient:
    return estimator.estimate(problem, meta_params, task)


def show(records: Sequence[Record]) -> str:
    """A row for each estimator and number of steps."""
    header = ["estimator", "inner steps", "memory", "gradients", "time (ms)", "+-", "rel. error", "status"]
    rows = [
        [
            record["method"],
            f"{record['num_steps']:,}",
            memory(record.get("temp_bytes")),
            _evaluated(record),
            milliseconds(record.get("seconds")),
            milliseconds(record.get("spread")),
            scientific(record.get("relative_error")),
            record["status"],
        ]
        for name in dict.fromkeys(record["method"] for record in records)
        for record in records
        if record["method"] == name
    ]
    first = records[0]
    title = f"Memory and time against inner steps: {first['title']}  [{first['precision']}, seed {first['seed']}]"
    return "\n".join([title, "", lay_out(header, rows), "", wrap(read(records))])


def _evaluated(record: Record) -> str:
    """Gradients and Hessian-vector products that were executed; a dash where an older record does not say."""
    return f"{record['num_gradients'] + record['num_hvps']:,}" if "num_gradients" in record else "-"


def read(records: Sequence[Record]) -> str:
    """What the table says, in one sentence."""
    ours, full = (_grown(records, name) for name in (CONTRASTIVE, BACKPROP))
    if not (ours and full):
        return "The backend does not tell how much memory a program takes."
    least, most = (sorted(record["num_steps"] for record in records)[k] for k in (0, -1))
    return (
        f"From {least:,} to {most:,} inner steps the contrast's memory grows {ours[1] / ours[0]:.2f}-fold "
        f"(to {memory(ours[1])}), backprop's {full[1] / full[0]:,.0f}-fold (to {memory(full[1])}). Where the "
        "steps are too few to learn, the statuses say so; backprop answers for the steps taken, finished or not."
    )


def _grown(records: Sequence[Record], name: str) -> tuple[int, int] | None:
    """Memory of the shortest and of the longest run."""
    rows = sorted((r["num_steps"], r["temp_bytes"]) for r in records if r["method"] == name and r.get("temp_bytes"))
    return (rows[0][1], rows[-1][1]) if rows else None


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Memory and time, log-log."""
    return [figures.draw_scaling(records, folder / "scaling_steps.png")]
