"""What local learners make of a loss is what the mathematics of each says, and every estimator takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from tests.oracles import relative_error

SIZES = (3, 5, 4, 2)
SETTLED = local_learners.Relaxation(step_size=0.5, num_steps=200)


def squared_error(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def cross_entropy(outputs, targets):
    return jnp.mean(optax.softmax_cross_entropy(outputs, jax.nn.softmax(targets)))


def network(seed, sizes=SIZES, dtype=jnp.float64):
    """Biases off zero as well: symmetric values would hide a wrong one."""
    params = architectures.mlp_params(jax.random.key(seed), sizes, dtype)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten(
        [x + 0.2 * jax.random.normal(k, x.shape, dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def data(seed, sizes=SIZES, num=6, dtype=jnp.float64):
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (num, sizes[0]), dtype), jax.random.normal(y, (num, sizes[-1]), dtype)


def slope(learner_at, loss, exact, x, y, params, strengths):
    """In which power of its nudge a learner's update approaches `exact`."""

    @jax.jit
    def error(strength):
        update = jax.grad(lambda w: loss(learner_at(strength).apply(w, x), y))(params)
        difference = jax.tree.map(jnp.subtract, update, exact)
        return optax.tree_utils.tree_norm(difference) / optax.tree_utils.tree_norm(exact)

    errors = [float(error(jnp.asarray(strength))) for strength in strengths]
    return np.log2(errors[0] / errors[1]) / np.log2(strengths[0] / strengths[1]), errors


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


def test_predictive_coding_becomes_backprop():
    params, (x, y) = network(0), data(2)
    exact = jax.grad(lambda w: cross_entropy(architectures.mlp(w, x), y))(params)

    def learner(precision):
        return local_learners.PredictiveCoding(precision, local_learners.Relaxation(0.3, 200))

    order, errors = slope(learner, cross_entropy, exact, x, y, params, (2e-3, 1e-3))
    # The next term is of order 2, and the squared norm of the layers' Jacobians is of order 1.
    assert abs(order - 1) < 0.02 and errors[1] < 5e-3
    assert slope(learner, cross_entropy, exact, x, y, params, (1e-4, 1e-6))[1][1] < 5e-6


def test_predictive_coding_with_clamped_targets_descends_its_energy():
    """With the squared error and precision 1 the update is the gradient of min_s F, by finite differences of that."""
    params, (x, y) = network(0), data(2)
    learner = local_learners.PredictiveCoding(relaxation=local_learners.Relaxation(0.3, 300))

    @jax.jit
    def free_energy(w):
        free = jax.lax.stop_gradient(learner.settle(w, x, _run_forwards(w, x), y))
        return learner.energy(w, x, free)

    update = jax.grad(lambda w: jnp.sum(jnp.square(learner.apply(w, x) - y)) / 2)(params)
    direction = network(7)
    steps = [jax.tree.map(lambda w, d, by=by: w + by * d, params, direction) for by in (1e-5, -1e-5)]
    difference = float(free_energy(steps[0]) - free_energy(steps[1])) / 2e-5
    predicted = sum(jnp.vdot(u, d) for u, d in zip(jax.tree.leaves(update), jax.tree.leaves(direction), strict=True))
    # 1e-10 of truncation and 1e-11 of rounding over the step; backprop's is off by 40 %.
    assert abs(difference / float(predicted) - 1) < 1e-7
    backprop = jax.grad(lambda w: jnp.sum(jnp.square(architectures.mlp(w, x) - y)) / 2)(params)
    assert relative_error(update, backprop) > 0.05


def _run_forwards(params, x):
    first = jnp.tanh(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"])
    second = jnp.tanh(first @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"])
    return [first, second, second @ params["readout"]["kernel"] + params["readout"]["bias"]]


@pytest.mark.parametrize("with_gains", [False, True])
def test_feedback_alignment_with_the_weights_as_feedback_is_backprop(with_gains):
    params, (x, y) = network(0), data(2)
    feedback = {name: params[name]["kernel"] for name in ("hidden_1", "readout")}
    params = architectures.with_gains(params) if with_gains else params
    exact = jax.grad(lambda w: squared_error(architectures.mlp(w, x), y))(params)
    aligned = local_learners.FeedbackAlignment(feedback)
    assert relative_error(jax.grad(lambda w: squared_error(aligned.apply(w, x), y))(params), exact) < 1e-14


def test_feedback_alignment_is_the_published_update():
    params, (x, y) = network(0), data(2)
    feedback = local_learners.random_feedback(jax.random.key(3), params)
    network_ = local_learners.FeedbackAlignment(feedback)
    update = jax.grad(lambda w: jnp.sum(jnp.square(network_.apply(w, x) - y)) / 2)(params)
    h0, h1, out = (np.asarray(s) for s in _run_forwards(params, x))
    error = out - np.asarray(y)
    d1 = (1 - h1**2) * (error @ np.asarray(feedback["readout"]).T)
    d0 = (1 - h0**2) * (d1 @ np.asarray(feedback["hidden_1"]).T)
    expected = {
        name: {"kernel": before.T @ d, "bias": d.sum(axis=0)}
        for name, before, d in (("hidden_0", np.asarray(x), d0), ("hidden_1", h0, d1), ("readout", h1, error))
    }
    assert relative_error(update, expected) < 1e-14
    np.testing.assert_array_equal(network_.apply(params, x), architectures.mlp(params, x))


SPIKES_IN = (4, 12, 6)  # examples, time, inputs


def spiking(seed, recurrent=1.0):
    """A network that fires, at potentials all over the range of the pseudo-derivative."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "input": 0.06 * jax.random.normal(keys[0], (6, 5)),
        "recurrent": recurrent * 0.05 * jax.random.normal(keys[1], (5, 5)),
        "readout": 0.5 * jax.random.normal(keys[2], (5, 2)),
    }
    x = jax.random.bernoulli(keys[3], 0.4, SPIKES_IN).astype(jnp.float64)
    targets = jax.random.normal(jax.random.fold_in(keys[3], 1), (4, 12, 2))
    rate = float(jnp.mean(local_learners.EProp().apply(params, x).spikes))
    assert 0.05 < rate < 0.6
    return params, x, targets


def spiking_loss(run, params, x, targets, rates=0.3):
    """The readout's error at every time, and firing rates."""
    outputs, spikes = run(params, x)
    return jnp.mean(jnp.square(outputs - targets)) + rates * jnp.sum(jnp.square(jnp.mean(spikes, (0, 1)) - 0.2))


def test_eprop_is_backprop_through_time_without_recurrence():
    params, x, targets = spiking(0, recurrent=0.0)
    learner = local_learners.EProp()
    local = jax.grad(spiking_loss, argnums=1)(learner.apply, params, x, targets)
    through_time = jax.grad(spiking_loss, argnums=1)(learner.simulate, params, x, targets)
    assert relative_error(local, through_time) < 1e-13
    assert all(float(jnp.max(jnp.abs(leaf))) > 1e-3 for leaf in jax.tree.leaves(through_time))


def test_eprop_with_recurrence_is_the_published_update_and_not_backprop():
    """Online, synapse by synapse: eligibilities, their low-pass, and the signal of the moment."""
    params, x, targets = spiking(1)
    feedback = jax.random.normal(jax.random.key(9), (5, 2))
    learner = local_learners.EProp(feedback, membrane_decay=0.9, readout_decay=0.8)
    loss = spiking_loss
    local = jax.grad(loss, argnums=1)(learner.apply, params, x, targets)
    done = learner.apply(params, x)
    at_outputs, at_spikes = jax.grad(lambda out: loss(lambda *_: out, params, x, targets))(done)
    at_outputs, at_spikes = np.asarray(at_outputs), np.asarray(at_spikes)
    w = {name: np.asarray(leaf) for name, leaf in params.items()}
    expected = {name: np.zeros_like(leaf) for name, leaf in w.items()}
    for example in range(SPIKES_IN[0]):
        potential, fired = np.zeros(5), np.zeros(5)
        traces = {"input": np.zeros(6), "recurrent": np.zeros(5)}
        filtered = {"input": np.zeros((6, 5)), "recurrent": np.zeros((5, 5))}
        seen = np.zeros(5)
        for time in range(SPIKES_IN[1]):
            arriving = {"input": np.asarray(x)[example, time], "recurrent": fired}
            potential = 0.9 * potential + sum(arriving[n] @ w[n] for n in arriving) - 0.1 * fired
            fired = (potential > 0.1).astype(float)
            psi = 0.3 / 0.1 * np.maximum(0, 1 - np.abs(potential / 0.1 - 1))
            signal = np.asarray(feedback) @ at_outputs[example, time]
            for name, now in arriving.items():
                traces[name] = 0.9 * traces[name] + now
                eligibility = np.outer(traces[name], psi)
                filtered[name] = 0.8 * filtered[name] + eligibility
                expected[name] += filtered[name] * signal + eligibility * at_spikes[example, time]
            seen = 0.8 * seen + fired
            expected["readout"] += np.outer(seen, at_outputs[example, time])
    assert relative_error(local, expected) < 1e-12
    through_time = jax.grad(loss, argnums=1)(learner.simulate, params, x, targets)
    assert relative_error(local["readout"], through_time["readout"]) < 1e-13
    assert relative_error(local["recurrent"], through_time["recurrent"]) > 0.05


def test_the_penalty_of_an_eprop_learner_has_one_scale():
    """Earlier code learned with twice the energy that it measured: the update is the rule's own term and e-prop's."""
    params, x, targets = spiking(1)
    rule, learner = cm.AnchoredSynapse(0.7), local_learners.EProp()
    meta = {"anchor": jax.tree.map(lambda w: w + 0.1, params)}

    def inner(w):
        return spiking_loss(learner.apply, w, x, targets) + rule.energy(w, meta)

    without = jax.grad(lambda w: spiking_loss(learner.apply, w, x, targets))(params)
    expected = jax.tree.map(lambda g, w, omega: g + 0.7 * (w - omega), without, params, meta["anchor"])
    assert relative_error(jax.grad(inner)(params), expected) < 1e-14
    measured = rule.measure(params, meta, ())["anchor"]
    assert relative_error(measured, jax.tree.map(lambda g, u: u - g, jax.grad(inner)(params), without)) < 1e-13
