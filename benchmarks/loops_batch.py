"""What a batch of tasks costs over its tasks one by one: one task, several, and sixteen of which one falls back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import contrastive_meta as cm
from benchmarks.harness import Session, precision
from benchmarks.loops_batch_cases import ON_RIM, WELLS, Scenario, batches_of_tasks, wells
from benchmarks.loops_measure import Program, compiled, median, ratio, record_aim, time_in_turn
from benchmarks.speed_methods import Outcome, estimate

CASE = "batch"
SIZES = (2, 4, 16)


def run(session: Session) -> None:
    """All scenarios, single calls and batches in turn."""
    # As the scaling record has it.
    x64 = True if session.x64 is None else session.x64
    sizes, rounds = ((2,), 1) if session.smoke else (SIZES, 15)
    with precision(x64):
        scenarios = batches_of_tasks(session, max(sizes))
        for name, scenario in scenarios.items():
            _measure(session, x64, name, scenario, sizes, rounds)
        _measure_fallback(session, x64, max(sizes), rounds)


def task_of(tasks: Any, number: int) -> Any:
    """One of a batch."""
    return jax.tree.map(lambda leaf: leaf[number], tasks)


def _batch(problem: cm.BilevelProblem, estimator: cm.MetaGradientEstimator, meta_params: Any, tasks: Any) -> Any:
    """What is timed of a batch: value, gradient and each task's diagnostics."""
    return cm.value_and_meta_grad(problem, estimator, has_aux=True)(meta_params, tasks)


def _measure(session: Session, x64: bool, name: str, at: Scenario, sizes: tuple[int, ...], rounds: int) -> None:
    batches = {size: jax.tree.map(lambda leaf, size=size: leaf[:size], at.tasks) for size in (1, *sizes)}
    programs = _programs(session, name, at, {f"batch of {size}": tasks for size, tasks in batches.items()})
    single, largest = programs["single"], max(sizes)
    calls: dict[str, Callable[[], Any]] = {
        f"single {k}": functools.partial(single.call, at.meta_params, task_of(at.tasks, k)) for k in range(largest)
    }
    for size, tasks in batches.items():
        calls[f"batch of {size}"] = functools.partial(programs[f"batch of {size}"].call, at.meta_params, tasks)
    seconds, outputs = _timed(session, name, calls, rounds)
    alone = [outputs[f"single {k}"] for k in range(largest)]
    counted = Counted(session, name, at)
    executed = [counted.single(task_of(at.tasks, k)) for k in range(largest)]
    first = seconds["single 0"]
    _record(session, x64, name, "single", single, first, alone[0], {"executed": executed[0]})
    for size, tasks in batches.items():
        key = f"batch of {size}"
        total = np.sum([seconds[f"single {k}"] for k in range(size)], axis=0)
        over = {"over_one": ratio(seconds[key], first), "over_sum": ratio(seconds[key], total)}
        told: dict[str, Any] = {**over, "reported_alone": sum(float(out.num_gradients) for out in alone[:size])}
        if size in (1, largest):
            told |= {"executed": counted.batch(tasks), "executed_alone": sum(executed[:size])}
        _record(session, x64, name, key, programs[key], seconds[key], outputs[key], told)
        if size == 1:
            aim, target, measured = "batch of one, time over `estimate`", 1.1, over["over_one"]
        elif at.over_one is not None and size == largest:
            aim, target, measured = f"{key}, time over one task", at.over_one, over["over_one"]
        else:
            aim, target, measured = f"{key}, time over the sum of single calls", 1.0, over["over_sum"]
        record_aim(session, x64=x64, case=CASE, aim=f"{name}: {aim}", target=target, measured=measured)
        if "executed" in told:
            words = f"{name}: {key}, gradients over those of single calls"
            more = told["executed"] / max(told["executed_alone"], 1)
            record_aim(session, x64=x64, case=CASE, aim=words, target=1.0, measured=more)


def _measure_fallback(session: Session, x64: bool, num_tasks: int, rounds: int) -> None:
    at, mixed = wells(session, num_tasks)
    programs = _programs(session, WELLS, at, {"batch": at.tasks})
    rim = task_of(mixed, ON_RIM % num_tasks)
    calls = {
        "single": functools.partial(programs["single"].call, at.meta_params, task_of(at.tasks, 0)),
        "single, falls back": functools.partial(programs["single"].call, at.meta_params, rim),
        "batch": functools.partial(programs["batch"].call, at.meta_params, at.tasks),
        "batch, one falls back": functools.partial(programs["batch"].call, at.meta_params, mixed),
    }
    seconds, outputs = _timed(session, WELLS, calls, rounds)
    counted = Counted(session, WELLS, at)
    executed = {
        "single": counted.single(task_of(at.tasks, 0)),
        "single, falls back": counted.single(rim),
        "batch": counted.batch(at.tasks),
        "batch, one falls back": counted.batch(mixed),
    }
    for key in calls:
        told = {"executed": executed[key]}
        _record(session, x64, WELLS, key, programs[key.split(",")[0]], seconds[key], outputs[key], told)
    allowed = np.add(seconds["batch"], seconds["single, falls back"])
    words = f"batch of {num_tasks}, one falls back"
    over = ratio(seconds["batch, one falls back"], [float(x) for x in allowed])
    aim = f"{WELLS}: {words}, time over the batch and the one's fallback"
    record_aim(session, x64=x64, case=CASE, aim=aim, target=1.0, measured=over)
    over = executed["batch, one falls back"] / max(executed["batch"] + executed["single, falls back"], 1)
    aim = f"{WELLS}: {words}, gradients over the same"
    record_aim(session, x64=x64, case=CASE, aim=aim, target=1.0, measured=over)


def _programs(session: Session, name: str, at: Scenario, batches: Mapping[str, Any]) -> dict[str, Program]:
    session.progress.begin(f"{name}: compiling", 1 + len(batches))
    single = functools.partial(estimate, at.estimator, at.problem)
    batch = functools.partial(_batch, at.problem, at.estimator)
    programs = {"single": compiled(session, "one task", single, at.meta_params, task_of(at.tasks, 0))}
    return programs | {key: compiled(session, key, batch, at.meta_params, tasks) for key, tasks in batches.items()}


def _timed(
    session: Session, name: str, calls: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of the rounds, and the outputs of a call before them that is not timed."""
    outputs = {key: jax.block_until_ready(call()) for key, call in calls.items()}
    seconds, raised = time_in_turn(session, f"{name}: {rounds} rounds", calls, rounds)
    for error in raised.values():
        raise error
    return seconds, outputs


def _record(
    session: Session,
    x64: bool,
    name: str,
    key: str,
    program: Program,
    seconds: list[float],
    output: Any,
    told: Mapping[str, Any],
) -> None:
    if isinstance(output, Outcome):
        statuses, num_gradients = [output.status], float(output.num_gradients)
    else:
        diagnostics = output[0][1]
        statuses, num_gradients = list(diagnostics.status), float(np.sum(diagnostics.num_gradients))
    session.record(
        x64=x64,
        case=CASE,
        kind="method",
        problem=name,
        method=key,
        seconds=median(seconds),
        all_seconds=seconds,
        statuses=[cm.Status(int(status)).name for status in statuses],
        num_gradients=num_gradients,
        **program.size(),
        **told,
    )


class Counted:
    """Runs the same with a callback in the inner loss, which counts what is executed, task by task."""

    def __init__(self, session: Session, name: str, at: Scenario) -> None:
        self._session, self._name, self._at = session, name, at
        self._count = 0
        self._compiled: dict[int, Callable[..., Any]] = {}

        def inner(params: Any, meta_params: Any, task: Any) -> jax.Array:
            # It takes an entry of `params` and of `task`, so that each task and each phase of a batch calls for itself.
            jax.debug.callback(self._add, *(jax.tree.leaves(of)[0].ravel()[0] for of in (params, task)))
            return at.problem.inner(params, meta_params, task)

        self._problem = dataclasses.replace(at.problem, inner_loss=inner)

    def _add(self, *_: Any) -> None:
        self._count += 1

    def single(self, task: Any) -> int:
        """Evaluations of the inner loss in an estimate of one task."""
        return self._run(0, functools.partial(estimate, self._at.estimator, self._problem), task)

    def batch(self, tasks: Any) -> int:
        """In a batch, all tasks together, those included whose results a loop throws away."""
        size = jax.tree.leaves(tasks)[0].shape[0]
        return self._run(size, functools.partial(_batch, self._problem, self._at.estimator), tasks)

    def _run(self, size: int, function: Callable[..., Any], tasks: Any) -> int:
        args = self._at.meta_params, tasks
        if size not in self._compiled:
            what = f"one task, counted: {self._name}" if size == 0 else f"batch of {size}, counted: {self._name}"
            self._compiled[size] = compiled(self._session, what, function, *args).call
        self._count = 0
        jax.block_until_ready(self._compiled[size](*args))
        jax.effects_barrier()
        return self._count
