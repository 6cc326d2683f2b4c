"""A CNN that learns 5 classes from a drawing of each, its losses with and without an anchor (iMAML), and its tasks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

NUM_TASKS, WAYS, NUM_QUERIES = 4, 5, 5
ANCHOR = 1.0


class Size(NamedTuple):
    """Of the network and of the images."""

    side: int = 28
    num_channels: int = 32
    num_blocks: int = 4


class Drawings(NamedTuple):
    """Images (num, side, side, 1) and labels: one of each class to learn from, several to judge by."""

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array


def init_params(key: jax.Array, size: Size) -> Any:
    """Convolutions, each with a scale and a shift for every channel, and an affine layer."""
    widths = (1, *[size.num_channels] * size.num_blocks)
    keys = jax.random.split(key, size.num_blocks + 1)
    blocks = [
        {
            "kernel": jax.random.normal(k, (3, 3, before, after)) * (2 / (9 * before)) ** 0.5,
            "scale": jnp.ones(after),
            "shift": jnp.zeros(after),
        }
        for k, before, after in zip(keys, widths, widths[1:], strict=False)
    ]
    left = (size.side // 2**size.num_blocks) ** 2 * size.num_channels
    kernel = jax.random.normal(keys[-1], (left, WAYS)) / left**0.5
    return {"blocks": blocks, "readout": {"kernel": kernel, "bias": jnp.zeros(WAYS)}}


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Each block: convolution of 3 x 3, group norm, softplus (smooth, as contrasts like it), pooling of 2 x 2."""
    for block in params["blocks"]:
        x = jax.lax.conv_general_dilated(x, block["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.softplus(_group_norm(x) * block["scale"] + block["shift"])
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    out: jax.Array = x.reshape(x.shape[0], -1) @ params["readout"]["kernel"] + params["readout"]["bias"]
    return out


def _group_norm(x: jax.Array, group: int = 4) -> jax.Array:
    grouped = x.reshape(*x.shape[:3], -1, group)
    mean = jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    variance = jnp.mean((grouped - mean) ** 2, axis=(1, 2, 4), keepdims=True)
    return ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)


def _cross_entropy(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels))


def inner_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
    """Without an anchor, as MAML has it."""
    return _cross_entropy(params, task.x_train, task.y_train)


def anchored_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
    """With one, which makes the solution depend on the start."""
    away = jax.tree.map(lambda p, s: jnp.sum((p - s) ** 2), params, start)
    return inner_loss(params, start, task) + ANCHOR / 2 * sum(jax.tree.leaves(away), start=jnp.zeros(()))


def outer_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
    """Of other drawings."""
    return _cross_entropy(params, task.x_val, task.y_val)


def draw_tasks(rng: np.random.Generator, images: Any) -> Drawings:
    """A batch of tasks: for each some characters, one drawing of each to learn from and others to judge by."""
    num_characters, num_drawings = images.shape[:2]
    parts: list[tuple[Any, Any]] = []
    for _ in range(NUM_TASKS):
        characters = rng.permutation(num_characters)[:WAYS]
        drawings = rng.permutation(num_drawings)[: 1 + NUM_QUERIES]
        chosen = images[characters][:, drawings]
        parts.append((chosen[:, 0], chosen[:, 1:].reshape(-1, *images.shape[2:])))
    x_train, x_val = (
        jnp.asarray(np.stack(part)[..., None], jnp.result_type(float)) for part in zip(*parts, strict=True)
    )
    labels = np.arange(WAYS)
    y_train, y_val = (jnp.asarray(np.tile(y, (NUM_TASKS, 1))) for y in (labels, np.repeat(labels, NUM_QUERIES)))
    return Drawings(x_train, y_train, x_val, y_val)


def glyphs(seed: int, num_characters: int, num_drawings: int, side: int) -> Any:
    """Smooth strokes, one for each character, drawn again and again with a shaky hand: ink is 1."""
    rng = np.random.default_rng(seed)
    along = np.linspace(0, 1, 40)
    waves = np.stack([np.cos(np.pi * k * along) for k in range(5)])
    shape = rng.standard_normal((num_characters, 1, 2, 5)) / (1 + np.arange(5))
    shake = 0.08 * rng.standard_normal((num_characters, num_drawings, 2, 5))
    paths = 0.5 + 0.22 * (shape + shake) @ waves
    grid = (np.arange(side) + 0.5) / side
    near = np.exp(-(((grid - paths[..., None]) * 14) ** 2))  # of each coordinate, along the stroke
    return np.max(near[:, :, 0, :, :, None] * near[:, :, 1, :, None, :], axis=2).astype(np.float32)
