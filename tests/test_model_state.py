"""Model state: the steps of the free phase move it as a training loop does, and nothing else moves it by a bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import finite_difference_meta_gradient, relative_error

NUM_STEPS = 600
# Which leaves an estimator cannot see is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot see the meta-parameters")


def normalised(h, mean, var):
    return (h - mean) / jnp.sqrt(var + 1e-3)


def inner_loss(params, meta_params, task, state):
    """A network with batch normalisation that also looks at its running averages, anchored to `meta_params`."""
    h = task["x"] @ params["first"]
    mean, var = jnp.mean(h, axis=0), jnp.var(h, axis=0)
    moved = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "var": 0.9 * state["var"] + 0.1 * var,
        "count": state["count"] + 1,
    }
    # Half of either: the frozen inner problem depends on the state, too.
    z = params["gain"] * normalised(h, 0.5 * (mean + state["mean"]), 0.5 * (var + state["var"]))
    away = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, meta_params)
    loss = jnp.mean((jnp.tanh(z) @ params["last"] - task["y"]) ** 2) + 0.25 * sum(jax.tree.leaves(away))
    return loss, moved


def outer_loss(params, meta_params, task, state):
    """In evaluation the network is normalised by the running averages alone."""
    z = params["gain"] * normalised(task["x_val"] @ params["first"], state["mean"], state["var"])
    return jnp.mean((jnp.tanh(z) @ params["last"] - task["y_val"]) ** 2)


def first_state(meta_params, task):
    return {"mean": jnp.zeros(4), "var": jnp.ones(4), "count": 0}


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, lambda meta, task: meta, init_model_state=first_state)


def network(dtype=jnp.float64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    meta_params = {
        "first": jax.random.normal(keys[0], (3, 4), dtype),
        "gain": 1 + 0.1 * jax.random.normal(keys[1], (4,), dtype),
        "last": jax.random.normal(keys[2], (4,), dtype),
    }
    x, x_val = jax.random.normal(keys[3], (2, 12, 3), dtype) + 1
    y, y_val = jnp.sin(x[:, 0] * x[:, 1]), jnp.sin(x_val[:, 0] * x_val[:, 1])
    return meta_params, {"x": x, "y": y, "x_val": x_val, "y_val": y_val}


def optimizer():
    return optax.sgd(0.1, momentum=0.5)


def descent(num_steps=NUM_STEPS):
    return cm.OptaxDescent(optimizer(), num_steps=num_steps)


def train_by_hand(problem, optimizer, meta_params, task, num_steps, sample=None, start=None):
    """An ordinary training loop: every step's forward pass moves the state once."""

    @jax.jit
    def step(params, opt_state, state, batch):
        (_, state), grads = jax.value_and_grad(problem.inner_loss, has_aux=True)(params, meta_params, batch, state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    params = problem.init_params(meta_params, task)
    params, state = (params, problem.init_model_state(meta_params, task)) if start is None else start
    at = params, optimizer.init(params), state
    for number in range(num_steps):
        at = step(*at, task if sample is None else sample(number))
    return at[0], at[2]


def assert_same_bits(got, expected):
    """Bits, where a CPU evaluates the step of a loop and of a compiled scan alike."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@functools.cache
def by_hand():
    meta_params, task = network()
    return train_by_hand(PROBLEM, optimizer(), meta_params, task, NUM_STEPS)


def short():
    return cm.OptaxDescent(optax.sgd(0.1), num_steps=20)


ESTIMATORS = {
    "default": lambda: cm.Contrastive(descent()),
    "as published": lambda: cm.Contrastive(descent(), nudged_solver=short(), scheme=cm.forward_difference(0.1)),
    "large beta, no estimate": lambda: cm.Contrastive(
        descent(), nudged_solver=short(), scheme=cm.central_difference(2.0), sequential=True, estimate_error=False
    ),
    "by L-BFGS": lambda: cm.Contrastive(
        descent(), nudged_solver=cm.LBFGS(), scheme=cm.four_point(1e-2), estimate_error=False
    ),
    "implicit": lambda: cm.ImplicitDifferentiation(descent()),
    "backprop": lambda: cm.BackpropThroughLearning(descent()),
    "checkpoints": lambda: cm.BackpropThroughLearning(descent(), checkpoint=True),
    "forward mode": lambda: cm.BackpropThroughLearning(descent(), forward_mode=True),
    "first order": lambda: cm.FirstOrder(descent()),
    "Reptile": lambda: cm.Reptile(descent()),
    "finite differences": lambda: cm.FiniteDifference(descent()),
}


@functools.cache
def estimate(name):
    meta_params, task = network()
    return ESTIMATORS[name]().estimate(PROBLEM, meta_params, task)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_state_is_that_of_a_training_loop_bit_for_bit(name):
    _, state = by_hand()
    assert int(state["count"]) == NUM_STEPS
    assert_same_bits(estimate(name).model_state, jax.tree.map(jnp.asarray, state))


def test_estimators_take_the_gradient_of_the_problem_with_its_state_held():
    """Float64 differences of learning at a fixed state (Richardson, about 1e-11); learning left 1e-9 to go."""
    meta_params, task = network()
    held = PROBLEM.at(estimate("default").model_state)
    expected = finite_difference_meta_gradient(held, meta_params, task, near=estimate("default").params)
    assert relative_error(estimate("default").grad, expected) < 1e-6
    assert relative_error(estimate("implicit").grad, expected) < 1e-6
    dense = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e-10), cm.DenseInverse()).estimate(held, meta_params, task)
    assert relative_error(dense.grad, expected) < 1e-8
    backprop = cm.BackpropThroughLearning(descent()).estimate(held, meta_params, task)
    assert relative_error(backprop.grad, expected) < 1e-6
    for name in ("default", "implicit"):
        assert int(estimate(name).diagnostics.status) == cm.Status.CONVERGED
        assert float(estimate(name).outer_loss) == pytest.approx(float(dense.outer_loss), rel=1e-6)


def test_backprop_alone_differentiates_what_learning_makes_of_the_state():
    """The running averages follow the parameters: that part is far above the error of either."""
    whole = estimate("finite differences").grad
    for name in ("backprop", "checkpoints", "forward mode"):
        assert relative_error(estimate(name).grad, whole) < 1e-7
    assert relative_error(estimate("default").grad, whole) > 0.05


def mean_of(momentum, num_steps):
    return 3.0 * (1 - (1 - momentum) ** num_steps)


def running_mean_problem():
    """The meta-parameter is the momentum of a running mean of 3, which the outer loss returns."""
    return cm.BilevelProblem(
        lambda w, momentum, task, state: (jnp.sum(w**2), state + momentum * (task - state)),
        lambda w, momentum, task, state: state + jnp.sum(w),
        lambda momentum, task: jnp.zeros(2),
        init_model_state=lambda momentum, task: 0.0,
    )


@pytest.mark.parametrize("truncate", [None, 4])
def test_backprop_sees_a_meta_parameter_that_enters_the_state_alone(truncate):
    """The derivative of 3 (1 - (1 - m)^n) in closed form; truncated, the first steps are a constant."""
    result = cm.BackpropThroughLearning(short(), truncate=truncate).estimate(
        running_mean_problem(), jnp.array(0.1), 3.0
    )
    assert float(result.outer_loss) == pytest.approx(mean_of(0.1, 20), rel=1e-12)
    whole = 3.0 * 20 * 0.9**19
    last = (3.0 - mean_of(0.1, 16)) * 4 * 0.9**3
    assert float(result.grad) == pytest.approx(whole if truncate is None else last, rel=1e-12)
    with pytest.raises(ValueError, match="Contrastive sees none of the meta-parameters"):
        cm.Contrastive(short()).estimate(running_mean_problem(), jnp.array(0.1), 3.0)


def counting(inner, **options):
    """A problem on two parameters, whose state counts forward passes and remembers the last parameters."""

    def inner_loss(w, meta, task, state):
        return inner(w, meta, task), {"count": state["count"] + 1, "last": w, "seen": state["seen"] + jnp.sum(task)}

    def first(meta, task):
        return {"count": jnp.int32(0), "last": jnp.zeros(2), "seen": jnp.zeros(())}

    return cm.BilevelProblem(
        inner_loss,
        lambda w, meta, task, state: jnp.sum((w - 1.0) ** 2) + 0 * state["seen"],
        lambda meta, task: jnp.zeros(2),
        init_model_state=first,
        **options,
    )


def quadratic(w, meta, task):
    return 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * (w - meta) ** 2) + 0.1 * jnp.sum((w - jnp.mean(task)) ** 2)


META, DATA = jnp.array([2.0, -1.0]), jnp.arange(6.0)


def test_a_run_to_a_tolerance_moves_the_state_once_a_step():
    optimizer = optax.sgd(0.2)
    result = cm.ImplicitDifferentiation(cm.OptaxDescent(optimizer, tol=1e-6)).estimate(counting(quadratic), META, DATA)
    num_steps = int(result.model_state["count"])
    assert 20 < num_steps < 200
    params, state = train_by_hand(counting(quadratic), optimizer, META, DATA, num_steps)
    assert_same_bits(result.model_state, state)
    assert_same_bits(result.params, params)
    # The last step was needed, and was the last: the state is of its forward pass, not of the one that ended learning.
    gradient = jax.grad(quadratic)
    assert float(jnp.linalg.norm(gradient(params, META, DATA))) <= 1e-6
    assert float(jnp.linalg.norm(gradient(state["last"], META, DATA))) > 1e-6


def test_no_step_leaves_the_state_as_it_was():
    at_minimum = counting(lambda w, meta, task: jnp.sum(w**2) + 0 * jnp.sum(meta))
    solver = cm.OptaxDescent(optax.sgd(0.2), tol=1e-6)
    result = cm.ImplicitDifferentiation(solver).estimate(at_minimum, META, DATA)
    assert int(result.model_state["count"]) == 0


def test_a_line_search_reads_the_state():
    search = optax.chain(optax.sgd(10.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=10))
    result = cm.ImplicitDifferentiation(cm.OptaxDescent(search, num_steps=30)).estimate(counting(quadratic), META, DATA)
    assert int(result.model_state["count"]) == 30
    # Evaluations of the search are counted, and there were many.
    assert int(result.diagnostics.num_gradients) > 90


def test_minibatches_move_the_state_in_their_order():
    key = jax.random.key(3)

    def sample(key, task, step):
        return task[jax.random.randint(key, (2,), 0, 6)]

    result = cm.Contrastive(short()).estimate(counting(quadratic, sample=sample), META, DATA, key=key)

    def batch(step):
        return sample(jax.random.fold_in(key, step), DATA, step)

    _, state = train_by_hand(counting(quadratic), optax.sgd(0.1), META, DATA, 20, sample=batch)
    assert_same_bits(result.model_state, state)
    assert float(state["seen"]) == sum(float(jnp.sum(batch(step))) for step in range(20))


def test_a_warm_start_goes_on_with_the_state_under_scan():
    """Plain descent has no memory: three estimates learn as one of three times the steps does."""
    estimator, problem = cm.ImplicitDifferentiation(short()), counting(quadratic)

    def again(state, _):
        result = estimator.estimate(problem, META, DATA, state=state)
        return result.state, result.model_state["count"]

    run = jax.jit(lambda state: jax.lax.scan(again, state, length=3))
    state, counts = run(estimator.init_state(problem, META, DATA))
    assert counts.tolist() == [20, 40, 60]
    _, expected = train_by_hand(problem, optax.sgd(0.1), META, DATA, 60)
    assert_same_bits(state.model_state, expected)


@pytest.mark.parametrize("kind", [cm.BackpropThroughLearning, cm.FirstOrder, cm.FiniteDifference])
def test_estimators_that_start_afresh_start_the_state_afresh(kind):
    meta_params, task = network()
    estimate_from = jax.jit(lambda state: kind(short()).estimate(PROBLEM, meta_params, task, state=state).state)
    first = estimate_from(kind(short()).init_state(PROBLEM, meta_params, task))
    assert int(first.model_state["count"]) == 20
    assert_same_bits(estimate_from(first).model_state, first.model_state)


def test_a_state_of_nan_is_not_carried_on():
    estimator, problem = cm.ImplicitDifferentiation(short()), counting(quadratic)
    result = estimator.estimate(problem, META, DATA)
    broken = result.state._replace(model_state={**result.model_state, "seen": jnp.array(jnp.nan)})
    assert_same_bits(estimator.estimate(problem, META, DATA, state=broken).model_state, result.model_state)


def test_every_task_has_a_state_of_its_own():
    estimator, problem = cm.ImplicitDifferentiation(short()), counting(quadratic)
    tasks = jnp.stack([DATA, 2 * DATA, DATA - 5])
    step = jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True, batch_size=2))
    (_, (diagnostics, state)), grad = step(META, tasks)
    assert diagnostics.status.shape == (3,)
    assert state["count"].tolist() == [20, 20, 20]
    single = jax.jit(lambda task: estimator.estimate(problem, META, task))
    singles = [single(task) for task in tasks]
    # A batch may be summed in another order: the last bits.
    expected = jnp.stack([single.model_state["last"] for single in singles])
    np.testing.assert_allclose(state["last"], expected, rtol=1e-12)
    np.testing.assert_allclose(state["seen"], 20 * jnp.sum(tasks, axis=1), rtol=1e-12)
    np.testing.assert_allclose(grad, sum(single.grad for single in singles) / 3, rtol=1e-10)


def test_meta_optimizer_keeps_the_state_with_the_warm_start():
    tasks = jnp.stack([DATA, 2 * DATA])
    estimator = cm.ImplicitDifferentiation(short())
    tx = cm.meta_optimizer(optax.sgd(0.1), counting(quadratic), estimator, warm_start=tasks)
    state, update = tx.init(META), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(None, state, META, tasks=tasks)
    assert state.meta_gradient.inner.model_state["count"].tolist() == [40, 40]
    assert state.meta_gradient.inner.model_state["seen"].tolist() == [40 * 15.0, 40 * 30.0]


@pytest.mark.parametrize("mode", [cm.Alternating(beta=0.1), cm.SingleLoop(0.1)], ids=["alternating", "single loop"])
def test_tuning_reads_the_state_of_the_training_loop(mode):
    """What an ordinary problem with that state held gives; another state gives something else."""
    meta_params, task = network()
    state = {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 2.0), "count": jnp.array(7)}
    params = jax.tree.map(lambda x: 0.9 * x, meta_params)
    grads = jax.grad(lambda p: inner_loss(p, meta_params, task, state)[0])(params)

    def tuner(problem):
        options = {"meta_optimizer": optax.sgd(0.1), "init_meta_params": meta_params, "every": 1, "mode": mode}
        tx = cm.tune_while_training(optax.sgd(0.1), problem=problem, **options)
        update = jax.jit(tx.update)

        def tuned(**extra):
            at = tx.init(params)
            for _ in range(2):
                _, at = update(grads, at, params, task=task, **extra)
            return at

        return tuned

    of_state, held = tuner(PROBLEM), tuner(PROBLEM.at(state))()
    with_state, other = (of_state(model_state=given) for given in (state, {**state, "mean": jnp.zeros(4)}))
    assert abs(float(other.outer_loss) - float(held.outer_loss)) > 1e-2
    steps = [jax.tree.map(jnp.subtract, at.meta_params, meta_params) for at in (held, other)]
    assert relative_error(steps[1], steps[0]) > 1e-2
    for got, expected in zip(jax.tree.leaves(with_state), jax.tree.leaves(held), strict=True):
        # The state is an operand there and a constant here, which may be folded: the last bits.
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    with pytest.raises(ValueError, match=r"`update` needs `model_state`.*`grads` were taken with"):
        of_state()


def test_aux_is_the_outer_loss_and_a_state_may_hold_keys_and_single_precision():
    """One function may serve as both losses, as a model in training mode does."""

    def loss(w, meta, task, state):
        key, used = jax.random.split(state["key"])
        kept = jax.random.bernoulli(used, 0.5, (2,))
        return jnp.sum((w - meta) ** 2) + jnp.sum(jnp.where(kept, w, 0.0) ** 2), {"key": key, "on": ~state["on"]}

    problem = cm.BilevelProblem(
        loss,
        loss,
        lambda meta, task: jnp.zeros(2, jnp.float32),
        has_aux=True,
        init_model_state=lambda meta, task: {"key": jax.random.key(5), "on": False},
    )
    solver = cm.OptaxDescent(optax.sgd(0.1), num_steps=81)
    estimator = cm.Contrastive(
        solver, nudged_solver=solver, scheme=cm.central_difference(0.1), nudge=cm.LinearNudge(), estimate_error=False
    )
    result = estimator.estimate(problem, META.astype(jnp.float32), None)
    key = jax.random.key(5)
    for _ in range(81):
        key, _ = jax.random.split(key)
    assert_same_bits(jax.random.key_data(result.model_state["key"]), jax.random.key_data(key))
    assert bool(result.model_state["on"]) and not bool(result.aux["on"])
    # The mask of the state as it was left is that of every phase: w = meta / 2 where it is on.
    kept = jax.random.bernoulli(jax.random.split(key)[1], 0.5, (2,))
    w = jnp.where(kept, META / 2, META)
    expected = -2 * (w - META) + jnp.where(kept, 0.5, 1.0) * (2 * (w - META) + jnp.where(kept, 2 * w, 0.0))
    # A linear nudge of a quadratic loss is exact but for rounding, eps / beta.
    np.testing.assert_allclose(result.grad, expected, atol=1e-4)
    assert result.grad.dtype == jnp.float32
    again = estimator.estimate(problem, META.astype(jnp.float32), None, state=result.state)
    assert jax.tree.structure(again.state) == jax.tree.structure(result.state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainDescent(cm.InnerSolver):
    """A learner of the user's, which moves a state as the documentation says."""

    def solve(self, loss, init, *, minibatch_loss=None, memory=(), stop=cm.Stop()):
        raise AssertionError("a problem with a state is not learned by `solve`")

    def solve_with_state(self, losses, init, model_state, *, memory=()):
        params = init
        for step in range(20):
            grads, moved = jax.grad(losses.of_step, has_aux=True)(params, model_state, jnp.int32(step))
            params, model_state = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), moved
        residual = jnp.linalg.norm(jax.grad(losses.held(model_state))(params))
        return cm.Solution(params, residual, jnp.int32(21), jnp.int32(20), jnp.int32(0), (), model_state)


def test_a_learner_of_the_users_may_move_a_state():
    problem = counting(quadratic)
    result, expected = (
        cm.ImplicitDifferentiation(solver).estimate(problem, META, DATA) for solver in (PlainDescent(), short())
    )
    assert int(result.model_state["count"]) == 20
    # Steps written out are rounded apart from steps of a loop: the last bits.
    assert relative_error(result.model_state, expected.model_state) < 1e-13
    assert relative_error(result.grad, expected.grad) < 1e-12


def test_complex_phases_read_a_real_state():
    problem = counting(quadratic)
    solver = cm.OptaxDescent(optax.sgd(0.2), num_steps=100)
    scheme = cm.relative(cm.complex_step)
    result = cm.Contrastive(solver, scheme=scheme, estimate_error=False).estimate(problem, META, DATA)
    expected = cm.ImplicitDifferentiation(solver, cm.DenseInverse()).estimate(problem, META, DATA)
    assert_same_bits(result.model_state, expected.model_state)
    assert relative_error(result.grad, expected.grad) < 1e-9


def fitted(meta_params, task):
    return jnp.zeros(2)


@pytest.mark.parametrize(
    "solver",
    [cm.LBFGS(), cm.ScipyMinimize(), cm.CallableSolver(lambda loss, w: w), cm.ExternalLearner(fitted)],
    ids=lambda solver: type(solver).__name__,
)
def test_a_learner_without_steps_refuses_and_names_the_way_out(solver):
    problem = counting(quadratic)
    with pytest.raises(
        TypeError, match=rf"{type(solver).__name__} cannot move a model state.*OptaxDescent.*problem\.at"
    ):
        cm.Contrastive(solver).estimate(problem, META, DATA)
    with pytest.raises(TypeError, match=f"{type(solver).__name__} cannot move a model state"):
        cm.BackpropThroughLearning(solver).estimate(problem, META, DATA)


def replaced(**changes):
    fields = {"inner_loss": inner_loss, "outer_loss": outer_loss, "init_model_state": first_state} | changes
    return cm.BilevelProblem(init_params=lambda meta, task: meta, **fields)


def test_mistakes_are_named_at_trace_time():
    meta_params, task = network()
    estimator = cm.ImplicitDifferentiation(short())

    def fails(problem, kind, message, **options):
        with pytest.raises(kind, match=message):
            estimator.estimate(problem, meta_params, task, **options)

    only_loss = replaced(inner_loss=lambda *args: inner_loss(*args)[0])
    fails(only_loss, TypeError, r"`inner_loss` must return `\(scalar, new_model_state\)` when `init_model_state=`")
    widened = replaced(
        inner_loss=lambda *args: (inner_loss(*args)[0], {**inner_loss(*args)[1], "count": args[3]["count"] + 0.5})
    )
    fails(widened, ValueError, "The model state that `inner_loss` returned: expected .*int.*got .*float")
    both = {"inner_loss": lambda p, m, t: inner_loss(p, m, t, first_state(m, t))}
    both["outer_loss"] = lambda p, m, t: outer_loss(p, m, t, first_state(m, t))
    forgotten = replaced(init_model_state=None, **both)
    fails(forgotten, TypeError, "needs `init_model_state=`")
    other = estimator.init_state(PROBLEM, meta_params, task)._replace(model_state={"count": jnp.array(0)})
    fails(PROBLEM, ValueError, r"`state.model_state`: expected .*'mean'", state=other)
    with pytest.raises(TypeError, match=r"were not told which one to read.*problem\.at\(model_state\)"):
        PROBLEM.inner(meta_params, meta_params, task)
    with pytest.raises(TypeError, match="were not told which one to read"):
        PROBLEM.outer(meta_params, meta_params, task)
    held = PROBLEM.at(first_state(meta_params, task))
    with pytest.raises(ValueError, match="no model state to be held"):
        held.at({"count": jnp.array(0)})
    assert held.at(()) is held
    unfinished = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.1), tol=1e-3))
    with pytest.raises(TypeError, match="cannot be differentiated in reverse"):
        unfinished.estimate(PROBLEM, meta_params, task)


def test_problems_without_state_compile_to_what_an_empty_one_does():
    """The mechanism costs nothing where it is not used: equation by equation the same program."""
    plain = cm.BilevelProblem(quadratic, lambda w, meta, task: jnp.sum(w**2), lambda meta, task: jnp.zeros(2))
    empty = cm.BilevelProblem(
        lambda w, meta, task, state: (quadratic(w, meta, task), ()),
        lambda w, meta, task, state: jnp.sum(w**2),
        lambda meta, task: jnp.zeros(2),
        init_model_state=lambda meta, task: (),
    )

    def program(estimator, problem):
        return str(jax.make_jaxpr(lambda meta: estimator.estimate(problem, meta, DATA))(META))

    for estimator in (cm.Contrastive(short()), cm.BackpropThroughLearning(short())):
        assert program(estimator, plain) == program(estimator, empty)


def drifting():
    """A minimum w = meta / (1 + decay), judged beside a running mean of w: held, half of the gradient is missing."""
    return cm.BilevelProblem(
        lambda w, meta, task, state: (0.5 * (w - meta) ** 2 + 0.5 * task * w**2, 0.5 * (state + w)),
        lambda w, meta, task, state: 0.5 * (w - 1.0) ** 2 + 0.5 * (state - 1.0) ** 2,
        lambda meta, task: jnp.zeros(()),
        init_model_state=lambda meta, task: jnp.zeros(()),
    )


def test_check_says_who_holds_the_state_and_diagnose_leaves_it():
    solver, meta, task = cm.OptaxDescent(optax.sgd(0.4), num_steps=60), jnp.array(3.0), jnp.array(1.0)
    estimators = {"implicit": cm.ImplicitDifferentiation(solver), "backprop": cm.BackpropThroughLearning(solver)}
    report = cm.check(drifting(), solver, meta, task, estimators=estimators)
    assert report.agree is False
    assert "The problem has a model state" in report.verdict
    result = estimators["implicit"].estimate(drifting(), meta, task)
    assert float(result.grad) == pytest.approx(0.25)  # (w - 1) / 2 at w = 3 / 2
    assert float(estimators["backprop"].estimate(drifting(), meta, task).grad) == pytest.approx(0.5)
    held = cm.check(drifting().at(result.model_state), solver, meta, task, estimators=estimators)
    assert held.agree is True

    contrast = cm.Contrastive(solver, nudged_solver=solver, scheme=cm.central_difference(0.1), nudge=cm.LinearNudge())
    diagnosis = cm.diagnose(drifting(), contrast, meta, task)
    assert_same_bits(diagnosis.result.model_state, result.model_state)
    assert diagnosis.drift.gradient < 1e-6
    assert float(diagnosis.result.grad) == pytest.approx(0.25)
    table = cm.compare(drifting(), {"contrast": contrast}, meta, task, reference=np.array(0.25))
    assert table.rows[0].relative_error < 1e-6


def test_argmin_takes_a_state_as_a_captured_value():
    def shrunk(w, decay, y, state):
        return jnp.sum((w - y - state) ** 2) + decay * jnp.sum(w**2), state + 1

    def solution(decay, state):
        held = lambda w, decay, y: shrunk(w, decay, y, state)[0]  # noqa: E731
        solve = cm.argmin(held, cm.LBFGS(tol=1e-10), init=jnp.zeros(2), adjoint=cm.ImplicitAdjoint())
        return jnp.sum(solve(decay, jnp.array([4.0, 2.0])))

    by_decay, by_state = jax.grad(solution, argnums=(0, 1))(jnp.array(1.0), jnp.array(1.0))
    assert float(by_decay) == pytest.approx(-2.0, rel=1e-6)  # w = (y + state) / (1 + decay)
    assert float(by_state) == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(TypeError, match="needs `init_model_state=`"):
        cm.argmin(lambda w, decay, y: shrunk(w, decay, y, 0), cm.LBFGS(), init=jnp.zeros(2))(
            jnp.array(1.0), jnp.ones(2)
        )
