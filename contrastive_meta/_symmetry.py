"""Whether a loss's gradient is that of its value: `stop_gradient` and hand-written derivative rules may break that."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from contrastive_meta import _pytree as tree
from contrastive_meta._control import scan, varying
from contrastive_meta._instance import Instance
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._tracing import open_jaxpr, trace

# Whose derivative rules are those of the values: rectifiers, log-sum-exp and the like.
_TRUSTED = tuple(os.path.dirname(file) + os.sep for file in (str(jax.__file__), str(optax.__file__), __file__))
_OWN_RULE = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
# Relative asymmetry above this is no matter of finite differences.
LARGEST_ASYMMETRY = 1e-2
# Asymmetry within this many times the rounding of the differences is none.
_ROUNDING = 10.0


def has_own_derivatives(instance: Instance, params: Params) -> bool:
    """Whether the user's inner loss has an operation whose derivative need not be that of its value.

    The loss is traced, nothing is computed. Functions of JAX and optax have right derivatives, however they are made.
    """

    def loss(params: Params, meta_params: MetaParams) -> jax.Array:
        return instance.problem.inner(params, meta_params, instance.task)

    return _any_own(trace(loss, params, instance.meta_params))


def _any_own(traced: core.Jaxpr | core.ClosedJaxpr) -> bool:
    for eqn in open_jaxpr(traced).eqns:
        name = eqn.primitive.name
        if name == "stop_gradient" and not _stopped_by_library(eqn):
            return True
        inside = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        if name in _OWN_RULE and not any(_file_of(x).startswith(_TRUSTED) for x in inside):
            return True
        if name not in _OWN_RULE and any(map(_any_own, inside)):
            return True
    return False


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _file_of(traced: core.Jaxpr | core.ClosedJaxpr) -> str:
    """Where the function was written."""
    return getattr(getattr(open_jaxpr(traced), "debug_info", None), "func_filename", None) or ""


def _stopped_by_library(eqn: core.JaxprEqn) -> bool:
    """Whether the caller of `stop_gradient` is a function of JAX or optax."""
    frames = getattr(eqn.source_info.traceback, "frames", None) or []
    names = [frame.function_name for frame in frames]
    if "stop_gradient" not in names:
        return False
    after = frames[names.index("stop_gradient") + 1 :]
    return bool(after) and after[0].file_name.startswith(_TRUSTED)


def asymmetry_of(instance: Instance, params: Params, direction: Params, scale: jax.Array) -> jax.Array:
    """How far the derivative of the inner gradient, in params and meta-params, is from symmetric; relative.

    Where no operation of the loss can make it asymmetric, that is 0 and nothing is computed.

    Second derivatives of a value are symmetric. Along a direction a of `params` the gradients change by H a and C' a;
    along b = C' a the gradient in `params` changes by C b, and along c = H a by H c. Symmetry asks for <a, C b> =
    <b, b> and for <a, H c> = <c, c>. Costs 6 gradients, one after another.

    Args:
      instance: the problem.
      params: where.
      direction: of `params`, of any length; a fixed random direction is added to it.
      scale: length of `params`.

    Reference:
      Schwarz's theorem; Clairaut (1740).
    """
    dtype, eps = instance.dtype, tree.coarsest_eps(instance.dtype, params)
    if not has_own_derivatives(instance, params):
        return jnp.zeros((), dtype)
    gradients = tree.grad(lambda at, meta: instance.problem.inner(at, meta, instance.task), (0, 1))
    meta_params = instance.meta_params
    nothing = tree.zeros_like(params), tree.zeros_like(meta_params)
    # Central differences err by step^2 and by eps over the step.
    relative = jnp.asarray(eps ** (1 / 3), dtype)
    meta_step = relative * jnp.maximum(tree.norm(meta_params).astype(dtype), 1)
    unit = tree.add(_unit(direction), _unit(optax.tree.random_like(jax.random.key(0), params)))
    first = _unit(unit), nothing[1]

    def measure(along: Any, step: jax.Array) -> Any:
        def at(sign: jax.Array) -> Any:
            return gradients(*tree.add_scaled((params, meta_params), sign * step, along))

        both = jax.lax.map(at, varying(jnp.array([1.0, -1.0], dtype)))
        return jax.tree.map(lambda xs: (xs[0] - xs[1]) / (2 * step).astype(xs.dtype), both)

    def check(carry: Any, k: jax.Array) -> Any:
        along, changes = carry
        step = jnp.where(k == 1, meta_step, relative * scale)
        change = measure(along, step)
        changes = tree.where(k == 0, change, changes)
        by_meta = tree.where(tree.norm(changes[1]) > 0, changes[1], jax.tree.map(jnp.ones_like, changes[1]))
        following = tree.where(k == 0, (nothing[0], _unit(by_meta)), (_unit(changes[0]), nothing[1]))
        length = tree.norm(changes[0]).astype(dtype)
        by_meta_length = tree.norm(changes[1]).astype(dtype)
        back = tree.vdot(first[0], change[0]).astype(dtype)
        wanted = jnp.where(k == 1, by_meta_length, length)
        rounding = _ROUNDING * eps * length * scale / step
        off = jnp.maximum(jnp.abs(back - wanted) - rounding, 0) / tree.or_one(jnp.maximum(jnp.abs(back), wanted))
        return (following, changes), jnp.where(k == 0, 0, off)

    _, off = scan(check, (first, nothing), jnp.arange(3))
    return jnp.max(jnp.where(jnp.isfinite(off), off, 0)).astype(dtype)


def _unit(values: Any) -> Any:
    return tree.scale(1 / tree.or_one(tree.norm(values)), values)
