"""Errors come down through the feedback that was given, and a local rule hears those."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from contrastive_meta.problems import SplitData
from tests.local_networks import data, network, run_forwards, squared_error
from tests.oracles import relative_error


@pytest.mark.parametrize("with_gains", [False, True])
def test_feedback_alignment_with_the_weights_as_feedback_is_backprop(with_gains):
    params, (x, y) = network(0), data(2)
    feedback = {name: params[name]["kernel"] for name in ("hidden_1", "readout")}
    params = architectures.with_gains(params) if with_gains else params
    exact = jax.grad(lambda w: squared_error(architectures.mlp(w, x), y))(params)
    aligned = local_learners.FeedbackAlignment(feedback)
    assert relative_error(jax.grad(lambda w: squared_error(aligned.apply(w, x), y))(params), exact) < 1e-14


def test_feedback_alignment_is_the_published_update():
    params, (x, y) = network(0), data(2)
    feedback = local_learners.random_feedback(jax.random.key(3), params)
    network_ = local_learners.FeedbackAlignment(feedback)
    update = jax.grad(lambda w: jnp.sum(jnp.square(network_.apply(w, x) - y)) / 2)(params)
    h0, h1, out = (np.asarray(s) for s in run_forwards(params, x))
    error = out - np.asarray(y)
    d1 = (1 - h1**2) * (error @ np.asarray(feedback["readout"]).T)
    d0 = (1 - h0**2) * (d1 @ np.asarray(feedback["hidden_1"]).T)
    expected = {
        name: {"kernel": before.T @ d, "bias": d.sum(axis=0)}
        for name, before, d in (("hidden_0", np.asarray(x), d0), ("hidden_1", h0, d1), ("readout", h1, error))
    }
    assert relative_error(update, expected) < 1e-14
    np.testing.assert_array_equal(network_.apply(params, x), architectures.mlp(params, x))


def test_a_local_rule_hears_the_errors_that_feedback_delivers():
    network_ = architectures.with_gains(network(0))
    aligned = local_learners.FeedbackAlignment(local_learners.random_feedback(jax.random.key(5), network_))
    split = architectures.gain_modulation(aligned.apply, squared_error, network_)
    task = SplitData(*data(3), *data(4))
    params = split.problem.init_params(split.meta_params, task)
    at = split.problem, jax.tree.map(lambda x: 1.1 * x + 0.1, params), split.meta_params, task, 0.3
    heard, derived = split.rule.statistic(*at), cm.Autodiff().statistic(*at)
    assert relative_error(heard, derived) < 1e-13
    backprop = architectures.gain_modulation(architectures.mlp, squared_error, network_)
    assert relative_error(heard, backprop.rule.statistic(backprop.problem, *at[1:])) > 0.05
    cm.check_local(split.rule, split.problem, params, split.meta_params, task)  # or raises
