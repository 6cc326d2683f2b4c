"""Short phases against the long run: derivatives at each horizon, their signs, and lengths that do not matter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

# Two weights, one that is learned in a few steps and one that takes hundreds. At w = 0.6 on its way to 1 and 3, decay
# hurts the first, whose target it shrinks away from, and would help the second, which is to end at 1.
RATES = jnp.array([1.0, 0.01])
ENDS = jnp.array([1.0, 3.0])
TARGETS = jnp.array([1.0, 1.0])
WEIGHTS = jnp.array([0.02, 1.0])


def inner(w: Any, log_decay: Any, task: Any) -> Any:
    return 0.5 * jnp.sum(RATES * ((w - ENDS) ** 2 + jnp.exp(log_decay) * w**2))


def outer(w: Any, log_decay: Any, task: Any) -> Any:
    return 0.5 * jnp.sum(WEIGHTS * (w - TARGETS) ** 2)


PROBLEM = cm.BilevelProblem(inner, outer, lambda s, t: jnp.zeros(2))
START = jnp.array([0.6, 0.6])
TASKS = jnp.zeros((3, 1))


def after(log_decay: float, steps: int) -> float:
    """The outer loss after steps of length 0.5, in NumPy."""
    w = np.asarray(START, np.float64)
    for _ in range(steps):
        w = w - 0.5 * np.asarray(RATES) * ((w - np.asarray(ENDS)) + np.exp(log_decay) * w)
    return float(0.5 * np.sum(np.asarray(WEIGHTS) * (w - np.asarray(TARGETS)) ** 2))


@pytest.fixture(scope="module")
def report() -> cm.HorizonReport:
    return cm.check_horizon(PROBLEM, optax.sgd(0.5), START, jnp.array(-1.0), TASKS, horizons=(5, 50, 500), step=1e-3)


def test_the_derivatives_are_those_of_the_run(report: cm.HorizonReport) -> None:
    (row,) = report.rows
    # The direction is that of the meta-gradient, whose sign `now` leaves out.
    sign = np.sign(after(-1 + 1e-6, 5) - after(-1 - 1e-6, 5))
    expected = [sign * (after(-1 + 1e-5, n) - after(-1 - 1e-5, n)) / 2e-5 for n in (5, 50, 500)]
    np.testing.assert_allclose(row.later, expected, rtol=1e-3)
    assert all(error < 1e-2 * abs(slope) for error, slope in zip(row.errors, row.later, strict=True))


def test_a_short_phase_that_points_the_wrong_way_is_said_to(report: cm.HorizonReport) -> None:
    (row,) = report.rows
    assert row.now > 0 and row.wrong_from is not None and not report.agree
    assert "points the wrong way" in str(report) and max(map(len, str(report).splitlines())) <= 120


def test_where_learning_has_ended_the_sign_is_the_long_runs() -> None:
    end = ENDS / (1 + jnp.exp(-1.0))
    mode = cm.Alternating(cm.NewtonKrylov(), scheme=cm.central_difference)
    found = cm.check_horizon(
        PROBLEM, optax.sgd(0.5), end, jnp.array(-1.0), TASKS, mode=mode, horizons=(2000,), num_averaged=1
    )
    (row,) = found.rows
    assert found.agree
    np.testing.assert_allclose(row.now, row.later[0], rtol=1e-3)
    assert "has the sign of the long run" in str(found)


def normalised(params: Any, meta_params: Any, task: Any) -> Any:
    x, y = task
    hidden = x @ params["before"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
    return jnp.mean((jnp.tanh(hidden) @ params["after"] - y) ** 2)


def test_weights_before_a_normalisation_are_named_and_no_others() -> None:
    keys = jax.random.split(jax.random.key(1), 4)
    x, y = jax.random.normal(keys[0], (2, 40, 5)), jax.random.normal(keys[1], (2, 40))
    params = {"before": jax.random.normal(keys[2], (5, 6)), "after": jax.random.normal(keys[3], (6,))}

    def decayed(params: Any, meta_params: Any, task: Any) -> Any:
        decay = sum(jnp.exp(meta_params[name]) * jnp.sum(params[name] ** 2) for name in params)
        return normalised(params, meta_params, task) + decay

    problem = cm.BilevelProblem(decayed, normalised, lambda s, t: params)
    found = cm.check_horizon(
        problem, optax.adam(1e-2), params, {"before": -5.0, "after": -5.0}, (x, y), horizons=(3, 20), num_averaged=2
    )
    assert found.scale_free == ("['before']",)
    assert [row.leaf for row in found.rows] == ["['after']", "['before']"]
    assert "before a normalisation" in " ".join(str(found).split())


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_a_leaf_without_a_meta_gradient_is_unseen_and_not_wrong(slope: float) -> None:
    """The outer loss is flat where training starts, and no longer where training ends."""

    def without(w: Any, meta_params: Any, task: Any) -> Any:
        # The meta-parameter moves the second weight alone.
        return 0.5 * jnp.sum((w - jnp.array([1.0, slope * meta_params])) ** 2)

    def late(w: Any, meta_params: Any, task: Any) -> Any:
        return jnp.sum(jax.nn.relu(slope * w[1] - 0.5)) * slope

    problem = cm.BilevelProblem(without, late, lambda s, t: jnp.zeros(2))
    found = cm.check_horizon(
        problem, optax.sgd(0.1), jnp.zeros(2), jnp.array(1.0), TASKS, horizons=(1, 100), num_averaged=1
    )
    (row,) = found.rows
    assert row.now == 0 and row.unseen and row.wrong_from is None and not found.agree
    assert np.sign(row.later[-1]) == slope
    assert "does not see" in str(found) and "wrong way" not in str(found)


@pytest.mark.parametrize("horizons", [(), (0, 5), (5, 5), (9, 3)])
def test_horizons_increase(horizons: Any) -> None:
    with pytest.raises(ValueError, match="increase"):
        cm.check_horizon(PROBLEM, optax.sgd(0.5), START, jnp.array(-1.0), TASKS, horizons=horizons)


def test_a_single_task_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"x\[None\]"):
        cm.check_horizon(PROBLEM, optax.sgd(0.5), START, jnp.array(-1.0), jnp.array(0.0))
