"""Nudged phases as published: learning itself is run again, on the nudged loss, from the free solution."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import FreePoint
from contrastive_meta._estimators._phases import Assessed, Goal, Nudging, Phases
from contrastive_meta._estimators._seek import Found, seek
from contrastive_meta._instance import Instance
from contrastive_meta._holomorphic import require_holomorphic
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._problem import MetaParams, Params, same_arrays
from contrastive_meta._response import measure_response
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop

_PHASES = "phases"
# Where an accuracy is asked for, phases take by default this many times the steps that one takes without.
_MOST_ROUNDS = 8
# A round that leaves more of the error than this is the last one.
_STALLED = 0.9


class Rounds(NamedTuple):
    """Phases that go on learning; leaves of `params` and `status` have a leading axis of phases."""

    params: Params
    status: jax.Array
    num_gradients: jax.Array
    num_steps: jax.Array
    share: jax.Array  # of the tolerance of the first round
    assessed: Assessed  # what was made of the phases
    running: jax.Array


def run_again(
    nudging: Nudging, point: FreePoint, solver: InnerSolver, nudged_tol: Any, goal: Goal | None = None
) -> Phases:
    """Run the scheme's phases from the free solution and measure each where it ends.

    Args:
      nudging: what the phases are to be.
      point: where the free phase ended.
      solver: the learner, bound to the meta-parameters.
      nudged_tol: gradient norm at which phases may stop, relative to |beta| ||v||; None for about eps^(2/3).
      goal: the accuracy for which all phases go on, in rounds of what the learner does for one.
    """
    scheme, chosen, pilot_gradients = _strength(nudging, point)
    # A learner may treat leaves differently: it gets the tree.
    setting, flattening = nudging.tree_setting, nudging.flattening
    start, nudged = flattening.unflatten(point.params), nudging.nudged(point.params, point.outer_grad)
    memory = point.solution.memory
    if not same_arrays(memory, solver.init_memory(start)):
        memory = ()
    if scheme.is_complex:
        start, memory = tree.to_complex(start), ()
        solver.check_holomorphic(start)
    nudges, _ = scheme.arrays(setting.dtype)
    tolerances = _tolerances(setting, point, nudges, nudged_tol)

    def run(begin: Params, beta: jax.Array, stop: Stop) -> Solution:
        def on_minibatch(at: Params, step: jax.Array) -> jax.Array:
            return nudged.nudged_minibatch(at, beta, step)

        return solver.solve(
            lambda at: nudged.nudged(at, beta),
            begin,
            minibatch_loss=on_minibatch if nudged.problem.sample is not None else None,
            memory=memory,
            stop=stop,
        )

    # An unmatched free phase is the free solution itself; everything else runs, the matched control included.
    skipped = None if scheme.matched else scheme.free_phase
    running = jnp.array([k for k in range(len(scheme.nudges)) if k != skipped])
    begin = jax.tree.map(lambda x: jnp.broadcast_to(x, (running.size, *x.shape)), start)

    def learn(begin: Params, share: jax.Array) -> Solution:
        phases = begin, nudges[running], share * tolerances[running]
        if nudging.sequential:
            return _one_by_one(run, *phases, solver.step_budget)
        return _together(run, *phases)

    def measure(ended: Params, status: jax.Array, num_gradients: jax.Array) -> Phases:
        if skipped is not None:
            ended = jax.tree.map(lambda xs, x: jnp.insert(xs, skipped, x, axis=0), ended, start)
            status = jnp.insert(status, skipped, 0)
        ended = jax.vmap(flattening.flatten)(ended)
        residual, statistic = nudging.evaluate(nudged, ended, nudges)
        base = scheme.at_zero(ended)
        at_base = tree.grad(nudging.setting.inner)(base), nudging.setting.outer_value_and_grad(base)
        spent = (pilot_gradients + num_gradients + len(scheme.nudges) + 2).astype(jnp.int32)
        return Phases(scheme, ended, statistic, residual, status, base, *at_base, spent, chosen, jnp.asarray(True))

    one = jnp.ones((), tolerances.dtype)
    if goal is None:
        solutions = learn(begin, one)
        return measure(solutions.params, solutions.status, jnp.sum(solutions.num_gradients))
    none, nothing = jnp.int32(0), Assessed.nothing(setting.dtype)
    first = Rounds(begin, jnp.zeros(running.shape, jnp.int32), none, none, one, nothing, jnp.asarray(True))
    most = _MOST_ROUNDS * solver.step_budget if goal.max_steps is None else goal.max_steps
    return _in_rounds(goal, learn, measure, first, most)


def _in_rounds(
    goal: Goal, learn: Callable[[Params, jax.Array], Solution], measure: Callable[..., Phases], first: Rounds, most: Any
) -> Phases:
    """Phases that go on until they are held to be right to what was asked for, or another round would not help.

    Args:
      goal: what was asked for.
      learn: from where phases are, with a share of the tolerance of the first round.
      measure: phases from where they ended, their statuses, and the gradients spent.
      first: where they begin.
      most: steps of each.
    """

    def go_on(rounds: Rounds) -> Rounds:
        solutions = learn(rounds.params, rounds.share)
        spent = rounds.num_gradients + jnp.sum(solutions.num_gradients)
        assessed = goal.assess(measure(solutions.params, solutions.status, spent))
        num_steps, last = rounds.num_steps + jnp.max(solutions.num_steps), jnp.max(solutions.num_steps)
        more = goal.missed(assessed) & (assessed.error < _STALLED * rounds.assessed.error) & (num_steps + last <= most)
        after = Rounds(
            solutions.params,
            solutions.status,
            spent + assessed.num_gradients,
            num_steps,
            0.1 * rounds.share,
            assessed,
            more,
        )
        return cast_like(after, rounds)

    last: Rounds = jax.lax.while_loop(lambda rounds: rounds.running, go_on, first)
    return measure(last.params, last.status, last.num_gradients)._replace(assessed=last.assessed)


def _strength(nudging: Nudging, point: FreePoint) -> tuple[NudgeScheme, jax.Array, jax.Array]:
    """The scheme, the displacement that was sought for it (else 0), and the gradients spent."""
    probe, none = nudging.probe(point), jnp.int32(0)
    if nudging.sought is None:
        scheme, spent = nudging.scheme.resolve(probe)
        return jax.tree.map(jnp.asarray, scheme), jnp.zeros_like(nudging.chosen), spent
    num_steps = nudging.sought.default.num_pilot_steps

    # A pilot's response gives the line along which strengths are compared.
    def look(_: Any) -> tuple[Found, jax.Array]:
        response, spent = measure_response(probe, num_steps)
        at_base = nudging.nudged(point.params, point.outer_grad), point.params, point.inner_grad
        found = seek(nudging, point, *at_base, response, to_minima=True)
        return found._replace(num_gradients=found.num_gradients + spent), tree.norm(response)

    before = Found(nudging.chosen, none), tree.norm(nudging.response).astype(nudging.chosen.dtype)
    (chosen, spent), length = only_if(nudging.chosen == 0, look, before)
    scheme = nudging.scheme.for_response(probe._replace(chosen=chosen), length)
    return jax.tree.map(jnp.asarray, scheme), chosen, spent


def require_complex_capable(setting: Instance, scheme: NudgeScheme, start: Params) -> None:
    """Raise unless both losses and their gradients are holomorphic."""
    meta_params, start = tree.to_complex(setting.meta_params), tree.to_complex(start)
    for name, loss in (("inner_loss", setting.problem.inner), ("outer_loss", setting.problem.outer)):
        require_holomorphic(
            tree.value_and_grad(functools.partial(_on_task, loss, setting.task), argnums=(0, 1)),
            start,
            meta_params,
            what=f"{name} or its gradient",
            remedy="Complex schemes differentiate along a complex nudge: write the loss without this operation, "
            "or use a real scheme such as `central_difference`.",
            complex_step=len(scheme.nudges) == 1,
        )


def _tolerances(setting: Instance, point: FreePoint, nudges: jax.Array, nudged_tol: Any) -> jax.Array:
    """Absolute gradient norms at which phases may stop: relative to their nudge, not below the noise."""
    relative_tol = point.eps ** (2 / 3) if nudged_tol is None else nudged_tol
    sizes = jnp.abs(nudges)
    smallest = jnp.min(jnp.where(sizes > 0, sizes, jnp.inf))
    # The matched control stops with the weakest nudge.
    wanted = jnp.asarray(relative_tol, setting.dtype) * jnp.where(sizes > 0, sizes, smallest) * point.nudge_norm
    return jnp.maximum(wanted, 2 * point.noise).astype(setting.dtype)


def _together(run: Any, begin: Params, nudges: jax.Array, tolerances: jax.Array) -> Solution:
    """All phases in one vmapped solve; solvers that run to a tolerance go on until every phase is done."""
    solutions: Solution = jax.vmap(
        lambda at, beta, tol: run(at, beta, Stop(tol=tol, group=_PHASES)), axis_name=_PHASES
    )(begin, nudges, tolerances)
    return solutions


def _one_by_one(run: Any, begin: Params, nudges: jax.Array, tolerances: jax.Array, budget: Any) -> Solution:
    """One phase after another: the first to run decides how many steps the others take."""

    def next_phase(num_steps: jax.Array, phase: Any) -> tuple[jax.Array, Solution]:
        at, beta, tol, first = phase
        solution = run(at, beta, Stop(tol=jnp.where(first, tol, 0), max_steps=num_steps))
        return jnp.where(first, solution.num_steps, num_steps), solution

    first = jnp.arange(nudges.size) == nudges.size - 1
    _, solutions = jax.lax.scan(
        next_phase, jnp.asarray(budget, jnp.int32), (begin, nudges, tolerances, first), reverse=True
    )  # fmt: skip
    stacked: Solution = solutions
    return stacked


def _on_task(loss: Any, task: Any, params: Params, meta_params: MetaParams) -> jax.Array:
    value: jax.Array = loss(params, meta_params, task)
    return value
