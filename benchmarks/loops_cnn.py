"""Few-shot learning in batches of 4 tasks: a 4-block CNN on drawings (iMAML), against 5 steps of MAML."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Record, Session, precision
from benchmarks.loops_measure import compiled, median, ratio, record_aim, time_in_turn

CASE = "cnn"
NUM_TASKS, WAYS, NUM_QUERIES = 4, 5, 5
NUM_STEPS = 8  # outer
RATE, ANCHOR, INNER_STEPS, MAML_STEPS = 0.1, 1.0, 16, 5
CONTRAST, SEQUENTIAL = "contrast", "contrast, sequential"
WITHOUT_ESTIMATE, MAML = "contrast, no estimate", "MAML, 5 steps"
PLAIN = "one gradient of each task"


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


def run(session: Session) -> None:
    """A few outer steps of each method in turn, each on its own trajectory, all on the same tasks."""
    x64 = bool(session.x64)
    size = Size(8, 4, 1) if session.smoke else Size()
    num_steps = 1 if session.smoke else NUM_STEPS
    images, source = _images(session, size)
    rng = np.random.default_rng(session.seed)
    with precision(x64):
        batches = [draw_tasks(rng, images) for _ in range(num_steps)]
        params = init_params(jax.random.key(session.seed), size)
        methods = _methods(session.smoke)
        session.progress.begin("cnn: compiling", 1 + len(methods))
        loops = {name: _Loop(session, name, *method, params, batches) for name, method in methods.items()}
        # What a counted gradient would cost if nothing else were run: all tasks at once, as a batch has them.
        plain = compiled(session, PLAIN, _plain_gradients, params, batches[0])
        turns: dict[str, Callable[[], Any]] = {name: loop.step for name, loop in loops.items()}
        turns[PLAIN] = functools.partial(plain.call, params, batches[0])
        seconds, raised = time_in_turn(session, f"cnn: {num_steps} outer steps of {NUM_TASKS} tasks", turns, num_steps)
    for error in raised.values():
        raise error
    common: Record = {"x64": x64, "case": CASE, "kind": "method", "problem": "4-block CNN", "data": source}
    setting: Record = {"size": size._asdict(), "num_tasks": NUM_TASKS, "num_params": _count(params)}
    gradient = seconds[PLAIN]
    session.record(
        **common,
        **setting,
        method=PLAIN,
        seconds=median(gradient),
        all_seconds=gradient,
        num_gradients=1,
        **plain.size(),
    )
    rows = {}
    for name, loop in loops.items():
        times = seconds[name]
        # A batch takes as long as its longest task.
        counted = [int(np.max(told.num_gradients)) for told in loop.told]
        as_plain = [num * one for num, one in zip(counted, gradient, strict=True)]
        statuses = [cm.Status(int(status)).name for told in loop.told for status in told.status]
        rows[name] = session.record(
            **common,
            **setting,
            method=name,
            seconds=median(times),
            all_seconds=times,
            over={MAML: ratio(times, seconds[MAML])},
            num_gradients=median(counted),
            mean_num_gradients=float(np.mean([told.num_gradients for told in loop.told])),
            over_plain=ratio(times, as_plain) if min(counted) > 0 else None,
            statuses={status: statuses.count(status) for status in dict.fromkeys(statuses)},
            estimate=median([float(np.max(told.error_estimate)) for told in loop.told]),
            outer_losses=loop.values,
            outer_loss=loop.values[-1],
            **loop.program.size(),
        )
    default, maml = rows[CONTRAST], rows[MAML]
    for aim, target, measured in (
        ("time to trace and compile over MAML", 1.5, default["compile_cpu_seconds"] / maml["compile_cpu_seconds"]),
        ("time of a step over MAML", 4.0, default["over"][MAML]),
        ("time of a step over its counted gradients as plain ones", 1.3, default["over_plain"]),
    ):
        record_aim(session, x64=x64, case=CASE, aim=f"4-block CNN: {aim}", target=target, measured=measured)


def _methods(smoke: bool) -> dict[str, tuple[cm.BilevelProblem, cm.MetaGradientEstimator]]:
    """With their problems: MAML's has no anchor."""
    learner = cm.OptaxDescent(optax.sgd(RATE), num_steps=2 if smoke else INNER_STEPS)
    anchored = cm.BilevelProblem(_anchored_loss, _outer_loss, lambda start, task: start)
    free = cm.BilevelProblem(_inner_loss, _outer_loss, lambda start, task: start)
    maml = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(RATE), num_steps=1 if smoke else MAML_STEPS))
    contrast = cm.Contrastive(learner)
    if smoke:
        # As published, at a typed strength: the program that compiles fastest.
        published = cm.Contrastive(learner, learner, cm.forward_difference(0.1), cm.LossNudge(), estimate_error=False)
        return {CONTRAST: (anchored, published), MAML: (free, maml)}
    return {
        CONTRAST: (anchored, contrast),
        SEQUENTIAL: (anchored, dataclasses.replace(contrast, sequential=True)),
        WITHOUT_ESTIMATE: (anchored, dataclasses.replace(contrast, estimate_error=False)),
        MAML: (free, maml),
    }


class _Loop:
    """A method's trajectory."""

    def __init__(
        self,
        session: Session,
        name: str,
        problem: cm.BilevelProblem,
        estimator: cm.MetaGradientEstimator,
        params: Any,
        batches: list[Drawings],
    ) -> None:
        optimizer = optax.adam(1e-3)
        value_and_grad = cm.value_and_meta_grad(problem, estimator, has_aux=True)

        def step(start: Any, memory: Any, tasks: Drawings) -> Any:
            (value, told), grad = value_and_grad(start, tasks)
            updates, memory = optimizer.update(grad, memory, start)
            return value, told, (optax.apply_updates(start, updates), memory)

        self._batches, self._carry = iter(batches), (params, optimizer.init(params))
        self.program = compiled(session, name, step, *self._carry, batches[0])
        self.values: list[float] = []
        self.told: list[cm.Diagnostics] = []

    def step(self) -> Any:
        """One outer step."""
        value, told, self._carry = jax.block_until_ready(self.program.call(*self._carry, next(self._batches)))
        self.values.append(float(value))
        self.told.append(told)


def _plain_gradients(start: Any, tasks: Drawings) -> Any:
    """Of the anchored inner loss, every task at parameters of its own."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * NUM_TASKS), start)
    return jax.vmap(jax.grad(_anchored_loss), (0, None, 0))(params, start, tasks)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


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


def _inner_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
    return _cross_entropy(params, task.x_train, task.y_train)


def _anchored_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
    away = jax.tree.map(lambda p, s: jnp.sum((p - s) ** 2), params, start)
    return _inner_loss(params, start, task) + ANCHOR / 2 * sum(jax.tree.leaves(away), start=jnp.zeros(()))


def _outer_loss(params: Any, start: Any, task: Drawings) -> jax.Array:
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


def _images(session: Session, size: Size) -> tuple[Any, str]:
    """Omniglot where a data folder has it, or drawings made here: what they show does not change what a step costs."""
    if not session.smoke:
        try:
            return data.omniglot(session.data), "Omniglot"
        except data.DataMissingError:
            pass
    return glyphs(session.seed, 40, 1 + NUM_QUERIES, size.side), "generated glyphs"


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
