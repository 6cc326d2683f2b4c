"""Local rules measure the derivative of the nudged loss, give the exact meta-gradient, and keep to themselves."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures
from contrastive_meta.problems import SplitData
from tests.oracles import ALONE, cast, relative_error

SIZES = (3, 4, 2)


def squared_error(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def network(key, sizes, kind):
    """A network that has what the architecture needs."""
    first, second = jax.random.split(key)
    params = architectures.mlp_params(first, (sizes[0] + 2 * (kind == "context"), *sizes[1:]), jnp.float64)
    if kind == "gains":
        return architectures.with_gains(params)
    if kind == "context":
        return architectures.with_context(params, 2)
    return architectures.with_modules(params, 3, second) if kind == "modules" else params


def random_mask(key, params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def architecture(name: str, key: Any, sizes: tuple[int, ...] = SIZES, strength: float = 0.5) -> Any:
    """One of the architectures around a small network."""
    loss = squared_error
    if name == "shared strengths":
        anchored = architectures.complex_synapse(architectures.mlp, loss, network(key, sizes, ""))
        meta = {**anchored.meta_params, "log_strength": jnp.log(jnp.asarray(strength))}
        return anchored._replace(meta_params=meta)
    if name == "decay":
        # The strength itself, one for kernel and bias; the anchor is 0 and not learned. One layer: decay draws the
        # hidden units of two to each other, and learning never ends.
        anchored = architectures.complex_synapse(architectures.mlp, loss, network(key, (sizes[0], sizes[-1]), ""))
        params, strengths = anchored.meta_params["anchor"], {"readout": jnp.asarray(strength)}
        problem = cm.BilevelProblem(anchored.problem.inner_loss, anchored.problem.outer_loss, lambda meta, task: params)
        return anchored._replace(problem=problem, meta_params={"strength": strengths})
    if name == "mask":
        params = network(key, sizes, "")
        mask = random_mask(jax.random.fold_in(key, 1), params)
        return architectures.plasticity_mask(architectures.mlp, loss, params, mask, strength)
    make, kind = {
        "learned initialisation": (architectures.learned_initialisation, ""),
        "complex synapse": (architectures.complex_synapse, ""),
        "gain modulation": (architectures.gain_modulation, "gains"),
        "fast head": (architectures.fast_head, ""),
        "context": (architectures.context_parameters, "context"),
        "modules": (architectures.modular_hypernetwork, "modules"),
    }[name]
    return make(architectures.mlp, loss, network(key, sizes, kind), strength)


NAMES = (
    "learned initialisation", "complex synapse", "shared strengths", "decay", "gain modulation", "fast head", "context",
    "modules", "mask",
)  # fmt: skip


def random_task(key, sizes=SIZES, num=(7, 5)):
    keys = jax.random.split(key, 4)
    shapes = [(num[0], sizes[0]), (num[0], sizes[-1]), (num[1], sizes[0]), (num[1], sizes[-1])]
    return SplitData(*(jax.random.normal(k, shape, jnp.float64) for k, shape in zip(keys, shapes, strict=True)))


def moved(key, params, by=0.3):
    """Every entry its own value: symmetric ones would hide a permuted statistic."""
    return jax.tree.map(lambda x, noise: x + by * noise, params, random_mask(key, params))


# Compilation is what it costs: no shrinking.
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    num=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    beta=st.floats(-0.5, 0.5),
)
@pytest.mark.parametrize("name", NAMES)
def test_the_statistic_is_the_derivative_of_the_nudged_loss(name, seed, sizes, num, beta):
    keys = jax.random.split(jax.random.key(seed), 5)
    split, task = architecture(name, keys[0], sizes), random_task(keys[1], sizes, num)
    meta_params = moved(keys[2], split.meta_params)
    params = moved(keys[3], split.problem.init_params(meta_params, task))
    # Phases may be nudged by the outer loss or by its linearisation at another point.
    base = moved(keys[4], params)
    outer_grad = jax.grad(split.problem.outer_loss)(base, meta_params, task)

    @jax.jit
    def statistics(base, outer_grad, params, meta_params, task, beta):
        kinds = (cm.LossNudge(), cm.LinearNudge())
        nudges = [kind.apply(split.problem, base, meta_params, task, outer_grad) for kind in kinds]
        return [
            [rule.statistic(nudged, params, meta_params, task, beta) for nudged in nudges]
            for rule in (split.rule, cm.Autodiff())
        ]

    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        measured = statistics(*cast((base, outer_grad, params, meta_params, task, jnp.asarray(beta)), dtype))
        for got, expected in zip(*measured, strict=True):
            assert {x.dtype for x in jax.tree.leaves((got, expected))} == {jnp.dtype(dtype)}
            assert relative_error(got, expected) < tolerance


# Curvatures lie between 0.2 and 5: converged to rounding, and soon compiled.
LEARNER = cm.OptaxDescent(optax.sgd(0.2), num_steps=1000)
EXACT = ("complex synapse", "decay", "gain modulation", "fast head", "context", "modules")
# By the fast nudged learner every rule; by the learner itself, run again, one of each kind: it compiles longest.
CASES = [*((name, ALONE) for name in EXACT), ("complex synapse", LEARNER), ("gain modulation", LEARNER)]


@functools.cache
def exact_case(name):
    """An architecture, meta-parameters off their symmetric start, a task, and the exact meta-gradient there."""
    key = jax.random.key(EXACT.index(name))
    split, task = architecture(name, key), random_task(jax.random.fold_in(key, 1))
    meta_params = moved(jax.random.fold_in(key, 2), split.meta_params, by=0.1)
    exact = cm.ImplicitDifferentiation(LEARNER, cm.DenseInverse()).estimate(split.problem, meta_params, task)
    cm.raise_if_failed(exact)
    return split, meta_params, task, exact.grad


@pytest.mark.parametrize(("name", "nudged_solver"), CASES)
def test_the_meta_gradient_is_the_exact_one(name, nudged_solver):
    split, meta_params, task, exact = exact_case(name)
    # Truncation goes as beta^4: 3e-6 at 1e-2, measured, and 2e-8 here.
    scheme = cm.relative(cm.central_difference) if nudged_solver is ALONE else cm.four_point(3e-3)
    estimator = cm.Contrastive(LEARNER, nudged_solver, scheme, rule=split.rule, estimate_error=False)
    result = estimator.estimate(split.problem, meta_params, task)
    cm.raise_if_failed(result)
    assert relative_error(result.grad, exact) < 1e-6


def test_complex_phases_hear_complex_signals():
    split, meta_params, task, exact = exact_case("gain modulation")
    scheme = cm.complex_step(1e-20)
    estimator = cm.Contrastive(LEARNER, ALONE, scheme, rule=split.rule, estimate_error=False)
    result = estimator.estimate(split.problem, meta_params, task)
    assert relative_error(result.grad, exact) < 1e-6


def test_gain_modulation_contains_the_direct_term():
    """Slow weights enter the outer loss too: without dL_out/dW the meta-gradient is far off."""
    split, task = architecture("gain modulation", jax.random.key(3)), random_task(jax.random.key(4))
    params = moved(jax.random.key(5), split.meta_params["fast"]["anchor"])
    direct = jax.grad(split.problem.outer_loss, argnums=1)(params, split.meta_params, task)["slow"]
    at = (params, split.meta_params, task)
    # At fixed params the contrast of a forward pair is the direct term alone.
    nudged, free = (split.rule.statistic(split.problem, *at, beta)["slow"] for beta in (0.5, 0.0))
    contrast = jax.tree.map(lambda a, b: (a - b) / 0.5, nudged, free)
    assert relative_error(contrast, direct) < 1e-12
    assert all(float(jnp.max(jnp.abs(leaf))) > 1e-3 for leaf in jax.tree.leaves(direct))


def test_gain_modulation_is_an_outer_product_of_error_and_activity():
    """The rule of the literature, written out for one layer: (delta * gain) x^T."""
    rule, key = cm.GainModulation(), jax.random.split(jax.random.key(0), 6)
    shapes = [(3, 2), (2,), (2,), (2,), (7, 3), (7, 2)]
    kernel, bias, gain, shift, x, y = (jax.random.normal(k, s) for k, s in zip(key, shapes, strict=True))
    problem = cm.BilevelProblem(
        lambda fast, slow, task: jnp.sum(jnp.square(rule.layer(fast, slow, task[0]) - task[1])) / 2,
        lambda fast, slow, task: jnp.zeros(()),
        lambda slow, task: {"gain": gain, "shift": shift},
    )
    got = rule.statistic(problem, {"gain": gain, "shift": shift}, {"kernel": kernel, "bias": bias}, (x, y), 0.3)
    h = np.tanh(gain * (x @ kernel + bias) + shift)
    error = (h - y) * (1 - h**2) * gain
    expected = {"kernel": sum(np.outer(x[t], error[t]) for t in range(7)), "bias": error.sum(axis=0)}
    assert relative_error(got, expected) < 1e-13


def test_energy_and_statistic_agree():
    """Earlier code learned with twice the energy it measured: finite differences of the energy see a factor of 2."""
    params = moved(jax.random.key(0), {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, by=1.0)
    meta = {"anchor": moved(jax.random.key(1), params), "log_strength": moved(jax.random.key(2), params)}
    rule, step = cm.AnchoredSynapse(), 1e-6
    statistic = rule.measure(params, meta, ())
    leaves, structure = jax.tree.flatten(meta)
    for number, leaf in enumerate(leaves):
        for index in np.ndindex(leaf.shape):

            def energy(by, number=number, index=index):
                shifted = [x.at[index].add(by) if k == number else x for k, x in enumerate(leaves)]
                return rule.energy(params, structure.unflatten(shifted))

            slope = (energy(step) - energy(-step)) / (2 * step)
            assert np.isclose(jax.tree.leaves(statistic)[number][index], slope, rtol=1e-6, atol=1e-8)


def test_learner_energy_and_meta_gradient_agree():
    """The solution is (t + lambda omega) / (1 + lambda): a factor of 2 between energy and statistic would show."""
    rule = cm.AnchoredSynapse()
    problem = cm.BilevelProblem(
        lambda w, meta, t: jnp.sum(jnp.square(w - t)) / 2 + rule.energy(w, meta),
        lambda w, meta, t: jnp.sum(jnp.square(w - 1)) / 2,
        lambda meta, t: meta["anchor"],
    )
    strength, anchor, t = jnp.array([0.5, 2.0]), jnp.array([0.3, -0.2]), jnp.array([4.0, 6.0])
    meta_params = {"anchor": anchor, "strength": strength}
    grad = cm.Contrastive(LEARNER, ALONE, rule=rule, estimate_error=False).estimate(problem, meta_params, t).grad
    w = (t + strength * anchor) / (1 + strength)
    expected = {
        "anchor": (w - 1) * strength / (1 + strength),
        "strength": (w - 1) * (anchor - t) / (1 + strength) ** 2,
    }
    assert relative_error(grad, expected) < 1e-8


def test_a_synapse_moves_its_own_update_only():
    params = moved(jax.random.key(0), {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, by=1.0)
    meta = {"anchor": moved(jax.random.key(1), params), "log_strength": moved(jax.random.key(2), params)}
    rule = cm.AnchoredSynapse()
    before = rule.measure(params, meta, ())
    for name, index in [("a", (1, 2)), ("a", (0, 0)), ("b", (1,))]:
        after = rule.measure({**params, name: params[name].at[index].add(0.5)}, meta, ())
        for kind in ("anchor", "log_strength"):
            changed = {leaf: np.argwhere(np.asarray(before[kind][leaf] != after[kind][leaf])) for leaf in params}
            assert changed.pop(name).tolist() == [list(index)]
            assert all(len(others) == 0 for others in changed.values())


@pytest.mark.parametrize("name", ["gain modulation", "modules"])
def test_a_neuron_moves_the_updates_of_its_own_synapses_only(name):
    split, task = architecture(name, jax.random.key(0), (3, 4, 2)), random_task(jax.random.key(1), (3, 4, 2))
    rule, slow = split.rule.rules["slow"], split.meta_params["slow"]
    _, problem, _ = split.rule.parts(split.problem, split.meta_params)["slow"]
    params = split.meta_params["fast"]["anchor"]
    signals = rule.signals(problem, params, slow, task, 0.3)
    leaf = "hidden_0/bank" if name == "modules" else "hidden_0/kernel"
    before = rule.measure(params, slow, signals)
    message, *others = signals[leaf]
    # Once for the data to learn from, once for those to judge by.
    assert len(others) == 1
    for heard, signal in enumerate(message.heard):
        for axis in (axis for axis in signal.axes if axis is not None):
            k = signal.axes.index(axis)
            louder = signal.value.at[(slice(None),) * k + (1,)].add(0.7)
            spoken = [*message.heard[:heard], cm.Signal(louder, signal.axes), *message.heard[heard + 1 :]]
            moved_signals = {**signals, leaf: (type(message)(tuple(spoken), message.synapses), *others)}
            after = rule.measure(params, slow, moved_signals)
            changed = np.moveaxis(np.asarray(before[leaf] != after[leaf]), axis, 0)
            assert changed[1].any()
            assert not np.delete(changed, 1, axis=0).any()
            assert all(np.array_equal(before[other], after[other]) for other in slow if other != leaf)


@pytest.mark.parametrize("scheme", [cm.central_difference(1e-2), cm.forward_difference(1e-2), cm.four_point(1e-2)])
def test_phase_by_phase_is_the_same_contrast(scheme):
    """One running number for each synapse, and the phases forgotten: to the last digits of what is subtracted."""
    split, task = architecture("gain modulation", jax.random.key(0)), random_task(jax.random.key(1))
    start = split.meta_params["fast"]["anchor"]
    ends = [moved(jax.random.key(k), start, by=1e-2) for k in range(len(scheme.nudges))]
    at = (split.meta_params, task)
    batch = scheme.contrast(
        jax.tree.map(
            lambda *xs: jnp.stack(xs),
            *(
                split.rule.statistic(split.problem, end, *at, beta)
                for end, beta in zip(ends, scheme.nudges, strict=True)
            ),
        )
    )
    online = cm.OnlineContrast(scheme, split.rule)
    trace = online.begin(split.meta_params)
    for phase, end in enumerate(ends):
        trace = online.accumulate(trace, phase, split.problem, end, *at)
        # What is carried is as much as the meta-parameters, whatever came before.
        assert jax.tree.map(jnp.shape, trace.total) == jax.tree.map(jnp.shape, split.meta_params)
    assert relative_error(online.finish(trace), batch) < 1e-13


def test_the_mask_is_that_of_sparse_maml():
    """dL_out/dm = -(alpha / 2) grad L_out(w_T) * sum_t grad L_in(w_t), weights descending z * grad L_in."""
    split, task = architecture("mask", jax.random.key(0), strength=0.0), random_task(jax.random.key(1))
    alpha, steps = 0.1, 7
    solver = cm.OptaxDescent(optax.sgd(alpha), num_steps=steps)
    result = cm.FirstOrder(solver).estimate(split.problem, split.meta_params, task)

    start, mask = split.meta_params["start"], split.meta_params["mask"]
    weights, total = start, jax.tree.map(jnp.zeros_like, start)
    for _ in range(steps):
        grad = jax.grad(lambda w: squared_error(architectures.mlp(w, task.x_train), task.y_train))(weights)
        total = jax.tree.map(jnp.add, total, grad)
        weights = jax.tree.map(lambda w, m, g: w - alpha * (m > 0) * g, weights, mask, grad)
    outer = jax.grad(lambda w: squared_error(architectures.mlp(w, task.x_val), task.y_val))(weights)
    assert relative_error(split.weights(result.params, split.meta_params), weights) < 1e-12
    expected = jax.tree.map(lambda v, g: -(alpha / 2) * v * g, outer, total)
    assert relative_error(result.grad["mask"], expected) < 1e-12
    # Closed synapses too.
    assert all(float(jnp.min(jnp.abs(leaf[mask[name]["kernel"] < 0]))) > 0 for name, leaf in (
        (name, result.grad["mask"][name]["kernel"]) for name in mask
    ))  # fmt: skip


def test_a_graded_mask_has_the_exact_meta_gradient_where_it_is_open():
    """With w - omega for params and 1/2 strength (w - omega)^2 / z for energy it is an ordinary problem."""
    key, loss = jax.random.key(0), squared_error
    network_, task = network(key, SIZES, ""), random_task(jax.random.key(1))
    mask = jax.tree.map(lambda x: 0.2 + jnp.abs(x), random_mask(jax.random.key(2), network_))
    split = architectures.plasticity_mask(architectures.mlp, loss, network_, mask, 0.5, graded=True)
    solver = cm.OptaxDescent(optax.sgd(0.2), num_steps=2000)
    scheme = cm.central_difference(1e-3)
    # Learning follows no gradient here, but what the fast learner is judged by, its residual, is the update's own.
    result, by_curvature = (
        cm.Contrastive(solver, nudged, scheme, rule=split.rule, estimate_error=False).estimate(
            split.problem, split.meta_params, task
        )
        for nudged in (solver, ALONE)
    )

    def weights(moves, meta):
        return jax.tree.map(jnp.add, meta["start"], moves)

    def energy(moves, meta):
        terms = jax.tree.map(lambda d, z: jnp.sum(0.5 * d**2 / (2 * z)), moves, meta["mask"])
        return sum(jax.tree.leaves(terms))

    ordinary = cm.BilevelProblem(
        lambda d, meta, t: loss(architectures.mlp(weights(d, meta), t.x_train), t.y_train) + energy(d, meta),
        lambda d, meta, t: loss(architectures.mlp(weights(d, meta), t.x_val), t.y_val),
        lambda meta, t: jax.tree.map(jnp.zeros_like, meta["start"]),
    )
    exact = cm.ImplicitDifferentiation(LEARNER, cm.DenseInverse()).estimate(ordinary, split.meta_params, task)
    # The truncation of beta = 1e-3 is of the order of beta^2.
    assert relative_error(result.grad, exact.grad) < 1e-5
    # It ends at a thousandth of the nudge.
    assert int(by_curvature.diagnostics.status) == cm.Status.CONVERGED
    assert relative_error(by_curvature.grad, exact.grad) < 1e-3


def heard(problem, meta):
    return cm.GainModulation().statistic(problem, jnp.ones(2), meta, jnp.ones((5, 3)), 0.1)


def outer_only(function):
    return cm.BilevelProblem(lambda w, meta, x: jnp.sum(w), function, lambda meta, x: jnp.ones(2))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, meta, x: jnp.sum(meta**2), "another way"),
        (lambda w, meta, x: jnp.sum(x @ meta), "another way"),
        (lambda w, meta, x: jnp.sum(jnp.dot(x, meta)), "another way"),
        (lambda w, meta, x: jnp.sum(meta.T), "another way"),
        (lambda w, meta, x: jnp.sum(jax.vmap(lambda row: cm.transmit(row, meta))(x)), "tell apart"),
        (lambda w, meta, x: jnp.sum(jax.jit(lambda y: cm.transmit(y, meta))(x)), "tell apart"),
        (
            lambda w, meta, x: jax.lax.scan(lambda c, y: (c + jnp.sum(cm.transmit(y, meta)), None), 0.0, x)[0],
            "tell apart",
        ),
    ],
)
def test_what_cannot_be_heard_is_refused_not_missed(loss, message):
    with pytest.raises((TypeError, AttributeError), match=message):
        heard(outer_only(loss), jnp.ones((3, 2)))


def test_a_weight_used_twice_hears_twice():
    """Shared over time, as in a recurrent network: the calls' statistics add up."""

    def loss(w, meta, x):
        return jnp.sum(jnp.tanh(cm.transmit(jnp.tanh(cm.transmit(x, meta)), meta)) ** 2)

    kernel = jax.random.normal(jax.random.key(0), (3, 3))
    got = heard(outer_only(loss), kernel)
    expected = 0.1 * jax.grad(loss, argnums=1)(None, kernel, jnp.ones((5, 3)))
    assert relative_error(got, expected) < 1e-13


def test_wrong_groups_and_names_are_refused():
    rule = cm.ByGroup({"slow": cm.Autodiff()})
    with pytest.raises(ValueError, match="expected meta-parameters in a dictionary with the entries"):
        rule.statistic(outer_only(lambda w, meta, x: jnp.sum(w)), jnp.ones(2), {"fast": jnp.ones(2)}, None, 0.1)
    for meta in ({}, {"weights": jnp.ones(2)}, {"strength": 1.0, "log_strength": 0.0}, jnp.ones(2)):
        with pytest.raises(ValueError, match="one form of strength at most"):
            cm.AnchoredSynapse().energy(jnp.ones(2), meta)
