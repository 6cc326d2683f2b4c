"""The shared problems: their exact answers are exact, their losses holomorphic, their data what is said of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from contrastive_meta import BilevelProblem, problems
from tests.oracles import (
    SMALL_PROBLEMS,
    cast,
    cosine,
    finite_difference_meta_gradient,
    relative_error,
    small_instance,
    small_problem,
)

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float64).eps)
CLOSED_FORMS = ("quadratic", "ridge", "ridge_shared")
every_problem = pytest.mark.parametrize("name", SMALL_PROBLEMS)


# --- Exact answers ---------------------------------------------------------------------------------------------------


@every_problem
def test_exact_meta_gradient_equals_finite_differences(name: str) -> None:
    """They agree to 1e-12 .. 2e-11 on these problems: what extrapolated differences with a step of 1e-3 can reach."""
    small = small_problem(name)
    differences = finite_difference_meta_gradient(small.problem, small.meta_params, small.task, small.params)
    assert relative_error(small.exact.grad, differences) < 2e-10
    assert cosine(small.exact.grad, differences) > 1 - 1e-15


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_equals_newton_and_implicit_function_theorem(name: str) -> None:
    small = small_problem(name)
    exact = small_instance(name, seed=0).exact
    assert exact is not None
    closed = jax.jit(exact)(small.meta_params, small.task)
    # Rounding times a condition number of 10.
    assert relative_error(closed.grad, small.exact.grad) < 1e-13
    assert relative_error(closed.params, small.exact.params) < 1e-13
    assert relative_error(closed.outer_loss, small.exact.outer_loss) < 1e-13
    assert relative_error(closed.min_eigenvalue, small.exact.min_eigenvalue) < 1e-12
    assert closed.residual < 1e-13
    assert closed.converged


@every_problem
def test_a_free_solution_is_stationary(name: str) -> None:
    small = small_problem(name)
    residual = jax.jit(jax.grad(small.problem.inner))(small.params, small.meta_params, small.task)
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(residual)) < 1e-13
    assert small.exact.min_eigenvalue > 0.01


def test_the_direct_term_of_the_quadratic_is_not_negligible() -> None:
    small = small_problem("quadratic")
    direct = jax.jit(jax.grad(small.problem.outer, argnums=1))(small.params, small.meta_params, small.task)
    assert np.linalg.norm(direct["drive"]) > 0.05 * np.linalg.norm(small.exact.grad["drive"])


def test_quadratic_has_the_condition_number_asked_for() -> None:
    problem, meta_params, task, _ = small_instance("quadratic", seed=0)
    hessian = jax.jit(jax.hessian(problem.inner))(jnp.zeros(6), meta_params, task)
    eigenvalues = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose([eigenvalues[0], eigenvalues[-1]], [0.1, 1.0], rtol=1e-12)


def test_a_shared_strength_gets_the_sum_of_the_gradients_of_its_weights() -> None:
    shared, separate = small_problem("ridge_shared"), small_instance("ridge", seed=0)
    assert separate.exact is not None
    strengths = jnp.full(separate.meta_params.shape, shared.meta_params)
    total = jnp.sum(separate.exact(strengths, shared.task).grad)
    np.testing.assert_allclose(shared.exact.grad, total, rtol=1e-12)


def test_data_cleaning_lowers_the_weights_of_wrong_labels() -> None:
    draw = jax.jit(lambda key: problems.corrupted_data(key, 20, 20, 4, num_classes=3, fraction=0.5, separation=4.0))
    split, corrupted = draw(KEY)
    assert np.sum(corrupted) == 10
    instance = small_instance("data_cleaning", seed=0)
    assert instance.exact is not None
    grad = instance.exact(instance.meta_params, instance.task._replace(**split._asdict())).grad
    # Descent lowers what has a positive gradient.
    assert np.mean(grad[corrupted]) > 0 > np.mean(grad[~corrupted])


@pytest.mark.parametrize("name", ["quadratic", "logistic"])
def test_exact_works_under_jit_and_vmap(name: str) -> None:
    small = small_problem(name)
    exact = small_instance(name, seed=0).exact
    assert exact is not None
    moved = jax.tree.map(lambda x: x + 0.01, small.meta_params)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), small.meta_params, moved)
    both = jax.jit(jax.vmap(exact, in_axes=(0, None)))(stacked, small.task)
    for i, meta_params in enumerate((small.meta_params, moved)):
        alone, member = exact(meta_params, small.task), jax.tree.map(lambda x, i=i: x[i], both)
        assert member.converged
        # Rounding times the condition number, 10.
        assert relative_error(member.grad, alone.grad) < 1e-12


# --- The Newton helper where it is hard, or fails --------------------------------------------------------------------


class Terms(NamedTuple):
    """Strengths of the terms of `BARE`'s inner loss, which has two parameters w and a meta-parameter theta."""

    wells: float = 0.0  # double wells, each at w^3 - w = theta
    bowl: float = 0.0  # |w - theta|^2
    valley: float = 0.0  # (sum(w) - theta)^2, with a line of minima
    slope: float = 0.0  # exp(-sum(w)), without a minimum
    flare: float = 0.0  # sqrt(1 + (w - theta)^2), on which full Newton steps diverge from |w - theta| > 1


def _bare_inner(w: jax.Array, theta: jax.Array, task: Terms) -> jax.Array:
    wells = jnp.sum((w**2 - 1) ** 2) / 4 - theta * jnp.sum(w)
    smooth = task.wells * wells + task.bowl * jnp.sum((w - theta) ** 2) + task.slope * jnp.exp(-jnp.sum(w))
    flare = jnp.sum(jnp.sqrt(1 + (w - theta) ** 2))
    return smooth + task.valley * (jnp.sum(w) - theta) ** 2 + task.flare * flare


BARE = BilevelProblem(_bare_inner, lambda w, theta, task: jnp.sum(w), lambda theta, task: jnp.zeros(2))


@pytest.mark.parametrize("basin", [-1.0, 1.0])
def test_near_names_the_basin(basin: float) -> None:
    """At w^3 - w = theta, dw/dtheta = 1 / (3 w^2 - 1), different in the two wells; the outer loss adds both w."""
    result = problems.exact_meta_gradient(BARE, 0.1, Terms(wells=1.0), near=jnp.full(2, basin))
    w = result.params
    assert result.converged and np.all(np.sign(w) == basin)
    np.testing.assert_allclose(w**3 - w, 0.1, rtol=1e-13)
    np.testing.assert_allclose(result.grad, jnp.sum(1 / (3 * w**2 - 1)), rtol=1e-12)


def test_newton_descends_where_curvature_is_negative() -> None:
    """From between the wells, where an undamped step would go to the maximum near -0.1."""
    result = problems.exact_meta_gradient(BARE, 0.1, Terms(wells=1.0))
    assert result.converged and np.all(result.params > 1)


def test_newton_is_damped() -> None:
    result = problems.exact_meta_gradient(BARE, 2.0, Terms(flare=1.0), near=jnp.array([30.0, -5.0]))
    assert result.converged
    np.testing.assert_allclose([*result.params, result.grad], [2.0, 2.0, 2.0], rtol=1e-12)


@pytest.mark.parametrize(
    ("terms", "converges"),
    [
        pytest.param(Terms(bowl=1.0), True, id="minimum"),
        pytest.param(Terms(bowl=-1.0), False, id="maximum"),
        pytest.param(Terms(valley=1.0), False, id="line of minima"),
        pytest.param(Terms(slope=1.0), False, id="no minimum"),
        pytest.param(Terms(bowl=np.nan), False, id="NaN"),
    ],
)
def test_failure_is_told(terms: Terms, converges: bool) -> None:
    assert problems.exact_meta_gradient(BARE, 0.3, terms).converged == converges


# --- Losses ----------------------------------------------------------------------------------------------------------


@every_problem
def test_losses_are_holomorphic(name: str) -> None:
    """In params and meta_params together, infinitesimally and at a finite distance.

    Complex steps, Im f(x + i h e_k) / h, give the gradient to rounding; the mean over a circle is the value at its
    centre, of which 16 points of radius 0.05 leave only rounding.
    """
    small, noise = small_problem(name), np.random.default_rng(0)
    flat, unravel = ravel_pytree((small.params, small.meta_params))
    # Away from the solution, where gradients vanish.
    point = flat + 0.3 * noise.standard_normal(flat.shape)
    direction = noise.standard_normal(flat.shape)
    direction *= 0.05 / np.linalg.norm(direction)
    circle, h = np.exp(2j * np.pi * np.arange(16) / 16), 1e-20

    def of_complex(loss: Any, z: jax.Array) -> Any:
        return loss(*jax.tree.map(jax.lax.complex, unravel(z.real), unravel(z.imag)), small.task)

    @jax.jit
    def evaluate(point: jax.Array) -> Any:
        def of(loss: Any) -> Any:
            value, grad = jax.value_and_grad(lambda x: loss(*unravel(x), small.task))(point)
            points = jnp.concatenate([point + 1j * h * jnp.eye(point.size), point + circle[:, None] * direction])
            values = jax.vmap(lambda z: of_complex(loss, z))(points)
            return value, grad, values[: point.size].imag / h, values[point.size :]

        return of(small.problem.inner), of(small.problem.outer)

    for value, grad, stepped, around in evaluate(point):
        assert relative_error(stepped, grad) < 1e-12
        assert np.ptp(around.real) > 1e-6  # the circle is felt
        np.testing.assert_allclose(np.mean(around), value, rtol=1e-13)


@pytest.mark.parametrize(("dtype", "logit"), [(jnp.float32, 80.0), (jnp.float64, 700.0)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_losses_are_finite_in_the_range_promised(dtype: Any, logit: float, sign: float) -> None:
    x, y = jnp.ones((1, 1), dtype), jnp.ones((1,), int)
    binary = problems.logistic_regression(x, y, x, y)
    params = problems.Linear(jnp.full((1,), sign * logit, dtype), jnp.zeros((), dtype))
    value, grad = jax.value_and_grad(binary.problem.outer)(params, binary.meta_params, binary.task)
    np.testing.assert_allclose([value, grad.kernel[0]], [logit * (sign < 0), -(sign < 0)], atol=1e-30, rtol=1e-6)

    several = problems.softmax_regression(x, y, x, y, num_classes=2)
    kernel = jnp.array([[-sign * logit, sign * logit]], dtype)
    weights = {"kernel": kernel, "bias": jnp.zeros(2, dtype)}
    value, grad = jax.value_and_grad(several.problem.outer)(weights, several.meta_params, several.task)
    # Rounding is that of logits of this size, not of their (small) loss.
    np.testing.assert_allclose(value, 2 * logit * (sign < 0), atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(grad["kernel"], [[float(sign < 0), -float(sign < 0)]], atol=1e-6)


@every_problem
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_preserved(name: str, dtype: Any) -> None:
    """Traced, not computed."""

    def everything(key: jax.Array) -> Any:
        problem, meta_params, task, exact = SMALL_PROBLEMS[name](key, dtype)
        params = problem.init(meta_params, task)
        inner = jax.value_and_grad(problem.inner, argnums=(0, 1))(params, meta_params, task)
        outer = jax.value_and_grad(problem.outer, argnums=(0, 1))(params, meta_params, task)
        answer = None if exact is None else exact(meta_params, task)
        return params, meta_params, task, inner, outer, answer

    assert _floating_dtypes(jax.eval_shape(everything, KEY)) == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", ["softmax"])
def test_float32_answers_are_the_float64_ones_rounded(name: str) -> None:
    small = small_problem(name, jnp.float32)
    result = problems.exact_meta_gradient(small.problem, small.meta_params, small.task)
    assert result.converged and _floating_dtypes(result) == {jnp.dtype(jnp.float32)}
    # float32's rounding, 6e-8, times a condition number of 14 and a few sums.
    assert relative_error(result.grad, small.exact.grad) < 1e-5


@every_problem
def test_losses_work_under_jit_and_vmap_over_tasks(name: str) -> None:
    problem, meta_params = small_problem(name).problem, small_problem(name).meta_params

    def judged(task: Any) -> jax.Array:
        params = problem.init(meta_params, task)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(problem.inner)(params, meta_params, task))
        return problem.outer(params, meta_params, task)

    tasks = [small_problem(name).task, small_instance(name, seed=0).task]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *tasks)
    batched, one_by_one = jax.jit(lambda batch: (jax.vmap(judged)(batch), jax.lax.map(judged, batch)))(batch)
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-12)
    assert abs(batched[0] - batched[1]) > 1e-3


@every_problem
def test_instances_of_one_family_share_compilations(name: str) -> None:
    """Losses are static fields: equal and of equal hash, or every new data set compiles anew."""
    one, two = small_problem(name).problem, small_instance(name, seed=0).problem
    assert one == two and hash(one) == hash(two)


# --- Data ------------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[jax.Array], Any]] = {
    "quadratic": lambda key: problems.quadratic(key)[1:3],
    "ridge_data": problems.ridge_data,
    "corrupted_data": problems.corrupted_data,
    "sinusoids": lambda key: problems.sinusoids(key, 3)[1:3],
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_draw_from_the_key_alone(name: str) -> None:
    """The same program each time, down to its constants: what differs comes from the key."""
    # A new function each time: JAX remembers traces by function.
    first, again = (jax.make_jaxpr(partial(GENERATORS[name]))(KEY) for _ in range(2))
    assert str(first) == str(again)
    for one, same in zip(first.consts, again.consts, strict=True):
        np.testing.assert_array_equal(one, same)


@every_problem
def test_another_key_is_another_task(name: str) -> None:
    one, two = small_instance(name, seed=0).task, small_problem(name).task
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, two)
    assert max(np.max(np.abs(a - b)) for a, b in zip(_floating(one), _floating(two), strict=True)) > 0.1


@pytest.mark.parametrize(("num", "num_classes"), [(30, 2), (37, 5)])
def test_corrupt_labels_moves_exactly_the_fraction_to_other_classes(num: int, num_classes: int) -> None:
    labels, fractions = jnp.arange(num, dtype=jnp.int32) % num_classes, (0.0, 0.1, 0.5, 1.0)

    @jax.jit
    def corrupt(key: jax.Array) -> list[jax.Array]:
        return [problems.corrupt_labels(key, labels, num_classes, fraction) for fraction in fractions]

    for fraction, noisy in zip(fractions, corrupt(KEY), strict=True):
        assert np.sum(noisy != labels) == round(fraction * num)
        assert noisy.dtype == labels.dtype and noisy.min() >= 0 and noisy.max() < num_classes


def test_corrupt_labels_draws_uniformly_among_the_other_classes() -> None:
    corrupt = jax.jit(lambda key: problems.corrupt_labels(key, jnp.ones(3000, int), num_classes=4, fraction=0.5))
    noisy = np.asarray(corrupt(KEY))
    counts = np.bincount(noisy, minlength=4)
    assert counts[1] == 1500
    # 500 each is expected, with a standard deviation of 18.
    np.testing.assert_allclose(counts[[0, 2, 3]], 500, atol=80)
    # And without regard to position: 750 of the first half, with a standard deviation of 19.
    np.testing.assert_allclose(np.sum(noisy[:1500] != 1), 750, atol=80)


def test_sinusoid_tasks_are_sinusoids_in_the_ranges_promised() -> None:
    tasks = problems.sinusoid_tasks(KEY, num_tasks=50, num_support=10, num_query=7)
    assert tasks.y_train.shape == (50, 10) and tasks.x_val.shape == (50, 7, 1)
    x = np.concatenate([tasks.x_train, tasks.x_val], axis=1)[..., 0]
    y = np.concatenate([tasks.y_train, tasks.y_val], axis=1)
    assert np.all(np.abs(x) <= 5) and np.max(np.abs(x)) > 4.5
    fits = [np.linalg.lstsq(np.stack([np.sin(a), np.cos(a)], axis=1), b, rcond=None) for a, b in zip(x, y, strict=True)]
    sine, cosine_ = np.array([fit[0] for fit in fits]).T
    assert max(fit[1][0] for fit in fits) < 1e-24  # support and query lie on one A sin(x + p)
    amplitude, phase = np.hypot(sine, cosine_), np.arctan2(cosine_, sine)
    assert 0.1 <= amplitude.min() < 1 and 4 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.5 and 2.6 < phase.max() <= np.pi


def test_a_learned_initialisation_starts_at_its_anchor_and_an_mlp_at_its_key() -> None:
    anchored = small_problem("sinusoids")
    start = anchored.problem.init(anchored.meta_params, anchored.task)
    np.testing.assert_array_equal(ravel_pytree(start)[0], ravel_pytree(anchored.meta_params.weights)[0])
    keyed = small_problem("mlp")

    @jax.jit
    def begin(key: jax.Array) -> jax.Array:
        return ravel_pytree(keyed.problem.init(keyed.meta_params, keyed.task._replace(key=key)))[0]

    one, same, two = (begin(jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert np.linalg.norm(one - two) > 1


def test_numpy_arrays_are_taken_as_they_are() -> None:
    x_train, y_train, x_val, y_val = data = [np.ones(shape, np.float32) for shape in ((6, 3), 6, (5, 3), 5)]
    task = problems.ridge(x_train, y_train, x_val, y_val).task
    assert _floating_dtypes(task) == {jnp.dtype(jnp.float32)}
    for got, given in zip(task, data, strict=True):
        np.testing.assert_array_equal(got, given)


X, Y, LABELS = np.ones((4, 3)), np.ones(4), np.array([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: problems.ridge(X.astype(int), Y, X, Y), TypeError, r"`x_train` must be real and floating.*astype"),
        (lambda: problems.ridge(X, Y[:3], X, Y), ValueError, r"'y_train': \(3,\).*one row per example"),
        (lambda: problems.ridge(X, Y, X[:, :2], Y), ValueError, r"Expected x_train \(num_train, num_features\)"),
        (lambda: problems.ridge(X[:0], Y[:0], X, Y), ValueError, "none of them empty"),
        (lambda: problems.softmax_regression(X, Y, X, LABELS, 3), TypeError, "`y_train` must hold integer class"),
        (lambda: problems.softmax_regression(X, LABELS, X, LABELS, 2), ValueError, "labels from 0 to 1; got 0 to 2"),
        (lambda: problems.logistic_regression(X, LABELS, X, LABELS), ValueError, "labels from 0 to 1"),
        (lambda: problems.data_cleaning(X, LABELS, X, LABELS, 3, decay=0.0), ValueError, "`decay` must be positive"),
        (lambda: problems.corrupt_labels(KEY, LABELS, 3, 1.5), ValueError, "`fraction` must lie between 0 and 1"),
        (lambda: problems.corrupt_labels(KEY, LABELS, 1, 0.5), ValueError, "`num_classes` must be at least 2"),
        (lambda: problems.sinusoids(KEY, widths=(4, 0)), ValueError, "`widths` must be positive"),
        (lambda: problems.quadratic(KEY, dim=0), ValueError, "must be positive"),
        (lambda: problems.quadratic(KEY, condition_number=0.5), ValueError, "`condition_number` at least 1"),
    ],
)
def test_bad_input_is_named_with_its_remedy(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- The oracles themselves ------------------------------------------------------------------------------------------


def test_the_oracles_can_tell_right_from_wrong() -> None:
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    assert relative_error(cast(tree, jnp.float32), tree) == 0
    np.testing.assert_allclose(relative_error({"a": jnp.array([3.0, 5.0]), "b": jnp.array(4.0)}, tree), 1.0)
    np.testing.assert_allclose(cosine(jax.tree.map(jnp.negative, tree), tree), -1)
    # A meta-parameter's gradient without the direct term is far from the differences'.
    small = small_problem("quadratic")
    direct = jax.grad(small.problem.outer, argnums=1)(small.params, small.meta_params, small.task)
    without = jax.tree.map(jnp.subtract, small.exact.grad, direct)
    differences = finite_difference_meta_gradient(small.problem, small.meta_params, small.task, small.params)
    assert relative_error(without, differences) > 0.01


def _floating_dtypes(tree: Any) -> set[Any]:
    return {leaf.dtype for leaf in _floating(tree)}


def _floating(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
