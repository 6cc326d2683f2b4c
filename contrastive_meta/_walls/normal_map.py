"""Coordinates of a learner of proximal steps, in which its kinks and bounds are out of sight: the normal map.

A learner of walls ends at w = prox(w - h grad f(w)), where the gradient need not vanish. Robinson's normal map takes
x = w - h grad f(w), the point before the proximal step, for the unknown: w = prox(x). Unless w is at the very edge of a
wall, x lies inside a region where the proximal step is smooth. There the whole inner objective

    (17)  E(x, theta) = f(prox(x, theta), theta) + penalty(prox(x, theta), theta)     in docs/theory_walls.md

is an ordinary smooth loss. Its minima are the learner's fixed points, and entries of x that the wall holds have no
derivative. Every estimator therefore takes E for the inner loss and L_out(prox(x, theta), theta) for the outer one.

Reference:
  Robinson (1992), Normal maps induced by linear transformations; Moreau (1965) for E's smooth part; Lewis & Wright
  (2011), Identifying activity, for what a fixed point says about its neighbourhood.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._dependence import used_leaves
from contrastive_meta._instance import Instance
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._solvers.base import InnerSolver
from contrastive_meta._walls.walls import ROUNDINGS, Walls, directions, inverse_curvature

# Two points are in one piece if no entry bends by more than this part of its own difference between them; an entry
# that jumps over a kink bends by about its difference.
_BENT = 0.1


def normal_map(solver: InnerSolver, instance: Instance, params: Params) -> Walls:
    """The coordinates of the normal map."""
    eps = tree.coarsest_eps(instance.dtype, params)

    def prox_at(x: Params, meta_params: MetaParams, step: Any) -> Params:
        walls = solver.bind(meta_params).walls
        assert walls is not None
        return walls.prox(x, step)

    # Any step makes coordinates; about an inverse curvature makes well-conditioned ones.
    here, step = inverse_curvature(instance, params)

    def coordinates(at: Params, gradient: Params) -> Params:
        return tree.add_scaled(at, -step, gradient)

    def params_of(x: Params, meta_params: MetaParams) -> Params:
        return prox_at(x, meta_params, step)

    def slopes(x: Params) -> Params:
        return jax.jvp(lambda at: params_of(at, instance.meta_params), (x,), (directions(x, lambda d: d),))[1]

    def same_piece(a: Params, b: Params) -> jax.Array:
        if tree.is_complex((a, b)):
            return jnp.asarray(True)
        between = tree.scale(0.5, tree.add(a, b))
        ends = [params_of(x, instance.meta_params) for x in (a, b, between)]
        size = jnp.maximum(tree.max_abs(a), tree.max_abs(b))

        def smooth(first: jax.Array, last: jax.Array, middle: jax.Array) -> jax.Array:
            nonlinear = jnp.abs((first - middle) + (last - middle))
            return jnp.all(nonlinear <= _BENT * jnp.abs(last - first) + ROUNDINGS * eps * size)

        alike = jax.tree.map(lambda s, t: jnp.all((s == 0) == (t == 0)), slopes(a), slopes(b))
        straight = jax.tree.map(smooth, *ends)
        return jnp.all(jnp.stack(jax.tree.leaves((alike, straight))))

    def rests_at(x: Params, at: Params, gradient: Params) -> jax.Array:
        return same_piece(x, coordinates(at, gradient))

    bound = solver.bind(instance.meta_params).walls
    assert bound is not None
    value_of = _value_of(solver, instance, prox_at, coordinates(params, here), step)
    at, around = coordinates(params, here), directions(params, jnp.sign)
    value_of = _pinned(bound.unfelt, at, step, value_of)
    aligned = _alignment(bound.unfelt, at)
    return Walls(
        at, params_of, value_of, coordinates, aligned, same_piece, slopes, rests_at, around, step, jnp.asarray(True)
    )


def _value_of(
    solver: InnerSolver, instance: Instance, prox_at: Callable[..., Params], x: Params, step: jax.Array
) -> Callable[[Params, Params, MetaParams], Any] | None:
    """The penalty's value; where it is not known, a number with its derivative in coordinates."""
    bound = solver.bind(instance.meta_params).walls
    assert bound is not None
    if bound.value(x) is not None:

        def known(x: Params, params: Params, meta_params: MetaParams) -> Any:
            walls = solver.bind(meta_params).walls
            assert walls is not None
            return walls.value(params)

        return known
    if not any(used_leaves(lambda length: prox_at(x, instance.meta_params, length), step)):
        # What is the same for every length of a step is a projection, whose penalty is 0 or infinite.
        return None
    if any(used_leaves(lambda meta_params: prox_at(x, meta_params, step), instance.meta_params)):
        raise ValueError(
            "The learner's proximal step depends on the meta-parameters and on `step`, and its penalty has no value: "
            "the derivative of the penalty in the meta-parameters is a part of the meta-gradient. Give it, "
            "`cm.prox.of(prox, value=...)`, with `value(params, meta_params) -> scalar`."
        )
    prox = jax.tree_util.Partial(lambda at: prox_at(at, instance.meta_params, step))
    return lambda x, params, meta_params: _with_slope_of_penalty(prox, step, x)


def _alignment(unfelt: Callable[[Params], Any], at: Params) -> Callable[[Params, Params], Params]:
    """See `Walls.aligned`: by a secant along the way from w to x, on which the number is linear."""
    if unfelt(at) is None:
        return lambda params, x: x

    def aligned(params: Params, x: Params) -> Params:
        way = tree.subtract(x, params)
        here = unfelt(x)
        rise = unfelt(tree.add(x, way)) - here
        share = jnp.where(rise != 0, (unfelt(at) - here) / jnp.where(rise != 0, rise, 1), 0)
        return tree.add_scaled(x, jnp.maximum(share, -0.9), way)

    return aligned


def _pinned(unfelt: Callable[[Params], Any], at: Params, step: jax.Array, value_of: Any) -> Any:
    """The value with (unfelt(x) - unfelt(x0))^2 / (2 step) added.

    Every point of the wall is the end of a step from some x with the number of x0. So minima are what they were, and
    their derivatives are.
    """
    if unfelt(at) is None:
        return value_of

    def pinned(x: Params, params: Params, meta_params: MetaParams) -> Any:
        spring = (unfelt(x) - unfelt(at)) ** 2 / (2 * step)
        return spring if value_of is None else spring + value_of(x, params, meta_params)

    return pinned


@jax.custom_vjp
def _with_slope_of_penalty(prox: Callable[[Params], Params], step: jax.Array, x: Params) -> jax.Array:
    """Zero, with the derivative of penalty(prox(x)): the slope of a penalty at prox(x) is (x - prox(x)) / step."""
    return jnp.zeros((), tree.float_dtype(x))


def _slope_forward(prox: Any, step: Any, x: Any) -> Any:
    return _with_slope_of_penalty(prox, step, x), (prox, step, x)


def _slope_backward(kept: Any, cotangent: Any) -> Any:
    prox, step, x = kept
    params, pull_back = jax.vjp(prox, x)
    (slope,) = pull_back(tree.scale(cotangent / step, tree.subtract(x, params)))
    return None, None, slope


_with_slope_of_penalty.defvjp(_slope_forward, _slope_backward)
