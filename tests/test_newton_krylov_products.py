"""What the fast nudged learner does where differences of gradients bend, and where its answer is the better of two."""

import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from tests.oracles import STILL, relative_error

SIZE = 60


def bent_bowl(condition, cubic, dtype):
    """A rotated bowl with cubic valleys, tilted by the meta-parameters: the meta-gradient is H^-1 v.

    Returns:
      The problem, its minimum, which is the task as well, and the meta-gradient.
    """
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.standard_normal((SIZE, SIZE)))
    hessian = (basis * np.geomspace(10 / condition, 10, SIZE)) @ basis.T
    valleys, outer_grad, minimum = generator.standard_normal((SIZE + 2, SIZE)), *generator.standard_normal((2, SIZE))
    curved, along, asked = (jnp.asarray(x, dtype) for x in (hessian, valleys / SIZE**0.5, outer_grad))

    def inner_loss(w, theta, task):
        off = w - task
        return off @ curved @ off / 2 + cubic / 6 * jnp.sum((along @ off) ** 3) - theta @ off

    problem = cm.BilevelProblem(inner_loss, lambda w, theta, task: asked @ w, lambda theta, task: task)
    return problem, jnp.asarray(minimum, dtype), np.linalg.solve(hessian, outer_grad)


def fast(scheme=cm.complex_step, **nudged):
    """Phases from the minimum."""
    return cm.Contrastive(STILL, cm.NewtonKrylov(**nudged), cm.relative(scheme), estimate_error=False)


@pytest.mark.parametrize(("condition", "cubic"), [(1e3, 10.0), (1e3, 100.0), (1e3, 300.0), (1e4, 30.0)])
def test_products_that_bend_are_taken_on_both_sides(condition, cubic):
    """In float32 the third derivative bends differences on one side by more than the least curvature.

    With those alone the last two rows end with errors of 1e-2 and 9e-2.
    """
    problem, minimum, exact = bent_bowl(condition, cubic, jnp.float32)
    result = fast().estimate(problem, jnp.zeros(SIZE, jnp.float32), minimum)
    assert relative_error(result.grad, exact) < 3e-4
    assert result.diagnostics.status in (cm.Status.CONVERGED, cm.Status.APPROXIMATE)


def test_of_two_answers_that_are_not_accurate_enough_the_better_one_is_kept():
    """A learner that runs its phases for no longer than it learned has none: that is no better than half an answer."""
    problem, minimum, exact = bent_bowl(1e3, 0.0, jnp.float64)
    theta, max_steps = jnp.zeros(SIZE), 30
    alone = fast(cm.central_difference, max_steps=max_steps, fall_back=False).estimate(problem, theta, minimum)
    result = fast(cm.central_difference, max_steps=max_steps).estimate(problem, theta, minimum)
    np.testing.assert_array_equal(result.grad, alone.grad)
    assert 1e-2 < relative_error(result.grad, exact) < 0.9
    assert result.diagnostics.status == cm.Status.NUDGED_NOT_CONVERGED
    published = cm.Contrastive(STILL, STILL, cm.relative(cm.central_difference)).estimate(problem, theta, minimum)
    assert relative_error(published.grad, exact) == 1.0
