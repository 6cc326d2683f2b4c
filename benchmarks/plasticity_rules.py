"""What each local rule learns, on tasks small enough to look at all of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Session
from benchmarks.plasticity_learners import Course, cross_entropy, published_estimator, shrinking_steps

Matrix = npt.NDArray[np.float64]


class Picture(NamedTuple):
    """What was learned, as one looks at it.

    Attributes:
      kind: "images" (of strengths), "layers" (a number for each) or "tasks" (fast parameters, a row for each task).
      rows: of the picture.
      names: of layers, or what is said of the rows.
      number: the picture in one.
      says: what the number is.
    """

    kind: str
    rows: Any
    names: list[str]
    number: float
    says: str


class Case(NamedTuple):
    """A rule, its course, and what to look at afterwards.

    Attributes:
      name: of the rule.
      score: what is judged, and whether more of it is better.
      course: see `Course`.
      look: from the meta-parameters and held-out tasks to a picture.
    """

    name: str
    score: str
    course: Course
    look: Callable[[Any, Any], Picture]


def cases(session: Session) -> list[Case]:
    """All rules."""
    names = ("AnchoredSynapse", "PlasticityMask", "GainModulation", "FastHead", "Context", "ModuleBank")
    return [nuisance_inputs(session), *(sinusoids(name, session) for name in names)]


def nuisance_inputs(session: Session) -> Case:
    """Digits with as many inputs of noise: every synapse learns how strongly it is to decay."""
    images = data.digits(session.seed, 500, 600)
    noise = np.random.default_rng(session.seed).normal(0.0, 0.3, (1100, 64))
    x = jnp.asarray(np.concatenate([np.concatenate([images.x_train, images.x_val]), noise], axis=1), jnp.float32)
    y = jnp.asarray(np.concatenate([images.y_train, images.y_val]), jnp.int32)
    rule = cm.AnchoredSynapse()
    meta_params = {"log_strength": jnp.full((128, 10), jnp.log(1e-3), jnp.float32)}
    problem = cm.BilevelProblem(
        lambda w, meta, task: cross_entropy(task.x_train @ w, task.y_train) + rule.energy(w, meta),
        lambda w, meta, task: cross_entropy(task.x_val @ w, task.y_val),
        lambda meta, task: jnp.zeros((128, 10), jnp.float32),
    )
    split = cm.architectures.Architecture(problem, rule, meta_params, lambda params, meta: params)
    learning = cm.problems.SplitData(x[:200], y[:200], x[200:500], y[200:500])
    judging = learning._replace(x_val=x[500:], y_val=y[500:])
    learner = shrinking_steps(20 if session.smoke else 150, 0.05)
    course = Course(
        split,
        published_estimator(split, learner, learner, 0.1),
        learner,
        lambda key, number: jax.tree.map(lambda leaf: leaf[None], learning),
        lambda key, number: jax.tree.map(lambda leaf: leaf[None], judging),
        lambda w, meta, task: jnp.mean(jnp.argmax(task.x_val @ w, -1) == task.y_val),
        optax.adam(0.1),
        num_steps=2 if session.smoke else 40,
        batch=1,
        num_judged=1,
    )

    def look(meta_params: Any, tasks: Any) -> Picture:
        of_input = np.asarray(meta_params["log_strength"], np.float64).mean(axis=1)
        ink = np.asarray(x[:500, :64]).std(axis=0) > 0.1
        seen, nuisance = of_input[:64][ink], of_input[64:]
        above = float(np.mean(nuisance[:, None] > seen[None, :]))
        return Picture(
            "images", of_input.reshape(2, 8, 8), ["pixels", "noise"], above, "P(strength of noise > of pixel)"
        )

    return Case("AnchoredSynapse, strengths", "accuracy", course, look)


def sinusoids(name: str, session: Session) -> Case:
    """Few-shot regression by a network that is fast where the rule says so."""
    key = jax.random.key(session.seed)
    body = cm.architectures.mlp_params(key, (1, 20, 20, 1), jnp.float32)
    mlp, architectures = cm.architectures.mlp, cm.architectures

    def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(outputs[..., 0] - targets))

    if name == "AnchoredSynapse":
        split = architectures.complex_synapse(mlp, loss, body, strength=0.1)
    elif name == "PlasticityMask":
        mask = jax.tree.map(lambda w: 0.02 * jax.random.normal(jax.random.fold_in(key, w.size), w.shape, w.dtype), body)
        split = architectures.plasticity_mask(mlp, loss, body, mask, strength=0.1)
    elif name == "GainModulation":
        split = architectures.gain_modulation(mlp, loss, architectures.with_gains(body), strength=0.1)
    elif name == "FastHead":
        split = architectures.fast_head(mlp, loss, body, strength=0.1)
    elif name == "Context":
        wider = architectures.mlp_params(key, (1 + 4, 20, 20, 1), jnp.float32)
        split = architectures.context_parameters(mlp, loss, architectures.with_context(wider, 4), strength=0.01)
    else:
        network = architectures.with_modules(body, 4, jax.random.fold_in(key, 1))
        split = architectures.modular_hypernetwork(mlp, loss, network, strength=0.1)
    # Chosen on seeds 100 and 101, and the smaller steps of the nudged phases too.
    learner = shrinking_steps(10 if session.smoke else 150, 0.05)

    def draw(key: jax.Array, number: int) -> Any:
        return cm.problems.sinusoid_tasks(key, number, 10, 10, jnp.float32)

    course = Course(
        split,
        published_estimator(split, learner, shrinking_steps(10 if session.smoke else 60, 0.005), 0.1),
        learner,
        draw,
        draw,
        split.problem.outer_loss,
        optax.adam(1e-2),
        num_steps=2 if session.smoke else 200,
        batch=2 if session.smoke else 10,
        num_judged=4 if session.smoke else 100,
    )
    look = {"AnchoredSynapse": _strengths, "PlasticityMask": _open}.get(name)
    return Case(name, "error", course, look or (lambda meta, tasks: _by_task(course, meta, tasks)))


def _strengths(meta_params: Any, tasks: Any) -> Picture:
    logs = {name: np.asarray(layer["kernel"], np.float64) for name, layer in meta_params["log_strength"].items()}
    means = {name: float(np.exp(values.mean())) for name, values in logs.items()}
    spread = float(np.concatenate([values.ravel() for values in logs.values()]).std())
    return Picture("layers", [*means.values()], [*means], spread, "deviation of log strengths")


def _open(meta_params: Any, tasks: Any) -> Picture:
    shares = {name: float(np.mean(np.asarray(layer["kernel"]) > 0)) for name, layer in meta_params["mask"].items()}
    total = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(meta_params["mask"])])
    return Picture(
        "layers", [*shares.values()], [*shares], float(np.mean(total > 0)), "share of synapses that may learn"
    )


def _by_task(course: Course, meta_params: Any, tasks: Any) -> Picture:
    """Fast parameters of every task, by rising amplitude, and how well amplitude and phase can be read from them."""
    problem = course.split.problem

    def one(task: Any) -> Any:
        start = problem.init_params(meta_params, task)
        end = course.learner.solve(lambda w: problem.inner_loss(w, meta_params, task), start).params
        return jnp.concatenate([jnp.ravel(end[k] - start[k]) for k in sorted(end)])

    rows = np.asarray(jax.jit(jax.vmap(one))(tasks), np.float64)
    # y = a sin x + b cos x: what identifies a task, from its own points.
    x, y = (
        np.asarray(jnp.concatenate(pair, axis=1), np.float64) for pair in ((tasks.x_train, tasks.x_val), tasks[1::2])
    )
    waves = np.stack([np.sin(x[..., 0]), np.cos(x[..., 0])], axis=-1)
    identity = np.stack([np.linalg.lstsq(w, t, rcond=None)[0] for w, t in zip(waves, y, strict=True)])
    order = np.argsort(np.hypot(*identity.T))
    return Picture(
        "tasks", rows[order], ["tasks by rising amplitude"], _decoded(rows, identity), "R2 of task from them"
    )


def _decoded(rows: Matrix, targets: Matrix) -> float:
    """R2 on the second half of the tasks of a ridge regression fitted on the first."""
    half = len(rows) // 2
    mean, scale = rows[:half].mean(axis=0), rows[:half].std() + 1e-12
    inputs = np.concatenate([(rows - mean) / scale, np.ones((len(rows), 1))], axis=1)
    gram = inputs[:half].T @ inputs[:half] + 0.1 * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs[:half].T @ targets[:half])
    left = np.square(inputs[half:] @ weights - targets[half:]).sum()
    return float(1 - left / np.square(targets[half:] - targets[half:].mean(axis=0)).sum())
