"""Coordinates of a learner of optax updates, which is known by what its updates do.

They are the parameters themselves. Entries that the updates hold in place are constant, and weight decay is added as a
penalty.
"""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._solvers.base import Held, InnerSolver
from contrastive_meta._walls.walls import Walls, directions


def held_entries(bound: InnerSolver, held: Held, params: Params) -> Walls:
    """The coordinates of a learner whose updates hold entries in place, or decay them."""

    def held_at(at: Params, gradient: Params) -> Held:
        found = bound.held_at(at, gradient)
        assert found is not None
        return found

    def params_of(x: Params, meta_params: MetaParams) -> Params:
        return jax.tree.map(lambda fixed, w, at: jnp.where(fixed, w.astype(at.dtype), at), held.entries, params, x)

    def value_of(x: Params, at: Params, meta_params: MetaParams) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(lambda c, w: jnp.sum(c.astype(w.dtype) * w**2) / 2, held.decay, at)))

    def rests_at(x: Params, at: Params, gradient: Params) -> jax.Array:
        found = held_at(at, gradient)
        alike = jax.tree.map(lambda a, b: jnp.all(a == b), found.entries, held.entries)
        return found.known & jnp.all(jnp.stack(jax.tree.leaves(alike)))

    def same_piece(a: Params, b: Params) -> jax.Array:
        if tree.is_complex((a, b)):
            return jnp.asarray(True)

        def inside(x: Params) -> jax.Array:
            kept = jax.tree.map(lambda fixed, w, at: jnp.all(~fixed | (w == at)), held.entries, params, x)
            at = params_of(x, ())
            resting = jax.tree.map(lambda c, w: -c.astype(w.dtype) * w, held.decay, at)
            # Any gradient serves that is not all rounding.
            away = jax.tree.map(lambda g: g + jnp.ones_like(g), resting)
            return held_at(at, away).known & jnp.all(jnp.stack(jax.tree.leaves(kept)))

        return (inside(a) & inside(b)) | ~held.known

    def slopes(x: Params) -> Params:
        return jax.tree.map(lambda fixed, at: jnp.where(fixed, 0, jnp.ones_like(at)), held.entries, x)

    one = jnp.ones((), tree.float_dtype(params))
    around = jax.tree.map(lambda slope, sign: slope * sign, slopes(params), directions(params, jnp.sign))
    return Walls(
        params,
        params_of,
        value_of,
        lambda at, gradient: at,
        lambda at, x: x,
        same_piece,
        slopes,
        rests_at,
        around,
        one,
        held.known,
    )
