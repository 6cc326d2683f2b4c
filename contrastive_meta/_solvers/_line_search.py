"""A line search for the strong Wolfe conditions, as data: one trial in, the next step to try out.

It decides as `optax.scale_by_zoom_linesearch` does, and takes the same steps. There the loss is evaluated in two
places, one for each phase of the search. Here the caller evaluates it, so that one place serves searches and start.

Reference:
  Nocedal & Wright (2006), Numerical Optimization, algorithms 3.5 and 3.6.
  Hager & Zhang (2005), A new conjugate gradient method, for the approximate decrease near a minimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import Params

# The settings of `optax.lbfgs`. Nocedal & Wright suggest the first two (section 3.1) for quasi-Newton methods.
_SUFFICIENT_DECREASE = 1e-4
_CURVATURE = 0.9
# Within this share of the value, differences of values are rounding, and slopes tell the decrease.
_ROUNDING = 1e-6
_SMALLEST_INTERVAL = 1e-5
_MOST_TRIALS = 20
_GROWTH = 2.0


class LineSearch(NamedTuple):
    """A search under way.

    Points on the line are rows of `points`: step along the direction, loss there, and its derivative in the step. One
    array, so that the program has one kernel for all of them.

    Attributes:
      points: five rows. The start. The end of the interval with the lower value; the other end, which may lie on either
        side, and at infinity while no interval is known; the end that the last trial replaced. The best trial that
        decreased the loss enough, else the start.
      num_trials: how many were made.
      safe_grads: gradient at the last of the points.
    """

    points: jax.Array
    num_trials: jax.Array
    safe_grads: Params

    @classmethod
    def begin(cls, value: jax.Array, slope: jax.Array, grads: Params) -> "LineSearch":
        """A search from a point with this value, slope and gradient."""
        steps = jnp.array([0, 0, jnp.inf, jnp.inf, 0], value.dtype)
        points = jnp.stack([steps, jnp.broadcast_to(value, 5), jnp.broadcast_to(slope, 5)], axis=1)
        return cls(points, jnp.int32(0), grads)

    @property
    def step(self) -> jax.Array:
        """The next to try: 1, twice the last one until there is an interval, then inside the interval."""
        _, low, high, previous, _ = self.points
        larger = jnp.where(low[0] > 0, _GROWTH * low[0], 1)
        return jnp.where(jnp.isinf(high[0]), larger, _interpolate(low, high, previous))

    @property
    def safe_step(self) -> jax.Array:
        """Step of the best trial that decreased the loss enough; 0 if there is none."""
        return self.points[4, 0]

    @property
    def safe_value(self) -> jax.Array:
        """Loss there."""
        return self.points[4, 1]


class Outcome(NamedTuple):
    """What a trial led to.

    Attributes:
      search: the search after it.
      ended: whether the search is over.
      take_safe: whether it ends at its safe point rather than at the trial.
    """

    search: LineSearch
    ended: jax.Array
    take_safe: jax.Array


def after_trial(search: LineSearch, step: jax.Array, value: jax.Array, slope: jax.Array, grads: Params) -> Outcome:
    """Test the strong Wolfe conditions at the trial of `search.step`, and update the bracket."""
    start, low, high, _, safe = search.points
    bracketed = jnp.isfinite(high[0])

    # The strong Wolfe conditions (3.7); the decrease also in its approximate form, Hager & Zhang (23) to (27).
    change, first_slope = value - start[1], start[2]
    excess = change - _SUFFICIENT_DECREASE * step * first_slope
    in_slopes = slope - (2 * _SUFFICIENT_DECREASE - 1) * first_slope
    near_minimum = jnp.maximum(in_slopes, change - _ROUNDING * jnp.abs(start[1]))
    excess = jnp.minimum(near_minimum, excess)
    decreased = excess <= 0
    found = decreased & (jnp.abs(slope) <= _CURVATURE * jnp.abs(first_slope))

    # A trial that is too far becomes the high end, any other the low end. The slope tells on which side of the trial
    # the minimum lies, and which end stays. Before there is an interval this is algorithm 3.5, then 3.6.
    too_far = ~decreased | ((value >= low[1]) & (search.num_trials > 0))
    passed = slope * (high[0] - low[0]) >= 0
    better = decreased & (~bracketed | (value < safe[1]))

    num_trials = search.num_trials + 1
    has_safe = better | (safe[0] > 0)
    too_narrow = (jnp.abs(high[0] - low[0]) <= _SMALLEST_INTERVAL) & has_safe
    failed = ~found & ((num_trials >= _MOST_TRIALS) | too_narrow)
    # Where not even the value is finite, stay at the start.
    take_safe = failed & (has_safe | ~(excess < jnp.inf))

    # The compiler would compute these anew in each of a dozen places: the barrier leaves it one, and a third fewer
    # operations in the compiled program (1,303 and 2,053 on a logistic regression, jax 0.10.2 on a CPU).
    conditions = jnp.stack([too_far, passed, better, found | failed, take_safe])
    too_far, passed, better, ended, take_safe = jax.lax.optimization_barrier(conditions)
    trial = jnp.stack([step, value, slope])
    points = [
        start,
        jnp.where(too_far, low, trial),
        jnp.where(too_far, trial, jnp.where(passed, low, high)),
        jnp.where(too_far | passed, high, low),
        jnp.where(better, trial, safe),
    ]
    safe_grads = tree.where(better, grads, search.safe_grads)
    return Outcome(LineSearch(jnp.stack(points), num_trials, safe_grads), ended, take_safe)


def _interpolate(low: jax.Array, high: jax.Array, previous: jax.Array) -> jax.Array:
    """Minimum of the cubic through three points, else of the parabola through two, else the middle.

    Both take the slope at `low`. A minimum too near the ends is not taken, nor one that is not a number: the cubic's
    where there are but two points.
    """
    _, _, slope = low
    width, rise, _ = high - low
    to_previous, previous_rise, _ = previous - low
    divided = (rise - slope * width) / width**2
    previous_divided = (previous_rise - slope * to_previous) / to_previous**2
    # Second divided differences are linear in the step: quadratic + cubic * step.
    cubic = (divided - previous_divided) / (width - to_previous)
    quadratic = divided - cubic * width
    of_cubic = (jnp.sqrt(quadratic**2 - 3 * cubic * slope) - quadratic) / (3 * cubic)
    of_parabola = -slope / (2 * divided)

    def inside(step: jax.Array, margin: float) -> jax.Array:
        share = step / width
        return jnp.logical_and(share > margin, share < 1 - margin)

    step = jnp.where(inside(of_parabola, 0.1), of_parabola, width / 2)
    step = jnp.where(inside(of_cubic, 0.2), of_cubic, step)
    return low[0] + step
