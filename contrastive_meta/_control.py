"""Control flow that several estimators share."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def only_if(needed: jax.Array, compute: Callable[[T], T], otherwise: T) -> T:
    """`compute(otherwise)` where the scalar `needed` holds, else `otherwise` itself, at no cost.

    A loop of at most one turn rather than a `cond`: under vmap a `cond` computes for every task, a loop only if some
    task needs it.
    """

    def once(carry: Any) -> Any:
        like = carry[1]
        new = jax.tree.map(lambda x, old: jnp.asarray(x, jnp.result_type(old)), compute(like), like)
        return jnp.zeros_like(carry[0]), new

    _, value = jax.lax.while_loop(lambda carry: carry[0], once, (jnp.asarray(needed), otherwise))
    result: T = value
    return result
