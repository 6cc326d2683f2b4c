"""What competes on grid worlds: a modular hypernetwork, MAML and ANIL, trained, tested and compared alike."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks.experiments.claims import Claim, above, record_claims, show_claims
from benchmarks.harness import Record, Session, precision
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
from benchmarks.tables import lay_out, scientific, seeds_of, wrap
from contrastive_meta.architectures import (
    Architecture,
    fast_head,
    learned_initialisation,
    mlp,
    mlp_params,
    modular_hypernetwork,
    with_modules,
)
from contrastive_meta.problems import SplitData

HYPERNETWORK, MAML, ANIL = "hypernetwork", "MAML", "ANIL"
RIVALS = (MAML, ANIL)
SEEN, UNSEEN = "seen", "unseen"
_CLIP = 1.0
# Worlds of unseen combinations that are drawn.
_NUM_DRAWN = 3


class Learner(NamedTuple):
    """How one of them learns; chosen on other seeds.

    Attributes:
      inner_rate: of descent within a task.
      outer_rate: of Adam at first; it falls by a half cosine.
      even: whether all modules take part from the start; else the first alone does (hypernetwork).
    """

    inner_rate: float
    outer_rate: float = 1e-2
    even: bool = False


class Family(NamedTuple):
    """Tasks that are combinations, and how what is learned of them is scored.

    Attributes:
      demonstrations: `seed -> {"train", "seen", "unseen"}`, demonstrations of tasks with leading axes (tasks, worlds).
      split: demonstrations to tasks with data to learn from and to judge by (`problems.SplitData`).
      loss: `(outputs, targets) -> scalar`.
      accuracy: the share of right actions.
      num_outputs: of a network.
      learners: by name.
      world: the walls and objects of one world, to be drawn.
      rolled_out: `(world, act) -> cells` of an agent that acts there as `act(inputs)` says.
    """

    demonstrations: Callable[[int], Mapping[str, Any]]
    split: Callable[[Any], SplitData]
    loss: Callable[[Any, Any], jax.Array]
    accuracy: Callable[[Any, Any], jax.Array]
    num_outputs: int
    learners: Mapping[str, Learner]
    world: Callable[[Mapping[str, Any]], dict[str, Any]]
    rolled_out: Callable[[Mapping[str, Any], Callable[[jax.Array], int]], list[list[int]]]


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      widths: of the hidden layers of every network.
      num_modules: of each hidden layer of the hypernetwork.
      inner: steps within a task.
      num_tasks: in a batch.
      steps: outer ones of every learner.
      num_seeds: reported.
    """

    widths: tuple[int, ...] = (64, 64)
    num_modules: int = 8
    inner: int = 10
    num_tasks: int = 16
    steps: int = 400
    num_seeds: int = 3


SMOKE = Sizes((4,), 2, 2, 2, 2, 1)
# Layers, modules and tasks of the publication (Schug et al. 2024).
FULL = Sizes((64, 64, 64), 32, 10, 128, 50_000)


def network(params: Any, x: jax.Array) -> jax.Array:
    """The body of every learner: ReLU layers."""
    return mlp(params, x, jax.nn.relu)


def architecture(name: str, family: Family, num_inputs: int, sizes: Sizes, key: jax.Array) -> Architecture:
    """What is fast and what is slow: coefficients of modules, all weights (MAML), or the readout (ANIL)."""
    of_weights, of_modules = jax.random.split(key)
    params = mlp_params(of_weights, (num_inputs, *sizes.widths, family.num_outputs))
    if name == MAML:
        return learned_initialisation(network, family.loss, params, 0.0)
    if name == ANIL:
        return fast_head(network, family.loss, params, 0.0)
    params = with_modules(params, sizes.num_modules, of_modules)
    for layer in params.values():
        if "bank" in layer and family.learners[name].even:
            # A kernel of the mixture has the size of a module.
            layer["coefficients"] = jnp.full_like(layer["coefficients"], sizes.num_modules**-0.5)
    return modular_hypernetwork(network, family.loss, params, 0.0, fast=("coefficients",))


def run(session: Session, family: Family, first_seed: int, steps: int) -> None:
    """Every learner on every seed, on equal demonstrations and for as many steps; compiled once for all seeds."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes(steps=steps)
    session.refuse_unknown_cases(family.learners)
    seeds = session.seeds(first_seed, sizes.num_seeds)
    # Compiling takes longest: smoke runs leave out the learner in the middle.
    names = session.cases or ((HYPERNETWORK, ANIL) if session.smoke else tuple(family.learners))
    with precision(x64=False):
        session.progress.begin("demonstrations", len(seeds))
        data = {seed: family.demonstrations(seed) for seed in seeds}
        programs = {name: _Program(session, name, family, sizes, data[seeds[0]]) for name in names}
        trained: dict[str, dict[int, Trained]] = {}
        for name in names:
            trained[name] = {seed: programs[name].train(session, data[seed], seed) for seed in seeds}
        for seed in seeds:
            ends = {name: of[seed].snapshots[-1] for name, of in trained.items()}
            least = least_spent(ends.values())
            for name in ends:
                at = dataclasses.replace(session, seed=seed)
                _record(at, name, programs[name], sizes, data[seed], trained[name][seed], least)
        at = dataclasses.replace(session, seed=seeds[0])
        _draw(at, family, programs, data[seeds[0]], {name: of[seeds[0]] for name, of in trained.items()})
    record_claims(session, claims(session.records))


class _Program:
    """A learner, compiled."""

    def __init__(self, session: Session, name: str, family: Family, sizes: Sizes, data: Mapping[str, Any]) -> None:
        self.name, self.family, self.sizes = name, family, sizes
        self.settings = family.learners[name]
        few = family.split(_at(data["train"], slice(1)))
        self._num_inputs = few.x_train.shape[-1]
        self.learner = cm.OptaxDescent(optax.sgd(self.settings.inner_rate), num_steps=sizes.inner)
        self._transformation = optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())
        self.architecture = self.of_seed(0)
        number = len(jax.tree.leaves(data["train"])[0])

        def sample(key: jax.Array, pool: Any) -> Any:
            chosen = jax.random.randint(key, (sizes.num_tasks,), 0, number)
            return family.split(_at(pool, chosen))

        step = outer_step(
            self.architecture.problem,
            cm.BackpropThroughLearning(self.learner),
            sample,
            cosine_decay(self.settings.outer_rate),
            self._transformation,
            "zero",
        )
        session.progress.begin(f"{name}: compiling", 1)
        self._program = compiled(step, self._state(0), data["train"], time.process_time)
        self.test, self.adapted = jax.jit(self._test), jax.jit(self.learned)

    def of_seed(self, seed: int) -> Architecture:
        """Its architecture, with the first meta-parameters of a seed."""
        return architecture(self.name, self.family, self._num_inputs, self.sizes, jax.random.key(seed))

    def _state(self, seed: int) -> State:
        meta = self.of_seed(seed).meta_params
        return State(meta, self._transformation.init(meta))

    def train(self, session: Session, data: Mapping[str, Any], seed: int) -> Trained:
        """On one seed."""
        budget = Budget(steps=self.sizes.steps, clock=time.process_time)
        key, what = jax.random.fold_in(jax.random.key(seed), 1), f"{self.name}, seed {seed}"
        return train(self._program.on(data["train"]), self._state(seed), key, budget, session.progress, what)

    def learned(self, meta_params: Any, task: Any) -> Any:
        """The network after a task is learned."""
        problem = self.architecture.problem
        start = problem.init(meta_params, task)
        params = self.learner.solve(lambda at: problem.inner(at, meta_params, task), start).params
        return self.architecture.weights(params, meta_params)

    def _test(self, meta_params: Any, demonstrations: Any) -> tuple[jax.Array, jax.Array]:
        """The mean error and accuracy on worlds to judge by."""

        def of_task(task: Any) -> tuple[jax.Array, jax.Array]:
            outputs = network(self.learned(meta_params, task), task.x_val)
            return self.family.loss(outputs, task.y_val), self.family.accuracy(outputs, task.y_val)

        errors, accuracies = jax.vmap(of_task)(self.family.split(demonstrations))
        return jnp.mean(errors), jnp.mean(accuracies)


def _record(
    session: Session,
    name: str,
    program: _Program,
    sizes: Sizes,
    data: Mapping[str, Any],
    trained: Trained,
    least: tuple[float, int],
) -> None:
    session.progress.begin(f"{name}: testing, seed {session.seed}", 1)
    first, last = Snapshot(0, 0, 0.0, program.of_seed(session.seed).meta_params), trained.snapshots[-1]
    states = {
        "": last,
        "_unlearned": first,
        "_at_equal_time": within([first, *trained.snapshots], seconds=least[0]),
        "_at_equal_gradients": within([first, *trained.snapshots], num_gradients=least[1]),
    }
    scores: dict[str, float] = {}
    for when, state in states.items():
        for which in (SEEN, UNSEEN):
            error, accuracy = program.test(state.meta_params, data[which])
            scores |= {f"error_{which}{when}": error.item(), f"accuracy_{which}{when}": accuracy.item()}
    num_slow = sum(leaf.size for leaf in jax.tree.leaves(last.meta_params))
    session.record(
        x64=False, kind="learner", case=name, sizes=sizes, settings=program.settings._asdict(), num_slow=num_slow,
        **scores, seconds=last.seconds, num_steps=last.step, num_gradients=last.num_gradients,
        equal_seconds=least[0], equal_gradients=least[1], statuses=trained.statuses, passed=trained.passed,
        stopped=trained.stopped,
    )  # fmt: skip


def _draw(
    session: Session,
    family: Family,
    programs: Mapping[str, "_Program"],
    data: Mapping[str, Any],
    trained: Mapping[str, Trained],
) -> None:
    """What the teacher and the learners do in a few worlds of unseen combinations."""
    demonstrations = jax.tree.map(np.asarray, data[UNSEEN])
    tasks = family.split(data[UNSEEN])
    best = jax.jit(lambda params, x: jnp.argmax(network(params, x)))

    def as_learned(params: Any) -> Callable[[jax.Array], int]:
        return lambda x: int(best(params, x))

    def as_shown(actions: Iterator[int]) -> Callable[[jax.Array], int]:
        return lambda _: next(actions)

    number, half = len(tasks.x_train), len(jax.tree.leaves(demonstrations)[0][0]) // 2
    # Far from each other: neighbours may be of the same combination.
    for chosen in np.linspace(0, number - 1, _NUM_DRAWN).astype(int):
        found, task = _at(demonstrations, (chosen, half)), _at(tasks, chosen)
        paths = {"teacher": family.rolled_out(found, as_shown(iter(found["teacher"].tolist())))}
        for name, program in programs.items():
            params = program.adapted(trained[name].state.meta_params, task)
            paths[name] = family.rolled_out(found, as_learned(params))
        session.record(x64=False, kind="world", case=f"world {chosen}", paths=paths, **family.world(found))


def _at(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[where], tree)


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """The hypernetwork errs less than its rivals on unseen combinations and on seen ones (logarithms).

    Where the steps of one task diverge, the mean error is not finite, and counts as infinite.
    """
    here = [r for r in records if r["kind"] == "learner"]

    def logs(name: str, column: str) -> dict[int, float]:
        return {r["seed"]: float(np.log(_finite(r[column]))) for r in here if r["case"] == name}

    for when in ("", "_at_equal_time", "_at_equal_gradients"):
        at = when.replace("_", " ")
        for rival in RIVALS:
            for which in (UNSEEN, SEEN):
                text = f"{rival} errs more than the hypernetwork{at}, {which} combinations"
                column = f"error_{which}{when}"
                with np.errstate(invalid="ignore"):
                    yield above(text, logs(rival, column), logs(HYPERNETWORK, column))


def _finite(error: float | None) -> float:
    return math.inf if error is None else error


def show(records: Sequence[Record], title: str) -> str:
    """Errors and accuracies, means over seeds; every claim."""
    here = [r for r in records if r["kind"] == "learner"]
    header = ["learner", "error: seen", "unseen", "equal time", "equal gradients", "right: seen", "unseen"]
    header += ["steps", "s", "gradients", "passed"]
    rows = []
    for name in dict.fromkeys(r["case"] for r in here):
        of = [r for r in here if r["case"] == name]
        late = [f"error_{UNSEEN}{when}" for when in ("", "_at_equal_time", "_at_equal_gradients")]
        errors = [_mean(of, column) for column in (f"error_{SEEN}", *late)]
        right = [f"{np.mean([r[f'accuracy_{which}'] for r in of]):.3f}" for which in (SEEN, UNSEEN)]
        spent = [f"{np.mean([r[c] for r in of]):,.0f}" for c in ("num_steps", "seconds", "num_gradients")]
        rows.append([name, *errors, *right, *spent, f"{np.mean([r['passed'] for r in of]):.2f}"])
    stopped = [wrap(f"{r['case']}, seed {r['seed']}: {r['stopped']}") for r in here if r["stopped"]]
    parts = [f"{title} [{seeds_of(here)}]", lay_out(header, rows, left=(0,)), *stopped]
    return "\n\n".join([*parts, show_claims([*claims(records)])]).rstrip()


def _mean(records: Sequence[Record], column: str) -> str:
    return scientific(float(np.mean([_finite(r[column]) for r in records])))
