"""Weight decay of any optimiser: right about the learner's own fixed point, or a failing status with a remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE

RANDOM = np.random.default_rng(0)
X, X_VAL = RANDOM.normal(size=(2, 30, 4))
WEIGHTS = np.array([2.0, -0.3, 0.2, -1.5])
Y, Y_VAL = X @ WEIGHTS + 0.3 * RANDOM.normal(size=30), X_VAL @ WEIGHTS
LOG_DECAY = jnp.array(-2.0)
STEPS = 1500
RATE = optax.cosine_decay_schedule(0.05, STEPS)


def inner(w: Any, s: Any, t: Any) -> Any:
    return jnp.mean((X @ w - Y) ** 2) / 2 + jnp.exp(s) * jnp.sum(w**2) / 2


def outer(w: Any, s: Any, t: Any) -> Any:
    return jnp.mean((X_VAL @ w - Y_VAL) ** 2) / 2


PROBLEM = cm.BilevelProblem(inner, outer, lambda s, t: jnp.zeros(4))


def exactly(decay: float) -> float:
    """At the minimum of the loss with decay |w|^2 / 2 added, in closed form."""

    def after_learning(s: Any) -> Any:
        hessian = X.T @ X / 30 + (jnp.exp(s) + decay) * jnp.eye(4)
        return outer(jnp.linalg.solve(hessian, X.T @ Y / 30), s, None)

    return float(jax.grad(after_learning)(LOG_DECAY))


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(RATE), pytest.param(optax.rmsprop(RATE), marks=pytest.mark.slow)],
    ids=["adam", "rmsprop"],
)
@pytest.mark.parametrize("kind", ["contrastive", "implicit"])
def test_decay_that_is_added_to_the_gradient(optimizer: Any, kind: str) -> None:
    solver = cm.OptaxDescent(optax.chain(optax.add_decayed_weights(0.1), optimizer), num_steps=STEPS)
    estimator: Any = cm.Contrastive(solver, ALONE) if kind == "contrastive" else cm.ImplicitDifferentiation(solver)
    result = estimator.estimate(PROBLEM, LOG_DECAY, None)
    assert result.grad == pytest.approx(exactly(0.1), rel=1e-8)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # The learner itself, 1500 steps of it, by central differences.
    differences = cm.FiniteDifference(solver).estimate(PROBLEM, LOG_DECAY, None)
    assert result.grad == pytest.approx(float(differences.grad), rel=1e-5)


def test_such_a_learner_stops_at_a_tolerance() -> None:
    """Where the gradient with the decay added vanishes, and the gradient does not."""
    solver = cm.OptaxDescent(optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.02)), tol=1e-4, max_steps=5000)
    solution = solver.solve(lambda w: inner(w, LOG_DECAY, None), jnp.zeros(4))
    assert solution.status == cm.Status.CONVERGED
    gradient = jax.grad(inner)(solution.params, LOG_DECAY, None)
    assert jnp.linalg.norm(gradient) > 0.1
    assert jnp.linalg.norm(gradient + 0.1 * solution.params) <= 1e-4


DECOUPLED = {
    "adamw": lambda decay: optax.adamw(RATE, weight_decay=decay),
    "lion": lambda decay: optax.lion(RATE, weight_decay=decay),
    "lamb": lambda decay: optax.lamb(RATE, weight_decay=decay),
}


@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("decay", [0.1, 1.0], ids=["inside the box", "at its edge"])
def test_decoupled_decay_is_never_silently_wrong(name: str, decay: float) -> None:
    """Inside the box |w| <= 1 / decay the minimum is that of the loss; at its edge it is another one."""
    solver = cm.OptaxDescent(DECOUPLED[name](decay), num_steps=STEPS)
    result = cm.ImplicitDifferentiation(solver).estimate(PROBLEM, LOG_DECAY, None)
    passes = bool(result.diagnostics.status <= cm.Status.APPROXIMATE)
    if decay == 1.0:
        assert not passes
    if passes:
        error = abs(float(result.grad) - exactly(0.0)) / abs(exactly(0.0))
        assert error <= max(3 * float(result.diagnostics.error_estimate), 1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_box_that_is_declared_makes_it_right(name: str) -> None:
    box = cm.prox.box(-1.0, 1.0)
    expected = cm.Contrastive(cm.ProximalDescent(box, tol=1e-12), ALONE).estimate(PROBLEM, LOG_DECAY, None)
    assert int(jnp.sum(jnp.abs(expected.params) == 1)) == 2
    solver = cm.OptaxDescent(DECOUPLED[name](1.0), num_steps=STEPS, penalty=box)
    result = cm.Contrastive(solver, ALONE).estimate(PROBLEM, LOG_DECAY, None)
    assert result.grad == pytest.approx(float(expected.grad), rel=1e-9)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # Without it the learner's own phases fail, and say so.
    undeclared = cm.OptaxDescent(DECOUPLED[name](1.0), num_steps=STEPS)
    alone = cm.Contrastive(undeclared, undeclared, cm.central_difference(0.01)).estimate(PROBLEM, LOG_DECAY, None)
    assert alone.diagnostics.status > cm.Status.APPROXIMATE


def test_decay_goes_with_complex_schemes() -> None:
    solver = cm.OptaxDescent(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), num_steps=800)
    result = cm.Contrastive(solver, ALONE, cm.complex_step()).estimate(PROBLEM, LOG_DECAY, None)
    assert result.grad == pytest.approx(exactly(0.1), rel=1e-12)
    assert result.diagnostics.status == cm.Status.CONVERGED


def test_a_penalty_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"`penalty` must be one such as `cm.prox.box.* got a float"):
        cm.OptaxDescent(optax.sgd(0.1), num_steps=1, penalty=0.1)  # type: ignore[arg-type]
