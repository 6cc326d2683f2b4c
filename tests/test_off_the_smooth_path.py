"""Off the smooth, converged path: kinks, detached factors, learning that has not ended, each right or flagged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

A, B = jnp.array([[1.0, 0.6], [0.6, 1.0]]), jnp.array([1.5, 0.8])


def kinked():
    """A lasso in two unknowns: at strength 0.5 the second one is 0, where the penalty has a kink."""

    def inner(w, s, task):
        return 0.5 * w @ A @ w - B @ w + s * jnp.sum(jnp.abs(w))

    def outer(w, s, task):
        return 0.5 * jnp.sum((w - 3.0) ** 2)

    return cm.BilevelProblem(inner, outer, lambda s, task: jnp.array([0.7, 0.3]))


@pytest.mark.parametrize(
    "learner",
    [
        cm.LBFGS(tol=1e-6, max_steps=200),
        cm.OptaxDescent(optax.adam(0.01), num_steps=2000),
        cm.OptaxDescent(optax.sgd(0.1), num_steps=500),
        cm.ScipyMinimize(),
    ],
    ids=["L-BFGS", "Adam", "descent", "SciPy"],
)
@pytest.mark.parametrize("make", [cm.Contrastive, cm.ImplicitDifferentiation], ids=["contrast", "implicit"])
def test_a_kink_is_not_taken_for_rounding_noise(learner, make):
    """Right is 2, since w = (1.5 - s, 0) near s = 0.5."""
    result = make(learner).estimate(kinked(), jnp.asarray(0.5), None)
    told = result.diagnostics
    assert told.status > cm.Status.TARGET_NOT_REACHED
    assert abs(float(result.grad) - 2.0) <= 3 * 2.0 * float(told.error_estimate)


def test_a_solution_at_a_kink_is_said_to_be_one():
    result = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e-6, max_steps=200)).estimate(kinked(), jnp.asarray(0.5), None)
    assert result.diagnostics.status == cm.Status.NOT_SMOOTH
    assert np.isinf(result.diagnostics.error_estimate)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_small_jumps_of_rectifiers_are_smooth_enough(dtype):
    """A hinge in one of 200 examples, at the solution: its jump is 1/200 of the others' slope."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (200, 3), dtype)
    target = jnp.array([1.0, -2.0, 0.5], dtype)

    def inner(w, s, task):
        at_solution = jnp.maximum(w[0] - jax.lax.stop_gradient(w[0]), 0) / 2000
        return jnp.mean((x @ (w - target)) ** 2) + jnp.exp(s) * jnp.sum(w**2) + at_solution

    def outer(w, s, task):
        return jnp.sum((w - 1.0) ** 2)

    problem = cm.BilevelProblem(inner, outer, lambda s, task: jnp.zeros(3, dtype))
    result = cm.ImplicitDifferentiation(cm.LBFGS()).estimate(problem, jnp.asarray(-2.0, dtype), None)
    assert result.diagnostics.status != cm.Status.NOT_SMOOTH


def weighted(stop):
    """A regression whose weights depend on the losses, and on the meta-parameters."""
    x, x_val = jax.random.normal(jax.random.key(0), (2, 60, 4))
    truth = jnp.array([2.0, -1.0, 0.0, 1.0])
    y, y_val = x @ truth + jax.random.normal(jax.random.key(1), (60,)), x_val @ truth

    def inner(w, s, task):
        losses = (x @ w - y) ** 2
        weights = jax.nn.sigmoid(s[0] - jnp.exp(s[1]) * stop(losses))
        return jnp.mean(weights * losses) + 0.01 * jnp.sum(w**2)

    return cm.BilevelProblem(inner, lambda w, s, task: jnp.mean((x_val @ w - y_val) ** 2), lambda s, task: jnp.zeros(4))


ESTIMATORS = {
    "contrast": cm.Contrastive(cm.LBFGS()),
    "implicit": cm.ImplicitDifferentiation(cm.LBFGS()),
    "backprop": cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.1), num_steps=100)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_detached_factor_is_found(estimator):
    s = jnp.array([1.0, -2.0])
    result = estimator.estimate(weighted(jax.lax.stop_gradient), s, None)
    assert result.diagnostics.status == cm.Status.INCONSISTENT_GRADIENT
    assert not float(result.diagnostics.error_estimate) < np.inf
    whole = estimator.estimate(weighted(lambda x: x), s, None)
    assert whole.diagnostics.status == cm.Status.CONVERGED


@jax.custom_vjp
def through(x):
    """Rounded, with the derivative of what is not."""
    return jnp.round(4 * x) / 4


through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))


@jax.custom_jvp
def squared(x):
    """x^2, with its right derivative."""
    return x**2


squared.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0]))


def shifted_log_sum(z):
    """Without the overflow: the detached maximum cancels."""
    largest = jax.lax.stop_gradient(jnp.max(z))
    return jnp.log(jnp.sum(jnp.exp(z - largest))) + largest


@pytest.mark.parametrize(
    ("rule", "consistent"),
    [
        (lambda w, s: jnp.sum((w - jax.lax.stop_gradient(s)) ** 2), False),
        (lambda w, s: jnp.sum((w - through(s)) ** 2), False),
        (lambda w, s: shifted_log_sum(w * s) + jnp.sum(w**2), True),
        (lambda w, s: jax.nn.logsumexp(w * s) + jnp.sum(optax.huber_loss(w)), True),
        (lambda w, s: jnp.sum(squared(w - s)), True),
    ],
    ids=["only behind stop_gradient", "straight-through", "shifted", "library", "own rule"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_what_is_detached_matters_if_the_gradient_changes(rule, consistent, dtype):
    problem = cm.BilevelProblem(
        lambda w, s, task: rule(w, s), lambda w, s, task: jnp.sum((w - 2.0) ** 2), lambda s, task: jnp.zeros(3, dtype)
    )
    result = ESTIMATORS["implicit"].estimate(problem, jnp.array([0.6, -0.9, 0.4], dtype), None)
    assert (result.diagnostics.status != cm.Status.INCONSISTENT_GRADIENT) == consistent


RIDGE_X = jax.random.normal(jax.random.key(0), (30, 4)) * jnp.array([1.0, 3.0, 10.0, 30.0])
RIDGE_Y = RIDGE_X @ jnp.array([2.0, -1.0, 0.5, 0.1])


@pytest.mark.parametrize("adjoint", [cm.ContrastiveAdjoint(), cm.ImplicitAdjoint()], ids=["contrast", "implicit"])
@pytest.mark.parametrize(("num_steps", "ended"), [(1, False), (5, False), (60, True)])
def test_a_cotangent_taken_where_learning_had_not_ended_is_nan(adjoint, num_steps, ended):
    def ridge(w, s, task):
        return jnp.mean((RIDGE_X @ w - RIDGE_Y) ** 2) + jnp.exp(s) * jnp.sum(w**2)

    def loss_at(w):
        return jnp.sum((w - 1.0) ** 2)

    solve = cm.argmin(ridge, cm.LBFGS(max_steps=num_steps), init=jnp.zeros(4), adjoint=adjoint)
    grad = jax.grad(lambda s: loss_at(solve(s, None)))(-2.0)
    gram = RIDGE_X.T @ RIDGE_X / 30

    def exact(s):
        return loss_at(jnp.linalg.solve(gram + jnp.exp(s) * jnp.eye(4), RIDGE_X.T @ RIDGE_Y / 30))

    if ended:
        np.testing.assert_allclose(grad, jax.grad(exact)(-2.0), rtol=1e-5)
    else:
        assert np.isnan(grad)


def test_the_callback_is_told_of_learning_that_had_not_ended():
    seen = []
    solve = cm.argmin(
        lambda w, s, task: jnp.mean((RIDGE_X @ w - RIDGE_Y) ** 2) + jnp.exp(s) * jnp.sum(w**2),
        cm.LBFGS(max_steps=1),
        init=jnp.zeros(4),
        on_failure=lambda told: seen.append(int(told.status)),
    )
    jax.block_until_ready(jax.grad(lambda s: jnp.sum(solve(s, None)))(-2.0))
    jax.effects_barrier()
    assert seen == [cm.Status.FREE_NOT_CONVERGED]
