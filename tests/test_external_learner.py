"""Learners that take no loss: free phase only, in `argmin` and in estimators, without harm to the program around."""

import functools
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import contrastive_meta as cm
from tests.oracles import ALONE, finite_difference_meta_gradient

# --- scikit-learn ---


def logistic_loss(params: Any, log_decay: Any, task: Any) -> Any:
    """What scikit-learn minimises, times exp(log_decay): it counts the penalty once and the intercept not at all."""
    margins = task["sign"] * (task["x"] @ params["w"] + params["b"])
    return jnp.sum(jnp.logaddexp(0.0, -margins)) + 0.5 * jnp.exp(log_decay) * jnp.sum(params["w"] ** 2)


def fit(log_decay: Any, task: Any) -> Any:
    model = LogisticRegression(C=float(np.exp(-log_decay)), tol=1e-12, max_iter=10_000)
    model.fit(task["x"], task["sign"])
    return {"w": model.coef_[0], "b": model.intercept_[0]}


def validation_loss(params: Any, log_decay: Any, task: Any) -> Any:
    margins = task["sign_val"] * (task["x_val"] @ params["w"] + params["b"])
    return jnp.mean(jnp.logaddexp(0.0, -margins))


def begin(log_decay: Any, task: Any) -> Any:
    return {"w": jnp.zeros(4, task["x"].dtype), "b": jnp.zeros((), task["x"].dtype)}


@functools.cache
def classification() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 40, 4))
    sign = np.where(x @ np.array([2.0, -1.0, 0.5, 0.0]) + rng.normal(size=(2, 40)) > 0, 1.0, -1.0)
    return dict(zip(("x", "x_val", "sign", "sign_val"), map(jnp.asarray, (*x, *sign)), strict=True))


PROBLEM = cm.BilevelProblem(logistic_loss, validation_loss, begin)
LOG_DECAY = jnp.array(0.5)


@functools.cache
def exactly() -> float:
    return float(finite_difference_meta_gradient(PROBLEM, LOG_DECAY, classification()))


def test_a_fitted_model_is_differentiated_through() -> None:
    task = classification()
    adjoint = cm.ContrastiveAdjoint(ALONE)
    solve = cm.argmin(logistic_loss, cm.ExternalLearner(fit), init=begin, adjoint=adjoint, has_aux=True)

    def value(log_decay: Any) -> Any:
        phi, diagnostics = solve(log_decay, task)
        return validation_loss(phi, log_decay, task), diagnostics

    got, diagnostics = jax.jit(jax.grad(value, has_aux=True))(LOG_DECAY)
    assert got == pytest.approx(exactly(), rel=1e-6)
    # It is the model's own solution that is differentiated at, and a minimum of the loss written here.
    assert diagnostics.free_residual < 1e-4

    batch = jax.jit(jax.vmap(jax.grad(value, has_aux=True)))(jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(batch[0], exactly(), rtol=1e-6)


@pytest.mark.parametrize(
    "estimator",
    [cm.Contrastive(cm.ExternalLearner(fit)), cm.ImplicitDifferentiation(cm.ExternalLearner(fit))],
    ids=["contrastive", "implicit"],
)
def test_estimators_take_it(estimator: cm.MetaGradientEstimator) -> None:
    result = estimator.estimate(PROBLEM, LOG_DECAY, classification())
    cm.raise_if_failed(result)
    assert result.grad == pytest.approx(exactly(), rel=1e-5)


# --- Any function ---


def quadratic(w: Any, decay: Any, task: Any) -> Any:
    """Its minimum is y / (1 + decay)."""
    return jnp.sum((w - task["y"]) ** 2) + decay * jnp.sum(w**2)


TASK = {"y": jnp.array([4.0, 1.0]), "n": jnp.array(3), "key": jax.random.key(7)}
V = jnp.array([1.0, -2.0])


def value_of(learner: cm.ExternalLearner, decay: Any, task: Any, **options: Any) -> Any:
    solve = cm.argmin(
        quadratic, learner, init=lambda decay, task: jnp.zeros_like(task["y"]),
        adjoint=cm.ImplicitAdjoint(cm.DenseInverse()), **options,
    )  # fmt: skip
    return jnp.vdot(V, solve(decay, task))


def test_it_is_given_everything_as_numpy_and_answers_in_the_dtype_of_the_start() -> None:
    seen: list[Any] = []

    def learn(decay: Any, task: Any) -> Any:
        seen.append((decay, task))
        return np.float64(task["y"]) / (1 + decay)

    task = {**TASK, "y": TASK["y"].astype(jnp.float32)}
    got = jax.jit(jax.grad(functools.partial(value_of, cm.ExternalLearner(learn))))(jnp.float32(1.0), task)
    assert got.dtype == jnp.float32
    assert got == pytest.approx(float(-jnp.vdot(V, TASK["y"]) / 4), rel=1e-5)
    ((decay, given),) = seen
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((decay, given)))
    np.testing.assert_array_equal(given["key"], jax.random.key_data(TASK["key"]))
    assert (given["n"], given["y"].dtype) == (3, np.float32)


def test_a_traced_one_runs_no_host_code() -> None:
    learner = cm.ExternalLearner(lambda decay, task: task["y"] / (1 + decay), host=False)
    program = jax.jit(jax.grad(functools.partial(value_of, learner)))
    assert "callback" not in program.lower(jnp.array(1.0), TASK).as_text()
    assert program(jnp.array(1.0), TASK) == pytest.approx(float(-jnp.vdot(V, TASK["y"]) / 4), rel=1e-10)


def test_what_is_no_minimum_is_a_failure() -> None:
    learner = cm.ExternalLearner(lambda decay, task: task["y"], host=False)
    assert jnp.isnan(jax.grad(functools.partial(value_of, learner))(jnp.array(1.0), TASK))
    strict = cm.ExternalLearner(lambda decay, task: task["y"] / (1 + decay) + 1e-6, host=False, tol=1e-8)
    init = {"init": jnp.zeros(2)}
    _, diagnostics = cm.argmin(quadratic, strict, **init, has_aux=True)(jnp.array(1.0), TASK)
    assert diagnostics.status == cm.Status.FREE_NOT_CONVERGED
    _, diagnostics = cm.argmin(quadratic, cm.ExternalLearner(strict.fn, host=False), **init, has_aux=True)(1.0, TASK)
    assert diagnostics.status == cm.Status.CONVERGED


def test_asked_to_minimise_a_loss_it_says_what_to_do() -> None:
    learner = cm.ExternalLearner(fit)
    with pytest.raises(TypeError, match=r"cannot minimise a loss it is given.*leave `nudged_solver` out"):
        cm.Contrastive(cm.LBFGS(), nudged_solver=learner).estimate(PROBLEM, LOG_DECAY, classification())
    with pytest.raises(TypeError, match="cannot be differentiated in reverse"):
        cm.BackpropThroughLearning(learner).estimate(PROBLEM, LOG_DECAY, classification())
    sampled = cm.BilevelProblem(logistic_loss, validation_loss, begin, sample=lambda key, task, step: task)
    with pytest.raises(TypeError, match="Problems with `sample` need a `nudged_solver`"):
        cm.Contrastive(learner).estimate(sampled, LOG_DECAY, classification())


def test_another_structure_is_an_error_on_the_host_and_in_jax() -> None:
    def wrong(decay: Any, task: Any) -> Any:
        return {"w": task["y"]}

    with pytest.raises(ValueError, match="ExternalLearner: what `wrong` returned"):
        value_of(cm.ExternalLearner(wrong, host=False), jnp.array(1.0), TASK)
    with pytest.raises(Exception, match="ExternalLearner: `wrong` returned"):
        jax.block_until_ready(value_of(cm.ExternalLearner(wrong), jnp.array(1.0), TASK))


# --- Few cores ---

ON_ONE_CORE = """
    import os
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    import jax
    import jax.numpy as jnp
    import numpy as np
    import contrastive_meta as cm

    # 1.6 MB a lane, still being computed when the solve is called: jaxlib would copy it on the pool's only thread.
    def loss(w, decay, y):
        return jnp.sum((w - y) ** 2) + decay * jnp.sum(w**2)

    learner = cm.ExternalLearner(lambda decay, y: y / (1 + decay))
    adjoint = cm.ImplicitAdjoint()
    solve = cm.argmin(loss, learner, init=lambda decay, y: jnp.zeros_like(y), adjoint=adjoint)
    each = jax.jit(jax.vmap(jax.grad(lambda decay, y: jnp.mean(solve(decay, y))), in_axes=(None, 0)))
    ones = jnp.ones((2, 400_000))
    for step, got in enumerate([each(1.0, jnp.cos(ones * step)) for step in range(4)]):
        np.testing.assert_allclose(got, -np.cos(step) / 4, rtol=1e-4)
    print("done")
"""


def test_one_core_does_not_hang() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(ON_ONE_CORE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "done", done.stderr
