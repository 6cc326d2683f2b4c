"""JAX's strict switches: whatever a user forbids, every way in still runs, and to the same numbers."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

DTYPES = (jnp.float32, jnp.float64)
DESCENT = cm.OptaxDescent(optax.sgd(0.3), num_steps=30)
SHORT = cm.OptaxDescent(optax.sgd(0.3), num_steps=4)
TO_TOLERANCE = cm.OptaxDescent(optax.adam(0.1), tol=1e-3, max_steps=20)


def predicted(params: Any, x: Any) -> Any:
    """A linear model, every broadcast of which is written out."""
    shape = (x.shape[0], 2)
    return x @ params["w"] + jnp.broadcast_to(params["b"][None], shape) + jnp.broadcast_to(params["c"], shape)


def inner_loss(params: Any, meta_params: Any, task: Any) -> Any:
    weighted = jnp.sum(jnp.exp(meta_params["log"]) * jnp.square(params["w"]))
    others = jnp.sum(jnp.square(params["b"])) + jnp.square(params["c"])
    misses = jnp.mean(jnp.square(predicted(params, task["x"]) - task["y"]))
    return misses + (weighted + jnp.exp(meta_params["s"]) * others) / 2


def outer_loss(params: Any, meta_params: Any, task: Any) -> Any:
    return jnp.mean(jnp.square(predicted(params, task["x"]) - task["y"] - 1))


def init_params(meta_params: Any, task: Any) -> Any:
    # Estimators that see nothing but the start see every meta-parameter there.
    return {
        "w": meta_params["log"] / 10,
        "b": jnp.zeros(2, task["x"].dtype),
        "c": meta_params["s"] / 10,
    }


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, init_params)


def arguments(dtype: Any) -> tuple[Any, Any]:
    """Meta-parameters and a task, on the device."""
    x = jax.random.normal(jax.random.key(0), (6, 3), dtype)
    y = jax.random.normal(jax.random.key(1), (6, 2), dtype)
    return {"log": jnp.zeros((3, 2), dtype), "s": jnp.zeros((), dtype)}, {"x": x, "y": y}


def with_state(params: Any, meta_params: Any, task: Any, state: Any) -> Any:
    mean = {"number": state["number"] + 1, "b": (state["b"] + params["b"]) / 2}
    return inner_loss(params, meta_params, task), mean


STATEFUL = cm.BilevelProblem(
    with_state,
    lambda params, meta_params, task, state: outer_loss(params, meta_params, task) + jnp.sum(state["b"] * params["b"]),
    init_params,
    init_model_state=lambda meta_params, task: {"number": jnp.int32(0), "b": jnp.zeros(2, task["x"].dtype)},
)


def minibatch(key: Any, task: Any, step: Any) -> Any:
    rows = jax.random.randint(key, (3,), 0, 6)
    return jax.tree.map(lambda x: x[rows], task)


STOCHASTIC = cm.BilevelProblem(inner_loss, outer_loss, init_params, sample=minibatch)
# Leaves of two precisions, which the losses join themselves.
MIXED = cm.BilevelProblem(
    lambda p, m, t: inner_loss(p | {"b": p["b"].astype(t["x"].dtype)}, m, t),
    lambda p, m, t: outer_loss(p | {"b": p["b"].astype(t["x"].dtype)}, m, t),
    lambda m, t: init_params(m, t) | {"b": jnp.zeros(2, jnp.bfloat16)},
)

ESTIMATORS = {
    "default": cm.Contrastive(DESCENT),
    "L-BFGS": cm.Contrastive(cm.LBFGS(tol=1e-4)),
    "target": cm.Contrastive(cm.LBFGS(), target_error=1e-2),
    "published": cm.Contrastive(DESCENT, DESCENT, cm.forward_difference(0.1)),
    "to a tolerance": cm.Contrastive(TO_TOLERANCE, TO_TOLERANCE),
    "four-point, in turn": cm.Contrastive(DESCENT, scheme=cm.relative(cm.four_point), sequential=True),
    "implicit": cm.ImplicitDifferentiation(DESCENT),
    "implicit, dense": cm.ImplicitDifferentiation(DESCENT, cm.DenseInverse()),
    "implicit, Neumann": cm.ImplicitDifferentiation(DESCENT, cm.NeumannSeries(0.3)),
    "implicit, Nystrom": cm.ImplicitDifferentiation(DESCENT, cm.Nystrom(3, damping=0.1)),
    "implicit, T1-T2": cm.ImplicitDifferentiation(DESCENT, cm.IdentityHessian()),
    "backprop": cm.BackpropThroughLearning(SHORT),
    "backprop, checkpoints": cm.BackpropThroughLearning(SHORT, checkpoint=True),
    "backprop, forward": cm.BackpropThroughLearning(SHORT, forward_mode=True),
    "first order": cm.FirstOrder(SHORT),
    "Reptile": cm.Reptile(SHORT),
    "finite differences": cm.FiniteDifference(SHORT),
    "evolution strategies": cm.EvolutionStrategies(SHORT, num_pairs=4),
}
BY_LOSSES = ("default", "published", "implicit", "backprop", "finite differences")


def estimate(name: str, problem: cm.BilevelProblem = PROBLEM) -> Callable[..., Any]:
    def of(meta_params: Any, task: Any) -> Any:
        result = ESTIMATORS[name].estimate(problem, meta_params, task)
        return result.grad, result.outer_loss, result.diagnostics

    return of


def over_tasks(name: str, **options: Any) -> Callable[..., Any]:
    def of(meta_params: Any, task: Any) -> Any:
        tasks = jax.tree.map(lambda x: jnp.stack([x, x, x]), task)
        return cm.value_and_meta_grad(PROBLEM, ESTIMATORS[name], **options)(meta_params, tasks)

    return of


def meta_optimizer(name: str, *, warm: bool = False, **options: Any) -> Callable[..., Any]:
    def of(meta_params: Any, task: Any) -> Any:
        tasks = jax.tree.map(lambda x: jnp.stack([x, x]), task)
        warm_start = {"warm_start": tasks} if warm else {}
        tx = cm.meta_optimizer(optax.adam(0.1), PROBLEM, ESTIMATORS[name], **warm_start, **options)
        state = tx.init(meta_params)
        updates, after = tx.update(None, state, meta_params, tasks=tasks)
        return updates, state, after

    return of


def tuning(mode: Any, **options: Any) -> Callable[..., Any]:
    def of(meta_params: Any, task: Any) -> Any:
        tx = cm.tune_while_training(
            optax.adam(0.01), meta_optimizer=optax.adam(0.1), problem=PROBLEM, init_meta_params=meta_params, every=1,
            mode=mode, **options,
        )  # fmt: skip
        params = init_params(meta_params, task)
        state = tx.init(params)
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), task)
        updates, after = tx.update(grads, state, params, task=task)
        return updates, state, after

    return of


def layer(adjoint: cm.Adjoint, solver: cm.InnerSolver = DESCENT, **options: Any) -> Callable[..., Any]:
    solve = cm.argmin(inner_loss, solver, init=init_params, adjoint=adjoint, **options)

    def of(meta_params: Any, task: Any) -> Any:
        return jax.grad(lambda *args: outer_loss(solve(*args), *args), (0, 1))(meta_params, task)

    return of


WAYS = {
    **{name: estimate(name) for name in ESTIMATORS},
    **{f"{name}, minibatches": estimate(name, STOCHASTIC) for name in BY_LOSSES},
    **{f"{name}, model state": estimate(name, STATEFUL) for name in BY_LOSSES},
    **{f"{name}, mixed precision": estimate(name, MIXED) for name in ("L-BFGS", *BY_LOSSES)},
    **{f"{name}, over tasks": over_tasks(name, has_aux=True) for name in ("default", "implicit", "backprop")},
    **{f"{name}, in batches": over_tasks(name, batch_size=2) for name in ("default", "implicit")},
    "meta-optimiser": meta_optimizer("implicit"),
    "meta-optimiser, warm": meta_optimizer("implicit", warm=True, on_failure="skip"),
    "meta-optimiser, zero": meta_optimizer("implicit", on_failure="zero"),
    "alternating": tuning(cm.Alternating()),
    "alternating, Newton-Krylov": tuning(cm.Alternating(cm.NewtonKrylov()), on_failure="skip"),
    "single loop": tuning(cm.SingleLoop()),
    "argmin": layer(cm.ContrastiveAdjoint()),
    "argmin, kept": layer(cm.ImplicitAdjoint(), on_failure="keep"),
    "argmin, backprop": layer(cm.BackpropAdjoint(), SHORT, on_failure="keep"),
    "argmin, one step": layer(cm.OneStepAdjoint(0.5), on_failure="keep"),
}
# What runs, of each kind of program the smallest.
RUN = ("L-BFGS", "implicit", "backprop", "finite differences", "meta-optimiser, warm", "single loop", "argmin")

PROMOTIONS = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
}


def on_host(loss: Any, params: Any) -> Any:
    """A learner of NumPy."""
    for _ in range(30):
        _, grads = loss.value_and_grad(params)
        params = jax.tree.map(lambda x, g: x - 0.3 * g, params, grads)
    return params


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("switch", PROMOTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_promoted(way: str, switch: str, dtype: Any) -> None:
    """Tracing is enough: promotion is refused while a program is traced."""
    args = arguments(dtype)
    with PROMOTIONS[switch]():
        jax.eval_shape(WAYS[way], *args)


@pytest.mark.parametrize("switch", [*PROMOTIONS, "NaN"])
def test_reports_and_host_learners_run(switch: str) -> None:
    args = arguments(jnp.float32)
    context = PROMOTIONS.get(switch, lambda: jax.debug_nans(True))
    learner = cm.CallableSolver(on_host, host=True)
    with context():
        cm.raise_if_failed(cm.ImplicitDifferentiation(learner).estimate(PROBLEM, *args))
        cm.raise_if_failed(cm.ImplicitDifferentiation(cm.ScipyMinimize("L-BFGS-B", tol=1e-6)).estimate(PROBLEM, *args))
        pair = {"implicit": ESTIMATORS["implicit"], "backprop": cm.BackpropThroughLearning(DESCENT)}
        table = cm.compare(PROBLEM, pair, *args, repeats=1)
        assert all(row.relative_error < 1e-3 for row in table.rows)


def strictly(switch: str, function: Callable[..., Any], args: Any) -> Any:
    """What a function returns, run under a switch, on arguments that are on the device."""
    if switch == "no jit":
        with jax.disable_jit():
            return function(*args)
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "NaN": lambda: jax.debug_nans(True),
        "transfers": lambda: jax.transfer_guard("disallow"),
    }
    with contexts[switch]():
        return jax.block_until_ready(function(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", RUN)
def test_it_runs_under_every_switch_to_the_same_numbers(way: str, dtype: Any) -> None:
    args = arguments(dtype)
    compiled = jax.jit(WAYS[way])
    usual = compiled(*args)
    largest = jax.tree.map(lambda x: np.max(np.abs(x), initial=0.0, where=np.isfinite(x)), usual)
    assert max(jax.tree.leaves(largest)) > 1e-3, "numbers of zero would agree with anything"
    for switch in ("NaN", "transfers"):
        jax.tree.map(np.testing.assert_array_equal, strictly(switch, compiled, args), usual)
    # Not compiled, operations round one by one; what is measured of noise follows rounding.
    first, *_ = jax.tree.leaves(strictly("no jit", WAYS[way], args))
    wanted, *_ = jax.tree.leaves(usual)
    error = np.max(np.abs(first - wanted)) / np.max(np.abs(wanted))
    assert error < 100 * float(jnp.finfo(dtype).eps) ** 0.5


@pytest.mark.parametrize("way", ["meta-optimiser, warm", "single loop", "argmin"])
def test_without_a_jit_around_it_no_operation_makes_a_nan(way: str) -> None:
    with jax.debug_nans(True):
        jax.block_until_ready(WAYS[way](*arguments(jnp.float32)))


def test_the_one_nan_is_the_failure_of_argmin() -> None:
    """Without steps nothing is learned: the gradient is NaN, and kept where the user says so."""
    still = cm.OptaxDescent(optax.sgd(0.0), num_steps=1)
    args = arguments(jnp.float64)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.jit(layer(cm.ImplicitAdjoint(), still))(*args)
    with jax.debug_nans(True):
        kept = jax.jit(layer(cm.ImplicitAdjoint(), still, on_failure="keep"))(*args)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(kept))
