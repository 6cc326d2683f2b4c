"""Meta-learning over learners that are local themselves: equilibrium propagation on digits, e-prop on sinusoids."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Session

Anchors = dict[str, Any]
Draw = Callable[[jax.Array, int], Any]


class Course(NamedTuple):
    """A family of tasks, what learns them, and how anchors are meta-learned.

    Attributes:
      split: of the learner: problem, rule, first anchors.
      estimator: of the meta-gradient.
      learner: of the free phase, with which anchors are judged.
      draw: `(key, number) -> tasks` for meta-learning.
      held_out: likewise, for the judgement alone: of data, or of tasks, that meta-learning never saw.
      score: `(params, meta_params, task) -> scalar` by which a task's solution is judged.
      optimizer: of the anchors.
      num_steps: of meta-learning.
      batch: tasks in a step, whose meta-gradients are averaged.
      num_judged: held-out tasks.
    """

    split: Any
    estimator: cm.MetaGradientEstimator
    learner: cm.InnerSolver
    draw: Draw
    held_out: Draw
    score: Callable[[Any, Any, Any], jax.Array]
    optimizer: optax.GradientTransformation
    num_steps: int
    batch: int
    num_judged: int


def meta_learn(course: Course, key: jax.Array) -> tuple[Any, Any]:
    """The meta-parameters after the course, and the outer loss of every step of it."""
    step = cm.value_and_meta_grad(course.split.problem, course.estimator)

    def one(carry: Any, key: jax.Array) -> Any:
        meta_params, state = carry
        value, grad = step(meta_params, course.draw(key, course.batch))
        updates, state = course.optimizer.update(grad, state, meta_params)
        return (optax.apply_updates(meta_params, updates), state), value

    @jax.jit
    def run(meta_params: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(one, (meta_params, course.optimizer.init(meta_params)), keys)

    (meta_params, _), values = run(course.split.meta_params, jax.random.split(key, course.num_steps))
    return meta_params, values


def judge(course: Course, meta_params: Any, key: jax.Array) -> float:
    """The mean score on held-out tasks, learned from the anchors."""
    problem = course.split.problem

    def one(task: Any) -> jax.Array:
        start = problem.init_params(meta_params, task)
        params = course.learner.solve(lambda w: problem.inner_loss(w, meta_params, task), start).params
        return course.score(params, meta_params, task)

    return float(jnp.mean(jax.jit(jax.vmap(one))(course.held_out(key, course.num_judged))))


def equilibrium_digits(session: Session) -> Course:
    """Five of ten digits under new names, five images each: a Hopfield network learns them, its anchors all of them."""
    ways, shots, queries = 5, 5, 8
    steps, images = 10 if session.smoke else 40, data.digits(session.seed, 900, 897)
    network = cm.local_learners.EquilibriumPropagation(0.1, cm.local_learners.Relaxation(0.5, 12))
    first = cm.architectures.mlp_params(jax.random.key(session.seed), (64, 32, ways), jnp.float32)
    split = cm.architectures.learned_initialisation(network.apply, cross_entropy, first, strength=0.1)
    return Course(
        split,
        published_estimator(split, 0.1, steps, steps, 0.03),
        shrinking_steps(steps, 0.03),
        _drawing(images.x_train, images.y_train, ways, shots, queries),
        _drawing(images.x_val, images.y_val, ways, shots, queries),
        lambda params, meta_params, task: jnp.mean(jnp.argmax(network.apply(params, task.x_val), -1) == task.y_val),
        optax.adam(5e-3),
        num_steps=2 if session.smoke else 100,
        batch=2 if session.smoke else 8,
        num_judged=4 if session.smoke else 100,
    )


def exact_anchors_gradient(meta_params: Any, task: Any, strength: float = 0.1) -> cm.MetaGradient:
    """The meta-gradient of the same network by backprop: through its relaxation, and by the inverse Hessian."""
    network = cm.local_learners.EquilibriumPropagation(0.1, cm.local_learners.Relaxation(0.5, 12))
    split = cm.architectures.learned_initialisation(
        lambda w, x: network.equilibrium(w, x).states[-1], cross_entropy, meta_params["anchor"], strength
    )
    return cm.ImplicitDifferentiation(shrinking_steps(400, 0.02)).estimate(split.problem, meta_params, task)


def converged(course: Course, beta: float) -> cm.Contrastive:
    """The estimator of the course with learning run for long, as the exact one's is."""
    return published_estimator(course.split, beta, 400, 400, 0.02)


def eprop_sinusoids(session: Session, beta: float = 0.3, num_steps: int = 100) -> Course:
    """Sinusoids from ten points, seen by a population and learned by a recurrent spiking network."""
    num_inputs, num_units, num_time = 32, 32, 20
    network = cm.local_learners.EProp()
    rule = cm.AnchoredSynapse(0.01)
    first = cm.local_learners.spiking_params(jax.random.key(session.seed), num_inputs, num_units, 1, jnp.float32)

    def error(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs, spikes = network.apply(params, x)
        silence = jnp.square(jnp.mean(spikes, axis=(0, 1)) - 0.2)
        return jnp.mean(jnp.square(jnp.mean(outputs[..., 0], axis=-1) - y)) + 0.01 * jnp.sum(silence)

    def draw(key: jax.Array, number: int) -> Any:
        shapes, spikes = jax.random.split(key)
        tasks = cm.problems.sinusoid_tasks(shapes, number, 10, 10, jnp.float32)
        place = [(x[..., 0] + 5) / 10 for x in (tasks.x_train, tasks.x_val)]
        seen = [
            cm.local_learners.population_spikes(k, x, num_inputs, num_time, width=0.03)
            for k, x in zip(jax.random.split(spikes), place, strict=True)
        ]
        return cm.problems.SplitData(seen[0], tasks.y_train, seen[1], tasks.y_val)

    problem = cm.BilevelProblem(
        lambda w, meta, task: error(w, task.x_train, task.y_train) + rule.energy(w, meta),
        lambda w, meta, task: error(w, task.x_val, task.y_val),
        lambda meta, task: meta["anchor"],
    )
    split = cm.architectures.Architecture(problem, rule, {"anchor": first}, lambda params, meta_params: params)

    def squared(params: Any, meta_params: Any, task: Any) -> jax.Array:
        outputs = jnp.mean(network.apply(params, task.x_val).outputs[..., 0], axis=-1)
        return jnp.mean(jnp.square(outputs - task.y_val))

    free = 10 if session.smoke else 100
    return Course(
        split,
        published_estimator(split, beta, free, 5 if session.smoke else 30, 3e-3),
        shrinking_steps(free, 3e-3),
        draw,
        draw,
        squared,
        optax.adam(3e-3),
        num_steps=2 if session.smoke else num_steps,
        batch=2 if session.smoke else 8,
        num_judged=4 if session.smoke else 100,
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def shrinking_steps(num_steps: int, rate: float) -> cm.OptaxDescent:
    """Adam with steps that shrink to nothing: phases are compared where they end."""
    return cm.OptaxDescent(optax.adam(optax.cosine_decay_schedule(rate, num_steps)), num_steps=num_steps)


def published_estimator(split: Any, beta: float, free: int, nudged: int, rate: float) -> cm.Contrastive:
    """The rule as published: the same learner in all phases, nudged both ways by the outer loss."""
    return cm.Contrastive(
        shrinking_steps(free, rate),
        shrinking_steps(nudged, rate),
        cm.central_difference(beta),
        cm.LossNudge(),
        split.rule,
        estimate_error=False,
    )


def _drawing(x: Any, y: Any, ways: int, shots: int, queries: int) -> Draw:
    """Tasks of some classes in a random order, with images of them, none twice in a task."""
    smallest = min(np.bincount(y))
    by_class = jnp.asarray(np.stack([x[y == label][:smallest] for label in range(10)]), jnp.float32)

    def one(key: jax.Array) -> Any:
        key, of_classes = jax.random.split(key)
        classes = jax.random.permutation(of_classes, 10)[:ways]
        orders = jax.vmap(lambda k: jax.random.permutation(k, smallest))(jax.random.split(key, ways))
        chosen = jax.vmap(lambda label, order: by_class[label][order[: shots + queries]])(classes, orders)
        labels = jnp.arange(ways)[:, None]
        parts = [(chosen[:, :shots], shots), (chosen[:, shots:], queries)]
        pairs = [(part.reshape(ways * n, -1), jnp.broadcast_to(labels, (ways, n)).ravel()) for part, n in parts]
        return cm.problems.SplitData(*pairs[0], *pairs[1])

    return lambda key, number: jax.vmap(one)(jax.random.split(key, number))
