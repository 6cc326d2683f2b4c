"""Where a learner of optax updates rests, found by probing its updates: entries at bounds, and decay.

An entry is held if the update down its gradient leaves it in place, and the opposite one would not: it is at a bound.
Decay c is such that parameters w rest where the gradient is -c w. It is what an update does without a gradient, in
units of what it does with one, where updates are linear in the gradient, as those of descent and momentum. Elsewhere,
as before Adam, -c is the gradient at which parameters of 1 change the sign of their update; it is accepted only if
others change theirs at -c w.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import fori_loop, only_if
from contrastive_meta._problem import Params
from contrastive_meta._solvers.base import Held

# An update that is zero but for rounding is smaller than this many roundings of what it is made of.
_ROUNDINGS = 1e3
# Updates are linear in the gradient if twice the gradient gives twice the update up to this fraction; and a change of
# sign is looked for so near to where it should be.
_LINEAR = 1e-3
# Decay is looked for between these, on a scale of logarithms. Where the sign has changed below, as it does for decay
# that bypasses Adam's division (AdamW, Lion), the learner does not rest at a multiple of its parameters.
_LEAST_DECAY, _LARGEST_DECAY = 1e-6, 1e3
# Halvings that bring that interval down to a rounding of float64.
_HALVINGS = 60


def held_by(update: Callable[..., Params], params: Params, gradient: Params) -> Held:
    """What holds the learner at a point where the loss has this gradient.

    Args:
      update: `(gradient, params) -> updates` of a fresh optimiser.
      params: the point.
      gradient: of the loss.
    """
    decay, known, linear = _decay(params, update)
    resting = jax.tree.map(lambda c, x: -c.astype(x.dtype) * x, decay, params)
    # A difference that is zero in one kernel and a rounding error in the next would be taken for a frozen leaf.
    beyond = jax.lax.optimization_barrier(tree.subtract(gradient, resting))
    size = tree.or_one(jnp.maximum(tree.max_abs(beyond), tree.max_abs(gradient)))
    down = jax.tree.map(lambda g: jnp.sign(g) * size.astype(jnp.real(g).dtype), beyond)
    # With the gradient at which it rests, nothing moves that is free. Frozen leaves are not described.
    gradients = [tree.add_scaled(resting, sign, down) for sign in (1.0, -1.0, 0.0)]
    gradients += [tree.scale(1 + sign * _LINEAR, resting) for sign in (1.0, -1.0)]
    follows, opposes, still, more, less = _all_at_once(update, gradients, [params] * 5)

    def moves(x: jax.Array, u: jax.Array) -> jax.Array:
        return x + u.astype(x.dtype) != x

    held = jax.tree.map(lambda x, g, u, o: (g != 0) & ~moves(x, u) & moves(x, o), params, beyond, follows, opposes)
    eps = tree.coarsest_eps(tree.float_dtype(params), params)

    def rests(fixed: jax.Array, x: jax.Array, u: jax.Array, more: jax.Array, less: jax.Array) -> jax.Array:
        in_place = jnp.abs(u) <= _ROUNDINGS * eps * jnp.maximum(jnp.abs(x), jnp.abs(x + u))
        return jnp.all(fixed | in_place | (~linear & (jnp.sign(more) * jnp.sign(less) < 0)))

    def free(g: jax.Array, x: jax.Array, u: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.any(moves(x, u) | moves(x, o)) | ~jnp.any(g != 0)

    stays = jax.tree.leaves(jax.tree.map(rests, held, params, still, more, less))
    movable = jax.tree.leaves(jax.tree.map(free, beyond, params, follows, opposes))
    return Held(held, decay, known & jnp.all(jnp.stack(stays)) & jnp.all(jnp.stack(movable)))


def _decay(params: Params, update: Callable[..., Params]) -> tuple[Params, jax.Array, jax.Array]:
    """Factors of weight decay; whether they are known, and whether updates are linear in the gradient."""
    ones, nothing = jax.tree.map(jnp.ones_like, params), tree.zeros_like(params)
    # Small beside the parameters, so that no bound is met on the way.
    unit = 0.1
    gradients = [tree.scale(k * unit, ones) for k in (0.0, 1.0, 2.0)] + [tree.scale(-_LEAST_DECAY, ones), nothing]
    none, single, double, least, here = _all_at_once(update, gradients, [ones] * 4 + [params])
    eps = tree.coarsest_eps(tree.float_dtype(params), params)
    drift = jax.tree.map(lambda x, u: jnp.any(jnp.abs(u) > 4 * eps * jnp.abs(x)), params, here)
    decays = jnp.any(jnp.stack(jax.tree.leaves(drift)))

    def factor(without: jax.Array, of_one: jax.Array) -> jax.Array:
        rate = jnp.real(without - of_one) / unit
        found = -jnp.real(without) / jnp.where(rate > 0, rate, jnp.inf)
        return jnp.where(decays & (without != 0), found, jnp.zeros_like(found))

    def curves(without: jax.Array, of_one: jax.Array, of_two: jax.Array) -> jax.Array:
        curved = jnp.abs(of_two - 2 * of_one + without) > _LINEAR * jnp.abs(of_one - without)
        return jnp.any((without != 0) & (curved | (of_one == without)))

    def is_later(without: jax.Array, of_least: jax.Array) -> jax.Array:
        return jnp.all((without == 0) | (jnp.real(of_least) < 0))

    linear = ~jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(curves, none, single, double))))
    later = jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(is_later, none, least))))
    sought = decays & ~linear & later

    def by_sign(_: Params) -> Params:
        return jax.tree.map(lambda u, c: jnp.where(u == 0, 0, c), none, _change_of_sign(ones, update))

    return only_if(sought, by_sign, jax.tree.map(factor, none, single)), linear | sought | ~decays, linear


def _change_of_sign(ones: Params, update: Callable[..., Params]) -> Params:
    """Numbers c: parameters of 1 have updates of another sign where the gradient is less than -c. By bisection."""

    def halve(_: int, between: tuple[Params, Params]) -> tuple[Params, Params]:
        low, high = between
        middle = jax.tree.map(lambda a, b: jnp.sqrt(a) * jnp.sqrt(b), low, high)
        updates = update(tree.scale(-1.0, middle), ones)
        # Decay still wins over a gradient of less than it.
        wins = jax.tree.map(lambda u: jnp.real(u) < 0, updates)
        pick = jax.tree.map
        return pick(jnp.where, wins, middle, low), pick(jnp.where, wins, high, middle)

    real = jax.tree.map(jnp.real, ones)
    begin = tree.scale(_LEAST_DECAY, real), tree.scale(_LARGEST_DECAY, real)
    low, high = fori_loop(0, _HALVINGS, halve, begin)
    return jax.tree.map(lambda a, b: (a + b) / 2, low, high)


def _all_at_once(update: Callable[..., Params], gradients: list[Params], params: list[Params]) -> list[Params]:
    """The update of each pair, from one copy of the optimiser in the program."""
    stacked = [jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (gradients, params)]
    return tree.unstack(jax.vmap(update)(*stacked), len(params))
