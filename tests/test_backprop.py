"""Reverse mode through learning: the plain derivative of the steps, from the positions alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import relative_error

NUM_STEPS = 5
X = np.random.default_rng(0).standard_normal((12, 5))
ROUNDING = {jnp.float32: 3e-6, jnp.float64: 1e-13}


def network(params: Any, meta: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["in"] + meta["shift"]) @ params["out"]


@jax.custom_vjp
def fed_back(weights: jax.Array, hidden: jax.Array) -> jax.Array:
    """`hidden @ weights`, whose derivative with other weights is the gradient of no loss: its Jacobian is lopsided."""
    return hidden @ weights


def _backwards(kept: Any, signal: jax.Array) -> Any:
    weights, hidden = kept
    return hidden.T @ signal, signal @ jnp.flip(weights, 0).T


fed_back.defvjp(lambda weights, hidden: (hidden @ weights, (weights, hidden)), _backwards)


def plain(params: Any, meta: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(network(params, meta, x) ** 3 + network(params, meta, x) ** 2)


def stopped(params: Any, meta: Any, x: jax.Array) -> jax.Array:
    """Temporal differences: the target is no part of the gradient."""
    target = jax.lax.stop_gradient(0.9 * network(params, meta, x[::-1]) + meta["shift"])
    return jnp.mean((network(params, meta, x) - target) ** 2)


def lopsided(params: Any, meta: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((fed_back(params["out"], jnp.tanh(x @ params["in"] + meta["shift"])) - 1.0) ** 2)


LOSSES = {"plain": plain, "stop_gradient": stopped, "custom_vjp": lopsided}
OPTIMIZERS = {
    "sgd": lambda meta: optax.sgd(meta["rate"]),
    "adam": lambda meta: optax.adam(meta["rate"]),
    "clipped": lambda meta: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(meta["rate"], momentum=0.9)),
}


def meta_params(dtype: Any) -> Any:
    weights = np.random.default_rng(1)
    start = {"in": weights.standard_normal((5, 4)), "out": weights.standard_normal((4, 1))}
    meta = {"start": start, "shift": np.array(0.3), "rate": np.array(0.05)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), meta)


def minibatch(key: jax.Array, x: jax.Array, step: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, 2 * step % 8, 4)


def outer(params: Any, meta: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.cos(network(params, meta, x))) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(meta))


def in_python(loss: Any, optimizer: Any, meta: Any, x: jax.Array, sample: Any, first_kept: int) -> jax.Array:
    """The outer loss after the same steps, written out for `jax.grad`."""
    held = jax.lax.stop_gradient(meta)
    params, state = meta["start"], optimizer(meta).init(meta["start"])
    for step in range(NUM_STEPS):
        if step == first_kept > 0:
            params, state = jax.lax.stop_gradient((params, state))
        batch = x if sample is None else sample(None, x, step)
        grads = jax.grad(loss)(params, meta if step >= first_kept else held, batch)
        updates, state = optimizer(meta).update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return outer(params, meta, x)


@pytest.mark.parametrize(
    "loss,optimizer,unroll,options,sample,dtype",
    [
        ("plain", "sgd", 1, {}, None, jnp.float32),
        ("plain", "adam", 1, {"checkpoint": True}, None, jnp.float64),
        ("stop_gradient", "sgd", 1, {}, minibatch, jnp.float64),
        ("stop_gradient", "adam", True, {"truncate": 3}, minibatch, jnp.float32),
        ("custom_vjp", "sgd", 1, {}, None, jnp.float64),
        ("custom_vjp", "clipped", 2, {"truncate": 4, "checkpoint": True}, minibatch, jnp.float64),
    ],
)
def test_the_derivative_of_the_steps_to_rounding(
    loss: str, optimizer: str, unroll: Any, options: Any, sample: Any, dtype: Any
) -> None:
    """Also where the Jacobian of the inner gradient is not symmetric, as products of a Hessian would take it to be."""
    problem = cm.BilevelProblem(LOSSES[loss], outer, lambda meta, x: meta["start"], sample=sample)
    solver = cm.OptaxDescent(OPTIMIZERS[optimizer], num_steps=NUM_STEPS, unroll=unroll)
    meta, x = meta_params(dtype), jnp.asarray(X, dtype)
    found = cm.BackpropThroughLearning(solver, **options).estimate(problem, meta, x).grad
    first_kept = NUM_STEPS - options.get("truncate", NUM_STEPS)
    expected = jax.jit(
        jax.grad(lambda meta: in_python(LOSSES[loss], OPTIMIZERS[optimizer], meta, x, sample, first_kept))
    )(meta)
    assert relative_error(found, expected) < ROUNDING[dtype]


def test_the_trajectory_is_kept_and_nothing_of_the_gradients() -> None:
    """A step more costs the memory of `params`, 24 numbers, whatever the data: 1,000 rows of activations here."""
    x = jnp.ones((1000, 5))
    problem = cm.BilevelProblem(plain, outer, lambda meta, x: meta["start"])
    meta = meta_params(jnp.float64)

    def temporary_bytes(num_steps: int, checkpoint: bool) -> int:
        solver = cm.OptaxDescent(OPTIMIZERS["sgd"], num_steps=num_steps)
        estimator = cm.BackpropThroughLearning(solver, checkpoint=checkpoint)
        run = jax.jit(lambda meta, x: estimator.estimate(problem, meta, x).grad)
        return run.lower(meta, x).compile().memory_analysis().temp_size_in_bytes

    params_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(meta["start"]))
    few, many = temporary_bytes(100, False), temporary_bytes(1_100, False)
    assert (many - few) / 1_000 < 3 * params_bytes
    few, many = temporary_bytes(100, True), temporary_bytes(10_000, True)
    assert (many - few) / (100 - 10) < 4 * params_bytes
