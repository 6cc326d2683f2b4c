"""Problems in two stages: the same meta-gradients as in one, the first stage evaluated once for each task."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, problems
from tests.oracles import relative_error

STEPS = cm.OptaxDescent(optax.sgd(0.2), num_steps=30)
ESTIMATORS: dict[str, cm.MetaGradientEstimator] = {
    "contrast": cm.Contrastive(cm.LBFGS()),
    "as published": cm.Contrastive(STEPS, STEPS, cm.central_difference(0.03), cm.LossNudge()),
    "implicit": cm.ImplicitDifferentiation(cm.LBFGS(), cm.ConjugateGradient()),
    "backprop": cm.BackpropThroughLearning(STEPS),
}


def squared(y: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(y - target)) / 2


def features(body: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ body)


def tasks(num: int = 3) -> problems.SplitData:
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (num, 6, 3), (num, 6, 2), (num, 5, 3), (num, 5, 2)
    return problems.SplitData(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))


def first(batch: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], batch)


def split(counter: list[int] | None = None) -> architectures.Architecture:
    def counted(body: Any, x: jax.Array) -> jax.Array:
        if counter is not None:
            jax.debug.callback(lambda: counter.append(1))
        return features(body, x)

    body = jax.random.normal(jax.random.key(0), (3, 4)) / 2
    return architectures.fast_head_on_features(counted, squared, body, 2, strength=1.0)


def in_one_stage() -> cm.BilevelProblem:
    """The same problem, written out."""

    def inner(p: Any, meta: Any, task: problems.SplitData) -> jax.Array:
        y = features(meta["slow"], task.x_train) @ p["kernel"] + p["bias"]
        return squared(y, task.y_train) + (jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"] ** 2)) / 2

    def outer(p: Any, meta: Any, task: problems.SplitData) -> jax.Array:
        return squared(features(meta["slow"], task.x_val) @ p["kernel"] + p["bias"], task.y_val)

    return cm.BilevelProblem(inner, outer, lambda meta, task: {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)})


def exact(meta_params: Any, task: problems.SplitData) -> Any:
    """Backprop through the solution of the normal equations."""

    def loss(meta: Any) -> jax.Array:
        seen = features(meta["slow"], task.x_train)
        z = jnp.concatenate([seen, jnp.ones((len(seen), 1))], axis=1)
        w = jnp.linalg.solve(z.T @ z + jnp.eye(5), z.T @ task.y_train)
        judged = features(meta["slow"], task.x_val)
        return squared(judged @ w[:4] + w[4], task.y_val)

    return jax.grad(loss)(meta_params)


@pytest.mark.parametrize("name", ["as published", "backprop"])
def test_two_stages_give_the_meta_gradient_of_one(name: str) -> None:
    """What an unfinished learner makes of it is the same as well, to rounding divided by the strength of the nudge."""
    estimator, two = ESTIMATORS[name], split()
    found = [
        jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True))(two.meta_params, tasks())
        for problem in (two.problem, in_one_stage())
    ]
    ((value, told), grad), ((expected_value, plain), expected) = found
    assert relative_error(grad, expected) < 1e-10
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    np.testing.assert_array_equal(told.status, plain.status)
    assert told.status.shape == (3,)


@pytest.mark.parametrize("name", ["contrast", "implicit"])
def test_batches_have_the_meta_gradient_of_the_closed_form(name: str) -> None:
    two = split()
    (_, told), grad = jax.jit(cm.value_and_meta_grad(two.problem, ESTIMATORS[name], has_aux=True))(
        two.meta_params, tasks()
    )
    cm.raise_if_failed(told)
    # The learner's tolerance is 1e-6; the contrast's base point is refined, implicit differentiation is at its end.
    limit = {"contrast": 1e-9, "implicit": 1e-5}[name]
    mean = jax.tree.map(lambda g: g.mean(0), jax.vmap(exact, (None, 0))(two.meta_params, tasks()))
    assert relative_error(grad, mean) < limit


def test_the_first_stage_runs_once_forward_for_each_task() -> None:
    """A callback counts: of all tasks at once, examples to learn from and examples to judge by, whatever the steps."""
    count: list[int] = []
    two = split(count)
    step = jax.jit(cm.value_and_meta_grad(two.problem, ESTIMATORS["as published"]))
    jax.block_until_ready(step(two.meta_params, tasks()))
    jax.effects_barrier()
    assert len(count) == 2


def test_what_does_not_fit_is_refused() -> None:
    rest = cm.BilevelProblem(
        lambda w, z, task: jnp.sum((w - z) ** 2), lambda w, z, task: jnp.sum(w), lambda z, task: jnp.zeros_like(z),
        sample=lambda key, task, step: task,
    )  # fmt: skip
    with pytest.raises(ValueError, match="without `sample`"):
        cm.in_two_stages(lambda theta, task: theta, rest)
    with pytest.raises(TypeError, match="`prepare` must be a function"):
        cm.in_two_stages(jnp.ones(2), in_one_stage())  # type: ignore[arg-type]
    plain = cm.BilevelProblem(rest.inner_loss, rest.outer_loss, rest.init_params)
    whole = cm.in_two_stages(lambda theta, task: jnp.arange(2), plain)
    with pytest.raises(TypeError, match="`prepare` must return"):
        ESTIMATORS["contrast"].estimate(whole, jnp.ones(2), None)
    # A rule for the meta-parameters, where the contrast is one of features.
    wrong = cm.Contrastive(cm.LBFGS(), rule=cm.ByGroup({"slow": cm.Autodiff()}))
    with pytest.raises((ValueError, TypeError, KeyError)):
        wrong.estimate(split().problem, split().meta_params, first(tasks()))


def test_outer_loss_has_the_derivative_of_the_whole() -> None:
    two, task = split(), first(tasks())
    grad = jax.grad(lambda meta: ESTIMATORS["contrast"].estimate(two.problem, meta, task).outer_loss)(two.meta_params)
    assert relative_error(grad, exact(two.meta_params, task)) < 1e-9
