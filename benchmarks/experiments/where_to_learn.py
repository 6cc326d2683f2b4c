"""Where to learn: masks of plasticity by contrast and through learning, what they close, and what they keep."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.experiments import where_to_learn_tables
from benchmarks.experiments.claims import record_claims
from benchmarks.experiments.omniglot_network import LAYERS, Layer
from benchmarks.experiments.where_to_learn_methods import (
    CONTRAST,
    SIGN,
    THROUGH,
    Method,
    closed,
    methods,
    problem_of,
    transformation,
)
from benchmarks.experiments.where_to_learn_settings import (
    OMNIGLOT,
    SEGMENTS,
    SINUSOIDS,
    STREAM,
    Setting,
    Sizes,
    by_layer,
    segment,
    settings,
    streams,
)
from benchmarks.harness import Session, precision, use_cheap_xla_flags
from benchmarks.meta_training import (
    Budget,
    Program,
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

NAME = "where_to_learn"
ABOUT = (
    "masks of plasticity (sparse-MAML) by contrast and through learning on sinusoids, streams of them and Omniglot: "
    "sparsity by layer, errors, forgetting; 10 minutes on two cores"
)
show = where_to_learn_tables.show
# Choices were made on seeds of 100 and above.
_FIRST_SEED = 1


class Scale(NamedTuple):
    """How much is run.

    Attributes:
      sizes: of networks and inner phases.
      steps: outer ones by setting, through learning and by contrast, whose steps cost more.
      num_tests: tasks tested on.
      num_seeds: reported.
    """

    sizes: Sizes
    steps: dict[str, tuple[int, int]]
    num_tests: int = 400
    num_seeds: int = 3


DEFAULT = Scale(Sizes(), {SINUSOIDS: (1000, 100), STREAM: (1000, 0), OMNIGLOT: (200, 40)})
_TWO = dict.fromkeys((SINUSOIDS, STREAM, OMNIGLOT), (2, 2))
SMOKE = Scale(Sizes((4,), (4, 3), (Layer(8, 8, 4),), (3, 2), 2, 2), _TWO, 4, 1)
# A mask by contrast and a stream through learning: each takes seconds to compile.
_SMOKE_CASES = (f"{SINUSOIDS}: {SIGN} {CONTRAST}", f"{STREAM}: {SIGN} {THROUGH}")
# Batches, networks and inner steps of the experiments `sinusoids` and `omniglot`; the published masks were learned on
# miniImageNet, which is not here.
FULL = Scale(
    Sizes((40, 40), (200, 100), LAYERS, (200, 100), 25, 32),
    {SINUSOIDS: (10_000, 1000), STREAM: (10_000, 0), OMNIGLOT: (3750, 3750)},
)


def run(session: Session) -> None:
    """Every method of every setting on every seed: equal networks and masks at the start, equal tests and budgets."""
    # Ten programs, most of which run for a minute: by default they would take longer to compile than to run.
    use_cheap_xla_flags()
    scale = SMOKE if session.smoke else FULL if session.full else DEFAULT
    if session.smoke and session.full:
        one = dict.fromkeys(FULL.steps, (1, 1))
        scale = Scale(FULL.sizes._replace(num_tasks=1, num_images=1), one, 4, 1)
    chosen = session.cases or (_SMOKE_CASES if session.smoke else ())
    images = not chosen or any(case.startswith(OMNIGLOT) for case in chosen)
    with precision(x64=False):
        table = settings(scale.sizes, session.data, smoke=session.smoke, images=images)
        of = {name: methods(name, setting) for name, setting in table.items()}
        session.refuse_unknown_cases([*of, *(f"{name}: {method}" for name, made in of.items() for method in made)])
        for name, setting in table.items():
            here = {m: method for m, method in of[name].items() if not chosen or {name, f"{name}: {m}"} & {*chosen}}
            _Experiment(session, scale, name, setting, here).run()
    record_claims(session, where_to_learn_tables.claims(session.records))


class _Experiment:
    """All methods of one setting."""

    def __init__(self, session: Session, scale: Scale, name: str, setting: Setting, chosen: dict[str, Method]) -> None:
        self.session, self.scale, self.name, self.setting, self.chosen = session, scale, name, setting, chosen
        self.seeds = session.seeds(_FIRST_SEED, scale.num_seeds)
        self.programs: dict[str, Program] = {}
        self.tests: dict[str, Callable[[Any, Any], jax.Array]] = {}
        self.streams: dict[str, Callable[[Any, Any], Any]] = {}

    def run(self) -> None:
        """Train all, then judge them: also where each was when the one that had spent least ended."""
        trained = {name: self._train(name, method) for name, method in self.chosen.items()}
        for number, seed in enumerate(self.seeds):
            least = least_spent(runs[number].snapshots[-1] for runs in trained.values())
            for name, method in self.chosen.items():
                self.session.progress.begin(f"{self.name}: {name}: testing, seed {seed}", 1)
                self._record(name, method, seed, trained[name][number], least)

    def _train(self, name: str, method: Method) -> list[Trained]:
        """Of each seed; a program that methods share is compiled once."""
        setting, progress = self.setting, self.session.progress
        change, what = transformation(method), method.program
        if what not in self.programs:
            progress.begin(f"{self.name}: {what}: compiling", 1)
            split = method.build(jax.random.key(0))
            step = outer_step(
                problem_of(setting, split), method.estimator,
                lambda key, data: setting.draw(key, data, setting.num_tasks), cosine_decay(method.outer_rate), change,
            )  # fmt: skip
            start = State(split.meta_params, change.init(split.meta_params))
            self.programs[what] = compiled(step, start, setting.data, time.process_time)
            self.tests[what] = _tester(setting, method)
            self.streams[what] = _streamer(setting, method)
        budget = Budget(steps=self.scale.steps[self.name][CONTRAST in name], clock=time.process_time)
        runs = []
        for seed in self.seeds:
            meta = method.build(jax.random.key(seed)).meta_params
            state, key = State(meta, change.init(meta)), jax.random.fold_in(jax.random.key(seed), 1)
            told = f"{self.name}: {name}, seed {seed}"
            runs.append(train(self.programs[what], state, key, budget, progress, told))
        return runs

    def _test_tasks(self, seed: int) -> Any:
        key = jax.random.fold_in(jax.random.key(31), seed)
        return self.setting.draw_test(key, self.setting.test_data, self.scale.num_tests)

    def _record(self, name: str, method: Method, seed: int, trained: Trained, least: tuple[float, int]) -> None:
        start, last = Snapshot(0, 0, 0.0, method.build(jax.random.key(seed)).meta_params), trained.snapshots[-1]
        snapshots = [start, *trained.snapshots]
        tasks = self._test_tasks(seed)
        at = last, within(snapshots, seconds=least[0]), within(snapshots, num_gradients=least[1]), start
        # The same snapshot is often several of these, and testing takes longer than many outer steps.
        test = self.tests[method.program]
        found = {k: test(snapshot.meta_params, tasks).item() for k, snapshot in {s.step: s for s in at}.items()}
        errors = [found[snapshot.step] for snapshot in at]
        stream: Sequence[Any] = (None, None)
        if self.name != OMNIGLOT:
            # The same for what was trained on whole sinusoids and on streams.
            key = jax.random.fold_in(jax.random.key(37), seed)
            stream = [e.item() for e in self.streams[method.program](last.meta_params, _test_streams(key, self.scale))]
        mask = by_layer(self.setting, last.meta_params["mask"])
        learned = method.mask_rate > 0
        dataclasses.replace(self.session, seed=seed).record(
            x64=False, kind="method", case=f"{self.name}: {name}", setting=self.name, method=name,
            sizes=self.scale.sizes, error=errors[0], error_at_equal_time=errors[1], error_at_equal_gradients=errors[2],
            error_unlearned=errors[3], compile_seconds=self.programs[method.program].seconds, seconds=last.seconds,
            num_steps=last.step, num_gradients=last.num_gradients, equal_seconds=least[0], equal_gradients=least[1],
            closed_at_first=closed(jax.tree.leaves(start.meta_params["mask"])) if learned else None,
            closed=closed(jax.tree.leaves(last.meta_params["mask"])) if learned else None,
            closed_by_layer={layer: closed(group) for layer, group in mask.items()} if learned else {},
            stream_at_once=stream[0], stream_at_the_end=stream[1],
            statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
        )  # fmt: skip


def _test_streams(key: jax.Array, scale: Scale) -> Any:
    return streams(key, scale.num_tests, 10)


def _tester(setting: Setting, method: Method) -> Callable[[Any, Any], jax.Array]:
    """The mean error on tasks, from meta-parameters and tasks."""
    split = method.build(jax.random.key(0))

    def one(meta_params: Any, task: Any) -> jax.Array:
        if setting.sample is not None:
            return jnp.mean(segment_errors(setting, method, meta_params, task)[1])
        problem = split.problem
        start = problem.init(meta_params, task)
        params = method.learner.bind(meta_params).solve(lambda at: problem.inner(at, meta_params, task), start).params
        return setting.error(setting.apply(split.weights(params, meta_params), task.x_val), task.y_val)

    return jax.jit(lambda meta_params, tasks: jnp.mean(jax.vmap(one, (None, 0))(meta_params, tasks)))


def _streamer(setting: Setting, method: Method) -> Callable[[Any, Any], Any]:
    """Mean errors on streams, of a segment once it is learned and of the same at the end, the last one left out."""

    def one(meta_params: Any, task: Any) -> tuple[jax.Array, jax.Array]:
        at_once, at_the_end = segment_errors(setting, method, meta_params, task)
        return jnp.mean(at_once[:-1]), jnp.mean(at_the_end[:-1])

    def mean(meta_params: Any, tasks: Any) -> Any:
        return jax.tree.map(jnp.mean, jax.vmap(one, (None, 0))(meta_params, tasks))

    return jax.jit(mean)


def segment_errors(setting: Setting, method: Method, meta_params: Any, task: Any) -> tuple[jax.Array, jax.Array]:
    """Errors on the segments of a stream, each once it is learned, and all at the end: both of shape (segments,)."""
    split = method.build(jax.random.key(0))
    problem, learner = split.problem, method.stream_learner.bind(meta_params)

    def errors(params: Any) -> jax.Array:
        return jax.vmap(setting.error)(setting.apply(split.weights(params, meta_params), task.x_val), task.y_val)

    def learn(params: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        part = segment(task, number)
        params = learner.solve(lambda at: problem.inner(at, meta_params, part), params).params
        return params, errors(params)[number]

    params, at_once = jax.lax.scan(learn, problem.init(meta_params, task), jnp.arange(SEGMENTS))
    return at_once, errors(params)
