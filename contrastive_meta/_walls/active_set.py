"""Coordinates of a learner with constraints: of the surface that its active ones leave it.

Next to a minimum w* with active constraints c(w, theta) = 0 of Jacobian J, a point x is moved to the surface by
Newton's steps along the rows of J, x <- x - J^+ c(x, theta), which keep what is tangential. The coordinates are

    (18)  E(x, theta) = f(P(x, theta), theta) + |J^+ J (x - w*)|^2 / (2 step)     in docs/theory_walls.md

with P these steps. The second term holds what is normal to the surface at w*, where P does not depend on it. The
derivative of E in theta holds the multipliers: that of P(x, theta) is -J^+ dc/dtheta, and J^T lambda the gradient of f.

Reference:
  Nocedal & Wright (2006), Numerical optimization, section 15.3, Elimination of variables; theorem 12.1 for multipliers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._control import fori_loop
from contrastive_meta._instance import Instance
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._solvers.base import InnerSolver
from contrastive_meta._solvers.constraint import ActiveSet, BoundConstraints
from contrastive_meta._walls.walls import Walls, directions, inverse_curvature

# Each step to the surface takes the distance to it at least down to that times the distance to the minimum.
_STEPS = 6


def active_set(solver: InnerSolver, instance: Instance, params: Params) -> Walls:
    """The coordinates next to where a learner with constraints ended.

    Args:
      solver: the learner, not bound yet.
      instance: the problem.
      params: where learning ended.
    """
    gradient, step = inverse_curvature(instance, params)

    def at_meta_params(meta_params: MetaParams) -> BoundConstraints:
        bound = solver.bind(meta_params).held_to
        assert bound is not None
        return bound

    here = at_meta_params(instance.meta_params)
    origin, unravel = ravel_pytree(params)
    found = ActiveSet.at(here, params, gradient)
    equal = jnp.asarray(here.equal(params))
    inverse, active = jax.lax.stop_gradient((found.inverse, found.active))
    normal = inverse @ found.jacobian

    def params_of(x: Params, meta_params: MetaParams) -> Params:
        bound = at_meta_params(meta_params)

        def to_surface(_: Any, at: jax.Array) -> jax.Array:
            missed = jnp.where(active, bound.rows(unravel(at)), 0)
            return at - inverse.astype(at.dtype) @ missed.astype(at.dtype)

        return unravel(fori_loop(0, _STEPS, to_surface, ravel_pytree(x)[0]))

    def off_surface(x: Params) -> jax.Array:
        return normal @ (ravel_pytree(x)[0] - origin)

    def value_of(x: Params, at: Params, meta_params: MetaParams) -> Any:
        return jnp.sum(off_surface(x) ** 2) / (2 * step)

    def coordinates(at: Params, gradient: Params) -> Params:
        return unravel(ravel_pytree(at)[0] - off_surface(at))

    def met(params: Params) -> jax.Array:
        """Whether constraints that are not active are met."""
        return jnp.all(active | (here.rows(params) > 0))

    def same_piece(a: Params, b: Params) -> jax.Array:
        return met(params_of(a, instance.meta_params)) & met(params_of(b, instance.meta_params))

    def rests_at(x: Params, at: Params, gradient: Params) -> jax.Array:
        multipliers = inverse.T @ ravel_pytree(gradient)[0]
        return met(at) & jnp.all(~active | equal | (multipliers > 0))

    return Walls(
        at=params,
        params_of=params_of,
        value_of=value_of,
        coordinates=coordinates,
        aligned=lambda params, x: x,
        same_piece=same_piece,
        slopes=lambda x: jax.tree.map(jnp.ones_like, x),
        rests_at=rests_at,
        around=directions(params, jnp.sign),
        unit=step,
        known=tree.all_finite(found.inverse),
    )
