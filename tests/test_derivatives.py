"""What may be differentiated of an estimate, and the errors that refuse the rest: no silent zeros."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

PROBLEM = cm.BilevelProblem(
    lambda w, s, y: 0.5 * jnp.sum((w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(s) * w**2),
    lambda w, s, y: 0.5 * jnp.sum((w - 1.0) ** 2),
    lambda s, y: jnp.zeros_like(y),
)
LEARNER = cm.OptaxDescent(optax.sgd(0.4), num_steps=60)
IMPLICIT = cm.ImplicitDifferentiation(LEARNER)
ESTIMATORS = {
    "contrastive": cm.Contrastive(LEARNER),
    "implicit": IMPLICIT,
    "backprop": cm.BackpropThroughLearning(LEARNER),
    "finite differences": cm.FiniteDifference(LEARNER),
}
S, Y = jnp.array([0.0, 0.5]), jnp.array([3.0, 4.0])
REFUSED = "An estimate cannot be differentiated like this"


def by_hand(s: Any) -> Any:
    """At w = y / (1 + e^s)."""
    w = Y / (1 + jnp.exp(s))
    return 0.5 * jnp.sum((w - 1.0) ** 2)


def loss(s: Any, y: Any = Y, estimator: Any = IMPLICIT) -> Any:
    return estimator.estimate(PROBLEM, s, y).outer_loss


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_first_derivative_is_the_estimate_in_either_mode_and_under_every_transformation(name: str) -> None:
    def value(s: Any) -> Any:
        return loss(s, estimator=ESTIMATORS[name])

    def with_result(s: Any) -> Any:
        result = ESTIMATORS[name].estimate(PROBLEM, s, Y)
        return result.outer_loss, result

    wanted = jax.grad(by_hand)(S)
    grads = [
        jax.grad(value)(S),
        jax.jacfwd(value)(S),
        jax.jit(jax.grad(value))(S),
        jax.vmap(jax.grad(value))(jnp.stack([S, S]))[1],
        jax.lax.map(jax.grad(value), S[None])[0],
        jax.grad(lambda s: jax.lax.scan(lambda total, _: (total + value(s), None), 0.0, None, length=2)[0] / 2)(S),
        # The whole result beside it, of which nothing else is differentiated.
        jax.grad(with_result, has_aux=True)(S)[0],
    ]
    for grad in grads:
        np.testing.assert_allclose(grad, wanted, rtol=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_others_are_refused(name: str) -> None:
    estimator = ESTIMATORS[name]

    def result(s: Any, y: Any = Y) -> Any:
        return estimator.estimate(PROBLEM, s, y)

    def scaled(c: Any) -> Any:
        problem = cm.BilevelProblem(
            lambda w, s, y: c * PROBLEM.inner_loss(w, s, y), PROBLEM.outer_loss, PROBLEM.init_params
        )
        return estimator.estimate(problem, S, Y).outer_loss

    refused = {
        "hessian": lambda: jax.hessian(lambda s: result(s).outer_loss)(S),
        "reverse over reverse": lambda: jax.jacrev(jax.grad(lambda s: result(s).outer_loss))(S),
        "of the gradient": lambda: jax.grad(lambda s: jnp.linalg.norm(result(s).grad))(S),
        "of the solution": lambda: jax.grad(lambda s: jnp.sum(result(s).params))(S),
        "in the task": lambda: jax.grad(lambda y: result(S, y).outer_loss)(Y),
        "under jit and vmap": lambda: jax.jit(jax.vmap(jax.grad(lambda s: jnp.sum(result(s).grad))))(S[None]),
        "through descent": lambda: jax.grad(lambda s: jnp.sum(s - 0.1 * result(s).grad))(S),
    }
    if name != "contrastive":  # whose loops JAX itself refuses to reverse
        refused["in what a loss closes over"] = lambda: jax.grad(scaled)(1.0)
    for way, differentiate in refused.items():
        with pytest.raises(TypeError, match=REFUSED):
            differentiate()
            pytest.fail(f"{way}: no error")


def test_in_forward_mode_they_are_nan() -> None:
    assert np.all(np.isnan(jax.jacfwd(lambda s: IMPLICIT.estimate(PROBLEM, s, Y).grad)(S)))


def test_a_batch_of_tasks_is_no_way_around() -> None:
    evaluate = cm.value_and_meta_grad(PROBLEM, IMPLICIT)
    tasks = jnp.stack([Y, Y])
    np.testing.assert_allclose(jax.grad(lambda s: evaluate(s, tasks)[0])(S), jax.grad(by_hand)(S), rtol=1e-9)
    with pytest.raises(TypeError, match=REFUSED):
        jax.grad(lambda s: jnp.sum(evaluate(s, tasks)[1]))(S)
    with pytest.raises(TypeError, match=REFUSED):
        jax.hessian(lambda s: evaluate(s, tasks)[0])(S)


def test_what_is_stopped_at_the_door_is_a_constant() -> None:
    curvature = jax.hessian(lambda s: loss(jax.lax.stop_gradient(s)) + jnp.sum(s**2))(S)
    np.testing.assert_array_equal(curvature, 2 * np.eye(2))
