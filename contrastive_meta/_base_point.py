"""The base point: where learning ended, and what both losses say there."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._instance import Instance
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._response import DIFFERENCE, measure_noise
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._row_norms import NUM_PRODUCTS, inverse_row_norms, random_signs
from contrastive_meta._solvers.base import Solution
from contrastive_meta._symmetry import LARGEST_ASYMMETRY, asymmetry_of

# Learning has converged when the Cauchy step would move `params`, or change the outer gradient, by less than this
# fraction of their norms.
UNCONVERGED = 1e-2
# A gradient norm within this factor of the rounding noise is as small as the dtype allows.
NOISE_FLOOR = 10.0
# Gradients that `survey` evaluates: the inner gradient five times, the outer gradient once.
NUM_GRADIENTS = 6


class OuterGradients(NamedTuple):
    """The outer loss at one point, and its gradients in both arguments.

    Attributes:
      loss: the outer loss.
      aux: what the outer loss returned beside its value.
      in_params: gradient in `params`, the nudge v.
      in_meta: gradient in `meta_params` at fixed `params`, the direct term of the meta-gradient.
    """

    loss: jax.Array
    aux: Any
    in_params: Params
    in_meta: MetaParams


class BasePoint(NamedTuple):
    """The end of the free phase, and what both losses say there.

    Attributes:
      params: the end of the free phase.
      solution: what the solver reported.
      outer_loss: the outer loss.
      aux: what the outer loss returned beside its value.
      inner_grad: gradient of the inner loss in `params`.
      outer_grad: gradient of the outer loss in `params`, the nudge v.
      outer_in_meta: gradient of the outer loss in `meta_params` at fixed `params`, the direct term.
      nudge_norm: norm of v.
      scale: the unit of length, the norm of `params` or of the distance learned, whichever is larger; 1 if both vanish.
      noise: norm of the rounding noise of the inner gradient.
      curvature: the norm of H v over the norm of v; of H 1 over the norm of 1 where v is 0.
      jump: norm of a jump of the inner gradient next to `params`, along the direction of v; 0 where there is none.
      asymmetry: of the inner loss's second derivatives, see `_symmetry`; 0 where no operation can cause any.
      preconditioner: one over the norms of the Hessian's rows, see `_row_norms`; () where none was asked for.
      eps: relative rounding of the coarser one of the losses' dtype and the dtypes of `params`.
    """

    params: Params
    solution: Solution
    outer_loss: jax.Array
    aux: Any
    inner_grad: Params
    outer_grad: Params
    outer_in_meta: MetaParams
    nudge_norm: jax.Array
    scale: jax.Array
    noise: jax.Array
    curvature: jax.Array
    jump: jax.Array
    asymmetry: jax.Array
    preconditioner: Params
    eps: float

    @property
    def at_kink(self) -> jax.Array:
        """Whether the inner gradient jumps by an amount that matters beside the nudge."""
        return (self.jump > UNCONVERGED * self.nudge_norm) & (self.nudge_norm > 0)

    @property
    def inconsistent(self) -> jax.Array:
        """Whether the inner gradient is not that of the inner loss's value."""
        return self.asymmetry > LARGEST_ASYMMETRY

    @property
    def unfit(self) -> jax.Array:
        """Whether estimators do not apply here, so that no error can be estimated."""
        return self.at_kink | self.inconsistent

    @property
    def units(self) -> jax.Array:
        """Orders of magnitude: inner gradients, nudges, responses to a unit nudge, steps, meta-gradients."""
        nudge, response = self.nudge_norm, self.nudge_norm / tree.or_one(self.curvature)
        units = jnp.stack([self.curvature * self.scale, nudge, response, self.scale, nudge * self.scale])
        return jnp.where(jnp.isfinite(units) & (units > 0), units, 1)

    @property
    def num_gradients(self) -> int:
        """Gradients of the inner loss that were spent on all this."""
        return NUM_GRADIENTS + (NUM_PRODUCTS if jax.tree.leaves(self.preconditioner) else 0)

    def without_constants(self) -> "BasePoint":
        """What a mapped program can return."""
        return self._replace(eps=0.0)


def outer_gradients(instance: Instance, params: Params) -> OuterGradients:
    """The outer loss, its aux and both its gradients, from one evaluation."""

    def loss(at: Params, meta_params: MetaParams) -> tuple[jax.Array, Any]:
        return instance.problem.outer_with_aux(at, meta_params, instance.task)

    evaluate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), (in_params, in_meta) = evaluate(params, instance.meta_params)
    return OuterGradients(value, aux, in_params, in_meta)


def survey(instance: Instance, params: Params, solution: Solution, init: Params, num_products: int = 0) -> BasePoint:
    """Evaluate both losses at the end of the free phase, and measure noise and curvature of the inner gradient.

    The outer loss has one call site, and so has the inner loss; there is another where its symmetry is in doubt.

    Args:
      instance: the problem at one task.
      params: the end of the free phase.
      solution: what the solver reported.
      init: where learning started.
      num_products: of which the norms of the Hessian's rows are estimated, a gradient each; 0 estimates none.
    """
    dtype, eps = instance.dtype, tree.coarsest_eps(instance.dtype, params)
    outer = outer_gradients(instance, params)
    lengths = tree.norms(params, tree.subtract(params, init), outer.in_params)
    size, distance, nudge_norm = (length.astype(dtype) for length in lengths)
    scale = tree.or_one(jnp.maximum(size, distance))
    # Where the nudge is zero, the curvature along any direction serves: here along ones.
    ones = jax.tree.map(jnp.ones_like, params)
    direction = tree.where(nudge_norm > 0, outer.in_params, ones)
    length = jnp.where(nudge_norm > 0, nudge_norm, sum(x.size for x in jax.tree.leaves(params)) ** 0.5)
    signs = random_signs(params, num_products) if num_products else ()
    found = measure_noise(tree.grad(instance.inner), params, direction, scale, eps, length, signs)
    # Second differences in few directions may vanish. Rounding `params` alone makes up to half an eps of each entry.
    noise = jnp.maximum(found.noise, eps * found.slope * scale / 4)
    return BasePoint(
        params=params,
        solution=solution,
        outer_loss=outer.loss,
        aux=outer.aux,
        inner_grad=found.value,
        outer_grad=outer.in_params,
        outer_in_meta=outer.in_meta,
        nudge_norm=nudge_norm,
        scale=scale,
        noise=noise,
        curvature=found.slope,
        jump=found.jump,
        asymmetry=asymmetry_of(instance, params, direction, scale),
        preconditioner=inverse_row_norms(found.products, found.product_floor) if num_products else (),
        eps=eps,
    )


def difference_step(instance: Instance, base: BasePoint) -> tuple[jax.Array, jax.Array]:
    """The length of a one-sided gradient difference, and the least curvature that the difference resolves.

    Rounding contributes `noise / step`, and the neglected third derivative about `curvature * step / scale`. Both are
    equal at a step of sqrt(noise * scale / curvature). The factor 3 on it is that of `measure_response`.

    Reference:
      Gill, Murray, Saunders & Wright (1983), Computing forward-difference intervals.
    """
    balanced = 3 * jnp.sqrt(base.noise * base.scale / tree.or_one(base.curvature))
    step = jnp.clip(balanced, base.eps**0.5 * base.scale, 0.1 * base.scale)
    return step, jnp.maximum(base.noise / step, jnp.finfo(instance.dtype).tiny)


class FreeResidual(NamedTuple):
    """How far learning was from converged at the base point.

    Attributes:
      residual: norm of the inner gradient.
      distance: length of the Cauchy step -g (g'g / g'Hg), a lower bound of the length of Newton's step.
      shift: norm of the change that the Cauchy step makes to the outer gradient.
      nudge_norm: norm of the outer gradient.
    """

    residual: jax.Array
    distance: jax.Array
    shift: jax.Array
    nudge_norm: jax.Array


def cauchy_length(length: jax.Array, curvature: jax.Array, dtype: Any) -> jax.Array:
    """The length of the Cauchy step for a residual r, |r| / (r'Hr / r'r): a lower bound of |H^-1 r|.

    The Cauchy-Schwarz inequality gives r'H^-1 r >= (r'r)^2 / r'Hr for positive definite H. The bound is sharp where r
    lies along a single eigenvector, as the residual of unfinished learning does: it lies along low curvature.

    Args:
      length: norm of r.
      curvature: Rayleigh quotient r'Hr / r'r.
      dtype: the dtype in which curvatures are told from zero.
    """
    return length / jnp.maximum(curvature, jnp.asarray(jnp.finfo(dtype).tiny, dtype))


def free_status(base: BasePoint, left: FreeResidual) -> jax.Array:
    """Whether learning had converged at the base point.

    It had not if the Cauchy step would move `params`, or change the outer gradient, by more than the fraction
    `UNCONVERGED` of either. A residual at the floor of the dtype counts as converged. So does any residual where the
    outer gradient is zero at both ends of the step, because the solution then does not matter to the outer loss.
    Where the gradient jumps by more than the fraction `UNCONVERGED` of the nudge, the solution lies at a kink. Smaller
    jumps, such as those of one example in a network of rectifiers, count as smooth.
    """
    far = (left.distance > UNCONVERGED * base.scale) | (left.shift > UNCONVERGED * left.nudge_norm)
    at_floor = left.residual <= NOISE_FLOOR * base.noise
    matters = (base.nudge_norm > 0) | (left.nudge_norm > 0) | (left.shift > 0)
    # The solver's own tolerance was missed, but the residual is at the floor, or was reduced since.
    reduced = left.residual < 1e-3 * base.solution.residual
    excused = (base.solution.status == Status.FREE_NOT_CONVERGED) & (at_floor | reduced)
    # A gradient that counts as noise and matters beside the nudge, where differences are all noise: among kinks.
    ragged = base.noise > 0.3 * DIFFERENCE * base.eps**0.5 * base.curvature * base.scale
    drowned = at_floor & ragged & (NOISE_FLOOR * base.noise > base.nudge_norm) & (base.nudge_norm > 0)
    drowned &= left.residual > UNCONVERGED * base.nudge_norm
    return worst(
        flag(drowned, Status.LOST_IN_NOISE),
        flag(base.at_kink, Status.NOT_SMOOTH),
        flag(base.inconsistent, Status.INCONSISTENT_GRADIENT),
        flag(far & ~at_floor & matters, Status.FREE_NOT_CONVERGED),
        jnp.where(excused, jnp.int32(Status.CONVERGED), base.solution.status),
    )
