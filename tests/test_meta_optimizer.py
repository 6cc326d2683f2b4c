"""`meta_gradient` and `meta_optimizer`: the estimator's own numbers, inside optax, jit and scan, at no further cost."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import Status

# Learning w = (support + e^log_decay anchor) / (1 + e^log_decay): curvature 2 at first, a fifth is left by each step.


class Task(NamedTuple):
    support: jax.Array
    query: jax.Array


def inner_loss(w: jax.Array, meta: Any, task: Task) -> jax.Array:
    return jnp.sum((w - task.support) ** 2 + jnp.exp(meta["log_decay"]) * (w - meta["anchor"]) ** 2) / 2


def outer_loss(w: jax.Array, meta: Any, task: Task) -> jax.Array:
    return jnp.sum((w - task.query) ** 2) / 2


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, lambda meta, task: jnp.zeros_like(task.support))
SOLVER = cm.OptaxDescent(optax.sgd(0.4), num_steps=30)
ESTIMATOR = cm.Contrastive(SOLVER, SOLVER, cm.central_difference(1e-3), estimate_error=False)
META = {"anchor": jnp.array([0.5, -1.0]), "log_decay": jnp.zeros(())}
RNG = np.random.default_rng(0)
TASKS = Task(jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=(3, 2))))
NAN = Task(TASKS.support, TASKS.query.at[1].set(jnp.nan))
GOOD = jax.tree.map(lambda x: x[jnp.array([0, 2])], TASKS)
ZEROS = jax.tree.map(jnp.zeros_like, META)


def meta_optimizer(optimizer: Any = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return cm.meta_optimizer(optax.adam(1e-2) if optimizer is None else optimizer, PROBLEM, ESTIMATOR, **settings)


@functools.lru_cache
def by_hand(batch_size: int | None = None) -> Callable[..., Any]:
    return jax.jit(cm.value_and_meta_grad(PROBLEM, ESTIMATOR, batch_size=batch_size, has_aux=True))


def key(number: Any, seed: int = 0) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a: Any, b: Any, rtol: float = 1e-12) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), a, b)


def kinds(state: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)), state)


# --- The numbers are the estimator's.


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_link_gives_what_the_estimator_gives(batch_size: int | None) -> None:
    link = cm.meta_gradient(PROBLEM, ESTIMATOR, batch_size=batch_size)
    grad, state = jax.jit(link.update)(None, link.init(META), META, tasks=TASKS, foo=1.0)
    (value, diagnostics), wanted = by_hand(batch_size)(META, TASKS, key=key(0))
    same(grad, wanted)
    same(state.outer_loss, value)
    assert int(state.diagnostics.num_gradients) == int(jnp.sum(diagnostics.num_gradients))
    for name in ("free_residual", "nudged_residual", "displacement", "status"):
        assert float(getattr(state.diagnostics, name)) == float(jnp.max(getattr(diagnostics, name)))


def test_the_optimizer_is_the_link_and_then_the_optimiser() -> None:
    tx, alone = meta_optimizer(), optax.adam(1e-2)
    state, opt_state, meta = tx.init(META), alone.init(META), META

    def by_hand_step(meta: Any, opt_state: Any, number: jax.Array) -> Any:
        with_aux = cm.value_and_meta_grad(PROBLEM, ESTIMATOR, has_aux=True)
        (value, diagnostics), grad = with_aux(meta, TASKS, key=key(number))
        return *alone.update(grad, opt_state, meta), value, diagnostics

    # One program each: two would round products and sums apart.
    step, hand = jax.jit(lambda state, meta: tx.update(None, state, meta, tasks=TASKS)), jax.jit(by_hand_step)
    for number in range(3):
        updates, state = step(state, meta)
        wanted, opt_state, *_ = hand(meta, opt_state, jnp.int32(number))
        same(updates, wanted)
        same(state.optimizer, opt_state)
        meta = optax.apply_updates(meta, updates)
    assert int(state.meta_gradient.num_updates) == 3


def test_a_gradient_passed_in_is_added() -> None:
    penalty = {"anchor": jnp.array([0.25, 0.5]), "log_decay": jnp.array(-1.0)}
    link = cm.meta_gradient(PROBLEM, ESTIMATOR)
    update = jax.jit(link.update)
    without, _ = update(None, link.init(META), META, tasks=TASKS)
    added, _ = update(penalty, link.init(META), META, tasks=TASKS)
    close(added, jax.tree.map(jnp.add, penalty, without), rtol=1e-15)  # a product and the sum may round once


def test_it_descends_the_mean_outer_loss_in_a_chain() -> None:
    tx = optax.chain(cm.meta_gradient(PROBLEM, ESTIMATOR), optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    updates, _ = jax.jit(tx.update)(None, tx.init(META), META, tasks=TASKS)
    # With e^log_decay = 1 the closed form is dPhi/danchor = mean (w - query) / 2 with w = (support + anchor) / 2.
    missed = (TASKS.support + META["anchor"]) / 2 - TASKS.query
    anchor = jnp.mean(missed, axis=0) / 2
    decay = jnp.mean(jnp.sum(missed * (META["anchor"] - TASKS.support), axis=1)) / 4
    length = jnp.sqrt(jnp.sum(anchor**2) + decay**2)
    assert float(length) > 0.1
    # 0.2^30 is left of learning; the bias of beta = 1e-3 is beta^2.
    close(updates, {"anchor": -0.1 * anchor / length, "log_decay": -0.1 * decay / length}, rtol=1e-5)


def test_minibatches_differ_from_update_to_update_and_with_the_seed() -> None:
    def sample(key: jax.Array, task: Task, step: jax.Array) -> Task:
        return Task(task.support + jax.random.normal(key, (2,)), task.query)

    problem = cm.BilevelProblem(inner_loss, outer_loss, PROBLEM.init_params, sample=sample)

    def grads(**settings: Any) -> Any:
        link = cm.meta_gradient(problem, ESTIMATOR, **settings)
        update, state = jax.jit(link.update), link.init(META)
        first, state = update(None, state, META, tasks=TASKS)
        second, _ = update(None, state, META, tasks=TASKS)
        again, _ = update(None, state, META, tasks=TASKS, key=key(0))
        return first, second, again

    first, second, again = grads()
    same(first, again)
    assert abs(float(first["log_decay"] - second["log_decay"])) > 1e-3
    assert abs(float(first["log_decay"] - grads(seed=1)[0]["log_decay"])) > 1e-3
    hand = jax.jit(cm.value_and_meta_grad(problem, ESTIMATOR))(META, TASKS, key=key(1))[1]
    same(second, hand)


def test_a_warm_start_goes_on_where_the_update_before_ended() -> None:
    """Of the distance to the solution 0.2 is left by every step, so 2 x 30 steps leave what 60 would."""
    short = cm.OptaxDescent(optax.sgd(0.4), num_steps=2)
    estimator = cm.Contrastive(short, short, cm.forward_difference(1e-3), estimate_error=False)
    link = cm.meta_gradient(PROBLEM, estimator, warm_start=TASKS)
    update, state = jax.jit(link.update), link.init(META)
    solution = (TASKS.support + META["anchor"]) / 2
    for number in range(1, 4):
        _, new = update(None, state, META, tasks=TASKS)
        assert kinds(new) == kinds(state)
        state = new
        wanted = solution + 0.2 ** (2 * number) * (0 - solution)
        # Where phases refined the base point, it is that; two steps more at most.
        refined = solution + 0.2 ** (2 * number + 2) * (0 - solution)
        distance = jnp.minimum(jnp.abs(state.inner.params - wanted), jnp.abs(state.inner.params - refined))
        if number == 1:
            assert float(jnp.max(distance)) < 1e-12
    assert float(jnp.max(jnp.abs(state.inner.params - solution))) < 1e-4
    assert np.all(np.asarray(state.inner.beta) == 1e-3)
    with pytest.raises(ValueError, match="expected 3, got 2"):
        link.update(None, state, META, tasks=GOOD)


# --- It costs nothing.


@pytest.mark.parametrize("on_failure", ["keep", "zero"])
def test_no_temporary_memory_beyond_the_state(on_failure: Any) -> None:
    optimizer = optax.adam(1e-2)
    tx = meta_optimizer(on_failure=on_failure)
    state = tx.init(META)

    def hand(number: jax.Array, opt_state: Any, meta: Any, tasks: Task) -> Any:
        with_aux = cm.value_and_meta_grad(PROBLEM, ESTIMATOR, has_aux=True)
        (value, diagnostics), grad = with_aux(meta, tasks, key=key(number))
        return optimizer.update(grad, opt_state, meta), value, diagnostics

    compiled = jax.jit(tx.update).lower(None, state, META, tasks=TASKS).compile()
    reference = jax.jit(hand).lower(jnp.int32(0), state.optimizer, META, TASKS).compile()
    # By hand the diagnostics of every task are returned, and here summed up: they then are temporary.
    of_state = sum(x.nbytes for x in jax.tree.leaves(state))
    of_tasks = sum(3 * x.nbytes for x in jax.tree.leaves(state.meta_gradient.diagnostics))
    limit = reference.memory_analysis().temp_size_in_bytes + of_state + of_tasks
    assert compiled.memory_analysis().temp_size_in_bytes <= limit


def test_compiles_once_and_keeps_dtypes() -> None:
    traces = []

    def counted(w: Any, meta: Any, task: Any) -> jax.Array:
        traces.append(1)
        return inner_loss(w, meta, task)

    meta, tasks = jax.tree.map(lambda x: x.astype(jnp.float32), (META, TASKS))
    problem = cm.BilevelProblem(counted, outer_loss, PROBLEM.init_params)
    tx = cm.meta_optimizer(optax.adam(1e-2), problem, ESTIMATOR, on_failure="skip", warm_start=tasks)
    state = tx.init(meta)
    for update in (jax.jit(tx.update), tx.update):
        updates, new = update(None, state, meta, tasks=tasks)
        assert kinds(new) == kinds(state)
        number = len(traces)
        for _ in range(99 if update is not tx.update else 3):
            updates, new = update(None, new, meta, tasks=tasks)
        assert len(traces) == number
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


# --- Inside other transformations.

LABELS = {"anchor": "one", "log_decay": "two"}


def inside(name: str) -> optax.GradientTransformationExtraArgs:
    tx = meta_optimizer(optax.sgd(1.0))
    two = {"one": tx, "two": meta_optimizer(optax.sgd(2.0))}
    made: dict[str, Callable[[], Any]] = {
        "bare": lambda: tx,
        "masked": lambda: optax.masked(tx, {"anchor": True, "log_decay": False}),
        "mask inside": lambda: meta_optimizer(optax.masked(optax.sgd(1.0), {"anchor": True, "log_decay": False})),
        "multi_transform": lambda: optax.multi_transform(two, LABELS),
        "multi_steps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
        "multi_steps inside": lambda: meta_optimizer(optax.MultiSteps(optax.sgd(1.0), 2)),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 2),
        "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: meta_optimizer(optax.sgd(rate)))(rate=1.0),
    }
    return made[name]()


SCALES = {
    "bare": (-1.0, -1.0),
    "masked": (-1.0, 0.0),
    "multi_transform": (-1.0, -2.0),
    "multi_steps": (-1.0, -1.0),
    "multi_steps inside": (-1.0, -1.0),
    "apply_if_finite": (-1.0, -1.0),
    "inject_hyperparams": (-1.0, -1.0),
    "mask inside": (-1.0, 1.0),  # optax.masked passes on what it hides: the gradient itself
}


@pytest.mark.parametrize("name", SCALES)
def test_inside_other_transformations(name: str) -> None:
    tx = inside(name)
    state = tx.init(META)

    def step(state: Any, _: None) -> Any:
        updates, state = tx.update(ZEROS, state, META, tasks=TASKS, unmasked=META, foo="ignored")
        return state, updates

    after, updates = jax.jit(lambda state: jax.lax.scan(step, state, None, length=2))(state)
    assert kinds(after) == kinds(state)
    _, grad = by_hand()(META, TASKS, key=key(0))
    anchor, decay = SCALES[name]
    wanted = {"anchor": anchor * grad["anchor"], "log_decay": decay * grad["log_decay"]}
    # MultiSteps accumulates in float32 unless told otherwise.
    close(jax.tree.map(lambda x: x[1], updates), wanted, rtol=1e-7 if name == "multi_steps inside" else 1e-12)


def test_apply_if_finite_behind_the_link() -> None:
    tx = optax.chain(cm.meta_gradient(PROBLEM, ESTIMATOR), optax.apply_if_finite(optax.adam(1e-2), 5))
    updates, state = jax.jit(tx.update)(None, tx.init(META), META, tasks=NAN)
    same(updates, ZEROS)
    assert int(state[1].total_notfinite) == 1


def test_an_optimiser_that_looks_at_the_loss() -> None:
    """The Polyak step is value / ||grad||^2 times the gradient."""
    tx = meta_optimizer(optax.polyak_sgd(max_learning_rate=1e6, f_min=0.0))
    updates, _ = jax.jit(tx.update)(None, tx.init(META), META, tasks=TASKS)
    (value, _), grad = by_hand()(META, TASKS, key=key(0))
    squared = sum(jnp.sum(g**2) for g in jax.tree.leaves(grad))
    close(updates, jax.tree.map(lambda g: -value / squared * g, grad))


# --- Failure, and resuming.


@pytest.mark.parametrize("on_failure", ["keep", "zero", "skip"])
def test_a_task_of_nan(on_failure: Any) -> None:
    tx = meta_optimizer(on_failure=on_failure, warm_start=TASKS)
    update = jax.jit(tx.update)
    _, before = update(None, tx.init(META), META, tasks=TASKS)
    updates, state = update(None, before, META, tasks=NAN)
    assert Status(int(state.meta_gradient.diagnostics.status)) == Status.NOT_FINITE
    assert int(state.meta_gradient.num_failed) == 1
    assert int(state.meta_gradient.num_updates) == 2
    if on_failure == "keep":
        assert all(np.any(np.isnan(x)) for x in jax.tree.leaves(updates))
        return
    if on_failure == "skip":
        same(updates, ZEROS)
        same(state.optimizer, before.optimizer)
    if on_failure == "zero":
        (value, _), grad = by_hand()(META, GOOD, key=key(1))
        wanted, opt_state = optax.adam(1e-2).update(grad, before.optimizer, META)
        close((updates, state.optimizer, state.meta_gradient.outer_loss), (wanted, opt_state, value), rtol=1e-9)
    # The tasks after it are as good as ever.
    updates, state = update(None, state, META, tasks=TASKS)
    assert int(state.meta_gradient.num_failed) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state.optimizer)))


def test_where_every_task_fails_nothing_is_left_to_take_the_mean_of() -> None:
    link = cm.meta_gradient(PROBLEM, ESTIMATOR, on_failure="zero")
    grad, state = jax.jit(link.update)(None, link.init(META), META, tasks=jax.tree.map(lambda x: x * jnp.nan, TASKS))
    same(grad, ZEROS)
    assert np.isposinf(state.outer_loss)
    assert int(state.num_failed) == 3


def test_what_is_allowed_is_no_failure() -> None:
    never = cm.OptaxDescent(optax.sgd(1e-3), num_steps=1)
    unfinished = cm.Contrastive(never, never, cm.forward_difference(1e-3), estimate_error=False)
    allowed = (Status.FREE_NOT_CONVERGED, Status.NUDGED_NOT_CONVERGED)
    failures = []
    for settings in ({}, {"allow": allowed}):
        link = cm.meta_gradient(PROBLEM, unfinished, on_failure="zero", **settings)
        grad, state = jax.jit(link.update)(None, link.init(META), META, tasks=TASKS)
        failures.append((int(state.num_failed), bool(np.any(grad["anchor"] != 0))))
    assert failures == [(3, False), (0, True)]


def test_resumed_training_is_bit_identical(tmp_path: Path) -> None:
    tx = meta_optimizer(warm_start=TASKS)
    update = jax.jit(tx.update)

    def step(carry: Any) -> Any:
        updates, state = update(None, carry[1], carry[0], tasks=TASKS)
        return optax.apply_updates(carry[0], updates), state

    carry = step(step((META, tx.init(META))))
    leaves, structure = jax.tree.flatten(carry)
    np.savez(tmp_path / "saved.npz", *leaves)
    with np.load(tmp_path / "saved.npz", allow_pickle=False) as saved:
        resumed = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved.files])
    for _ in range(2):
        carry, resumed = step(carry), step(resumed)
    same(carry, resumed)


# --- What goes wrong before anything runs.


def test_mistakes_are_named() -> None:
    tx = meta_optimizer()
    state = tx.init(META)
    with pytest.raises(ValueError, match="needs `tasks`"):
        tx.update(None, state, META)
    with pytest.raises(ValueError, match=r"needs `params`.*meta-parameters as the third"):
        tx.update(None, state, tasks=TASKS)
    with pytest.raises(ValueError, match="must be a batch"):
        tx.update(None, state, META, tasks=Task(jnp.zeros(()), jnp.zeros(())))
    with pytest.raises(ValueError, match="The gradient passed to `update`"):
        tx.update(META["anchor"], state, META, tasks=TASKS)
    masked = optax.masked(tx, {"anchor": True, "log_decay": False})
    with pytest.raises(ValueError, match=r"hides a part of `meta_params`.*unmasked=meta_params"):
        masked.update(ZEROS, masked.init(META), META, tasks=TASKS)
    with pytest.raises(ValueError, match="`warm_start` needs all meta-parameters"):
        optax.masked(meta_optimizer(warm_start=TASKS), {"anchor": True, "log_decay": False}).init(META)
    with pytest.raises(ValueError, match=r'"keep" or "zero".*`meta_optimizer\(\.\.\., on_failure="skip"\)`'):
        cm.meta_gradient(PROBLEM, ESTIMATOR, on_failure="skip")
    with pytest.raises(ValueError, match="`on_failure` is"):
        meta_optimizer(on_failure="nan")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        meta_optimizer(batch_size=0)
    with pytest.raises(TypeError, match="`optimizer` must be an optax transformation"):
        meta_optimizer(1e-3)
    with pytest.raises(TypeError, match="`estimator` must be an estimator"):
        cm.meta_gradient(PROBLEM, SOLVER)
    with pytest.raises(TypeError, match="expected a BilevelProblem"):
        cm.meta_gradient(inner_loss, ESTIMATOR)
