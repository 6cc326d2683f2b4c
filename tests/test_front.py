"""The front door: means over tasks, in batches of any size and inside optax loops; failures that raise, in words."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import Status

# Learning w = (support + e^log_decay anchor) / (1 + e^log_decay) from tasks that pull in different directions.


class Task(NamedTuple):
    support: jax.Array
    query: jax.Array


def inner_loss(w: jax.Array, meta: Any, task: Task) -> jax.Array:
    return jnp.sum((w - task.support) ** 2 + jnp.exp(meta["log_decay"]) * (w - meta["anchor"]) ** 2) / 2


def outer_loss(w: jax.Array, meta: Any, task: Task) -> jax.Array:
    return jnp.sum((w - task.query) ** 2) / 2


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, lambda meta, task: jnp.zeros_like(task.support))
# The decay starts at 1, curvatures are 2: a step of 0.4 leaves a fifth to learn, 1e-28 of it after 40.
SOLVER = cm.OptaxDescent(optax.sgd(0.4), num_steps=40)
EXACTLY = cm.BackpropThroughLearning(SOLVER)
META = {"anchor": jnp.array([0.5, -1.0]), "log_decay": jnp.zeros(())}
NUM = 7


def tasks(num: int = NUM) -> Task:
    rng = np.random.default_rng(0)
    return Task(jnp.asarray(rng.normal(size=(num, 2))), jnp.asarray(rng.normal(size=(num, 2))))


def answer(batch: Task, meta: Any = META) -> tuple[float, Any]:
    """Mean of the outer losses and of the meta-gradients, in closed form."""
    a, c = float(jnp.exp(meta["log_decay"])), np.asarray(meta["anchor"])
    support, query = np.asarray(batch.support), np.asarray(batch.query)
    w = (support + a * c) / (1 + a)
    missed = w - query
    anchor = missed * a / (1 + a)
    log_decay = np.sum(missed * a * (c - w) / (1 + a), axis=1)
    value = np.mean(np.sum(missed**2, axis=1) / 2)
    return float(value), {"anchor": anchor.mean(axis=0), "log_decay": log_decay.mean()}


def assert_is_answer(got: tuple[Any, Any], batch: Task, rtol: float = 1e-12) -> None:
    value, grad = got
    expected_value, expected = answer(batch)
    assert float(value) == pytest.approx(expected_value, rel=rtol)
    assert jax.tree.structure(grad) == jax.tree.structure(META)
    np.testing.assert_allclose(grad["anchor"], expected["anchor"], rtol=10 * rtol)
    np.testing.assert_allclose(grad["log_decay"], expected["log_decay"], rtol=10 * rtol)


# Seven tasks: at once; one by one; in two that leave one over; in six and one; in seven; in more than there are.
@pytest.mark.parametrize("batch_size", [None, 1, 2, 6, 7, 100])
def test_the_mean_over_tasks(batch_size: int | None) -> None:
    step = jax.jit(cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=batch_size))
    assert_is_answer(step(META, tasks()), tasks())


def test_another_estimator_is_another_object() -> None:
    contrast = cm.Contrastive(SOLVER, scheme=cm.central_difference(1e-3), nudge=cm.LinearNudge())
    # Bias beta^2 times the curvature of the decay's statistic, 1e-7 or so.
    assert_is_answer(jax.jit(cm.value_and_meta_grad(PROBLEM, contrast))(META, tasks()), tasks(), rtol=1e-6)


def test_dtype_is_kept() -> None:
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (META, tasks()))
    for batch_size in (None, 2):
        value, grad = cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=batch_size)(*in_float32)
        assert {leaf.dtype for leaf in jax.tree.leaves((value, grad))} == {jnp.dtype(jnp.float32)}
        assert_is_answer((value, grad), tasks(), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_diagnostics_of_every_task_in_their_order(batch_size: int | None) -> None:
    """Task 4 breaks: its own status says so, and those of its batch do not."""
    broken = tasks()._replace(query=tasks().query.at[4, 0].set(jnp.nan))
    step = jax.jit(cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=batch_size, has_aux=True))
    (value, diagnostics), grad = step(META, broken)
    assert isinstance(diagnostics, cm.Diagnostics)
    assert all(leaf.shape == (NUM,) for leaf in diagnostics)
    assert [Status(int(status)) for status in diagnostics.status] == [
        Status.NOT_FINITE if index == 4 else Status.CONVERGED for index in range(NUM)
    ]
    assert not np.isfinite(value) and not np.all(np.isfinite(grad["anchor"]))
    with pytest.raises(cm.EstimateError, match="NOT_FINITE in 1 of 7 tasks: "):
        cm.raise_if_failed(diagnostics)
    (value, diagnostics), grad = step(META, tasks())
    assert_is_answer((value, grad), tasks())
    cm.raise_if_failed(diagnostics)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_tasks_that_failed_are_left_out_where_wanted(batch_size: int | None) -> None:
    broken = tasks()._replace(query=tasks().query.at[jnp.array([1, 4]), 0].set(jnp.nan))
    step = jax.jit(cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=batch_size, on_failure="zero"))
    rest = jax.tree.map(lambda x: jnp.delete(x, jnp.array([1, 4]), axis=0), broken)
    assert_is_answer(step(META, broken), rest)
    assert_is_answer(step(META, tasks()), tasks())
    value, grad = step(META, jax.tree.map(lambda x: x * jnp.nan, tasks()))
    assert np.isposinf(value) and not any(np.any(leaf) for leaf in jax.tree.leaves(grad))


def test_what_is_allowed_is_no_failure() -> None:
    unfinished = cm.ImplicitDifferentiation(cm.OptaxDescent(optax.sgd(1e-2), num_steps=1), cm.DenseInverse())
    moved = []
    for settings in ({}, {"allow": (Status.FREE_NOT_CONVERGED, Status.APPROXIMATE)}):
        _, grad = jax.jit(cm.value_and_meta_grad(PROBLEM, unfinished, on_failure="zero", **settings))(META, tasks())
        moved.append(bool(np.any(grad["anchor"])))
    assert moved == [False, True]
    with pytest.raises(ValueError, match=r'"keep" or "zero"; got \'skip\''):
        cm.value_and_meta_grad(PROBLEM, EXACTLY, on_failure="skip")  # type: ignore[arg-type]


# Keys.


def noisy(key: jax.Array, task: Task, step: jax.Array) -> Task:
    return task._replace(support=task.support + jax.random.normal(key, task.support.shape))


NOISY = cm.BilevelProblem(inner_loss, outer_loss, PROBLEM.init_params, sample=noisy)


def test_every_task_has_a_key_of_its_own_and_the_batch_size_does_not_change_it() -> None:
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), tasks())

    def values(batch_size: int | None, key: jax.Array | None) -> tuple[float, Any]:
        step = cm.value_and_meta_grad(NOISY, EXACTLY, batch_size=batch_size, has_aux=True)
        (value, diagnostics), _ = step(META, same, key=key)
        return float(value), np.asarray(diagnostics.free_residual)

    value, residuals = values(None, jax.random.key(1))
    # Equal tasks that saw other noise ended elsewhere.
    assert len({round(float(residual), 9) for residual in residuals}) == NUM
    again, same_residuals = values(3, jax.random.key(1))
    assert again == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(same_residuals, residuals, rtol=1e-10)
    assert values(None, jax.random.key(2))[0] != pytest.approx(value, rel=1e-3)
    # No key is the key 0: reproducible.
    assert values(None, None)[0] == values(None, jax.random.key(0))[0] == values(None, None)[0]


# Loops and transformations.


def test_an_optax_loop_under_scan_follows_the_exact_gradients() -> None:
    step = cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=3)
    optimizer = optax.adam(0.1)

    def meta_step(carry: Any, key: jax.Array) -> Any:
        meta, state = carry
        value, grad = step(meta, tasks(), key=key)
        updates, state = optimizer.update(grad, state, meta)
        return (optax.apply_updates(meta, updates), state), value

    keys = jax.random.split(jax.random.key(0), 10)
    (learned, _), values = jax.jit(lambda carry: jax.lax.scan(meta_step, carry, keys))((META, optimizer.init(META)))

    meta, state, expected = META, optimizer.init(META), []
    for _ in keys:
        value, grad = answer(tasks(), meta)
        updates, state = optimizer.update(grad, state, meta)
        meta = optax.apply_updates(meta, updates)
        expected.append(value)
    # The decay grows to e: what is left to learn is then 1e-13.
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    np.testing.assert_allclose(learned["anchor"], meta["anchor"], rtol=1e-9)
    assert values[-1] < values[0]


def test_vmap_over_meta_parameters_is_a_loop() -> None:
    step = cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=2)
    several = jax.tree.map(lambda x: jnp.stack([x, x + 0.3]), META)
    together = jax.jit(jax.vmap(step, in_axes=(0, None)))(several, tasks())
    for index in range(2):
        alone = step(jax.tree.map(lambda x: x[index], several), tasks())  # noqa: B023
        for got, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[index], expected, rtol=1e-12)


def test_new_tasks_do_not_recompile() -> None:
    traces = []

    def counted(w: jax.Array, meta: Any, task: Task) -> jax.Array:
        traces.append(1)
        return inner_loss(w, meta, task)

    problem = cm.BilevelProblem(counted, outer_loss, PROBLEM.init_params)
    step = jax.jit(cm.value_and_meta_grad(problem, EXACTLY, batch_size=3))
    step(META, tasks())
    before = len(traces)
    step(jax.tree.map(lambda x: x + 1, META), Task(*reversed(tasks())), key=jax.random.key(5))
    assert 0 < before == len(traces)


# Tasks of any structure.


def test_tasks_may_be_any_pytree_with_a_leading_axis() -> None:
    """Integers, keys and empty branches among them."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, meta, task: inner_loss(w, meta, task["pair"]) * task["weight"],
        outer_loss=lambda w, meta, task: outer_loss(w, meta, task["pair"]) * (task["weight"] > 0),
        init_params=lambda meta, task: jax.random.normal(task["key"], (2,)),
    )
    batch = {
        "pair": tasks(),
        "weight": jnp.ones(NUM, int),
        "key": jax.random.split(jax.random.key(0), NUM),
        "none": None,
        "empty": ((), {}),
    }
    assert_is_answer(cm.value_and_meta_grad(problem, EXACTLY, batch_size=2)(META, batch), tasks())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Task(jnp.ones((3, 2)), jnp.ones((4, 2))), r"leading axes of lengths \[3, 4\]"),
        (Task(jnp.ones((3, 2)), jnp.ones(())), r"leaves without axes: \.query"),
        ({"a": jnp.ones(3), "b": {"c": 1.0}}, r"leaves without axes: \['b'\]\['c'\]"),
        (None, r"leading axes of lengths \[\]"),
    ],
)
def test_tasks_that_are_no_batch_are_refused(batch: Any, message: str) -> None:
    step = cm.value_and_meta_grad(PROBLEM, EXACTLY)
    with pytest.raises(ValueError, match=rf"`tasks` must be a batch.*{message}.*x\[None\].*`estimator.estimate`"):
        step(META, batch)


def test_a_batch_of_no_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="`tasks` must be a batch"):
        cm.value_and_meta_grad(PROBLEM, EXACTLY)(META, tasks(0))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"`batch_size` must be at least 1; got {batch_size}"):
        cm.value_and_meta_grad(PROBLEM, EXACTLY, batch_size=batch_size)


# Failures that raise.


def diagnostics_with(*statuses: Status) -> cm.Diagnostics:
    """Of a single estimate, or of a batch."""
    numbers = jnp.array([int(status) for status in statuses])
    status = numbers[0] if len(statuses) == 1 else numbers
    nothing = jnp.full(status.shape, jnp.nan)
    return cm.Diagnostics(nothing, nothing, nothing, nothing, status, status, nothing, status)


@pytest.mark.parametrize("status", Status, ids=lambda status: status.name)
def test_every_failure_raises_with_its_remedy(status: Status) -> None:
    if status in (Status.CONVERGED, Status.FELL_BACK, Status.APPROXIMATE):
        cm.raise_if_failed(diagnostics_with(status))
        return
    with pytest.raises(cm.EstimateError) as caught:
        cm.raise_if_failed(diagnostics_with(status))
    assert str(caught.value) == f"{status.name}: {status.describe()}"
    cm.raise_if_failed(diagnostics_with(status), allow=(status,))


def test_the_worst_of_a_batch_is_named_and_the_failed_are_counted() -> None:
    batch = diagnostics_with(
        Status.CONVERGED, Status.LOST_IN_NOISE, Status.APPROXIMATE, Status.DIVERGED, Status.LOST_IN_NOISE
    )
    with pytest.raises(cm.EstimateError, match=r"DIVERGED in 3 of 5 tasks: .*learning rate"):
        cm.raise_if_failed(batch)
    with pytest.raises(cm.EstimateError, match="LOST_IN_NOISE in 2 of 5 tasks"):
        cm.raise_if_failed(batch, allow=(Status.APPROXIMATE, Status.DIVERGED))
    # What is allowed replaces the default, so nothing passes that was not named.
    with pytest.raises(cm.EstimateError, match="APPROXIMATE in 1 of 5 tasks"):
        cm.raise_if_failed(batch, allow=(Status.DIVERGED, Status.LOST_IN_NOISE))
    cm.raise_if_failed(batch, allow=(Status.APPROXIMATE, Status.DIVERGED, Status.LOST_IN_NOISE))


@pytest.mark.parametrize("wrap", [lambda result: result, lambda result: result.diagnostics], ids=["result", "fields"])
def test_results_and_their_diagnostics_are_taken(wrap: Callable[[Any], Any]) -> None:
    one = jax.tree.map(lambda x: x[0], tasks())
    unfinished = cm.ImplicitDifferentiation(cm.OptaxDescent(optax.sgd(0.01), num_steps=3))
    cm.raise_if_failed(wrap(cm.ImplicitDifferentiation(SOLVER).estimate(PROBLEM, META, one)))
    with pytest.raises(cm.EstimateError, match=r"FREE_NOT_CONVERGED: .*more steps"):
        cm.raise_if_failed(wrap(unfinished.estimate(PROBLEM, META, one)))


def test_inside_jit_there_is_nothing_to_raise_on() -> None:
    with pytest.raises(TypeError, match="call it outside jit, or return the status"):
        jax.jit(lambda status: cm.raise_if_failed(diagnostics_with(Status.CONVERGED)._replace(status=status)))(0)
