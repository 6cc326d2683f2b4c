"""What learns sinusoids by spikes: a recurrent network, its tasks, and the meta-gradients that compete."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.plasticity_learners import shrinking_steps
from contrastive_meta.local_learners import EProp, Spiking, population_spikes, spiking_params
from contrastive_meta.problems import SplitData, sinusoid_tasks

ANCHOR, STRENGTHS = "anchor by contrast", "anchor and strengths by contrast"
TRUNCATED, TRUNCATED_STRENGTHS = "anchor by the last steps", "anchor and strengths by the last steps"
MAML_EPROP, MAML_BPTT = "MAML over e-prop", "MAML over backprop"
CONTRASTS = (ANCHOR, STRENGTHS)

Apply = Callable[[Any, jax.Array], Spiking]


class Sizes(NamedTuple):
    """Of the network, its inner phases and its terms.

    Attributes:
      num_inputs: neurons that bring a number in.
      num_units: recurrent ones.
      num_time: time steps.
      width: of the tuning of an input neuron.
      free: inner steps.
      nudged: of each nudged phase.
      truncate: of the free ones, those that are differentiated.
      rate: of the free phase.
      nudged_rate: of a nudged phase.
      beta: of the nudges, both ways.
      strength: of the pull to the anchor, at first.
      silence: of the pull of firing rates to their target.
      num_tasks: in a batch.
    """

    num_inputs: int = 32
    num_units: int = 32
    num_time: int = 20
    width: float = 0.03
    free: int = 60
    nudged: int = 20
    truncate: int = 20
    rate: float = 3e-3
    nudged_rate: float = 3e-3
    beta: float = 0.3
    strength: float = 0.01
    silence: float = 0.01
    num_tasks: int = 5


# As published (Zucchet et al., 2022, and its public code); the tuning has a variance of 2e-4. The nudged rate and beta
# are those of the public code, whose negative nudge was left out by an oversight: here it is not.
PAPER = Sizes(100, 100, 20, 2e-4**0.5, 500, 100, 100, 1e-3, 3e-3, 3.0, 0.001, 1e-5, 25)
# Spikes in 20 steps at the target of the public code.
_TARGET = 0.2
# Of those that differentiate through all of a short run: as many of Nesterov's steps as published. At this rate
# their errors on seed 100 were 0.78 over e-prop and 1.21 over backprop. By Adam at 1e-2 they did not learn.
_SHORT, _SHORT_RATE = 10, 1e-3
# Of Adam at first, as published; of log strengths ten times that.
OUTER_RATE, STRENGTH_FACTOR = 3e-3, 10.0
# Of the norm of a meta-gradient, as in `sinusoids`.
_CLIP = 10.0


class Method(NamedTuple):
    """A way to meta-learn.

    Attributes:
      problem: of one task.
      estimator: of the meta-gradient.
      learner: of a new task.
      apply: the network, as this method learns it.
      learns_strengths: whether the meta-gradient moves strengths.
      program: name that methods have in common whose outer steps differ in numbers alone.
    """

    problem: cm.BilevelProblem
    estimator: cm.MetaGradientEstimator
    learner: cm.OptaxDescent
    apply: Apply
    learns_strengths: bool
    program: str


def methods(sizes: Sizes = Sizes()) -> dict[str, Method]:
    """All, by name: e-prop within a task, or backprop through time with the same slope of spikes."""
    network = EProp()
    long = shrinking_steps(sizes.free, sizes.rate)
    short = cm.OptaxDescent(optax.sgd(_SHORT_RATE, momentum=0.9, nesterov=True), num_steps=_SHORT)
    nudged = shrinking_steps(sizes.nudged, sizes.nudged_rate)
    scheme = cm.central_difference(sizes.beta)
    rule = cm.AnchoredSynapse()
    contrast = cm.Contrastive(long, nudged, scheme, cm.LossNudge(), rule, estimate_error=False)
    truncated = cm.BackpropThroughLearning(long, truncate=sizes.truncate)
    whole = cm.BackpropThroughLearning(short)
    local, through_time = problem(network.apply, sizes), problem(network.simulate, sizes)
    return {
        ANCHOR: Method(local, contrast, long, network.apply, False, "contrast"),
        STRENGTHS: Method(local, contrast, long, network.apply, True, "contrast"),
        TRUNCATED: Method(local, truncated, long, network.apply, False, "truncated"),
        TRUNCATED_STRENGTHS: Method(local, truncated, long, network.apply, True, "truncated"),
        MAML_EPROP: Method(local, whole, short, network.apply, False, MAML_EPROP),
        MAML_BPTT: Method(through_time, whole, short, network.simulate, False, MAML_BPTT),
    }


def problem(apply: Apply, sizes: Sizes) -> cm.BilevelProblem:
    """Squared errors of the mean output over time, a pull to the anchor, and one of firing rates to their target."""
    rule = cm.AnchoredSynapse()

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        out = apply(params, x)
        silence = jnp.square(jnp.mean(out.spikes, axis=(0, 1)) - _TARGET)
        return mean_square(out, y) + sizes.silence * jnp.sum(silence)

    return cm.BilevelProblem(
        lambda w, meta, task: loss(w, task.x_train, task.y_train) + rule.energy(w, meta),
        lambda w, meta, task: loss(w, task.x_val, task.y_val),
        lambda meta, task: meta["anchor"],
    )


def mean_square(out: Spiking, targets: jax.Array) -> jax.Array:
    """Of the errors of the readout's mean over time."""
    return jnp.mean(jnp.square(jnp.mean(out.outputs[..., 0], axis=-1) - targets))


def first_meta_params(key: jax.Array, sizes: Sizes) -> dict[str, Any]:
    """Anchors, and the logarithms of strengths that are all the same."""
    anchor = spiking_params(key, sizes.num_inputs, sizes.num_units, 1)
    level = jnp.log(jnp.asarray(sizes.strength))
    return {"anchor": anchor, "log_strength": jax.tree.map(lambda w: jnp.full_like(w, level), anchor)}


def spiking_tasks(key: jax.Array, number: int, sizes: Sizes) -> SplitData:
    """Sinusoids of ten points and ten more, seen by a population: inputs of shape (number, 10, time, inputs)."""
    of_shapes, of_spikes = jax.random.split(key)
    tasks = sinusoid_tasks(of_shapes, number)
    seen = [
        population_spikes(k, (x[..., 0] + 5) / 10, sizes.num_inputs, sizes.num_time, width=sizes.width)
        for k, x in zip(jax.random.split(of_spikes), (tasks.x_train, tasks.x_val), strict=True)
    ]
    return SplitData(seen[0], tasks.y_train, seen[1], tasks.y_val)


def transformation(method: Method) -> optax.GradientTransformation:
    """Of the meta-gradient: clipped, Adam, and strengths with a factor of their own, kept in the optimiser's state."""
    adam = optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())
    factor = STRENGTH_FACTOR if method.learns_strengths else 0.0
    strengths = optax.chain(adam, optax.inject_hyperparams(optax.scale)(step_size=factor))
    return optax.multi_transform(
        {"anchor": adam, "log_strength": strengths}, {"anchor": "anchor", "log_strength": "log_strength"}
    )


def test_error(method: Method, meta_params: Any, task: SplitData) -> jax.Array:
    """Mean squared error on a task, once it is learned."""
    start = method.problem.init(meta_params, task)
    params = method.learner.solve(lambda w: method.problem.inner(w, meta_params, task), start).params
    return mean_square(method.apply(params, task.x_val), task.y_val)
