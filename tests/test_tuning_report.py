"""Watching a run: trajectories, counts and costs are those of the states, and the callback sees every meta-step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

TARGETS = jnp.array([3.0, -2.0])


def inner(w: Any, meta: Any, task: Any) -> Any:
    return 0.5 * jnp.sum((w - TARGETS) ** 2) + 0.5 * jnp.sum(jnp.exp(meta["decay"]) * w**2) + meta["shift"] * w[0]


def outer(w: Any, meta: Any, task: Any) -> Any:
    return 0.5 * jnp.sum((w - task) ** 2)


PROBLEM = cm.BilevelProblem(inner, outer, lambda *_: jnp.zeros(2))
META = {"decay": jnp.array([-2.0, -1.0]), "shift": jnp.array(0.5)}
# Longer than one meta-gradient of the run, shorter than another.
CLIP = 0.7
BAD = 11  # the step whose validation data are not numbers


def tuner(**settings: Any) -> Any:
    settings = {"meta_optimizer": optax.sgd(0.5), "problem": PROBLEM, "init_meta_params": META, "every": 3} | settings
    return cm.tune_while_training(optax.sgd(0.3), **settings)


def trained(tx: Any, tell: Any = None) -> Any:
    """24 steps, 8 of them with a meta-step, and one of these on bad data."""

    def step(carry: Any, index: Any) -> Any:
        w, state = carry
        task = jnp.where(index == BAD, jnp.nan, 1.0) * jnp.ones(2)
        grads = jax.grad(inner)(w, cm.current_meta_params(state), task)
        updates, state = tx.update(grads, state, w, task=task)
        if tell is not None:
            cm.watch(state, tell)
        return (optax.apply_updates(w, updates), state), state

    return jax.jit(lambda: jax.lax.scan(step, (jnp.zeros(2), tx.init(jnp.zeros(2))), jnp.arange(24))[1])()


@pytest.fixture(scope="module")
def ran() -> tuple[Any, list[Any]]:
    history: list[Any] = []
    states = trained(optax.chain(optax.identity(), tuner(clip_norm=CLIP)), history.append)
    jax.effects_barrier()
    return states, history


def test_what_was_refused_and_clipped_is_counted() -> None:
    """Against the run without clipping, one meta-step at a time."""
    # Its state is the sum of the meta-gradients, and nothing moves.
    free = trained(tuner(meta_optimizer=optax.chain(optax.trace(1.0), optax.scale(0.0))))
    trace = free.meta_optimizer[0].trace
    sums = np.concatenate([trace["decay"], trace["shift"][:, None]], axis=1)
    first = np.linalg.norm(sums[2])  # the first meta-gradient, at the same place in every run
    state = trained(tuner(clip_norm=0.9 * float(first), meta_optimizer=optax.sgd(1.0)))
    moved = jnp.concatenate([META["decay"] - state.meta_params["decay"][2], state.meta_params["shift"][2:3] - 0.5])
    np.testing.assert_allclose(np.linalg.norm(moved), 0.9 * first, rtol=1e-12)
    assert int(state.num_clipped[2]) == 1
    # One task of NaN: refused, not clipped, and the other meta-steps are counted by their own statuses.
    assert int(free.num_failed[-1]) == 1 and int(free.num_clipped[-1]) == 0
    counts = free.status_counts[-1]
    assert int(counts[cm.Status.NOT_FINITE]) == 1 and int(counts.sum()) == 8
    seen = free.diagnostics.status[free.waited == 0]
    np.testing.assert_array_equal(counts, np.bincount(seen, minlength=len(cm.Status)))


def test_the_report_is_that_of_the_states(ran: Any) -> None:
    states, _ = ran
    report, tune = cm.tuning_report(states), states[1]
    np.testing.assert_array_equal(report.trajectories["['decay']"], tune.meta_params["decay"])
    assert report.num_meta_steps == 8 and report.failed_share == 1 / 8 and report.statuses["NOT_FINITE"] == 1
    assert 0 < report.num_clipped < 7
    spent = int(tune.num_gradients[-1])
    assert report.cost_share == pytest.approx(spent / (spent + 24))
    last = report.last
    assert last["['decay']/max"] == float(tune.meta_params["decay"][-1].max())
    assert last["['shift']"] == float(tune.meta_params["shift"][-1])
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    assert "8 meta-steps in 24 training steps: " in words and "1 of them (12 %)" in words
    assert all(f"{count} {name}" in words for name, count in report.statuses.items())
    assert f"{spent:,} gradients, {100 * report.cost_share:.0f} % of all" in words
    shift = tune.meta_params["shift"]
    assert f"{shift[0]:.3g}" in text and f"{shift[-1]:.3g}" in text
    assert report.line.startswith("step 24  ") and "status" not in report.line


def test_the_callback_sees_every_meta_step_and_nothing_else(ran: Any) -> None:
    states, history = ran
    assert sorted(int(seen.step) for seen in history) == list(range(3, 25, 3))
    assert all(seen.optimizer == () and seen.memory == () for seen in history)
    whole, thin = cm.tuning_report(states), cm.tuning_report(history[::-1])
    np.testing.assert_array_equal(thin.steps, np.arange(3, 25, 3))
    assert thin.statuses == whole.statuses and thin.num_gradients == whole.num_gradients
    np.testing.assert_array_equal(thin.trajectories["['shift']"], whole.trajectories["['shift']"][2::3])


def test_outside_of_jit_it_is_a_call(ran: Any) -> None:
    states, history = ran
    told: list[Any] = []
    for index in range(24):
        cm.watch(jax.tree.map(lambda x, k=index: x[k], states), told.append)
    assert len(told) == 8
    by_step = {int(seen.step): seen for seen in history}
    for seen in told:
        jax.tree.map(np.testing.assert_array_equal, seen, by_step[int(seen.step)])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_it_can_be_a_call_every_so_many_meta_steps(ran: Any, transform: Any) -> None:
    states, _ = ran
    told: list[Any] = []
    see = transform(lambda state: cm.watch(state, told.append, every=3))
    for index in range(24):
        see(jax.tree.map(lambda x, k=index: x[k], states))
    jax.effects_barrier()
    # A meta-step every third step: the third and the sixth of eight.
    assert [int(seen.step) for seen in told] == [9, 18]
    with pytest.raises(ValueError, match="at least 1 meta-step; got 0"):
        cm.watch(states, told.append, every=0)


def test_several_runs_at_once_are_refused_with_a_remedy(ran: Any) -> None:
    runs = jax.tree.map(lambda x: jnp.stack([x, x]), ran[0])
    with pytest.raises(ValueError, match=r"x\[0\]"):
        cm.tuning_report(runs)


def test_what_still_moves_is_said_to() -> None:
    steps, zero = np.arange(1, 41), np.zeros(40)
    paths = {"drifts": 0.1 * steps, "rests": 1 - 0.5**steps, "fixed": zero, "lost": np.where(steps > 30, np.nan, 1.0)}
    words = str(cm.TuningReport(steps, paths, zero, zero, {"CONVERGED": 40}, 0, 0, 80))
    assert "Not at rest at the end: drifts." in words and "Not finite: lost." in words


@pytest.mark.parametrize("states", [[], optax.EmptyState()])
def test_nothing_to_report_is_refused(states: Any) -> None:
    with pytest.raises(ValueError, match="tuning_report"):
        cm.tuning_report(states)
    with pytest.raises(ValueError, match="clip_norm"):
        tuner(clip_norm=0.0)
