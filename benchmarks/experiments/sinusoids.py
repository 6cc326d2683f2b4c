"""Few-shot regression of sinusoids: anchors, strengths and gains by contrast, against MAML and its kin; controls."""

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
from benchmarks.experiments.sinusoids_methods import (
    ANCHOR,
    CONTRASTS,
    CONTROLS,
    FOMAML,
    GAINS,
    HEAD,
    MAML,
    REPTILE,
    Method,
    Steps,
    mean_squared_error,
    methods,
)
from benchmarks.harness import Record, Session, cosine, flatten, precision
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
from benchmarks.tables import lay_out, milliseconds, scientific, seeds_of, wrap
from contrastive_meta.problems import sinusoid_tasks

NAME = "sinusoids"
ABOUT = (
    "few-shot regression: anchor, strengths and gains by contrast against MAML, FOMAML, Reptile, ANIL, iMAML, CAVIA, "
    "and negative controls; 10 minutes on two cores"
)
# Choices were made on seeds of 100 and above, after a run on seeds 1 to 3 whose settings failed: none is reported.
_FIRST_SEED = 4
# Largest norm of a meta-gradient: a task in a batch whose learning runs away must not decide the next hundred steps.
_CLIP = 10.0
# Conditions of the experiments R6 and R8.
_IMPROVEMENT, _OF_MAML, _COSINE = 3.0, 1.5, 0.9


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      steps: inner ones of the contrast.
      outer: steps of those that learn to convergence, and of the controls.
      through: steps of those that differentiate through ten steps: an outer step is some ten times cheaper.
      num_tasks: in a batch.
      num_tests: tasks tested on.
      num_seeds: reported.
      widths: of the hidden layers.
    """

    steps: Steps = Steps()
    outer: int = 60
    through: int = 1000
    num_tasks: int = 25
    num_tests: int = 100
    num_seeds: int = 3
    widths: tuple[int, ...] = (40, 40)


# One of each kind of estimator: each contrast takes ten seconds to compile.
_SMOKE_CASES = (ANCHOR, MAML, REPTILE)
SMOKE = Sizes(Steps(4, 3), 2, 2, 2, 4, 1, (4,))
# Inner steps of the reproduction that was calibrated, and 25,000 training tasks, as published.
FULL = Sizes(Steps(300, 150), outer=1000, through=10_000)


def run(session: Session) -> None:
    """Every method on every seed: equal starts for equal networks, equal tests."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    if session.smoke and session.full:
        sizes = FULL._replace(outer=1, through=1, num_tests=4, num_seeds=1)
    table = methods(sizes.steps, sizes.widths)
    session.refuse_unknown_cases(table)
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    cases = session.cases or (_SMOKE_CASES if session.smoke else tuple(table))
    with precision(x64=False):
        chosen = {name: method for name, method in table.items() if name in cases}
        trained = {name: _train(session, name, method, sizes, seeds) for name, method in chosen.items()}
        tests = {name: _tester(method) for name, method in chosen.items()}
        for number, seed in enumerate(seeds):
            least = least_spent(runs[number].snapshots[-1] for name, runs in trained.items() if name not in CONTROLS)
            for name, method in chosen.items():
                at = dataclasses.replace(session, seed=seed)
                start = method.build(jax.random.key(seed)).meta_params
                _record(at, name, tests[name], sizes, start, trained[name][number], least)
        if GAINS in trained:
            _check(session, chosen[GAINS], sizes, trained[GAINS][0])
    record_claims(session, claims(session.records))


def _train(session: Session, name: str, method: Method, sizes: Sizes, seeds: Sequence[int]) -> list[Trained]:
    """Of each seed; compiled once."""
    converges = name in CONTRASTS + CONTROLS
    budget = Budget(steps=sizes.outer if converges else sizes.through, clock=time.process_time)
    transformation = optax.chain(
        optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(), optax.add_decayed_weights(1e-4)
    )
    split = method.build(jax.random.key(0))

    def sample(key: jax.Array, data: Any) -> Any:
        return sinusoid_tasks(key, sizes.num_tasks)

    step = outer_step(split.problem, method.estimator, sample, cosine_decay(method.outer_rate), transformation)
    session.progress.begin(f"{name}: compiling", 1)
    program = compiled(step, State(split.meta_params, transformation.init(split.meta_params)), (), budget.clock)
    runs = []
    for seed in seeds:
        meta = method.build(jax.random.key(seed)).meta_params
        key, what = jax.random.fold_in(jax.random.key(seed), 1), f"{name}, seed {seed}"
        runs.append(train(program, State(meta, transformation.init(meta)), key, budget, session.progress, what))
    return runs


def _tester(method: Method) -> Callable[[Any, Any], jax.Array]:
    """The mean error over tasks, from meta-parameters and tasks."""
    split = method.build(jax.random.key(0))

    @jax.jit
    def test(meta_params: Any, tasks: Any) -> jax.Array:
        return jnp.mean(jax.vmap(lambda task: mean_squared_error(split, method.learner, meta_params, task))(tasks))

    return test


def _record(
    session: Session,
    name: str,
    test: Callable[[Any, Any], jax.Array],
    sizes: Sizes,
    start: Any,
    trained: Trained,
    least: tuple[float, int],
) -> None:
    first, last = Snapshot(0, 0, 0.0, start), trained.snapshots[-1]
    tasks = sinusoid_tasks(jax.random.fold_in(jax.random.key(23), session.seed), sizes.num_tests)
    at_time = within([first, *trained.snapshots], seconds=least[0])
    at_gradients = within([first, *trained.snapshots], num_gradients=least[1])
    session.progress.begin(f"{name}: testing, seed {session.seed}", 1)
    session.record(
        x64=False, kind="method", case=name, sizes=sizes, error=test(last.meta_params, tasks).item(),
        error_at_equal_time=test(at_time.meta_params, tasks).item(),
        error_at_equal_gradients=test(at_gradients.meta_params, tasks).item(),
        error_unlearned=test(first.meta_params, tasks).item(), seconds=last.seconds, num_steps=last.step,
        num_gradients=last.num_gradients, equal_seconds=least[0], equal_gradients=least[1],
        statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
    )  # fmt: skip


def _check(session: Session, method: Method, sizes: Sizes, trained: Trained) -> None:
    """R8: at convergence the contrast has the direction of implicit differentiation, the direct term included."""
    session.progress.begin("checking meta-gradients", 1)
    num_checked = 2 if session.smoke else 10
    with precision(x64=True):
        meta = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), trained.state.meta_params)
        problem = method.build(jax.random.key(0)).problem
        tasks = sinusoid_tasks(jax.random.key(29), num_checked)
        learner = cm.LBFGS(tol=1e-8, max_steps=5 if session.smoke else 5000)
        implicit = cm.ImplicitDifferentiation(learner, cm.ConjugateGradient(tol=1e-8))
        contrast = cm.Contrastive(learner)

        @jax.jit
        def of_both(task: Any) -> tuple[Any, Any]:
            return implicit.estimate(problem, meta, task).grad, contrast.estimate(problem, meta, task).grad

        cosines = []
        for k in range(num_checked):
            exact, ours = of_both(jax.tree.map(lambda leaf, k=k: leaf[k], tasks))
            cosines.append(cosine(ours, flatten(exact)))
    session.record(x64=True, kind="gradients", case=GAINS, cosines=cosines, num_tasks=num_checked)


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """R6, R7 and R8, and the comparisons at equal time and equal gradients; errors are logarithmic in comparisons."""
    here = [r for r in records if r["kind"] == "method"]

    def of(name: str, column: str = "error") -> dict[int, float]:
        return {r["seed"]: r[column] for r in here if r["case"] == name and r[column]}

    def logs(name: str, column: str) -> dict[int, float]:
        return {seed: float(np.log(value)) for seed, value in of(name, column).items()}

    def ratios(firsts: dict[int, float], seconds: dict[int, float]) -> list[float]:
        return [firsts[seed] / seconds[seed] for seed in firsts if seed in seconds]

    unlearned = "error_unlearned"
    yield at_least(
        "R6: error of the unlearned anchor over the learned one",
        ratios(of(ANCHOR, unlearned), of(ANCHOR)),
        _IMPROVEMENT,
    )
    yield at_most("R6: error of the anchor over MAML's, each at its own budget", ratios(of(ANCHOR), of(MAML)), _OF_MAML)
    yield above("R6: FOMAML errs more than MAML (logarithms)", logs(FOMAML, "error"), logs(MAML, "error"))
    for name in CONTROLS:
        text = f"R7: {name} errs more than the anchor (logarithms)"
        yield above(text, logs(name, "error"), logs(ANCHOR, "error"))
    yield above("R8: fast head errs more than gains (logarithms)", logs(HEAD, "error"), logs(GAINS, "error"))
    for record in records:
        if record["kind"] == "gradients":
            yield at_least("R8: cosine of gains to the implicit meta-gradient", record["cosines"], _COSINE)
    for at in ("time", "gradients"):
        column = f"error_at_equal_{at}"
        for name in dict.fromkeys(r["case"] for r in here):
            if name != ANCHOR and name not in CONTROLS:
                text = f"{name} errs more than the anchor at equal {at} (logarithms)"
                yield above(text, logs(name, column), logs(ANCHOR, column))


def show(records: Sequence[Record]) -> str:
    """Errors with their range over seeds, then every claim."""
    here = [r for r in records if r["kind"] == "method"]
    header = ["method", "error", "range", "unlearned", "equal time", "equal gradients", "s", "ms a step", "passed"]
    rows = []
    for name in dict.fromkeys(r["case"] for r in here):
        of = [r for r in here if r["case"] == name]
        errors = [r["error"] for r in of if r["error"] is not None]
        means = [_mean(of, f) for f in ("error_unlearned", "error_at_equal_time", "error_at_equal_gradients")]
        seconds = float(np.mean([r["seconds"] for r in of]))
        span = f"{scientific(min(errors))}-{scientific(max(errors))}" if errors else "-"
        step = milliseconds(seconds / max(of[0]["num_steps"], 1))
        passed = f"{np.mean([r['passed'] for r in of]):.2f}"
        rows.append([name, _mean(of, "error"), span, *means, f"{seconds:.0f}", step, passed])
    title = f"Mean squared error on new sinusoids of 10 points [{seeds_of(here)}]"
    stopped = [wrap(f"{r['case']}, seed {r['seed']}: {r['stopped']}") for r in here if r["stopped"]]
    return "\n\n".join([title, lay_out(header, rows, left=(0,)), *stopped, show_claims([*claims(records)])]).rstrip()


def _mean(records: Sequence[Record], field: str) -> str:
    values = [r[field] for r in records if r[field] is not None]
    return scientific(float(np.mean(values))) if values else "-"
