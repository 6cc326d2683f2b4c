"""Control flow that several estimators share."""

from collections.abc import Callable
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


import os
PACK = os.environ.get("PACK") == "1"


def settle(*scalars: Any) -> list[jax.Array]:
    """Scalars of one dtype, computed here and once.

    The compiler would compute a scalar anew for each array that depends on it. It does not look behind the barrier at
    what is stacked.
    """
    stacked = jax.lax.optimization_barrier(jnp.stack([jnp.asarray(x) for x in scalars]))
    return [stacked[k] for k in range(len(scalars))]


# Larger arrays are not copied into one.
_LARGEST_PACKED = 2**12


class Packing:
    """Leaves of one shape and dtype as one array, and back: what a loop carries is then few arrays.

    The compiler computes a scalar anew for each array that depends on it. Where all scalars leave a loop's body in one
    array, they are computed once: a third of the operations of a program.

    Args:
      like: a pytree with the structure, shapes and dtypes of those to come.
    """

    def __init__(self, like: Any) -> None:
        leaves, self.structure = jax.tree.flatten(like)
        groups: dict[Any, list[int]] = {}
        for number, leaf in enumerate(leaves):
            shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
            small = leaf.size <= _LARGEST_PACKED and jnp.issubdtype(dtype, jnp.number) or dtype == bool
            groups.setdefault((shape, dtype) if small else number, []).append(number)
        self.groups = list(groups.values())

    def pack(self, values: Any) -> list[jax.Array]:
        """The groups, each stacked."""
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(values)]
        return [
            jnp.stack([leaves[k] for k in group]) if len(group) > 1 else leaves[group[0]] for group in self.groups
        ]

    def unpack(self, packed: list[jax.Array]) -> Any:
        """The pytree."""
        leaves: list[Any] = [None] * sum(map(len, self.groups))
        for group, array in zip(self.groups, packed, strict=True):
            for place, number in enumerate(group):
                leaves[number] = array[place] if len(group) > 1 else array
        return jax.tree.unflatten(self.structure, leaves)


def packed_loop(condition: Callable[[T], jax.Array], body: Callable[[T], T], begin: T) -> T:
    """`lax.while_loop` that carries its value packed; `body` may return other precisions."""
    packing = Packing(begin)

    def step(packed: list[jax.Array]) -> list[jax.Array]:
        before = packing.unpack(packed)
        return packing.pack(cast_like(body(before), before))

    if not PACK:
        return jax.lax.while_loop(condition, lambda c: cast_like(body(c), c), begin)
    end = jax.lax.while_loop(lambda packed: condition(packing.unpack(packed)), step, packing.pack(begin))
    result: T = packing.unpack(end)
    return result


def packed_switch(index: jax.Array, branches: list[Callable[[], T]], like: T) -> T:
    """`lax.switch` whose branches return what is `like` a value, packed."""
    packing = Packing(like)
    if not PACK:
        return jax.lax.switch(index, [lambda b=b: cast_like(b(), like) for b in branches])
    found = jax.lax.switch(index, [lambda b=b: packing.pack(cast_like(b(), like)) for b in branches])
    result: T = packing.unpack(found)
    return result
