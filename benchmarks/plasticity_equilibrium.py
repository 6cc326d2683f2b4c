"""Meta-learning over equilibrium propagation on digits: contrast over contrast, and how near it is to exact."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Session
from benchmarks.plasticity_learners import Course, Draw, published_estimator

# Strength of the pull to the anchors of equilibrium propagation.
HELD = 0.3


class Way(NamedTuple):
    """Of learning by equilibrium propagation: its nudge, steps of relaxation, steps of learning."""

    nudge: float
    relaxation: int
    steps: int


USUAL = Way(nudge=0.1, relaxation=20, steps=150)


def equilibrium_digits(session: Session, way: Way = USUAL, dtype: Any = jnp.float32) -> Course:
    """Five of ten digits under new names, five images each: a Hopfield network learns them, its anchors all of them.

    The readout starts at a quarter and is held, and the error is squared: weights that act both ways must stay below 1,
    or equilibria become many and learning has no end. Cross-entropy asks for larger ones.
    """
    ways, shots, queries = 5, 5, 8
    learner, images, network = steady_steps(way.steps), data.digits(session.seed, 900, 897), _network(way)
    first = cm.architectures.mlp_params(jax.random.key(session.seed), (64, 32, ways), dtype)
    first["readout"]["kernel"] /= 4
    split = cm.architectures.learned_initialisation(network.apply, squared_error, first, HELD)
    return Course(
        split,
        published_estimator(split, learner, learner, 0.1),
        learner,
        _drawing(images.x_train, images.y_train, ways, shots, queries, dtype),
        _drawing(images.x_val, images.y_val, ways, shots, queries, dtype),
        lambda params, meta_params, task: jnp.mean(jnp.argmax(network.apply(params, task.x_val), -1) == task.y_val),
        optax.adam(5e-3),
        num_steps=2 if session.smoke else 60,
        batch=2 if session.smoke else 8,
        num_judged=4 if session.smoke else 100,
    )


class Angles(NamedTuple):
    """Of meta-gradients by contrast over contrast, for each task.

    Attributes:
      to_true: cosine to the exact meta-gradient of the loss at equilibrium: backprop and the inverse Hessian.
      to_same: cosine to the derivative of the very learning, by equilibrium propagation, through all of its steps.
      left: norm of the inner gradient where learning ended, over that where it began.
      unrest: how fast the fastest unit still moves when the network is read out.
    """

    to_true: jax.Array
    to_same: jax.Array
    left: jax.Array
    unrest: jax.Array


def equilibrium_angles(session: Session, ways: Sequence[Way], meta_params: Any) -> Iterator[Angles]:
    """How near contrast over contrast comes, way by way, in float64 if that is on.

    Args:
      session: of the held-out tasks.
      ways: to learn.
      meta_params: where.
    """
    first = equilibrium_digits(session, ways[0], jnp.float64)
    tasks = first.held_out(jax.random.key(session.seed), 1 if session.smoke else 5)
    settled = cm.local_learners.EquilibriumPropagation(relaxation=cm.local_learners.Relaxation(0.5, 60))
    true = cm.architectures.learned_initialisation(
        lambda w, x: settled.equilibrium(w, x).states[-1], squared_error, meta_params["anchor"], HELD
    ).problem
    longest = steady_steps(20 if session.smoke else 600)

    @jax.jit
    def at_equilibrium(task: Any) -> Any:
        return cm.ImplicitDifferentiation(longest, estimate_error=False).estimate(true, meta_params, task).grad

    def angles_of(way: Way) -> Any:
        course, learner = equilibrium_digits(session, way, jnp.float64), steady_steps(way.steps)
        problem, network = course.split.problem, _network(way)

        @jax.jit
        def angles(given: Any) -> Angles:
            task, exact = given
            got = published_estimator(course.split, learner, learner, 0.02).estimate(problem, meta_params, task)
            same = cm.BackpropThroughLearning(learner, checkpoint=True).estimate(problem, meta_params, task)
            before = jax.grad(problem.inner_loss)(meta_params["anchor"], meta_params, task)
            return Angles(
                _cosine(got.grad, exact),
                _cosine(got.grad, same.grad),
                got.diagnostics.free_residual / optax.tree_utils.tree_norm(before),
                network.equilibrium(got.params, task.x_train).residual,
            )

        return angles

    # One after another: there are many steps to differentiate through.
    exact = jax.lax.map(at_equilibrium, tasks)
    for way in ways:
        yield jax.lax.map(angles_of(way), (tasks, exact))


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Half the squared distance to 1 at the label and 0 elsewhere, the mean over examples."""
    wanted = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return jnp.mean(jnp.sum(jnp.square(outputs - wanted), axis=-1)) / 2


def steady_steps(num_steps: int) -> cm.OptaxDescent:
    """Descent with some momentum, which ends where the gradient does."""
    return cm.OptaxDescent(optax.sgd(0.06, momentum=0.5), num_steps=num_steps)


def _network(way: Way) -> cm.local_learners.EquilibriumPropagation:
    return cm.local_learners.EquilibriumPropagation(way.nudge, cm.local_learners.Relaxation(0.5, way.relaxation))


def _cosine(a: Any, b: Any) -> jax.Array:
    return jnp.asarray(
        optax.tree_utils.tree_vdot(a, b) / (optax.tree_utils.tree_norm(a) * optax.tree_utils.tree_norm(b))
    )


def _drawing(x: Any, y: Any, ways: int, shots: int, queries: int, dtype: Any) -> Draw:
    """Tasks of some classes in a random order, with images of them, none twice in a task."""
    smallest = min(np.bincount(y))
    by_class = jnp.asarray(np.stack([x[y == label][:smallest] for label in range(10)]), dtype)

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
