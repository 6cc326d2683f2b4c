"""What is made of phases: how wrong their contrast is held to be, and whether they ended where they should."""

import jax.numpy as jnp

from contrastive_meta._control import cast_like
from contrastive_meta._estimators._doubt import answer, relative_error, without_truncation
from contrastive_meta._estimators._free_point import FreePoint, free_status
from contrastive_meta._estimators._judge import judge, nudged_status
from contrastive_meta._estimators._phases import Assessed, Nudging, Phases
from contrastive_meta._result import Status, worst


def assess(nudging: Nudging, point: FreePoint, phases: Phases, *, estimate_error: bool) -> Assessed:
    """How wrong the contrast of phases is estimated to be, and what they left behind.

    Args:
      nudging: what the phases were to be.
      point: where the free phase ended.
      phases: what they left behind.
      estimate_error: whether to estimate an error.
    """
    setting, scheme, grad = nudging.setting, phases.scheme, phases.scheme.contrast(phases.statistic)
    remainder = scheme.contrast(phases.residual)
    untruncated = without_truncation(nudging, point, phases, grad) if estimate_error else None
    judged = judge(nudging, point, phases, remainder if untruncated is None else untruncated.remainder)
    told = nudged_status(nudging, point, phases, grad, judged)
    error, doubling, spent = jnp.asarray(jnp.nan, setting.dtype), jnp.zeros((), setting.dtype), judged.num_gradients
    if untruncated is not None:
        lacking = answer(nudging, point, phases, judged, untruncated.changed)
        error = relative_error(nudging, phases, judged, grad, untruncated.lacking, lacking)
        error = jnp.where(error > 0, jnp.hypot(error, untruncated.unseen), error)
        # What ran away, or was never finite, says nothing.
        error = jnp.where((told >= Status.UNBOUNDED_NUDGE) | jnp.isnan(error), jnp.inf, error)
        doubling, spent = untruncated.doubling, spent + lacking.num_gradients + 4 * len(scheme.nudges)
    assessed = Assessed(
        further=judged.further,
        free_residual=judged.residual,
        nudged_residual=judged.unanswered / point.usual_nudge(judged.outer_grad),
        displacement=scheme.strength(setting.dtype) * judged.moved / point.scale,
        error=error,
        doubling=doubling,
        status=worst(free_status(setting, point, judged.left), told),
        num_gradients=spent,
    )
    return cast_like(assessed, Assessed.nothing(setting.dtype))
