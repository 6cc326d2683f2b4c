"""Control flow that several estimators share; all of it runs inside `jax.shard_map` as well."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree

T = TypeVar("T")


def cast_like(new: T, old: T) -> T:
    """`new` in the dtypes of `old`: where leaves differ in precision, scalars must not widen them."""

    def cast(x: Any, like: Any) -> Any:
        # Keys and the like stay what they are.
        return jnp.asarray(x, like.dtype) if jnp.issubdtype(like.dtype, jnp.number) else x

    same: T = jax.tree.map(cast, new, old)
    return same


def axes_of_shard_map() -> frozenset[Any]:
    """The axes of the mesh that a `jax.shard_map` around has cut; none elsewhere."""
    get_mesh = getattr(jax.sharding, "get_abstract_mesh", None)
    return frozenset() if get_mesh is None else frozenset(getattr(get_mesh(), "manual_axes", ()))


def varying(values: T) -> T:
    """The values, of types that allow them to differ between the devices of a `jax.shard_map` around.

    A loop must return the types that it is given. Inside `jax.shard_map` these say along which axes of the mesh a value
    may differ: a carry that starts from a constant would not, and what one iteration makes of a task does. Elsewhere
    the values are returned as they are.
    """
    axes = axes_of_shard_map()
    if not axes:
        return values

    def vary(x: Any) -> jax.Array:
        array = jnp.asarray(x)
        missing = tuple(sorted(axes - _varying_axes(array), key=str))
        if not missing:
            return array
        cast: Any = getattr(jax.lax, "pcast", None)
        older: Any = getattr(jax.lax, "pvary", None)
        varied: jax.Array = cast(array, missing, to="varying") if cast is not None else older(array, missing)
        return varied

    same: T = jax.tree.map(vary, values)
    return same


def _varying_axes(array: jax.Array) -> frozenset[Any]:
    """The axes of a `jax.shard_map` along which the type of an array allows it to differ."""
    kind: Any = jax.typeof(array)
    axes: frozenset[Any] = kind.mat.varying if hasattr(kind, "mat") else kind.vma
    return axes


def while_loop(condition: Callable[[T], Any], body: Callable[[T], T], init: T) -> T:
    """`jax.lax.while_loop`, of values that vary."""
    end: T = jax.lax.while_loop(condition, lambda carry: varying(body(carry)), varying(init))
    return end


def fori_loop(begin: Any, end: Any, body: Callable[[Any, Any], Any], init: Any) -> Any:
    """`jax.lax.fori_loop`, of values that vary."""
    if not (isinstance(begin, int) and isinstance(end, int)):
        begin, end = varying((begin, end))
    return jax.lax.fori_loop(begin, end, lambda k, carry: varying(body(k, carry)), varying(init))


def scan(body: Callable[[Any, Any], Any], init: Any, xs: Any = None, **options: Any) -> Any:
    """`jax.lax.scan`, of values that vary."""
    return jax.lax.scan(lambda carry, x: varying(body(carry, x)), varying(init), xs, **options)


def cond(condition: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], *operands: Any) -> Any:
    """`jax.lax.cond`; inside `jax.shard_map` both branches are computed, as under `jax.vmap`."""
    if not axes_of_shard_map():
        return jax.lax.cond(condition, if_true, if_false, *operands)
    return _selected(condition, [if_false, if_true], operands)


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """`jax.lax.switch`; inside `jax.shard_map` all branches are computed, as under `jax.vmap`."""
    if not axes_of_shard_map():
        return jax.lax.switch(index, branches, *operands)
    return _selected(index, branches, operands)


def _selected(index: Any, branches: Sequence[Callable[..., Any]], operands: Any) -> Any:
    """What one of several branches returns.

    Under `jax.vmap` inside `jax.shard_map` JAX (0.10.2) fails to map a branch that closes over a constant: the mapped
    constant varies, and the branch was traced for one that does not.
    """
    chosen = None
    for number, branch in enumerate(branches):
        taken = jnp.asarray(index).astype(jnp.int32) == number
        # No derivative, which may be NaN, comes from a branch that is not taken.
        held = jax.tree.map(lambda x, taken=taken: jnp.where(taken, x, jax.lax.stop_gradient(x)), operands)
        found = branch(*held)
        chosen = found if chosen is None else tree.where(taken, found, chosen)
    return chosen


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

    _, value = while_loop(lambda carry: carry[0], once, (jnp.asarray(needed), otherwise))
    result: T = value
    return result


def settle(*scalars: Any) -> list[jax.Array]:
    """Scalars of one dtype, computed here and once.

    The compiler computes a scalar anew in each kernel that depends on the scalar. It does not look behind the barrier
    at what is stacked: a tenth fewer operations in the program of an estimate (jax 0.10.2, on a CPU).
    """
    stacked = jax.lax.optimization_barrier(jnp.stack([jnp.asarray(x) for x in scalars]))
    return [stacked[k] for k in range(len(scalars))]
