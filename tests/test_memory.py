"""Compiled temporary memory against the number of inner steps: constant for the contrast, linear for backprop."""

import jax
import jax.numpy as jnp
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import small_problem


def temporary_bytes(estimator):
    case = small_problem("logistic")

    def run(meta_params, task):
        return estimator.estimate(case.problem, meta_params, task).grad

    compiled = jax.jit(run).lower(case.meta_params, case.task).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def descent(num_steps):
    return cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=num_steps)


@pytest.mark.parametrize("scheme", [cm.relative(cm.central_difference), cm.four_point(1e-2)], ids=["default", "typed"])
@pytest.mark.parametrize("sequential", [False, True])
def test_contrast_needs_the_same_memory_for_any_number_of_steps(scheme, sequential):
    few, many = (
        temporary_bytes(cm.Contrastive(descent(n), scheme=scheme, sequential=sequential)) for n in (100, 100_000)
    )
    assert few == many > 0


def test_backprop_memory_grows_linearly_and_checkpoints_with_the_root():
    few, many = (temporary_bytes(cm.BackpropThroughLearning(descent(n))) for n in (1_000, 10_000))
    assert 9 < many / few < 11
    few, many = (temporary_bytes(cm.BackpropThroughLearning(descent(n), checkpoint=True)) for n in (1_000, 10_000))
    assert 2 < many / few < 5


def test_truncation_and_forward_mode_do_not_grow():
    for build in (
        lambda n: cm.BackpropThroughLearning(descent(n), truncate=20),
        lambda n: cm.BackpropThroughLearning(descent(n), forward_mode=True),
    ):
        few, many = temporary_bytes(build(1_000)), temporary_bytes(build(10_000))
        assert few == many > 0


def test_batch_size_bounds_memory():
    case = small_problem("logistic")
    # Many of them, beside whom the one task that may fall back alone needs little.
    tasks = jax.tree.map(lambda x: jnp.stack([x] * 64), case.task)

    def bytes_with(batch_size):
        run = jax.jit(cm.value_and_meta_grad(case.problem, cm.Contrastive(descent(10)), batch_size=batch_size))
        return run.lower(case.meta_params, tasks).compile().memory_analysis().temp_size_in_bytes

    assert bytes_with(2) < 0.25 * bytes_with(None)
