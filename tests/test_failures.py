"""Failures provoked one by one: each is told, and none spoils what is beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import relative_error, small_problem

NESTEROV = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=300)
NUDGED = [None, NESTEROV]


def right_or_told(result, exact, within=1e-2):
    """A status, or an error that is small and known."""
    error = relative_error(result.grad, exact)
    told = result.diagnostics.status >= cm.Status.TARGET_NOT_REACHED
    return bool(told) or (error < within and error < 10 * float(result.diagnostics.error_estimate) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("nudged", NUDGED, ids=["fast", "run again"])
def test_ridge_of_condition_1e8(nudged, dtype):
    """Curvatures from 1e-8 to 1, the outer gradient along all of them."""
    curvatures = jnp.logspace(-8, 0, 9, dtype=dtype)
    problem = cm.BilevelProblem(
        lambda w, theta, task: jnp.sum(curvatures * (w - theta) ** 2) / 2,
        lambda w, theta, task: jnp.sum((w - 2.0) ** 2) / 2,
        lambda theta, task: theta,
    )
    theta = jnp.ones(9, dtype)
    result = cm.Contrastive(NESTEROV, nudged).estimate(problem, theta, None)
    # dphi/dtheta is the identity, whatever the curvature.
    assert right_or_told(result, theta - 2.0)
    if nudged is None and dtype == jnp.float64:
        assert relative_error(result.grad, theta - 2.0) < 1e-6


@pytest.mark.parametrize("nudged", NUDGED, ids=["fast", "run again"])
def test_relu_networks_at_kinks(nudged):
    """Units whose input is zero for a training point: on one side of the kink the Hessian is another."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((20, 3))), jnp.asarray(rng.standard_normal(20))

    def predict(params, inputs):
        return jax.nn.relu(inputs @ params["first"]) @ params["last"]

    problem = cm.BilevelProblem(
        lambda params, theta, task: (
            jnp.mean((predict(params, x) - y) ** 2)
            + jnp.exp(theta) * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        ),
        lambda params, theta, task: jnp.mean((predict(params, x[::-1] + 0.1) - y) ** 2),
        lambda theta, task: {"first": task, "last": jnp.ones(8)},
    )
    estimator = cm.Contrastive(NESTEROV, nudged)
    learned = cm.OptaxDescent(optax.sgd(0.05, momentum=0.9), num_steps=2000)
    estimate = jax.jit(lambda theta, task: estimator.estimate(problem, theta, task))
    exact = jax.jit(
        lambda theta, params: (
            cm.ImplicitDifferentiation(learned, cm.DenseInverse())
            .estimate(
                cm.BilevelProblem(problem.inner_loss, problem.outer_loss, lambda theta, task: task), theta, params
            )
            .grad
        )
    )
    theta = jnp.asarray(-3.0)
    for seed in range(4):
        task = jax.random.normal(jax.random.key(seed), (3, 8)).at[:, 0].set(0.0)
        result = estimate(theta, task)
        assert right_or_told(result, exact(theta, result.params), within=0.05), (seed, result.diagnostics)


def test_a_task_that_diverges_leaves_the_others_as_they_are():
    """Curvature 40 is too much for the learning rate; the tasks beside it learn."""
    problem = cm.BilevelProblem(
        lambda w, theta, curvature: curvature * jnp.sum((w - theta) ** 2) / 2,
        lambda w, theta, curvature: jnp.sum((w - 2.0) ** 2) / 2,
        lambda theta, curvature: jnp.zeros(3),
    )
    estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.1), num_steps=400))
    estimate = jax.jit(jax.vmap(lambda theta, task: estimator.estimate(problem, theta, task), in_axes=(None, 0)))
    theta = jnp.array([1.0, 0.5, -1.0])
    alone = estimate(theta, jnp.array([1.0, 4.0, 2.0]))
    beside = estimate(theta, jnp.array([1.0, 40.0, 2.0]))
    assert beside.diagnostics.status[1] >= cm.Status.DIVERGED
    for k in (0, 2):
        assert beside.diagnostics.status[k] == cm.Status.CONVERGED
        np.testing.assert_allclose(beside.grad[k], alone.grad[k], rtol=1e-12)
        np.testing.assert_allclose(beside.grad[k], theta - 2.0, rtol=1e-8)


@pytest.mark.parametrize("target", [None, 1e-3])
@pytest.mark.parametrize("nudged", NUDGED, ids=["fast", "run again"])
def test_three_steps_of_learning(nudged, target):
    case = small_problem("logistic")
    three = cm.OptaxDescent(optax.sgd(0.1), num_steps=3)
    result = cm.Contrastive(three, nudged, target_error=target).estimate(*case[1:4])
    assert right_or_told(result, case.exact.grad, within=2e-3)


@pytest.mark.parametrize("nudged", NUDGED, ids=["fast", "run again"])
def test_a_target_is_no_shield_from_broken_data(nudged):
    problem = cm.BilevelProblem(
        lambda w, theta, task: jnp.sum((w - theta * task) ** 2),
        lambda w, theta, task: jnp.sum(w**2),
        lambda theta, task: jnp.zeros(2),
    )
    estimator = cm.Contrastive(NESTEROV, nudged, target_error=1e-3)
    for value in (jnp.nan, jnp.inf):
        result = estimator.estimate(problem, jnp.ones(2), jnp.array([1.0, value]))
        assert result.diagnostics.status >= cm.Status.DIVERGED
