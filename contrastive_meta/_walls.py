"""Coordinates in which a learner's kinks and bounds are out of sight: what estimators work on where learners have any.

A learner of walls ends at w = prox(w - h grad f(w)), where the gradient need not vanish. Robinson's normal map takes
x = w - h grad f(w), the point before the proximal step, for the unknown: w = prox(x). Unless w is at the very edge of a
wall, x lies inside a region where the proximal step is smooth. There the whole inner objective

    (N)  E(x, theta) = f(prox(x, theta), theta) + penalty(prox(x, theta), theta)

is an ordinary smooth loss. Its minima are the learner's fixed points, and entries of x that the wall holds have no
derivative. Every estimator therefore takes E for the inner loss and L_out(prox(x, theta), theta) for the outer one.

A learner of optax updates is not known by a proximal step but by what its updates do. There the coordinates are the
parameters themselves, entries that the updates hold in place being constant, and weight decay is added as a penalty.

Reference:
  Robinson (1992), Normal maps induced by linear transformations; Moreau (1965) for E's smooth part; Lewis & Wright
  (2011), Identifying activity, for what a fixed point says about its neighbourhood.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._dependence import used_leaves
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._solvers.base import Held, InnerSolver

# Two points are in one piece if no entry bends by more than this part of its own difference between them; an entry
# that jumps over a kink bends by about its difference.
_BENT = 0.1
# Beyond this many roundings a bend is none of rounding; and within as many a point is at the edge of its piece.
_ROUNDINGS = 1e2
# A point is at the edge of its piece if this many times what is missing of the fixed point leads out of it.
_MISSING = 10.0


class Walls(NamedTuple):
    """Coordinates x of parameters w next to the end of learning.

    Attributes:
      at: x there.
      params_of: `(x, meta_params) -> w`.
      value_of: `(x, w, meta_params) -> scalar`, what the learner's objective has beside the loss; or None.
      coordinates: `(w, gradient) -> x`, from the gradient of a loss to which w is the learner's solution.
      aligned: `(w, x) -> x`, of the points from which a step ends at w that which has the numbers of `at`.
      same_piece: `(x, x) -> bool`, whether the coordinates are smooth between both.
      slopes: `x -> tree`, zero in the entries of w that walls hold at x.
      rests_at: `(x, w, gradient) -> bool`, whether the learner stays at w, held by the walls that hold x.
      around: signs, in which directions the edge of a piece is looked for.
      unit: of coordinates over gradients.
      known: whether it is known where the learner rests.
    """

    at: Params
    params_of: Callable[[Params, MetaParams], Params]
    value_of: Callable[[Params, Params, MetaParams], Any] | None
    coordinates: Callable[[Params, Params], Params]
    aligned: Callable[[Params, Params], Params]
    same_piece: Callable[[Params, Params], jax.Array]
    slopes: Callable[[Params], Params]
    rests_at: Callable[[Params, Params, Params], jax.Array]
    around: Params
    unit: jax.Array
    known: jax.Array

    def seen_by_estimators(self, instance: Instance) -> Instance:
        """The problem in coordinates x."""
        problem = instance.problem

        def inner(x: Params, meta_params: MetaParams, task: Task) -> Any:
            params = self.params_of(x, meta_params)
            returned = problem.inner_loss(params, meta_params, task)
            if self.value_of is None:
                return returned
            value = self.value_of(x, params, meta_params)
            if problem.has_aux:
                return returned[0] + jnp.asarray(value, returned[0].dtype), returned[1]
            return returned + jnp.asarray(value, jnp.result_type(returned))

        def outer(x: Params, meta_params: MetaParams, task: Task) -> Any:
            return problem.outer_loss(self.params_of(x, meta_params), meta_params, task)

        return instance.replace_problem(
            BilevelProblem(inner, outer, problem.init_params, has_aux=problem.has_aux, sample=problem.sample)
        )

    def in_params(self, x: Params, response: Params, meta_params: MetaParams) -> tuple[Params, Params]:
        """The parameters at coordinates x, and the response there, as the user has them."""
        both: tuple[Params, Params] = jax.jvp(lambda at: self.params_of(at, meta_params), (x,), (response,))
        return both

    def completed(self, hvp: Callable[[Params], Params], curvature: jax.Array) -> Callable[[Params], Params]:
        """Products with a Hessian that is not singular for want of entries that walls hold: those curve by themselves.

        Args:
          hvp: products with the Hessian of the loss in coordinates, which has nothing there.
          curvature: of these entries.
        """
        slopes = self.slopes(self.at)

        def complete(slope: jax.Array, x: jax.Array, product: jax.Array) -> jax.Array:
            return jnp.where(slope == 0, curvature.astype(jnp.real(x).dtype) * x, product)

        return lambda x: jax.tree.map(complete, slopes, x, hvp(x))

    def is_certain(self, instance: Instance, x: Params, residual: jax.Array) -> jax.Array:
        """Whether the learner stays at x, and is held by the same walls wherever rounding and residuals may have it.

        Args:
          instance: the problem as the user wrote it.
          x: coordinates.
          residual: norm of the gradient in coordinates.
        """
        meta_params = instance.meta_params
        params = self.params_of(x, meta_params)
        gradient = tree.grad(instance.inner)(params)
        found = self.coordinates(params, gradient)
        eps = tree.coarsest_eps(instance.dtype, x)
        size = jnp.maximum(tree.max_abs(found), self.unit * tree.max_abs(gradient))
        reach = _ROUNDINGS * eps * size + _MISSING * self.unit * residual
        certain = self.rests_at(x, params, gradient)
        for sign in (1.0, -1.0):
            away = tree.add_scaled(found, sign * reach, self.around)
            to = tree.add_scaled(gradient, sign * reach / self.unit, _directions(found, jnp.sign))
            certain &= self.same_piece(found, away) & self.rests_at(x, params, to)
        return certain | ~self.known


def walls_of(solver: InnerSolver, instance: Instance, params: Params) -> Walls | None:
    """The coordinates of a learner's fixed points next to one of them; None for learners without walls.

    Args:
      solver: the learner, not bound yet.
      instance: the problem, its model state held.
      params: where learning ended.

    Raises:
      ValueError: a penalty that depends on meta-parameters and does not tell its value.
    """
    bound = solver.bind(instance.meta_params)
    if bound.walls is not None:
        return _normal_map(solver, instance, params)
    if not bound.descends_loss or bound.held_at(params, params) is None:
        return None
    gradient = tree.grad(instance.inner)(params)
    held = bound.held_at(params, gradient)
    assert held is not None
    # Where the learner rests is not known: the parameters as they are, at which it is then found not to.
    nothing = Held(jax.tree.map(jnp.zeros_like, held.entries), tree.zeros_like(held.decay), held.known)
    return _held(bound, tree.where(held.known, held, nothing), params)


def _normal_map(solver: InnerSolver, instance: Instance, params: Params) -> Walls:
    """The coordinates of the normal map."""
    dtype = tree.float_dtype(params)
    eps = tree.coarsest_eps(instance.dtype, params)

    def prox_at(x: Params, meta_params: MetaParams, step: Any) -> Params:
        walls = solver.bind(meta_params).walls
        assert walls is not None
        return walls.prox(x, step)

    # Any step makes coordinates; about an inverse curvature makes well-conditioned ones.
    direction = _directions(params, lambda x: x)
    length = tree.norm(direction)
    distance = eps**0.5 * jnp.maximum(tree.norm(params), 1) / length
    points = jax.vmap(lambda far: tree.add_scaled(params, far, direction))(jnp.stack([0 * distance, distance]))
    here, there = tree.unstack(jax.lax.map(tree.grad(instance.inner), points), 2)
    curvature = tree.norm(tree.subtract(there, here)) / (distance * length)
    step = jnp.where((curvature > 0) & jnp.isfinite(curvature), 1 / tree.or_one(curvature), 1).astype(dtype)

    def coordinates(at: Params, gradient: Params) -> Params:
        return tree.add_scaled(at, -step, gradient)

    def params_of(x: Params, meta_params: MetaParams) -> Params:
        return prox_at(x, meta_params, step)

    def slopes(x: Params) -> Params:
        return jax.jvp(lambda at: params_of(at, instance.meta_params), (x,), (_directions(x, lambda d: d),))[1]

    def same_piece(a: Params, b: Params) -> jax.Array:
        if tree.is_complex((a, b)):
            return jnp.asarray(True)
        between = tree.scale(0.5, tree.add(a, b))
        ends = [params_of(x, instance.meta_params) for x in (a, b, between)]
        size = jnp.maximum(tree.max_abs(a), tree.max_abs(b))

        def smooth(first: jax.Array, last: jax.Array, middle: jax.Array) -> jax.Array:
            nonlinear = jnp.abs((first - middle) + (last - middle))
            return jnp.all(nonlinear <= _BENT * jnp.abs(last - first) + _ROUNDINGS * eps * size)

        alike = jax.tree.map(lambda s, t: jnp.all((s == 0) == (t == 0)), slopes(a), slopes(b))
        straight = jax.tree.map(smooth, *ends)
        return jnp.all(jnp.stack(jax.tree.leaves((alike, straight))))

    def rests_at(x: Params, at: Params, gradient: Params) -> jax.Array:
        return same_piece(x, coordinates(at, gradient))

    bound = solver.bind(instance.meta_params).walls
    assert bound is not None
    value_of = _value_of(solver, instance, prox_at, coordinates(params, here), step)
    at, around = coordinates(params, here), _directions(params, jnp.sign)
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
        share = jnp.where(rise > 0, (unfelt(at) - here) / tree.or_one(rise), 0)
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


def _held(bound: InnerSolver, held: Held, params: Params) -> Walls:
    """The coordinates of a learner whose updates hold entries in place, or decay them."""

    def held_at(at: Params, gradient: Params) -> Held:
        found = bound.held_at(at, gradient)
        assert found is not None
        return found

    def params_of(x: Params, meta_params: MetaParams) -> Params:
        return jax.tree.map(lambda fixed, w, at: jnp.where(fixed, w.astype(at.dtype), at), held.entries, params, x)

    def value_of(x: Params, at: Params, meta_params: MetaParams) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(lambda c, w: jnp.sum(c.astype(w.dtype) * w**2) / 2, held.decay, at)))

    def rests_at(x: Params, at: Params, gradient: Params) -> jax.Array:
        found = held_at(at, gradient)
        alike = jax.tree.map(lambda a, b: jnp.all(a == b), found.entries, held.entries)
        return found.known & jnp.all(jnp.stack(jax.tree.leaves(alike)))

    def same_piece(a: Params, b: Params) -> jax.Array:
        if tree.is_complex((a, b)):
            return jnp.asarray(True)

        def inside(x: Params) -> jax.Array:
            kept = jax.tree.map(lambda fixed, w, at: jnp.all(~fixed | (w == at)), held.entries, params, x)
            at = params_of(x, ())
            resting = jax.tree.map(lambda c, w: -c.astype(w.dtype) * w, held.decay, at)
            # Any gradient serves that is not all rounding.
            away = jax.tree.map(lambda g: g + jnp.ones_like(g), resting)
            return held_at(at, away).known & jnp.all(jnp.stack(jax.tree.leaves(kept)))

        return (inside(a) & inside(b)) | ~held.known

    def slopes(x: Params) -> Params:
        return jax.tree.map(lambda fixed, at: jnp.where(fixed, 0, jnp.ones_like(at)), held.entries, x)

    one = jnp.ones((), tree.float_dtype(params))
    around = jax.tree.map(lambda slope, sign: slope * sign, slopes(params), _directions(params, jnp.sign))
    return Walls(
        params,
        params_of,
        value_of,
        lambda at, gradient: at,
        lambda at, x: x,
        same_piece,
        slopes,
        rests_at,
        around,
        one,
        held.known,
    )


def _directions(like: Params, function: Callable[[jax.Array], jax.Array]) -> Params:
    """Fixed random numbers in the shapes of a tree."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    drawn = [function(jax.random.normal(key, x.shape, jnp.real(x).dtype)) for key, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)
