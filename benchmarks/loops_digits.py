"""A training loop on digits: a log-strength for each weight, 40 steps of Adam, warm starts throughout."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks import loops_methods
from benchmarks.cases import upcast
from benchmarks.harness import Record, Session, first_line, flatten, precision, relative_error
from benchmarks.loops_measure import Program, compiled, median, ratio, record_aim, time_in_turn
from benchmarks.loops_methods import DEFAULT, IMPLICIT_CG, JAXOPT, WITHOUT_ESTIMATE, Method, Told
from benchmarks.loops_problems import PROBLEMS, TEN_CLASSES, TWO_CLASSES, Problem, Task
from benchmarks.speed_peers import NAMES, installed

CASE = "digits"
RATE, NUM_STEPS, TOL = 0.2, 40, 1e-3
START = -3.0  # log-strength of every weight
# The yardsticks of the table.
YARDSTICKS = (IMPLICIT_CG, JAXOPT)
# Implicit CG as it was before the core was rebuilt, over jaxopt in the same rounds: an aim refers to it, and jaxopt
# stays what it is. Measured at commit 66b8705 by this benchmark: time of a step, and time to compile.
AT_START: Mapping[tuple[str, str], Mapping[str, float]] = {
    (TWO_CLASSES, "float32"): {"seconds": 1.2, "compile_cpu_seconds": 1.42},
    (TEN_CLASSES, "float32"): {"seconds": 0.125, "compile_cpu_seconds": 1.25},
}


def run(session: Session) -> None:
    """Both problems."""
    for name in (TWO_CLASSES,) if session.smoke else PROBLEMS:
        _run(session, name, PROBLEMS[name])


def _run(session: Session, which: str, problem: Problem) -> None:
    """All methods, one step of each in turn; then the errors of their gradients, and the aims."""
    x64 = bool(session.x64)
    num_steps = 2 if session.smoke else NUM_STEPS
    common: Record = {"x64": x64, "case": CASE, "kind": "method", "problem": which}
    with precision(x64):
        task = problem.load(session.seed)
        log_strengths = jnp.full((task.x_train.shape[1], problem.num_outputs), START)
        loops: dict[str, _Loop] = {}
        raised: dict[str, Exception] = {}
        methods = loops_methods.methods(problem.losses, TOL, session.smoke)
        session.progress.begin(f"{which}: compiling", len(methods))
        for name, method in methods.items():
            try:
                loops[name] = _Loop(session, name, method, log_strengths, task)
            except Exception as error:
                raised[name] = error
        turns = {name: loop.step for name, loop in loops.items()}
        seconds, failed = time_in_turn(session, f"{which}: {num_steps} outer steps", turns, num_steps)
    for name, reason in (raised | failed).items():
        session.record(**common, method=name, status="RAISED", error=first_line(reason))
    session.progress.begin(f"{which}: errors", len(seconds))
    rows = {}
    for name, times in seconds.items():
        session.progress.step(name)
        over = {yardstick: ratio(times, seconds[yardstick]) for yardstick in YARDSTICKS if yardstick in seconds}
        told = loops[name].program.size() | _summary(loops[name], problem, task)
        fields: Record = {**common, "method": name, "seconds": median(times), "all_seconds": times, "over": over}
        rows[name] = session.record(**fields, **told)
    for name in NAMES:
        if not installed(name):
            session.record(**common, method=name, status="ABSENT", error='not installed: pip install ".[peers]"')
    for aim, target, measured in aims(rows, which, "float64" if x64 else "float32"):
        record_aim(session, x64=x64, case=CASE, aim=f"{which}: {aim}", target=target, measured=measured)


class _Loop:
    """A method's trajectory: its program, where it is, and what each step told."""

    def __init__(self, session: Session, name: str, method: Method, log_strengths: Any, task: Task) -> None:
        optimizer = optax.adam(RATE)

        def step(log_strengths: Any, memory: Any, state: Any, task: Task) -> Any:
            told, state = method.call(log_strengths, task, state)
            updates, memory = optimizer.update(told.grad, memory, log_strengths)
            return told, (optax.apply_updates(log_strengths, updates), memory, state)

        self._task = task
        start = jax.jit(lambda: (optimizer.init(log_strengths), method.start(log_strengths, task)))()
        self._carry = (log_strengths, *start)
        self.program: Program = compiled(session, name, step, *self._carry, task)
        self.at: list[Any] = []
        self.told: list[Told] = []

    def step(self) -> Any:
        """One outer step."""
        self.at.append(self._carry[0])
        told, self._carry = self.program.call(*self._carry, self._task)
        self.told.append(told)
        return told, self._carry


def _summary(loop: _Loop, problem: Problem, task: Task) -> Record:
    """Counts, statuses and losses of a trajectory, and the true errors of its gradients."""
    told = loop.told
    checked = range(0, len(told), problem.check_every)
    with precision(True):
        exact = [problem.exact(*map(upcast, (told[k].params, loop.at[k], task))) for k in checked]
        errors = [relative_error(told[k].grad, flatten(e.grad)) for k, e in zip(checked, exact, strict=True)]
    row: Record = {
        "outer_loss": told[-1].outer_loss,
        "outer_losses": [t.outer_loss for t in told],
        "residual": median([float(e.residual) for e in exact]),
        "checked": list(checked),
        "errors": errors,
        "error": median(errors),
        "reference_residual": max(float(e.rest) for e in exact),
    }
    if told[0].status is not None:
        names = [cm.Status(int(t.status)).name for t in told]
        estimates = [float(t.error_estimate) for t in told]
        row |= {
            "statuses": dict(collections.Counter(names)),
            "num_gradients": median([t.num_gradients for t in told]),
            "num_hvps": median([t.num_hvps for t in told]),
            "all_num_gradients": [int(t.num_gradients) for t in told],
            "estimates": estimates,
            "estimate": median(estimates),
            "estimate_over_error": ratio([estimates[k] for k in checked], errors),
        }
    return row


def aims(rows: Mapping[str, Record], which: str, dtype: str) -> Iterator[tuple[str, float, float | None]]:
    """What was aimed at, the most that is allowed, and what was measured."""
    default, implicit, jaxopt = (rows.get(name) for name in (DEFAULT, IMPLICIT_CG, JAXOPT))

    def against(field: str, other: Record | None, factor: float | None = 1.0) -> float | None:
        if default is None or other is None or factor is None:
            return None
        return float(default[field] / other[field] / factor)

    def over_jaxopt(factor: float | None = 1.0) -> float | None:
        known = default is not None and jaxopt is not None and factor is not None
        return float(default["over"][JAXOPT]) / factor if known and default and factor else None

    start = AT_START.get((which, dtype), {})
    # The loop that the aims are of; the small one is mostly what each operation of a program costs.
    if which == TEN_CLASSES:
        same = None if default is None or implicit is None else float(default["over"][IMPLICIT_CG])
        yield "time over implicit CG of the same commit", 0.5, same
        yield "time over implicit CG at 66b8705, through jaxopt", 0.5, over_jaxopt(start.get("seconds"))
        yield "time over jaxopt", 0.1, over_jaxopt()
    without = rows.get(WITHOUT_ESTIMATE)
    counts = (
        None if default is None or without is None else (default["all_num_gradients"], without["all_num_gradients"])
    )
    yield "gradients over those without an estimate", 1.3, None if counts is None else ratio(*counts)
    factor = start.get("compile_cpu_seconds")
    yield "time to compile over implicit CG of the same commit", 1.3, against("compile_cpu_seconds", implicit)
    yield (
        "time to compile over implicit CG at 66b8705, through jaxopt",
        1.3,
        against("compile_cpu_seconds", jaxopt, factor),
    )
    yield "time to compile over jaxopt", 2.0, against("compile_cpu_seconds", jaxopt)
