"""Other forms of the rule for one run of phases: no buffer, rescaled nudges, the direct term at the free solution."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import relative_error, small_problem

LEARNER = cm.LBFGS(tol=1e-12, max_steps=500)


class Direct:
    """A scalar problem in which meta-parameters enter both losses, with the phases' ends in closed form.

    L_in = (w - m)^2 / 2 and L_out = (w - 1)^2 m / 2, so that a phase ends at (1 + b) m / (1 + b m), and the exact
    meta-gradient is (m - 1) m + (m - 1)^2 / 2.
    """

    problem = cm.BilevelProblem(
        inner_loss=lambda w, m, task: 0.5 * (w - m) ** 2,
        outer_loss=lambda w, m, task: 0.5 * m * (w - 1) ** 2,
        init_params=lambda m, task: m,
    )

    @staticmethod
    def end(m, beta):
        return (1 + beta) * m / (1 + beta * m)

    @staticmethod
    def exact(m):
        return (m - 1) * m + (m - 1) ** 2 / 2


def online_gradient(online, m):
    trace = online.begin(m)
    for phase, beta in enumerate(online.scheme.nudges):
        trace = online.accumulate(trace, phase, Direct.problem, Direct.end(m, beta), m, None)
    return float(online.finish(trace))


@pytest.mark.parametrize(("scheme", "order"), [(cm.forward_difference, 1), (cm.second_order_forward, 2)])
def test_the_direct_term_at_the_free_solution(scheme, order):
    """Another estimate with the same limit, and a bias of the same order."""
    m = jnp.asarray(0.4)

    def errors(**options):
        grads = [online_gradient(cm.OnlineContrast(scheme(beta), **options), m) for beta in (2e-2, 1e-2)]
        return np.array(grads) - float(Direct.exact(m))

    nudged, free = errors(), errors(direct_at_free=True)
    for error in (nudged, free):
        np.testing.assert_allclose(error[0] / error[1], 2**order, rtol=0.05)
    assert not np.allclose(nudged, free, rtol=0.1), "these are two estimates"


def test_the_direct_term_is_not_left_out():
    """Without it the meta-gradient of this problem would be of the other size."""
    m = jnp.asarray(0.4)
    without = (m - 1) * m
    grad = online_gradient(cm.OnlineContrast(cm.forward_difference(1e-4), direct_at_free=True), m)
    assert abs(grad - Direct.exact(m)) < 1e-4 < abs(without - Direct.exact(m))


def test_phases_may_be_traced_for_the_direct_term():
    online, m = cm.OnlineContrast(cm.forward_difference(0.1), direct_at_free=True), jnp.asarray(0.4)
    nudges = jnp.array(online.scheme.nudges)

    def step(trace, phase):
        return online.accumulate(trace, phase, Direct.problem, Direct.end(m, nudges[phase]), m, None), None

    trace, _ = jax.jit(lambda trace: jax.lax.scan(step, trace, jnp.arange(2)))(online.begin(m))
    np.testing.assert_allclose(online.finish(trace), online_gradient(online, m), rtol=1e-14)


def test_the_direct_term_needs_a_free_phase():
    with pytest.raises(ValueError, match="free phase, such as `forward_difference"):
        cm.OnlineContrast(cm.central_difference(0.1), direct_at_free=True)


def test_rescaled_nudges_have_the_same_minimum_and_stand_longer_steps():
    """With a nudge of 30 times the inner curvature, steps that suit the inner loss diverge; rescaled ones arrive."""
    case = small_problem("ridge_shared")
    problem, meta_params, task = case.problem, *case[2:4]
    scheme = cm.forward_difference(30.0)
    exactly, plain, rescaled = (
        cm.OnlineContrast(scheme),
        cm.OnlineContrast(scheme),
        cm.OnlineContrast(scheme, rescaled=True),
    )
    hessian = jax.hessian(lambda w: problem.inner(w, meta_params, task))(case.params)
    step_size = 1 / float(jnp.linalg.eigvalsh(hessian)[-1])
    descent = cm.OptaxDescent(optax.sgd(step_size), num_steps=400)
    ends = {}
    for name, online, solver in (
        ("exact", exactly, LEARNER),
        ("plain", plain, descent),
        ("rescaled", rescaled, descent),
    ):
        ends[name] = solver.solve(online.loss(1, problem, meta_params, task), case.params).params
    assert relative_error(ends["rescaled"], ends["exact"]) < 1e-5
    assert not relative_error(ends["plain"], ends["exact"]) < 1


@pytest.mark.parametrize("scheme", [cm.forward_difference(0.05), cm.central_difference(0.05)])
def test_without_a_buffer_the_bias_falls_with_the_step(scheme):
    """The sum of the steps is the contrast's in the limit of small steps; halving the step halves what it misses."""
    case = small_problem("ridge_shared")
    problem, before, task = case.problem, *case[2:4]
    online = cm.OnlineContrast(scheme)
    trace = online.begin(before)
    for phase in range(len(scheme.nudges)):
        end = LEARNER.solve(online.loss(phase, problem, before, task), case.params).params
        trace = online.accumulate(trace, phase, problem, end, before, task)
    contrast = online.finish(trace)

    def missed(step_size):
        bufferless, meta_params = cm.BufferlessContrast(scheme, step_size), before
        for phase in range(len(scheme.nudges)):
            loss = online.loss(phase, problem, meta_params, task)
            end = LEARNER.solve(loss, case.params).params
            meta_params = bufferless.step(meta_params, phase, problem, end, task)
        assert jax.tree.map(jnp.shape, meta_params) == jax.tree.map(jnp.shape, before)
        estimate = jax.tree.map(lambda old, new: (old - new) / step_size, before, meta_params)
        return relative_error(estimate, contrast)

    errors = [missed(step_size) for step_size in (2e-5, 1e-5)]
    assert errors[1] < 0.2, "a descent direction at this step already"
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=0.05)


def test_without_a_buffer_steps_keep_the_precision():
    bufferless = cm.BufferlessContrast(cm.forward_difference(0.1), jnp.asarray(1e-3))
    m = jnp.asarray(0.4, jnp.float32)
    assert bufferless.step(m, 1, Direct.problem, m, None).dtype == jnp.float32
