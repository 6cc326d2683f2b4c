"""What competes on Omniglot: for each method its problem, its estimator, its tasks, and how it is judged."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.experiments.omniglot_network import (
    LAYERS,
    Layer,
    accuracy,
    cross_entropy,
    features,
    init_body,
    logits,
    num_features,
    with_gains,
    with_modules,
)
from benchmarks.experiments.omniglot_tasks import Shape
from contrastive_meta.problems import SplitData

HEAD, ANIL, ANIL_RIDGE = "fast head by contrast", "ANIL", "ANIL with ridge head"
ANCHOR, IMAML, MAML, FOMAML, REPTILE = "anchor by contrast", "iMAML with CG", "MAML", "FOMAML", "Reptile"
HEAD_TO_REST = "fast head by contrast at rest"
GAINS, BANK = "gains by contrast", "module bank by contrast"
UNTRAINED, PIXELS = "untrained body", "nearest pixels"
HEADS = (HEAD, HEAD_TO_REST, ANIL)
# Methods of which every layer learns a task.
ALL_LAYERS = (ANCHOR, GAINS, BANK, IMAML, MAML, FOMAML, REPTILE)

# Penalty of a readout on features of length 10, and its descent: the curvature of 10-way cross-entropy on them is at
# most 30, so rate 1 / 30.1 and the momentum of Nesterov (2004), eq. 2.2.22, for a condition number of 300.
RIDGE, HEAD_RATE, HEAD_MOMENTUM = 0.1, 1 / 30.1, 0.891
# Strengths and rates as calibrated on held-out background alphabets with seed 0, which is not reported.
ANCHOR_BETA, ANCHOR_STRENGTH = 0.1, 0.5
# Not so these two: they were chosen by gradients, not by accuracy, at the weights of seed 1, which is reported. With
# the loss nudge at 0.03, 5 to 9 of 20 tasks were UNBOUNDED_NUDGE after 120 s: on features of length 10 the outer loss
# curves by up to 25, and -0.03 of that outweighs the penalty of 0.1. A linear nudge has no curvature.
HEAD_BETA, HEAD_NUDGE = 0.01, cm.LinearNudge()
ANCHOR_RATE, ANCHOR_MOMENTUM = 0.03, 0.8
MAML_RATE, MAML_STEPS, CG_STEPS = 0.05, 5, 5
# Modules of each layer. Not tuned; a bank of one module is the network itself.
NUM_MODULES = 4
# Not tuned: a step changes a logit by some 0.3 * 10^2 / 10, three units, on features of length 10 in ten classes.
ANIL_RATE = 0.3
OUTER_RATE = 0.02

Judge = Callable[[Any, SplitData], jax.Array]


class Steps(NamedTuple):
    """Inner steps of the contrast and the batch of tasks.

    Attributes:
      head: free steps, and as many nudged ones, of a readout.
      free: steps where all layers learn.
      nudged: steps of these in each nudged phase.
      head_shape: of the tasks that a body is trained on.
      head_tasks: in a batch.
      shape: of the tasks where all layers learn.
      tasks: in a batch.
      rested: free steps, and as many nudged ones, of a readout that runs to rest.
    """

    head: int = 30
    free: int = 20
    nudged: int = 15
    head_shape: Shape = Shape(10, 1, 2)
    head_tasks: int = 16
    shape: Shape = Shape(5, 1, 5)
    tasks: int = 8
    # At the condition number of 300 a step leaves 1 - 300^-1/2 of the distance, and so 150 steps leave 2e-4 of it.
    rested: int = 150


class Method(NamedTuple):
    """A way to meta-learn.

    Attributes:
      problem: of one task.
      estimator: of its meta-gradient.
      meta_params: where it starts, from a key.
      shape: of its tasks.
      num_tasks: in a batch.
      judge: `(meta_params, task) -> accuracy` on a task of the shape that is tested.
    """

    problem: cm.BilevelProblem
    estimator: cm.MetaGradientEstimator
    meta_params: Callable[[jax.Array], Any]
    shape: Shape
    num_tasks: int
    judge: Judge


def nesterov(rate: float, momentum: float, num_steps: int) -> cm.OptaxDescent:
    """Accelerated descent."""
    return cm.OptaxDescent(optax.sgd(rate, momentum=momentum, nesterov=True), num_steps=num_steps)


def head_learner(num_steps: int) -> cm.OptaxDescent:
    """Of a readout on features of length 10."""
    return nesterov(HEAD_RATE, HEAD_MOMENTUM, num_steps)


def published(
    free: cm.OptaxDescent,
    nudged: cm.OptaxDescent,
    beta: float,
    nudge: cm.Nudge,
    rule: cm.PlasticityRule = cm.Autodiff(),
) -> cm.Contrastive:
    """The contrast as published, symmetric: a fixed strength, and a learner that runs again."""
    return cm.Contrastive(free, nudged, cm.central_difference(beta), nudge, rule, estimate_error=False)


def head_split(layers: tuple[Layer, ...], ways: int, strength: float) -> cm.architectures.Architecture:
    """A readout of so many classes on the features of a body."""

    def seen(body: Any, x: jax.Array) -> jax.Array:
        return features(body, x, layers)

    return cm.architectures.fast_head_on_features(
        seen, cross_entropy, init_body(jax.random.key(0), layers), ways, strength
    )


def anchored_split(layers: tuple[Layer, ...], ways: int, strength: float) -> cm.architectures.Architecture:
    """A network of which every weight learns."""

    def apply(network: Any, x: jax.Array) -> jax.Array:
        return logits(network, x, layers)

    network = init_network(jax.random.key(0), layers, ways)
    return cm.architectures.learned_initialisation(apply, cross_entropy, network, strength)


def modulated_split(name: str, key: jax.Array, layers: tuple[Layer, ...], ways: int) -> cm.architectures.Architecture:
    """A network of which gains and shifts, or the coefficients of modules, learn with the readout.

    Args:
      name: `GAINS` or `BANK`.
      key: of the first weights.
      layers: of the body.
      ways: classes.
    """

    def apply(network: Any, x: jax.Array) -> jax.Array:
        return logits(network, x, layers)

    network = init_network(key, layers, ways)
    if name == GAINS:
        network["body"] = with_gains(network["body"])
        return cm.architectures.gain_modulation(apply, cross_entropy, network, ANCHOR_STRENGTH)
    network["body"] = with_modules(network["body"], NUM_MODULES, jax.random.fold_in(key, 1))
    return cm.architectures.modular_hypernetwork(apply, cross_entropy, network, ANCHOR_STRENGTH)


def init_network(key: jax.Array, layers: tuple[Layer, ...], ways: int) -> dict[str, Any]:
    """A body, and a readout of zeros."""
    readout = {"kernel": jnp.zeros((num_features(layers), ways)), "bias": jnp.zeros(ways)}
    return {"body": init_body(key, layers), "readout": readout}


def methods(steps: Steps = Steps(), layers: tuple[Layer, ...] = LAYERS, ways: int = 5) -> dict[str, Method]:
    """All that train, by name."""
    learner = head_learner(steps.head)
    anil = cm.OptaxDescent(optax.sgd(ANIL_RATE), num_steps=MAML_STEPS)
    slow = nesterov(ANCHOR_RATE, ANCHOR_MOMENTUM, steps.free)
    nudged = nesterov(ANCHOR_RATE, ANCHOR_MOMENTUM, steps.nudged)
    maml = cm.OptaxDescent(optax.sgd(MAML_RATE), num_steps=MAML_STEPS)

    def head(estimator: cm.MetaGradientEstimator, strength: float, judged_by: cm.OptaxDescent) -> Method:
        split = head_split(layers, steps.head_shape.ways, strength)
        judge = judge_of(head_split(layers, ways, strength), judged_by, lambda net, x: _scores(net, x, layers))
        return Method(
            split.problem, estimator, lambda key: {"slow": init_body(key, layers)},
            steps.head_shape, steps.head_tasks, judge,
        )  # fmt: skip

    def every(estimator: cm.MetaGradientEstimator, strength: float, learner: cm.OptaxDescent) -> Method:
        split = anchored_split(layers, ways, strength)
        judge = judge_of(split, learner, lambda net, x: logits(net, x, layers))
        return Method(
            split.problem, estimator, lambda key: {"anchor": init_network(key, layers, ways)},
            steps.shape._replace(ways=ways), steps.tasks, judge,
        )  # fmt: skip

    def modulated(name: str) -> Method:
        split = modulated_split(name, jax.random.key(0), layers, ways)
        judge = judge_of(split, slow, lambda net, x: logits(net, x, layers))
        return Method(
            split.problem, published(slow, nudged, ANCHOR_BETA, cm.LinearNudge(), split.rule),
            lambda key: modulated_split(name, key, layers, ways).meta_params,
            steps.shape._replace(ways=ways), steps.tasks, judge,
        )  # fmt: skip

    rested = head_learner(steps.rested)
    return {
        HEAD_TO_REST: head(published(rested, rested, HEAD_BETA, HEAD_NUDGE), RIDGE, head_learner(100)),
        GAINS: modulated(GAINS),
        BANK: modulated(BANK),
        HEAD: head(published(learner, learner, HEAD_BETA, HEAD_NUDGE), RIDGE, head_learner(100)),
        ANIL: head(cm.BackpropThroughLearning(anil), 0.0, anil),
        ANCHOR: every(published(slow, nudged, ANCHOR_BETA, cm.LinearNudge()), ANCHOR_STRENGTH, slow),
        IMAML: every(cm.ImplicitDifferentiation(slow, cm.ConjugateGradient(max_steps=CG_STEPS)), ANCHOR_STRENGTH, slow),
        MAML: every(cm.BackpropThroughLearning(maml), 0.0, maml),
        FOMAML: every(cm.FirstOrder(maml), 0.0, maml),
        REPTILE: every(cm.Reptile(maml, scale=1 / (MAML_RATE * MAML_STEPS)), 0.0, maml),
    }


def judge_of(
    split: cm.architectures.Architecture, learner: cm.OptaxDescent, scores: Callable[[Any, jax.Array], jax.Array]
) -> Judge:
    """Learn a task as the free phase does, and count."""
    stages = split.problem.stages

    def judge(meta_params: Any, task: SplitData) -> jax.Array:
        problem, meta = split.problem, meta_params
        if stages is not None:
            problem, meta = stages.rest, stages.prepare(meta_params, task)
        params = learner.solve(lambda at: problem.inner(at, meta, task), problem.init(meta, task)).params
        return accuracy(scores(split.weights(params, meta_params), task.x_val), task.y_val)

    return judge


@functools.cache
def ridge_judge(layers: tuple[Layer, ...], ways: int) -> Judge:
    """Of a body: the readout learns with a penalty, for 100 steps."""
    split = head_split(layers, ways, RIDGE)
    return judge_of(split, head_learner(100), lambda net, x: _scores(net, x, layers))


def nearest_neighbour(task: SplitData) -> jax.Array:
    """Accuracy of the label of the nearest image, by the Euclidean distance of pixels."""
    support, queries = (x.reshape(len(x), -1) for x in (task.x_train, task.x_val))
    distances = jnp.sum(support**2, 1) - 2 * queries @ support.T
    return jnp.mean((task.y_train[jnp.argmin(distances, 1)] == task.y_val).astype(jnp.float32))


def _scores(network: Any, x: jax.Array, layers: tuple[Layer, ...]) -> jax.Array:
    readout = network["readout"]
    out: jax.Array = features(network["body"], x, layers) @ readout["kernel"] + readout["bias"]
    return out
