"""Where the fast learner does not arrive from an unfinished phase: the user's own goes on, and it is tried again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE, STILL, double_well, relative_error, small_problem, started_at

# Satisfied on the rim between the minima, where the loss curves downwards.
LOOSE = cm.OptaxDescent(optax.sgd(0.02), tol=1.0, max_steps=2000)


@pytest.mark.parametrize("solver", [LOOSE, cm.LBFGS(tol=1.0)], ids=["descent", "L-BFGS"])
# A central difference balances truncation and rounding at about eps^(2/3): 2e-5 and 4e-11. In float32 5.3e-5 is
# reached: both entries of `params` are equal, so that the rounding of the phases' ends does not average out.
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 6e-5), (jnp.float64, 1e-9)])
def test_what_is_left_to_learn_is_learned_by_the_users_learner(solver, dtype, tolerance):
    """As accurate as from a finished phase."""
    problem, theta = double_well(), jnp.zeros((), dtype)
    for start in (0.1, -0.1):
        result = cm.Contrastive(solver).estimate(problem, theta, jnp.asarray(start, dtype))
        side = np.sign(start)
        assert result.diagnostics.status == cm.Status.FELL_BACK
        np.testing.assert_allclose(result.params, side, rtol=1e-5)
        # Two entries of outer gradient 2 (w - 0.5).
        np.testing.assert_allclose(result.grad, -2 * 2 * (side - 0.5) / 8, rtol=tolerance)
        assert float(result.diagnostics.error_estimate) < tolerance
        cm.raise_if_failed(result)


def test_no_gradient_of_learning_on_is_left_out_of_the_count():
    """Each evaluation of the inner loss is told to a counter outside, those of phases side by side one by one."""
    seen = []

    def inner(w, theta, task):
        jax.debug.callback(lambda _: seen.append(1), w)
        return jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w)

    problem = double_well()
    counted = cm.BilevelProblem(inner, problem.outer_loss, problem.init_params)
    result = cm.Contrastive(LOOSE, estimate_error=False).estimate(counted, jnp.array(0.0), jnp.array(0.1))
    jax.effects_barrier()
    told = int(result.diagnostics.num_gradients)
    # Outer gradients are counted but not seen; of a pair of systems, the one that has ended is seen but not counted.
    assert 0.7 * len(seen) < told < 1.3 * len(seen), (told, len(seen))


def test_complex_steps_go_on_as_well():
    """They have no published pair to fall back on: the learner need not be holomorphic."""
    solver = cm.LBFGS(tol=1.0)
    estimator = cm.Contrastive(solver, scheme=cm.relative(cm.complex_step))
    result = estimator.estimate(double_well(), jnp.array(0.0), jnp.array(0.1))
    assert result.diagnostics.status == cm.Status.FELL_BACK
    np.testing.assert_allclose(result.grad, -0.25, rtol=1e-8)


def test_only_the_tasks_that_need_it_go_on():
    estimator, theta, problem = cm.Contrastive(LOOSE), jnp.array(0.0), double_well()
    starts = jnp.array([0.1, 1.05, -0.1])
    together = jax.jit(jax.vmap(lambda start: estimator.estimate(problem, theta, start)))(starts)
    for index, start in enumerate(starts):
        alone = estimator.estimate(problem, theta, start)
        np.testing.assert_allclose(together.grad[index], alone.grad, rtol=1e-8)
        assert together.diagnostics.status[index] == alone.diagnostics.status
        assert together.diagnostics.num_gradients[index] == alone.diagnostics.num_gradients
    assert together.diagnostics.status.tolist() == [cm.Status.FELL_BACK, cm.Status.CONVERGED, cm.Status.FELL_BACK]


def test_a_learner_that_comes_no_nearer_is_not_asked_for_ever():
    """Two more steps of 1e-3 from the rim lead nowhere: the phases are those of the published rule, and it is said."""
    short = cm.OptaxDescent(optax.sgd(1e-3), num_steps=2)
    result = cm.Contrastive(short).estimate(double_well(), jnp.array(0.0), jnp.array(0.1))
    published = cm.Contrastive(short, short, cm.relative(cm.central_difference), cm.LinearNudge())
    expected = published.estimate(double_well(), jnp.array(0.0), jnp.array(0.1))
    assert result.diagnostics.status > cm.Status.APPROXIMATE
    np.testing.assert_allclose(result.grad, expected.grad, rtol=1e-12)


def test_an_accuracy_asked_for_is_reached_from_where_learning_went_on():
    estimator = cm.Contrastive(LOOSE, target_error=1e-3)
    result = estimator.estimate(double_well(), jnp.array(0.0), jnp.array(0.1))
    assert result.diagnostics.status == cm.Status.FELL_BACK
    np.testing.assert_allclose(result.grad, -0.25, rtol=2e-3)
    assert float(result.diagnostics.error_estimate) <= 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_strength_sought_for_the_loss_nudge_leaves_it_a_minimum(dtype):
    """Between quadratic losses lines are straight: only what the nudge takes from the curvature bounds it."""
    case = small_problem("ridge", dtype)
    estimator = cm.Contrastive(STILL, ALONE, nudge=cm.LossNudge())
    result = estimator.estimate(started_at(case.problem, case.params), *case[2:4])
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, case.exact.grad) < (1e-4 if dtype == jnp.float32 else 1e-11)
    # A nudge of a strength that is typed is not spared.
    typed = cm.Contrastive(STILL, ALONE, cm.central_difference(30.0), nudge=cm.LossNudge())
    told = typed.estimate(started_at(case.problem, case.params), *case[2:4])
    assert told.diagnostics.status == cm.Status.UNBOUNDED_NUDGE
