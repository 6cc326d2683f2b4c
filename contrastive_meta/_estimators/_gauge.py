"""The gradients of phases on a line, taken at a strength at which they tell most of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import FreePoint, OuterEvaluated
from contrastive_meta._estimators._phases import Nudging, on_line
from contrastive_meta._estimators._seek import Found, seek
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._problem import MetaParams, Params

# A remainder larger than this part of what was left before is suspected of too large a nudge.
_SUSPICIOUS = 0.3
# By what strengths and difference steps are divided then, and how often.
_SHRINK = 8.0
_MOST_TRIES = 4


class Measured(NamedTuple):
    """Phases on a line base - beta u, at one strength."""

    scheme: NudgeScheme
    residuals: Params  # gradients of the phases' own losses, a leading axis of phases
    statistic: MetaParams  # what the rule measures of the phases
    remainder: Params  # v - H u, the contrast of the residuals
    shrink: jax.Array  # what strengths and difference steps are divided by


class Tried(NamedTuple):
    """The best of the strengths tried so far."""

    best: Measured
    left: jax.Array  # norm of its remainder
    shrink: jax.Array  # of the next try
    num_tries: jax.Array
    running: jax.Array


class Gauge:
    """What measures phases on lines, with what stays the same in all measurements.

    Args:
      nudging: what the phases are to be.
      point: where the free phase ended.
      first_nudge: what nudges there.
    """

    def __init__(self, nudging: Nudging, point: FreePoint, first_nudge: Params) -> None:
        self.nudging, self.setting, self.point, self.first_nudge = nudging, nudging.setting, point, first_nudge
        self.dtype = self.setting.dtype
        # The length of a response that is not known yet, by the mean inverse curvature.
        self.usual = tree.or_one(self.setting.norm(first_nudge)) / tree.or_one(point.curvature)

    def nudge(self, base_outer: OuterEvaluated) -> jax.Array:
        """What remainders are measured in: the norm of what nudges at the free solution or, if larger, at a base."""
        norms = self.setting.norm(self.first_nudge), self.setting.norm(self.nudge_at(base_outer))
        return tree.or_one(jnp.maximum(*norms))

    def nudge_at(self, base_outer: OuterEvaluated) -> Params:
        """What nudges at a base point."""
        return tree.add(self.first_nudge, tree.subtract(base_outer[1], self.point.outer_grad))

    def scheme(self, length: jax.Array, shrink: jax.Array, chosen: jax.Array) -> NudgeScheme:
        """The scheme for a response of a length."""
        probe = self.nudging.probe(self.point)._replace(chosen=chosen)
        length = jnp.where(length > 0, length, self.usual)
        scheme: NudgeScheme = jax.tree.map(jnp.asarray, self.nudging.scheme.for_response(probe, length * shrink))
        return scheme

    def target(self, scheme: NudgeScheme, tol: jax.Array, nudge: jax.Array) -> jax.Array:
        """The remainder to reach, relative to the nudge: not below what rounding alone leaves of the contrast."""
        return jnp.maximum(tol, 3 * scheme.noise_gain(self.dtype) * self.point.noise / nudge).astype(self.dtype)

    def seek(
        self, wanted: jax.Array, chosen: jax.Array, nudged: Instance, base: Params, base_grad: Params, response: Params
    ) -> Found:
        """The strength to measure at, as a displacement: sought where wanted and not known; 0 where it never is."""
        if self.nudging.sought is None:
            return Found(jnp.zeros_like(chosen), jnp.int32(0))
        found: Found = only_if(
            wanted & (chosen == 0),
            lambda _: seek(self.nudging, self.point, nudged, base, base_grad, response, to_minima=False),
            Found(chosen, jnp.int32(0)),
        )
        return found

    def at_rest(self, nudged: Instance, chosen: jax.Array) -> Measured:
        """Phases at the free solution itself, where the nudged losses' gradients are known; no statistic yet."""
        one, at = jnp.ones((), self.dtype), self.point.params
        scheme = self.scheme(self.usual, one, chosen)
        nudges, _ = scheme.arrays(self.dtype)
        residuals = on_line(self.point.inner_grad, tree.scale(-1.0, self.first_nudge), nudges)
        ends = on_line(at, tree.zeros_like(at), nudges)
        shapes = jax.eval_shape(lambda: self.nudging.measure(nudged, ends, nudges))
        statistic = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return Measured(scheme, residuals, statistic, self.first_nudge, one)

    def measure(
        self,
        before: Measured,
        nudged: Instance,
        base: Params,
        response: Params,
        left: jax.Array,
        tol: Any,
        nudge: jax.Array,
        chosen: Any,
    ) -> Tried:
        """Phases on another line, at a smaller strength where this one goes beyond what is nearly quadratic.

        Args:
          before: a measurement of an earlier line; what its strength was divided by is where to begin.
          nudged: the setting whose outer loss is what nudges.
          base: of the line.
          response: u.
          left: norm of the remainder before.
          tol: of the remainder, relative to the nudge.
          nudge: what that is, see `nudge`.
          chosen: the displacement that was found best; 0 for none.
        """
        length = self.setting.norm(response)

        def attempt(tried: Tried) -> Tried:
            scheme = self.scheme(length, tried.shrink, chosen)
            nudges, _ = scheme.arrays(self.dtype)
            residuals, statistic = self.nudging.evaluate(nudged, on_line(base, response, nudges), nudges)
            new = Measured(scheme, residuals, statistic, scheme.contrast(residuals), tried.shrink)
            now, num_tries = self.setting.norm(new.remainder), tried.num_tries + 1
            better = (now < 0.5 * tried.left) | ~jnp.isfinite(tried.left)
            suspicious = ~(now <= jnp.maximum(_SUSPICIOUS * left, self.target(scheme, tol, nudge) * nudge))
            most_tries = _MOST_TRIES if self.nudging.scheme.adapts else 1
            best, now = tree.where(better, (cast_like(new, tried.best), now), (tried.best, tried.left))
            again = better & suspicious & (num_tries < most_tries)
            return Tried(best, now, _SHRINK * tried.shrink, num_tries, again)

        begin = Tried(before, jnp.full_like(left, jnp.inf), before.shrink, jnp.int32(0), jnp.asarray(True))
        tried: Tried = jax.lax.while_loop(lambda tried: tried.running, attempt, begin)
        return tried
