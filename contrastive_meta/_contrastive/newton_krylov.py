"""The Newton-Krylov iteration: base point, response and contrast of the nudged phases, pass by pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR, UNCONVERGED
from contrastive_meta._contrastive.linear_solve import LEAST_EIGENVALUE
from contrastive_meta._contrastive.newton_step import (
    FORCING,
    GOOD_RATIO,
    GROWN,
    LONG,
    Line,
    Region,
    Solved,
    Systems,
    Trial,
    systems_of_a_step,
    unresolved_length,
)
from contrastive_meta._contrastive.phases import PhaseSetup
from contrastive_meta._control import cast_like, settle
from contrastive_meta._pytree import static, strategy

# Near a minimum with curvature the loss falls as predicted, to the second order. A ratio of actual to predicted
# reduction that is farther from 1 than this at the last step is a sign of a minimum without: along t^4 it stays at 1.3.
_UNSETTLED = 0.25
# A residual larger than this fraction of the residual before is a sign of too large a nudge.
_SUSPICIOUS = 0.3
# It is taken for truncation if that is expected to be at least this part of it.
_TRUNCATED = 0.1
# By what strengths and difference steps are divided then, and by how much at most.
_REDUCTION, _LARGEST_REDUCTION = 8.0, 8.0**3
# A strength is too strong if the best one is less than this fraction of it.
_TOO_STRONG = 0.25
# A base point that is on its way for this many passes has to be no worse than at the start, and after as many more it
# has to have halved its gradient. A convolutional network whose 16 steps of learning ended at a gradient of order 1
# wandered for all of its 40 passes. An MLP on breast cancer data is on its way for 9 passes, and converges in 7 more.
_PASSES_TO_HALVE = 8
# The third derivative bends products if a pass leaves more than this many times what products are accurate to; on
# convex problems and tanh networks it leaves up to 3 times that, on badly conditioned ones 5 to 100 times.
_BENT = 4.0


@strategy
class NewtonKrylov:
    """A nudged learner that takes the inner loss to be nearly quadratic, and checks that it is.

    For small beta, a nudge of strength beta moves the minimum along a straight line: phase k ends at base - beta_k u,
    where H u = v. Both are found from gradients of the inner loss alone. A pass solves two linear systems at once, by
    conjugate gradients in which a Hessian-vector product is the difference of two gradients: one system for the step
    that the free phase had left to take, and one for u. Where both take more than 32 steps, u waits until the base
    point has converged. Then the phases are evaluated where they should have ended. The contrast of their
    gradients is the residual v - H u, to the order of the scheme and free of the products' error. The gradient at the
    base point is the residual of learning. Both are the right-hand sides of the next pass. Two passes usually suffice.
    Where a pass leaves more than such products are accurate to, the third derivative bends them: from then on they are
    differences of gradients on both sides of the base point, two for a product.

    Far from a minimum the step of the base point is kept within a trust radius. The radius grows and shrinks with the
    ratio of actual to predicted reduction of the loss, and the response is not solved for before the base point
    arrives.

    The iteration ends when the residual of the nudge is below `tol`, or a pass no longer reduces it, or the budget is
    spent. Where the loss curves downwards, or no pass helped, or the base point did not converge or left its basin, the
    user's own solver goes on learning, without a nudge and with its budget of steps, and passes begin anew where that
    leads: three tries in all, while its gradient decreases. If they fail there too, or the solver had nothing left to
    learn, the solver runs the phases instead. Of two responses that are not accurate enough, the one with
    the smaller residual is kept. Either way the status is `FELL_BACK`, or says what is still wrong.

    Args:
      tol: norm of v - H u relative to that of v, dimensionless; by default as small as the rounding noise of the
        contrast lets it be.
      max_steps: budget of conjugate-gradient iterations of each system, all passes together; an iteration is one
        gradient, or two where products are taken on both sides, for each system that still needs it.
      max_passes: most passes.
      fall_back: let the estimator's own solver go on, or run the phases, where this one fails, or where a way to a
        minimum that is longer than a tenth of `params` leads through a valley or past a saddle, on which gradients
        grow while the loss decreases: the solver may take another. False goes on by itself, says `FREE_NOT_CONVERGED`,
        and saves the solver's compilation.

    Reference:
      Knoll & Keyes (2004), Jacobian-free Newton-Krylov methods; O'Leary (1980) for two systems at once; Dembo,
      Eisenstat & Steihaug (1982) for the accuracy asked of a pass; Steihaug (1983), and Conn, Gould & Toint (2000),
      Trust-Region Methods, for the radius.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudged_solver=cm.NewtonKrylov(tol=1e-3))
    """

    tol: float | jax.Array | None = None
    max_steps: int | jax.Array = 2000
    max_passes: int | jax.Array = 40
    fall_back: bool = static(default=True)


class Attempt(NamedTuple):
    """One attempt at the phases under way.

    Attributes:
      line: what was found.
      region: the trust region of the base point.
      num_steps: of each of the two systems, shape (2,).
      num_passes: so far.
      tol: of the residual of the nudge, relative to the nudge.
      measured: whether phases were measured on the line.
    """

    line: Line
    region: Region
    num_steps: jax.Array
    num_passes: jax.Array
    tol: jax.Array
    measured: jax.Array

    @classmethod
    def at(cls, setup: PhaseSetup, line: Line, tol: jax.Array) -> "Attempt":
        """Before the first pass."""
        none = jnp.zeros((2,), jnp.int32)
        region = Region.around(setup, line.base.inner_grad)
        return cls(line, region, none, jnp.int32(0), tol, jnp.asarray(False))


class Outcome(NamedTuple):
    """What an attempt came to.

    Attributes:
      failed: whether the response was not found.
      unconverged: whether the base point is still on the way to a minimum.
      uncertain: whether that may be another minimum than the learner's.
      close: whether what was found is right but for its accuracy.
    """

    failed: jax.Array
    unconverged: jax.Array
    uncertain: jax.Array
    close: jax.Array

    @property
    def missed(self) -> jax.Array:
        """Whether the phases are not what was looked for."""
        return self.failed | self.unconverged | self.uncertain


def target_residual(setup: PhaseSetup, line: Line, tol: jax.Array, nudge_norm: jax.Array) -> jax.Array:
    """The residual to reach, relative to the nudge: not below what rounding alone leaves of the contrast."""
    gain = setup.stencil.gain / tree.or_one(line.contrast.beta)
    return jnp.maximum(tol, 3 * gain * setup.start.noise / nudge_norm).astype(setup.dtype)


def nudge_norm_at(setup: PhaseSetup, line: Line) -> jax.Array:
    """What residuals are measured in: the larger norm of what nudges at the free solution and at the base point."""
    norms = setup.start.nudge_norm, setup.norm_of_nudge(line.base.outer.in_params)
    return tree.or_one(jnp.maximum(*norms))


def may_start(setup: PhaseSetup, line: Line, region: Region) -> jax.Array:
    """Whether there is anything to look for: a nudge, or a base point that may come to one."""
    finite = tree.all_finite((line.base.outer.in_params, line.base.inner_grad))
    return finite & ((setup.norm_of_nudge(line.base.outer.in_params) > 0) | ~region.converged)


def may_continue(setup: PhaseSetup, attempt: Attempt, max_steps: Any, max_passes: Any, leave_basin: bool) -> jax.Array:
    """Whether passes are left, and the way is one to follow."""
    region, passes = attempt.region, attempt.num_passes
    within: jax.Array = (passes < max_passes) & jnp.all(attempt.num_steps < max_steps)
    left, start = setup.norms([attempt.line.base.inner_grad, setup.start.inner_grad])
    wanders = left > start * 2.0 ** (1 - passes / _PASSES_TO_HALVE).astype(setup.dtype)
    within &= ~wanders | region.converged | (passes < _PASSES_TO_HALVE)
    return within if leave_basin else within & ~region.uncertain


def is_away(region: Region, trial: Trial, solved: Solved) -> jax.Array:
    """Whether the base point is on its way: what responses the nudge is left for where it arrives."""
    away = region.at_boundary | trial.at_boundary | ~trial.sound | region.delayed | solved.given_up
    return away | ((solved.lengths[1] == 0) & (trial.distance > 0))


def accept_or_reject(
    setup: PhaseSetup, before: Attempt, taken: Line, solved: Solved, trial: Trial, away: jax.Array
) -> tuple[Attempt, jax.Array]:
    """The attempt after a pass: the new line if it is better, and whether another pass is to follow.

    | what the pass found | line | radius | next |
    |---|---|---|---|
    | gradient or loss fell as predicted | new | doubled at the boundary if the ratio is good | go on |
    | neither, and above the noise | old | a quarter of the step | go on |
    | residual of the nudge halved | new | same | go on |
    | residual measured at much too strong a nudge | new | same | measure at a weaker one, solve nothing |
    | residual did not fall | old | same | stop |
    | both below their targets | new | same | stop |
    """
    start, region = setup.start, before.region
    gone = tree.subtract(taken.base.params, start.params)
    new, left, pull, response_step, length, gone = setup.norms(
        [taken.base.inner_grad],
        [taken.contrast.residual, taken.base.outer.in_params],
        [solved.response_step, taken.response],
        [gone],
    )
    unknown = away | region.too_strong
    left_before = jnp.where(unknown, jnp.inf, solved.lengths[1]).astype(setup.dtype)
    nudge = tree.or_one(jnp.maximum(start.nudge_norm, pull))
    target = target_residual(setup, taken, before.tol, nudge)
    old = solved.gradient_norm
    least = jnp.minimum(region.least, solved.least)

    # Along low curvature a gradient far within the noise is a long way: the base point has converged when a pass that
    # looked for more in each direction did not go far.
    small, within_noise = target * start.scale, new <= 2 * start.noise
    near_noise = old <= NOISE_FLOOR * start.noise
    converged = (within_noise & (trial.distance <= small)) | (new <= small * LEAST_EIGENVALUE * least)
    converged |= trial.arrived | (region.converged & near_noise)
    # Along low curvature a small residual is much of the response: what the pass changed tells.
    change = response_step / tree.or_one(length) * jnp.minimum(left / tree.or_one(left_before), 1.0)
    change = jnp.where(unknown, region.change, change).astype(setup.dtype)
    # A nudge that vanishes where learning ends asks for no response.
    change = jnp.where(pull <= target * nudge, 0, change)
    response_converged = (left <= target * nudge) & (change <= 10 * target)

    # A base point that converges takes its own measurement along, whatever the residual was before.
    converging = trial.sound & ((new <= 0.9 * old) | within_noise | trial.decreases) & ~region.converged
    better = trial.sound & jnp.isfinite(left) & ((left <= left_before) | converging)
    refused = ~trial.sound & (trial.distance > 0)
    # Within the noise no shorter step is any better: learning is over, and the nudge is to be response_converged here.
    over = refused & near_noise
    retry = refused & ~over
    # Once the base point converges no further, what was delayed is response_converged.
    better, converging, refused, over, retry, response_converged, converged = settle(
        better, converging, refused, over, retry, response_converged, converged
    )
    delayed = region.delayed | solved.given_up
    lost = within_noise & (old <= 2 * start.noise)
    stalled = delayed & (lost | ~(converging | refused | trial.at_boundary))
    # A residual that hardly fell, and is no more than truncation, is a sign of too large a nudge.
    suspicious = ~away & ~(left <= jnp.maximum(_SUSPICIOUS * left_before, target * nudge))
    truncated = taken.contrast.nonlinearity**setup.order * nudge > _TRUNCATED * left
    may_reduce = setup.scheme.adapts and not setup.sought
    reduction = suspicious & truncated & (region.reduction < _LARGEST_REDUCTION) & may_reduce
    progress = (better & ((left <= 0.5 * left_before) | converging)) | refused | region.at_boundary | reduction
    too_strong = jnp.asarray(False)
    if setup.sought:
        # Measured at much too strong a nudge, the residual tells little: what it asks for would spoil the response.
        wanted = taken.contrast.displacement * start.scale / tree.or_one(length)
        too_strong = ~away & truncated & (wanted > 0) & (wanted < _TOO_STRONG * taken.contrast.beta)
        progress |= too_strong
    progress |= delayed & ~(stalled & response_converged)
    done = better & response_converged & converged & ~away

    # Near a minimum gradients fall with the loss: where they grow lies a valley, or a saddle, with other ways out.
    grew = region.grew | (better & trial.decreases & (new > GROWN * old))
    uncertain = region.uncertain | (grew & better & (gone > LONG * start.scale))
    progress, reduction, stalled, done = settle(progress, reduction, stalled, done)
    told = (trial.distance == 0) & ~unknown & ~too_strong
    common_curvature = told & (left > _BENT * start.eps**FORCING * solved.lengths[1])
    wider = jnp.where(converging & trial.at_boundary & (trial.ratio > GOOD_RATIO), 2.0, 1.0) * region.radius
    converged_now = jnp.where(better, converged, region.converged) | over | stalled | trial.arrived
    after = Region(
        radius=jnp.where(retry, 0.25 * trial.distance, wider),
        at_boundary=retry | (better & trial.at_boundary),
        grew=grew,
        uncertain=uncertain,
        delayed=delayed & ~converged_now,
        converged=converged_now,
        # Another pass may reduce the residual as this one did: where that is enough, one side is cheaper.
        two_sided=region.two_sided | (common_curvature & (left**2 > target * nudge * left_before)),
        least=least,
        change=jnp.where(better, change, region.change),
        reduction=jnp.where(reduction, _REDUCTION, 1.0) * region.reduction,
        indefinite=jnp.where(unknown, region.indefinite, solved.indefinite),
        unresolved=jnp.where(unknown, region.unresolved, unresolved_length(setup, before.line.base, region, solved)),
        too_strong=too_strong & better,
        unsettled=jnp.where(
            better & (trial.distance > 0) & ~near_noise, jnp.abs(trial.ratio - 1) > _UNSETTLED, region.unsettled
        ),
    )
    attempt = Attempt(
        line=tree.where(better, cast_like(taken, before.line), before.line),
        region=after,
        num_steps=before.num_steps + solved.num_steps,
        num_passes=before.num_passes + 1,
        tol=before.tol,
        measured=before.measured | (better & ~away),
    )
    return cast_like(attempt, before), ~done & progress


def outcome_of(setup: PhaseSetup, attempt: Attempt) -> Outcome:
    """What an attempt came to in the end."""
    line, region = attempt.line, attempt.region
    enough = jnp.maximum(UNCONVERGED, attempt.tol)
    gradient, left, response = setup.norms([line.base.inner_grad], [line.contrast.residual], [line.response])
    unresponsive = (left > enough * nudge_norm_at(setup, line)) | (region.change > enough)
    unresponsive |= region.unresolved > enough * response
    anything = (setup.start.nudge_norm > 0) | (left > 0)
    failed = anything & (region.indefinite | unresponsive)
    # At the dtype's floor the inner gradient is noise, which nobody learns.
    unconverged = ~region.converged & (gradient > NOISE_FLOOR * setup.start.noise)
    unconverged |= region.unsettled
    close = attempt.measured & ~(region.indefinite | unconverged | region.uncertain)
    return Outcome(failed, unconverged, region.uncertain, close)


def newton_systems(setup: PhaseSetup, attempt: Attempt, max_steps: Any) -> Systems:
    """The systems of a pass; the response of an earlier estimate is the first direction of the first."""
    nudge = nudge_norm_at(setup, attempt.line)
    target = target_residual(setup, attempt.line, attempt.tol, nudge)
    guess = tree.scale(jnp.where(attempt.num_passes == 0, 1.0, 0.0), setup.guess)
    budget = jnp.asarray(max_steps, jnp.int32) - attempt.num_steps
    return systems_of_a_step(setup, attempt.line, attempt.region, target, nudge, budget, guess)
