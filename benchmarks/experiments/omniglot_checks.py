"""What stands behind the accuracies on Omniglot: how right the meta-gradients are, and what the package costs."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks.experiments.omniglot_methods import (
    HEAD_BETA,
    HEAD_MOMENTUM,
    HEAD_NUDGE,
    HEAD_RATE,
    RIDGE,
    Method,
    head_learner,
    head_split,
    published,
)
from benchmarks.experiments.omniglot_network import Layer, cross_entropy, features
from benchmarks.experiments.omniglot_tasks import sample_tasks
from benchmarks.harness import Record, cosine, flatten, precision, relative_error
from contrastive_meta.problems import SplitData

_REPEATS = 15


def gradients(
    meta_params: Any, layers: tuple[Layer, ...], ways: int, tasks: SplitData, lengths: Sequence[int]
) -> Record:
    """Cosines to the exact meta-gradient at these weights, in float64, task by task.

    Exact is implicit differentiation at a solution of gradient norm 1e-10, its linear system solved to 1e-10.

    Args:
      meta_params: of a trained body.
      layers: of it.
      ways: of the tasks.
      tasks: with a leading axis.
      lengths: steps of contrasts to compare, such as the one that it was trained with.
    """
    with precision(x64=True):
        meta, batch = jax.tree.map(_double, (meta_params, tasks))
        problem = head_split(layers, ways, RIDGE).problem
        exact = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e-10), cm.ConjugateGradient(tol=1e-10))
        compared = {
            "default": cm.Contrastive(cm.LBFGS()),
            **{f"{n} + {n} steps": published(head_learner(n), head_learner(n), HEAD_BETA, HEAD_NUDGE) for n in lengths},
        }
        references, residuals = [], []
        estimate = jax.jit(functools.partial(exact.estimate, problem))
        for task in _each(batch):
            result = estimate(meta, task)
            references.append(flatten(result.grad))
            residuals.append(float(result.diagnostics.free_residual))
        told = {name: _compared(estimator, problem, meta, batch, references) for name, estimator in compared.items()}
    return {"num_tasks": len(references), "reference_residual": max(residuals), "estimators": told}


def _compared(estimator: Any, problem: Any, meta: Any, batch: Any, references: list[Any]) -> Record:
    estimate = jax.jit(functools.partial(estimator.estimate, problem))
    results = [estimate(meta, task) for task in _each(batch)]
    pairs = [(result.grad, reference) for result, reference in zip(results, references, strict=True)]
    mean = np.mean([flatten(grad) for grad, _ in pairs], axis=0)
    cosines, errors = [cosine(*pair) for pair in pairs], [relative_error(*pair) for pair in pairs]
    names = [cm.Status(int(result.diagnostics.status)).name for result in results]
    return {
        "cosine": float(np.mean(cosines)),
        "least_cosine": min(cosines),
        "cosine_of_mean": cosine(mean, np.mean(references, axis=0)),
        "error": statistics.median(errors),
        "statuses": {name: names.count(name) for name in dict.fromkeys(names)},
    }


def overhead(method: Method, meta_params: Any, layers: tuple[Layer, ...], images: jax.Array, num_steps: int) -> Record:
    """Time of a batch's meta-gradient by the package and by the same contrast written out, in turn."""
    tasks = sample_tasks(jax.random.key(5), images, method.num_tasks, method.shape, rotate=True)
    ours = cm.value_and_meta_grad(method.problem, method.estimator)
    bare = functools.partial(_bare, layers=layers, num_steps=num_steps)
    calls: dict[str, Callable[..., Any]] = {}
    compiling, times = {}, {}
    for name, function in (("package", ours), ("bare", bare)):
        begin = time.process_time()
        calls[name] = jax.jit(function).lower(meta_params, tasks).compile()
        compiling[name], times[name] = time.process_time() - begin, list[float]()
    outputs = {name: jax.block_until_ready(call(meta_params, tasks)) for name, call in calls.items()}
    for _ in range(_REPEATS):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(meta_params, tasks))
            times[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(times["package"], times["bare"], strict=True)]
    return {
        "seconds": {name: statistics.median(of) for name, of in times.items()},
        "compile_cpu_seconds": compiling,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "difference": relative_error(outputs["package"][1], flatten(outputs["bare"][1])),
    }


def _bare(meta_params: Any, tasks: SplitData, layers: tuple[Layer, ...], num_steps: int) -> tuple[jax.Array, Any]:
    """The contrast of `published`, without statuses and checks: `(outer loss, meta-gradient)`, means over tasks."""
    ways = int(tasks.y_train.shape[1])

    def seen(meta: Any) -> tuple[jax.Array, jax.Array]:
        return features(meta["slow"], tasks.x_train, layers), features(meta["slow"], tasks.x_val, layers)

    def inner(p: Any, z: jax.Array, y: jax.Array) -> jax.Array:
        pull = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
        return cross_entropy(z @ p["kernel"] + p["bias"], y) + RIDGE / 2 * pull

    def outer(p: Any, z: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(z @ p["kernel"] + p["bias"], y)

    def descend(loss: Callable[[Any], jax.Array], params: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            at, velocity = carry
            grad = jax.grad(loss)(at)
            velocity = jax.tree.map(lambda v, g: HEAD_MOMENTUM * v + g, velocity, grad)
            ahead = jax.tree.map(lambda x, v, g: x - HEAD_RATE * (HEAD_MOMENTUM * v + g), at, velocity, grad)
            return (ahead, velocity), None

        return jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), None, num_steps)[0][0]

    def one(zs: tuple[jax.Array, jax.Array], y: jax.Array, y_val: jax.Array) -> tuple[jax.Array, Any]:
        start = {"kernel": jnp.zeros((zs[0].shape[-1], ways)), "bias": jnp.zeros(ways)}
        free = descend(lambda p: inner(p, zs[0], y), start)
        value, (pulled, direct) = jax.value_and_grad(outer, (0, 1))(free, zs[1], y_val)

        def phase(beta: jax.Array) -> jax.Array:
            def nudged(p: Any) -> jax.Array:
                line = jax.tree.map(lambda v, x: jnp.sum(v * x), pulled, p)
                return inner(p, zs[0], y) + beta * jnp.sum(jnp.stack(jax.tree.leaves(line)))

            in_features: jax.Array = jax.grad(inner, 1)(descend(nudged, free), zs[0], y)
            return in_features

        both = jax.vmap(phase)(jnp.array([HEAD_BETA, -HEAD_BETA]))
        return value, ((both[0] - both[1]) / (2 * HEAD_BETA), direct)

    zs, pull = jax.vjp(seen, meta_params)
    values, in_features = jax.vmap(one)(zs, tasks.y_train, tasks.y_val)
    (grad,) = pull(jax.tree.map(lambda g: g / len(values), in_features))
    return jnp.mean(values), grad


def _each(batch: Any) -> list[Any]:
    return [jax.tree.map(lambda leaf, k=k: leaf[k], batch) for k in range(len(batch.y_train))]


def _double(leaf: Any) -> jax.Array:
    array = np.asarray(leaf)
    return jnp.asarray(array, np.float64 if np.issubdtype(array.dtype, np.floating) else array.dtype)
