"""Watching a run that tunes itself: what every hyperparameter did, what was refused, and what tuning cost."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from contrastive_meta._control import cond
from contrastive_meta._dependence import leaf_names
from contrastive_meta._optax.tune_while_training import TuneState, find_tune_state
from contrastive_meta._pytree import PyTree
from contrastive_meta._report import text
from contrastive_meta._result import Status

# A hyperparameter that made more than this part of its range in the last quarter of the run has not come to rest; a
# steady drift makes 1/4.
_STILL_MOVING = 0.1
_MARKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """What `tuning_report` found: `print` it, plot `trajectories`, or hand `last` to a logger.

    Attributes:
      steps: training steps taken at each of the states, shape (num,).
      trajectories: by leaf name the values of each meta-parameter, shape (num, *shape of the leaf).
      outer_loss: on the batch of the last meta-step, shape (num,); infinite before the first.
      strength: of the nudge, inner over outer loss in units, shape (num,).
      statuses: numbers of meta-steps of the whole run by the name of their status; those that occurred.
      num_failed: meta-steps whose status was neither `CONVERGED` nor allowed; by default these moved nothing.
      num_clipped: meta-steps whose meta-gradient was shortened.
      num_gradients: gradients spent on tuning.

    Example:
      >>> import numpy as np
      >>> import contrastive_meta as cm
      >>> one = np.ones(1)
      >>> report = cm.TuningReport(30 * one, {"decay": one}, one, one, {"CONVERGED": 3}, 0, 0, 60)
      >>> report.num_meta_steps, round(report.cost_share, 2)
      (3, 0.67)
    """

    steps: npt.NDArray[Any]
    trajectories: Mapping[str, npt.NDArray[Any]]
    outer_loss: npt.NDArray[Any]
    strength: npt.NDArray[Any]
    statuses: Mapping[str, int]
    num_failed: int
    num_clipped: int
    num_gradients: int

    @property
    def num_meta_steps(self) -> int:
        """Meta-steps so far, refused ones included."""
        return sum(self.statuses.values())

    @property
    def failed_share(self) -> float:
        """Part of the meta-steps whose status was a failure."""
        return self.num_failed / max(self.num_meta_steps, 1)

    @property
    def clipped_share(self) -> float:
        """Part of the meta-steps whose meta-gradient was shortened."""
        return self.num_clipped / max(self.num_meta_steps, 1)

    @property
    def cost_share(self) -> float:
        """Part of all gradients that tuning took; training took one at each step."""
        return self.num_gradients / max(self.num_gradients + int(self.steps[-1]), 1)

    @property
    def last(self) -> dict[str, float]:
        """The last state as numbers by name; of a leaf with several entries the mean, the least and the largest."""
        values: dict[str, float] = {"step": float(self.steps[-1])}
        for name, path in self.trajectories.items():
            if path[-1].size == 1:
                values[name] = float(path[-1].reshape(()))
            elif path[-1].size:
                values |= {f"{name}/{how.__name__}": float(how(path[-1])) for how in (np.mean, np.min, np.max)}
        return values | {
            "outer_loss": float(self.outer_loss[-1]),
            "strength": float(self.strength[-1]),
            "failed_share": self.failed_share,
            "clipped_share": self.clipped_share,
            "cost_share": self.cost_share,
        } | {f"status/{name}": float(count) for name, count in self.statuses.items()}  # fmt: skip

    @property
    def line(self) -> str:
        """The last state in one line."""
        told = [f"{name.removesuffix('/mean')} {value:.3g}" for name, value in self.last.items() if _leads(name)]
        return f"step {int(self.steps[-1]):,}  {'  '.join(told)}"

    def __str__(self) -> str:
        """The table, and what follows from it, in at most 120 columns."""
        rows = {name: _means(path) for name, path in self.trajectories.items()}
        quarters = {"outer loss, mean of the quarter": self.outer_loss, "strength, likewise": self.strength}
        names = [*(f"{n}, mean" if self.trajectories[n][-1].size > 1 else n for n in rows), *quarters]
        cells = [_at_marks(path) for path in rows.values()] + [_over_quarters(path) for path in quarters.values()]
        ends = [path[-1] for path in self.trajectories.values()]
        ranges = [f"{np.min(x):.3g} to {np.max(x):.3g}" if x.size > 1 else "" for x in ends] + [""] * len(quarters)
        heads = [("", "start"), *[("after", f"{100 * mark:.0f} %") for mark in _MARKS[1:]]]
        columns = [text.Column(("", "hyperparameter"), names, numeric=False, narrowest=16, keep_end=True)]
        columns += [
            text.Column(head, list(column)) for head, column in zip(heads, zip(*cells, strict=True), strict=True)
        ]
        columns += [text.Column(("entries", "at the end"), ranges)] if any(ranges) else []
        lines = [*text.lay_out(columns), ""]
        for sentence in self._sentences():
            lines += text.wrap(sentence)
        return "\n".join(lines)

    def _sentences(self) -> list[str]:
        number = self.num_meta_steps
        steps = f"{int(self.steps[-1]):,} training steps"
        if not number:
            return [f"No meta-step in {steps}."]
        counts = text.listing([f"{count:,} {name}" for name, count in self.statuses.items()])
        said = [
            f"{number:,} meta-steps in {steps}: {counts}.",
            f"{self.num_failed:,} of them ({100 * self.failed_share:.0f} %) had a status that counts as a failure; by "
            f"default these move nothing. {self.num_clipped:,} ({100 * self.clipped_share:.0f} %) were clipped.",
            f"Tuning took {self.num_gradients:,} gradients, {100 * self.cost_share:.0f} % of all.",
        ]
        if moving := [name for name, path in self.trajectories.items() if _still_moving(_means(path))]:
            said.append(f"Not at rest at the end: {text.listing(moving)}.")
        if lost := [name for name, path in self.trajectories.items() if not np.isfinite(path).all()]:
            said.append(f"Not finite: {text.listing(lost)}.")
        worst = Status[max(self.statuses, key=lambda name: Status[name])]
        if self.num_failed:
            said.append(f"{worst.name}: {worst.describe()}")
        return said


def tuning_report(states: PyTree | Sequence[PyTree]) -> TuningReport:
    """What a training run with `tune_while_training` did to its hyperparameters, and at what price.

    Args:
      states: states of `tune_while_training`, or of anything around it: a list, or one whose arrays have a leading axis
        of time, as `jax.lax.scan` stacks them; or a single one. Not every state is needed, since counts are of the
        whole run. Optimiser states are not read: `watch` leaves them out, and a scan should.

    Returns:
      A report to print.

    Raises:
      ValueError: no states, states without one `tune_while_training` in them, or states of several runs at once.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> def inner_loss(w, log_decay, task):
      ...     return 0.5 * (w - 3.0) ** 2 + 0.5 * jnp.exp(log_decay) * w**2
      >>> problem = cm.BilevelProblem(inner_loss, lambda w, _, task: 0.5 * (w - 1.0) ** 2, lambda *_: 0.0)
      >>> tx = cm.tune_while_training(
      ...     optax.sgd(0.3), meta_optimizer=optax.sgd(0.5), problem=problem, init_meta_params=jnp.array(-2.0)
      ... )
      >>> def step(carry, _):
      ...     w, state = carry
      ...     grads = jax.grad(inner_loss)(w, cm.current_meta_params(state), None)
      ...     updates, state = tx.update(grads, state, w, task=())
      ...     return (optax.apply_updates(w, updates), state), state
      >>> _, states = jax.lax.scan(step, (jnp.array(0.0), tx.init(jnp.array(0.0))), length=200)
      >>> report = cm.tuning_report(states)
      >>> report.num_meta_steps, report.trajectories["meta_params"].shape, report.num_failed
      (20, (200,), 0)
    """
    found = [_thinned(one) for one in (states if _is_history(states) else [states])]
    if not found:
        raise ValueError("`tuning_report` needs at least one state; the list is empty.")
    if any(np.ndim(one.step) > 1 for one in found):
        raise ValueError(
            f"`tuning_report` is of one run; the states have leading axes of shape {np.shape(found[0].step)}. One of "
            "several runs: `jax.tree.map(lambda x: x[0], states)`."
        )
    found = [_stacked(one) for one in found]
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    order = np.argsort(whole.step, kind="stable")  # callbacks may arrive in another order
    whole = jax.tree.map(lambda x: x[order], whole)
    counts = whole.status_counts[-1]
    return TuningReport(
        whole.step,
        dict(zip(leaf_names(whole.meta_params), jax.tree.leaves(whole.meta_params), strict=True)),
        whole.outer_loss,
        whole.diagnostics.beta,
        {status.name: int(counts[status]) for status in Status if counts[status]},
        int(whole.num_failed[-1]),
        int(whole.num_clipped[-1]),
        int(whole.num_gradients[-1]),
    )


def watch(state: PyTree, tell: Callable[[TuneState], None], *, every: int = 1) -> None:
    """Call `tell` on the host with what there is to see of a state, after meta-steps; nothing in between.

    Inside `jit` and `scan` this is a `jax.debug.callback`; `jax.effects_barrier()` waits for the last. Outside it is a
    plain call. `history.append` collects what `tuning_report` reads, and
    `lambda seen: logger(cm.tuning_report(seen).last)` feeds a logger of numbers by name.

    Args:
      state: of `tune_while_training`, or of anything around it, as `update` returned it.
      tell: gets the state with NumPy arrays, without the states of optimisers and mode.
      every: meta-steps from one call to the next. A call from inside `jit` costs about a millisecond; counts in the
        state are of the whole run, so that a history with gaps still has all of them.

    Raises:
      ValueError: there is no `tune_while_training` in the state, or more than one; `every` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     lambda w, theta, task: (w - theta) ** 2, lambda w, theta, task: w**2, lambda theta, task: 0.0
      ... )
      >>> tx = cm.tune_while_training(
      ...     optax.sgd(0.1), meta_optimizer=optax.sgd(0.1), problem=problem, init_meta_params=jnp.array(1.0), every=1
      ... )
      >>> history, w = [], jnp.array(1.0)
      >>> _, state = tx.update(jnp.array(0.0), tx.init(w), w, task=())
      >>> cm.watch(state, history.append)
      >>> int(history[0].step), cm.tuning_report(history).num_meta_steps
      (1, 1)
    """
    if every < 1:
        raise ValueError(f"`every` must be at least 1 meta-step; got {every}.")
    seen = _thinned(state, "watch")
    no_value: jax.Array = jnp.int32(0)

    def is_due(seen: TuneState) -> Any:
        just_moved = (seen.waited == 0) & (seen.step > 0)
        return just_moved & (seen.status_counts.sum() % every == 0)

    def told(seen: TuneState) -> None:
        # Under `vmap` the callback runs in steps without a meta-step too.
        if is_due(seen):
            tell(jax.tree.map(np.asarray, seen))

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(seen)):
        told(seen)
        return

    def call(at: TuneState) -> jax.Array:
        # Each array costs the host as much as a training step of a small network: one of each dtype is handed over.
        leaves, structure = jax.tree.flatten(at)
        kinds = sorted({str(leaf.dtype) for leaf in leaves})
        packed = [jnp.concatenate([x.ravel() for x in leaves if str(x.dtype) == kind]) for kind in kinds]
        shapes = [(kinds.index(str(leaf.dtype)), leaf.shape) for leaf in leaves]

        def unpack(*arrays: Any) -> None:
            rest = [np.asarray(array) for array in arrays]
            parts = []
            for kind, shape in shapes:
                size = int(np.prod(shape))
                parts.append(rest[kind][:size].reshape(shape))
                rest[kind] = rest[kind][size:]
            told(jax.tree.unflatten(structure, parts))

        jax.debug.callback(unpack, *packed)
        return no_value

    cond(is_due(seen), call, lambda at: no_value, seen)


def _leads(name: str) -> bool:
    """Whether a number belongs into a line of the terminal: all but the ends of ranges, counts and the step."""
    return not name.endswith(("/min", "/max", "clipped_share")) and not name.startswith("status/") and name != "step"


def _is_history(states: Any) -> bool:
    """Whether this is a sequence of states; optax states are tuples, some of them with names."""
    if isinstance(states, list):
        return True
    return isinstance(states, tuple) and not hasattr(states, "_fields") and all(_has_one(part) for part in states)


def _has_one(part: Any) -> bool:
    leaves = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, TuneState))
    return any(isinstance(leaf, TuneState) for leaf in leaves)


def _thinned(state: PyTree, asked_by: str = "tuning_report") -> TuneState:
    """Without the states of optimisers and mode, which are as large as the model."""
    return find_tune_state(state, asked_by)._replace(optimizer=(), meta_optimizer=(), memory=())


def _stacked(state: TuneState) -> TuneState:
    """A state with a leading axis of time."""
    alone = not np.ndim(state.step)
    stacked: TuneState = jax.tree.map(lambda x: np.asarray(x)[None] if alone else np.asarray(x), state)
    return stacked


def _means(path: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The mean entry of a leaf at each state."""
    means: npt.NDArray[Any] = path.reshape(len(path), -1).mean(axis=1) if path.size else np.zeros(len(path))
    return means


def _at_marks(path: npt.NDArray[Any]) -> list[str]:
    return [f"{path[round(mark * (len(path) - 1))]:.3g}" for mark in _MARKS]


def _over_quarters(path: npt.NDArray[Any]) -> list[str]:
    """The first value that was measured, and the means of the quarters: single minibatches vary."""
    known = path[np.isfinite(path)]
    if not known.size:
        return ["-"] * len(_MARKS)
    quarters = [part[np.isfinite(part)] for part in np.array_split(path, len(_MARKS) - 1)]
    return [f"{known[0]:.3g}", *[f"{part.mean():.3g}" if part.size else "-" for part in quarters]]


def _still_moving(path: npt.NDArray[Any]) -> bool:
    late = path[round(0.75 * (len(path) - 1)) :]
    return bool(abs(late[-1] - late[0]) > _STILL_MOVING * np.ptp(path)) if np.isfinite(path).all() else False
