"""Few-shot images: a fast head and an anchor by contrast, against MAML and its kin, at equal time and gradients."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.experiments import omniglot_checks, omniglot_tables
from benchmarks.experiments.claims import record_claims
from benchmarks.experiments.omniglot_methods import (
    ALL_LAYERS,
    ANIL,
    ANIL_RIDGE,
    HEAD,
    HEAD_TO_REST,
    HEADS,
    OUTER_RATE,
    PIXELS,
    UNTRAINED,
    Judge,
    Steps,
    methods,
    nearest_neighbour,
    ridge_judge,
)
from benchmarks.experiments.omniglot_network import LAYERS, PAPER, SMALL, Layer, init_body
from benchmarks.experiments.omniglot_tasks import Shape, Splits, load, sample_tasks
from benchmarks.harness import Session, precision
from benchmarks.meta_training import Budget, Snapshot, State, Trained, compiled, cosine_decay, outer_step, train, within

NAME = "omniglot"
ABOUT = (
    "few-shot images (Omniglot): fast head, anchor, gains and modules by contrast against MAML, FOMAML, Reptile, ANIL, "
    "iMAML; 25 minutes on two cores"
)
CASES = (PIXELS, UNTRAINED, *HEADS, *ALL_LAYERS)
show = omniglot_tables.show

# Seeds of the reported runs. Choices were made on seed 0, and on background alphabets that no body was trained on.
_FIRST_SEED = 1
_TEST_BATCH = 50


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      head: budget of the methods that learn a body.
      every: budget of those of which all layers learn a task.
      num_seeds: reported.
      num_tests: tasks tested on, the same for all methods of a seed.
      steps: inner steps and batches.
      layers: of the body.
      shapes: of the tasks that are trained for and tested on.
      others: shapes on which bodies are tested as well, once trained for the first.
      num_checked: tasks on which meta-gradients are checked.
    """

    head: Budget
    every: Budget
    num_seeds: int = 3
    num_tests: int = 600
    steps: Steps = Steps()
    layers: tuple[Layer, ...] = LAYERS
    shapes: tuple[Shape, ...] = (Shape(5, 1, 5),)
    others: tuple[Shape, ...] = (Shape(5, 5, 5), Shape(20, 1, 5))
    num_checked: int = 20


# Seconds are those of the processor, compilation included, so that cores may be shared with others.
DEFAULT = Sizes(Budget(seconds=140, clock=time.process_time), Budget(seconds=42, clock=time.process_time))
SMOKE = Sizes(
    Budget(steps=2), Budget(steps=2), 1, 10, Steps(3, 2, 2, Shape(4, 1, 1), 2, Shape(3, 1, 1), 2, 4), SMALL,
    (Shape(3, 1, 2),), (), 2,
)  # fmt: skip
# Sizes as published (Zucchet et al., 2022, and its public code): 30 x 125 outer steps, 200 free and 100 nudged ones, 64
# channels. Strengths and rates are those of the default; its strength of the anchor was 0.5 with one shot, less with 5.
_PAPER_STEPS = Steps(200, 200, 100, Shape(10, 1, 5), 32, Shape(5, 1, 15), 32, 400)
FULL = Sizes(
    Budget(steps=3750), Budget(steps=3750), 3, 300, _PAPER_STEPS, PAPER,
    (Shape(5, 1, 15), Shape(5, 5, 15), Shape(20, 1, 15), Shape(20, 5, 15)), (), 20,
)  # fmt: skip


def run(session: Session) -> None:
    """Every method on every seed: the same drawings, tests, body at the start, and budgets."""
    sizes = SMOKE if session.smoke else FULL if session.full else DEFAULT
    if session.smoke and session.full:
        # One step at the paper's sizes, with a single task in a batch.
        steps = _PAPER_STEPS._replace(head_tasks=1, tasks=1)
        sizes = FULL._replace(
            head=Budget(steps=1), every=Budget(steps=1), num_seeds=1, num_tests=1, steps=steps, num_checked=1,
            shapes=FULL.shapes[:1],
        )  # fmt: skip
    if session.seconds is not None:
        each = session.seconds
        sizes = sizes._replace(
            head=sizes.head._replace(seconds=each), every=sizes.every._replace(seconds=each * 0.3)
        )  # fmt: skip
    session.refuse_unknown_cases(CASES)
    splits = load(session.data, smoke=session.smoke)
    with precision(x64=False):
        for shape in sizes.shapes:
            _Experiment(session, sizes, shape, splits).run()
    record_claims(session, omniglot_tables.claims(session.records))


class _Experiment:
    """All methods on tasks of one shape."""

    def __init__(self, session: Session, sizes: Sizes, shape: Shape, splits: Splits) -> None:
        self.session, self.sizes, self.shape, self.splits = session, sizes, shape, splits
        self.seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
        steps = sizes.steps._replace(
            head_shape=sizes.steps.head_shape._replace(
                ways=max(2 * shape.ways, 3) if shape.ways <= 5 else shape.ways, shots=shape.shots
            ),
            shape=sizes.steps.shape._replace(ways=shape.ways, shots=shape.shots),
        )
        self.methods = methods(steps, sizes.layers, shape.ways)
        self.lengths = {HEAD: steps.head, HEAD_TO_REST: steps.rested}
        self.compile_seconds: dict[str, float] = {}
        self.train, self.select, self.test = (jnp.asarray(part) for part in splits[:3])
        self.common = {
            "shape": shape._asdict(), "data": splits.source, "layers": sizes.layers, "steps": steps,
            "num_tests": sizes.num_tests, "clock": sizes.head.clock.__name__,
        }  # fmt: skip

    def run(self) -> None:
        """The baselines that do not train, then a method at a time, its program compiled once."""
        cases = self.session.cases or CASES
        chosen = [name for name in self.methods if name in cases]
        for seed in self.seeds:
            self._untrained(seed, cases)
        results = {name: self._trained(name) for name in chosen}
        for group in (HEADS, ALL_LAYERS):
            here = {name: results[name] for name in group if name in results}
            for number, seed in enumerate(self.seeds):
                # Equal gradients: as many as the method had that spent its time on the fewest.
                fewest = min((runs[number].snapshots[-1].num_gradients for runs in here.values()), default=0)
                for name, runs in here.items():
                    self._record(name, seed, runs[number], fewest)
        checked = [name for name in self.lengths if name in results]
        # A check compiles five programs in float64: one shows that it runs.
        for name in checked[:1] if self.session.smoke else checked:
            self._check(name, self.lengths[name], results[name][0].state.meta_params)

    def _check(self, name: str, num_steps: int, meta_params: Any) -> None:
        """How right the meta-gradients are at trained weights, and what the package costs."""
        session, sizes, method = self._at(self.seeds[0]), self.sizes, self.methods[name]
        session.progress.begin("checking meta-gradients", 1)
        tasks = self._tasks(self.select, 7, sizes.num_checked)
        checked = omniglot_checks.gradients(meta_params, sizes.layers, self.shape.ways, tasks, (num_steps,))
        session.record(x64=True, kind="gradients", case=name, **self.common, **checked)
        cost = omniglot_checks.overhead(method, meta_params, sizes.layers, self.train, num_steps)
        session.record(x64=False, kind="overhead", case=name, **self.common, **cost)

    def _trained(self, name: str) -> list[Trained]:
        """Of each seed."""
        method, budget = self.methods[name], self._budget(name)

        def sample(key: jax.Array, images: jax.Array) -> Any:
            return sample_tasks(key, images, method.num_tasks, method.shape, rotate=True)

        adam = optax.scale_by_adam()
        step = outer_step(method.problem, method.estimator, sample, cosine_decay(OUTER_RATE), adam)
        start = State(meta := method.meta_params(jax.random.key(0)), adam.init(meta))
        self.session.progress.begin(f"{name}: compiling", 1)
        program = compiled(step, start, self.train, budget.clock)
        self.compile_seconds[name] = program.seconds
        runs = []
        for seed in self.seeds:
            meta = method.meta_params(jax.random.key(seed))
            key = jax.random.fold_in(jax.random.key(seed), 1)
            told = f"{name}, seed {seed}"
            trained = train(program, State(meta, adam.init(meta)), key, budget, self.session.progress, told)
            runs.append(trained)
        return runs

    def _record(self, name: str, seed: int, trained: Trained, fewest: int) -> None:
        method, last = self.methods[name], trained.snapshots[-1]
        equal = within(trained.snapshots, num_gradients=fewest)
        judges = {name: method.judge}
        if name == ANIL:
            judges[ANIL_RIDGE] = ridge_judge(self.sizes.layers, self.shape.ways)
        for case, judge in judges.items():
            self.session.progress.begin(f"{case}: testing, seed {seed}", 1)
            self._at(seed).record(
                x64=False, kind="method", case=case, **self.common,
                accuracy=self._judged(judge, last, self.test, seed),
                accuracy_at_equal_gradients=self._judged(judge, equal, self.test, seed),
                select_accuracy=self._judged(judge, last, self.select, seed),
                seconds=last.seconds, budget=self._budget(name).seconds, compile_seconds=self.compile_seconds[name],
                num_steps=last.step, num_gradients=last.num_gradients, equal_gradients=equal.num_gradients,
                fewest_gradients=fewest, outer_loss=float(np.mean(trained.outer_losses[-50:])),
                statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
            )  # fmt: skip

            if case in (HEAD, HEAD_TO_REST, ANIL_RIDGE):
                self._record_others(case, seed, last, self._budget(name))

    def _record_others(self, case: str, seed: int, snapshot: Snapshot, budget: Budget) -> None:
        """Accuracy of the same body on tasks of other shapes, with a readout that learns with a penalty."""
        for shape in self.sizes.others:
            accuracy = self._judged(ridge_judge(self.sizes.layers, shape.ways), snapshot, self.test, seed, shape)
            fields = {**self.common, "shape": shape._asdict()}
            self._at(seed).record(
                x64=False, kind="other shape", case=case, **fields, accuracy=accuracy, budget=budget.seconds
            )

    def _untrained(self, seed: int, cases: Sequence[str]) -> None:
        body = {"slow": init_body(jax.random.key(seed), self.sizes.layers)}
        start = Snapshot(0, 0, 0.0, body)
        judges: dict[str, Judge] = {
            PIXELS: lambda meta, task: nearest_neighbour(task),
            UNTRAINED: ridge_judge(self.sizes.layers, self.shape.ways),
        }
        if UNTRAINED in cases:
            self._record_others(UNTRAINED, seed, start, Budget(seconds=0.0))
        for case, judge in judges.items():
            if case in cases:
                self.session.progress.begin(f"{case}: testing, seed {seed}", 1)
                accuracy = self._judged(judge, start, self.test, seed)
                self._at(seed).record(
                    x64=False, kind="method", case=case, **self.common, accuracy=accuracy,
                    accuracy_at_equal_gradients=accuracy, seconds=0.0, num_steps=0, num_gradients=0, stopped="",
                )  # fmt: skip

    def _judged(
        self, judge: Judge, snapshot: Snapshot, images: jax.Array, seed: int, shape: Shape | None = None
    ) -> float:
        """Mean accuracy on tasks that are the same for all methods of a seed."""
        size = min(_TEST_BATCH, self.sizes.num_tests)
        batch = _judge_batch(judge)
        found = [
            batch(snapshot.meta_params, self._tasks(images, 1000 * seed + k, size, shape))
            for k in range(self.sizes.num_tests // size)
        ]
        return float(np.mean([np.asarray(f) for f in found]))

    def _tasks(self, images: jax.Array, number: int, num_tasks: int, shape: Shape | None = None) -> Any:
        return _sampled(jax.random.fold_in(jax.random.key(17), number), images, num_tasks, shape or self.shape)

    def _budget(self, name: str) -> Budget:
        return self.sizes.head if name in HEADS else self.sizes.every

    def _at(self, seed: int) -> Session:
        return dataclasses.replace(self.session, seed=seed)


@functools.cache
def _judge_batch(judge: Judge) -> Callable[[Any, Any], jax.Array]:
    return jax.jit(jax.vmap(judge, (None, 0)))


_sampled = jax.jit(functools.partial(sample_tasks, rotate=False), static_argnums=(2, 3))
