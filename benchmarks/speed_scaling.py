"""How the cost of a meta-gradient grows with the condition number, the dimension and the number of tasks."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks import speed_figures
from benchmarks.cases import Instance, WarmTask, started_by_task
from benchmarks.harness import Record, Session, first_line, flatten, precision, relative_error
from benchmarks.speed_measure import Measured, Programs, measure
from benchmarks.speed_methods import FAST, IMPLICIT_CG, NUDGED_DESCENT, Point, estimate, estimate_batch, nesterov
from benchmarks.tables import lay_out, memory, milliseconds, scientific, wrap

NAME = "speed_scaling"
ABOUT = "cost of a meta-gradient to 1e-3 against condition number, dimension and number of tasks, with exponents"

TARGET = 1e-3
_TOLS = (3e-1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
_STEPS = (4.0, 8.0, 16.0)  # of descent, in roots of the condition number
_MOST_OF_DESCENT = 1e5  # minutes above
CONDITION, DIMENSION, TASKS = "condition number", "dimension", "tasks"
_SIZES = {
    CONDITION: [10**k for k in range(1, 7)],
    DIMENSION: [10**k for k in range(2, 7)],
    TASKS: [4**k for k in range(7)],
}
_SMOKE_SIZES: dict[str, list[int]] = {CONDITION: [10, 100], DIMENSION: [], TASKS: []}
# Sizes from which on a cost is proportional to a power: below them a call's fixed cost rules.
_ASYMPTOTIC = {CONDITION: 1e2, DIMENSION: 1e4, TASKS: 1}


def run(session: Session) -> None:
    """Quadratic problems, whose exact meta-gradients are known; free phases that have ended."""
    # Condition numbers of 1e6 leave nothing of float32's seven digits.
    x64 = True if session.x64 is None else session.x64
    makers = {CONDITION: _conditioned, DIMENSION: _chain, TASKS: _many}
    with precision(x64):
        for axis, sizes in (_SMOKE_SIZES if session.smoke else _SIZES).items():
            programs = Programs()
            for size in sizes:
                instance, start, grad = makers[axis](size, session)
                points = {point.key: point for point in _points(axis, size, instance, start, session.smoke)}
                repeats = 1 if session.smoke else 3
                measured = measure(session, f"{axis} {size:,}: {len(points)} points", points, programs, repeats)
                for key, outcome in measured.items():
                    session.record(x64=x64, **_row(axis, size, points[key], outcome, flatten(grad)))


def _conditioned(size: int, session: Session) -> tuple[Instance, Any, Any]:
    """A dense quadratic of so high a condition number."""
    dim = 50 if session.smoke else 1000
    instance = cm.problems.quadratic(jax.random.key(session.seed), dim=dim, condition_number=float(size))
    assert instance.exact is not None
    exact = instance.exact(instance.meta_params, instance.task)
    return instance, exact.params, exact.grad


def _many(size: int, session: Session) -> tuple[Instance, Any, Any]:
    """A batch of quadratics of dimension 32 that share their meta-parameters."""
    keys = jax.random.split(jax.random.key(session.seed), size)
    made = [cm.problems.quadratic(key, dim=32, num_meta=8, condition_number=100.0) for key in keys[: min(size, 64)]]
    first = made[0]
    assert first.exact is not None
    copies = [made[k % len(made)].task for k in range(size)]
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies)
    exact = jax.vmap(first.exact, in_axes=(None, 0))(first.meta_params, tasks)
    grad = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), exact.grad)
    return first._replace(task=tasks), exact.params, grad


def _chain(size: int, session: Session) -> tuple[Instance, Any, Any]:
    """A chain of springs, each end of which is tied down by a strength of its own; its condition number is 41."""
    rng = np.random.default_rng(session.seed)
    force, target = (rng.standard_normal(size) for _ in range(2))
    task = {"force": jnp.asarray(force), "target": jnp.asarray(target)}
    log_strengths = jnp.full((size,), math.log(0.1))
    strength = np.exp(np.asarray(log_strengths, np.float64))
    params = _solve_chain(strength, np.asarray(task["force"], np.float64))
    adjoint = _solve_chain(strength, params - np.asarray(task["target"], np.float64))
    instance = Instance(_CHAIN, log_strengths, task, exact=None)
    return instance, jnp.asarray(params, task["force"].dtype), -strength * params * adjoint


def _solve_chain(strength: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The banded system of the chain, by scipy."""
    from scipy.linalg import solveh_banded

    ends = np.full(len(right), 2.0)
    ends[[0, -1]] = 1.0
    bands = np.stack([np.full(len(right), -1.0), ends + strength])
    solution: np.ndarray[Any, Any] = solveh_banded(bands, right)
    return solution


def _chain_inner(params: Any, meta_params: Any, task: Any) -> jax.Array:
    stretched = jnp.sum((params[1:] - params[:-1]) ** 2) / 2
    return stretched + jnp.sum(jnp.exp(meta_params) * params**2) / 2 - jnp.sum(task["force"] * params)


def _chain_outer(params: Any, meta_params: Any, task: Any) -> jax.Array:
    return jnp.sum((params - task["target"]) ** 2) / 2


_CHAIN = cm.BilevelProblem(_chain_inner, _chain_outer, lambda meta_params, task: jnp.zeros_like(task["force"]))


def _points(axis: str, size: int, instance: Instance, start: Any, smoke: bool) -> Iterator[Point]:
    function = estimate_batch if axis == TASKS else estimate
    args = (started_by_task(instance.problem), instance.meta_params, WarmTask(instance.task, start))
    # The free phase has ended: a step further would cost, and find nothing.
    free = cm.LBFGS(tol=0.0, max_steps=0)
    for tol in _TOLS:
        words = f"tolerance {tol:g}"
        nudged, scheme = cm.NewtonKrylov(tol=tol, max_steps=20_000), cm.relative(cm.central_difference)
        fast = cm.Contrastive(free, nudged, scheme, estimate_error=False)
        linear = cm.ConjugateGradient(tol=tol, max_steps=20_000)
        implicit = cm.ImplicitDifferentiation(free, linear, estimate_error=False)
        yield Point("accurate", FAST, words, function, (fast, *args))
        yield Point("accurate", IMPLICIT_CG, words, function, (implicit, *args))
    if axis == CONDITION and size <= _MOST_OF_DESCENT and not smoke:
        root = math.sqrt(size)
        for factor in _STEPS:
            num_steps = math.ceil(factor * root)
            descent = cm.OptaxDescent(nesterov(1.0, (root - 1) / (root + 1)), tol=0.0, max_steps=num_steps)
            twice = cm.Contrastive(free, nudged_solver=descent)
            yield Point("accurate", NUDGED_DESCENT, f"{num_steps} steps", function, (twice, *args))


def _row(axis: str, size: int, point: Point, outcome: Measured | Exception, reference: Any) -> Record:
    common = {"case": axis, "size": size, "method": point.method, "settings": point.settings}
    if isinstance(outcome, Exception):
        return {"status": "RAISED", "error": first_line(outcome), **common}
    told = outcome.outcome
    return {
        "status": cm.Status(int(told.status)).name,
        "relative_error": relative_error(told.grad, reference),
        "num_gradients": float(told.num_gradients),
        "num_hvps": float(told.num_hvps),
        "seconds": outcome.seconds,
        "spread": outcome.spread,
        "compile_seconds": outcome.compile_seconds,
        "temp_bytes": outcome.temp_bytes,
        **common,
    }


def reached(records: Sequence[Record], axis: str, method: str, field: str) -> list[Record]:
    """Of each size the point within the target that costs least of `field`."""
    rows = [row for row in records if row["case"] == axis and row["method"] == method]
    rows = [row for row in rows if row.get("relative_error") is not None and row["relative_error"] <= TARGET]
    best: dict[int, Record] = {}
    for row in rows:
        if row["size"] not in best or cost(row, field) < cost(best[row["size"]], field):
            best[row["size"]] = row
    return [best[size] for size in sorted(best)]


def exponent(rows: Sequence[Record], field: str) -> float | None:
    """Of the power of the size that fits a cost best, where a call's fixed cost does not rule; least squares."""
    pairs = [(row["size"], cost(row, field)) for row in rows if row["size"] >= _ASYMPTOTIC[row["case"]]]
    if len(pairs) < 2:
        return None
    sizes, costs = np.log(np.array(pairs, np.float64)).T
    return float(np.polyfit(sizes, costs, 1)[0])


def cost(row: Record, field: str) -> float:
    """Seconds, or gradients and Hessian-vector products together."""
    return float(row["seconds"] if field == "seconds" else row["num_gradients"] + row["num_hvps"])


def show(records: Sequence[Record]) -> str:
    """A table for each axis: what reaching the target costs at each size, and the fitted exponents."""
    blocks = []
    header = ["method", "size", "time (ms)", "per task (ms)", "evaluations", "rel. error", "memory"]
    for axis in dict.fromkeys(row["case"] for row in records):
        table, notes = [], []
        for method in dict.fromkeys(row["method"] for row in records if row["case"] == axis):
            for row in reached(records, axis, method, "seconds"):
                per_task = milliseconds(row["seconds"] / row["size"]) if axis == TASKS else ""
                table.append(
                    [
                        method,
                        f"{row['size']:,}",
                        milliseconds(row["seconds"]),
                        per_task,
                        f"{cost(row, 'evaluations'):.0f}",
                        scientific(row["relative_error"]),
                        memory(row["temp_bytes"]),
                    ]
                )
            powers = [
                f"{fitted:.2f} in {words}"
                for field, words in (("evaluations", "evaluations"), ("seconds", "time"))
                if (fitted := exponent(reached(records, axis, method, field), field)) is not None
            ]
            if powers:
                notes.append(f"{method}: exponent {', '.join(powers)}, fitted from {_ASYMPTOTIC[axis]:g} on.")
        title = f"Cost of a meta-gradient to {TARGET:g} against {axis}  [{records[0]['precision']}]"
        blocks.append("\n".join([title, "", lay_out(header, table, left=(0,)), "", *map(wrap, notes)]))
    return "\n\n\n".join(blocks)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Evaluations and time against each size."""
    return [speed_figures.draw_scaling(records, reached, cost, folder / "speed_scaling.png")]
