"""Where masks are learned: sinusoids, streams of their segments, and reduced Omniglot, each a network and its tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks.experiments import omniglot_network, omniglot_tasks
from benchmarks.experiments.omniglot_methods import (
    ANCHOR_BETA,
    ANCHOR_MOMENTUM,
    ANCHOR_RATE,
    ANCHOR_STRENGTH,
    MAML_RATE,
    MAML_STEPS,
    init_network,
    nesterov,
)
from benchmarks.experiments.omniglot_network import Layer
from benchmarks.experiments.omniglot_tasks import Shape
from benchmarks.experiments.sinusoids_methods import (
    BETA,
    FREE_RATE,
    NUDGED_RATE,
    SGD_RATE,
    SGD_STEPS,
    STRENGTH,
    decayed,
    squared_error,
)
from contrastive_meta.architectures import mlp, mlp_params
from contrastive_meta.problems import SplitData, sinusoid_tasks

SINUSOIDS, STREAM, OMNIGLOT = "sinusoids", "stream", "Omniglot"
# The stream: a sinusoid is met in parts, from left to right, two points and two steps of descent for each.
SEGMENTS, PER_SEGMENT, STEPS_PER_SEGMENT = 5, 2, 2
# Of a sum over the 2 points of a segment, chosen once: a curvature that the 10 points of a task allow SGD_RATE for is
# a fifth here, and a stream has 2 steps for what a task has 10 for.
STREAM_RATE = 1e-2
# Omniglot with two of the layers of the experiment `omniglot`, and half their channels.
_REDUCED = Layer(6, 4, 16), Layer(3, 2, 32)
_LEARN_SHAPE, _TEST_SHAPE = Shape(5, 1, 3), Shape(5, 1, 5)


class Sizes(NamedTuple):
    """How long an inner phase is, and how large networks and batches are.

    Attributes:
      widths: hidden layers on sinusoids.
      sinusoid_steps: free and nudged ones, by contrast.
      layers: on Omniglot.
      omniglot_steps: free and nudged ones, by contrast.
      num_tasks: in a batch of sinusoids.
      num_images: tasks in a batch of Omniglot.
    """

    widths: tuple[int, ...] = (40, 40)
    sinusoid_steps: tuple[int, int] = (100, 50)
    layers: tuple[Layer, ...] = _REDUCED
    omniglot_steps: tuple[int, int] = (20, 15)
    num_tasks: int = 10
    num_images: int = 4


class Setting(NamedTuple):
    """A network, its tasks, and how they are learned with all of it plastic.

    Attributes:
      apply: `(network, x) -> outputs`.
      loss: `(outputs, targets) -> scalar`, to learn by and to judge by.
      error: `(outputs, targets) -> scalar` that is reported: mean of squares, or fraction of wrong labels.
      network: its first weights, from a key.
      layers: names of its layers as they stand in the paths of its weights, the first ones first.
      draw: `(key, data, number) -> tasks` to meta-learn on.
      draw_test: likewise, to report.
      data: what tasks are drawn from to meta-learn.
      test_data: to report.
      rate: of the descent to differentiate through.
      num_steps: of it.
      free: of a task, by contrast.
      contrast: the estimator.
      strength: of the pull to the start, by contrast.
      sample: minibatch of an inner step, `(key, task, step) -> task`; None for the whole task.
      num_tasks: in a batch.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    error: Callable[[jax.Array, jax.Array], jax.Array]
    network: Callable[[jax.Array], Any]
    layers: tuple[str, ...]
    draw: Callable[[jax.Array, Any, int], SplitData]
    draw_test: Callable[[jax.Array, Any, int], SplitData]
    data: Any
    test_data: Any
    rate: float
    num_steps: int
    free: cm.OptaxDescent
    contrast: cm.MetaGradientEstimator
    strength: float
    sample: Callable[[jax.Array, Any, jax.Array], Any] | None
    num_tasks: int


def settings(sizes: Sizes, folder: Path | None, *, smoke: bool, images: bool) -> dict[str, Setting]:
    """All, by name.

    Args:
      sizes: of networks and phases.
      folder: with Omniglot in it.
      smoke: whether drawings made here do in its place.
      images: whether Omniglot is wanted.
    """
    free, nudged = (decayed(r, n) for r, n in zip((FREE_RATE, NUDGED_RATE), sizes.sinusoid_steps, strict=True))
    scheme = cm.forward_difference(BETA, matched=False)
    whole = Setting(
        mlp, squared_error, mean_square, lambda key: mlp_params(key, (1, *sizes.widths, 1)),
        (*(f"hidden_{k}" for k in range(len(sizes.widths))), "readout"),
        lambda key, data, number: sinusoid_tasks(key, number),
        lambda key, data, number: sinusoid_tasks(key, number),
        (), (), SGD_RATE, SGD_STEPS, free,
        cm.Contrastive(free, nudged, scheme, cm.LossNudge(), estimate_error=False),
        STRENGTH, None, sizes.num_tasks,
    )  # fmt: skip
    stream = whole._replace(
        draw=lambda key, data, number: streams(key, number, PER_SEGMENT),
        draw_test=lambda key, data, number: streams(key, number, 10),
        rate=STREAM_RATE,
        num_steps=SEGMENTS * STEPS_PER_SEGMENT,
        sample=lambda key, task, step: segment(task, step // STEPS_PER_SEGMENT),
    )
    made = {SINUSOIDS: whole, STREAM: stream}
    return {**made, OMNIGLOT: _omniglot(sizes, folder, smoke=smoke)} if images else made


def _omniglot(sizes: Sizes, folder: Path | None, *, smoke: bool) -> Setting:
    splits = omniglot_tasks.load(folder, smoke=smoke)
    free, nudged = (nesterov(ANCHOR_RATE, ANCHOR_MOMENTUM, n) for n in sizes.omniglot_steps)
    scheme = cm.central_difference(ANCHOR_BETA)
    sample = omniglot_tasks.sample_tasks
    return Setting(
        lambda network, x: omniglot_network.logits(network, x, sizes.layers),
        omniglot_network.cross_entropy, lambda scores, labels: 1 - omniglot_network.accuracy(scores, labels),
        lambda key: init_network(key, sizes.layers, _LEARN_SHAPE.ways),
        (*(f"layer_{k}" for k in range(len(sizes.layers))), "readout"),
        lambda key, data, number: sample(key, data, number, _LEARN_SHAPE, rotate=True),
        lambda key, data, number: sample(key, data, number, _TEST_SHAPE, rotate=False),
        jnp.asarray(splits.train), jnp.asarray(splits.test),
        MAML_RATE, MAML_STEPS, free,
        cm.Contrastive(free, nudged, scheme, cm.LinearNudge(), estimate_error=False),
        ANCHOR_STRENGTH, None, sizes.num_images,
    )  # fmt: skip


def mean_square(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """The mean of squares over points."""
    return squared_error(prediction, target) / target.size


def streams(key: jax.Array, number: int, num_query: int) -> SplitData:
    """Sinusoids as `sinusoid_tasks` has them, their points sorted into segments.

    Returns:
      Inputs of shape (number, segments, points of a segment, 1), targets without the last axis.
    """
    of_amplitude, of_phase, of_points = jax.random.split(key, 3)
    amplitude = jax.random.uniform(of_amplitude, (number, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(of_phase, (number, 1, 1), maxval=jnp.pi)
    within = jax.random.uniform(of_points, (number, SEGMENTS, PER_SEGMENT + num_query))
    x = 10 * (jnp.arange(SEGMENTS)[:, None] + within) / SEGMENTS - 5
    y = amplitude * jnp.sin(x + phase)
    few = PER_SEGMENT
    return SplitData(x[..., :few, None], y[..., :few], x[..., few:, None], y[..., few:])


def segment(task: SplitData, number: Any) -> SplitData:
    """The points of one segment to learn from; those to judge by are all there."""
    return task._replace(x_train=task.x_train[number], y_train=task.y_train[number])


def by_layer(setting: Setting, leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Leaves of a pytree like the network, by the name of their layer."""
    paths = jax.tree_util.tree_flatten_with_path(leaves)[0]
    return {
        name: [leaf for path, leaf in paths if any(getattr(key, "key", None) == name for key in path)]
        for name in setting.layers
    }
