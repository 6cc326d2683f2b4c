"""Tasks laid out over a mesh whose axes are explicit, part of JAX's types: inside, the compiler lays out the rest."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from contrastive_meta._pytree import PyTree

T = TypeVar("T")


def leave_to_compiler(
    function: Callable[..., T], args: tuple[Any, ...], layout_of_results: Callable[[Any], PyTree]
) -> T:
    """`function(*args)`, the layout of everything in it left to the compiler.

    Axes of `jax.make_mesh` are explicit by default in newer versions of JAX: every operation must then say how its
    result is laid out where that is not obvious, which neither learners nor users' losses do. Axes that are `Auto` need
    nothing.

    Args:
      function: must not close over what is laid out explicitly.
      args: its arguments.
      layout_of_results: from the mesh to how results are laid out, a prefix of their tree; called only where axes are
        explicit.

    Raises:
      TypeError: axes are explicit and this version of JAX cannot leave them to the compiler.
    """
    meshes = [layout.mesh for layout in map(_sharding_of, jax.tree.leaves(args)) if layout is not None]
    explicit = [mesh for mesh in meshes if getattr(mesh, "explicit_axes", ())]
    if not explicit:
        return function(*args)
    if not hasattr(jax.sharding, "auto_axes"):
        raise TypeError(
            "`tasks` are laid out over a mesh with explicit axes, which takes a newer version of JAX: make it with "
            "`jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))`."
        )
    automatic = jax.sharding.auto_axes(function, out_sharding=layout_of_results(explicit[0]))
    # What is made from nothing, zeros say, learns of the devices from arguments, also those that it does not use.
    result: T = jax.jit(automatic, keep_unused=True)(*args)
    return result


def as_laid_out(values: PyTree, mesh: Any) -> PyTree:
    """The layout of each leaf; a copy on every device where it has none."""

    def one(leaf: Any) -> Any:
        layout = _sharding_of(leaf)
        on_mesh = layout is not None and not layout.mesh.empty
        return NamedSharding(mesh, layout.spec if on_mesh else PartitionSpec())

    return jax.tree.map(one, values)


def along_tasks(tasks: PyTree, mesh: Any) -> Any:
    """The layout of what has a leading axis of tasks."""
    return NamedSharding(mesh, PartitionSpec(*tuple(_sharding_of(jax.tree.leaves(tasks)[0]).spec)[:1]))


def copied(mesh: Any) -> Any:
    """The layout of a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _sharding_of(leaf: Any) -> Any:
    return getattr(jax.typeof(leaf), "sharding", None)
