"""The wheel bandit: its contexts and rewards, its regret in closed form, and what agents remember of their pulls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NUM_ARMS = 5
_CENTRE = NUM_ARMS - 1
# Riquelme, Tucker & Snoek (2018), with the deviations of the contrastive paper's code.
_MEANS = (1.0, 1.0, 1.0, 1.0, 1.2)
_DEVIATION, _BEST, _BEST_DEVIATION = 0.05, 50.0, 0.01


class Pulls(NamedTuple):
    """Arms that were pulled and what they paid; equal shapes."""

    arm: jax.Array
    reward: jax.Array


class Wheel(NamedTuple):
    """A wheel as a task of `architectures`: contexts and pulls to learn from and to judge by."""

    x_train: jax.Array
    y_train: Pulls
    x_val: jax.Array
    y_val: Pulls


def contexts(key: jax.Array, num: int) -> jax.Array:
    """Uniform in the unit disc, shape (num, 2); drawn in float32, so that agents in float64 meet the same."""
    of_radius, of_angle = jax.random.split(key)
    drawn = [jax.random.uniform(k, (num,), jnp.float32).astype(jnp.result_type(float)) for k in (of_radius, of_angle)]
    radius, angle = jnp.sqrt(drawn[0]), 2 * jnp.pi * drawn[1]
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)


def means(context: jax.Array, delta: jax.Array) -> jax.Array:
    """Expected reward of every arm, shape (.., 5): beyond the radius `delta` the arm of the quadrant pays best."""
    right, upper = context[..., 0] > 0, context[..., 1] > 0
    quadrant = jnp.where(right, jnp.where(upper, 0, 1), jnp.where(upper, 2, 3))
    beyond = jnp.linalg.norm(context, axis=-1) >= delta
    best = beyond[..., None] & (jnp.arange(NUM_ARMS) == quadrant[..., None])
    return jnp.where(best, _BEST, jnp.array(_MEANS, context.dtype))


def rewards(key: jax.Array, context: jax.Array, arm: jax.Array, delta: jax.Array) -> jax.Array:
    """What the arms pay, shape (..): normal around their means."""
    mean = jnp.take_along_axis(means(context, delta), arm[..., None], axis=-1)[..., 0]
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return mean + jnp.where(mean == _BEST, _BEST_DEVIATION, _DEVIATION) * noise


def regret(context: jax.Array, arm: jax.Array, delta: jax.Array) -> jax.Array:
    """How much less than the best arm these pay in expectation, shape (..)."""
    of_all = means(context, delta)
    return jnp.max(of_all, axis=-1) - jnp.take_along_axis(of_all, arm[..., None], axis=-1)[..., 0]


def uniform_regret(delta: jax.Array | float) -> jax.Array | float:
    """Expected regret of a trial of who pulls any arm, in closed form.

    A context lies within `delta` with probability delta^2: the four arms that are not the centre's lose 0.2 there.
    Beyond, the centre's arm loses 48.8 and the three of other quadrants 49 each.
    """
    others = _MEANS[0]
    within = (NUM_ARMS - 1) / NUM_ARMS * (_MEANS[_CENTRE] - others)
    beyond = (_BEST - _MEANS[_CENTRE] + (NUM_ARMS - 2) * (_BEST - others)) / NUM_ARMS
    return delta**2 * within + (1 - delta**2) * beyond


def offline_tasks(key: jax.Array, num_tasks: int, num_support: int, num_query: int) -> Wheel:
    """Wheels of radii uniform in (0, 1), each seen through pulls of random arms; targets are `Pulls`."""
    parts = slice(None, num_support), slice(num_support, None)

    def one(key: jax.Array) -> Wheel:
        of_delta, of_context, of_arm, of_reward = jax.random.split(key, 4)
        num = num_support + num_query
        delta = jax.random.uniform(of_delta)
        x, arm = contexts(of_context, num), jax.random.randint(of_arm, (num,), 0, NUM_ARMS)
        data = x, Pulls(arm, rewards(of_reward, x, arm, delta))
        support, query = (jax.tree.map(lambda leaf, part=part: leaf[part], data) for part in parts)
        return Wheel(*support, *query)

    return jax.vmap(one)(jax.random.split(key, num_tasks))


class Replay(NamedTuple):
    """The last pulls, as many as there are slots.

    Attributes:
      context: shape (slots, 2).
      pulls: shape (slots,).
      total: pulls so far, those forgotten included.
    """

    context: jax.Array
    pulls: Pulls
    total: jax.Array

    @property
    def is_filled(self) -> jax.Array:
        """Which slots hold a pull: all of them once as many were added, however the next slot stands."""
        return jnp.arange(self.context.shape[0]) < self.total

    def add(self, context: jax.Array, arm: jax.Array, reward: jax.Array) -> "Replay":
        """With one more pull, in the place of the oldest where all slots are taken."""
        slot = self.total % self.context.shape[0]
        pulls = Pulls(self.pulls.arm.at[slot].set(arm), self.pulls.reward.at[slot].set(reward))
        return Replay(self.context.at[slot].set(context), pulls, self.total + 1)

    def sample(self, key: jax.Array, num: int) -> tuple[jax.Array, Pulls]:
        """`num` of the filled slots, with replacement."""
        slots = jax.random.randint(key, (num,), 0, jnp.minimum(self.total, self.context.shape[0]))
        return self.context[slots], jax.tree.map(lambda leaf: leaf[slots], self.pulls)


def empty_replay(slots: int, dtype: jnp.dtype | None = None) -> Replay:
    """No pulls yet."""
    real = jnp.zeros(slots, dtype)
    return Replay(jnp.zeros((slots, 2), real.dtype), Pulls(jnp.zeros(slots, jnp.int32), real), jnp.int32(0))
