"""A Hopfield network rests where its energy says, and its contrast is the gradient there."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from contrastive_meta import local_learners
from tests.local_networks import (
    LEARNER,
    QUICK,
    SETTLED,
    as_published,
    cross_entropy,
    data,
    network,
    of_apply,
    slope,
    small_task,
    squared_error,
)
from tests.oracles import relative_error


@pytest.mark.parametrize("loss", [squared_error, cross_entropy])
def test_equilibrium_propagation_is_the_gradient_at_equilibrium_to_second_order(loss):
    params, (x, y) = network(0), data(2)

    def learner(beta):
        return local_learners.EquilibriumPropagation(beta, SETTLED)

    # Backprop through the relaxation, which is local to nothing, and goes with no beta.
    exact = jax.grad(lambda w: loss(learner(1.0).equilibrium(w, x).states[-1], y))(params)
    order, errors = slope(learner, loss, exact, x, y, params, (0.1, 0.05))
    # The next term is of order 4: 1.99 to 2.01, measured.
    assert abs(order - 2) < 0.05 and errors[1] < 1e-3
    order_later, (_, least) = slope(learner, loss, exact, x, y, params, (0.01, 0.001))
    assert least < 1e-6 and abs(order_later - 2) < 0.05


def test_equilibrium_propagation_rests_where_its_energy_says():
    """Stationary in the energy of the docstring: the rest point is checked against finite differences of E itself."""
    params, (x, _) = network(0), data(2, num=1)
    learner = local_learners.EquilibriumPropagation(relaxation=SETTLED)
    rest = learner.equilibrium(params, x)
    assert float(rest.residual) < 1e-14
    layers = [params["hidden_0"], params["hidden_1"], params["readout"]]

    def energy(states):
        before = [x, *states[:-1]]
        primitive = [s * jnp.arctanh(s) + jnp.log(1 - s**2) / 2 for s in states[:-1]] + [states[-1] ** 2 / 2]
        coupled = [s * (b @ w["kernel"] + w["bias"]) for s, b, w in zip(states, before, layers, strict=True)]
        return sum(jnp.sum(p) for p in primitive) - sum(jnp.sum(c) for c in coupled)

    assert max(float(jnp.max(jnp.abs(g))) for g in jax.grad(energy)(rest.states)) < 1e-13
    # And it is a minimum along every unit, not just a stationary point.
    for number, states in enumerate(rest.states):
        for unit in range(states.shape[-1]):
            for by in (1e-3, -1e-3):
                moved = [s.at[0, unit].add(by) if k == number else s for k, s in enumerate(rest.states)]
                assert float(energy(moved)) > float(energy(rest.states))


def test_both_levels_by_equilibrium_propagation():
    """Anchors by contrast of solutions, solutions by contrast of equilibria: exact to the square of the inner beta."""
    task, exact_network = small_task(3), local_learners.EquilibriumPropagation(relaxation=QUICK)
    through_relaxation = of_apply(lambda w, x: exact_network.equilibrium(w, x).states[-1])
    implicit = cm.ImplicitDifferentiation(LEARNER, cm.DenseInverse())
    exact = implicit.estimate(through_relaxation.problem, through_relaxation.meta_params, task)
    cm.raise_if_failed(exact)

    @jax.jit
    def by_contrast(beta):
        split = of_apply(local_learners.EquilibriumPropagation(beta, QUICK).apply)
        estimator = as_published(split, cm.central_difference(1e-3))
        return estimator.estimate(split.problem, split.meta_params, task).grad

    errors = [relative_error(by_contrast(beta), exact.grad) for beta in (0.1, 0.05)]
    # Truncation of the outer contrast is about 1e-6; the inner one's next term has order 4.
    assert errors[1] < 2e-3
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.15


def test_the_update_is_proportional_to_the_weight_of_a_loss():
    """A nudge of 1e-3 is the same as one of 1, scaled: its rounding too."""
    params, (x, y) = network(0, dtype=jnp.float32), data(2, dtype=jnp.float32)
    learner = local_learners.EquilibriumPropagation(0.1, SETTLED)
    full, small = (
        jax.grad(lambda w, by=by: by * squared_error(learner.apply(w, x), y))(params) for by in (1.0, -(2.0**-12))
    )
    assert relative_error(small, jax.tree.map(lambda g: -(2.0**-12) * g, full)) < 1e-6


def test_relaxation_to_a_tolerance():
    params, (x, y) = network(0), data(2)
    fixed = local_learners.EquilibriumPropagation(1e-3, SETTLED)
    exact = jax.grad(lambda w: squared_error(fixed.equilibrium(w, x).states[-1], y))(params)
    # The nudge is far below the tolerance of activities: its tolerance is in units of it, or nothing would move.
    loose = local_learners.EquilibriumPropagation(1e-3, local_learners.Relaxation(tol=1e-2, num_steps=500))
    update = jax.jit(jax.grad(lambda w: squared_error(loose.apply(w, x), y)))(params)
    assert relative_error(update, exact) < 0.1
    rest = loose.equilibrium(params, x)
    assert float(rest.residual) <= 1e-2
    few = local_learners.EquilibriumPropagation(1e-3, local_learners.Relaxation(tol=1e-9, num_steps=3))
    assert float(few.equilibrium(params, x).residual) > 1e-3  # which says that it has not settled
