"""How far a meta-gradient can be trusted: its strength, its error estimate, its accuracy on request, its cost."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import contrastive_meta as cm
from benchmarks import trust_figures, trust_tables
from benchmarks.data import DataMissingError
from benchmarks.harness import Record, Session, first_line, flatten, precision, relative_error
from benchmarks.trust_cases import FAMILIES, SMOKE_FAMILIES, Case, Family, Learner, ScaledTask, cases, scaled
from benchmarks.trust_reference import Minimum, Ready, prepare

NAME = "trust"
ABOUT = "the default's strength, error estimate and accuracy on request, against exact meta-gradients of many cases"
NUM_SEEDS = 2
TARGET = 1e-3
DISPLACEMENTS = np.geomspace(1e-8, 1.0, 16)
NUM_META_STEPS = 50

Make = Callable[[cm.InnerSolver, jax.Array], cm.MetaGradientEstimator]


# The estimators under test: all that this benchmark knows of them.


def default(solver: cm.InnerSolver, displacement: jax.Array) -> cm.MetaGradientEstimator:
    """What a user gets who asks for nothing; the displacement is left alone."""
    return cm.Contrastive(solver)


def typed(solver: cm.InnerSolver, displacement: jax.Array) -> cm.MetaGradientEstimator:
    """The same with a strength that is typed, relative to the length of the response."""
    return cm.Contrastive(solver, scheme=cm.relative(cm.central_difference, displacement=displacement))


def targeted(solver: cm.InnerSolver, displacement: jax.Array) -> cm.MetaGradientEstimator:
    """The default asked for an accuracy."""
    settings: dict[str, Any] = {"target_error": TARGET}
    return dataclasses.replace(cm.Contrastive(solver), **settings)


TAKES_TARGET = any(field.name == "target_error" for field in dataclasses.fields(cm.Contrastive))


class Settings(NamedTuple):
    """Numbers of an estimator: the free phase's tolerance, relative to its start; a learner's; and a strength."""

    tolerance: Any
    step_size: Any
    momentum: Any
    displacement: Any


class Training(NamedTuple):
    """An outer loop: the result of its first step, and what all of its steps took."""

    step: jax.Array
    meta_params: Any
    memory: Any
    state: cm.EstimatorState
    grad: Any
    params: Any
    diagnostics: cm.Diagnostics
    spent: jax.Array
    status: jax.Array


def run(session: Session) -> None:
    """Estimate each case by the default, at each typed strength and with a target; train on some; record."""
    known = SMOKE_FAMILIES if session.smoke else FAMILIES
    unknown = set(session.cases) - {family.name for family in known}
    if unknown:
        names = ", ".join(family.name for family in known)
        raise SystemExit(f"trust has no problem {', '.join(sorted(unknown))}; it has {names}")
    both = (False,) if session.smoke else (False, True)
    precisions = both if session.x64 is None else (session.x64,)
    for family in known:
        if session.half not in (None, family.half) or (session.cases and family.name not in session.cases):
            continue
        chosen = list(cases(family, 1 if session.smoke else session.num_seeds or NUM_SEEDS, precisions))
        session.progress.begin(f"{family.name}: {len(chosen)} cases", len(chosen))
        try:
            _run_family(session, chosen)
        except DataMissingError as error:
            session.progress.begin(f"{family.name} is left out: {error}", 1)
        jax.clear_caches()  # no other family shares its programs


def _run_family(session: Session, chosen: Sequence[Case]) -> None:
    @functools.cache
    def ready_for(data_seed: int, meta_seed: int, x64: bool) -> Ready:
        return prepare(next(c for c in chosen if (c.data_seed, c.meta_seed, c.x64) == (data_seed, meta_seed, x64)),
                       session.data)  # fmt: skip

    for case in chosen:
        ready = ready_for(case.data_seed, case.meta_seed, case.x64)
        session.progress.step(f"{case.family.name}, seed {case.data_seed}, {case.tolerance:g}, {case.scaling.name}")
        try:
            row = measure(case, ready, NUM_META_STEPS if not session.smoke else 3)
        except Exception as error:
            row = {"kind": "failed", "error_text": first_line(error)}
        session.record(x64=case.x64, **_common(case.family, case), **row)


def _common(family: Family, case: Case) -> Record:
    return {
        "case": family.name,
        "title": family.title,
        "half": family.half,
        "convex": family.convex,
        "data_seed": case.data_seed,
        "meta_seed": case.meta_seed,
        "tolerance": case.tolerance,
        "scaling": case.scaling.name,
        "warm": case.warm,
    }


def measure(case: Case, ready: Ready, num_meta_steps: int) -> Record:
    """All that is recorded of a case."""
    scaling = case.scaling
    with precision(case.x64):
        dtype = jnp.float64 if case.x64 else jnp.float32
        units = jnp.asarray(scaling.outer, dtype), jnp.asarray(scaling.unit, dtype)
        subject = scaled(ready.losses), ready.meta_params, ScaledTask(ready.data, ready.start, *units)
        settings = Settings(case.tolerance, ready.step_size / scaling.unit**2, ready.momentum, 1.0)
        settings = jax.tree.map(lambda number: jnp.asarray(number, dtype), settings)
        learner = case.family.learner
        free, learning = _learn(learner, *subject, settings)
        own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * scaling.unit, free)
        minimum = ready.minimum(own)

        def estimate(make: Make, displacement: float = 1.0, steps: int = 1) -> Training:
            numbers = settings._replace(displacement=jnp.asarray(displacement, dtype))
            trained: Training = _train(make, learner, *subject, numbers, jnp.int32(steps))
            return trained

        single = estimate(default)
        swept = [_row(estimate(typed, displacement), case, minimum) for displacement in DISPLACEMENTS]
        row = {
            "kind": "case",
            **_of_minimum(minimum, case),
            "free_gradients": int(learning),
            "free_distance": _distance(own, minimum, 1.0),
            "base_distance": _distance(single.params, minimum, scaling.unit),
            **_row(single, case, minimum),
            "displacements": DISPLACEMENTS,
            "swept": {name: [other[name] for other in swept] for name in ("error", "estimate", "cost", "status")},
            "target": _row(estimate(targeted), case, minimum) if TAKES_TARGET else None,
        }
        if case.trains:
            errors = [np.inf if np.isnan(other["error"]) else other["error"] for other in swept]
            best = float(DISPLACEMENTS[int(np.argmin(errors))])
            ours, oracle = estimate(default, steps=num_meta_steps), estimate(typed, best, num_meta_steps)
            row["trained"] = {
                "num_steps": num_meta_steps,
                "cost": int(ours.spent),
                "status": cm.Status(int(ours.status)).name,
                "oracle_cost": int(oracle.spent),
                "oracle_displacement": best,
            }
    return row


def _of_minimum(minimum: Minimum, case: Case) -> Record:
    return {
        "reference_converged": minimum.converged,
        "num_params": minimum.params.size,
        "num_meta": minimum.grad.size,
        "least_curvature": minimum.least,
        "largest_curvature": minimum.largest,
        "floor": minimum.floor(case.x64),
    }


def _row(trained: Training, case: Case, minimum: Minimum) -> Record:
    """A single call against the exact answer."""
    diagnostics = trained.diagnostics
    return {
        "status": cm.Status(int(diagnostics.status)).name,
        "error": relative_error(trained.grad, case.scaling.outer * minimum.grad),
        "estimate": float(diagnostics.error_estimate),
        "cost": int(trained.spent),
        "beta": float(diagnostics.beta),
        "displacement": float(diagnostics.displacement),
        "nudged_residual": float(diagnostics.nudged_residual),
    }


def _distance(params: Any, minimum: Minimum, unit: float) -> float:
    return float(np.linalg.norm(unit * flatten(params) - minimum.params) / np.linalg.norm(minimum.params))


def _solver(
    learner: Learner, problem: cm.BilevelProblem, meta_params: Any, task: ScaledTask, settings: Settings
) -> tuple[cm.InnerSolver, Any]:
    """The learner, to stop where the gradient has fallen by the tolerance; and where it starts."""
    start = problem.init(meta_params, task)
    first = jnp.linalg.norm(ravel_pytree(jax.grad(problem.inner)(start, meta_params, task))[0])
    return learner(settings.tolerance * first, settings.step_size, settings.momentum), start


@functools.partial(jax.jit, static_argnums=0)
def _learn(
    learner: Learner, problem: cm.BilevelProblem, meta_params: Any, task: ScaledTask, settings: Settings
) -> tuple[Any, jax.Array]:
    """The free phase alone: where it ends, and the gradients it takes."""
    with jax.default_matmul_precision("highest"):
        solver, start = _solver(learner, problem, meta_params, task, settings)
        solution = solver.solve(lambda params: problem.inner(params, meta_params, task), start)
    return solution.params, solution.num_gradients


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    make: Make,
    learner: Learner,
    problem: cm.BilevelProblem,
    meta_params: Any,
    task: ScaledTask,
    settings: Settings,
    num_steps: jax.Array,
) -> Training:
    """Meta-learn for `num_steps`, each estimate starting from the last one's state; one step is a single call."""
    solver, _ = _solver(learner, problem, meta_params, task, settings)
    estimator = make(solver, settings.displacement)
    # Of so many e-folds of the strengths a step, whatever the units of the outer loss.
    optimizer = optax.adam(0.02)
    shape = jax.eval_shape(lambda: estimator.estimate(problem, meta_params, task))
    told = shape.grad, shape.params, shape.diagnostics
    grad, params, diagnostics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), told)

    def advance(now: Training) -> Training:
        result = estimator.estimate(problem, now.meta_params, task, state=now.state)
        updates, memory = optimizer.update(result.grad, now.memory, now.meta_params)
        told, before = (result.grad, result.params, result.diagnostics), (now.grad, now.params, now.diagnostics)
        grad, params, diagnostics = jax.tree.map(lambda a, b: jnp.where(now.step == 0, a, b), told, before)
        spent = result.diagnostics.num_gradients + result.diagnostics.num_hvps
        return Training(
            now.step + 1,
            optax.apply_updates(now.meta_params, updates),
            memory,
            result.state,
            grad,
            params,
            diagnostics,
            now.spent + spent,
            jnp.maximum(now.status, result.diagnostics.status),
        )

    begin = Training(
        jnp.int32(0),
        meta_params,
        optimizer.init(meta_params),
        estimator.init_state(problem, meta_params, task),
        grad,
        params,
        diagnostics,
        jnp.int32(0),
        jnp.int32(0),
    )
    trained: Training = jax.lax.while_loop(lambda now: now.step < num_steps, advance, begin)
    return trained


def show(records: Sequence[Record]) -> str:
    """The verdicts, and the cases that stand out."""
    return trust_tables.show(records)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Estimate against true error, and how much the default's strength is worse than the best."""
    return trust_figures.draw(records, folder)
