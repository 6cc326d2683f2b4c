"""A driver for meta-training: tasks from a key, live losses and statuses, a log, checkpoints, and reasons to stop."""

import collections
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks.checkpoints import Log, load_checkpoint, save_checkpoint
from benchmarks.harness import Progress

# Outer losses are compared over this many steps; the first ones set what is normal.
_WINDOW = 50
# Learning has diverged if the mean loss of a window is this many times that of the first.
_DIVERGED = 3.0
# Statuses that are no failure.
PASSING = frozenset({cm.Status.CONVERGED, cm.Status.FELL_BACK, cm.Status.APPROXIMATE})


class Budget(NamedTuple):
    """When meta-training ends: at the first of these, and it goes through its schedule by the nearest.

    Attributes:
      steps: of the outer optimiser.
      seconds: by the clock, compilation included.
      clock: of the seconds; `time.process_time` where cores are shared with others.
    """

    steps: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.perf_counter

    def fraction(self, steps: int, seconds: float) -> float:
        """How much of it is spent."""
        parts = [(steps, self.steps), (seconds, self.seconds)]
        return max((spent / limit for spent, limit in parts if limit is not None), default=0.0)


class Told(NamedTuple):
    """What an outer step tells: mean outer loss, and of each task the status and the gradients evaluated.

    Gradients are evaluations of a gradient of either loss, Hessian-vector products counted as one more each.
    """

    outer_loss: jax.Array
    status: jax.Array
    num_gradients: jax.Array


class State(NamedTuple):
    """All that an outer step changes."""

    meta_params: Any
    optimizer: Any


class Program(NamedTuple):
    """A compiled outer step.

    Attributes:
      compiled: `(state, key, fraction, data) -> (state, told)`.
      seconds: that it took to compile.
      data: what tasks are sampled from.
    """

    compiled: Callable[[State, jax.Array, jax.Array, Any], tuple[State, Told]]
    seconds: float
    data: Any = ()

    def call(self, state: State, key: jax.Array, fraction: jax.Array) -> tuple[State, Told]:
        """One outer step."""
        return self.compiled(state, key, fraction, self.data)

    def on(self, data: Any) -> "Program":
        """The same step on other data of the same shapes."""
        return self._replace(data=data)


class Snapshot(NamedTuple):
    """Meta-parameters on the way: after so many steps, gradients and seconds, compilation included."""

    step: int
    num_gradients: int
    seconds: float
    meta_params: Any


def least_spent(ends: Iterable[Snapshot]) -> tuple[float, int]:
    """The fewest seconds and the fewest gradients that any run had spent at its end; zeros for no runs."""
    ends = list(ends)
    return min((e.seconds for e in ends), default=0.0), min((e.num_gradients for e in ends), default=0)


def within(snapshots: Sequence[Snapshot], *, seconds: float = math.inf, num_gradients: float = math.inf) -> Snapshot:
    """The last snapshot that took no more than this; the first of all where none did."""
    kept = [s for s in snapshots if s.seconds <= seconds and s.num_gradients <= num_gradients]
    return kept[-1] if kept else snapshots[0]


class Trained(NamedTuple):
    """What came of meta-training.

    Attributes:
      state: at the end.
      snapshots: on the way, the last of them at the end.
      outer_losses: of every step.
      statuses: how many tasks had each, by name, after the first tenth of the steps.
      passed: fraction of those that are no failure.
      stopped: why it ended early; "" where it did not.
    """

    state: State
    snapshots: Sequence[Snapshot]
    outer_losses: Sequence[float]
    statuses: dict[str, int]
    passed: float
    stopped: str


def cosine_decay(rate: float) -> Callable[[jax.Array], jax.Array]:
    """A rate of learning from the fraction of the budget that is spent: a half cosine from `rate` to 0."""
    return lambda fraction: rate * (1 + jnp.cos(jnp.pi * fraction)) / 2


def outer_step(
    problem: cm.BilevelProblem,
    estimator: cm.MetaGradientEstimator,
    sample: Callable[[jax.Array, Any], Any],
    rate: Callable[[jax.Array], jax.Array],
    transformation: optax.GradientTransformation,
    on_failure: Literal["keep", "zero"] = "keep",
) -> Callable[[State, jax.Array, jax.Array, Any], tuple[State, Told]]:
    """An outer step: sample tasks, estimate, update. A meta-gradient that is not finite changes nothing.

    Where no task is left, nothing changes either, and the outer loss that is told is infinite.

    Args:
      problem: of one task.
      estimator: any.
      sample: `(key, data) -> tasks`.
      rate: of learning, from the fraction of the budget that is spent.
      transformation: of the meta-gradient, such as `optax.scale_by_adam()`; the rate comes after it.
      on_failure: see `cm.value_and_meta_grad`.
    """
    value_and_grad = cm.value_and_meta_grad(problem, estimator, has_aux=True, on_failure=on_failure)

    def step(state: State, key: jax.Array, fraction: jax.Array, data: Any) -> tuple[State, Told]:
        of_tasks, of_estimator = jax.random.split(key)
        (value, told), grad = value_and_grad(state.meta_params, sample(of_tasks, data), key=of_estimator)
        direction, memory = transformation.update(grad, state.optimizer, state.meta_params)
        updates = jax.tree.map(lambda u: -rate(fraction) * u, direction)
        moved = State(optax.apply_updates(state.meta_params, updates), memory)
        sound = jnp.isfinite(optax.tree.norm(grad)) & jnp.isfinite(value)
        kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), moved, state)
        none_left = jnp.isposinf(value) & (on_failure == "zero")
        loss = jnp.where(sound | none_left, value, jnp.nan)
        return kept, Told(loss, told.status, told.num_gradients + told.num_hvps)

    return step


def compiled(
    step: Callable[..., Any], state: State, data: Any = (), clock: Callable[[], float] = time.perf_counter
) -> Program:
    """The step `(state, key, fraction, data) -> (state, told)` compiled for a state of this structure, and its data.

    What tasks are sampled from is an argument, not a constant of the program: that would take long to compile.
    """
    begin = clock()
    program = jax.jit(step).lower(state, jax.random.key(0), jnp.float32(0), data).compile()
    return Program(program, clock() - begin, data)


def train(
    program: Program,
    state: State,
    key: jax.Array,
    budget: Budget,
    progress: Progress,
    what: str,
    *,
    num_snapshots: int = 20,
    log: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
) -> Trained:
    """Train until the budget is spent, or until it makes no sense any more.

    The tasks of a step depend on `key` and its number alone. With a budget in steps, a run that was killed and goes on
    from its checkpoint gives the numbers of one that was not, to the bit on a CPU.

    Args:
      program: see `compiled`.
      state: where it starts, unless there is a checkpoint.
      key: PRNG key of the run.
      budget: steps or seconds.
      progress: where to say what is going on.
      what: for it.
      num_snapshots: kept on the way, at equal fractions of the budget.
      log: JSON lines, one for each step; None writes none.
      checkpoint: file to go on from where it exists, and to write; None for none.
      checkpoint_every: steps from one to the next.
    """
    run = _Run(state)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(checkpoint, run.arrays(), run)
    run.seconds = max(run.seconds, program.seconds)
    spent_before, begin = run.seconds, budget.clock()
    lines = None if log is None else Log(log, keep=run.step)
    progress.begin(what, 100)
    stopped = ""
    while (fraction := budget.fraction(run.step, run.seconds)) < 1 and not stopped:
        at, told = program.call(run.state, jax.random.fold_in(key, run.step), jnp.float32(fraction))
        loss, status = float(told.outer_loss), np.asarray(told.status)
        run.add(at, loss, status, int(np.sum(told.num_gradients)), spent_before + budget.clock() - begin)
        after = budget.fraction(run.step, run.seconds)
        if int(after * num_snapshots) > int(fraction * num_snapshots):
            run.snapshots.append(Snapshot(run.step, run.num_gradients, run.seconds, at.meta_params))
        if lines is not None:
            lines.write(step=run.step, outer_loss=loss, statuses=_named(run.counts[-1]), gradients=run.num_gradients)
        if checkpoint is not None and run.step % checkpoint_every == 0:
            save_checkpoint(checkpoint, run.arrays(), run)
        stopped = reason_to_stop(run.losses)
        progress.tell(f"{what}: {_live(run)}", min(after, 1.0))
    if not run.snapshots or run.snapshots[-1].step != run.step:
        run.snapshots.append(Snapshot(run.step, run.num_gradients, run.seconds, run.state.meta_params))
    settled = sum(run.counts[len(run.counts) // 10 :], collections.Counter())
    passed = sum(number for name, number in settled.items() if name in PASSING)
    fraction_passed = passed / max(sum(settled.values()), 1)
    return Trained(run.state, run.snapshots, run.losses, _named(settled), fraction_passed, stopped)


def reason_to_stop(losses: Sequence[float]) -> str:
    """Why training has to end, from the outer losses of its steps; "" where it may go on."""
    if losses and math.isnan(losses[-1]):
        return f"the outer loss or its meta-gradient was not finite at step {len(losses)}"
    if len(losses) >= 2 * _WINDOW:
        first, last = _mean_of_finite(losses[:_WINDOW]), _mean_of_finite(losses[-_WINDOW:])
        if last > _DIVERGED * first:
            return f"diverged: mean outer loss {last:.3g} in {_WINDOW} steps up to {len(losses)}, {first:.3g} at first"
    return ""


def _mean_of_finite(losses: Sequence[float]) -> float:
    """NaN where no step had a task left."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan


class _Run:
    """A run under way, and what of it a checkpoint holds."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.step, self.num_gradients, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.counts: list[collections.Counter[cm.Status]] = []
        self.snapshots: list[Snapshot] = []

    def add(self, state: State, loss: float, status: Any, num_gradients: int, seconds: float) -> None:
        """One more step."""
        self.state, self.seconds = state, seconds
        self.step += 1
        self.num_gradients += num_gradients
        self.losses.append(loss)
        self.counts.append(collections.Counter(cm.Status(int(s)) for s in status.ravel()))

    def arrays(self) -> tuple[State, list[Any]]:
        """What a checkpoint holds as arrays."""
        return self.state, [snapshot.meta_params for snapshot in self.snapshots]

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint holds as JSON."""
        return {
            "step": self.step,
            "num_gradients": self.num_gradients,
            "seconds": self.seconds,
            "losses": self.losses,
            "counts": [{int(status): number for status, number in count.items()} for count in self.counts],
            "snapshots": [snapshot[:3] for snapshot in self.snapshots],
        }

    def restore(self, numbers: dict[str, Any], leaves: Sequence[Any]) -> None:
        """Go back to what `numbers` and `arrays` said."""
        structure = jax.tree.structure(self.state)
        count = structure.num_leaves
        self.state = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves[:count]])
        self.step, self.num_gradients, self.seconds = (numbers[k] for k in ("step", "num_gradients", "seconds"))
        self.losses = numbers["losses"]
        self.counts = [
            collections.Counter({cm.Status(int(status)): number for status, number in count.items()})
            for count in numbers["counts"]
        ]
        of_meta = jax.tree.structure(self.state.meta_params)
        later, size = leaves[count:], of_meta.num_leaves
        self.snapshots = [
            Snapshot(step, gradients, seconds, jax.tree.unflatten(of_meta, later[k * size : (k + 1) * size]))
            for k, (step, gradients, seconds) in enumerate(numbers["snapshots"])
        ]


def _named(counts: collections.Counter[cm.Status]) -> dict[str, int]:
    return {status.name: counts[status] for status in sorted(counts)}


def _live(run: _Run) -> str:
    recent = run.losses[-_WINDOW:]
    statuses = ", ".join(f"{name} {number}" for name, number in _named(run.counts[-1]).items())
    return f"step {run.step:,}, outer loss {np.mean(recent):.4f}, {statuses}"
