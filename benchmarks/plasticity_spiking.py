"""Meta-learning over a recurrent spiking network on sinusoids, which learns each by e-prop or by backprop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.harness import Session
from benchmarks.plasticity_learners import Course, published_estimator, shrinking_steps


def spiking_rivals(session: Session) -> dict[str, Course]:
    """Contrast over e-prop, and what may look into learning: backprop through its last steps; or within the task."""
    network = cm.local_learners.EProp()
    local = _spiking_sinusoids(session, network.apply)
    truncated = cm.BackpropThroughLearning(local.learner, truncate=20)
    return {
        "e-prop RSNN": local,
        "e-prop RSNN, backprop of 20 steps": local._replace(estimator=truncated),
        "RSNN by backprop through time": _spiking_sinusoids(session, network.simulate),
    }


def _spiking_sinusoids(session: Session, apply: Callable[[Any, jax.Array], cm.local_learners.Spiking]) -> Course:
    """Sinusoids from ten points, seen by a population and learned by a recurrent spiking network."""
    num_inputs, num_units, num_time = 32, 32, 20
    rule = cm.AnchoredSynapse(0.01)
    first = cm.local_learners.spiking_params(jax.random.key(session.seed), num_inputs, num_units, 1, jnp.float32)

    def error(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outputs, spikes = apply(params, x)
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
        outputs = jnp.mean(apply(params, task.x_val).outputs[..., 0], axis=-1)
        return jnp.mean(jnp.square(outputs - task.y_val))

    learner = shrinking_steps(10 if session.smoke else 100, 3e-3)
    return Course(
        split,
        published_estimator(split, learner, shrinking_steps(5 if session.smoke else 30, 3e-3), 0.3),
        learner,
        draw,
        draw,
        squared,
        optax.adam(3e-3),
        num_steps=2 if session.smoke else 100,
        batch=2 if session.smoke else 8,
        num_judged=4 if session.smoke else 100,
    )
