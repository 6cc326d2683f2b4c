"""The wheel bandit: agents meta-trained by contrast against MAML, Bayesian linear heads, greed from scratch, chance."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.experiments.bandit_agents import Agent, Online, play
from benchmarks.experiments.bandit_methods import (
    CONTRASTS,
    LINEAR,
    MAML,
    META,
    NEURAL_LINEAR,
    SCRATCH,
    UNIFORM,
    Method,
    Steps,
    methods,
)
from benchmarks.experiments.bandit_wheel import offline_tasks, uniform_regret
from benchmarks.experiments.claims import Claim, above, record_claims, show_claims
from benchmarks.harness import Record, Session, precision
from benchmarks.meta_training import Budget, Snapshot, State, Trained, compiled, least_spent, outer_step, train, within
from benchmarks.tables import decimals, lay_out, milliseconds, seeds_of, wrap

NAME = "bandit"
ABOUT = (
    "the wheel bandit: anchor and gains by contrast against MAML, neural-linear, linear posterior, neural-greedy and "
    "chance; 10 minutes on two cores"
)
# Seed 0 is for trying things, and is not reported.
_FIRST_SEED = 1
DELTAS = (0.5, 0.7, 0.9, 0.95, 0.99)
# The condition of the experiment R10 is on these wheels.
_JUDGED = DELTAS[:4]
_OF_MAML = 1.25
# In the second half of meta-training the outer rate falls to almost nothing.
_FLOOR = 0.02
# What is meta-trained plays thrice: as it ended, and as it was at equal time and at equal gradients.
_END, _AT_TIME, _AT_GRADIENTS = "regret", "regret_at_equal_time", "regret_at_equal_gradients"

_SMOKED = (MAML, LINEAR)


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      steps: inner ones of the contrast.
      outer: steps of meta-training by contrast.
      through: of MAML, whose outer step is some four times cheaper.
      tasks: offline wheels.
      support: pulls of a wheel to learn from.
      query: and to judge by.
      batch: wheels of an outer step.
      width: of the networks.
      online: how a wheel is played.
      streams: of contexts and noise, for each seed.
      num_seeds: of meta-training.
    """

    steps: Steps = Steps()
    outer: int = 600
    through: int = 1000
    tasks: int = 64
    support: int = 128
    query: int = 50
    batch: int = 8
    width: int = 32
    online: Online = Online()
    streams: int = 10
    num_seeds: int = 3


SMOKE = Sizes(Steps(3, 2), 2, 2, 4, 8, 4, 1, 4, Online(10, 5, 2, 4, 16), 1, 1)
# As published, 6,400 wheels seen by contrast and by MAML: meta-batches of 8, 80,000 trials, 50 streams.
FULL = Sizes(Steps(250, 100), 800, 800, support=512, width=100, online=Online(80_000, 50, 250, 512, 80_010), streams=50)


def run(session: Session) -> None:
    """Every agent on every seed: equal wheels, contexts and noise; equal first networks for equal architectures."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    if session.smoke and session.full:
        online = FULL.online._replace(trials=50, steps=1, slots=64)
        sizes = FULL._replace(outer=1, through=1, streams=1, num_seeds=1, online=online)
    table = methods(sizes.steps, sizes.width, sizes.online)
    session.refuse_unknown_cases(table)
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    # Compiling a contrast takes longer than a smoke run may: `--smoke --cases anchor` does.
    wanted = session.cases or (_SMOKED if session.smoke else tuple(table))
    chosen = {name: method for name, method in table.items() if name in wanted}
    with precision(x64=False):
        trained = {name: _train(session, name, method, sizes, seeds) for name, method in chosen.items() if name in META}
    for name, method in chosen.items():
        # As published: its sums go on through all trials.
        with precision(x64=name == LINEAR):
            of_deltas = _player(method.agent, sizes)
            for number, seed in enumerate(seeds):
                here = dataclasses.replace(session, seed=seed)
                if name not in META:
                    session.progress.begin(f"{name}: playing, seed {seed}", 1)
                    with precision(x64=False):
                        network = method.build(jax.random.key(seed))
                    begin = time.process_time()
                    regrets = of_deltas([network], seed)
                    _record(here, name, sizes, regrets * 3, time.process_time() - begin)
                    continue
                least = least_spent(runs[number].snapshots[-1] for runs in trained.values())
                _meta_record(here, name, method, sizes, trained[name][number], least, of_deltas)
    record_claims(session, claims(session.records))


Player = Callable[[list[Any], int], list[Record]]


def _train(session: Session, name: str, method: Method, sizes: Sizes, seeds: Sequence[int]) -> list[Trained]:
    """Of each seed; compiled once, for wheels that are an argument."""
    assert method.problem is not None and method.estimator is not None
    budget = Budget(steps=sizes.through if name == MAML else sizes.outer, clock=time.process_time)
    transformation = optax.scale_by_adam()

    def sample(key: jax.Array, tasks: Any) -> Any:
        chosen = jax.random.randint(key, (sizes.batch,), 0, sizes.tasks)
        return jax.tree.map(lambda leaf: leaf[chosen], tasks)

    def rate(fraction: jax.Array) -> jax.Array:
        return method.outer_rate * jnp.minimum(1.0, 2 * (1 - fraction) + _FLOOR)

    step = outer_step(method.problem, method.estimator, sample, rate, transformation)

    def start(seed: int) -> State:
        meta = method.build(jax.random.key(seed))
        return State(meta, transformation.init(meta))

    def wheels(seed: int) -> Any:
        return offline_tasks(jax.random.fold_in(jax.random.key(seed), 2), sizes.tasks, sizes.support, sizes.query)

    session.progress.begin(f"{name}: compiling", 1)
    program = compiled(step, start(seeds[0]), wheels(seeds[0]), budget.clock)
    runs = []
    for seed in seeds:
        key, what = jax.random.fold_in(jax.random.key(seed), 1), f"{name}, seed {seed}"
        runs.append(train(program.on(wheels(seed)), start(seed), key, budget, session.progress, what))
    return runs


def _player(agent: Agent, sizes: Sizes) -> Player:
    """Normalised regrets in per cent of an agent with each of these meta-parameters, by wheel and stream."""
    deltas = jnp.array(DELTAS)

    @jax.jit
    def normalised(meta_params: Any, keys: jax.Array) -> jax.Array:
        def one(delta: jax.Array, key: jax.Array) -> jax.Array:
            return 100 * play(agent, sizes.online, meta_params, key, delta) / uniform_regret(delta)

        return jax.vmap(lambda delta: jax.vmap(lambda key: one(delta, key))(keys))(deltas)

    def of_each(candidates: list[Any], seed: int) -> list[Record]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(23), seed), sizes.streams)
        # Networks are drawn in float32 for all.
        at = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), each) for each in candidates]
        told = [np.asarray(normalised(meta_params, keys)) for meta_params in at]
        return [dict(zip(map(str, DELTAS), regrets.tolist(), strict=True)) for regrets in told]

    return of_each


def _meta_record(
    session: Session, name: str, method: Method, sizes: Sizes, trained: Trained, least: tuple[float, int], of: Player
) -> None:
    last, first = trained.snapshots[-1], Snapshot(0, 0, 0.0, method.build(jax.random.key(session.seed)))
    kept = [first, *trained.snapshots]
    at = [last, within(kept, seconds=least[0]), within(kept, num_gradients=least[1])]
    session.progress.begin(f"{name}: playing, seed {session.seed}", 1)
    begin = time.process_time()
    regrets = of([snapshot.meta_params for snapshot in at], session.seed)
    playing = (time.process_time() - begin) / len(at)
    _record(
        session, name, sizes, regrets, playing, seconds=last.seconds, num_steps=last.step,
        num_gradients=last.num_gradients, equal_seconds=least[0], equal_gradients=least[1],
        equal_steps=[snapshot.step for snapshot in at], outer_loss=float(np.mean(trained.outer_losses[-50:])),
        statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
    )  # fmt: skip


def _record(session: Session, name: str, sizes: Sizes, regrets: list[Record], playing: float, **trained: Any) -> None:
    """Regrets: at the end, at equal time, at equal gradients; equal for agents without meta-training."""
    columns = dict(zip((_END, _AT_TIME, _AT_GRADIENTS), regrets, strict=True))
    at_rest = {"seconds": 0.0, "num_steps": 0, "num_gradients": 0, "passed": None, "stopped": ""}
    session.record(
        x64=name == LINEAR, kind="method", case=name, sizes=sizes, **columns,
        playing_seconds=playing, **{**at_rest, **trained},
    )  # fmt: skip


def judged(record: Record, column: str = _END) -> float:
    """The mean normalised regret over streams and the wheels of R10."""
    return float(np.mean([np.mean(record[column][str(delta)]) for delta in _JUDGED]))


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """R10, and who loses more than the agents by contrast, seed by seed."""
    here = [r for r in records if r["kind"] == "method"]

    def of(name: str, column: str = _END) -> dict[int, float]:
        return {r["seed"]: judged(r, column) for r in here if r["case"] == name}

    wheels = f"{min(_JUDGED)} to {max(_JUDGED)}"
    for name in CONTRASTS:
        for other in (SCRATCH, UNIFORM):
            yield above(f"R10: {other} loses more than {name} (%, wheels {wheels})", of(other), of(name))
        allowed = {seed: _OF_MAML * value for seed, value in of(MAML).items()}
        yield above(f"R10: {_OF_MAML} times MAML's loss is more than that of {name} (%)", allowed, of(name))
        for other in (LINEAR, NEURAL_LINEAR):
            yield above(f"{other} loses more than {name} (%)", of(other), of(name))
        for column, at in ((_AT_TIME, "time"), (_AT_GRADIENTS, "gradients")):
            yield above(f"MAML loses more than {name} at equal {at} (%)", of(MAML, column), of(name, column))


def show(records: Sequence[Record]) -> str:
    """Normalised regrets by wheel, then every claim."""
    here = [r for r in records if r["kind"] == "method"]
    header = [
        "agent", *map(str, DELTAS), "R10", "range", "equal time", "equal gradients", "s", "ms a step", "gradients",
        "passed",
    ]  # fmt: skip
    rows = []
    for name in dict.fromkeys(r["case"] for r in here):
        of = [r for r in here if r["case"] == name]
        cells = [decimals(float(np.mean([np.mean(r[_END][str(delta)]) for r in of])), 1) for delta in DELTAS]
        values = [judged(r) for r in of]
        equal = [decimals(float(np.mean([judged(r, c) for r in of])), 1) for c in (_AT_TIME, _AT_GRADIENTS)]
        seconds, steps = float(np.mean([r["seconds"] for r in of])), of[0]["num_steps"]
        cost = ["-"] * 4
        if steps:
            passed = f"{np.mean([r['passed'] for r in of]):.2f}"
            gradients = f"{np.mean([r['num_gradients'] for r in of]):,.0f}"
            cost = [f"{seconds:.0f}", milliseconds(seconds / steps), gradients, passed]
        span = f"{min(values):.1f}-{max(values):.1f}"
        rows.append([name, *cells, decimals(float(np.mean(values)), 1), span, *(equal if steps else "--"), *cost])
    title = f"Regret on wheels of these radii, in per cent of chance's [{seeds_of(here)}]"
    stopped = [wrap(f"{r['case']}, seed {r['seed']}: {r['stopped']}") for r in here if r["stopped"]]
    return "\n\n".join([title, lay_out(header, rows, left=(0,)), *stopped, show_claims([*claims(records)])]).rstrip()
