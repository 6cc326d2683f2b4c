"""What learning left over and what the nudge asks for, solved for at once: fewer gradients, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from benchmarks.cases import WarmTask, started_by_task
from tests.oracles import ALONE, STILL, away, relative_error, small_problem, started_at


def bowl(curvatures, outer_grad, key=0):
    """A rotated bowl around `meta_params`, with a linear outer loss: everything is known."""
    size = len(curvatures)
    basis, _ = np.linalg.qr(np.random.default_rng(key).standard_normal((size, size)))
    hessian = basis @ np.diag(curvatures) @ basis.T
    problem = cm.BilevelProblem(
        lambda w, theta, task: (w - theta) @ jnp.asarray(hessian) @ (w - theta) / 2,
        lambda w, theta, task: jnp.asarray(outer_grad) @ w,
        lambda theta, task: task,
    )
    return problem, hessian


def together_and_apart(curvatures, distance, tol):
    """Gradients from a little off the minimum; and from the minimum, with the steps that learning takes by itself."""
    size = len(curvatures)
    outer_grad, off = np.random.default_rng(1).standard_normal((2, size))
    problem, hessian = bowl(curvatures, outer_grad)
    nudged, scheme = cm.NewtonKrylov(tol=tol, fall_back=False), cm.relative(cm.central_difference)
    estimator = cm.Contrastive(STILL, nudged, scheme, estimate_error=False)
    solution = jnp.ones(size)
    unfinished, learned = (estimator.estimate(problem, solution, at) for at in (solution + distance * off, solution))
    for result in (unfinished, learned):
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(result.grad, outer_grad) < 10 * tol
    learning = cm.ConjugateGradient(tol=tol).solve(lambda x: hessian @ x, jnp.asarray(hessian @ (distance * off)))
    # Of whose products the last one measures what is left.
    apart = learned.diagnostics.num_gradients + learning.num_hvps - 1
    return int(unfinished.diagnostics.num_gradients), int(apart)


def test_together_they_take_fewer_gradients_than_one_after_the_other():
    """Where few large curvatures rule: what the directions of one system find out of them, the other need not."""
    curvatures = np.concatenate([np.geomspace(2, 200, 24), np.linspace(0.9, 1.1, 76)])
    together, apart = together_and_apart(curvatures, distance=1e-3, tol=1e-3)
    assert together < apart


@pytest.mark.parametrize(("condition", "distance"), [(1e2, 1e-3), (1e2, 1e-2), (1e5, 1e-3), (1e5, 1e-2)])
def test_elsewhere_they_take_not_twice_as_many(condition, distance):
    """The worse the condition, the more of the first round is to be done again where the base point has moved."""
    together, apart = together_and_apart(np.geomspace(1 / condition, 1, 200), distance, tol=1e-2)
    assert together < 2 * apart


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_both_may_point_the_same_way(sign):
    """Then there is one direction, not two."""
    start = np.random.default_rng(2).standard_normal(20)
    _, hessian = bowl(np.geomspace(0.1, 1, 20), start)
    outer_grad = sign * hessian @ start
    problem, _ = bowl(np.geomspace(0.1, 1, 20), outer_grad)
    result = cm.Contrastive(STILL, ALONE).estimate(problem, jnp.zeros(20), jnp.asarray(start))
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, outer_grad) < 1e-8


@pytest.mark.parametrize("name", ["softmax", "data_cleaning", "mlp"])
def test_one_product_after_another_gives_the_same(name):
    case = small_problem(name)
    problem = started_at(case.problem, away(case.params, 1e-2))
    together = cm.Contrastive(STILL, ALONE).estimate(problem, *case[2:4])
    sequential = cm.Contrastive(STILL, ALONE, sequential=True).estimate(problem, *case[2:4])
    assert relative_error(together.grad, case.exact.grad) < 1e-6
    assert relative_error(sequential.grad, together.grad) < 1e-7


def test_tasks_that_have_learned_and_tasks_that_have_not_share_a_batch():
    case = small_problem("softmax")
    distances = (0.0, 1e-3, 0.1, 1.0)
    problem = started_by_task(case.problem)
    starts = jax.tree.map(lambda *xs: jnp.stack(xs), *(away(case.params, d) if d else case.params for d in distances))
    estimator = cm.Contrastive(STILL)
    results = jax.jit(
        jax.vmap(lambda start: estimator.estimate(problem, case.meta_params, WarmTask(case.task, start)))
    )(starts)
    for k in range(len(distances)):
        assert relative_error(jax.tree.map(lambda x, k=k: x[k], results.grad), case.exact.grad) < 1e-7
        assert results.diagnostics.status[k] == cm.Status.CONVERGED
    # Each pays for its own steps.
    assert results.diagnostics.num_gradients[0] < results.diagnostics.num_gradients[1]


@pytest.mark.parametrize("distance", [0.0, 1e-3])
def test_a_warm_start_is_a_first_direction_for_the_nudge_alone(distance):
    """It saves gradients where learning has ended; where it has not, it does no harm but for a step or three."""
    case = small_problem("data_cleaning")
    start = away(case.params, distance) if distance else case.params
    problem = started_at(case.problem, start)
    nudged, scheme = cm.NewtonKrylov(tol=1e-3, fall_back=False), cm.relative(cm.central_difference)
    # What the error estimate looks for beside depends on where the steps end.
    estimator = cm.Contrastive(STILL, nudged, scheme, estimate_error=False)
    state = estimator.estimate(problem, *case[2:4]).state._replace(params=start)
    cold = estimator.estimate(
        problem, *case[2:4], state=state._replace(displacement=jax.tree.map(jnp.zeros_like, state.displacement))
    )
    warm = estimator.estimate(problem, *case[2:4], state=state)
    assert relative_error(warm.grad, case.exact.grad) < 5e-3
    saved = int(cold.diagnostics.num_gradients - warm.diagnostics.num_gradients)
    assert saved >= (-3 if distance else 4)


def test_downward_curvature_met_by_both_is_reported():
    """At a saddle neither system has a solution to go to."""
    outer_grad, start = np.random.default_rng(3).standard_normal((2, 12))
    problem, _ = bowl(np.concatenate([[-0.3], np.geomspace(0.1, 1, 11)]), outer_grad)
    estimator = cm.Contrastive(STILL, ALONE)
    result = estimator.estimate(problem, jnp.zeros(12), jnp.asarray(start))
    assert result.diagnostics.status >= cm.Status.NUDGED_NOT_CONVERGED
