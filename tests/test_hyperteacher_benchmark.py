"""The hyperteacher in small: its learner, its measures of what was found, and the shape of its records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.composition.hyperteacher import SMOKE, Evaluation
from benchmarks.composition.hyperteacher_networks import modules, network, newton_learner, problem, sampler
from benchmarks.composition.hyperteacher_rivals import ANIL, Rates, Rival
from benchmarks.composition.hyperteacher_supports import (
    NUM_MODULES,
    RING,
    SUPPORTS,
    UNSEEN,
    combinations_of,
    draw_weights,
)
from contrastive_meta.architectures import mlp_params

SIZES = SMOKE._replace(num_tests=24, num_examples=48)


def teacher_of(seed: int) -> jax.Array:
    return modules(jax.random.key(seed), 8)


def test_the_learner_finds_the_weights_of_a_teacher_of_its_own() -> None:
    teacher = teacher_of(0)
    tasks = sampler(8, 96, joint=False)(jax.random.key(1), {"teacher": teacher, "support": SUPPORTS[RING].to_sample()})
    of, learner = problem(), newton_learner(20)

    @jax.jit
    @jax.vmap
    def found(task: dict[str, jax.Array]) -> jax.Array:
        start = of.init_params(teacher, task)
        return learner.solve(lambda z: of.inner_loss(z, teacher, task), start).params

    np.testing.assert_allclose(found(tasks), tasks["weights"], atol=1e-6)
    # The network by hand.
    x, z = np.asarray(tasks["x"][0]), np.asarray(tasks["weights"][0])
    hidden = np.maximum(x @ np.tensordot(z, np.asarray(teacher), axes=1), 0)
    np.testing.assert_allclose(
        network(teacher, tasks["weights"][0], tasks["x"][0]), hidden[:, :4] + hidden[:, 4:], 1e-6
    )


def test_a_teacher_under_a_linear_map_and_a_permutation_is_found_and_another_is_not() -> None:
    teacher, random = teacher_of(0), np.random.default_rng(0)
    mixing = np.eye(NUM_MODULES) + 0.3 * random.normal(size=(NUM_MODULES, NUM_MODULES))
    # Units 0 and 4 are read out together, and so may change places.
    student = jnp.asarray(np.tensordot(mixing, np.asarray(teacher), axes=1)[:, :, [4, 1, 2, 3, 0, 5, 6, 7]])
    tests = Evaluation(SIZES, teacher, {})
    assert tests.errors(student, UNSEEN) < 1e-9
    found = tests.alignment(student, SUPPORTS[RING])
    assert found.worst == pytest.approx(1.0, abs=1e-6)
    assert found.decodability == pytest.approx(1.0, abs=1e-6)
    assert np.argmax(found.similarities, 1).tolist() == [4, 1, 2, 3, 0, 5, 6, 7]
    assert tests.alignment(teacher_of(1), SUPPORTS[RING]).worst < 0.9
    assert tests.errors(teacher_of(1), UNSEEN) > 0.1


def test_tasks_are_made_of_the_combinations_of_their_support() -> None:
    for support in (*SUPPORTS.values(), UNSEEN, combinations_of(3)):
        weights = np.asarray(draw_weights(jax.random.key(0), support.to_sample(), 200))
        met = {tuple(np.flatnonzero(row).tolist()) for row in weights}
        assert met == set(support.combinations)
        if support.drawn:
            assert weights[weights != 0].min() >= 0.5
            assert weights.max() <= 1
        else:
            np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


def test_anil_is_scored_after_ten_steps_of_adam_in_its_readout() -> None:
    rival = Rival(ANIL, (1, 2), 24, 3, Rates(0.2, 0.0))
    teacher, meta_params = teacher_of(0), rival.of_seed(1).meta_params
    data = {"teacher": teacher, "support": UNSEEN.to_sample()}
    tasks = jax.tree.map(np.asarray, sampler(3, 24, joint=False)(jax.random.key(17), data))
    # ANIL starts at the network that `mlp_params` draws.
    network = jax.tree.map(np.asarray, mlp_params(jax.random.key(1), (8, 64, 64, 4)))

    def features(x: np.ndarray) -> np.ndarray:
        for layer in (network["hidden_0"], network["hidden_1"]):
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        return np.column_stack([x, np.ones(len(x))])

    errors = []
    for k in range(3):
        h, y = features(tasks["x"][k]), tasks["y"][k]
        readout = np.vstack([network["readout"]["kernel"], network["readout"]["bias"]])
        first = second = np.zeros_like(readout)
        for step in range(1, 11):
            slope = 2 * h.T @ (h @ readout - y) / (y.size * y.var())
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            scale = np.sqrt(second / (1 - 0.999**step) + 1e-8) + 1e-8
            readout = readout - 0.2 * first / (1 - 0.9**step) / scale
        missed = features(tasks["x_query"][k]) @ readout - tasks["y_query"][k]
        errors.append(np.mean(missed**2) / tasks["y_query"][k].var())
    assert rival.errors(meta_params, teacher, UNSEEN) == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_learner_by_gradients_comes_closer_than_one_by_losses_that_round() -> None:
    # A loss whose smallest value is large beside its differences, in float32.
    def loss(z: jax.Array) -> jax.Array:
        return 1 + jnp.sum(jnp.arange(1.0, 3.0) * (jnp.sqrt(1 + (z - 1) ** 2) - 1))

    @jax.jit
    def distances_from(start: jax.Array) -> list[jax.Array]:
        ends = [newton_learner(12, level).solve(loss, start).params for level in (0.0, 1e-4)]
        return [jnp.linalg.norm(end - 1) for end in ends]

    distances = distances_from(jnp.array([1.5, 0.4]))
    assert distances[1] < 1e-6
    assert distances[0] > 10 * distances[1]
