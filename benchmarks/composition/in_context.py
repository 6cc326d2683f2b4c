"""Tasks of a hyperteacher in context: transformers with a bottleneck between inferring and executing, and without."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from benchmarks import figures
from benchmarks.composition.hyperteacher_networks import (
    NUM_HIDDEN,
    NUM_OUTPUTS,
    network,
    newton_learner,
    problem,
    unexplained,
)
from benchmarks.composition.hyperteacher_supports import NUM_MODULES, Support, combinations_of, draw_weights
from benchmarks.composition.transformers import Shape, Trainer, first_params, transformer
from benchmarks.experiments.claims import Claim, above, at_most, record_claims, show_claims
from benchmarks.harness import Record, Session, precision
from benchmarks.tables import lay_out, scientific, seeds_of

NAME = "in_context"
ABOUT = "transformers that read a modular teacher's tasks in context, with and without a bottleneck; under 10 minutes"
# Settings were chosen on seed 0.
_FIRST_SEED = 1
PLAIN, BOTTLENECK = "plain", "bottleneck"
# Of 2e-3 and 3e-3.
_RATE = 3e-3
# Of inferred weights: the readout of a transformer starts at a tenth of the scale of its other kernels.
_SCALE = 10.0
# An error on unseen pairs is that of training pairs where it is no larger than this many times.
_CLOSED = 1.5


# Modules 0 to 5: no training task joins those that are three apart. All other pairs connect the modules; pairs within
# 0, 1, 2 and within 3, 4, 5 do not.
UNSEEN = Support(((0, 3), (1, 4), (2, 5)))
CONNECTED, GROUPS = "connected", "groups"
SUPPORTS = {
    CONNECTED: Support(tuple(c for c in combinations_of(2).combinations if c not in UNSEEN.combinations)),
    GROUPS: Support(tuple(c for c in combinations_of(2).combinations if c[0] // 3 == c[1] // 3)),
}
# Steps of the learner that infers the weights of modules in the place of a transformer.
_LEARNER_STEPS = 20


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      num_inputs: of the teacher.
      num_examples: to read, and as many to predict.
      shape: of the transformers.
      num_steps: of training, of the plain transformer and with the bottleneck, whose steps take half the time.
      num_tasks: in each step.
      num_tests: tasks tested on, of each kind.
      num_seeds: reported.
    """

    num_inputs: int = 4
    num_examples: int = 16
    shape: Shape = Shape(64, 4, 2)
    num_steps: tuple[int, int] = (1200, 2400)
    num_tasks: int = 24
    num_tests: int = 512
    num_seeds: int = 3


SMOKE = Sizes(2, 6, Shape(8, 2, 2), (3, 3), 4, 16, 1)
FULL = Sizes(8, 96, Shape(128, 8, 4), (50_000, 100_000), 128)

Tasks = dict[str, jax.Array]


def run(session: Session) -> None:
    """Both transformers on connected and on disconnected support, on each seed."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    session.refuse_unknown_cases((PLAIN, BOTTLENECK))
    with precision(x64=False):
        for name in session.cases or ((BOTTLENECK,) if session.smoke else (PLAIN, BOTTLENECK)):
            learner = _Learner(name, sizes)
            for support in SUPPORTS:
                _record(session, name, support, sizes, learner)
    record_claims(session, claims(session.records))


def sampler(sizes: Sizes, num_tasks: int) -> Callable[[jax.Array, Any], Tasks]:
    """Tasks `(key, {"teacher", "support", "scale"}) -> tasks`, each with its own inputs; examples, then queries."""

    def sample(key: jax.Array, data: Any) -> Tasks:
        of_weights, of_inputs = jax.random.split(key)
        weights = draw_weights(of_weights, data["support"], num_tasks)
        shape, bound = (num_tasks, 2 * sizes.num_examples, sizes.num_inputs), 3**0.5
        x = jax.random.uniform(of_inputs, shape, minval=-bound, maxval=bound)
        y = jax.vmap(network, (None, 0, 0))(data["teacher"], weights, x) / data["scale"]
        return {"x": x, "y": y, "weights": weights}

    return sample


def tokens(tasks: Tasks, num_examples: int) -> jax.Array:
    """Inputs, targets of the examples and zeros for those of queries, and whether it is a query."""
    x = tasks["x"]
    asked = (jnp.arange(x.shape[1]) >= num_examples)[:, None]
    flags = jnp.broadcast_to(asked, (*x.shape[:2], 1))
    return jnp.concatenate([x, jnp.where(asked, 0, tasks["y"]), flags], -1)


class _Learner:
    """One of both transformers, its training and its tests, compiled once."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        self._name, self._sizes = name, sizes

        def loss(params: Any, tasks: Tasks) -> jax.Array:
            predicted, _ = self.predict(params, tasks)
            return jnp.mean(jnp.square(predicted - tasks["y"][:, sizes.num_examples :]))

        @jax.jit
        def test(params: Any, data: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            tasks = sampler(sizes, sizes.num_tests)(jax.random.key(17), data)
            predicted, code = self.predict(params, tasks)
            asked = tasks["y"][:, sizes.num_examples :]
            unexplained = jnp.mean(jnp.square(predicted - asked)) / jnp.mean(jnp.var(asked, (0, 1)))
            return unexplained, code, tasks["weights"]

        @jax.jit
        def execute(bank: jax.Array, data: Any) -> jax.Array:
            tasks = sampler(sizes, sizes.num_tests)(jax.random.key(17), data)
            return jnp.mean(jax.vmap(_learned_error, (None, 0, 0, None))(bank, tasks["x"], tasks["y"], sizes))

        self.test, self.execute = test, execute
        self.trainer = Trainer(loss, sampler(sizes, sizes.num_tasks), _RATE, sizes.num_steps[name == BOTTLENECK])

    def start(self, key: jax.Array) -> dict[str, Any]:
        """First parameters."""
        sizes = self._sizes
        of_transformer, of_bank = jax.random.split(key)
        num_inputs, plain = sizes.num_inputs + NUM_OUTPUTS + 1, self._name == PLAIN
        params = {
            "reader": first_params(of_transformer, num_inputs, NUM_OUTPUTS if plain else NUM_MODULES, sizes.shape)
        }
        return params if plain else params | {"bank": modules(of_bank, sizes.num_inputs, 2 * NUM_HIDDEN)}

    def predict(self, params: Any, tasks: Tasks) -> tuple[jax.Array, jax.Array]:
        """Targets of the queries, and what tells of the task: the inferred weights, or means of outputs.

        With a bottleneck one query without inputs reads the examples, and its outputs mix modules of a hypernetwork:
        what predicts a target sees the examples through these few numbers alone.
        """
        number = self._sizes.num_examples
        read = tokens(tasks, number)
        if self._name == PLAIN:
            outputs = transformer(params["reader"], read, number, "softmax", self._sizes.shape).outputs
            return outputs, outputs.mean(1)
        asks = jnp.zeros_like(read[:, :1]).at[..., -1].set(1)
        only = jnp.concatenate([read[:, :number], asks], 1)
        inferred = transformer(params["reader"], only, number, "softmax", self._sizes.shape).outputs[:, 0] * _SCALE
        return jax.vmap(network, (None, 0, 0))(params["bank"], inferred, tasks["x"][:, number:]), inferred


def _learned_error(bank: jax.Array, x: jax.Array, y: jax.Array, sizes: Sizes) -> jax.Array:
    """1 - R^2 on the queries of one task, whose weights of modules are learned from its examples by Newton's method."""
    number, of = sizes.num_examples, problem()
    task = {"x": x[:number], "y": y[:number]}
    start = of.init_params(bank, task)
    found = newton_learner(_LEARNER_STEPS).solve(lambda z: of.inner_loss(z, bank, task), start).params
    return unexplained(bank, found, x[number:], y[number:])


def modules(key: jax.Array, num_inputs: int, num_hidden: int) -> jax.Array:
    """Random modules, N(0, 1 / inputs): shape (modules, inputs, hidden)."""
    drawn: jax.Array = jax.random.normal(key, (NUM_MODULES, num_inputs, num_hidden)) / num_inputs**0.5
    return drawn


def _record(session: Session, name: str, support: str, sizes: Sizes, learner: _Learner) -> None:
    """Train a transformer for each seed, side by side, test them, and record what came of each."""
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in seeds]
    data = [_data(key[0], support, sizes) for key in keys]
    starts = [learner.start(key[1]) for key in keys]
    learned = learner.trainer.train(starts, [key[2] for key in keys], data, session.progress, f"{name}, {support}")
    for seed, params, loss, at in zip(seeds, learned.params, learned.losses, data, strict=True):
        elsewhere = at | {"support": UNSEEN.to_sample()}
        inside, code, weights = learner.test(params, at)
        unseen, unseen_code, unseen_weights = learner.test(params, elsewhere)
        executed = learner.execute(params["bank"], elsewhere) if "bank" in params else None
        codes = (np.asarray(each, np.float64) for each in (code, weights, unseen_code, unseen_weights))
        dataclasses.replace(session, seed=seed).record(
            x64=False, kind="transformer", case=f"{name}, {support}", network=name, support=support, sizes=sizes,
            inside=inside, unseen=unseen, loss=loss, seconds=learned.seconds, num_gradients=learned.num_gradients,
            decodability=decodability(*codes), executed=executed,
        )  # fmt: skip


def _data(key: jax.Array, support: str, sizes: Sizes) -> dict[str, Any]:
    """A teacher, its training tasks, and the standard deviation of what it gives there."""
    data: dict[str, Any] = {
        "teacher": modules(key, sizes.num_inputs, NUM_HIDDEN),
        "support": SUPPORTS[support].to_sample(),
        "scale": jnp.float32(1),
    }
    return data | {"scale": jnp.std(sampler(sizes, sizes.num_tests)(jax.random.key(23), data)["y"])}


def decodability(
    code: npt.NDArray[Any], weights: npt.NDArray[Any], unseen_code: npt.NDArray[Any], unseen_weights: npt.NDArray[Any]
) -> float:
    """R^2 of the weights of unseen pairs, read linearly from a code by a readout that was fitted on training pairs."""
    readout, *_ = np.linalg.lstsq(_with_one(code), weights, rcond=None)
    missed = np.sum((_with_one(unseen_code) @ readout - unseen_weights) ** 2)
    return float(1 - missed / np.sum((unseen_weights - unseen_weights.mean(0)) ** 2))


def _with_one(code: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([code, np.ones((len(code), 1))], 1)


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """The plain transformer has a gap; the bottleneck closes it, given connected support; errors are 1 - R^2."""
    rows = [r for r in records if r["kind"] == "transformer"]

    def of(name: str, support: str, value: Callable[[Record], float]) -> dict[int, float]:
        return {r["seed"]: value(r) for r in rows if (r["network"], r["support"]) == (name, support)}

    def unseen(r: Record) -> float:
        return float(r["unseen"])

    def gap(r: Record) -> float:
        return float(r["unseen"] - r["inside"])

    def ratio(r: Record) -> float:
        return float(r["unseen"] / r["inside"])

    nothing = dict.fromkeys(of(PLAIN, CONNECTED, unseen), 0.0)
    yield above("plain, connected: error on unseen pairs above training pairs", of(PLAIN, CONNECTED, gap), nothing)
    yield above("connected: gap of plain above bottleneck", of(PLAIN, CONNECTED, gap), of(BOTTLENECK, CONNECTED, gap))
    errors = of(PLAIN, CONNECTED, unseen), of(BOTTLENECK, CONNECTED, unseen)
    yield above("connected: error on unseen pairs, plain above bottleneck", *errors)
    ratios = [*of(BOTTLENECK, CONNECTED, ratio).values()]
    yield at_most("bottleneck, connected: error on unseen over training pairs", ratios, _CLOSED)
    errors = of(BOTTLENECK, GROUPS, unseen), of(BOTTLENECK, CONNECTED, unseen)
    yield above("bottleneck: error on unseen pairs, groups above connected", *errors)
    executed = [of(BOTTLENECK, support, lambda r: float(r["executed"])) for support in (GROUPS, CONNECTED)]
    yield above("bottleneck: error with learned weights, groups above connected", *executed)
    inferred = of(BOTTLENECK, CONNECTED, unseen)
    yield above("bottleneck, connected: error, inferred above learned weights", inferred, executed[1])


def show(records: Sequence[Record]) -> str:
    """Errors of each transformer on each support, and every claim."""
    rows = [r for r in records if r["kind"] == "transformer"]
    header = ["network", "support", "training", "unseen pairs", "over training", "learned", "decoded", "s", "gradients"]
    table = []
    for case in dict.fromkeys((r["network"], r["support"]) for r in rows):
        of = [r for r in rows if (r["network"], r["support"]) == case]
        table.append(
            [
                *case,
                _range([r["inside"] for r in of]),
                _range([r["unseen"] for r in of]),
                f"{np.mean([r['unseen'] / r['inside'] for r in of]):.1f}",
                _range([r["executed"] for r in of]) if of[0]["executed"] is not None else "-",
                f"{np.mean([r['decodability'] for r in of]):.3f}",
                f"{np.mean([r['seconds'] for r in of]):.0f}",
                f"{np.mean([r['num_gradients'] for r in of]):.0f}",
            ]
        )
    title = f"Error 1 - R^2 of transformers in context, ranges over seeds [{seeds_of(rows)}]"
    return "\n\n".join([title, lay_out(header, table, left=(0, 1)), show_claims([*claims(records)])]).rstrip()


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Errors on training and on unseen pairs."""
    rows = [r for r in records if r["kind"] == "transformer"]
    return [figures.draw_in_context(rows, folder / "in_context.png")] if rows else []


def _range(values: Sequence[float]) -> str:
    ends = [scientific(min(values)), scientific(max(values))]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)
