"""A profile of the phases of an estimate: where they ended, their drift, the losses between them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR
from contrastive_meta._contrastive import Contrastive
from contrastive_meta._contrastive.phases import on_line
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import LinearNudge, Nudge
from contrastive_meta._problem import Params, same_arrays
from contrastive_meta._report.diagnose.findings import Segment
from contrastive_meta._result import EstimatorState
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop

NUM_POSITIONS = 21
# Between two positions the slopes are interpolated at this many.
_FINE = 20


class PhaseProfile(NamedTuple):
    """The phases of one estimate.

    Attributes:
      free: the free phase as its solver reported it.
      free_residual: norm of the inner gradient where it ended.
      noise: rounding noise of the inner gradient.
      nudge_norm: norm of the outer gradient there.
      scale: length that displacements are relative to.
      nudges: strength of each phase.
      ends: where each phase ended, a leading axis of phases.
      residuals: norm of the gradient of each phase's loss there.
      statuses: of each phase's learner.
      response: dphi/dbeta.
      num_gradients: spent by the phases.
      replaced: whether the solver or the nudge of the phases failed and its fallback was used.
      on: where learning ends if it continues without a nudge.
      drift: distance from the end of the free phase to `on`.
      statistic: norm of the statistic's change over that distance, relative to its change by a unit nudge.
    """

    free: Solution
    free_residual: jax.Array
    noise: jax.Array
    nudge_norm: jax.Array
    scale: jax.Array
    nudges: jax.Array
    ends: Params
    residuals: jax.Array
    statuses: jax.Array
    response: Params
    num_gradients: jax.Array
    replaced: jax.Array
    on: Params
    drift: jax.Array
    statistic: jax.Array


@jax.jit
def profile_phases(estimator: Contrastive, instance: Instance, state: EstimatorState) -> PhaseProfile:
    """Run the free and the nudged phases as the estimator does, then continue the free phase without a nudge."""
    free = instance.free_phase(estimator.solver, state)
    if estimator.target_error is None:
        # The gradients of the error estimate are no part of what a phase learns with.
        estimator = dataclasses.replace(estimator, estimate_error=False)
    phases = estimator._phases(instance, state, free)
    last = phases.run(phases.first())
    setup, line = phases.setup, last.kept
    instance, flattening = setup.tree_instance, setup.flattening
    flatten, unflatten = flattening.flatten, flattening.unflatten
    by = estimator.nudged_by(instance)
    nudges = line.contrast.beta * setup.stencil.nudges
    ends = on_line(line.base.params, line.response, nudges)

    budget = jnp.maximum(1, last.num_gradients // nudges.size)
    on = _learn_on(by.solver, instance, free, budget)
    no, none = jnp.asarray(False), jnp.zeros_like(nudges)
    residuals = setup.evaluate(line.base, ends, nudges, no, last.ran.linear).residuals
    both = jax.tree.map(
        lambda a, b, x: jnp.stack([a, *[b] * (nudges.size - 1)]).astype(x.dtype),
        flatten(free.params), flatten(on.params), ends,
    )  # fmt: skip
    measured = setup.evaluate(line.base, both, none, no, last.ran.linear).statistics
    before, after = tree.unstack(measured, 2)
    by_nudge = tree.norm(line.contrast.grad)
    return PhaseProfile(
        free=free,
        free_residual=free.residual,
        noise=setup.start.noise,
        nudge_norm=setup.start.nudge_norm,
        scale=setup.start.scale,
        nudges=nudges,
        ends=jax.vmap(unflatten)(ends),
        residuals=jax.vmap(tree.norm)(residuals),
        statuses=last.ran.statuses,
        response=unflatten(tree.scale(-1.0, line.response)),
        num_gradients=last.num_gradients,
        replaced=last.ran.linearised if by.reruns else last.by_solver,
        on=on.params,
        drift=tree.norm(tree.subtract(on.params, free.params)),
        statistic=tree.norm(tree.subtract(after, before)) / by_nudge,
    )


def _learn_on(solver: InnerSolver, instance: Instance, free: Solution, budget: jax.Array) -> Solution:
    """Run the learner of the nudged phases from the free solution, without a nudge."""
    memory = free.memory if same_arrays(free.memory, solver.init_memory(free.params)) else ()
    return instance.learn_on(solver, free.params, Stop(tol=jnp.zeros((), instance.dtype), max_steps=budget), memory)


def nudge_used(estimator: Contrastive, instance: Instance, replaced: bool) -> Nudge:
    """The nudge of the phases. Where the requested one failed, it is that of the fallback."""
    # That of the fast learner's phases, and in place of the loss nudge.
    return estimator.nudge or (LinearNudge() if replaced else estimator.nudged_by(instance).default_nudge)


class SegmentSlopes(NamedTuple):
    """Slopes of both losses on the segment from one point to another."""

    inner_slope: jax.Array
    nudged_slope: jax.Array
    length: jax.Array


@functools.partial(jax.jit, static_argnames="number")
def measure_segment(
    instance: Instance, nudge: Nudge, base: Params, end: Params, beta: jax.Array, number: int = NUM_POSITIONS
) -> SegmentSlopes:
    """Slopes of inner and nudged loss at positions from `base` to `end`, per length of the segment."""
    instance = instance.in_dtype_of_loss()
    outer_grad = tree.grad(instance.outer)(base)
    nudged = instance.replace_problem(
        nudge.apply(instance.problem, base, instance.meta_params, instance.task, outer_grad)
    )
    way = tree.subtract(end, base)

    def slopes(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = tree.add_scaled(base, position, way)
        inner = tree.vdot(tree.grad(nudged.inner)(at), way)
        return inner, inner + beta * tree.vdot(tree.grad(nudged.outer)(at), way)

    inner_slope, nudged_slope = jax.lax.map(slopes, jnp.linspace(0.0, 1.0, number, dtype=instance.dtype))
    return SegmentSlopes(inner_slope, nudged_slope, tree.norm(way))


def make_segment(found: SegmentSlopes, beta: float, noise: float) -> Segment:
    """The losses on the way, from its slopes, and the barriers among them.

    Args:
      found: the slopes.
      beta: of the phase.
      noise: rounding noise of the inner gradient.
    """
    positions = np.linspace(0.0, 1.0, NUM_POSITIONS)
    inner, nudged = (np.asarray(slope, np.float64) for slope in (found.inner_slope, found.nudged_slope))
    length = float(found.length)
    inner_loss, inner_barrier = _loss_profile(positions, inner)
    nudged_loss, barrier = _loss_profile(positions, nudged)
    line = inner[0] + positions * (inner[-1] - inner[0])
    change = abs(inner[-1] - inner[0])
    deviation = float(np.max(np.abs(inner - line)))
    return Segment(
        beta=beta,
        positions=tuple(positions.tolist()),
        inner_loss=inner_loss,
        nudged_loss=nudged_loss,
        inner_slope=tuple(inner.tolist()),
        nudged_slope=tuple(nudged.tolist()),
        length=length,
        inner_barrier=inner_barrier,
        barrier=barrier,
        noise=NOISE_FLOOR * noise * length,
        bend=deviation / change if change > 0 else (float("nan") if np.isnan(deviation) else 0.0),
    )


def _loss_profile(
    positions: npt.NDArray[np.float64], slopes: npt.NDArray[np.float64]
) -> tuple[tuple[float, ...], float]:
    """The loss at each position relative to the first, and the height of the highest pass between two lower points."""
    if not np.isfinite(slopes).all():
        return (float("nan"),) * len(positions), float("nan")
    # An interpolant that invents no change of sign, and so no barrier.
    loss = PchipInterpolator(positions, slopes).antiderivative()
    fine = loss(np.linspace(0.0, 1.0, _FINE * (len(positions) - 1) + 1))
    # A pass is as high as it stands above the lowest point on either side, whichever is less.
    before, after = np.minimum.accumulate(fine), np.minimum.accumulate(fine[::-1])[::-1]
    return tuple(loss(positions).tolist()), float(np.max(fine - np.maximum(before, after)))
