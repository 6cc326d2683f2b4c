"""The few-shot learner of `examples/flax_linen_imaml.py` without Flax: waves from 10 points, 16 tasks a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.loops_few_shot import CONTRAST, Setup

DEFAULT = "contrast, defaults"
_NUM_TASKS, _WIDTH = 16, 32


class Wave(NamedTuple):
    """Points to learn from, and others to be judged by, each of shape (10, 1)."""

    x: jax.Array
    y: jax.Array
    x_val: jax.Array
    y_val: jax.Array


def setup(seed: int, num_steps: int) -> Setup:
    """As in the example: momentum, 50 steps, and the learner itself for the nudged phases."""
    keys = jax.random.split(jax.random.key(seed), num_steps + 1)
    learner = cm.OptaxDescent(optax.sgd(0.01, momentum=0.9), num_steps=50)
    published = cm.Contrastive(learner, nudged_solver=learner, scheme=cm.relative(cm.central_difference))
    problem = cm.BilevelProblem(
        _inner_loss, lambda params, _, task: _error(params, task.x_val, task.y_val), lambda anchor, _: anchor
    )
    methods: dict[str, tuple[cm.BilevelProblem, cm.MetaGradientEstimator]] = {
        CONTRAST: (problem, published),
        DEFAULT: (problem, cm.Contrastive(learner)),
    }
    batches = [jax.vmap(_draw)(jax.random.split(key, _NUM_TASKS)) for key in keys[1:]]
    return Setup("iMAML example", methods, _init_params(keys[0]), batches, _inner_loss, "sine waves")


def _init_params(key: jax.Array) -> Any:
    widths = (1, _WIDTH, _WIDTH, 1)
    return [
        {"kernel": jax.random.normal(k, (before, after)) / before**0.5, "bias": jnp.zeros(after)}
        for k, before, after in zip(jax.random.split(key, 3), widths, widths[1:], strict=False)
    ]


def _error(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x @ params[-1]["kernel"] + params[-1]["bias"] - y) ** 2)


def _inner_loss(params: Any, anchor: Any, task: Wave) -> jax.Array:
    away = jax.tree.map(lambda p, a: jnp.sum((p - a) ** 2), params, anchor)
    return _error(params, task.x, task.y) + 0.2 * sum(jax.tree.leaves(away), start=jnp.zeros(()))


def _draw(key: jax.Array) -> Wave:
    keys = jax.random.split(key, 3)
    a = jax.random.uniform(keys[0], minval=0.5, maxval=2.0)
    p = jax.random.uniform(keys[1], maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (20, 1), minval=-3.0, maxval=3.0)
    y = a * jnp.sin(x + p)
    return Wave(x[:10], y[:10], x[10:], y[10:])
