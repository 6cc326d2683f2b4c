"""Few-shot regression by a recurrent spiking network that learns by e-prop: anchors by contrast against its rivals."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.experiments.claims import Claim, above, at_most, record_claims, show_claims
from benchmarks.experiments.spiking_methods import (
    ANCHOR,
    CONTRASTS,
    MAML_BPTT,
    MAML_EPROP,
    OUTER_RATE,
    PAPER,
    STRENGTHS,
    TRUNCATED,
    TRUNCATED_STRENGTHS,
    Method,
    Sizes,
    first_meta_params,
    methods,
    spiking_tasks,
    test_error,
    transformation,
)
from benchmarks.harness import Record, Session, precision, use_cheap_xla_flags
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
from benchmarks.tables import decimals, lay_out, milliseconds, seeds_of, wrap

NAME = "spiking"
ABOUT = (
    "few-shot regression by spikes, e-prop within: anchors and strengths by contrast against backprop through the last "
    "steps and MAML; 5 minutes on two cores"
)
# Choices were made on seed 100, after a run on seeds 1 to 3 in which MAML's settings failed: none is reported.
_FIRST_SEED = 4
# R9: the error of what was meta-learned over that of what was not.
_IMPROVEMENT = 0.6


class Scale(NamedTuple):
    """How much is run.

    Attributes:
      sizes: of the network and its inner phases.
      outer: steps of those that learn for long.
      short: steps of MAML, whose outer steps are cheaper.
      num_tests: tasks tested on.
      num_seeds: reported.
    """

    sizes: Sizes = Sizes()
    outer: int = 40
    short: int = 120
    num_tests: int = 50
    num_seeds: int = 3


SMOKE = Scale(Sizes(6, 4, 5, 0.1, 3, 2, 2, num_tasks=2), 2, 2, 4, 1)
_SMOKE_CASES = (STRENGTHS,)
FULL = Scale(PAPER, 1000, 1000, 100)


def run(session: Session) -> None:
    """Every method on every seed: equal networks at the start, equal tests."""
    # Four programs that would take longer to compile than to run.
    use_cheap_xla_flags()
    scale = SMOKE if session.smoke else FULL if session.full else Scale()
    if session.smoke and session.full:
        scale = Scale(PAPER._replace(num_tasks=1), 1, 1, 4, 1)
    with precision(x64=False):
        table = methods(scale.sizes)
        session.refuse_unknown_cases(table)
        cases = session.cases or (_SMOKE_CASES if session.smoke else tuple(table))
        chosen = {name: method for name, method in table.items() if name in cases}
        programs: dict[str, Program] = {}
        tests: dict[str, Callable[[Any, Any], jax.Array]] = {}
        seeds = session.seeds(_FIRST_SEED, scale.num_seeds)
        trained = {name: _train(session, name, method, scale, seeds, programs) for name, method in chosen.items()}
        for method in chosen.values():
            tests.setdefault(method.program, _tester(method))
        for number, seed in enumerate(seeds):
            least = least_spent(runs[number].snapshots[-1] for runs in trained.values())
            at = dataclasses.replace(session, seed=seed)
            for name, method in chosen.items():
                _record(at, name, tests[method.program], scale, trained[name][number], least)
    record_claims(session, claims(session.records))


def _train(
    session: Session, name: str, method: Method, scale: Scale, seeds: Sequence[int], programs: dict[str, Program]
) -> list[Trained]:
    """Of each seed; a program that methods share is compiled once."""
    change = transformation(method)

    def start(seed: int) -> State:
        meta = first_meta_params(jax.random.key(seed), scale.sizes)
        return State(meta, change.init(meta))

    if method.program not in programs:
        session.progress.begin(f"{method.program}: compiling", 1)
        step = outer_step(
            method.problem, method.estimator, lambda key, data: spiking_tasks(key, scale.sizes.num_tasks, scale.sizes),
            cosine_decay(OUTER_RATE), change,
        )  # fmt: skip
        programs[method.program] = compiled(step, start(0), (), time.process_time)
    steps = scale.short if name in (MAML_EPROP, MAML_BPTT) else scale.outer
    budget, program = Budget(steps=steps, clock=time.process_time), programs[method.program]
    return [
        train(
            program, start(seed), jax.random.fold_in(jax.random.key(seed), 1), budget, session.progress,
            f"{name}, seed {seed}",
        )
        for seed in seeds
    ]  # fmt: skip


def _tester(method: Method) -> Callable[[Any, Any], jax.Array]:
    """The mean error over tasks, from meta-parameters and tasks."""
    return jax.jit(lambda meta, tasks: jnp.mean(jax.vmap(lambda task: test_error(method, meta, task))(tasks)))


def _record(
    session: Session,
    name: str,
    test: Callable[[Any, Any], jax.Array],
    scale: Scale,
    trained: Trained,
    least: tuple[float, int],
) -> None:
    session.progress.begin(f"{name}: testing, seed {session.seed}", 1)
    start = Snapshot(0, 0, 0.0, first_meta_params(jax.random.key(session.seed), scale.sizes))
    last, snapshots = trained.snapshots[-1], [start, *trained.snapshots]
    tasks = spiking_tasks(jax.random.fold_in(jax.random.key(41), session.seed), scale.num_tests, scale.sizes)
    at = last, within(snapshots, seconds=least[0]), within(snapshots, num_gradients=least[1]), start
    # The same snapshot is often several of these, and testing takes longer than an outer step.
    found = {snapshot.step: test(snapshot.meta_params, tasks).item() for snapshot in {s.step: s for s in at}.values()}
    errors = [found[snapshot.step] for snapshot in at]
    session.record(
        x64=False, kind="method", case=name, sizes=scale.sizes, error=errors[0], error_at_equal_time=errors[1],
        error_at_equal_gradients=errors[2], error_unlearned=errors[3], seconds=last.seconds, num_steps=last.step,
        num_gradients=last.num_gradients, equal_seconds=least[0], equal_gradients=least[1],
        statuses=trained.statuses, passed=trained.passed, stopped=trained.stopped,
    )  # fmt: skip


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """R9 and the comparisons at equal time and equal gradients; errors are logarithmic in comparisons."""
    here = [r for r in records if r["kind"] == "method"]

    def logs(name: str, column: str) -> dict[int, float]:
        return {r["seed"]: float(np.log(r[column])) for r in here if r["case"] == name and r[column]}

    for name in CONTRASTS:
        ratios = [r["error"] / r["error_unlearned"] for r in here if r["case"] == name and r["error"]]
        yield at_most(f"R9: error of {name} over that of the unlearned anchor", ratios, _IMPROVEMENT)
    for ours, theirs in ((ANCHOR, TRUNCATED), (STRENGTHS, TRUNCATED_STRENGTHS)):
        text = f"R9: {theirs} errs more than {ours} at equal steps"
        yield above(text, logs(theirs, "error"), logs(ours, "error"))
    yield above(f"{ANCHOR} errs more than {STRENGTHS}", logs(ANCHOR, "error"), logs(STRENGTHS, "error"))
    for where in ("time", "gradients"):
        column = f"error_at_equal_{where}"
        for theirs in (TRUNCATED, MAML_EPROP, MAML_BPTT):
            yield above(
                f"{theirs} errs more than {ANCHOR} at equal {where}", logs(theirs, column), logs(ANCHOR, column)
            )


def show(records: Sequence[Record]) -> str:
    """Errors with their spread over seeds, then every claim."""
    here = [r for r in records if r["kind"] == "method"]
    header = [
        "method",
        "error",
        "equal time",
        "equal gradients",
        "unlearned",
        "s",
        "steps",
        "ms",
        "gradients",
        "passed",
    ]
    rows = []
    for name in dict.fromkeys(r["case"] for r in here):
        of = [r for r in here if r["case"] == name]
        columns = "error_at_equal_time", "error_at_equal_gradients", "error_unlearned"
        seconds = float(np.mean([r["seconds"] for r in of]))
        counts = [f"{np.mean([r[c] for r in of]):,.0f}" for c in ("seconds", "num_steps", "num_gradients")]
        rows.append(
            [
                name, _mean(of, "error", spread=True), *(_mean(of, column) for column in columns), *counts[:2],
                milliseconds(seconds / max(of[0]["num_steps"], 1)), counts[2],
                decimals(float(np.mean([r["passed"] for r in of])), 2),
            ]
        )  # fmt: skip
    title = f"Mean squared error of spiking networks on new sinusoids of 10 points [{seeds_of(here)}]"
    stopped = [wrap(f"{r['case']}, seed {r['seed']}: {r['stopped']}") for r in here if r["stopped"]]
    return "\n\n".join([title, lay_out(header, rows, left=(0,)), *stopped, show_claims([*claims(records)])]).rstrip()


def _mean(records: Sequence[Record], field: str, *, spread: bool = False) -> str:
    values = [r[field] for r in records if r[field] is not None]
    around = f" +- {np.std(values, ddof=1):.3f}" if spread and len(values) > 1 else ""
    return f"{decimals(float(np.mean(values)), 3) if values else '-'}{around}"
