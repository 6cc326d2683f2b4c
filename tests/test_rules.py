"""Local rules measure the derivative of the nudged loss, give the exact meta-gradient, and each synapse only its own."""

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
from tests.oracles import cast, relative_error

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
        # The strength itself, one for each layer; the anchor is 0 and not learned.
        anchored = architectures.complex_synapse(architectures.mlp, loss, network(key, sizes, ""))
        params, strengths = anchored.meta_params["anchor"], {"hidden_0": jnp.asarray(0.3), "readout": jnp.asarray(0.6)}
        problem = cm.BilevelProblem(
            anchored.problem.inner_loss, anchored.problem.outer_loss, lambda meta, task: params
        )
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
        nudges = [
            nudge.apply(split.problem, base, meta_params, task, outer_grad) for nudge in (cm.LossNudge(), cm.LinearNudge())
        ]
        return [
            [rule.statistic(nudged, params, meta_params, task, beta) for nudged in nudges]
            for rule in (split.rule, cm.Autodiff())
        ]

    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        measured = statistics(*cast((base, outer_grad, params, meta_params, task, jnp.asarray(beta)), dtype))
        for got, expected in zip(*measured, strict=True):
            assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype == dtype, got, expected))
            assert relative_error(got, expected) < tolerance


EXACT = ("complex synapse", "shared strengths", "decay", "gain modulation", "fast head", "context", "modules")
LEARNER = cm.LBFGS(tol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_the_meta_gradient_is_the_exact_one(name):
    key = jax.random.key(EXACT.index(name))
    split, task = architecture(name, key), random_task(jax.random.fold_in(key, 1))
    meta_params = moved(jax.random.fold_in(key, 2), split.meta_params, by=0.1)
    if name == "decay":
        meta_params = split.meta_params
    exact = cm.ImplicitDifferentiation(LEARNER, cm.DenseInverse()).estimate(split.problem, meta_params, task)
    cm.raise_if_failed(exact)
    for estimator in (
        cm.Contrastive(LEARNER, rule=split.rule),
        cm.Contrastive(LEARNER, nudged_solver=LEARNER, scheme=cm.four_point(1e-2), rule=split.rule),
    ):
        result = estimator.estimate(split.problem, meta_params, task)
        cm.raise_if_failed(result)
        assert relative_error(result.grad, exact.grad) < 1e-6
