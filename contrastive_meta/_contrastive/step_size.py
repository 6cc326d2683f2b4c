"""The nudging strength: contrasts on a ladder of strengths, and the one that errs least of them.

With c beta^p of truncation and n / beta of noise, contrasts at two neighbouring strengths differ by
c beta^p (f^p - 1) and, variances added, by n sqrt(1 + 1 / f^2) / beta. Where the strength is sought, two such
differences give c and n, and Richardson extrapolation of two neighbours removes the leading truncation. The rest of the
truncation is about the product of the truncations of both, as for the four-point scheme.

Reference:
  Gill, Murray, Saunders & Wright (1983), Computing forward-difference intervals for numerical optimization.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR
from contrastive_meta._contrastive.phases import Base, PhaseSetup, mean_of, on_line
from contrastive_meta._control import cast_like, settle, while_loop
from contrastive_meta._problem import MetaParams, Params

# Neighbouring strengths are this factor apart where the strength is sought; a typed strength is compared with its
# double.
FACTOR = 8.0
# No nudge is to move `params` by more than this fraction of their length.
_LARGEST = 1.0
# A difference that rises by more than this from one pair of strengths to the next is truncation, not noise.
_RISE = 2.0
# A nudge's curvature may add at most this fraction of the nudge to the gradients: beyond, nudged losses lose their
# minima.
_MOST_CURVED = 0.1
# Differences that grow by this part of what truncation alone makes them grow by are truncation.
_TRUNCATION_ALONE = 0.25
# The fitted noise is at least this part of what rounding is expected to make.
_BELIEVED = 0.5
# How often to begin the ladder again lower where the losses are not finite; each time a factor of 64.
_MOST_RETRIES = 4
# How often a strength that leads through walls is divided by `FACTOR`: down to 1e-7 of it.
_MOST_DIVISIONS = 8
# Strengths that a contrast is made of: two neighbours, and one more that tells which two.
_WINDOW = 3


class Contrast(NamedTuple):
    """What the phases of the selected strength say.

    Attributes:
      beta: the strength.
      grad: the contrast of the statistics, extrapolated where the strength was sought: the meta-gradient.
      plain: the same at the strength alone.
      correction: what truncation takes from `grad`, where that is known and not made good.
      residual: v - H u, extrapolated likewise.
      residual_error: what truncation and noise may have made of `residual`; what truncation takes from it, where that
        is not made good.
      error: truncation and noise of `grad`, relative to it, beyond `correction`.
      noise: rounding noise of `grad`, relative to it.
      change: what the next strength changes in the contrasts, relative to them.
      nonlinearity: how far the inner gradient is from linear over the span of the phases, relative to the nudge.
      downward: whether a nudged loss curves downwards along the way of its phase.
      displacement: the strength to measure at next time, as the part of the length of `params` that it moves; 0 where
        it is not sought.
    """

    beta: jax.Array
    grad: MetaParams
    plain: MetaParams
    correction: MetaParams
    residual: Params
    residual_error: Params
    error: jax.Array
    noise: jax.Array
    change: jax.Array
    nonlinearity: jax.Array
    downward: jax.Array
    displacement: jax.Array

    @classmethod
    def none(cls, setup: PhaseSetup, residual: Params, beta: Any, displacement: jax.Array) -> "Contrast":
        """Before there are phases: all of the nudge is left."""
        zero, unknown = jnp.zeros((), setup.dtype), jnp.full((), jnp.inf, setup.dtype)
        grad = jax.tree.map(jnp.zeros_like, setup.instance.meta_params)
        beta, none = jnp.asarray(beta, setup.dtype), tree.zeros_like(residual)
        return cls(beta, grad, grad, grad, residual, none, unknown, zero, zero, zero, jnp.asarray(False), displacement)


class _Marks(NamedTuple):
    """What else is known of the last strengths, each of shape (3,), the last one last."""

    beta: jax.Array
    nonlinearity: jax.Array
    downward: jax.Array
    common_curvature: jax.Array  # along the response, of what the phases' gradients have in common
    finite: jax.Array


class Ladder(NamedTuple):
    """A ladder of strengths under way. The number is that of what comes next: 0 the base point, then strengths."""

    base: Base
    statistics: MetaParams  # contrasts at the last strengths, a leading axis of three
    residuals: Params
    marks: _Marks
    changes: jax.Array  # relative differences of those contrasts, shape (2,)
    noise: jax.Array  # what rounding makes of both contrasts at strength 1, relative; shape (2,)
    trial: Any  # what `assess` said of the base point
    beta: jax.Array  # the next strength
    number: jax.Array
    num_evaluations: jax.Array  # of all phases together
    running: jax.Array


class Plan(NamedTuple):
    """How a base point and the phases around it are to be measured.

    Attributes:
      base: the point; what the losses say there is found out.
      known: whether that is known already.
      response: u; a phase of strength beta is taken to end at base - beta u.
      length: of the response.
      nudge_norm: what residuals are measured in.
      displacement: the strength sought last time, as in `Contrast`.
      reduction: what strengths are divided by.
      most: most strengths to measure at, after the base point.
      settled: whether the strength sought last time serves.
      fixed: whether the first strength is `beta`, and none is sought.
      beta: see there.
      rerun: whether the phases of the first strength are those that the solver ran.
      ends: where they ended then.
      linear: whether the nudge is linear.
      origin: where they started.
      to_minima: whether the strength is sought for phases that the solver will run.
    """

    base: Base
    known: jax.Array
    response: Params
    length: jax.Array
    nudge_norm: jax.Array
    displacement: jax.Array
    reduction: jax.Array
    most: jax.Array
    settled: jax.Array
    fixed: jax.Array
    beta: jax.Array
    rerun: jax.Array
    ends: Params
    linear: jax.Array
    origin: Base
    to_minima: jax.Array


def measure(setup: PhaseSetup, plan: Plan, assess: Any, trial: Any) -> Ladder:
    """Evaluate a base point, and the phases around it at one strength after another.

    Args:
      setup: what the phases are to be.
      plan: where and how.
      assess: from the base point, evaluated, to what is to be said of it and whether there are phases to measure there.
      trial: what is to be said of it where it is known already.

    Returns:
      The base point and the last strengths.
    """
    dtype, start, stencil, order = setup.dtype, setup.start, setup.stencil, setup.order
    first = _first_strength(setup, plan)
    factor = jnp.where(plan.fixed, 2.0, FACTOR if setup.sought else 2.0).astype(dtype)
    least_strengths = jnp.where(plan.settled | plan.fixed | (not setup.sought), 2, 3)
    # In units of u'v, see `_Marks.common_curvature`.
    along = tree.vdot(tree.scale(1 / tree.or_one(start.nudge_norm), start.outer_grad), plan.response)
    per_curvature = 1 / tree.or_one(jnp.abs(along).astype(dtype) * tree.or_one(start.nudge_norm))

    def climb(last: Ladder) -> Ladder:
        at_base = last.number == 0
        beta = last.beta
        nudges = jnp.where(at_base, 0, stencil.nudges * beta)
        ends = on_line(last.base.params, plan.response, nudges)
        given = plan.rerun & (last.number == 1)
        nudged_from, origin = last.base, last.base
        if setup.may_rerun:
            ends = tree.where(given, cast_like(plan.ends, ends), ends)
            nudged_from = tree.where(given, plan.origin, last.base)
            origin = tree.where(plan.rerun, plan.origin, last.base)
        found = setup.evaluate(nudged_from, ends, nudges, at_base, plan.linear)
        here = jax.tree.map(_first_real, (found.residuals, found.outer, found.outer_grad))
        base = tree.where(at_base, cast_like(Base(last.base.params, *here), last.base), last.base)

        statistic, residual = stencil.contrast((found.statistics, found.residuals), beta)
        center = tree.subtract(stencil.at_zero(found.residuals), base.inner_grad)
        common = tree.subtract(mean_of(found.residuals), base.inner_grad)
        newest = jax.tree.map(lambda xs: xs[-1], (last.statistics, last.residuals))
        changes = tree.subtract((statistic, residual), newest)
        size, changed = setup.statistic_norms(statistic, changes[0])
        mean = tree.norm(mean_of(found.statistics)).astype(dtype)
        off_center, curved, residual_changed = setup.norms([center, common], [changes[1]])

        # Relative to the meta-gradient and to the nudge.
        unit = tree.or_one(size)
        common_curvature = per_curvature * tree.vdot(plan.response, common).astype(dtype)
        stiffer = jnp.where(plan.to_minima & stencil.symmetric, jnp.abs(common_curvature) / beta, 0.0)
        change = _root(changed / unit, residual_changed / plan.nudge_norm) + stiffer**order
        # Outside the domain of the losses truncation is large.
        change = jnp.where(jnp.isnan(change), factor ** (order + 1) * last.changes[1], change)
        change = jnp.where(last.number <= 1, jnp.inf, change)
        noise = stencil.gain * jnp.stack([setup.statistic_noise(mean) / unit, start.noise / plan.nudge_norm])

        rising = (last.number < least_strengths) & jnp.isfinite(size)
        if setup.sought:
            straight = factor * (curved - NOISE_FLOOR * start.noise) <= _MOST_CURVED * plan.nudge_norm * beta
            within = beta * factor * plan.length <= 1.01 * _LARGEST * start.scale  # but for rounding
            # Below what rounding makes of the weaker of both, a difference tells nothing of truncation.
            quiet = jnp.maximum(last.changes[1], factor * _root(last.noise[0], last.noise[1]) / beta)
            rising |= (change < _RISE * quiet) & ~plan.settled & ~plan.fixed & jnp.isfinite(size)
            if setup.walls is not None:
                within &= ~setup.crosses_walls(last.base.params, plan.response, factor * beta)
            rising &= (within & (straight | plan.linear | plan.to_minima)) | plan.fixed
        finite = jnp.isfinite(size) & jnp.isfinite(curved)
        # Out of the domain of the losses: begin again at a much smaller strength.
        retry = (
            (last.number == 1) & ~finite & (last.num_evaluations < _MOST_RETRIES) & ~plan.fixed & setup.scheme.adapts
        )
        stays, at_base, given, retry = settle(at_base | retry, at_base, given, retry)
        marks = _Marks(
            beta,
            off_center / (beta * plan.nudge_norm),
            _curves_downwards(setup, origin, ends, found.residuals, nudges, plan.nudge_norm),
            common_curvature,
            finite,
        )
        # The sum of weights that are not taken must not be NaN.
        contrasts = tree.where(finite, (statistic, residual), tree.zeros_like((statistic, residual)))

        def shifted(window: jax.Array, x: jax.Array) -> jax.Array:
            moved = jnp.concatenate([window[1:], jnp.asarray(x, window.dtype)[None]])
            return jnp.where(stays, window, moved)

        assessed, stay = assess(base)
        number = last.number + jnp.where(retry, 0, 1)
        return cast_like(
            Ladder(
                base=base,
                statistics=jax.tree.map(shifted, last.statistics, contrasts[0]),
                residuals=jax.tree.map(shifted, last.residuals, contrasts[1]),
                marks=jax.tree.map(shifted, last.marks, marks),
                changes=shifted(last.changes, change),
                noise=jnp.where(last.number == 1, noise, last.noise),
                trial=tree.where(at_base, assessed, last.trial),
                beta=jnp.where(at_base, beta, jnp.where(retry, beta / FACTOR**2, beta * factor)),
                number=number,
                num_evaluations=last.num_evaluations + 1,
                running=jnp.where(at_base, stay, rising | retry) & (number <= plan.most),
            ),
            last,
        )

    def window(x: jax.Array) -> jax.Array:
        return jnp.zeros((_WINDOW, *x.shape), x.dtype)

    none, no = jnp.zeros((_WINDOW,), dtype), jnp.zeros((_WINDOW,), bool)
    infinite = jnp.full((2,), jnp.inf, dtype)
    begin = Ladder(
        base=plan.base,
        statistics=jax.tree.map(window, setup.instance.meta_params),
        residuals=jax.tree.map(window, plan.response),
        marks=_Marks(none, none, no, none, no),
        changes=infinite,
        noise=jnp.zeros((2,), dtype),
        trial=trial,
        beta=first,
        number=jnp.where(plan.known, 1, 0),
        num_evaluations=jnp.int32(0),
        running=~plan.known | (plan.most > 0),
    )
    end: Ladder = while_loop(lambda ladder: ladder.running, climb, begin)
    return end


def _first_strength(setup: PhaseSetup, plan: Plan) -> jax.Array:
    """The first strength of the ladder."""
    beta = setup.strength_for(plan.base, plan.displacement, plan.length * plan.reduction)
    if setup.sought:
        # Extrapolated, the order is higher: by 2 for symmetric schemes, of which odd powers cancel, by 1 for others.
        order = setup.order
        displacement = beta * plan.length / setup.start.scale
        higher = order + (2 if order % 2 == 0 else 1)
        raised = 0.2 * (displacement / 0.2) ** ((order + 1) / (higher + 1))
        wanted = jnp.where((plan.displacement > 0) | plan.to_minima, displacement, raised)
        wanted = jnp.where(plan.settled, wanted, wanted / FACTOR)
        beta = beta * jnp.minimum(wanted, _LARGEST / FACTOR**2) / displacement
    if setup.walls is not None and setup.scheme.adapts:
        beta = _within_walls(setup, plan, beta)
    return jnp.where(plan.fixed, plan.beta, beta).astype(setup.dtype)


def _within_walls(setup: PhaseSetup, plan: Plan, beta: jax.Array) -> jax.Array:
    """A strength divided by `FACTOR` until phases of twice that strength stay behind the walls of the base point."""

    def crosses(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (carry[1] < _MOST_DIVISIONS) & setup.crosses_walls(plan.base.params, plan.response, 2 * carry[0])

    def divide(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] / FACTOR, carry[1] + 1

    return while_loop(crosses, divide, (jnp.asarray(beta), jnp.int32(0)))[0]


def select(setup: PhaseSetup, plan: Plan, ladder: Ladder, otherwise: Contrast) -> Contrast:
    """The contrast that errs least, by the difference of its neighbours; `otherwise` where no phases were measured.

    Each is a sum of the last three contrasts: weights tell which, and by how much they are extrapolated.
    """
    dtype = setup.dtype
    eye = jnp.eye(_WINDOW, dtype=dtype)

    def combined(weights: jax.Array, window: Any) -> Any:
        return jax.tree.map(lambda xs: jnp.tensordot(weights.astype(xs.dtype), xs, 1), window)

    fixed = _weights_of_first(setup, plan, ladder, eye)
    if setup.sought:
        upper, lower = _extrapolations(setup, eye)
        gap, size = setup.statistic_norms(*(combined(w, ladder.statistics) for w in (upper - lower, upper)))
        residual_gap = setup.norm_of_nudge(combined(upper - lower, ladder.residuals))
        gap = _root(gap / tree.or_one(size), residual_gap / plan.nudge_norm).astype(dtype)
        best = _weights_of_best(setup, ladder, eye, gap)
        fixed = tree.where(plan.fixed, fixed, cast_like(best, fixed))
    chosen: _Weights = fixed

    shared = jnp.stack([chosen.grad, chosen.plain, chosen.residual, chosen.correction, chosen.error_weights])
    shared = jax.lax.optimization_barrier(shared)
    chosen = chosen._replace(
        grad=shared[0], plain=shared[1], residual=shared[2], correction=shared[3], error_weights=shared[4]
    )
    measured = ladder.number > 1
    grad, plain, correction, error_weights = (
        combined(w, ladder.statistics) for w in (chosen.grad, chosen.plain, chosen.correction, chosen.error_weights)
    )
    residual, residual_error = (combined(w, ladder.residuals) for w in (chosen.residual, chosen.error_weights))
    marks = jax.tree.map(lambda xs: jnp.sum(jnp.where(chosen.plain > 0, xs, jnp.zeros_like(xs))), ladder.marks)
    marks = marks._replace(downward=marks.downward > 0, finite=marks.finite > 0)
    size, error_norm = setup.statistic_norms(grad, error_weights)
    expected = ladder.noise[0] / marks.beta
    error = jnp.where(chosen.measured, _root(error_norm / tree.or_one(size), chosen.least), chosen.least)
    # In a fixed contrast the error_weights is in the correction.
    error = jnp.where(plan.fixed | (not setup.sought), chosen.least, error)
    displacement = otherwise.displacement
    if setup.sought:
        wanted = jnp.where(plan.to_minima, chosen.best_plain, chosen.best)
        found = wanted * ladder.marks.beta[1] * plan.length / setup.start.scale
        usable = chosen.measured & ~plan.fixed & (found > 0) & jnp.isfinite(found)
        # The curvature of the losses along the nudge ended the ladder before it told more: begin lower.
        curved = ~chosen.measured & ~plan.fixed & (marks.nonlinearity > _MOST_CURVED)
        lower = marks.beta / FACTOR**2 * plan.length / setup.start.scale
        displacement = jnp.where(usable, found, jnp.where(curved, lower, displacement)).astype(displacement.dtype)
    nan = jnp.where(marks.finite, 0, jnp.nan)
    contrast = Contrast(
        beta=marks.beta,
        grad=jax.tree.map(lambda g: g + nan.astype(g.dtype), grad),
        plain=plain,
        correction=correction,
        residual=jax.tree.map(lambda r: r + nan.astype(r.dtype), residual),
        residual_error=residual_error,
        error=error,
        noise=expected,
        change=chosen.change,
        nonlinearity=marks.nonlinearity,
        downward=marks.downward,
        displacement=displacement,
    )
    selected: Contrast = tree.where(measured, cast_like(contrast, otherwise), otherwise)
    return selected


class _Weights(NamedTuple):
    """Weights of the last three contrasts, each of shape (3,), and what is known of the errors."""

    plain: jax.Array
    grad: jax.Array
    residual: jax.Array
    correction: jax.Array  # what truncation takes from the meta-gradient, if it is not made good
    error_weights: jax.Array  # what truncation and noise may have made of both contrasts
    measured: jax.Array  # whether that was measured
    least: jax.Array  # least relative error
    change: jax.Array  # relative, of the next strength
    best: jax.Array  # best strength in units of the one in the middle, extrapolated
    best_plain: jax.Array  # best strength if nothing is extrapolated


def _weights_of_first(setup: PhaseSetup, plan: Plan, ladder: Ladder, eye: jax.Array) -> _Weights:
    """The contrast at the first strength; its double tells the truncation."""
    doubled, order = ladder.number > 2, setup.order
    plain = jnp.where(doubled, eye[1], eye[2])
    share = jnp.where(doubled, 1 / (2**order - 1), 0.0).astype(setup.dtype)
    correction = share * (plain - eye[2])
    beta = jnp.where(doubled, ladder.marks.beta[1], ladder.marks.beta[2])
    # Phases at their minima have a linear part of their residuals; what is not linear is stiffening.
    common_curvature = ladder.marks.common_curvature
    stiffer = jnp.abs(common_curvature[2] / 2 - common_curvature[1]) / beta
    seen = plan.rerun & doubled & setup.stencil.symmetric
    least = jnp.maximum(ladder.noise[0] / beta, jnp.where(seen, stiffer**order, 0.0))
    zero, one = jnp.zeros((), setup.dtype), jnp.ones((), setup.dtype)
    change = jnp.where(doubled, ladder.changes[1], 0.0)
    return _Weights(plain, plain, plain, correction, correction, jnp.asarray(False), least, change, one, zero)


def _extrapolations(setup: PhaseSetup, eye: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of Richardson's extrapolation of the upper pair of strengths, and of the lower pair."""
    weight = 1 / (FACTOR**setup.order - 1)
    return (1 + weight) * eye[1] - weight * eye[2], (1 + weight) * eye[0] - weight * eye[1]


def _weights_of_best(setup: PhaseSetup, ladder: Ladder, eye: jax.Array, gap: jax.Array) -> _Weights:
    """The extrapolated contrast that errs least, of the last two, which differ by `gap`."""
    order = setup.order
    # Of the truncation from one strength to the next, of what is extrapolated and of what is not.
    growth, next_growth = FACTOR**order, FACTOR ** (order + (2 if order % 2 == 0 else 1))
    weight = 1 / (growth - 1)
    two, three = ladder.number > 2, ladder.number > 3
    beta, changes = ladder.marks.beta, ladder.changes

    # Noise and truncation at the strength in the middle, in squares.
    truncated = [((growth - 1) / growth) ** 2, (growth - 1) ** 2]
    noisy = [FACTOR**2 + 1, 1 + 1 / FACTOR**2]
    squares = changes**2
    whole = truncated[1] * noisy[0] - truncated[0] * noisy[1]
    expected = _root(ladder.noise[0], ladder.noise[1]) / tree.or_one(beta[1])
    truncation = jnp.maximum(squares[1] * noisy[0] - squares[0] * noisy[1], 0) / whole
    noise = jnp.maximum(squares[0] * truncated[1] - squares[1] * truncated[0], 0) / whole
    # Where both differences are truncation, they tell nothing of the noise.
    noisy_pair = changes[1] < _TRUNCATION_ALONE * growth * changes[0]
    # Far beyond where gradients are linear they grow by less than that, and it is no noise.
    noisy_pair &= ladder.marks.nonlinearity[1] < _MOST_CURVED + NOISE_FLOOR * expected
    fitted = jnp.maximum(jnp.sqrt(noise), _BELIEVED * expected)
    noise = jnp.where(three & noisy_pair, fitted, expected)
    truncation = jnp.where(three, jnp.sqrt(truncation), changes[1] * weight)
    # What twice the noise does not explain of the gap is truncation of the upper one.
    excess = jnp.sqrt(jnp.maximum(gap**2 - (2 * FACTOR * noise) ** 2, 0))
    left = jnp.maximum(truncation**2 * growth, jnp.where(three, excess, 0))
    upper, lower = _root(noise, left), _root(noise * FACTOR, left / next_growth)
    finite = ladder.marks.finite
    upper = jnp.where(jnp.isfinite(upper) & finite[2], upper, jnp.inf)
    lower = jnp.where(jnp.isfinite(lower) & finite[0], lower, jnp.inf)
    take_lower = three & (lower < upper)
    # Near the largest displacement that is allowed, the strongest nudge may err least as it is.
    top = jnp.where(three & finite[2], _root(noise / FACTOR, truncation * growth), jnp.inf)
    take_top = top < jnp.minimum(upper, lower)
    weights = _extrapolations(setup, eye)
    plain = jnp.where(two & ~take_top, jnp.where(take_lower, eye[0], eye[1]), eye[2])
    # Where only the first strength lies in the domain of the losses, there is nothing to extrapolate.
    alone = ~two | (two & ~three & ~finite[2])
    as_it_is = alone | take_top
    grad = jnp.where(as_it_is, plain, jnp.where(take_lower, weights[1], weights[0]))
    # The other extrapolation tells the error, in the ratio of what both are expected to err by.
    other = jnp.where(take_lower, weights[0], weights[1])
    of_other = jnp.where(take_lower, upper, lower)
    smaller = jnp.where(take_top, top, jnp.minimum(upper, lower))
    ratio = jnp.where(three & jnp.isfinite(of_other), jnp.minimum(smaller / tree.or_one(of_other), 1), 0)
    statistic_noise = ladder.noise[0] / tree.or_one(jnp.sum(plain * beta))
    least = jnp.where(three, _BELIEVED * statistic_noise, _root(statistic_noise, left))
    # The least of n / x + l x^q, x in units of the strength in the middle, l what extrapolation leaves, of order q; and
    # of n / x + t x^p.
    higher = order + (2 if order % 2 == 0 else 1)
    best = (noise / (higher * left)) ** (1 / (higher + 1))
    best_plain = (noise / (order * truncation)) ** (1 / (order + 1))
    best, best_plain = (jnp.clip(jnp.where(jnp.isnan(x), 1.0, x), 1 / FACTOR**2, FACTOR) for x in (best, best_plain))
    return _Weights(
        plain=plain,
        grad=grad,
        residual=grad,
        correction=jnp.zeros_like(grad),
        error_weights=ratio * (other - grad),
        measured=three,
        least=jnp.where(alone & two, 1.0, jnp.where(two, least, statistic_noise)),
        change=jnp.where(two, changes[1], 0.0),
        best=best,
        best_plain=best_plain,
    )


def _first_real(xs: jax.Array) -> jax.Array:
    """What the first phase has, without an imaginary part."""
    return jnp.real(xs[0]) if jnp.iscomplexobj(xs) else xs[0]


def _root(a: jax.Array, b: jax.Array) -> jax.Array:
    """The root of the sum of squares of two numbers of order 1 or less."""
    return jnp.sqrt(a**2 + b**2)


def _curves_downwards(
    setup: PhaseSetup, origin: Base, ends: Params, residuals: Params, nudges: jax.Array, unit: jax.Array
) -> jax.Array:
    """Whether a nudged loss has negative mean curvature along the way of its own phase: it has no minimum there."""
    if tree.is_complex(ends):
        return jnp.asarray(False)

    def curves(params: Params, residual: Params, beta: jax.Array) -> jax.Array:
        moved = tree.scale(1 / setup.start.scale, tree.subtract(params, origin.params))
        at_origin = tree.add_scaled(origin.inner_grad, beta, origin.outer.in_params)
        turned = tree.scale(1 / unit, tree.subtract(residual, at_origin))
        lengths = jnp.sqrt(tree.vdot(turned, turned)) * jnp.sqrt(tree.vdot(moved, moved))
        return tree.vdot(turned, moved) < -1e-2 * lengths

    return jnp.any(jax.vmap(curves)(ends, residuals, nudges) & (nudges != 0))
