"""Attention as a hypernetwork: how softmax, linear and hypernetwork linear attention recombine what they have read."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from benchmarks import figures
from benchmarks.composition.fuzzy_logic import Logic, Tasks, divide, sampler
from benchmarks.composition.transformers import Kind, Read, Shape, Trainer, first_params, transformer
from benchmarks.experiments.claims import Claim, above, at_least, claim, show_claims
from benchmarks.harness import Record, Session, precision
from benchmarks.tables import decimals, lay_out, seeds_of

NAME = "attention"
ABOUT = "softmax, linear and hypernetwork linear attention on unseen combinations of fuzzy logic; under 10 minutes"
# Settings were chosen on seed 0.
_FIRST_SEED = 1
SOFTMAX, LINEAR, HYPERNETWORK = "softmax", "linear", "hypernetwork"
KINDS: dict[str, Kind] = {SOFTMAX: "softmax", LINEAR: "linear", HYPERNETWORK: "hypernetwork"}
# Of 3e-3 and 8e-3, by the first 500 steps of the hypernetwork form on three variables.
_RATE = 3e-3
# Added to the readout's normal equations, over the mean of their diagonal.
_RIDGE = 1e-3


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      logic: the tasks.
      shape: of the transformers.
      num_steps: of training.
      num_tasks: in each step.
      shares: of the combinations that are seen.
      num_unseen: combinations that none sees.
      num_tests: tasks tested on, of each kind.
      num_seeds: reported.
    """

    logic: Logic = Logic(3, 16, 8)
    shape: Shape = Shape()
    num_steps: int = 1500
    num_tasks: int = 32
    shares: tuple[float, ...] = (0.3, 0.5, 0.75)
    num_unseen: int = 7
    num_tests: int = 512
    num_seeds: int = 3


SMOKE = Sizes(Logic(2, 6, 4), Shape(8, 2, 2), 3, 4, (0.7,), 1, 16, 1)
# Nearer to Schug et al. (2025): four variables, width 128, more steps and tasks.
FULL = Sizes(Logic(4, 32, 16), Shape(128), 50_000, 128, (0.2, 0.4, 0.6, 0.8), 20)


def run(session: Session) -> None:
    """Transformers with each kind of attention, on each share of seen combinations and each seed."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    session.refuse_unknown_cases(KINDS)
    with precision(x64=False):
        for name in session.cases or ((HYPERNETWORK,) if session.smoke else tuple(KINDS)):
            learner = _Learner(KINDS[name], sizes)
            for share in sizes.shares:
                _record(session, name, share, sizes, learner)
    for told in claims(session.records):
        session.record(x64=False, kind="claim", case="claims", **told)


class _Learner:
    """A kind of attention, its training and its tests, compiled once."""

    def __init__(self, kind: Kind, sizes: Sizes) -> None:
        def read(params: Any, tasks: Tasks) -> Read:
            return transformer(params, tasks.tokens, sizes.logic.num_examples, kind, sizes.shape)

        def loss(params: Any, tasks: Tasks) -> jax.Array:
            return jnp.mean(jnp.square(read(params, tasks).outputs[..., 0] - tasks.targets))

        @jax.jit
        def test(params: Any, key: jax.Array, chances: jax.Array) -> tuple[jax.Array, jax.Array, Tasks]:
            tasks = sampler(sizes.logic, sizes.num_tests)(key, chances)
            found = read(params, tasks)
            explained = 1 - jnp.mean(jnp.square(found.outputs[..., 0] - tasks.targets)) / jnp.var(tasks.targets)
            return explained, found.code, tasks

        self.test = test
        self.trainer = Trainer(loss, sampler(sizes.logic, sizes.num_tasks), _RATE, sizes.num_steps)


def _record(session: Session, name: str, share: float, sizes: Sizes, learner: _Learner) -> None:
    """Train a transformer for each seed, side by side, test them, and record what came of each."""
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    divisions = [divide(sizes.logic, share, sizes.num_unseen, seed) for seed in seeds]
    seen = [division.chances(division.seen, sizes.logic) for division in divisions]
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    starts = [first_params(key[0], sizes.logic.num_inputs, 1, sizes.shape) for key in keys]
    what = f"{name}, {share:.0%} seen"
    learned = learner.trainer.train(starts, [key[1] for key in keys], seen, session.progress, what)
    for at, seed in enumerate(seeds):
        unseen = divisions[at].chances(divisions[at].unseen, sizes.logic)
        inside, code, tasks = learner.test(learned.params[at], jax.random.key(17), seen[at])
        outside, unseen_code, unseen_tasks = learner.test(learned.params[at], jax.random.key(19), unseen)
        decoded = decode(code, tasks, unseen_code, unseen_tasks, sizes.logic)
        pictured = name == HYPERNETWORK and share == max(sizes.shares) and seed == seeds[0]
        dataclasses.replace(session, seed=seed).record(
            x64=False, kind="transformer", case=what, attention=name, share=share, sizes=sizes,
            num_seen=len(divisions[at].seen), inside=inside, unseen=outside, loss=learned.losses[at],
            seconds=learned.seconds, num_gradients=learned.num_gradients, decoded=decoded._asdict(),
            codes=_shown(unseen_code, unseen_tasks) if pictured else None,
        )  # fmt: skip


class Decoded(NamedTuple):
    """How well the code of a query tells which conjunction is the larger one there, on unseen combinations.

    Attributes:
      accuracy: of a linear readout that was fitted on seen combinations.
      chance: of the best guess without the code.
      standard_error: of the accuracy above chance, over tasks.
    """

    accuracy: float
    chance: float
    standard_error: float


def decode(code: Any, tasks: Tasks, unseen_code: Any, unseen_tasks: Tasks, logic: Logic) -> Decoded:
    """Least squares from the code of a query, its mean over examples, to which conjunction is active.

    Args:
      code: shape (tasks, queries, examples, heads), on seen combinations.
      tasks: these.
      unseen_code: on unseen combinations.
      unseen_tasks: these.
      logic: of both.
    """
    features, tested = (_features(np.asarray(each)) for each in (code, unseen_code))
    labels, asked = (np.asarray(each.active) for each in (tasks, unseen_tasks))
    targets = np.eye(2**logic.num_variables)[labels.reshape(-1)]
    flat = features.reshape(len(targets), -1)
    curvature = flat.T @ flat
    curvature += _RIDGE * np.trace(curvature) / len(curvature) * np.eye(len(curvature))
    readout = np.linalg.solve(curvature, flat.T @ targets)
    right = (tested @ readout).argmax(-1) == asked
    guess = asked == np.bincount(asked.reshape(-1)).argmax()
    # Queries of one task are not independent: tasks are.
    gains = right.mean(1) - guess.mean(1)
    return Decoded(float(right.mean()), float(guess.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5))


def _features(code: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Means over examples, and a 1: shape (tasks, queries, heads + 1)."""
    mean = code.astype(np.float64).mean(2)
    return np.concatenate([mean, np.ones_like(mean[..., :1])], -1)


def _shown(code: Any, tasks: Tasks) -> dict[str, Any]:
    """Codes of some queries for the picture: their two leading components, with the conjunctions that are active."""
    mean = _features(np.asarray(code))[..., :-1].reshape(-1, code.shape[-1])
    centred = mean - mean.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    # As many as a picture shows.
    kept = slice(0, 1500)
    return {
        "components": np.round(centred[kept] @ axes[:2].T, 3),
        "active": np.asarray(tasks.active).reshape(-1)[kept],
    }


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """The hypernetwork form above both others on unseen combinations; its code says which conjunction is active."""
    rows = [r for r in records if r["kind"] == "transformer"]

    def of(name: str, share: float, field: str = "unseen") -> dict[int, float]:
        return {r["seed"]: float(r[field]) for r in rows if r["attention"] == name and r["share"] == share}

    for share in sorted({r["share"] for r in rows}):
        for other in (SOFTMAX, LINEAR):
            text = f"hypernetwork above {other}: R^2 on unseen combinations, {share:.0%} seen"
            yield above(text, of(HYPERNETWORK, share), of(other, share))
    shares = sorted({r["share"] for r in rows})
    for name in KINDS:
        first, last = of(name, shares[0]), of(name, shares[-1])
        if first and len(shares) > 1:
            yield above(f"{name}: R^2 on unseen combinations, {shares[-1]:.0%} above {shares[0]:.0%} seen", last, first)
    errors = [
        (r["decoded"]["accuracy"] - r["decoded"]["chance"]) / r["decoded"]["standard_error"]
        for r in rows
        if r["attention"] == HYPERNETWORK and r["share"] == shares[-1] and r["decoded"]["standard_error"]
    ]
    text = "hypernetwork: standard errors of decoding above chance, unseen combinations, each seed"
    yield claim(text, errors, 10, all(e >= 10 for e in errors) if errors else None)
    # Standard errors fall with the number of tasks; twice chance does not depend on it.
    gains = [float(r["decoded"]["accuracy"] / r["decoded"]["chance"]) for r in rows if r["attention"] == HYPERNETWORK]
    yield at_least("hypernetwork: accuracy of decoding over chance", gains, 2)


def show(records: Sequence[Record]) -> str:
    """R^2 of each kind by share of seen combinations, what the code tells, and every claim."""
    rows = [r for r in records if r["kind"] == "transformer"]
    header = ["attention", "seen", "training", "unseen", "decoded", "chance", "s", "gradients"]
    table = []
    for name in KINDS:
        for share in sorted({r["share"] for r in rows}):
            of = [r for r in rows if r["attention"] == name and r["share"] == share]
            if of:
                values = [f"{np.mean([r['decoded'][key] for r in of]):.3f}" for key in ("accuracy", "chance")]
                cost = [
                    f"{np.mean([r['seconds'] for r in of]):.0f}",
                    f"{np.mean([r['num_gradients'] for r in of]):.0f}",
                ]
                of_both = [_spread([r[key] for r in of]) for key in ("inside", "unseen")]
                table.append([name, f"{share:.0%}", *of_both, *values, *cost])
    title = f"R^2 on fuzzy logic, mean and standard deviation over seeds [{seeds_of(rows)}]"
    parts = [title, lay_out(header, table, left=(0,)), show_claims([*claims(records)])]
    return "\n\n".join(parts).rstrip()


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """R^2 against the share of seen combinations, and the codes of the hypernetwork form."""
    rows = [r for r in records if r["kind"] == "transformer"]
    return [figures.draw_attention(rows, folder / "attention.png")] if rows else []


def _spread(values: Sequence[float]) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {decimals(float(deviation), 3)}"
