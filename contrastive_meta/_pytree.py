"""Strategies as frozen dataclass pytrees, and the tree arithmetic that the rest is written in."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """A field of a `strategy` that is structure: hashable, part of the compilation key, never traced."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def strategy(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree: plain fields are leaves, `static` ones are structure.

    A new number in a plain field therefore recompiles nothing; a new function in a static one does.

    Args:
      cls: a class with annotated fields.

    Returns:
      The same class, frozen and registered with JAX.

    Example:
      >>> @strategy
      ... class Momentum:
      ...     step_size: float
      ...     num_steps: int = static(default=100)
      >>> jax.tree.leaves(Momentum(0.1))
      [0.1]
    """
    frozen: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(frozen)
    data = [field.name for field in fields if not field.metadata.get("static")]
    meta = [field.name for field in fields if field.metadata.get("static")]
    jax.tree_util.register_dataclass(frozen, data_fields=data, meta_fields=meta)
    result: type[T] = frozen
    return result


# Beyond this many entries a copy into one vector would be felt, and might gather what is spread over devices.
_LARGEST_FLAT = 2**24


@dataclasses.dataclass(frozen=True)
class Flattening:
    """A pytree as one vector, and back: what is done to every leaf is then one operation to compile and to run.

    Trees of one leaf, of several dtypes, or of very many entries stay as they are.

    Attributes:
      flatten: tree to vector.
      unflatten: vector to tree.
    """

    flatten: Callable[[PyTree], PyTree]
    unflatten: Callable[[PyTree], PyTree]

    @classmethod
    def of(cls, like: PyTree) -> "Flattening":
        """The flattening of trees with the structure and shapes of `like`."""
        leaves, structure = jax.tree.flatten(like)
        shapes, sizes = [x.shape for x in leaves], [x.size for x in leaves]
        if len(leaves) < 2 or len({x.dtype for x in leaves}) > 1 or sum(sizes) > _LARGEST_FLAT:
            return cls(lambda a: a, lambda a: a)
        ends = np.cumsum(sizes)

        def flatten(a: PyTree) -> PyTree:
            return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(a)])

        def unflatten(a: PyTree) -> PyTree:
            parts = zip(ends - sizes, ends, shapes, strict=True)
            return jax.tree.unflatten(structure, [a[begin:end].reshape(shape) for begin, end, shape in parts])

        return cls(flatten, unflatten)


def add(a: PyTree, b: PyTree) -> PyTree:
    """`a + b`, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: Any, a: PyTree) -> PyTree:
    """`factor * a`, each leaf keeping its dtype unless `factor` is complex."""
    return jax.tree.map(lambda x: _in_dtype_of(factor, x) * x, a)


def add_scaled(a: PyTree, factor: Any, b: PyTree) -> PyTree:
    """`a + factor * b`, in the dtypes of `a` unless `factor` is complex."""
    return add(a, scale(factor, b))


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """The real inner product over all leaves; for complex leaves the real part of `conj(a) . b`."""
    products = jax.tree.map(lambda x, y: jnp.real(jnp.vdot(x, y)), a, b)
    return sum_of_leaves(products)


def norm(a: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, safe from overflow and underflow of the squares; see `norms`."""
    leaves = jax.tree.leaves(a)
    return norms(a)[0].astype(float_dtype(leaves)) if leaves else jnp.zeros(())


def norms(*trees: PyTree, units: jax.Array | None = None) -> jax.Array:
    """The Euclidean norms of trees of one structure, one for each, safe from overflow and underflow of the squares.

    Entries are divided by the largest of their tree, or by what is about as large. Several norms are one kernel.
    Norms only ever measure (residuals, scales): no derivative passes through them.

    Args:
      trees: with the same structure and shapes.
      units: a positive number for all trees, or for each. Entries that are 1e19 times larger or smaller (in float64
        1e154 times) overflow, or count as 0. By default the largest entries, a search that nearly doubles what is
        compiled.

    Returns:
      A vector in the finest dtype of all leaves, float32 at least.
    """
    columns = list(zip(*(jax.tree.leaves(jax.lax.stop_gradient(a)) for a in trees), strict=True))
    fine = promoted(float_dtype([x for column in columns for x in column]), jnp.float32)
    if not columns:
        return jnp.zeros((len(trees),), fine)
    stacks = [jnp.stack([jnp.abs(x).astype(fine) for x in column]) for column in columns]
    axes = [tuple(range(1, stack.ndim)) for stack in stacks]
    if units is None:
        peaks = [jnp.max(stack, axis=axis, initial=0.0) for stack, axis in zip(stacks, axes, strict=True)]
        peak = functools.reduce(jnp.maximum, peaks)
        unit = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    else:
        unit = jnp.asarray(units, fine)

    def sums(stack: jax.Array, axis: tuple[int, ...]) -> jax.Array:
        return jnp.sum(jnp.square(stack / (unit.reshape(-1, *[1] * len(axis)) if unit.ndim else unit)), axis=axis)

    total = sum_of_leaves([sums(stack, axis) for stack, axis in zip(stacks, axes, strict=True)])
    return unit * jnp.sqrt(total)


def max_abs(a: PyTree) -> jax.Array:
    """The largest absolute entry of any leaf; 0 for a tree without entries."""
    leaves = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(a)]
    dtype = promoted(*leaves) if leaves else None
    return jnp.max(jnp.stack([x.astype(dtype) for x in leaves])) if leaves else jnp.zeros(())


def zeros_like(a: PyTree) -> PyTree:
    """Zeros in the shapes and dtypes of `a`."""
    return jax.tree.map(jnp.zeros_like, a)


def or_one(x: jax.Array) -> jax.Array:
    """`x` where it is positive, else 1: a divisor."""
    return jnp.where(x > 0, x, jnp.ones_like(x))


def unstack(a: PyTree, number: int) -> list[PyTree]:
    """The trees whose leaves are stacked along the leading axis of those of `a`."""
    return [jax.tree.map(lambda xs, k=k: xs[k], a) for k in range(number)]


def where(condition: Any, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the scalar `condition` holds, else `b`; never arithmetic, so a NaN on the other side stays there."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def all_finite(a: PyTree) -> jax.Array:
    """Whether every entry of every leaf is finite."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.asarray(True)


def floating(a: PyTree) -> list[jax.Array]:
    """The leaves that are floating numbers, not integers or keys."""
    return [x for x in jax.tree.leaves(a) if jnp.issubdtype(x.dtype, jnp.inexact)]


def float_dtype(a: PyTree) -> Any:
    """The real floating dtype that the leaves of `a` promote to."""
    leaves = jax.tree.leaves(a)
    dtype = promoted(*leaves) if leaves else jnp.result_type(float)
    return jnp.finfo(dtype).dtype


def promoted(*values: Any) -> Any:
    """The dtype that arrays and dtypes promote to, also where the user forbids operations to promote."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def coarsest_eps(dtype: Any, a: PyTree) -> float:
    """The largest relative rounding of `dtype` and of the leaves of `a`."""
    return max(float(jnp.finfo(kind).eps) for kind in (dtype, *(jnp.real(x).dtype for x in jax.tree.leaves(a))))


def value_and_grad(
    function: Callable[..., Any], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad` that takes the holomorphic derivative when the first differentiated argument is complex."""
    first = argnums if isinstance(argnums, int) else argnums[0]

    def evaluate(*args: Any) -> Any:
        holomorphic = is_complex(args[first])
        return jax.value_and_grad(function, argnums=argnums, has_aux=has_aux, holomorphic=holomorphic)(*args)

    return evaluate


def grad(function: Callable[..., jax.Array], argnums: int | tuple[int, ...] = 0) -> Callable[..., Any]:
    """The gradient part of `value_and_grad`."""
    return lambda *args: value_and_grad(function, argnums)(*args)[1]


def is_complex(a: PyTree) -> bool:
    """Whether any leaf is complex."""
    return any(jnp.iscomplexobj(x) for x in jax.tree.leaves(a))


def at_least(a: PyTree, dtype: Any) -> PyTree:
    """The leaves in their own precision, or that of `dtype` where it is finer."""
    return jax.tree.map(lambda x: x.astype(promoted(x.dtype, dtype)), a)


def to_complex(a: PyTree) -> PyTree:
    """The leaves in the complex dtype of their own precision."""
    return jax.tree.map(lambda x: x.astype(promoted(x, jnp.complex64)), a)


def _in_dtype_of(factor: Any, x: jax.Array) -> Any:
    return factor if jnp.iscomplexobj(factor) else jnp.asarray(factor, dtype=jnp.real(x).dtype)


def sum_of_leaves(a: PyTree) -> jax.Array:
    """The sum of the leaves, arrays of one shape, in the dtype that they promote to."""
    leaves = jax.tree.leaves(a)
    dtype = promoted(*leaves) if leaves else None
    return jnp.asarray(sum(x.astype(dtype) for x in leaves)) if leaves else jnp.zeros(())
