"""Tuning while training: both modes reach stationary points, and the state behaves inside optax, jit and scan."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import contrastive_meta as cm
from contrastive_meta import Status, problems

# A quadratic with everything in closed form: from curvature 1 + a with a = exp(log_decay), w rests at c / (1 + a).


def inner_loss(w: Any, meta: Any, task: Any) -> jax.Array:
    return (
        jnp.sum((w["a"] - task["train"]) ** 2 + jnp.exp(meta["log_decay"]) * (w["a"] - w["b"]) ** 2 + w["b"] ** 2) / 2
    )


def outer_loss(w: Any, meta: Any, task: Any) -> jax.Array:
    return jnp.sum((w["a"] - task["val"]) ** 2 + 0.1 * meta["log_decay"] ** 2) / 2


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, lambda meta, task: {"a": jnp.zeros(2), "b": jnp.zeros(2)})
META = {"log_decay": jnp.array([0.3, -0.2])}
PARAMS = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-0.5, 0.25])}
TASK = {"train": jnp.array([3.0, -1.0]), "val": jnp.array([1.0, 0.5])}
ALTERNATING = cm.Alternating(cm.OptaxDescent(optax.sgd(0.2, momentum=0.5), num_steps=3), beta=1e-3)
MODES = {"alternating": ALTERNATING, "single_loop": cm.SingleLoop(beta=1e-3)}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def tune(mode: Any = ALTERNATING, optimizer: Any = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    settings = {"meta_optimizer": optax.adam(1e-2), "problem": PROBLEM, "init_meta_params": META, "every": 2} | settings
    return cm.tune_while_training(optax.adam(1e-2) if optimizer is None else optimizer, mode=mode, **settings)


def training_step(tx: Any, task: Any = TASK, problem: Any = PROBLEM, **extra: Any) -> Callable[..., Any]:
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(problem.inner_loss)(params, cm.current_meta_params(state), task)
        updates, state = tx.update(grads, state, params, task=task, **extra)
        return optax.apply_updates(params, updates), state

    return step


def train(tx: Any, num_steps: int, carry: Any, **settings: Any) -> Any:
    step = training_step(tx, **settings)
    return jax.jit(lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, None, length=num_steps)[0])(carry)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def kinds(state: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)), state)


# --- Both modes find the minimum of what is judged.


def with_prior(instance: Any) -> cm.BilevelProblem:
    """The problem with a prior on the log-strengths, lest those of weights that never help go to infinity."""
    problem, start = instance.problem, instance.meta_params

    def judged(w: Any, meta: Any, task: Any) -> jax.Array:
        distances = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), meta, start)
        return problem.outer_loss(w, meta, task) + 0.05 * sum(jax.tree.leaves(distances))

    return cm.BilevelProblem(problem.inner_loss, judged, problem.init_params)


def ridge() -> Any:
    data = problems.ridge_data(jax.random.key(0), num_train=30, num_val=30, num_features=4, num_relevant=2)
    return problems.ridge(*data, strength=0.3)


def logistic() -> Any:
    data = problems.classification_data(jax.random.key(1), num_train=30, num_val=30, num_features=4, num_classes=2)
    return problems.logistic_regression(*data, strength=0.3)


# Curvatures of the inner losses lie between about 0.3 and 2. Twenty steps of 0.5 leave 0.85^20 = 4 % of a response
# unanswered, too much for 1e-3: 80 leave 1e-6. The single loop truncates nothing. At rest the bias of beta is left,
# about 1e-5 of the first gradient.
REACH = {
    "alternating": (cm.Alternating(cm.OptaxDescent(optax.sgd(0.5), num_steps=80), beta=1e-5), 10, 2.0, 600),
    "single loop": (cm.SingleLoop(beta=1e-5), None, 0.2, 900),
    "single loop, central": (cm.SingleLoop(beta=1e-2, scheme=cm.central_difference), None, 0.2, 900),
    # Measured strengths vanish where training comes to rest: at once in short runs, as 1 / steps in the single loop.
    "alternating, measured": (cm.Alternating(cm.OptaxDescent(optax.sgd(0.5), num_steps=80)), 10, 2.0, 600),
    "single loop, measured": (cm.SingleLoop(), None, 0.2, 9000),
}  # fmt: skip


@pytest.mark.parametrize("instance", [ridge, logistic], ids=["ridge", "logistic"])
@pytest.mark.parametrize("name", REACH)
def test_reaches_a_stationary_point_of_the_outer_objective(instance: Callable[[], Any], name: str) -> None:
    made = instance()
    problem, task = with_prior(made), made.task
    mode, every, meta_rate, num_steps = REACH[name]
    tx = cm.tune_while_training(
        optax.sgd(0.5),
        meta_optimizer=optax.sgd(meta_rate),
        problem=problem,
        init_meta_params=made.meta_params,
        every=every,
        mode=mode,
    )
    params = problem.init_params(made.meta_params, task)
    _, state = train(tx, num_steps, (params, tx.init(params)), task=task, problem=problem)

    def exact(meta: Any) -> float:
        answer = problems.exact_meta_gradient(problem, meta, task)
        assert bool(answer.converged)
        return float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(answer.grad))))

    assert exact(cm.current_meta_params(state)) < 1e-3 * exact(made.meta_params)


@pytest.mark.parametrize("mode", [cm.Alternating(), cm.SingleLoop()], ids=["alternating", "single_loop"])
def test_a_measured_strength_does_not_depend_on_the_unit_of_the_outer_loss(mode: Any) -> None:
    def tuned(unit: float) -> Any:
        problem = cm.BilevelProblem(inner_loss, lambda *at: unit * outer_loss(*at), PROBLEM.init_params)
        tx = tune(mode, optax.sgd(0.1), problem=problem, meta_optimizer=optax.sgd(0.1 / unit))
        return train(tx, 20, (PARAMS, tx.init(PARAMS)), problem=problem)[1]

    one, large = tuned(1.0), tuned(1e6)
    assert np.all(np.abs(one.meta_params["log_decay"] - META["log_decay"]) > 5e-4)
    np.testing.assert_allclose(large.meta_params["log_decay"], one.meta_params["log_decay"], rtol=1e-9)
    np.testing.assert_allclose(1e6 * large.diagnostics.beta, one.diagnostics.beta, rtol=1e-9)


def test_a_measured_strength_is_that_of_the_gradients() -> None:
    tx = tune(cm.SingleLoop(), optax.sgd(0.1), every=1)
    state, step, params, norms = tx.init(PARAMS), jax.jit(training_step(tx)), PARAMS, []
    for _ in range(3):
        nudged = jax.tree.map(lambda x: x[0], state.memory.params)
        meta = state.meta_params
        gradients = jax.grad(inner_loss)(params, meta, TASK), jax.grad(outer_loss)(nudged, meta, TASK)
        norms.append([float(optax.tree.norm(gradient)) for gradient in gradients])
        params, state = step(params, state)
        np.testing.assert_allclose(state.diagnostics.beta, np.divide(*np.sum(norms, axis=0)), rtol=1e-12)
    tx = tune(cm.Alternating(), optax.sgd(0.1), every=1)
    _, state = jax.jit(training_step(tx))(PARAMS, tx.init(PARAMS))
    np.testing.assert_allclose(state.diagnostics.beta, norms[0][0] / norms[0][1], rtol=1e-12)


@pytest.mark.parametrize("num_steps", [20, 100])
def test_the_measured_strength_leaves_little_bias_in_a_network(num_steps: int) -> None:
    """Beside backprop through the same five steps. At ten times this strength the error after 20 steps is 370 %."""
    images, labels = (jnp.asarray(part) for part in load_digits(return_X_y=True))
    seen, judged_by = ((images[at] / 16, labels[at]) for at in (slice(60), slice(60, 200)))

    def loss(params: Any, data: Any) -> jax.Array:
        logits = jnp.tanh(data[0] @ params["in"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    def decayed(params: Any, log_decay: Any, task: Any) -> jax.Array:
        return loss(params, seen) + sum(jnp.exp(log_decay[name]) * jnp.sum(params[name] ** 2) / 2 for name in params)

    keys = jax.random.split(jax.random.key(0))
    start = {"in": jax.random.normal(keys[0], (64, 32)) / 8, "out": jax.random.normal(keys[1], (32, 10)) / 6}
    decays, optimizer = dict.fromkeys(start, jnp.log(1e-3)), optax.sgd(0.5)

    def tuned_from(params: Any) -> cm.BilevelProblem:
        return cm.BilevelProblem(decayed, lambda params, *_: loss(params, judged_by), lambda *_: params)

    settings = {"problem": tuned_from(start), "init_meta_params": decays, "every": num_steps}
    tx = cm.tune_while_training(optimizer, meta_optimizer=optax.sgd(1.0), **settings)
    _, state = train(tx, num_steps, (start, tx.init(start)), task=(), problem=settings["problem"])
    then, _ = train(tx, num_steps - 1, (start, tx.init(start)), task=(), problem=settings["problem"])
    exact = cm.BackpropThroughLearning(cm.OptaxDescent(optimizer, num_steps=5)).estimate(tuned_from(then), decays, ())
    found = jax.tree.map(lambda before, after: before - after, decays, state.meta_params)
    wrong_by = optax.tree.norm(optax.tree.sub(found, exact.grad)) / optax.tree.norm(exact.grad)
    assert wrong_by < 0.3


def test_meta_gradients_are_averaged_by_multi_steps() -> None:
    """Over three meta-steps at meta-parameters that stay. MultiSteps weighs by float32 numbers."""
    averaged = tune(meta_optimizer=optax.MultiSteps(optax.sgd(1.0), 3), every=1)
    summed = tune(meta_optimizer=optax.chain(optax.trace(1.0), optax.scale(0.0)), every=1)
    moved, seen = (train(tx, 3, (PARAMS, tx.init(PARAMS)))[1] for tx in (averaged, summed))
    wanted = jax.tree.map(lambda start, total: start - total / 3, META, seen.meta_optimizer[0].trace)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), moved.meta_params, wanted)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved.meta_params, META)), strict=True))


def test_drift_of_unfinished_training_is_not_taken_for_a_nudge_without_bound() -> None:
    """On quadratic losses nothing can run away, though learning may leave where the outer loss asked for little."""
    task = TASK | {"val": PARAMS["a"] + 0.01}
    tx = tune(cm.Alternating(cm.OptaxDescent(optax.sgd(0.2), num_steps=5), beta=0.1), every=1)
    _, state = jax.jit(training_step(tx, task))(PARAMS, tx.init(PARAMS))
    assert Status(int(state.diagnostics.status)) in (Status.FREE_NOT_CONVERGED, Status.NUDGED_NOT_CONVERGED)


def test_the_fast_learner_is_exact_from_wherever_training_stands() -> None:
    """It goes to the minimum of the loss, and the strength with it: gradients far off do not say what suits there."""
    problem = cm.BilevelProblem(
        lambda w, meta, task: jnp.sum(w**4 / 4 + jnp.exp(meta) * w**2 / 2 - task * w),
        lambda w, meta, task: jnp.sum((w - 0.5) ** 2) / 2,
        lambda meta, task: jnp.zeros(2),
    )
    meta, task, params = jnp.array([0.3, -0.2]), jnp.array([3.0, -1.0]), jnp.array([3.0, 2.0])
    tx = tune(cm.Alternating(cm.NewtonKrylov()), problem=problem, meta_optimizer=optax.sgd(1.0), init_meta_params=meta,
              every=1)  # fmt: skip
    _, state = jax.jit(training_step(tx, task, problem))(params, tx.init(params))
    w = jnp.zeros(2)
    for _ in range(50):
        w = w - (w**3 + jnp.exp(meta) * w - task) / (3 * w**2 + jnp.exp(meta))
    exact = -(w - 0.5) * jnp.exp(meta) * w / (3 * w**2 + jnp.exp(meta))
    np.testing.assert_allclose(meta - state.meta_params, exact, rtol=1e-3)
    assert Status(int(state.diagnostics.status)) == Status.CONVERGED


# --- What one step does.


def test_alternating_is_the_estimator_called_by_hand() -> None:
    tx = tune(meta_optimizer=optax.sgd(1.0), every=1)
    state = tx.init(PARAMS)
    step = training_step(tx)
    _, new = jax.jit(step)(PARAMS, state)
    here = cm.OptaxDescent(optax.adam(1e-2), num_steps=0, carry_state=True)
    estimator = cm.Contrastive(
        here, ALTERNATING.nudged_solver, scheme=cm.forward_difference(1e-3), estimate_error=False
    )
    start = cm.EstimatorState.fresh(PARAMS, state.optimizer, jnp.float64)
    by_hand = jax.jit(lambda state: estimator.estimate(PROBLEM, META, TASK, state=state))(start)
    got = jax.tree.map(jnp.subtract, META, new.meta_params)
    # meta - (meta - grad) gives the gradient back but for the rounding of numbers near 1.
    np.testing.assert_allclose(got["log_decay"], by_hand.grad["log_decay"], rtol=0, atol=4e-16)
    same(new.diagnostics, by_hand.diagnostics)
    same(new.outer_loss, by_hand.outer_loss)


def test_the_optimiser_in_training_runs_the_phases_with_its_state() -> None:
    """Momentum that training built up goes on in both runs: K steps from rest would answer less of the nudge."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    tx = tune(cm.Alternating(num_nudged_steps=2, beta=1e-3), optimizer, meta_optimizer=optax.sgd(1.0), every=1)
    params, state = train(tx, 3, (PARAMS, tx.init(PARAMS)))
    _, new = jax.jit(training_step(tx))(params, state)

    def run(beta: float) -> Any:
        def loss(w: Any) -> jax.Array:
            return inner_loss(w, state.meta_params, TASK) + beta * outer_loss(w, state.meta_params, TASK)

        w, opt_state = params, state.optimizer
        for _ in range(2):
            updates, opt_state = optimizer.update(jax.grad(loss)(w), opt_state, w)
            w = optax.apply_updates(w, updates)
        return jax.grad(lambda m: inner_loss(w, m, TASK) + beta * outer_loss(w, m, TASK))(state.meta_params)

    wanted = (run(1e-3)["log_decay"] - run(0.0)["log_decay"]) / 1e-3
    got = state.meta_params["log_decay"] - new.meta_params["log_decay"]
    np.testing.assert_allclose(got, wanted, rtol=1e-10)  # rounding over beta


@pytest.mark.parametrize("scheme", [cm.forward_difference, cm.central_difference])
def test_a_single_loop_step(scheme: Any) -> None:
    beta, rate = 0.1, 0.25
    tx = tune(cm.SingleLoop(beta, scheme=scheme), optax.sgd(rate), meta_optimizer=optax.sgd(1.0), every=1)
    step = jax.jit(training_step(tx))
    params, first = step(PARAMS, tx.init(PARAMS))
    _, second = step(params, first)

    def loss(w: Any, meta: Any, strength: float) -> jax.Array:
        return inner_loss(w, meta, TASK) + strength * outer_loss(w, meta, TASK)

    def moved(w: Any, strength: float) -> Any:
        return jax.tree.map(lambda x, g: x - rate * g, w, jax.grad(loss)(w, META, strength))

    made = scheme(beta)
    ends = {b: moved(PARAMS, b) for b in made.nudges}
    for number, b in enumerate(b for b in made.nudges if b):
        kept = jax.tree.map(lambda x, n=number: x[n], first.memory.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), kept, ends[b])
    # Both start at the parameters, where the phases differ by the direct term alone.
    direct = jax.grad(outer_loss, argnums=1)(PARAMS, META, TASK)["log_decay"]
    np.testing.assert_allclose(META["log_decay"] - first.meta_params["log_decay"], direct, rtol=1e-12)
    meta = first.meta_params
    wanted = sum(
        w * jax.grad(loss, argnums=1)(ends[b], meta, b)["log_decay"]
        for b, w in zip(made.nudges, made.weights, strict=True)
    )
    np.testing.assert_allclose(meta["log_decay"] - second.meta_params["log_decay"], wanted, rtol=1e-12)
    assert int(second.diagnostics.num_gradients) == len(made.nudges)


@pytest.mark.parametrize(
    "mode",
    [
        cm.Alternating(beta=1e-3, scheme=cm.central_difference),
        cm.SingleLoop(beta=1e-3, scheme=cm.central_difference),
    ],
    ids=["alternating", "single_loop"],
)
def test_one_after_another_is_the_same(mode: Any) -> None:
    def trained(mode: Any) -> Any:
        tx = tune(mode)
        return train(tx, 6, (PARAMS, tx.init(PARAMS)))

    alone = dataclasses.replace(mode, sequential=True)
    if isinstance(mode, cm.Alternating):
        alone = dataclasses.replace(alone, unroll=True)
    params, state = trained(mode)
    same_params, same_state = trained(alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), params, same_params)
    meta, same_meta = cm.current_meta_params(state), cm.current_meta_params(same_state)
    assert np.all(meta["log_decay"] != META["log_decay"])
    np.testing.assert_allclose(meta["log_decay"], same_meta["log_decay"], rtol=1e-9)


@modes
def test_the_parameters_train_as_they_would_alone(mode: Any) -> None:
    # Frozen meta-parameters: the two loops then do the same.
    optimizer = optax.adam(1e-2)
    tx = tune(mode, optimizer, meta_optimizer=optax.set_to_zero())
    params, state = train(tx, 5, (PARAMS, tx.init(PARAMS)))
    alone, opt_state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(lambda w, s: optimizer.update(jax.grad(inner_loss)(w, META, TASK), s, w))
    for _ in range(5):
        updates, opt_state = update(alone, opt_state)
        alone = optax.apply_updates(alone, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), params, alone)
    same(state.meta_params, META)
    assert int(state.step) == 5


@modes
def test_every_and_beta_follow_schedules(mode: Any) -> None:
    scheduled = dataclasses.replace(mode, beta=lambda step: 1e-3 * (1 + step))
    tx = tune(scheduled, every=lambda step: jnp.where(step < 3, 3, 2))
    step, params, state = jax.jit(training_step(tx)), PARAMS, tx.init(PARAMS)
    moved, betas, spent = [], [], []
    for _ in range(7):
        before = state
        params, state = step(params, state)
        moved.append(not np.array_equal(before.meta_params["log_decay"], state.meta_params["log_decay"]))
        betas.append(float(state.diagnostics.beta))
        spent.append(int(state.num_gradients - before.num_gradients))
    # After steps number 3, 5 and 7; the schedule counts from 0.
    assert moved == [False, False, True, False, True, False, True]
    np.testing.assert_allclose(betas[2:], [3e-3, 3e-3, 5e-3, 5e-3, 7e-3], rtol=1e-12)
    assert [bool(number) for number in spent] == moved


def test_minibatches_are_drawn_anew_at_every_step_and_shared_by_the_phases() -> None:
    def sample(key: jax.Array, task: Any, step: jax.Array) -> Any:
        return task | {"train": task["train"] + jax.random.normal(key, (2,))}

    problem = cm.BilevelProblem(inner_loss, outer_loss, PROBLEM.init_params, sample=sample)
    tx = tune(problem=problem, meta_optimizer=optax.sgd(1.0), every=1)
    params, state = train(tx, 2, (PARAMS, tx.init(PARAMS)))
    _, new = jax.jit(training_step(tx))(params, state)
    here = cm.OptaxDescent(optax.adam(1e-2), num_steps=0, carry_state=True)
    estimator = cm.Contrastive(here, ALTERNATING.nudged_solver, cm.forward_difference(1e-3), estimate_error=False)
    start = cm.EstimatorState.fresh(params, state.optimizer, jnp.float64)
    grads = [
        estimator.estimate(
            problem, state.meta_params, TASK, state=start, key=jax.random.fold_in(jax.random.key(0), number)
        ).grad["log_decay"]
        for number in (2, 1)
    ]
    got = state.meta_params["log_decay"] - new.meta_params["log_decay"]
    np.testing.assert_allclose(got, grads[0], rtol=1e-11)
    # The loss is quadratic: shared noise cancels in the response, but not in what it is multiplied with.
    assert np.all(np.abs(got - grads[1]) > 1e-6)


# --- What optax asks of a wrapper.

MASK = {"a": True, "b": False}


def inside(name: str, mode: Any) -> tuple[optax.GradientTransformationExtraArgs, bool]:
    """A transformation with a tuner in it, and whether it hides parameters."""
    tx = tune(mode)
    return {
        "bare": lambda: (tx, False),
        "chain": lambda: (optax.chain(optax.clip_by_global_norm(1.0), tx), False),
        "masked": lambda: (optax.masked(tx, MASK), True),
        "multi_transform": lambda: (
            optax.multi_transform({"tuned": tx, "other": optax.sgd(0.1)}, {"a": "tuned", "b": "other"}), True
        ),
        "multi_steps": lambda: (optax.MultiSteps(tx, 2).gradient_transformation(), False),
        "apply_if_finite": lambda: (optax.apply_if_finite(tx, 2), False),
        "inject_hyperparams": lambda: (
            optax.inject_hyperparams(lambda rate: tune(mode, optax.adam(rate)))(rate=1e-2), False
        ),
        "around multi_steps": lambda: (tune(mode, optax.MultiSteps(optax.adam(1e-2), 2)), False),
    }[name]()  # fmt: skip


@pytest.mark.parametrize("name", ["bare", "chain", "masked", "multi_transform", "multi_steps", "apply_if_finite",
                                  "inject_hyperparams", "around multi_steps"])  # fmt: skip
@modes
def test_inside_other_transformations(mode: Any, name: str) -> None:
    tx, hides = inside(name, mode)
    state = tx.init(PARAMS)
    same(cm.current_meta_params(state), META)
    # A scan asks for one structure, shape and dtype from init on; 12 steps are 6 meta-steps, 3 inside MultiSteps.
    params, after = train(tx, 12, (PARAMS, state), **({"unmasked": PARAMS} if hides else {}), foo="ignored")
    assert kinds(after) == kinds(state)
    meta = cm.current_meta_params(after)["log_decay"]
    assert np.all(np.isfinite(meta)) and np.all(meta != META["log_decay"])
    moved = {k: not np.array_equal(params[k], PARAMS[k]) for k in PARAMS}
    assert moved["a"]


def test_a_mask_freezes_in_the_phases_what_it_freezes_in_training() -> None:
    """What the mask hides is a constant of the inner problem, as if the losses had it built in."""
    b = PARAMS["b"]
    restricted = cm.BilevelProblem(
        lambda w, meta, task: inner_loss({"a": w, "b": b}, meta, task),
        lambda w, meta, task: outer_loss({"a": w, "b": b}, meta, task),
        lambda meta, task: jnp.zeros(2),
    )
    alone = tune(problem=restricted, every=1)
    masked = optax.masked(tune(every=1), MASK)
    grads = jax.grad(inner_loss)(PARAMS, META, TASK)
    _, a = jax.jit(alone.update)(grads["a"], alone.init(PARAMS["a"]), PARAMS["a"], task=TASK)
    _, m = jax.jit(masked.update)(grads, masked.init(PARAMS), PARAMS, task=TASK, unmasked=PARAMS)
    np.testing.assert_allclose(
        cm.current_meta_params(m)["log_decay"], cm.current_meta_params(a)["log_decay"], rtol=1e-12
    )


@modes
def test_compiles_once_and_keeps_dtypes(mode: Any) -> None:
    traces = []

    def counted(w: Any, meta: Any, task: Any) -> jax.Array:
        traces.append(1)
        return inner_loss(w, meta, task)

    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (PARAMS, META, TASK))
    params, meta, task = in_float32
    problem = cm.BilevelProblem(counted, outer_loss, PROBLEM.init_params)
    tx = tune(mode, problem=problem, init_meta_params=meta, every=1)
    state = tx.init(params)
    step = jax.jit(training_step(tx, task), donate_argnums=(0, 1))  # nothing is donated twice, nothing of the user's
    new = step(jax.tree.map(jnp.copy, params), state)
    number = len(traces)
    for _ in range(99):
        new = step(*new)
    assert len(traces) == number
    assert {x.dtype for x in jax.tree.leaves((new[0], new[1].meta_params, new[1].diagnostics.beta))} == {
        jnp.dtype("float32")
    }
    assert np.all(np.isfinite(meta["log_decay"]))
    assert np.all(np.isfinite(new[1].meta_params["log_decay"]))


def test_without_jit_nothing_is_compiled_again() -> None:
    traces = []

    def counted(w: Any, meta: Any, task: Any) -> jax.Array:
        traces.append(1)
        return outer_loss(w, meta, task)

    tx = tune(problem=cm.BilevelProblem(inner_loss, counted, PROBLEM.init_params), every=1)
    grads, state = jax.grad(inner_loss)(PARAMS, META, TASK), tx.init(PARAMS)
    _, state = tx.update(grads, state, PARAMS, task=TASK)
    number = len(traces)
    for _ in range(3):
        _, state = tx.update(grads, state, PARAMS, task=TASK)
    assert len(traces) == number


# --- Failure, and resuming.

NAN = TASK | {"val": jnp.array([jnp.nan, 0.0])}


@modes
@pytest.mark.parametrize("on_failure", ["keep", "skip"])
def test_a_task_of_nan(mode: Any, on_failure: Any) -> None:
    tx = tune(mode, on_failure=on_failure, every=1)
    carry = train(tx, 2, (PARAMS, tx.init(PARAMS)))
    _, bad = jax.jit(training_step(tx, NAN))(*carry)
    assert Status(int(bad.diagnostics.status)) == Status.NOT_FINITE
    assert int(bad.num_failed) == 1
    if on_failure == "keep":
        # The single loop measures where its iterates are, which the NaN reaches with the step after.
        assert np.any(np.isnan(bad.meta_params["log_decay"])) == (mode is ALTERNATING)
        return
    same((bad.meta_params, bad.meta_optimizer), (carry[1].meta_params, carry[1].meta_optimizer))
    # Nudged iterates start again from the parameters, and training goes on.
    _, good = train(tx, 3, (carry[0], bad))
    assert np.all(np.isfinite(good.meta_params["log_decay"]))
    assert np.all(good.meta_params["log_decay"] != bad.meta_params["log_decay"])
    assert int(good.num_failed) == 1


@modes
def test_resumed_training_is_bit_identical(mode: Any, tmp_path: Path) -> None:
    tx = tune(mode)
    step, carry = jax.jit(training_step(tx)), (PARAMS, tx.init(PARAMS))
    for _ in range(3):
        carry = step(*carry)
    leaves, structure = jax.tree.flatten(carry)
    np.savez(tmp_path / "saved.npz", *leaves)
    with np.load(tmp_path / "saved.npz", allow_pickle=False) as saved:
        resumed = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved.files])
    for _ in range(3):
        carry, resumed = step(*carry), step(*resumed)
    same(carry, resumed)


# --- What goes wrong before anything runs.


def test_mistakes_are_named() -> None:
    tx = tune()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs `task`"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(PARAMS, state, task=TASK)
    masked = optax.masked(tx, MASK)
    with pytest.raises(ValueError, match=r"hides a part of `params`.*unmasked=params"):
        masked.update(PARAMS, masked.init(PARAMS), PARAMS, task=TASK)
    with pytest.raises(ValueError, match=r"found 0.*`tx.init`"):
        cm.current_meta_params(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="found 2"):
        cm.current_meta_params((state, state))
    with pytest.raises(TypeError, match="`mode` must be"):
        tune("alternating")
    with pytest.raises(TypeError, match="`meta_optimizer` must be an optax"):
        tune(meta_optimizer=1e-2)
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        tune(every=0)
    with pytest.raises(ValueError, match="`on_failure`"):
        tune(on_failure="zero")
    with pytest.raises(ValueError, match="`num_nudged_steps`"):
        cm.Alternating(num_nudged_steps=0)
    with pytest.raises(TypeError, match="real scheme"):
        tune(cm.SingleLoop(0.1, scheme=cm.circle)).init(PARAMS)
