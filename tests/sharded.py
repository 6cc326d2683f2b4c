"""What `test_sharding` runs in processes of its own, whose devices are counted before JAX starts: prints JSON."""

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import contrastive_meta as cm
from contrastive_meta import problems

NUM_TASKS, NUM_DEVICES, NUM_FEATURES, BATCH_SIZE = 16, 8, 8, 8
# A fixed number of steps: a tolerance may be met a step later by sums that are taken in another order.
LEARNER = cm.OptaxDescent(optax.sgd(0.5, momentum=0.9), num_steps=150)
ESTIMATORS = {
    "default": cm.Contrastive(LEARNER),
    "learning twice": cm.Contrastive(LEARNER, nudged_solver=LEARNER, scheme=cm.central_difference(1e-2)),
    "implicit": cm.ImplicitDifferentiation(LEARNER),
}
# Older versions of JAX make no explicit axes unless asked, and the package leaves them alone there.
EXPLICIT = "Explicit" if hasattr(jax.sharding, "auto_axes") else "Auto"
# How meta-parameters and the mesh's axes are, and how many tasks learn at once.
LAYOUTS = {
    "default": [("replicated", "Auto", None), ("sharded", "Auto", BATCH_SIZE)],
    "learning twice": [("replicated", EXPLICIT, BATCH_SIZE), ("sharded", "Auto", None)],
    "implicit": [("replicated", "Auto", BATCH_SIZE), ("sharded", EXPLICIT, None)],
}
COLLECTIVES = "all-gather|all-to-all|collective-permute|collective-broadcast|all-reduce|reduce-scatter"


def tasks_from(first: int, number: int) -> tuple[cm.BilevelProblem, Any, Any]:
    """A problem, its meta-parameters, and so many different tasks as numpy arrays."""
    made = [
        problems.logistic_regression(
            *problems.classification_data(jax.random.key(first + k), 20, 20, NUM_FEATURES, 2, separation=1.5),
            strength=0.3,
        )
        for k in range(number)
    ]
    tasks = jax.tree.map(lambda *leaves: np.stack(leaves), *[instance.task for instance in made])
    return made[0].problem, jax.tree.map(np.asarray, made[0].meta_params), tasks


def relative_error(got: Any, wanted: Any) -> float:
    """The largest error of an entry, relative to the largest entry of its leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b)) / max(np.max(np.abs(b)), 1e-3)) for a, b in pairs)


def on_mesh(axes: str, meta_layout: str, meta_params: Any, tasks: Any) -> tuple[Any, Any]:
    """Meta-parameters and tasks laid out over all devices."""
    axis_type = getattr(jax.sharding.AxisType, axes)
    mesh = jax.make_mesh((NUM_DEVICES,), ("tasks",), axis_types=(axis_type,))
    along, copied = NamedSharding(mesh, PartitionSpec("tasks")), NamedSharding(mesh, PartitionSpec())
    divisible = jax.tree.map(lambda x: x.ndim > 0 and meta_layout == "sharded", meta_params)
    meta_layouts = jax.tree.map(lambda d: along if d else copied, divisible)
    return jax.device_put(meta_params, meta_layouts), jax.device_put(tasks, along)


def collectives(compiled: Any) -> list[tuple[str, str]]:
    """What travels between devices: each operation with the shapes of its results."""
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", compiled.as_text())
    return sorted({(operation, re.sub(r"{[\d,]*}", "", shapes)) for shapes, operation in found})


def estimates() -> Iterator[dict[str, Any]]:
    """Value and meta-gradient over a mesh against one device's, for each estimator and layout."""
    problem, meta_params, tasks = tasks_from(0, NUM_TASKS)
    for name, layouts in LAYOUTS.items():
        estimator = ESTIMATORS[name]
        evaluate = jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True))
        (value, diagnostics), grad = jax.tree.map(np.asarray, evaluate(meta_params, tasks))
        for meta_layout, axes, batch_size in layouts:
            step = jax.jit(cm.value_and_meta_grad(problem, estimator, batch_size=batch_size, has_aux=True))
            args = on_mesh(axes, meta_layout, meta_params, tasks)
            compiled = step.lower(*args).compile()
            (sharded_value, sharded_diagnostics), sharded_grad = compiled(*args)
            yield {
                "case": [name, meta_layout, axes, batch_size],
                "error": relative_error((sharded_value, sharded_grad), (value, grad)),
                "statuses": np.asarray(sharded_diagnostics.status).tolist(),
                "same_statuses": bool(np.array_equal(sharded_diagnostics.status, diagnostics.status)),
                "devices_of_a_status": len(
                    {str(shard.index) for shard in sharded_diagnostics.status.addressable_shards}
                ),
                "collectives": collectives(compiled),
                "grad": np.asarray(grad.kernel).tolist(),
            }


def train(meta_params: Any, tasks: Any) -> tuple[Any, Any]:
    """Three steps of a `meta_optimizer` that goes on from where each task's learning ended."""
    problem, _, _ = tasks_from(0, 1)
    tx = cm.meta_optimizer(
        optax.adam(1e-2), problem, ESTIMATORS["learning twice"], warm_start=tasks, batch_size=BATCH_SIZE
    )
    state = tx.init(meta_params)

    @jax.jit
    def step(meta_params: Any, state: Any, tasks: Any) -> Any:
        updates, state = tx.update(None, state, meta_params, tasks=tasks)
        return optax.apply_updates(meta_params, updates), state

    for _ in range(3):
        meta_params, state = step(meta_params, state, tasks)
    return meta_params, state.meta_gradient.inner.params


def training() -> Iterator[dict[str, Any]]:
    """The optimiser over a mesh against one device's."""
    _, meta_params, tasks = tasks_from(0, NUM_TASKS)
    wanted = jax.tree.map(np.asarray, train(meta_params, tasks))
    for meta_layout, axes in (("replicated", "Auto"), ("sharded", EXPLICIT)):
        moved, inner = train(*on_mesh(axes, meta_layout, meta_params, tasks))
        shards = jax.tree.leaves(inner)[0].addressable_shards
        yield {
            "case": ["meta_optimizer", meta_layout, axes],
            "error": relative_error((moved, inner), wanted),
            "moved": relative_error(wanted[0], meta_params),
            "tasks_on_a_device": [shard.data.shape[0] for shard in shards],
            "devices_of_meta_params": len({str(shard.index) for shard in moved.kernel.addressable_shards}),
        }


def in_shard_map() -> Iterator[dict[str, Any]]:
    """Each device with its own tasks, by `jax.shard_map` with its default checks, against all tasks on one device."""
    problem, meta_params, tasks = tasks_from(0, NUM_TASKS)
    short = cm.OptaxDescent(optax.sgd(0.5, momentum=0.9), num_steps=60)
    solve = cm.argmin(problem.inner_loss, short, init=problem.init_params)

    def layered(meta_params: Any, tasks: Any) -> Any:
        def mean(at: Any) -> Any:
            losses = jax.vmap(lambda task: problem.outer_loss(solve(at, task), at, task))(tasks)
            return losses.mean()

        return jax.value_and_grad(mean)(meta_params)

    ways = {
        name: cm.value_and_meta_grad(problem, estimator)
        for name, estimator in {
            "default": cm.Contrastive(short),
            "to a tolerance": cm.Contrastive(cm.LBFGS(tol=1e-9), cm.LBFGS(), cm.central_difference(1e-2)),
            "implicit": cm.ImplicitDifferentiation(short),
            "backprop": cm.BackpropThroughLearning(short),
        }.items()
    } | {"argmin": layered}
    mesh = jax.make_mesh((NUM_DEVICES,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    for name, way in ways.items():

        def local(meta_params: Any, tasks: Any, name: str = name, way: Any = way) -> Any:
            value, grad = way(meta_params, tasks)
            # What is differentiated by `jax.grad` was the same on all devices: JAX has added up already.
            summed = jax.tree.map(lambda x: x / NUM_DEVICES, grad) if name == "argmin" else jax.lax.pmean(grad, "tasks")
            return jax.lax.pmean(value, "tasks"), summed

        specs = PartitionSpec(), PartitionSpec("tasks")
        mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
        wanted = jax.tree.map(np.asarray, jax.jit(way)(meta_params, tasks))
        yield {"case": name, "error": relative_error(mapped(meta_params, tasks), wanted)}


def traced_in_shard_map() -> list[str]:
    """The learners and estimators whose programs have the right types there; the first that has not raises."""
    problem, meta_params, tasks = tasks_from(0, NUM_DEVICES)
    descent = cm.OptaxDescent(optax.sgd(0.5), num_steps=3)
    to_tolerance = cm.OptaxDescent(optax.adam(0.1), tol=1e-3, max_steps=3)
    estimators = {
        "target": cm.Contrastive(cm.LBFGS(), target_error=1e-2),
        "published": cm.Contrastive(descent, descent, cm.forward_difference(0.1)),
        "together": cm.Contrastive(to_tolerance, to_tolerance),
        "in turn": cm.Contrastive(descent, scheme=cm.relative(cm.four_point), sequential=True),
        "complex": cm.Contrastive(descent, descent, cm.relative(cm.complex_step)),
        "dense": cm.ImplicitDifferentiation(descent, cm.DenseInverse()),
        "Neumann": cm.ImplicitDifferentiation(descent, cm.NeumannSeries(0.1)),
        "Nystrom": cm.ImplicitDifferentiation(descent, cm.Nystrom(3, damping=0.1)),
        "T1-T2": cm.ImplicitDifferentiation(descent, cm.IdentityHessian()),
        "checkpoints": cm.BackpropThroughLearning(descent, checkpoint=True),
        "forward": cm.BackpropThroughLearning(descent, forward_mode=True),
        "finite differences": cm.FiniteDifference(descent),
        "evolution": cm.EvolutionStrategies(descent, num_pairs=2),
    }
    mesh = jax.make_mesh((NUM_DEVICES,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    along = PartitionSpec("tasks")
    for estimator in estimators.values():

        def local(tasks: Any, estimator: Any = estimator) -> Any:
            # Meta-parameters that are captured, and differ from no device to another.
            grad = estimator.estimate(problem, meta_params, jax.tree.map(lambda x: x[0], tasks)).grad
            return jax.tree.map(lambda x: x[None], grad)

        jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=along, out_specs=along), tasks)
    return list(estimators)


def resuming() -> dict[str, Any]:
    """Meta-learning on a mesh, saved and resumed as docs/scaling.md says, against going on."""
    problem, meta_params, tasks = tasks_from(0, NUM_DEVICES)
    learner = cm.OptaxDescent(optax.sgd(0.5), num_steps=5)
    everywhere, along = on_mesh("Auto", "replicated", meta_params, tasks)
    estimator = cm.Contrastive(learner, learner, cm.central_difference(1e-2))
    tx = cm.meta_optimizer(optax.adam(1e-2), problem, estimator)
    copied = jax.tree.leaves(everywhere)[0].sharding

    @jax.jit
    def step(meta_params: Any, state: Any) -> Any:
        updates, state = tx.update(None, state, meta_params, tasks=along)
        return optax.apply_updates(meta_params, updates), state

    def fresh() -> Any:
        return everywhere, jax.device_put(tx.init(everywhere), copied)

    saved = step(*fresh())
    wanted = jax.tree.map(np.asarray, step(*saved))

    def agrees(restored: Any) -> bool:
        leaves = zip(jax.tree.leaves(step(*restored)), jax.tree.leaves(wanted), strict=True)
        return all(np.array_equal(a, b) for a, b in leaves)

    arrays = jax.tree.map(np.asarray, saved)
    found = {
        "numpy": agrees(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), arrays, fresh())),
        "devices": sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(fresh())}),
    }
    with contextlib.suppress(ImportError):
        import orbax.checkpoint as ocp

        path = Path(tempfile.mkdtemp()) / "checkpoint"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, saved)
            checkpointer.wait_until_finished()
            found["orbax"] = agrees(checkpointer.restore(path, fresh()))
    return found


def process(rank: int, address: str, num_processes: int) -> dict[str, Any]:
    """One of several processes, each of which has its part of the tasks and nothing else."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes, rank)
    share = NUM_TASKS // num_processes
    problem, meta_params, mine = tasks_from(rank * share, share)
    mesh = jax.make_mesh((jax.device_count(),), ("tasks",))
    tasks = jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("tasks")), x), mine
    )
    step = jax.jit(cm.value_and_meta_grad(problem, ESTIMATORS["learning twice"]))
    value, grad = step(meta_params, tasks)
    found = {
        "processes": jax.process_count(),
        "tasks": jax.tree.leaves(tasks)[0].shape[0],
        "value": float(value),
        "grad": np.asarray(grad.kernel).tolist(),
    }
    jax.distributed.shutdown()
    return found


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    if sys.argv[1] == "devices":
        assert jax.device_count() == NUM_DEVICES
        print(json.dumps({"estimates": list(estimates()), "training": list(training())}))
    elif sys.argv[1] == "shard_map":
        assert jax.device_count() == NUM_DEVICES
        print(json.dumps({"mapped": list(in_shard_map()), "traced": traced_in_shard_map()}))
    elif sys.argv[1] == "resume":
        assert jax.device_count() == NUM_DEVICES
        print(json.dumps(resuming()))
    else:
        print(json.dumps(process(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
