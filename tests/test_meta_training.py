"""The driver for meta-training: it learns, goes on to the bit where it was killed, and stops where it must."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from benchmarks.checkpoints import CheckpointError
from benchmarks.harness import Progress
from benchmarks.meta_training import Budget, Program, State, Told, compiled, outer_step, reason_to_stop, train

KEY = jax.random.key(3)
CENTRE = 2.0
PROBLEM = cm.BilevelProblem(
    inner_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - task) ** 2 + (w - anchor) ** 2),
    outer_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - task) ** 2),
    init_params=lambda anchor, task: jnp.zeros_like(task),
)


def sample(key: jax.Array, centre: jax.Array) -> jax.Array:
    """Tasks are numbers around a centre: w = (task + anchor) / 2, so the best anchor is the centre."""
    return centre + 0.1 * jax.random.normal(key, (4, 3))


def program(rate: float = 0.3) -> tuple[Program, State]:
    # Any estimator does; this one compiles in a second.
    estimator = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.4), num_steps=30))
    transformation = optax.scale_by_adam()
    state = State(jnp.zeros(3), transformation.init(jnp.zeros(3)))
    step = outer_step(PROBLEM, estimator, sample, lambda fraction: rate * (1 - fraction), transformation)
    return compiled(step, state, jnp.array(CENTRE)), state


def run(folder: Path, steps: int, **options: Any) -> Any:
    step, state = program()
    with Progress() as progress:
        return train(
            step, state, KEY, Budget(steps=steps), progress, "test", log=folder / "log.jsonl",
            checkpoint=folder / "run.ckpt", checkpoint_every=4, **options,
        )  # fmt: skip


def test_it_learns_and_logs_every_step(tmp_path: Path) -> None:
    trained = run(tmp_path, 60)
    # Tasks vary by 0.1, four in a batch of which the mean is taken, and Adam averages over steps at a falling rate.
    np.testing.assert_allclose(trained.state.meta_params, CENTRE, atol=0.1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["outer_loss"] for line in lines] == trained.outer_losses
    assert lines[-1]["outer_loss"] < 0.1 * lines[0]["outer_loss"]
    assert trained.statuses == {"CONVERGED": 54 * 4} and trained.passed == 1 and not trained.stopped
    assert [snapshot.step for snapshot in trained.snapshots] == list(range(3, 61, 3))
    assert lines[-1]["gradients"] == trained.snapshots[-1].num_gradients > 60 * 4 * 30


# A process that kills itself in the middle of a step, after it logged some that no checkpoint has.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import conftest, tests.conftest  # compiled as here
    from benchmarks import checkpoints
    from tests import test_meta_training as here

    write, last = checkpoints.Log.write, int(sys.argv[2])

    def write_and_die(self, **fields):
        write(self, **fields)
        if fields["step"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Log.write = write_and_die
    here.run(Path(sys.argv[1]), 20)
"""


def test_killed_at_a_random_step_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 20)
    last = int(np.random.default_rng().integers(5, 20))
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "killed"), str(last)]
    died = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len((tmp_path / "killed/log.jsonl").read_text().splitlines()) == last, "killed elsewhere"
    resumed = run(tmp_path / "killed", 20)
    for ours, theirs in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=f"killed at step {last}")
    assert (tmp_path / "killed/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()
    assert resumed.outer_losses == whole.outer_losses and resumed.statuses == whole.statuses
    for one, other in zip(resumed.snapshots, whole.snapshots, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one.meta_params, other.meta_params)


def test_a_finished_run_is_not_run_again_and_another_is_refused(tmp_path: Path) -> None:
    first = run(tmp_path, 8)
    calls: list[int] = []
    with Progress() as progress:
        again = train(
            Program(lambda *_: calls.append(1), 0.0), program()[1], KEY, Budget(steps=8), progress, "again",
            checkpoint=tmp_path / "run.ckpt",
        )  # fmt: skip
        np.testing.assert_array_equal(again.state.meta_params, first.state.meta_params)
        assert not calls
        other = State(jnp.zeros(5), ())
        with pytest.raises(CheckpointError, match="expected arrays"):
            train(Program(lambda *_: None, 0.0), other, KEY, Budget(8), progress, "", checkpoint=tmp_path / "run.ckpt")


def test_what_diverges_ends_with_its_reason_and_finite_parameters() -> None:
    step, state = program(rate=-0.3)
    with Progress() as progress:
        trained = train(step, state, KEY, Budget(steps=400), progress, "away")
    assert "diverged: mean outer loss" in trained.stopped and len(trained.outer_losses) < 400

    def breaks(state: State, key: jax.Array, fraction: jax.Array, data: Any) -> tuple[State, Told]:
        at = state.meta_params + 1
        told = Told(jnp.where(at > 3, jnp.nan, 1.0), jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32))
        return State(jnp.where(at > 3, state.meta_params, at), ()), told

    first = State(jnp.zeros(()), ())
    with Progress() as progress:
        trained = train(compiled(breaks, first), first, KEY, Budget(steps=9), progress, "broken")
    assert trained.stopped == "the outer loss or its meta-gradient was not finite at step 4"
    assert float(trained.state.meta_params) == 3


SCALED = cm.BilevelProblem(
    lambda w, theta, task: 0.5 * jnp.sum((w - theta * task) ** 2),
    lambda w, theta, task: jnp.sum(w),
    lambda theta, task: jnp.zeros(()),
)


def test_a_meta_gradient_that_is_not_finite_changes_nothing() -> None:
    estimator = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.5), num_steps=2))
    step = outer_step(SCALED, estimator, lambda key, data: data, lambda f: f * 0 + 1, optax.identity())
    state = State(jnp.array(2.0), ())
    after, told = jax.jit(step)(state, KEY, jnp.float32(0), jnp.array([1.0, jnp.inf]))
    assert float(after.meta_params) == 2 and np.isnan(told.outer_loss)


def test_tasks_that_failed_are_left_out_where_wanted() -> None:
    # One step of 1 ends at the minimum.
    estimator = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(1.0), num_steps=1))
    step = outer_step(
        SCALED, estimator, lambda key, data: data, lambda f: f * 0 + 1, optax.identity(), on_failure="zero"
    )
    state = State(jnp.array(2.0), ())
    after, told = jax.jit(step)(state, KEY, jnp.float32(0), jnp.array([1.0, jnp.inf]))
    assert (float(after.meta_params), float(told.outer_loss)) == (1.0, 2.0)
    after, told = jax.jit(step)(state, KEY, jnp.float32(0), jnp.array([jnp.nan, jnp.inf]))
    assert float(after.meta_params) == 2 and np.isposinf(told.outer_loss)


def test_seconds_count_compilation_and_end_the_run() -> None:
    now = [0.0]

    def step(state: State, key: jax.Array, fraction: jax.Array, data: Any) -> tuple[State, Told]:
        now[0] += 1
        return state, Told(jnp.ones(()), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))

    budget = Budget(seconds=10, clock=lambda: now[0])
    with Progress() as progress:
        trained = train(Program(step, 4.0), State(jnp.zeros(()), ()), KEY, budget, progress, "", num_snapshots=5)
    assert len(trained.outer_losses) == 6
    assert [(s.step, s.seconds) for s in trained.snapshots] == [(2, 6.0), (4, 8.0), (6, 10.0)]


def test_reasons_need_a_history() -> None:
    assert not reason_to_stop([1.0] * 50 + [2.9] * 50)
    assert reason_to_stop([1.0] * 50 + [3.1] * 50).startswith("diverged")
    assert not reason_to_stop([1.0] * 50 + [100.0] * 49)
    # No task was left in some steps; that is none.
    assert not reason_to_stop([np.inf] * 50 + [2.9] * 50)
    assert not reason_to_stop([1.0] * 99 + [np.inf])
    assert reason_to_stop([1.0, np.nan])
