"""Every estimator on four problems with real data: distance from the exact meta-gradient, cost, status."""

from collections.abc import Sequence
from typing import Any

import contrastive_meta as cm
from benchmarks.cases import CASES, MLP, RIDGE, Case, Prepared, prepare
from benchmarks.harness import NUM_COMPILING, Record, Session, cosine, first_line, flatten, precision, relative_error
from benchmarks.methods import BACKPROP, CONTRASTIVE, FORWARD, IMPLICIT_CG, Method, all_methods
from benchmarks.tables import decimals, lay_out, memory, milliseconds, scientific, wrap

NAME = "estimators"
ABOUT = "every estimator on ridge, logistic regression, data cleaning and a tanh MLP, against exact meta-gradients"

_SMOKE = {RIDGE.name: (CONTRASTIVE, IMPLICIT_CG, BACKPROP), MLP.name: (CONTRASTIVE,)}


def run(session: Session) -> None:
    """Measure case by case; each row is a record."""
    x64 = bool(session.x64)
    for case in CASES:
        if session.smoke and case.name not in _SMOKE:
            continue
        session.progress.begin(f"{case.name}: the reference", 1)
        prepared = prepare(case, session, x64)
        methods = {
            name: method
            for name, method in all_methods(prepared.tuning).items()
            if (name in case.methods or not case.methods) and (not session.smoke or name in _SMOKE[case.name])
        }
        with precision(x64):
            _run_case(session, case, prepared, methods, x64)


def _run_case(session: Session, case: Case, prepared: Prepared, methods: dict[str, Method], x64: bool) -> None:
    instance = prepared.instance
    calls = {
        name: (_estimate, (method.estimator, instance.problem, instance.meta_params, instance.task))
        for name, method in methods.items()
    }
    measured = session.measure(
        f"{case.name}: {len(calls)} estimators", calls, repeats=1 if session.smoke else case.repeats
    )
    for name, outcome in measured.items():
        session.record(
            x64=x64,
            case=case.name,
            title=case.title,
            method=name,
            settings=methods[name].settings,
            learner=f"Nesterov, {prepared.tuning.num_steps} steps of {prepared.tuning.step_size:.3g}, "
            f"momentum {prepared.tuning.momentum:.3f}",
            num_steps=prepared.tuning.num_steps,
            num_params=prepared.tuning.num_params,
            num_meta=prepared.tuning.num_meta,
            reference=prepared.reference_text,
            reference_converged=prepared.converged,
            left_out=case.left_out,
            **_row(outcome, prepared),
        )


def _estimate(
    estimator: cm.MetaGradientEstimator, problem: cm.BilevelProblem, meta_params: Any, task: Any
) -> cm.MetaGradient:
    return estimator.estimate(problem, meta_params, task)


def _row(outcome: cm.Measurement | Exception, prepared: Prepared) -> Record:
    if isinstance(outcome, Exception):
        return {"status": "RAISED", "error": first_line(outcome)}
    result: cm.MetaGradient = outcome.output
    diagnostics = result.diagnostics
    return {
        "status": cm.Status(int(diagnostics.status)).name,
        "relative_error": relative_error(result.grad, prepared.reference),
        "cosine": cosine(result.grad, prepared.reference),
        "dtype": str(result.outer_loss.dtype),
        "grad_norm": float((flatten(result.grad) ** 2).sum() ** 0.5),
        "outer_loss": float(result.outer_loss),
        "seconds": outcome.seconds,
        "spread": outcome.spread,
        "compile_seconds": outcome.compile_seconds,
        "num_compiling": NUM_COMPILING,
        "temp_bytes": outcome.temp_bytes,
        **{name: value.item() for name, value in diagnostics._asdict().items() if name != "status"},
    }


def show(records: Sequence[Record]) -> str:
    """A table for each problem, with one sentence on what to read from it."""
    blocks = []
    for case in dict.fromkeys(record["case"] for record in records):
        rows = [record for record in records if record["case"] == case]
        first = rows[0]
        title = f"{first['title']}  [{first['precision']}, seed {first['seed']}]"
        about = f"{first['num_params']} parameters, {first['num_meta']} meta-parameters; {first['learner']}."
        vouched = "" if first["reference_converged"] else ", which did NOT converge: do not trust the errors"
        notes = [about, f"Reference: {first['reference']}{vouched}."]
        notes += [first["left_out"]] if first["left_out"] else []
        at_a_time = max(row.get("num_compiling", 1) for row in rows)
        notes += [f"Programs were compiled {at_a_time} at a time."] if at_a_time > 1 else []
        notes += [f"'{row['method']}' raised {row['error']}" for row in rows if "error" in row]
        blocks.append("\n".join([title, "", _table(rows), "", *(wrap(note) for note in [read(rows), *notes])]))
    return "\n\n\n".join(blocks)


def _table(rows: Sequence[Record]) -> str:
    header = [
        "estimator",
        "error",
        "cosine",
        "time ms",
        "+-",
        "compile s",
        "memory",
        "grads",
        "HVPs",
        "status",
    ]
    return lay_out(header, [_cells(row) for row in rows])


def _cells(row: Record) -> list[str]:
    if "error" in row:
        return [row["method"], *["-"] * 8, row["status"]]
    return [
        row["method"],
        scientific(row["relative_error"]),
        decimals(row["cosine"], 5),
        milliseconds(row["seconds"]),
        milliseconds(row["spread"]),
        decimals(row["compile_seconds"], 1),
        memory(row["temp_bytes"]),
        str(row["num_gradients"]),
        str(row["num_hvps"]),
        row["status"],
    ]


def read(rows: Sequence[Record]) -> str:
    """What the table says, in one sentence."""
    by_name = {row["method"]: row for row in rows if row.get("relative_error") is not None}
    if CONTRASTIVE not in by_name:
        return "The default contrast gave no number here: see its status."
    ours = by_name[CONTRASTIVE]
    best = min(by_name.values(), key=lambda row: float(row["relative_error"]))
    parts = [
        f"With gradients alone and {memory(ours['temp_bytes'])} of temporary memory the default contrast is "
        f"{scientific(ours['relative_error'])} from the reference"
    ]
    if FORWARD in by_name:
        parts.append(f"the forward rule with a typed beta is {scientific(by_name[FORWARD]['relative_error'])} off")
    if BACKPROP in by_name:
        full = by_name[BACKPROP]
        parts.append(
            f"backprop through all {full['num_steps']} steps is {scientific(full['relative_error'])} off and needs "
            f"{memory(full['temp_bytes'])}"
        )
    return f"{'; '.join(parts)}; closest comes '{best['method']}' ({scientific(best['relative_error'])})."
