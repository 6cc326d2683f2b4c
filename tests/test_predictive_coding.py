"""Predictive coding descends its energy, and becomes backprop as precision vanishes."""

import jax
import jax.flatten_util
import jax.numpy as jnp

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from tests.local_networks import (
    SMALL,
    STRENGTH,
    as_published,
    cross_entropy,
    data,
    network,
    run_forwards,
    slope,
    small_task,
    squared_error,
)
from tests.oracles import relative_error


def test_predictive_coding_becomes_backprop():
    params, (x, y) = network(0), data(2)
    exact = jax.grad(lambda w: cross_entropy(architectures.mlp(w, x), y))(params)

    def learner(precision):
        return local_learners.PredictiveCoding(precision, local_learners.Relaxation(0.3, 200))

    order, errors = slope(learner, cross_entropy, exact, x, y, params, (2e-3, 1e-3))
    # The next term is of order 2, and the squared norm of the layers' Jacobians is of order 1.
    assert abs(order - 1) < 0.02 and errors[1] < 5e-3
    assert slope(learner, cross_entropy, exact, x, y, params, (1e-4, 1e-6))[1][1] < 5e-6


def test_predictive_coding_with_clamped_targets_descends_its_energy():
    """With the squared error and precision 1 the update is the gradient of min_s F, by finite differences of that."""
    params, (x, y) = network(0), data(2)
    learner = local_learners.PredictiveCoding(relaxation=local_learners.Relaxation(0.3, 300))

    @jax.jit
    def free_energy(w):
        free = jax.lax.stop_gradient(learner.settle(w, x, run_forwards(w, x), y))
        return learner.energy(w, x, free)

    update = jax.grad(lambda w: jnp.sum(jnp.square(learner.apply(w, x) - y)) / 2)(params)
    direction = network(7)
    steps = [jax.tree.map(lambda w, d, by=by: w + by * d, params, direction) for by in (1e-5, -1e-5)]
    difference = float(free_energy(steps[0]) - free_energy(steps[1])) / 2e-5
    predicted = sum(jnp.vdot(u, d) for u, d in zip(jax.tree.leaves(update), jax.tree.leaves(direction), strict=True))
    # 1e-10 of truncation and 1e-11 of rounding over the step; backprop's is off by 40 %.
    assert abs(difference / float(predicted) - 1) < 1e-7
    backprop = jax.grad(lambda w: jnp.sum(jnp.square(architectures.mlp(w, x) - y)) / 2)(params)
    assert relative_error(update, backprop) > 0.05


def test_a_relaxation_that_runs_away_is_a_status():
    params, task = network(0, SMALL), small_task(3)
    wild = local_learners.PredictiveCoding(1.0, local_learners.Relaxation(step_size=50.0, num_steps=400))
    split = architectures.learned_initialisation(wild.apply, squared_error, params, STRENGTH)
    result = as_published(split, cm.central_difference(1e-2)).estimate(split.problem, split.meta_params, task)
    assert int(result.diagnostics.status) >= cm.Status.DIVERGED
