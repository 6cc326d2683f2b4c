"""Few-shot learning in batches of 4 tasks: a 4-block CNN on drawings (iMAML), against 5 steps of MAML."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Record, Session, precision
from benchmarks.loops_cnn_network import (
    NUM_QUERIES,
    NUM_TASKS,
    Drawings,
    Size,
    anchored_loss,
    draw_tasks,
    glyphs,
    init_params,
    inner_loss,
    outer_loss,
)
from benchmarks.loops_measure import compiled, median, ratio, record_aim, time_in_turn

CASE = "cnn"
NUM_STEPS = 8  # outer
RATE, INNER_STEPS, MAML_STEPS = 0.1, 16, 5
CONTRAST, SEQUENTIAL = "contrast", "contrast, sequential"
WITHOUT_ESTIMATE, MAML = "contrast, no estimate", "MAML, 5 steps"
PLAIN = "one gradient of each task"


def run(session: Session) -> None:
    """A few outer steps of each method in turn, each on its own trajectory, all on the same tasks."""
    x64 = bool(session.x64)
    size = Size(8, 4, 1) if session.smoke else Size()
    num_steps = 1 if session.smoke else NUM_STEPS
    images, source = _images(session, size)
    rng = np.random.default_rng(session.seed)
    with precision(x64):
        batches = [draw_tasks(rng, images) for _ in range(num_steps)]
        params = init_params(jax.random.key(session.seed), size)
        methods = _methods(session.smoke)
        session.progress.begin("cnn: compiling", 1 + len(methods))
        loops = {name: _Loop(session, name, *method, params, batches) for name, method in methods.items()}
        # What a counted gradient would cost if nothing else were run: all tasks at once, as a batch has them.
        plain = compiled(session, PLAIN, _plain_gradients, params, batches[0])
        turns: dict[str, Callable[[], Any]] = {name: loop.step for name, loop in loops.items()}
        turns[PLAIN] = functools.partial(plain.call, params, batches[0])
        seconds, raised = time_in_turn(session, f"cnn: {num_steps} outer steps of {NUM_TASKS} tasks", turns, num_steps)
    for error in raised.values():
        raise error
    common: Record = {"x64": x64, "case": CASE, "kind": "method", "problem": "4-block CNN", "data": source}
    setting: Record = {"size": size._asdict(), "num_tasks": NUM_TASKS, "num_params": _count(params)}
    gradient = seconds[PLAIN]
    session.record(
        **common,
        **setting,
        method=PLAIN,
        seconds=median(gradient),
        all_seconds=gradient,
        num_gradients=1,
        **plain.size(),
    )
    rows = {}
    for name, loop in loops.items():
        times = seconds[name]
        # A batch takes as long as its longest task.
        counted = [int(np.max(told.num_gradients)) for told in loop.told]
        as_plain = [num * one for num, one in zip(counted, gradient, strict=True)]
        statuses = [cm.Status(int(status)).name for told in loop.told for status in told.status]
        rows[name] = session.record(
            **common,
            **setting,
            method=name,
            seconds=median(times),
            all_seconds=times,
            over={MAML: ratio(times, seconds[MAML])},
            num_gradients=median(counted),
            mean_num_gradients=float(np.mean([told.num_gradients for told in loop.told])),
            over_plain=ratio(times, as_plain) if min(counted) > 0 else None,
            statuses={status: statuses.count(status) for status in dict.fromkeys(statuses)},
            estimate=median([float(np.max(told.error_estimate)) for told in loop.told]),
            outer_losses=loop.values,
            outer_loss=loop.values[-1],
            **loop.program.size(),
        )
    default, maml = rows[CONTRAST], rows[MAML]
    for aim, target, measured in (
        ("time to trace and compile over MAML", 1.5, default["compile_cpu_seconds"] / maml["compile_cpu_seconds"]),
        ("time of a step over MAML", 4.0, default["over"][MAML]),
        ("time of a step over its counted gradients as plain ones", 1.3, default["over_plain"]),
    ):
        record_aim(session, x64=x64, case=CASE, aim=f"4-block CNN: {aim}", target=target, measured=measured)


def _methods(smoke: bool) -> dict[str, tuple[cm.BilevelProblem, cm.MetaGradientEstimator]]:
    """With their problems: MAML's has no anchor."""
    learner = cm.OptaxDescent(optax.sgd(RATE), num_steps=2 if smoke else INNER_STEPS)
    anchored = cm.BilevelProblem(anchored_loss, outer_loss, lambda start, task: start)
    free = cm.BilevelProblem(inner_loss, outer_loss, lambda start, task: start)
    maml = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(RATE), num_steps=1 if smoke else MAML_STEPS))
    contrast = cm.Contrastive(learner)
    if smoke:
        # As published, at a typed strength: the program that compiles fastest.
        published = cm.Contrastive(learner, learner, cm.forward_difference(0.1), cm.LossNudge(), estimate_error=False)
        return {CONTRAST: (anchored, published), MAML: (free, maml)}
    return {
        CONTRAST: (anchored, contrast),
        SEQUENTIAL: (anchored, dataclasses.replace(contrast, sequential=True)),
        WITHOUT_ESTIMATE: (anchored, dataclasses.replace(contrast, estimate_error=False)),
        MAML: (free, maml),
    }


class _Loop:
    """A method's trajectory."""

    def __init__(
        self,
        session: Session,
        name: str,
        problem: cm.BilevelProblem,
        estimator: cm.MetaGradientEstimator,
        params: Any,
        batches: list[Drawings],
    ) -> None:
        optimizer = optax.adam(1e-3)
        value_and_grad = cm.value_and_meta_grad(problem, estimator, has_aux=True)

        def step(start: Any, memory: Any, tasks: Drawings) -> Any:
            (value, told), grad = value_and_grad(start, tasks)
            updates, memory = optimizer.update(grad, memory, start)
            return value, told, (optax.apply_updates(start, updates), memory)

        self._batches, self._carry = iter(batches), (params, optimizer.init(params))
        self.program = compiled(session, name, step, *self._carry, batches[0])
        self.values: list[float] = []
        self.told: list[cm.Diagnostics] = []

    def step(self) -> Any:
        """One outer step."""
        value, told, self._carry = jax.block_until_ready(self.program.call(*self._carry, next(self._batches)))
        self.values.append(float(value))
        self.told.append(told)


def _plain_gradients(start: Any, tasks: Drawings) -> Any:
    """Of the anchored inner loss, every task at parameters of its own."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_TASKS), start)
    return jax.vmap(jax.grad(anchored_loss), (0, None, 0))(params, start, tasks)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _images(session: Session, size: Size) -> tuple[Any, str]:
    """Omniglot where a data folder has it, or drawings made here: what they show does not change what a step costs."""
    if not session.smoke:
        try:
            return data.omniglot(session.data), "Omniglot"
        except data.DataMissingError:
            pass
    return glyphs(session.seed, 40, 1 + NUM_QUERIES, size.side), "generated glyphs"
