"""Training loops over batches of tasks through `cm.value_and_meta_grad`, timed beside their counted gradients."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks.harness import Record, Session
from benchmarks.loops_measure import compiled, median, ratio, time_in_turn

CONTRAST, MAML = "contrast", "MAML, 5 steps"
PLAIN = "one gradient of each task"


class Setup(NamedTuple):
    """What is learned, and by whom.

    Attributes:
      name: of the problem.
      methods: with their problems.
      params: the start that is meta-learned.
      batches: of tasks, one for each outer step.
      inner_loss: whose gradients are counted.
      data: where the tasks come from, in words.
    """

    name: str
    methods: Mapping[str, tuple[cm.BilevelProblem, cm.MetaGradientEstimator]]
    params: Any
    batches: list[Any]
    inner_loss: Callable[[Any, Any, Any], jax.Array]
    data: str


def measure(session: Session, x64: bool, case: str, setup: Setup) -> dict[str, Record]:
    """A few outer steps of each method in turn, each on its own trajectory, all on the same tasks; the records."""
    session.progress.begin(f"{setup.name}: compiling", 1 + len(setup.methods))
    loops = {name: _Loop(session, name, *method, setup) for name, method in setup.methods.items()}
    # What a counted gradient would cost if nothing else were run: all tasks at once, as a batch has them.
    args = setup.params, setup.batches[0]
    plain = compiled(session, PLAIN, functools.partial(_plain_gradients, setup.inner_loss), *args)
    turns: dict[str, Callable[[], Any]] = {name: loop.step for name, loop in loops.items()}
    turns[PLAIN] = functools.partial(plain.call, *args)
    jax.block_until_ready(plain.call(*args))
    num_steps = len(setup.batches)
    seconds, raised = time_in_turn(session, f"{setup.name}: {num_steps} outer steps", turns, num_steps)
    for error in raised.values():
        raise error
    common: Record = {
        "x64": x64,
        "case": case,
        "kind": "method",
        "problem": setup.name,
        "data": setup.data,
        "num_tasks": _num_tasks(setup.batches[0]),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(setup.params)),
    }
    gradient = seconds[PLAIN]
    fields: Record = {"method": PLAIN, "seconds": median(gradient), "all_seconds": gradient, "num_gradients": 1}
    session.record(**common, **fields, **plain.size())
    rows = {}
    for name, loop in loops.items():
        told: Record = {"method": name, "seconds": median(seconds[name]), "all_seconds": seconds[name]}
        over = {MAML: ratio(seconds[name], seconds[MAML])} if MAML in loops else {}
        rows[name] = session.record(
            **common, **told, over=over, **loop.summary(seconds[name], gradient), **loop.program.size()
        )
    return rows


class _Loop:
    """A method's trajectory."""

    def __init__(
        self,
        session: Session,
        name: str,
        problem: cm.BilevelProblem,
        estimator: cm.MetaGradientEstimator,
        setup: Setup,
    ) -> None:
        optimizer = optax.adam(1e-3)
        value_and_grad = cm.value_and_meta_grad(problem, estimator, has_aux=True)

        def step(start: Any, memory: Any, tasks: Any) -> Any:
            (value, told), grad = value_and_grad(start, tasks)
            updates, memory = optimizer.update(grad, memory, start)
            return value, told, (optax.apply_updates(start, updates), memory)

        self._batches, self._carry = iter(setup.batches), (setup.params, optimizer.init(setup.params))
        self.program = compiled(session, name, step, *self._carry, setup.batches[0])
        self.values: list[float] = []
        self.told: list[cm.Diagnostics] = []

    def step(self) -> Any:
        """One outer step."""
        value, told, self._carry = jax.block_until_ready(self.program.call(*self._carry, next(self._batches)))
        self.values.append(float(value))
        self.told.append(told)

    def summary(self, seconds: list[float], gradient: list[float]) -> Record:
        """Counts, what they would cost as plain gradients, statuses and losses."""
        # A batch takes as long as its longest task.
        counted = [int(np.max(told.num_gradients)) for told in self.told]
        as_plain = [num * median(gradient) for num in counted]
        statuses = [cm.Status(int(status)).name for told in self.told for status in told.status]
        return {
            "num_gradients": median(counted),
            "mean_num_gradients": float(np.mean([told.num_gradients for told in self.told])),
            "over_plain": ratio(seconds, as_plain) if min(counted) > 0 else None,
            "statuses": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
            "estimate": median([float(np.max(told.error_estimate)) for told in self.told]),
            "outer_losses": self.values,
            "outer_loss": self.values[-1],
        }


def _num_tasks(tasks: Any) -> int:
    return int(jax.tree.leaves(tasks)[0].shape[0])


def _plain_gradients(inner_loss: Callable[[Any, Any, Any], jax.Array], start: Any, tasks: Any) -> Any:
    """Every task at parameters of its own."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * _num_tasks(tasks)), start)
    return jax.vmap(jax.grad(inner_loss), (0, None, 0))(params, start, tasks)
