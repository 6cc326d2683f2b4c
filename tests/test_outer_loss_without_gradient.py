"""An outer loss that no gradient of `params` reaches: said in words, where zeros were returned without any."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

LEARNER = cm.OptaxDescent(optax.sgd(0.4), num_steps=60)
ESTIMATORS = {
    "contrastive": cm.Contrastive(LEARNER, cm.NewtonKrylov(fall_back=False)),
    "implicit": cm.ImplicitDifferentiation(LEARNER),
    "backprop": cm.BackpropThroughLearning(LEARNER),
}
VALUES = {
    "finite differences": cm.FiniteDifference(LEARNER, step=0.5),
    "evolution strategies": cm.EvolutionStrategies(LEARNER, num_pairs=2),
    "forward mode": cm.BackpropThroughLearning(LEARNER, forward_mode=True),
}
S, Y = jnp.array([0.0, 0.5]), jnp.array([3.0, 4.0])
FLAT = {
    "error rate": lambda w, s, y: jnp.mean((w > y / 2).astype(w.dtype)),
    "stop_gradient": lambda w, s, y: jnp.sum(jax.lax.stop_gradient(w) ** 2),
    "rounding": lambda w, s, y: jnp.sum(jnp.round(w)),
    "class": lambda w, s, y: (jnp.argmax(w) == 0).astype(w.dtype) + jnp.sum(s**2),
    "nothing learned": lambda w, s, y: jnp.sum(s**2),
    "inside jit": jax.jit(lambda w, s, y: jnp.mean(jnp.sign(w - 1.0))),
}
STEEP = {
    "smooth": lambda w, s, y: jnp.sum((w - 1.0) ** 2),
    "in one entry, behind a branch": lambda w, s, y: jax.lax.cond(w[0] > 0, lambda: w[1], lambda: -w[1]),
    "in a loop": lambda w, s, y: jax.lax.fori_loop(0, 2, lambda _, at: at / 2, w)[0],
    "hinge": lambda w, s, y: jnp.sum(jnp.maximum(w - 1.0, 0.0)),
    "straight-through": lambda w, s, y: jnp.sum(w + jax.lax.stop_gradient(jnp.round(w) - w)),
    "custom rule": lambda w, s, y: jnp.sum(jax.nn.relu(w)),
}


def problem_of(outer: Any) -> cm.BilevelProblem:
    return cm.BilevelProblem(
        lambda w, s, y: 0.5 * jnp.sum((w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(s) * w**2),
        outer,
        lambda s, y: jnp.zeros_like(y),
    )


def traced(estimator: Any, outer: Any) -> Any:
    return jax.eval_shape(lambda s: estimator.estimate(problem_of(outer), s, Y).grad, S)


@pytest.mark.parametrize("outer", FLAT.values(), ids=FLAT)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_it_warns(estimator: Any, outer: Any) -> None:
    with pytest.warns(UserWarning, match=r"No gradient of the outer loss reaches `params`.*FiniteDifference"):
        traced(estimator, outer)


@pytest.mark.parametrize("outer", STEEP.values(), ids=STEEP)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_it_is_silent_where_there_is_a_gradient(estimator: Any, outer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(estimator, outer)


@pytest.mark.parametrize("estimator", VALUES.values(), ids=VALUES)
def test_it_is_silent_where_values_are_compared(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(estimator, FLAT["error rate"])


def test_batches_and_optimisers_warn_as_well_and_the_direct_term_is_right() -> None:
    problem, tasks = problem_of(FLAT["nothing learned"]), jnp.stack([Y, Y])
    with pytest.warns(UserWarning, match="No gradient of the outer loss reaches"):
        _, grad = cm.value_and_meta_grad(problem, ESTIMATORS["implicit"])(S, tasks)
    np.testing.assert_allclose(grad, 2 * S)
    # What is compiled already is not traced again.
    tx = cm.meta_optimizer(optax.sgd(0.1), problem_of(FLAT["class"]), ESTIMATORS["implicit"])
    with pytest.warns(UserWarning, match="No gradient of the outer loss reaches"):
        jax.eval_shape(lambda s: tx.update(None, tx.init(s), s, tasks=tasks), S)
