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


class Trial(NamedTuple):
    """A point on the line.

    Attributes:
      step: how far along the direction.
      value: loss there.
      slope: derivative of the loss in the step.
    """

    step: jax.Array
    value: jax.Array
    slope: jax.Array


class LineSearch(NamedTuple):
    """A search under way.

    Attributes:
      step: the next to try.
      num_trials: how many were made.
      start: the point that the search began from, at step 0.
      low: end of the interval with the lower value.
      high: the other end, which may lie on either side; at infinity while no interval is known.
      previous: the end that the last trial replaced.
      safe: the best trial that decreased the loss enough, else the start.
      safe_grads: gradient there.
    """

    step: jax.Array
    num_trials: jax.Array
    start: Trial
    low: Trial
    high: Trial
    previous: Trial
    safe: Trial
    safe_grads: Params

    @classmethod
    def begin(cls, value: jax.Array, slope: jax.Array, grads: Params) -> "LineSearch":
        """A search from a point with this value and gradient, of which step 1 is the first trial."""
        start = Trial(jnp.zeros_like(value), value, slope)
        nowhere = start._replace(step=jnp.full_like(value, jnp.inf))
        return cls(jnp.ones_like(value), jnp.int32(0), start, start, nowhere, nowhere, start, grads)


class Outcome(NamedTuple):
    """What a trial led to.

    Attributes:
      search: the search after it.
      ended: whether the search is over.
      take_safe: whether it ends at `search.safe` rather than at the trial.
    """

    search: LineSearch
    ended: jax.Array
    take_safe: jax.Array


def after_trial(search: LineSearch, value: jax.Array, slope: jax.Array, grads: Params) -> Outcome:
    """Judge the trial at `search.step`, and choose the next one."""
    trial, low, high = Trial(search.step, value, slope), search.low, search.high
    bracketed = jnp.isfinite(high.step)

    # The strong Wolfe conditions (3.7); the decrease also in its approximate form, Hager & Zhang (23) to (27).
    change, first_slope = value - search.start.value, search.start.slope
    excess = change - _SUFFICIENT_DECREASE * trial.step * first_slope
    in_slopes = slope - (2 * _SUFFICIENT_DECREASE - 1) * first_slope
    near_minimum = jnp.maximum(in_slopes, change - _ROUNDING * jnp.abs(search.start.value))
    excess = jnp.minimum(near_minimum, excess)
    decreased = excess <= 0
    found = decreased & (jnp.abs(slope) <= _CURVATURE * jnp.abs(first_slope))

    # A trial that is too far becomes the high end, any other the low end. The derivative tells on which side of the
    # trial the minimum lies, and which end stays. Before there is an interval this is algorithm 3.5, then 3.6.
    first_trial = search.num_trials == 0
    too_far = ~decreased | ((value >= low.value) & ~first_trial)
    passed = slope * (high.step - low.step) >= 0
    new_low = tree.where(too_far, low, trial)
    new_high = tree.where(too_far, trial, tree.where(passed, low, high))
    previous = tree.where(too_far | passed, high, low)

    better = decreased & (~bracketed | (value < search.safe.value))
    safe, safe_grads = tree.where(better, (trial, grads), (search.safe, search.safe_grads))
    num_trials = search.num_trials + 1
    too_narrow = (jnp.abs(high.step - low.step) <= _SMALLEST_INTERVAL) & (safe.step > 0)
    failed = ~found & ((num_trials >= _MOST_TRIALS) | too_narrow)
    # Where not even the value is finite, stay at the start.
    take_safe = failed & ((safe.step > 0) | ~(excess < jnp.inf))

    step = jnp.where(jnp.isinf(new_high.step), _GROWTH * trial.step, _interpolate(new_low, new_high, previous))
    after = LineSearch(step, num_trials, search.start, new_low, new_high, previous, safe, safe_grads)
    return Outcome(after, found | failed, take_safe)


def _interpolate(low: Trial, high: Trial, previous: Trial) -> jax.Array:
    """Minimum of the cubic through three points, else of the parabola through two, else the middle.

    Both take the slope at `low`. A minimum too near the ends is not taken, nor one that is not a number: the cubic's
    where there are but two points.
    """
    width, to_previous = high.step - low.step, previous.step - low.step
    bend = (high.value - low.value - low.slope * width) / width**2
    previous_bend = (previous.value - low.value - low.slope * to_previous) / to_previous**2
    # Bends are linear in the step: quadratic + cubic * step.
    cubic = (bend - previous_bend) / (width - to_previous)
    quadratic = bend - cubic * width
    of_cubic = (jnp.sqrt(quadratic**2 - 3 * cubic * low.slope) - quadratic) / (3 * cubic)
    of_parabola = -low.slope / (2 * bend)

    def inside(step: jax.Array, margin: float) -> jax.Array:
        share = step / width
        return (share > margin) & (share < 1 - margin)

    step = jnp.where(inside(of_parabola, 0.1), of_parabola, width / 2)
    return low.step + jnp.where(inside(of_cubic, 0.2), of_cubic, step)
