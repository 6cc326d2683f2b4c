"""Control flow that several estimators share."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def cast_like(new: T, old: T) -> T:
    """`new` in the dtypes of `old`: where leaves differ in precision, scalars must not widen them."""

    def cast(x: Any, like: Any) -> Any:
        # Keys and the like stay what they are.
        return jnp.asarray(x, like.dtype) if jnp.issubdtype(like.dtype, jnp.number) else x

    same: T = jax.tree.map(cast, new, old)
    return same


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """JAX's usual promotion of dtypes and ranks, whatever the user's switches: for optax, whose Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def only_if(needed: jax.Array, compute: Callable[[T], T], otherwise: T) -> T:
    """`compute(otherwise)` where the scalar `needed` holds, else `otherwise` itself, at no cost.

    A loop of at most one turn rather than a `cond`: under vmap a `cond` computes for every task, a loop only if some
    task needs it.
    """

    def once(carry: Any) -> Any:
        return jnp.zeros_like(carry[0]), cast_like(compute(carry[1]), carry[1])

    _, value = jax.lax.while_loop(lambda carry: carry[0], once, (jnp.asarray(needed), otherwise))
    result: T = value
    return result


def settle(*scalars: Any) -> list[jax.Array]:
    """Scalars of one dtype, computed here and once.

    The compiler computes a scalar anew in each kernel that depends on the scalar. It does not look behind the barrier
    at what is stacked: a tenth fewer operations in the program of an estimate (jax 0.10.2, on a CPU).
    """
    stacked = jax.lax.optimization_barrier(jnp.stack([jnp.asarray(x) for x in scalars]))
    return [stacked[k] for k in range(len(scalars))]
