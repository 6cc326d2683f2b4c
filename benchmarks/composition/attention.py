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
from benchmarks.experiments.claims import Claim, above, claim, record_claims, show_claims
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
    record_claims(session, claims(session.records))


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
        both = (code, tasks), (unseen_code, unseen_tasks)
        shared, named = (decode(*of(*both[0]), *of(*both[1])) for of in (_of_pairs, _of_queries))
        pictured = name == HYPERNETWORK and share == max(sizes.shares) and seed == seeds[0]
        dataclasses.replace(session, seed=seed).record(
            x64=False, kind="transformer", case=what, attention=name, share=share, sizes=sizes,
            num_seen=len(divisions[at].seen), inside=inside, unseen=outside, loss=learned.losses[at],
            seconds=learned.seconds, num_gradients=learned.num_gradients, shared=shared._asdict(),
            named=named._asdict(),
            codes=_shown(unseen_code, unseen_tasks) if pictured else None,
        )  # fmt: skip


class Decoded(NamedTuple):
    """How well codes on unseen combinations tell a label, by a linear readout that was fitted on seen combinations.

    Attributes:
      accuracy: the mean over labels of how often each is told, so that no guess without a code is above chance.
      chance: one over the number of labels.
      standard_error: of the accuracy, over tasks.
    """

    accuracy: float
    chance: float
    standard_error: float


Labelled = tuple[npt.NDArray[np.float64], npt.NDArray[np.int_]]


def decode(
    codes: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int_],
    unseen_codes: npt.NDArray[np.float64],
    unseen_labels: npt.NDArray[np.int_],
) -> Decoded:
    """Least squares from codes to labels, all labels of equal weight.

    Args:
      codes: on seen combinations, shape (tasks, items, numbers).
      labels: their labels, shape (tasks, items).
      unseen_codes: on unseen combinations.
      unseen_labels: their labels.
    """
    known = np.unique(unseen_labels)
    rows, tested = (_with_one(each) for each in (codes, unseen_codes))
    kept = np.isin(labels, known)
    flat, targets = rows[kept], (labels[kept][:, None] == known).astype(float)
    weights = (targets / targets.sum(0)).sum(1, keepdims=True)
    curvature = flat.T @ (weights * flat)
    curvature += _RIDGE * np.trace(curvature) / len(curvature) * np.eye(len(curvature))
    readout = np.linalg.solve(curvature, flat.T @ (weights * targets))
    right = known[(tested @ readout).argmax(-1)] == unseen_labels
    shares = (unseen_labels[..., None] == known).astype(float)
    shares = (shares / shares.sum((0, 1)) / len(known)).sum(-1)
    # Items of one task are not independent, tasks are: the error of a ratio of sums over tasks.
    accuracy = float(np.sum(shares * right))
    misses = np.sum(shares * (right - accuracy), 1)
    return Decoded(accuracy, 1 / len(known), float(np.sqrt(len(misses)) * misses.std(ddof=1)))


def _with_one(codes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([codes, np.ones_like(codes[..., :1])], -1)


def _of_pairs(code: Any, tasks: Tasks) -> Labelled:
    """The code of each query and example; whether the same conjunction is the larger one at both."""
    given = np.asarray(code, np.float64)
    number = given.shape[2]
    active = np.asarray(tasks.active)
    same = active[:, number:, None] == active[:, None, :number]
    return given.reshape(len(given), -1, given.shape[-1]), same.reshape(len(given), -1).astype(int)


def _of_queries(code: Any, tasks: Tasks) -> Labelled:
    """The code of each query, its mean over examples; which conjunction is the larger one there."""
    given = np.asarray(code, np.float64)
    return given.mean(2), np.asarray(tasks.active)[:, given.shape[2] :]


def _shown(code: Any, tasks: Tasks) -> dict[str, Any]:
    """Codes of some queries and examples for the picture: two components, and whether they share a conjunction.

    The components are the difference of means between those that do and those that do not, and the leading one of
    what is orthogonal to it.
    """
    codes, same = _of_pairs(code, tasks)
    # As many as a picture shows.
    flat, labels = codes.reshape(-1, codes.shape[-1])[:2000], same.reshape(-1)[:2000]
    flat = flat - flat.mean(0)
    first = flat[labels == 1].mean(0) - flat[labels == 0].mean(0)
    first = first / max(float(np.linalg.norm(first)), np.finfo(np.float64).tiny)
    _, _, axes = np.linalg.svd(flat - np.outer(flat @ first, first), full_matrices=False)
    return {"components": np.round(flat @ np.stack([first, axes[0]], 1), 3), "shared": labels}


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
    for field in ("shared", "named"):
        errors = [
            (r[field]["accuracy"] - r[field]["chance"]) / r[field]["standard_error"]
            for r in rows
            if r["attention"] == HYPERNETWORK and r["share"] == shares[-1] and r[field]["standard_error"]
        ]
        text = f"{HYPERNETWORK}: {field} decoded, standard errors above chance, each seed"
        yield claim(text, errors, 10, all(e >= 10 for e in errors) if errors else None)


def show(records: Sequence[Record]) -> str:
    """R^2 of each kind by share of seen combinations, what the code tells, and every claim."""
    rows = [r for r in records if r["kind"] == "transformer"]
    header = ["attention", "seen", "training", "unseen", "shared", "named", "s", "gradients"]
    table = []
    for name in KINDS:
        for share in sorted({r["share"] for r in rows}):
            of = [r for r in rows if r["attention"] == name and r["share"] == share]
            if of:
                values = [_decoded([r.get(key) for r in of]) for key in ("shared", "named")]
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


def _decoded(found: Sequence[Any]) -> str:
    """Accuracies and chances, means over seeds."""
    if None in found:
        return "-"
    return " / ".join(f"{np.mean([each[key] for each in found]):.3f}" for key in ("accuracy", "chance"))


def _spread(values: Sequence[float]) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.3f} ± {decimals(float(deviation), 3)}"
