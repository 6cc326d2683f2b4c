"""What estimators work on where a learner has kinks, bounds, constraints or decay: coordinates that hide them."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._dependence import used_leaves
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task

# Beyond this many roundings a bend is none of rounding; and within as many a point is at the edge of its piece.
ROUNDINGS = 1e2
# The golden ratio modulo 1, in units of 2^-32, rounded to an odd number.
_GOLDEN = 2654435769
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

    def depends_on(self, meta_params: MetaParams) -> bool:
        """Whether the walls move, or the penalty changes, with the meta-parameters."""

        def everything(meta: MetaParams) -> Any:
            params = self.params_of(self.at, meta)
            return params, () if self.value_of is None else self.value_of(self.at, params, meta)

        return any(used_leaves(everything, meta_params))

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
        reach = ROUNDINGS * eps * size + _MISSING * self.unit * residual
        certain = self.rests_at(x, params, gradient)
        for sign in (1.0, -1.0):
            away = tree.add_scaled(found, sign * reach, self.around)
            to = tree.add_scaled(gradient, sign * reach / self.unit, directions(found, jnp.sign))
            certain &= self.same_piece(found, away) & self.rests_at(x, params, to)
        return certain | ~self.known


def directions(like: Params, function: Callable[[jax.Array], jax.Array]) -> Params:
    """Fixed numbers between -1 and 1 in the shapes of a tree, without a pattern and none of them zero.

    They are m^2 g modulo 1 for odd m, with g the golden ratio: squares leave no pattern between neighbours (Rudnick,
    Sarnak & Zaharescu 2001, The distribution of spacings between the fractional parts of n^2 alpha). Compiled programs
    make them anew wherever they are used, and a normal variate takes fifty times the operations.
    """
    leaves, structure = jax.tree.flatten(like)
    offsets = itertools.accumulate((x.size for x in leaves), initial=0)
    drawn = [function(_scattered(x, offset)) for x, offset in zip(leaves, offsets, strict=False)]
    return jax.tree.unflatten(structure, drawn)


def _scattered(like: jax.Array, offset: int) -> jax.Array:
    """Numbers between -1 and 1, those of the odd numbers from `2 offset + 1` on."""
    odd = 2 * (jnp.arange(like.size, dtype=jnp.uint32) + jnp.uint32(offset % 2**32)) + jnp.uint32(1)
    parts = odd * odd * jnp.uint32(_GOLDEN)
    signed = jax.lax.bitcast_convert_type(parts, jnp.int32).astype(jnp.real(like).dtype)
    return (signed * 2.0**-31).reshape(like.shape)


def inverse_curvature(instance: Instance, params: Params) -> tuple[Params, jax.Array]:
    """The inner gradient, and an inverse curvature: of a fixed random direction, by a difference of gradients."""
    dtype, eps = tree.float_dtype(params), tree.coarsest_eps(instance.dtype, params)
    direction = directions(params, lambda x: x)
    length = tree.norm(direction)
    distance = eps**0.5 * jnp.maximum(tree.norm(params), 1) / length
    points = jax.vmap(lambda far: tree.add_scaled(params, far, direction))(jnp.stack([0 * distance, distance]))
    here, there = tree.unstack(jax.lax.map(tree.grad(instance.inner), points), 2)
    curvature = tree.norm(tree.subtract(there, here)) / (distance * length)
    step = jnp.where((curvature > 0) & jnp.isfinite(curvature), 1 / tree.or_one(curvature), 1).astype(dtype)
    return here, step
