"""What to change, in one sentence: the first of a table of rules whose condition the numbers meet."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from contrastive_meta._base_point import UNCONVERGED
from contrastive_meta._report.diagnose.findings import Findings, Segment
from contrastive_meta._report.text import share
from contrastive_meta._result import LARGEST_ACCURATE_ERROR, Status

# An error within this factor of the least is as good as it.
NEAR_LEAST = 2.0


class Rule(NamedTuple):
    """When to say what.

    Attributes:
      name: of the rule.
      applies: whether the numbers call for it.
      sentence: a template for the entries of `_values`.
    """

    name: str
    applies: Callable[[Findings], bool]
    sentence: str


def advise(found: Findings) -> tuple[str, str]:
    """The name of the first rule that applies, and its sentence. The last rule always does."""
    rule = next(rule for rule in RULES if rule.applies(found))
    return rule.name, rule.sentence.format(**_values(found))


def barrier(found: Findings) -> Segment | None:
    """The segment with the highest barrier; None where no segment has one."""
    blocked = [s for s in found.segments if np.isfinite(s.relative_barrier) and not s.same_basin]
    return max(blocked, key=lambda s: s.relative_barrier, default=None)


def unbounded_segment(found: Findings) -> Segment | None:
    """A way along which the nudged loss curves downwards, or that is not finite: there is no minimum to go to."""
    lost = [s for s in found.segments if not np.isfinite(s.nudged_loss[-1])]
    return next(iter([*lost, *(s for s in found.segments if s.is_unbounded)]), None)


def _unlearned(found: Findings) -> bool:
    """Whether more learning moves `params` far and the phases did not correct for it."""
    made_up = found.drift.gradient <= found.tolerance
    return found.status == Status.FREE_NOT_CONVERGED or (found.drift.distance > UNCONVERGED and not made_up)


def _worth_changing(found: Findings) -> bool:
    return found.error > found.tolerance and found.curve.excess > NEAR_LEAST


def _indefinite(found: Findings) -> bool:
    return found.status == Status.INDEFINITE_CURVATURE and any(segment.curves_down for segment in found.segments)


def _noisy(found: Findings) -> bool:
    curve = found.curve
    return found.status == Status.LOST_IN_NOISE or (curve.chosen < curve.least and _worth_changing(found))


def _truncated(found: Findings) -> bool:
    curve = found.curve
    too_large = curve.chosen > curve.least and _worth_changing(found)
    coarse = found.status == Status.APPROXIMATE and found.error > found.tolerance
    return too_large or (coarse and not _loose(found))


def _unbounded(found: Findings) -> bool:
    return found.status == Status.UNBOUNDED_NUDGE or (unbounded_segment(found) is not None and not _noisy(found))


def _nudged_not_converged(found: Findings) -> bool:
    residual = float(found.result.diagnostics.nudged_residual)
    return found.status == Status.NUDGED_NOT_CONVERGED or residual > UNCONVERGED


def _loose(found: Findings) -> bool:
    """Whether the estimated error is large at all strengths: then it is that of the phases' residuals."""
    return found.told > max(LARGEST_ACCURATE_ERROR, found.tolerance) and not _worth_changing(found)


def _unsettled(found: Findings) -> bool:
    return found.drift.gradient > found.tolerance and found.drift.gradient > NEAR_LEAST * found.curve.error


def _out_of_reach(found: Findings) -> bool:
    return found.curve.referenced and not found.error <= found.tolerance


def _other_status(found: Findings) -> bool:
    return found.status not in (Status.CONVERGED, Status.FELL_BACK, Status.APPROXIMATE)


RULES = (
    Rule(
        "not finite",
        lambda found: found.status == Status.NOT_FINITE,
        "A loss, a gradient or a solution is not finite: look for NaN in the task, then lower the learning rate.",
    ),
    Rule(
        "diverged",
        lambda found: found.status == Status.DIVERGED,
        "Learning diverged: lower the inner learning rate.",
    ),
    Rule(
        "unlearned",
        _unlearned,
        "Learning had not ended: to continue moves `params` by {drift} of their norm and the gradient by {left} "
        "({kind} error {error}); give the solver more steps.",
    ),
    Rule(
        "indefinite",
        _indefinite,
        "The inner loss curves downwards along the response, so this is no minimum: learn for longer, regularise, or "
        "start elsewhere.",
    ),
    Rule(
        "drift",
        lambda found: not found.matched and found.drift.statistic > found.tolerance,
        "What learning left over is divided by beta, {statistic} times the gradient: leave out `matched=False`, or "
        "give the solver more steps.",
    ),
    Rule(
        "noise",
        _noisy,
        "Rounding dominates: use float64, complex_step, or a larger displacement, about {larger} times this beta "
        "(the error would go from {error} to {least}).",
    ),
    Rule(
        "barrier",
        lambda found: barrier(found) is not None,
        "The nudge leaves the basin: a barrier {barrier} times as high as the loss changes lies on the way to "
        "beta = {barrier_beta}; lower beta{lower}.",
    ),
    Rule(
        "unbounded nudge",
        _unbounded,
        "The nudged loss at beta = {unbounded_beta} has no minimum near the free solution: lower beta{lower}, or use "
        "`LinearNudge()` or `forward_difference`.",
    ),
    Rule(
        "unanswered",
        _nudged_not_converged,
        "The nudged phases had not ended: the residual is {unanswered} of the nudge; give `nudged_solver` more steps.",
    ),
    Rule(
        "truncation",
        _truncated,
        "Truncation dominates: lower beta{lower} (the error would go from {error} to {least}), or use a scheme of "
        "higher order.",
    ),
    Rule(
        "unsettled",
        _unsettled,
        "Learning had not ended: {left} of the gradient is left; give the solver more steps.",
    ),
    Rule(
        "loose",
        _loose,
        "The phases left too much of the nudge along low curvature, where residuals hardly show it (estimated error "
        "{told}): type a lower tolerance, or ask for `target_error`.",
    ),
    Rule(
        "out of reach",
        _out_of_reach,
        "No strength comes nearer to the reference than {least}: the phases measure another minimum, unfinished "
        "learning, or fewer of the meta-parameters than it does; `check` says which.",
    ),
    Rule("status", _other_status, "{status}"),
    Rule("nothing", lambda found: True, "Nothing to change: {kind} error {error}."),
)


def _values(found: Findings) -> dict[str, str]:
    """What the sentences are filled in with."""
    curve, blocked, lost = found.curve, barrier(found), unbounded_segment(found)
    best = curve.strengths[curve.least]
    factor = best / found.beta
    fallback = min((s.beta for s in found.segments), default=found.beta)
    return {
        "drift": share(found.drift.distance),
        "left": share(found.drift.gradient),
        "statistic": f"{found.drift.statistic:.2g}",
        "larger": f"{factor:.0f}" if factor > 1 else "10",
        "lower": f" to about {best:.1e}" if factor < 1 else "",
        "error": share(found.error),
        "least": share(curve.errors[curve.least]),
        "told": share(found.told),
        "barrier": f"{blocked.relative_barrier:.2g}" if blocked else "",
        "barrier_beta": f"{blocked.beta:.2e}" if blocked else "",
        "unbounded_beta": f"{lost.beta if lost else fallback:.2e}",
        "unanswered": share(float(found.result.diagnostics.nudged_residual)),
        "status": found.status.describe(),
        "kind": "relative" if curve.referenced else "estimated",
    }
