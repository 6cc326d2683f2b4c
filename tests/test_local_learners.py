"""What local learners make of a loss is what the mathematics of each says, and every estimator takes them."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from contrastive_meta.problems import SplitData
from tests.oracles import cast, relative_error

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


# Estimators, on a network small enough for dense second derivatives.
# Curvatures lie between 1.5 and 10: converged to rounding.
SMALL, STRENGTH = (2, 3, 1), 2.0
LEARNER = cm.OptaxDescent(optax.sgd(0.15), num_steps=150)
QUICK = local_learners.Relaxation(step_size=0.7, num_steps=60)
LEARNERS = {
    "equilibrium propagation": lambda w: local_learners.EquilibriumPropagation(0.1, QUICK),
    "predictive coding": lambda w: local_learners.PredictiveCoding(0.1, QUICK),
    "feedback alignment": lambda w: local_learners.FeedbackAlignment(
        local_learners.random_feedback(jax.random.key(5), w)
    ),
}


def small_task(seed, dtype=jnp.float64):
    (x, y), (x_val, y_val) = data(seed, SMALL, 8, dtype), data(seed + 1, SMALL, 8, dtype)
    return SplitData(x, y / 2, x_val, y_val / 2)


def small_split(name, dtype=jnp.float64):
    params = network(0, SMALL, dtype)
    return architectures.learned_initialisation(LEARNERS[name](params).apply, squared_error, params, STRENGTH)


def as_published(split, scheme, solver=LEARNER):
    return cm.Contrastive(solver, solver, scheme, cm.LossNudge(), split.rule, estimate_error=False)


def of_apply(apply):
    return architectures.learned_initialisation(apply, squared_error, network(0, SMALL), STRENGTH)


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


def test_other_estimators_take_them_as_they_are():
    """Nobody knows what learns: the update is near a gradient, so all agree to about its distance from one."""
    split, task = small_split("equilibrium propagation"), small_task(3)
    at = split.problem, split.meta_params, task
    published = as_published(split, cm.central_difference(1e-3)).estimate(*at)
    default = cm.Contrastive(LEARNER, rule=split.rule, estimate_error=False).estimate(*at)
    implicit = cm.ImplicitDifferentiation(LEARNER, estimate_error=False).estimate(*at)
    backprop = cm.BackpropThroughLearning(LEARNER).estimate(*at)
    # The first two are contrasts and Hessians of the same update: truncation of the former, 7e-7, measured.
    assert relative_error(default.grad, published.grad) < 1e-5
    assert relative_error(implicit.grad, published.grad) < 1e-5
    # Backprop has the transpose of the update's Jacobian: 2e-3, by the square of the inner beta.
    assert relative_error(backprop.grad, published.grad) < 1e-2


def test_what_is_estimated_where_the_update_is_no_gradient():
    """The Jacobian of the update where the exact meta-gradient has its transpose."""
    split, task = small_split("feedback alignment"), small_task(3)
    result = as_published(split, cm.central_difference(1e-3)).estimate(split.problem, split.meta_params, task)
    at, flatten = jax.flatten_util.ravel_pytree(result.params)[0], jax.flatten_util.ravel_pytree
    unflatten = flatten(result.params)[1]

    def update(loss):
        return lambda flat: flatten(jax.grad(loss)(unflatten(flat), split.meta_params, task))[0]

    jacobian = jax.jacfwd(update(split.problem.inner_loss))(at)
    outer = update(split.problem.outer_loss)(at)
    stated, exact_form = (STRENGTH * np.linalg.solve(j, outer) for j in (jacobian, jacobian.T))
    got = flatten(result.grad)[0]
    assert relative_error(got, stated) < 1e-4
    assert relative_error(got, exact_form) > 0.02  # which the test can tell apart


def test_the_negative_nudge_is_not_dropped():
    """Earlier code dropped it and so got half of the forward estimate from the symmetric one."""
    split, task = small_split("predictive coding"), small_task(3)
    forward, central = (
        as_published(split, scheme).estimate(split.problem, split.meta_params, task).grad
        for scheme in (cm.forward_difference(1e-3), cm.central_difference(1e-3))
    )
    assert relative_error(forward, central) < 0.02


def eprop_problem():
    params, x, targets = spiking(1)
    learner, rule = local_learners.EProp(dampening=0.0), cm.AnchoredSynapse(0.5)

    def judge(w, x, y):
        return jnp.mean(jnp.square(jnp.mean(learner.apply(w, x).outputs, axis=-2) - y))

    problem = cm.BilevelProblem(
        lambda w, meta, task: judge(w, *task[0]) + rule.energy(w, meta),
        lambda w, meta, task: judge(w, *task[1]),
        lambda meta, task: meta["anchor"],
    )
    other = jax.random.bernoulli(jax.random.key(4), 0.4, SPIKES_IN).astype(x.dtype)
    task = (x, targets[:, 0]), (other, targets[:, 1])
    return problem, rule, {"anchor": params}, task


def test_eprop_with_a_readout_that_learns_has_a_closed_form():
    """No pseudo-derivative, no learning of spikes: what is left is linear, and the meta-gradient known.

    A negative nudge that is dropped, as in earlier code, would halve it.
    """
    problem, rule, meta_params, task = eprop_problem()
    solver = cm.OptaxDescent(optax.sgd(0.1), num_steps=300)
    estimator = cm.Contrastive(solver, solver, cm.central_difference(1e-4), rule=rule, estimate_error=False)
    grad = estimator.estimate(problem, meta_params, task).grad["anchor"]
    learner, silent = local_learners.EProp(), {**meta_params["anchor"], "readout": jnp.eye(5)}
    features, judged = (np.mean(np.asarray(learner.apply(silent, x).outputs), axis=-2) for x, _ in task)
    (_, y), (_, y_val) = jax.tree.map(np.asarray, task)
    anchor, num = np.asarray(meta_params["anchor"]["readout"]), y.size
    hessian = 2 * features.T @ features / num + 0.5 * np.eye(5)
    w = np.linalg.solve(hessian, 2 * features.T @ y / num + 0.5 * anchor)
    expected = 0.5 * np.linalg.solve(hessian, 2 * judged.T @ (judged @ w - y_val) / num)
    assert relative_error(grad["readout"], expected) < 1e-6
    assert all(float(jnp.max(jnp.abs(grad[name]))) < 1e-12 for name in ("input", "recurrent"))


def test_a_batch_is_the_mean_and_phases_measure_where_they_ended():
    """Earlier code updated by the last task's gradient over the number of tasks, and measured before the last step."""
    split, tasks = small_split("feedback alignment"), [small_task(3), small_task(13)]
    estimator = as_published(split, cm.central_difference(1e-2))
    single = [estimator.estimate(split.problem, split.meta_params, task) for task in tasks]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    evaluate = jax.jit(cm.value_and_meta_grad(split.problem, estimator))
    value, grad = evaluate(split.meta_params, batch)
    assert relative_error(grad, jax.tree.map(lambda *g: sum(g) / 2, *(r.grad for r in single))) < 1e-10
    assert np.isclose(float(value), sum(float(r.outer_loss) for r in single) / 2, rtol=1e-12)

    # The contrast, phase by phase by hand, with the statistic at the very end of each.
    @jax.jit
    def end(beta, start):
        return LEARNER.solve(lambda w: split.problem.nudged(w, split.meta_params, tasks[0], beta), start).params

    free = end(0.0, split.meta_params["anchor"])
    plus, minus = end(1e-2, free), end(-1e-2, free)
    expected = jax.tree.map(lambda p, m: -STRENGTH * (p - m) / 2e-2, plus, minus)
    assert relative_error(single[0].grad["anchor"], expected) < 1e-8


@pytest.mark.parametrize("name", LEARNERS)
def test_float32_under_vmap_and_scan(name):
    split32, split = small_split(name, jnp.float32), small_split(name)
    task = small_task(3)

    @jax.jit
    def updates(params, tasks):
        one = lambda task: jax.grad(split.problem.inner_loss)(params, {"anchor": params}, task)  # noqa: E731
        return jax.vmap(one)(tasks), jax.lax.scan(lambda carry, task: (carry, one(task)), 0, tasks)[1]

    tasks = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), task)
    params = split.meta_params["anchor"]
    together, one_by_one = updates(params, tasks)
    alone = jax.grad(split.problem.inner_loss)(params, {"anchor": params}, task)
    for got in (together, one_by_one):
        assert relative_error(jax.tree.map(lambda g: g[0], got), alone) < 1e-12
    single = updates(*cast((params, tasks), jnp.float32))[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    # The contrast of equilibria divides their rounding, 1e-7, by its beta, 0.1.
    assert relative_error(single, together) < 1e-5
    assert {x.dtype for x in jax.tree.leaves(split32.meta_params)} == {jnp.dtype("float32")}


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


def test_a_relaxation_that_runs_away_is_a_status():
    params, task = network(0, SMALL), small_task(3)
    wild = local_learners.PredictiveCoding(1.0, local_learners.Relaxation(step_size=50.0, num_steps=400))
    split = architectures.learned_initialisation(wild.apply, squared_error, params, STRENGTH)
    result = as_published(split, cm.central_difference(1e-2)).estimate(split.problem, split.meta_params, task)
    assert int(result.diagnostics.status) >= cm.Status.DIVERGED


def test_a_local_rule_hears_the_errors_that_feedback_delivers():
    network_ = architectures.with_gains(network(0))
    aligned = local_learners.FeedbackAlignment(local_learners.random_feedback(jax.random.key(5), network_))
    split = architectures.gain_modulation(aligned.apply, squared_error, network_)
    task = SplitData(*data(3), *data(4))
    params = split.problem.init_params(split.meta_params, task)
    at = split.problem, jax.tree.map(lambda x: 1.1 * x + 0.1, params), split.meta_params, task, 0.3
    heard, derived = split.rule.statistic(*at), cm.Autodiff().statistic(*at)
    assert relative_error(heard, derived) < 1e-13
    backprop = architectures.gain_modulation(architectures.mlp, squared_error, network_)
    assert relative_error(heard, backprop.rule.statistic(backprop.problem, *at[1:])) > 0.05
    cm.check_local(split.rule, split.problem, params, split.meta_params, task)  # or raises


def test_what_does_not_fit_is_said_at_trace_time():
    params, (x, y) = network(0), data(2)
    hopfield, coding = local_learners.EquilibriumPropagation(), local_learners.PredictiveCoding()
    with pytest.raises(ValueError, match='each with "kernel" and "bias" and nothing else'):
        jax.eval_shape(hopfield.apply, architectures.with_gains(params), x)
    with pytest.raises(ValueError, match="hidden_0 follows on 2 units"):
        jax.eval_shape(coding.apply, params, y)
    feedback = local_learners.random_feedback(jax.random.key(0), params)
    with pytest.raises(ValueError, match="feedback for every layer but the first"):
        local_learners.FeedbackAlignment({"readout": feedback["readout"]}).apply(params, x)
    with pytest.raises(ValueError, match="feedback of readout must have the shape of its kernel"):
        local_learners.FeedbackAlignment({**feedback, "readout": feedback["readout"].T}).apply(params, x)
    weights, spikes, _ = spiking(1)
    with pytest.raises(ValueError, match="expected params of shapes"):
        local_learners.EProp().apply({**weights, "input": weights["input"].T}, spikes)
    with pytest.raises(ValueError, match="feedback of the shape of the readout"):
        local_learners.EProp(feedback=jnp.ones((2, 5))).apply(weights, spikes)
    with pytest.raises(TypeError, match="inputs of a floating dtype; got bool"):
        local_learners.EProp().apply(weights, spikes > 0)
    # A rule that listens hears nothing in a network that does not transmit, and is told so.
    split = architectures.fast_head(hopfield.apply, squared_error, params)
    at = split.problem, split.problem.init_params(split.meta_params, SplitData(x, y, x, y)), split.meta_params
    with pytest.raises(TypeError, match="hears only what goes through `transmit`"):
        split.rule.statistic(*at, SplitData(x, y, x, y), 0.1)
