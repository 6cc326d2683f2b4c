"""Monolithic rivals of the hyperteacher's students: MAML and ANIL, trained and tested on the same tasks."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.composition.hyperteacher_networks import NUM_HIDDEN as TEACHER_HIDDEN
from benchmarks.composition.hyperteacher_networks import NUM_INPUTS, NUM_OUTPUTS, Task, modules, sampler
from benchmarks.composition.hyperteacher_supports import RING, SUPPORTS, UNSEEN, Support
from benchmarks.harness import Session
from benchmarks.meta_training import Budget, Program, State, compiled, cosine_decay, outer_step, train
from contrastive_meta.architectures import Architecture, fast_head, learned_initialisation, mlp, mlp_params
from contrastive_meta.problems import SplitData

MAML, ANIL = "MAML", "ANIL"
_CLIP = 1.0
_WIDTHS = (64, 64)
# Steps of Adam within a task, as published (Schug et al. 2024); by plain descent tasks ran away at rates of .1 and .3.
# The root of 0 has no derivative: this is added beneath it, a gradient of 1e-4.
_INNER, _EPS_ROOT = 10, 1e-8


class Rates(NamedTuple):
    """How fast a rival learns.

    Attributes:
      inner: of Adam within a task.
      outer: of Adam at first; it falls by a half cosine.
    """

    inner: float
    outer: float


# ANIL: better than an inner rate of .1 on seed 0, and than an outer rate of 3e-3 on seed 1, after 400 steps. MAML's
# were the only ones tried with Adam, on both seeds.
RIVALS = {MAML: Rates(0.03, 3e-3), ANIL: Rates(0.03, 1e-2)}


class Rival:
    """MAML (all weights are fast) or ANIL (the readout is), compiled once for all seeds.

    Args:
      name: of `RIVALS`.
      budget: outer steps, and tasks in each.
      num_examples: of each of the two sets of a task.
      num_tests: tasks tested on.
      rates: in the place of the chosen ones.
    """

    def __init__(
        self,
        name: str,
        budget: tuple[int, int],
        num_examples: int,
        num_tests: int,
        rates: Rates | None = None,
    ) -> None:
        self.name, self.rates = name, rates or RIVALS[name]
        self._steps, num_tasks = budget
        self._learner = cm.OptaxDescent(optax.adam(self.rates.inner, eps_root=_EPS_ROOT), num_steps=_INNER)
        self._transformation = optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())
        self._drawn = sampler(num_tests, num_examples, joint=False)
        self._training = sampler(num_tasks, num_examples, joint=False)
        self._test = jax.jit(self._errors)

    @functools.cached_property
    def _program(self) -> Program:
        """The outer step, compiled when it is first needed."""
        step = outer_step(
            self.of_seed(0).problem,
            cm.BackpropThroughLearning(self._learner),
            lambda key, data: _split(self._training(key, data)),
            cosine_decay(self.rates.outer),
            self._transformation,
            "zero",
        )
        data = _data(modules(jax.random.key(0), TEACHER_HIDDEN), SUPPORTS[RING])
        return compiled(step, self._state(0), data, time.process_time)

    def run(self, session: Session) -> None:
        """Train it on the ring on the session's seed, test it, and record what came of it."""
        of_teacher, _, of_run = jax.random.split(jax.random.key(session.seed), 3)
        teacher = modules(of_teacher, TEACHER_HIDDEN)
        budget, what = Budget(steps=self._steps, clock=time.process_time), f"{self.name}, seed {session.seed}"
        session.progress.begin(f"{self.name}: compiling", 1)
        program = self._program.on(_data(teacher, SUPPORTS[RING]))
        trained = train(program, self._state(session.seed), of_run, budget, session.progress, what, num_snapshots=25)
        inside, unseen = (
            [self.errors(s.meta_params, teacher, support) for s in trained.snapshots]
            for support in (SUPPORTS[RING], UNSEEN)
        )
        last = trained.snapshots[-1]
        session.record(
            x64=False, kind="rival", case=self.name, support=RING, rates=self.rates._asdict(), widths=_WIDTHS,
            inner_steps=_INNER, num_slow=sum(leaf.size for leaf in jax.tree.leaves(last.meta_params)),
            inside=inside, unseen=unseen, snapshot_steps=[s.step for s in trained.snapshots],
            seconds=last.seconds, num_steps=last.step, num_gradients=last.num_gradients,
            statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
        )  # fmt: skip

    def errors(self, meta_params: Any, teacher: jax.Array, support: Support) -> float:
        """The mean of 1 - R^2 on new inputs, over tasks of a support."""
        return float(self._test(meta_params, _data(teacher, support), jax.random.key(17)))

    def of_seed(self, seed: int) -> Architecture:
        """What is fast and what is slow, with the first meta-parameters of a seed."""
        params = mlp_params(jax.random.key(seed), (NUM_INPUTS, *_WIDTHS, NUM_OUTPUTS))
        make = learned_initialisation if self.name == MAML else fast_head
        return make(_network, _unexplained, params, 0.0)

    def _state(self, seed: int) -> State:
        meta = self.of_seed(seed).meta_params
        return State(meta, self._transformation.init(meta))

    def _errors(self, meta_params: Any, data: Any, key: jax.Array) -> jax.Array:
        architecture = self.of_seed(0)

        def of_task(task: SplitData) -> jax.Array:
            start = architecture.problem.init(meta_params, task)
            learned = self._learner.solve(lambda at: architecture.problem.inner(at, meta_params, task), start).params
            return _unexplained(_network(architecture.weights(learned, meta_params), task.x_val), task.y_val)

        return jnp.mean(jax.vmap(of_task)(_split(self._drawn(key, data))))


def _network(params: Any, x: jax.Array) -> jax.Array:
    return mlp(params, x, jax.nn.relu)


def _unexplained(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2) / jnp.var(targets)


def _split(task: Task) -> SplitData:
    return SplitData(task["x"], task["y"], task["x_query"], task["y_query"])


def _data(teacher: jax.Array, support: Support) -> dict[str, Any]:
    return {"teacher": teacher, "support": support.to_sample()}
