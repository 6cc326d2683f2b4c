"""A few-shot learner (iMAML, Flax Linen): an initialisation from which 10 points of a sine wave are enough."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import contrastive_meta as cm


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)


def some_tasks(key, number):
    """Waves y = a sin(x + p) of random a and p: points to learn from, and others to be judged by."""
    keys = jax.random.split(key, 3)
    a = jax.random.uniform(keys[0], (number, 1, 1), minval=0.5, maxval=2.0)
    p = jax.random.uniform(keys[1], (number, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (number, 20, 1), minval=-3.0, maxval=3.0)
    y = a * jnp.sin(x + p)
    return {"support": (x[:, :10], y[:, :10]), "query": (x[:, 10:], y[:, 10:])}


def error(params, data):
    return jnp.mean((Network().apply(params, data[0]) - data[1]) ** 2)


def inner_loss(params, anchor, task):  # the anchor makes the solution depend on where learning starts
    away = optax.tree.norm(optax.tree.sub(params, anchor), squared=True)
    return error(params, task["support"]) + 0.2 * away


problem = cm.BilevelProblem(
    inner_loss, outer_loss=lambda params, _, task: error(params, task["query"]), init_params=lambda anchor, _: anchor
)
learner = cm.OptaxDescent(optax.sgd(0.01, momentum=0.9), num_steps=50)
estimator = cm.Contrastive(learner, nudged_solver=learner, scheme=cm.relative(cm.central_difference))
meta_params = Network().init(jax.random.key(0), jnp.zeros((1, 1)))  # a dict of arrays, as `params` are
tx = cm.meta_optimizer(optax.adam(5e-3), problem, estimator)


@jax.jit
def step(meta_params, state, key):
    updates, state = tx.update(None, state, meta_params, tasks=some_tasks(key, 16))
    return optax.apply_updates(meta_params, updates), state


state, losses = tx.init(meta_params), []
for i in range(301):
    meta_params, state = step(meta_params, state, jax.random.key(i))
    losses.append(float(state.meta_gradient.outer_loss))  # of waves not seen before
    if i % 50 == 0:
        print(f"{i:4d} meta-steps: error after learning from 10 points of new waves {losses[-1]:.3f}")
assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
