"""Every estimator takes every local learner, in any precision, and says what does not fit."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from contrastive_meta.problems import SplitData
from tests.local_networks import (
    LEARNER,
    LEARNERS,
    STRENGTH,
    as_published,
    data,
    network,
    small_split,
    small_task,
    spiking,
    squared_error,
)
from tests.oracles import cast, relative_error


def test_other_estimators_take_them_as_they_are():
    """Nobody knows what learns: the update is near a gradient, so all agree to about its distance from one."""
    split, task = small_split("equilibrium propagation"), small_task(3)
    at = split.problem, split.meta_params, task
    published = as_published(split, cm.central_difference(1e-3)).estimate(*at)
    default = cm.Contrastive(LEARNER, rule=split.rule, estimate_error=False).estimate(*at)
    implicit = cm.ImplicitDifferentiation(LEARNER, estimate_error=False).estimate(*at)
    backprop = cm.BackpropThroughLearning(LEARNER).estimate(*at)
    # The first two are contrasts and Hessians of the same update: truncation of the former, 7e-7, measured.
    assert relative_error(default.grad, published.grad) < 1e-5
    assert relative_error(implicit.grad, published.grad) < 1e-5
    # Backprop has the transpose of the update's Jacobian: 2e-3, by the square of the inner beta.
    assert relative_error(backprop.grad, published.grad) < 1e-2


def test_what_is_estimated_where_the_update_is_no_gradient():
    """The Jacobian of the update where the exact meta-gradient has its transpose."""
    split, task = small_split("feedback alignment"), small_task(3)
    result = as_published(split, cm.central_difference(1e-3)).estimate(split.problem, split.meta_params, task)
    at, flatten = jax.flatten_util.ravel_pytree(result.params)[0], jax.flatten_util.ravel_pytree
    unflatten = flatten(result.params)[1]

    def update(loss):
        return lambda flat: flatten(jax.grad(loss)(unflatten(flat), split.meta_params, task))[0]

    jacobian = jax.jacfwd(update(split.problem.inner_loss))(at)
    outer = update(split.problem.outer_loss)(at)
    stated, exact_form = (STRENGTH * np.linalg.solve(j, outer) for j in (jacobian, jacobian.T))
    got = flatten(result.grad)[0]
    assert relative_error(got, stated) < 1e-4
    assert relative_error(got, exact_form) > 0.02  # which the test can tell apart


def test_the_negative_nudge_is_not_dropped():
    """Earlier code dropped it and so got half of the forward estimate from the symmetric one."""
    split, task = small_split("predictive coding"), small_task(3)
    forward, central = (
        as_published(split, scheme).estimate(split.problem, split.meta_params, task).grad
        for scheme in (cm.forward_difference(1e-3), cm.central_difference(1e-3))
    )
    assert relative_error(forward, central) < 0.02


def test_a_batch_is_the_mean_and_phases_measure_where_they_ended():
    """Earlier code updated by the last task's gradient over the number of tasks, and measured before the last step."""
    split, tasks = small_split("feedback alignment"), [small_task(3), small_task(13)]
    estimator = as_published(split, cm.central_difference(1e-2))
    single = [estimator.estimate(split.problem, split.meta_params, task) for task in tasks]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    evaluate = jax.jit(cm.value_and_meta_grad(split.problem, estimator))
    value, grad = evaluate(split.meta_params, batch)
    assert relative_error(grad, jax.tree.map(lambda *g: sum(g) / 2, *(r.grad for r in single))) < 1e-10
    assert np.isclose(float(value), sum(float(r.outer_loss) for r in single) / 2, rtol=1e-12)

    # The contrast, phase by phase by hand, with the statistic at the very end of each.
    @jax.jit
    def end(beta, start):
        return LEARNER.solve(lambda w: split.problem.nudged(w, split.meta_params, tasks[0], beta), start).params

    free = end(0.0, split.meta_params["anchor"])
    plus, minus = end(1e-2, free), end(-1e-2, free)
    expected = jax.tree.map(lambda p, m: -STRENGTH * (p - m) / 2e-2, plus, minus)
    assert relative_error(single[0].grad["anchor"], expected) < 1e-8


@pytest.mark.parametrize("name", LEARNERS)
def test_float32_under_vmap_and_scan(name):
    split32, split = small_split(name, jnp.float32), small_split(name)
    task = small_task(3)

    @jax.jit
    def updates(params, tasks):
        one = lambda task: jax.grad(split.problem.inner_loss)(params, {"anchor": params}, task)  # noqa: E731
        return jax.vmap(one)(tasks), jax.lax.scan(lambda carry, task: (carry, one(task)), 0, tasks)[1]

    tasks = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), task)
    params = split.meta_params["anchor"]
    together, one_by_one = updates(params, tasks)
    alone = jax.grad(split.problem.inner_loss)(params, {"anchor": params}, task)
    for got in (together, one_by_one):
        assert relative_error(jax.tree.map(lambda g: g[0], got), alone) < 1e-12
    single = updates(*cast((params, tasks), jnp.float32))[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    # The contrast of equilibria divides their rounding, 1e-7, by its beta, 0.1.
    assert relative_error(single, together) < 1e-5
    assert {x.dtype for x in jax.tree.leaves(split32.meta_params)} == {jnp.dtype("float32")}


def test_what_does_not_fit_is_said_at_trace_time():
    params, (x, y) = network(0), data(2)
    hopfield, coding = local_learners.EquilibriumPropagation(), local_learners.PredictiveCoding()
    with pytest.raises(ValueError, match='each with "kernel" and "bias" and nothing else'):
        jax.eval_shape(hopfield.apply, architectures.with_gains(params), x)
    with pytest.raises(ValueError, match="hidden_0 follows on 2 units"):
        jax.eval_shape(coding.apply, params, y)
    feedback = local_learners.random_feedback(jax.random.key(0), params)
    with pytest.raises(ValueError, match="feedback for every layer but the first"):
        local_learners.FeedbackAlignment({"readout": feedback["readout"]}).apply(params, x)
    with pytest.raises(ValueError, match="feedback of readout must have the shape of its kernel"):
        local_learners.FeedbackAlignment({**feedback, "readout": feedback["readout"].T}).apply(params, x)
    weights, spikes, _ = spiking(1)
    with pytest.raises(ValueError, match="expected params of shapes"):
        local_learners.EProp().apply({**weights, "input": weights["input"].T}, spikes)
    with pytest.raises(ValueError, match="feedback of the shape of the readout"):
        local_learners.EProp(feedback=jnp.ones((2, 5))).apply(weights, spikes)
    with pytest.raises(TypeError, match="inputs of a floating dtype; got bool"):
        local_learners.EProp().apply(weights, spikes > 0)
    # A rule that listens hears nothing in a network that does not transmit, and is told so.
    split = architectures.fast_head(hopfield.apply, squared_error, params)
    at = split.problem, split.problem.init_params(split.meta_params, SplitData(x, y, x, y)), split.meta_params
    with pytest.raises(TypeError, match="hears only what goes through `transmit`"):
        split.rule.statistic(*at, SplitData(x, y, x, y), 0.1)
