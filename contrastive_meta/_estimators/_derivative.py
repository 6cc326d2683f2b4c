"""The derivative that an estimate has, that of its outer loss in the meta-parameters, and the refusal of all others.

A derivative in reverse mode is refused where a cotangent arrives: what nobody differentiates is no error. In forward
mode JAX evaluates derivatives that nobody uses, and they are NaN.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams

T = TypeVar("T")

_REASON = (
    "An estimate cannot be differentiated like this: its only derivative is that of `result.outer_loss` in "
    "`meta_params`, once. Those of `result.grad` and `result.params`, second ones, and those in `task` or in values "
    "that the losses close over, would be derivatives of the iterations, which mean nothing. Use `argmin` to "
    "differentiate through learning; or stop derivatives before, by `jax.lax.stop_gradient(meta_params)`."
)


def _refuse_transpose(cotangent: Any, x: Any) -> Any:
    raise TypeError(_REASON)


# The identity on a tangent, for which there is no derivative.
_refused = core.Primitive("refused_derivative")
_refused.def_impl(lambda x: jnp.full_like(x, jnp.nan))
_refused.def_abstract_eval(lambda x: x)
ad.deflinear2(_refused, _refuse_transpose)
batching.defvectorized(_refused)
mlir.register_lowering(_refused, mlir.lower_fun(lambda x: jnp.full_like(x, jnp.nan), multiple_results=False))


def refused(tangents: Any) -> jax.Array | None:
    """A tangent that depends on all of these and must not be used; None where all are zero."""
    moved = [x for x in jax.tree.leaves(tangents, is_leaf=_is_zero) if not _is_zero(x) and x.dtype != jax.dtypes.float0]
    return _refused.bind(tree.sum_of_leaves([jnp.sum(jnp.real(x)) for x in moved])) if moved else None


def guarded(values: T, sources: Any) -> T:
    """The values, which cannot be differentiated: not in the sources, nor in what they were computed from."""
    leaves, structure = jax.tree.flatten(values)
    mask = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
    held = iter(_guarded([x for x, is_float in zip(leaves, mask, strict=True) if is_float], tree.floating(sources)))
    same: T = jax.tree.unflatten(
        structure, [next(held) if is_float else x for x, is_float in zip(leaves, mask, strict=True)]
    )
    return same


@jax.custom_jvp
def _guarded(values: list[jax.Array], sources: list[jax.Array]) -> list[jax.Array]:
    return values


def _guarded_jvp(primals: Any, tangents: Any) -> Any:
    tangent = refused(tangents)
    moved = [
        jnp.zeros_like(x) if tangent is None else jnp.broadcast_to(tangent, x.shape).astype(x.dtype) for x in primals[0]
    ]
    return primals[0], moved


_guarded.defjvp(_guarded_jvp, symbolic_zeros=True)


@jax.custom_jvp
def with_derivative(outer_loss: jax.Array, grad: MetaParams, meta_params: MetaParams) -> jax.Array:
    """The outer loss, with the estimate as its derivative in `meta_params`."""
    return outer_loss


@with_derivative.defjvp
def _with_derivative_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    outer_loss, grad, meta_params = primals
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), _once(grad, meta_params), tangents[2])
    # That of `outer_loss` itself is of what the losses close over: it is refused where there is one.
    return outer_loss, tree.sum_of_leaves(products).astype(outer_loss.dtype) + tangents[0]


@jax.custom_jvp
def _once(grad: MetaParams, meta_params: MetaParams) -> MetaParams:
    return grad


@_once.defjvp
def _refuse_second(primals: Any, tangents: Any) -> Any:
    raise TypeError(_REASON)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)
