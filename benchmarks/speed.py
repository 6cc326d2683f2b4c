"""Error against time, gradients and memory, from accurate and unfinished free phases, beside backprop and peers."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import contrastive_meta as cm
from benchmarks import speed_figures, speed_methods, speed_peers, speed_tables, speed_torch
from benchmarks.data import DataMissingError
from benchmarks.harness import Record, Session, first_line, precision, relative_error
from benchmarks.speed_measure import Measured, Programs, measure
from benchmarks.speed_methods import FREE_PHASE, Point
from benchmarks.speed_problems import RIDGE, SUITE
from benchmarks.speed_reference import Ready, prepare

NAME = "speed"
ABOUT = "time, gradients and memory to reach an error, on a suite of problems, beside implicit CG, backprop and peers"
NUM_SEEDS = 5


def run(session: Session) -> None:
    """Measure problem by problem, seed by seed; each point of a grid is a record."""
    x64 = bool(session.x64)
    num_seeds = 1 if session.smoke else session.num_seeds or NUM_SEEDS
    unknown = set(session.cases) - {problem.name for problem in SUITE}
    if unknown:
        known = ", ".join(problem.name for problem in SUITE)
        raise SystemExit(f"speed has no problem {', '.join(sorted(unknown))}; it has {known}")
    for problem in (RIDGE,) if session.smoke else SUITE:
        if session.cases and problem.name not in session.cases:
            continue
        programs = Programs()
        for seed in range(session.seed, session.seed + num_seeds):
            # The same records, run and date: the seeds of one run belong together.
            of_seed = dataclasses.replace(session, seed=seed)
            try:
                session.progress.begin(f"{problem.name}, seed {seed}: the reference", 1)
                ready = prepare(problem, of_seed, x64)
            except DataMissingError as error:
                session.progress.begin(f"{problem.name} is left out: {error}", 1)
                break
            with precision(x64):
                _measure(of_seed, ready, programs, x64)
        jax.clear_caches()  # the next problem shares no program with this one


def _measure(session: Session, ready: Ready, programs: Programs, x64: bool) -> None:
    if session.smoke:
        points = [*speed_methods.smoke_points(ready), *speed_peers.smoke_points(ready)]
    else:
        points = [*speed_methods.points(ready, x64), *speed_peers.points(ready), *speed_torch.points(ready)]
    by_key = {point.key: point for point in points}
    what = f"{ready.problem.name}, seed {session.seed}: {len(points)} points"
    measured = measure(session, what, by_key, programs, 1 if session.smoke else ready.problem.repeats)
    for key, outcome in measured.items():
        point = by_key[key]
        common = _common(ready, point.start, point.method, point.settings)
        if isinstance(outcome, Exception):
            session.record(x64=x64, status="RAISED", error=_reason(outcome), **common)
        else:
            session.record(x64=x64, **_row(outcome, ready, point), **common)
    for method, reason in [*speed_peers.absent(), *speed_torch.absent()]:
        session.record(x64=x64, status="NOT_INSTALLED", error=reason, **_common(ready, "", method, ""))


def _reason(error: Exception) -> str:
    """In one line; of an error from inside a program the one that started it."""
    causes = re.findall(r"^[\w.]+Error: .*$", str(error), flags=re.MULTILINE)
    return causes[-1] if causes else first_line(error)


def _common(ready: Ready, start: str, method: str, settings: str) -> Record:
    problem = ready.problem
    return {
        "case": problem.name,
        "title": problem.title,
        "convex": problem.convex,
        "start": start,
        "start_distance": ready.distances.get(start),
        "method": method,
        "settings": settings,
        "num_params": ready.num_params,
        "num_meta": ready.num_meta,
        "reference_converged": ready.converged,
    }


def _row(measured: Measured, ready: Ready, point: Point) -> Record:
    outcome = measured.outcome
    learns_only = point.method == FREE_PHASE
    return {
        "status": "" if outcome.status is None else cm.Status(int(outcome.status)).name,
        "relative_error": None if learns_only else relative_error(outcome.grad, ready.reference),
        "outer_loss": float(outcome.value),
        "num_gradients": _count(outcome.num_gradients),
        "num_hvps": _count(outcome.num_hvps),
        "seconds": measured.seconds,
        "spread": measured.spread,
        "compile_seconds": measured.compile_seconds,
        "temp_bytes": measured.temp_bytes,
    }


def _count(number: Any) -> float | None:
    return None if number is None else float(number)


def show(records: Sequence[Record]) -> str:
    """A table for each problem and start, and what they come to."""
    return speed_tables.show(records)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Error against time, gradients and memory: a panel for each problem, a picture for each start."""
    return speed_figures.draw(records, folder)
