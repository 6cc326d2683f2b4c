"""One strength for every synapse: learned on validation data by contrast, and by what competes with it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks.experiments.claims import Claim, above, at_least, at_most, record_claims, show_claims
from benchmarks.experiments.regularisation_methods import (
    CONTRAST,
    FIXED,
    GRID,
    LEARNED,
    NONE,
    T1_T2,
    TRUNCATED,
    Settings,
    contrast,
    estimators,
    learner,
)
from benchmarks.experiments.regularisation_problems import (
    CIFAR,
    MNIST,
    MNIST_FULL,
    NUISANCE,
    Case,
    Task,
    accuracy,
    cases,
    problem,
    strengths,
    told_apart,
)
from benchmarks.harness import Record, Session, compiling_cheaply, precision
from benchmarks.meta_training import (
    Budget,
    Snapshot,
    State,
    Trained,
    compiled,
    cosine_decay,
    least_spent,
    outer_step,
    train,
    within,
)
from benchmarks.tables import decimals, lay_out, memory, seeds_of, wrap

NAME = "regularisation"
ABOUT = (
    "one L2 strength for every synapse of a classifier: contrast against T1-T2, conjugate gradients, Neumann, "
    "truncated backprop and a grid; accuracy, time, memory; 10 minutes on two cores"
)
# Choices were made on seeds of 100 and above, which are not reported.
_FIRST_SEED = 1
_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Half a point below the best strength of the grid is as good (R5).
_SLACK, _AUC = 0.005, 0.9


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      settings: of learning.
      names: cases.
      methods: that learn strengths.
      num: examples in each half; None for the case's own number.
      width: of hidden layers.
      num_seeds: reported.
      grid: fixed strengths.
    """

    settings: Settings = Settings()
    names: tuple[str, ...] = (NUISANCE, MNIST)
    methods: tuple[str, ...] = LEARNED
    num: int | None = None
    width: int = 32
    num_seeds: int = 3
    grid: tuple[float, ...] = _GRID


SMOKE = Sizes(Settings(3, 2, 2, products=2, kept=2), (NUISANCE,), (CONTRAST, TRUNCATED), 20, 4, 1, _GRID[:2])
# Inner and outer steps as published (Zucchet et al., 2022, and its public code); rates as chosen here.
FULL = Sizes(Settings(2000, 200, 100, products=200, kept=200), (MNIST_FULL, CIFAR))


def run(session: Session) -> None:
    """Every method on every case and seed: equal data, equal starts, equal learners."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    if session.smoke and session.full:
        sizes = FULL._replace(
            settings=FULL.settings._replace(free=2, kept=2, outer=1), names=(CIFAR,), methods=(T1_T2,), num=4,
            num_seeds=1, grid=_GRID[:1],
        )  # fmt: skip
    table = cases(sizes.num, sizes.width)
    session.refuse_unknown_cases(table)
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    with precision(x64=False):
        for number, name in enumerate(session.cases or sizes.names):
            experiment = _Experiment(session, sizes, name, table[name], seeds)
            experiment.run()
            if number == 0:
                experiment.memory()
    record_claims(session, claims(session.records))


class _Experiment:
    """All methods on one case."""

    def __init__(self, session: Session, sizes: Sizes, name: str, case: Case, seeds: Sequence[int]) -> None:
        self.session, self.sizes, self.name, self.case, self.seeds = session, sizes, name, case, seeds
        self.tasks = [case.load(seed, session.data) for seed in seeds]
        self.problem = problem(case)
        self.learn = jax.jit(self._learn)

    def run(self) -> None:
        """The fixed strengths, then a method at a time, its program compiled once."""
        for seed, task in zip(self.seeds, self.tasks, strict=True):
            self._fixed(seed, task)
        table = estimators(self.sizes.settings)
        trained = {name: self._trained(name, table[name]) for name in self.sizes.methods}
        for number, seed in enumerate(self.seeds):
            least = least_spent(runs[number].snapshots[-1] for runs in trained.values())
            for name, runs in trained.items():
                self._learned(name, seed, self.tasks[number], runs[number], least)

    def _learn(self, log_strengths: Any, task: Task) -> dict[str, jax.Array]:
        """What a network that learned with these strengths is worth; without any where they are -inf."""
        free = learner(self.sizes.settings.free_rate, self.sizes.settings.free)
        params = free.solve(lambda at: self.problem.inner(at, log_strengths, task), task.start).params
        return {
            "val_loss": self.problem.outer(params, log_strengths, task),
            "train_accuracy": accuracy(self.case, params, task.x_train, task.y_train),
            "val_accuracy": accuracy(self.case, params, task.x_val, task.y_val),
            "test_accuracy": accuracy(self.case, params, task.x_test, task.y_test),
        }

    def _told(self, log_strengths: Any, task: Task) -> dict[str, float]:
        return {key: float(value) for key, value in self.learn(log_strengths, task).items()}

    def _fixed(self, seed: int, task: Task) -> None:
        """The strength of the grid with the least validation loss, and none."""
        self.session.progress.begin(f"{self.name}: fixed strengths, seed {seed}", 1)
        begin = time.process_time()
        points = [self._told(strengths(task, strength), task) for strength in self.sizes.grid]
        seconds = time.process_time() - begin
        best = int(np.argmin([point["val_loss"] for point in points]))
        num_gradients = self.sizes.settings.free
        self._record(
            seed, GRID, **points[best], strength=self.sizes.grid[best], grid=self.sizes.grid, points=points,
            best_test_accuracy=max(point["test_accuracy"] for point in points), seconds=seconds,
            num_gradients=num_gradients * len(points),
        )  # fmt: skip
        begin = time.process_time()
        told = self._told(jax.tree.map(lambda leaf: jnp.full_like(leaf, -jnp.inf), task.start), task)
        self._record(seed, NONE, **told, seconds=time.process_time() - begin, num_gradients=num_gradients)

    def _trained(self, name: str, estimator: cm.MetaGradientEstimator) -> list[Trained]:
        """Of each seed."""
        settings, adam, what = self.sizes.settings, optax.scale_by_adam(), f"{self.name}, {name}"
        budget = Budget(steps=settings.outer, clock=time.process_time)

        def sample(key: jax.Array, task: Task) -> Task:
            batch: Task = jax.tree.map(lambda leaf: leaf[None], task)
            return batch

        def start(task: Task) -> State:
            meta = strengths(task, settings.strength)
            return State(meta, adam.init(meta))

        self.session.progress.begin(f"{what}: compiling", 1)
        step = outer_step(self.problem, estimator, sample, cosine_decay(settings.outer_rate), adam)
        program = compiled(step, start(self.tasks[0]), self.tasks[0], budget.clock)
        return [
            train(
                program.on(task), start(task), jax.random.key(seed), budget, self.session.progress,
                f"{what}, seed {seed}",
            )
            for seed, task in zip(self.seeds, self.tasks, strict=True)
        ]  # fmt: skip

    def _learned(self, name: str, seed: int, task: Task, trained: Trained, least: tuple[float, int]) -> None:
        first = Snapshot(0, 0, 0.0, strengths(task, self.sizes.settings.strength))
        snapshots = [first, *trained.snapshots]
        last = snapshots[-1]
        at_time, at_gradients = within(snapshots, seconds=least[0]), within(snapshots, num_gradients=least[1])
        self._record(
            seed, name, **self._told(last.meta_params, task),
            at_equal_time=self._told(at_time.meta_params, task),
            at_equal_gradients=self._told(at_gradients.meta_params, task),
            auc=told_apart(self.case, last.meta_params, task), seconds=last.seconds, num_steps=last.step,
            num_gradients=last.num_gradients, equal_seconds=least[0], equal_gradients=least[1],
            statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
        )  # fmt: skip

    def _record(self, seed: int, name: str, **fields: Any) -> None:
        at = dataclasses.replace(self.session, seed=seed)
        at.record(x64=False, kind="method", case=self.name, method=name, settings=self.sizes.settings, **fields)

    def memory(self) -> None:
        """Temporary bytes of one meta-gradient against the steps of the free phase, of programs compiled cheaply."""
        settings, task = self.sizes.settings, self.tasks[0]
        meta = strengths(task, settings.strength)
        by_steps: dict[str, Callable[[int], cm.MetaGradientEstimator]] = {
            "backprop": lambda num: cm.BackpropThroughLearning(learner(settings.free_rate, num))
        }
        if CONTRAST in self.sizes.methods and not self.session.smoke:
            by_steps[CONTRAST] = lambda num: contrast(settings, num)
        for name, make in by_steps.items():
            for num in (settings.free, 10 * settings.free):
                self.session.progress.begin(f"{self.name}: memory of {name}, {num:,} steps", 1)
                estimator = make(num)

                def grad(meta: Any, task: Task, estimator: cm.MetaGradientEstimator = estimator) -> Any:
                    return estimator.estimate(self.problem, meta, task).grad

                with compiling_cheaply(wanted=True):
                    told: Any = jax.jit(grad).lower(meta, task).compile().memory_analysis()
                size = None if told is None else int(told.temp_size_in_bytes)
                self.session.record(
                    x64=False, kind="memory", case=self.name, method=name, num_steps=num, temp_bytes=size
                )  # fmt: skip


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """Accuracy against the grid and T1-T2, at equal time and gradients as well; nuisances; memory."""
    for case in dict.fromkeys(r["case"] for r in records if r["kind"] == "method"):
        here = [r for r in records if r["kind"] == "method" and r["case"] == case]

        def of(name: str, column: str = "test_accuracy", here: Sequence[Record] = here) -> dict[int, float]:
            return {r["seed"]: r[column] for r in here if r["method"] == name and r.get(column) is not None}

        def ahead(first: dict[int, float], second: dict[int, float]) -> list[float]:
            return [first[seed] - second[seed] for seed in first if seed in second]

        ours = of(CONTRAST)
        text = f"{case}: test accuracy of contrast less that of the strength chosen from the grid on validation data"
        yield at_least(text, ahead(ours, of(GRID)), -_SLACK)
        text = f"{case}: test accuracy of contrast less that of the grid's best on the test data themselves"
        yield at_least(text, ahead(ours, of(GRID, "best_test_accuracy")), -_SLACK)
        for name in (T1_T2, NONE):
            yield above(f"{case}: contrast tests better than {name}", ours, of(name))
        for at in ("time", "gradients"):
            equal = {
                name: {r["seed"]: r[f"at_equal_{at}"]["test_accuracy"] for r in here if r["method"] == name}
                for name in LEARNED
            }
            for name in LEARNED[1:]:
                text = f"{case}: contrast tests better than {name} at equal {at}"
                yield above(text, equal[CONTRAST], equal[name])
        if of(CONTRAST, "auc"):
            text = f"{case}: contrast holds nuisances more strongly than signals (AUC)"
            yield at_least(text, [*of(CONTRAST, "auc").values()], _AUC)
        for name, most in ((CONTRAST, True), ("backprop", False)):
            sizes = [
                (r["num_steps"], r["temp_bytes"])
                for r in records
                if r["kind"] == "memory" and r["case"] == case and r["method"] == name and r["temp_bytes"]
            ]
            if len(sizes) > 1:
                (before, small), (after, large) = min(sizes), max(sizes)
                if most:
                    yield at_most(f"{case}: memory of {name}, {after:,} steps over {before:,}", [large / small], 1.05)
                else:
                    text = f"{case}: memory of {name}, {after:,} steps over {before:,}"
                    yield at_least(text, [large / small], after / before / 2)


def show(records: Sequence[Record]) -> str:
    """A table for each case, memory, and every claim."""
    blocks = []
    here = [r for r in records if r["kind"] == "method"]
    for case in dict.fromkeys(r["case"] for r in here):
        header = ["method", "test (%)", "range", "validation (%)", "equal time", "equal gradients", "AUC", "s",
                  "gradients", "passed"]  # fmt: skip
        rows = [
            _row(name, [r for r in here if r["case"] == case and r["method"] == name])
            for name in (*FIXED, *LEARNED)
            if any(r["case"] == case and r["method"] == name for r in here)
        ]
        blocks.append(f"{case}: accuracy with learned strengths [{seeds_of(here)}]\n\n{lay_out(header, rows)}")
        sizes = [r for r in records if r["kind"] == "memory" and r["case"] == case]
        cells = [[r["method"], f"{r['num_steps']:,}", memory(r["temp_bytes"])] for r in sizes]
        if cells:
            blocks.append(lay_out(["meta-gradient by", "inner steps", "memory"], cells, left=(0,)))
    blocks += [wrap(f"{r['case']}, {r['method']}, seed {r['seed']}: {r['stopped']}") for r in here if r.get("stopped")]
    return "\n\n".join([*blocks, show_claims([*claims(records)])]).rstrip()


def _row(name: str, rows: Sequence[Record]) -> list[str]:
    def mean(values: Sequence[float | None], places: int, factor: float = 1.0) -> str:
        known = [value for value in values if value is not None]
        return decimals(factor * float(np.mean(known)) if known else None, places)

    tests = [100 * r["test_accuracy"] for r in rows]
    equal = [
        mean([r[f"at_equal_{at}"]["test_accuracy"] for r in rows if f"at_equal_{at}" in r], 1, 100)
        for at in ("time", "gradients")
    ]
    return [
        name, f"{np.mean(tests):.1f}", f"{min(tests):.1f}-{max(tests):.1f}",
        mean([r["val_accuracy"] for r in rows], 1, 100), *equal, mean([r.get("auc") for r in rows], 3),
        mean([r["seconds"] for r in rows], 1), f"{np.mean([r['num_gradients'] for r in rows]):,.0f}",
        mean([r.get("passed") for r in rows], 2),
    ]  # fmt: skip
