"""How good one contrastive estimate is and what would make it better: strengths around its own, phases looked into."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import UNCONVERGED
from contrastive_meta._contrastive import Contrastive
from contrastive_meta._estimators import MetaGradientEstimator
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import Nudge, NudgeScheme
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, as_float_arrays, float_dtype_of, same_structure
from contrastive_meta._report.diagnose.curve import Curve, Points, make_curve, strengths_around
from contrastive_meta._report.diagnose.diagnosis import Diagnosis
from contrastive_meta._report.diagnose.findings import Drift, Phase, Segment
from contrastive_meta._report.diagnose.phase_profile import (
    PhaseProfile,
    make_segment,
    measure_segment,
    nudge_used,
    profile_phases,
)
from contrastive_meta._report.gradients import Vector, flatten, norm, relative_error, status_of, unseen_told_later
from contrastive_meta._result import EstimatorState, MetaGradient, Status


def diagnose(
    problem: BilevelProblem,
    estimator: Contrastive,
    meta_params: MetaParams,
    task: Task,
    *,
    reference: Any = None,
    tolerance: float = 1e-2,
    state: EstimatorState | None = None,
    key: jax.Array | None = None,
) -> Diagnosis:
    """Look into one contrastive estimate: is the strength right, had the phases ended, are they in one basin?

    Runs outside jit, at the price of about twenty estimates: one with the estimator as it is; one at each of 17
    strengths from 1e-4 to 1e4 times the strength it chose, in the same scheme (none recompiles); one from where
    learning goes on without a nudge. Without a reference the errors at these strengths are estimated from
    neighbouring strengths (Richardson). An error that all strengths have in common, such as that of unfinished
    learning, shows in the residuals and in the drift instead.

    Args:
      problem: the bilevel problem.
      estimator: a `Contrastive`. Others have no phases to look into: `compare` and `check` are for them.
      meta_params: where.
      task: a single task.
      reference: what errors are measured against: an estimator, or a gradient like `meta_params`; None for
        neighbouring strengths.
      tolerance: relative error that is good enough. Smaller errors give no cause for advice.
      state: as in `estimate`: a warm start to diagnose as it is in a training loop.
      key: as in `estimate`; the same for all.

    Returns:
      A diagnosis: `print` it for a page of text with one sentence of advice, `draw` it for a figure.

    Raises:
      TypeError: an estimator that is not a `Contrastive`; called under jit.
      ValueError: a reference unlike `meta_params`; a tolerance that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros(2),
      ... )
      >>> diagnosis = cm.diagnose(problem, cm.Contrastive(cm.LBFGS()), jnp.ones(2), None)
      >>> diagnosis.rule
      'nothing'
    """
    _check(estimator, meta_params, task, reference, tolerance)
    meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
    key = jax.random.key(0) if key is None else key
    with unseen_told_later(), jax.default_matmul_precision("highest"):
        state = estimator.init_state(problem, meta_params, task) if state is None else state
        dtype = float_dtype_of(problem, state.params, meta_params, task)
        subject = _Subject(problem, estimator, meta_params, task, key, state, dtype)
        result = subject.as_it_is()
        curve = _measure_curve(subject, result, reference)
        # Numpy from here on: what is computed once is not worth a program.
        profile = jax.device_get(profile_phases(subject.at(curve.strengths[curve.chosen]), subject.instance, state))
        return Diagnosis(
            result=result,
            estimator=_describe(estimator, dtype),
            tolerance=tolerance,
            curve=curve,
            phases=_phases(estimator, profile, result),
            noise=float(profile.noise),
            drift=_drift(subject, profile, result),
            segments=_segments(subject, profile, result),
            matched=subject.scheme.matched or subject.scheme.free_phase is None,
            gradients=_gradients(profile, result),
        )


class _Subject(NamedTuple):
    """What is diagnosed: arguments of `diagnose`, and the dtype of the losses."""

    problem: BilevelProblem
    estimator: Contrastive
    meta_params: MetaParams
    task: Task
    key: jax.Array
    state: EstimatorState
    dtype: Any

    @property
    def instance(self) -> Instance:
        return Instance(self.problem, self.meta_params, self.task, self.key, self.dtype)

    @property
    def scheme(self) -> NudgeScheme:
        """The estimator's phases, whatever their strength."""
        return self.estimator.scheme.template()

    def at(self, strength: float) -> Contrastive:
        """The estimator with its own scheme at a typed strength: as an array, so that none recompiles."""
        factor = jnp.asarray(strength, self.dtype) / self.scheme.strength(self.dtype)
        return dataclasses.replace(self.estimator, scheme=self.scheme.scaled(factor), nudge=self.nudge)

    @property
    def nudge(self) -> Nudge | None:
        """The estimator's nudge, the same at all strengths: no other one replaces it where a strength is too large."""
        by = self.estimator.nudged_by(self.instance)
        return self.estimator.nudge or (by.default_nudge if by.reruns else None)

    def as_it_is(self) -> MetaGradient:
        """The estimate to be diagnosed; that of a typed strength is one of those to come, already compiled then."""
        if not self.estimator.scheme.adapts and self.estimator.nudge is self.nudge:
            return self.estimate(float(self.scheme.strength(self.dtype)), self.state)
        return self.estimator.estimate(self.problem, self.meta_params, self.task, state=self.state, key=self.key)

    def estimate(self, strength: float, state: EstimatorState) -> MetaGradient:
        return self.at(strength).estimate(self.problem, self.meta_params, self.task, state=state, key=self.key)


def _check(estimator: Any, meta_params: MetaParams, task: Task, reference: Any, tolerance: float) -> None:
    if not isinstance(estimator, Contrastive):
        raise TypeError(
            "`diagnose` looks into the phases of a contrast: expected a Contrastive estimator, got a "
            f"{type(estimator).__name__}. `compare` and `check` set any estimators side by side."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((estimator, meta_params, task))):
        raise TypeError("`diagnose` looks at values: call it outside jit, vmap and grad, on a single task.")
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive; got {tolerance}.")
    if reference is not None and not isinstance(reference, MetaGradientEstimator):
        expected, got = jax.tree.map(np.shape, meta_params), jax.tree.map(np.shape, reference)
        if not same_structure(meta_params, reference) or expected != got:
            raise ValueError(
                f"`reference` must be a gradient like `meta_params`: expected shapes {expected}, got {got}. Pass the "
                "`grad` of a result, or an estimator."
            )


def _measure_curve(subject: _Subject, result: MetaGradient, reference: Any) -> Curve:
    beta = float(result.diagnostics.beta)
    strengths = strengths_around(beta if np.isfinite(beta) and beta > 0 else 1.0)
    found = [subject.estimate(strength, subject.state) for strength in strengths]
    points = Points(
        strengths,
        [flatten(each.grad) for each in found],
        [float(each.diagnostics.error_estimate) if subject.estimator.estimate_error else np.nan for each in found],
        [status_of(each) for each in found],
    )
    against, text = _resolve(subject, reference)
    return make_curve(points, against, text, subject.scheme.order, float(jnp.finfo(subject.dtype).eps))


def _resolve(subject: _Subject, reference: Any) -> tuple[Vector | None, str]:
    if reference is None:
        return None, "as neighbouring strengths show it (Richardson)"
    if not isinstance(reference, MetaGradientEstimator):
        return flatten(reference), "against the gradient passed in `reference`"
    result = reference.estimate(subject.problem, subject.meta_params, subject.task, key=subject.key)
    status = status_of(result)
    caveat = "" if status == Status.CONVERGED else f", which may be wrong itself: {status.name}"
    return flatten(result.grad), f"against {type(reference).__name__} as passed in `reference`{caveat}"


def _describe(estimator: Contrastive, dtype: Any) -> str:
    scheme = estimator.scheme.template()
    nudged = type(estimator.nudged_solver).__name__ if estimator.nudged_solver is not None else "default"
    number = len(scheme.nudges)
    return (
        f"Contrastive({type(estimator.solver).__name__}, nudged_solver={nudged}), {number} "
        f"phase{'s' if number > 1 else ''} of order {scheme.order}, {jnp.dtype(dtype).name}"
    )


def _phases(estimator: Contrastive, profile: PhaseProfile, result: MetaGradient) -> tuple[Phase, ...]:
    tol = getattr(estimator.solver, "tol", None)
    scale, nan = float(profile.scale), float("nan")
    base = flatten(result.params)
    moved = norm(flatten(profile.free.params) - base) / scale
    free = Phase(
        name="free",
        beta=0.0,
        residual=float(profile.free_residual),
        tolerance=nan if tol is None else float(tol),
        moved=moved,
        status=Status(int(profile.free.status)),
    )
    nudges = np.asarray(profile.nudges)
    weakest = float(np.min(np.abs(nudges[nudges != 0]), initial=np.inf))
    phases = [free]
    for index, (beta, end) in enumerate(zip(nudges, tree.unstack(profile.ends, len(nudges)), strict=True)):
        enough = UNCONVERGED * (abs(beta) if beta != 0 else weakest) * float(profile.nudge_norm)
        phases.append(
            Phase(
                name="nudged" if beta != 0 else "control",
                beta=complex(beta),
                residual=float(profile.residuals[index]),
                tolerance=float(enough),
                moved=_distance(end, base) / scale,
                status=Status(int(profile.statuses[index])),
            )
        )
    return tuple(phases)


def _distance(end: Any, base: Vector) -> float:
    """How far a phase ended from the base point; complex ones count with both their parts."""
    parts = [flatten(jax.tree.map(part, end)) for part in (np.real, np.imag)]
    return float(np.hypot(norm(parts[0] - base), norm(parts[1])))


def _drift(subject: _Subject, profile: PhaseProfile, result: MetaGradient) -> Drift:
    beta = float(np.min(np.abs(np.asarray(profile.nudges)[np.asarray(profile.nudges) != 0]), initial=np.inf))
    moved = beta * norm(flatten(profile.response))
    # On from where learning ended its model state stays.
    held = subject._replace(problem=subject.problem.at(result.model_state))
    on = held.estimate(beta, result.state._replace(params=profile.on, model_state=()))
    drift = float(profile.drift)
    before, after = flatten(result.grad), flatten(on.grad)
    return Drift(
        distance=drift / float(profile.scale),
        displacement=drift / moved if moved > 0 else (0.0 if drift == 0 else float("inf")),
        statistic=float(profile.statistic) / beta,
        gradient=0.0 if np.array_equal(before, after) else relative_error(before, after),
    )


def _segments(subject: _Subject, profile: PhaseProfile, result: MetaGradient) -> tuple[Segment, ...]:
    nudge = nudge_used(subject.estimator, subject.instance, bool(profile.replaced))
    nudges, base = np.asarray(profile.nudges), jax.device_get(result.params)
    instance = subject.instance.at(result.model_state)
    if np.iscomplexobj(nudges):
        # Complex phases have no loss to climb: the way is that of a real nudge of the same modulus.
        beta = float(np.min(np.abs(nudges)))
        ends = [(beta, jax.tree.map(lambda x, u: x + np.asarray(beta * u, x.dtype), base, profile.response))]
    else:
        stacked = tree.unstack(profile.ends, len(nudges))
        ends = [(float(beta), end) for beta, end in zip(nudges, stacked, strict=True) if beta != 0]

    def one(beta: float, end: Any) -> Segment:
        strength = jnp.asarray(beta, subject.dtype)
        return make_segment(measure_segment(instance, nudge, result.params, end, strength), beta, float(profile.noise))

    return tuple(one(*each) for each in ends)


def _gradients(profile: PhaseProfile, result: MetaGradient) -> dict[str, int]:
    free, nudged = int(profile.free.num_gradients), int(profile.num_gradients)
    rest = int(result.diagnostics.num_gradients) - free - nudged
    return {"free phase": free, "nudged phases": nudged, "strength and checks": max(rest, 0)}
