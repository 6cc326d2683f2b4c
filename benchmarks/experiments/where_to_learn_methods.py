"""What may learn within a task: all weights, the head, or what a mask says; and the meta-gradient it comes from."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.experiments.where_to_learn_settings import SINUSOIDS, STEPS_PER_SEGMENT, STREAM, STREAM_RATE, Setting
from contrastive_meta.architectures import Architecture, plasticity_mask

ALL, HEAD, SIGN, RELU = "all plastic", "head only", "sign mask", "ReLU mask"
THROUGH, CONTRAST, FIRST = "through learning", "by contrast", "to first order"
FEWER, MORE = f"{SIGN} {THROUGH}; a quarter closed at first", f"{SIGN} {THROUGH}; three quarters closed at first"
# Masks start uniform within half a unit around 0, as published: half are closed. A graded one starts at 1, its rate.
_REACH, _SHIFT = 0.5, 0.25
# Outer rates of Adam at first, as in `sinusoids`: through learning, and by contrast, which takes fewer outer steps.
OUTER_RATE, CONTRAST_RATE = 3e-3, 1e-2
# And of masks, in units of the start's: the published masks move by 0.0075 to 0.01 a step.
MASK_RATE, CONTRAST_MASK_RATE = 0.01, 0.03
# Of the norm of a meta-gradient, as in `sinusoids`.
_CLIP = 10.0

First = Callable[[jax.Array, Any], Any]


class Method(NamedTuple):
    """A way to learn where to learn.

    Attributes:
      build: `key -> architecture`, the same but for its first meta-parameters.
      estimator: of the meta-gradient.
      learner: of a new task.
      stream_learner: of a segment of a stream.
      outer_rate: of Adam at first, for where learning starts.
      mask_rate: of Adam at first, for the mask; 0 for one that stays as it is.
      program: name that methods have in common whose outer steps differ in numbers alone.
    """

    build: Callable[[jax.Array], Architecture]
    estimator: cm.MetaGradientEstimator
    learner: cm.OptaxDescent
    stream_learner: cm.OptaxDescent
    outer_rate: float
    mask_rate: float
    program: str


def methods(name: str, setting: Setting) -> dict[str, Method]:
    """All of a setting, by name.

    Also where all weights are plastic, or the head alone, there is a mask, which stays as it is: open, or open in the
    readout. Through learning this is MAML, or ANIL; by contrast it is an anchor, or a fast head.
    """

    def build(first: First, strength: float | None, graded: bool) -> Callable[[jax.Array], Architecture]:
        def architecture(key: jax.Array) -> Architecture:
            network = setting.network(key)
            mask = first(jax.random.fold_in(key, 7), network)
            if strength is None:
                return masked_steps(setting, network, mask)
            return plasticity_mask(setting.apply, setting.loss, network, mask, strength, graded)

        return architecture

    made = {}
    for what, first in ((ALL, everywhere), (HEAD, in_the_head), (SIGN, scattered(0.0)), (RELU, everywhere)):
        graded, learned = what == RELU, what in (SIGN, RELU)
        kind = RELU if graded else SIGN
        descent = masked_descent(setting.rate, setting.num_steps, graded)
        in_stream = masked_descent(STREAM_RATE, STEPS_PER_SEGMENT, graded)
        through, mask_rate = cm.BackpropThroughLearning(descent), MASK_RATE if learned else 0.0
        made[f"{what} {THROUGH}"] = Method(
            build(first, None, graded), through, descent, in_stream, OUTER_RATE, mask_rate, f"{kind} {THROUGH}"
        )
        if name != STREAM:
            plain = cm.OptaxDescent(optax.sgd(STREAM_RATE), num_steps=STEPS_PER_SEGMENT)
            made[f"{what} {CONTRAST}"] = Method(
                build(first, setting.strength, graded), setting.contrast, setting.free, plain, CONTRAST_RATE,
                CONTRAST_MASK_RATE if learned else 0.0, f"{kind} {CONTRAST}",
            )  # fmt: skip
            if what == SIGN:
                steps = cm.OptaxDescent(optax.sgd(setting.rate), num_steps=setting.num_steps)
                made[f"{SIGN} {FIRST}"] = Method(
                    build(first, 0.0, graded), cm.FirstOrder(steps), steps, plain, OUTER_RATE, mask_rate,
                    f"{SIGN} {FIRST}",
                )  # fmt: skip
    if name == SINUSOIDS:
        for case, shift in ((FEWER, _SHIFT), (MORE, -_SHIFT)):
            made[case] = made[f"{SIGN} {THROUGH}"]._replace(build=build(scattered(shift), None, False))
    return made


def masked_steps(setting: Setting, network: Any, mask: Any) -> Architecture:
    """All weights learn from a learned start, as far as the steps of `masked_descent` move them."""

    def inner(params: Any, meta_params: Any, task: Any) -> jax.Array:
        return setting.loss(setting.apply(params, task.x_train), task.y_train)

    def outer(params: Any, meta_params: Any, task: Any) -> jax.Array:
        return setting.loss(setting.apply(params, task.x_val), task.y_val)

    problem = cm.BilevelProblem(inner, outer, lambda meta_params, task: meta_params["start"])
    return Architecture(
        problem, cm.Autodiff(), {"start": network, "mask": mask}, lambda params, meta_params: params
    )  # fmt: skip


def masked_descent(rate: float, num_steps: int, graded: bool) -> cm.OptaxDescent:
    """Gradient descent whose every step is taken as far as the mask lets it: sparse-MAML's, all orders of it.

    `PlasticityMask` has the same steps, but lets gradients straight through to closed synapses, which is exact to first
    order alone. Here the mask is in the optimiser, and what is passed straight through is dz/dm.
    """

    def masked(meta_params: Any) -> optax.GradientTransformation:
        z = jax.tree.map(lambda m: opened(m, graded), meta_params["mask"])
        gate = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, z, updates))
        return optax.chain(gate, optax.sgd(rate))

    return cm.OptaxDescent(masked, num_steps=num_steps)


def opened(mask: jax.Array, graded: bool) -> jax.Array:
    """How far weights move: (1 + sign m) / 2 with slope 1/2, or max(m, 0) with slope 1 when graded, everywhere."""
    hard, soft = (jnp.maximum(mask, 0), mask) if graded else ((1 + jnp.sign(mask)) / 2, mask / 2)
    return soft + jax.lax.stop_gradient(hard - soft)


def everywhere(key: jax.Array, network: Any) -> Any:
    """A mask that is open."""
    return jax.tree.map(jnp.ones_like, network)


def in_the_head(key: jax.Array, network: Any) -> Any:
    """A mask that is open in the readout alone."""
    return {name: jax.tree.map(jnp.ones_like if name == "readout" else _minus, part) for name, part in network.items()}


def scattered(shift: float) -> Callable[[jax.Array, Any], Any]:
    """A mask that is uniform around `shift`, each entry by itself."""

    def mask(key: jax.Array, network: Any) -> Any:
        leaves, structure = jax.tree.flatten(network)
        pairs = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        return structure.unflatten([shift + jax.random.uniform(k, w.shape, w.dtype, -_REACH, _REACH) for k, w in pairs])

    return mask


def _minus(weights: jax.Array) -> jax.Array:
    return -jnp.ones_like(weights)


def problem_of(setting: Setting, split: Architecture) -> cm.BilevelProblem:
    """The architecture's problem, a part of the task at a time where the setting says so."""
    return split.problem if setting.sample is None else dataclasses.replace(split.problem, sample=setting.sample)


def transformation(method: Method) -> optax.GradientTransformation:
    """Of the meta-gradient: clipped, Adam, and a rate of its own for the mask, kept in the optimiser's state."""
    adam = optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())
    faster = optax.inject_hyperparams(optax.scale)(step_size=method.mask_rate / method.outer_rate)
    return optax.multi_transform({"mask": optax.chain(adam, faster), "start": adam}, {"mask": "mask", "start": "start"})


def closed(leaves: list[Any]) -> float:
    """The fraction of weights that a mask holds fixed; 0 is closed in both forms."""
    total = sum(leaf.size for leaf in leaves)
    return float(sum(jnp.sum(leaf <= 0) for leaf in leaves) / total)
