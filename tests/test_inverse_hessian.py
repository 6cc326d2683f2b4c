"""Every inverse Hessian against dense numpy solutions, on the systems that broke the solvers of other libraries."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from contrastive_meta import (
    ConjugateGradient,
    DenseInverse,
    IdentityHessian,
    InverseHessian,
    LinearSolution,
    NeumannSeries,
    Nystrom,
    Status,
)

N = 12
# Solve any positive definite system of condition number 20 and norm 1.
EXACT: dict[str, InverseHessian] = {
    "conjugate_gradient": ConjugateGradient(),
    "dense": DenseInverse(),
    "neumann": NeumannSeries(step_size=1.0, num_terms=600),  # spectral radius 0.95; 0.95^600 = 4e-14
    "nystrom": Nystrom(rank=50, damping=1e-12),  # rank beyond the dimension: H itself
}
ALL: dict[str, InverseHessian] = EXACT | {
    "damped": ConjugateGradient(damping=0.1),
    "nystrom_low_rank": Nystrom(rank=4, damping=0.1, batch_size=3),
    "identity": IdentityHessian(0.5),
}
EVERY = pytest.mark.parametrize("name", ALL)
ONE_OF_EACH = pytest.mark.parametrize(
    "name", ["conjugate_gradient", "dense", "neumann", "nystrom_low_rank", "identity"]
)
EXACTLY = pytest.mark.parametrize("name", EXACT)
PRECISIONS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class Layer(NamedTuple):
    weight: Any
    bias: Any


def symmetric(eigenvalues: Any, seed: int = 0) -> np.ndarray:
    size = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return (basis * np.asarray(eigenvalues)) @ basis.T


def system(condition: float = 20.0, seed: int = 0, size: int = N) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(100 + seed)
    return symmetric(np.geomspace(1 / condition, 1, size), seed), rng.normal(size=size)


@jax.jit
def run(strategy: InverseHessian, H: jax.Array, v: jax.Array) -> LinearSolution:
    return strategy.solve(lambda x: jnp.matmul(H, x), v)


run_batch = jax.jit(jax.vmap(run, (None, 0, 0)))


def relative(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def true_residual(H: Any, u: Any, v: Any) -> float:
    return relative(np.asarray(H, np.float64) @ np.asarray(u, np.float64), v)


CALLS: list[int] = []


@jax.jit
def run_counting(strategy: InverseHessian, H: jax.Array, v: jax.Array) -> LinearSolution:
    """Counts in CALLS how many products are really executed, loops and batches included."""

    def hvp(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda _: CALLS.append(1), x[0])
        return H @ x

    return strategy.solve(hvp, v)


@EXACTLY
@PRECISIONS
@pytest.mark.parametrize("seed", range(3))
def test_positive_definite_systems_agree_with_numpy(name: str, dtype: Any, seed: int) -> None:
    H, v = system(seed=seed)
    answer = run(EXACT[name], H.astype(dtype), v.astype(dtype))
    # A residual of tol may be an error of condition number x tol: 20 x 1e-10, and 20 x 1.2e-6 in float32.
    assert relative(answer.solution, np.linalg.solve(H, v)) < (2e-9 if dtype == np.float64 else 2.4e-5)
    # In float32 the sketch's own rounding, about 1e-6 ||H||, leaves more than the tolerance.
    rounded = name == "nystrom" and dtype == np.float32
    assert answer.status in (Status.CONVERGED, *[Status.APPROXIMATE] * rounded)
    assert answer.solution.dtype == answer.residual.dtype == dtype


@EVERY
@PRECISIONS
def test_the_reported_residual_is_the_true_undamped_one(name: str, dtype: Any) -> None:
    H, v = system()
    H, v = H.astype(dtype), v.astype(dtype)
    answer = run(ALL[name], H, v)
    # Rounding of one product: a few eps ||H|| ||u|| / ||v||, the latter below the condition number of 20.
    assert float(answer.residual) == pytest.approx(
        true_residual(H, answer.solution, v), rel=1e-4, abs=20 * float(np.finfo(dtype).eps)
    )


@EVERY
@PRECISIONS
def test_zero_right_hand_side_has_the_zero_solution(name: str, dtype: Any) -> None:
    H, v = system()
    answer = run(ALL[name], H.astype(dtype), np.zeros_like(v, dtype))
    assert not np.any(answer.solution) and answer.residual == 0
    assert answer.status == (Status.APPROXIMATE if name == "identity" else Status.CONVERGED)


@EVERY
@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float64, 1e30), (np.float64, 1e-30), (np.float32, 1e18), (np.float32, 1e-18)]
)
def test_the_scale_of_the_right_hand_side_changes_nothing(name: str, dtype: Any, scale: float) -> None:
    H, v = (a.astype(dtype) for a in system())
    expected, answer = run(ALL[name], H, v), run(ALL[name], H, v * dtype(scale))
    # v * scale is rounded; an iteration may stop a step apart, both within the tolerance times the condition number.
    assert relative(np.asarray(answer.solution, np.float64) / scale, expected.solution) < (
        2e-9 if dtype == np.float64 else 2.4e-5
    )
    assert answer.status == expected.status
    # A power of two is not rounded: the same bits from the same products.
    power = dtype(2.0 ** np.round(np.log2(scale)))
    exactly = run(ALL[name], H, v * power)
    np.testing.assert_array_equal(exactly.solution, expected.solution * power)
    assert (exactly.residual, exactly.num_hvps) == (expected.residual, expected.num_hvps)


@ONE_OF_EACH
def test_scalar_systems(name: str) -> None:
    answer = jax.jit(lambda s, v: s.solve(lambda x: 0.5 * x, v))(ALL[name], 3.0)
    # Nystrom knows all of H and adds its damping of 0.1; the identity is 0.5 v.
    expected = {"nystrom_low_rank": 5.0, "identity": 1.5}.get(name, 6.0)
    assert answer.solution.shape == () and float(answer.solution) == pytest.approx(expected, rel=1e-10)


@ONE_OF_EACH
def test_any_pytree_gives_the_answer_of_its_flat_vector(name: str) -> None:
    H, v = system()
    params = {
        "layer": Layer(jnp.zeros((3, 2)), jnp.zeros((), jnp.float32)),
        "empty": {},
        "nothing": None,
        "rest": (jnp.zeros((0, 4)), [jnp.zeros((5,))]),
    }
    _, unravel = ravel_pytree(params)
    answer = jax.jit(lambda s, v: s.solve(lambda x: unravel(H @ ravel_pytree(x)[0]), v))(ALL[name], unravel(v))
    assert jax.tree.structure(answer.solution) == jax.tree.structure(params)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), (answer.solution, params))
    assert described[0] == described[1]
    # One entry is rounded to float32, and rounding counts times the condition number.
    assert relative(ravel_pytree(answer.solution)[0], run(ALL[name], H, v).solution) < 20 * np.finfo(np.float32).eps


@ONE_OF_EACH
def test_nothing_to_solve(name: str) -> None:
    nothing = {"none": None, "no_entries": jnp.zeros((0, 3)), "empty": ()}
    answer = jax.jit(lambda s, v: s.solve(lambda x: x, v))(ALL[name], nothing)
    assert answer.residual == 0 and jax.tree.structure(answer.solution) == jax.tree.structure(nothing)


@EVERY
def test_vmap_is_a_loop_whatever_the_other_lanes_do(name: str) -> None:
    easy, slow, broken = np.eye(N), system(condition=1e3)[0], np.full((N, N), np.nan)
    saddle = symmetric([-0.5, *np.linspace(0.1, 1, N - 1)])
    matrices = jnp.asarray(np.stack([easy, slow, broken, saddle]))
    vectors = jnp.asarray(np.stack([system(seed=seed)[1] for seed in range(4)]))
    together = run_batch(ALL[name], matrices, vectors)
    for lane in range(4):
        alone = run(ALL[name], matrices[lane], vectors[lane])
        got = jax.tree.map(lambda x, lane=lane: x[lane], together)
        assert (got.status, got.num_hvps) == (alone.status, alone.num_hvps), lane
        # Batched products sum in another order; the slow lane's condition number is 1000.
        np.testing.assert_allclose(got.solution, alone.solution, rtol=1e-7, atol=1e-10)
    assert together.status[2] == Status.NOT_FINITE
    assert not np.isnan(together.residual).any()


@ONE_OF_EACH
def test_jit_is_eager(name: str) -> None:
    H, v = system(condition=3.0)
    # With jit disabled every operation is dispatched by hand: 20 terms of the series are enough to compare.
    strategy = NeumannSeries(1.0, 20) if name == "neumann" else ALL[name]
    expected = run(strategy, H, v)
    with jax.disable_jit():
        answer = strategy.solve(lambda x: jnp.asarray(H) @ x, jnp.asarray(v))
    np.testing.assert_allclose(answer.solution, expected.solution, rtol=1e-9)
    assert (answer.num_hvps, answer.status) == (expected.num_hvps, expected.status)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: ConjugateGradient(tol=1e-8 * x, max_steps=int(10 * x), damping=0.1 * x),
        lambda x: NeumannSeries(0.1 * x, int(10 * x), 1e-3 * x),
        lambda x: Nystrom(3, 0.1 * x, int(x)),
        lambda x: DenseInverse(0.1 * x),
        IdentityHessian,
    ],
)
def test_new_numbers_do_not_recompile(make: Callable[[float], InverseHessian]) -> None:
    traces: list[int] = []

    @jax.jit
    def solve(strategy: InverseHessian, H: jax.Array, v: jax.Array) -> LinearSolution:
        traces.append(1)
        return strategy.solve(lambda x: H @ x, v)

    answers = [solve(make(x), *system(seed=seed)) for seed, x in enumerate((1.0, 2.0, 3.0))]
    assert len(traces) == 1
    assert len({float(answer.residual) for answer in answers}) == 3


@EVERY
@pytest.mark.parametrize("condition", [1.0, 20.0])
def test_counted_products_are_the_executed_ones(name: str, condition: float) -> None:
    H, v = system(condition)
    CALLS.clear()
    answer = run_counting(ALL[name], H, v)
    jax.effects_barrier()
    assert answer.num_hvps == len(CALLS) > 0


@EVERY
def test_a_right_hand_side_that_is_not_finite_is_reported_and_stays(name: str) -> None:
    H, v = system()
    for bad in (np.nan, np.inf):
        answer = run(ALL[name], H, np.where(np.arange(N) == 3, bad, v))
        assert answer.status == Status.NOT_FINITE
        assert np.isnan(answer.solution).all() and answer.residual == np.inf


@pytest.mark.parametrize("curvature", [1e-8, 0.3, 7.0, 1e8])
@PRECISIONS
def test_conjugate_gradient_takes_one_step_on_a_multiple_of_the_identity(curvature: float, dtype: Any) -> None:
    _, v = system()
    answer = run(ConjugateGradient(), (curvature * np.eye(N)).astype(dtype), v.astype(dtype))
    assert answer.num_hvps == 2  # the step, and the measurement of its residual
    assert relative(answer.solution, v / curvature) < 10 * np.finfo(dtype).eps
    assert answer.status == Status.CONVERGED


def test_conjugate_gradient_takes_a_step_for_each_distinct_eigenvalue() -> None:
    H = symmetric([1.0] * 4 + [3.0] * 4 + [10.0] * 4)
    assert run(ConjugateGradient(), H, system()[1]).num_hvps == 3 + 1


@pytest.mark.parametrize("max_steps", range(1, 10))
def test_conjugate_gradient_returns_the_best_iterate_of_its_budget(max_steps: int) -> None:
    # Eigenvalues over four decades: the residuals of conjugate gradients go up and down and exceed 1.
    H, v = system(condition=1e4, seed=2)
    x, r = np.zeros(N), v.copy()
    p, residuals, iterates = r.copy(), [], []
    for _ in range(max_steps):
        step = (r @ r) / (p @ H @ p)
        x, r_next = x + step * p, r - step * H @ p
        p, r = r_next + (r_next @ r_next) / (r @ r) * p, r_next
        residuals.append(np.linalg.norm(r) / np.linalg.norm(v))
        iterates.append(x)
    best = int(np.argmin(residuals))
    answer = run(ConjugateGradient(max_steps=max_steps), H, v)
    # Conjugacy is lost to rounding: from step 10 on, at condition number 1e4, the last bit of H decides the residual.
    assert relative(answer.solution, iterates[best]) < 1e-5
    assert float(answer.residual) == pytest.approx(residuals[best], rel=1e-3)
    assert answer.num_hvps == max_steps + 1
    assert answer.status == Status.NUDGED_NOT_CONVERGED
    if max_steps == 7:  # or the test could not tell the best iterate from the last, nor from the start
        assert best < max_steps - 1 and min(residuals[:3]) > 1


@pytest.mark.parametrize("condition", [1e4, 1e5])
def test_ill_conditioned_float32_reports_what_it_reached(condition: float) -> None:
    H, v = (a.astype(np.float32) for a in system(condition))
    answer, strict = run(ConjugateGradient(), H, v), run(ConjugateGradient(tol=1e-6), H, v)
    eps, length = np.finfo(np.float32).eps, np.linalg.norm(answer.solution) / np.linalg.norm(v)
    true = true_residual(H, answer.solution, v)
    # The recursion claims 1.2e-6. What is reported is the truth, to the rounding of the product that measures it.
    assert true > 1e-5
    assert true / 2 < answer.residual < true * 2
    # It reached the floor; a solve in float64 would be more accurate, no solve in float32 by much.
    assert true < 4 * eps * length
    assert answer.status == (Status.CONVERGED if true < eps**0.5 else Status.NUDGED_NOT_CONVERGED)
    # A tolerance that was asked for is kept to.
    assert strict.status == Status.NUDGED_NOT_CONVERGED and strict.residual > 1e-6
    exact = np.linalg.solve(H.astype(np.float64), v.astype(np.float64))
    assert relative(answer.solution, exact) < condition * 4 * eps
    assert relative(run(DenseInverse(), H, v).solution, exact) < condition * 4 * eps


def test_restarts_make_up_for_inexact_products() -> None:
    H, v = system()
    bias = jnp.ones(N) / N**0.5
    hvp = lambda x: H @ x + 1e-3 * jnp.linalg.norm(x) * bias  # noqa: E731
    answer = jax.jit(lambda v: ConjugateGradient(tol=1e-8).solve(hvp, v))(v)
    # The errors of the steps do not add up to the error of their sum: the recursion is off by 1e-3 from the truth.
    assert answer.status == Status.CONVERGED
    assert relative(hvp(answer.solution), v) < 1e-8


@EVERY
def test_a_saddle_is_reported(name: str) -> None:
    H, v = symmetric([-0.9, *np.linspace(0.1, 1, N - 1)]), system()[1]
    if name in ("identity", "nystrom_low_rank"):  # see the curvature along u and along random directions
        v = np.linalg.eigh(H)[1][:, 0]
    answer = run(ALL[name], H, v)
    assert answer.status == Status.INDEFINITE_CURVATURE
    if name == "dense":
        np.testing.assert_allclose(answer.solution, np.linalg.solve(H, v), rtol=1e-10)
    if name == "conjugate_gradient":
        assert np.isfinite(answer.solution).all() and np.any(answer.solution)
        assert float(answer.residual) == pytest.approx(true_residual(H, answer.solution, v), rel=1e-10)


def test_who_sees_negative_curvature_that_the_right_hand_side_does_not_touch() -> None:
    H = symmetric([-0.9, *np.linspace(0.1, 1, N - 1)])
    v = np.linalg.eigh(H)[1][:, 3:6].sum(axis=1)
    assert run(DenseInverse(), H, v).status == Status.INDEFINITE_CURVATURE
    assert run(EXACT["nystrom"], H, v).status == Status.INDEFINITE_CURVATURE
    answer = run(ConjugateGradient(), H, v)
    assert answer.status == Status.CONVERGED
    assert relative(answer.solution, np.linalg.solve(H, v)) < 1e-9


def test_enough_damping_makes_a_saddle_solvable() -> None:
    H, v = symmetric([-0.5, *np.linspace(0.1, 1, N - 1)]), system()[1]
    for strategy in (ConjugateGradient(damping=0.6), DenseInverse(damping=0.6)):
        answer = run(strategy, H, v)
        assert relative(answer.solution, np.linalg.solve(H + 0.6 * np.eye(N), v)) < 1e-8
        # Solved, but not the system that was asked for.
        assert answer.status == Status.APPROXIMATE
        assert float(answer.residual) == pytest.approx(true_residual(H, answer.solution, v), rel=1e-8)


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_a_first_direction_that_fails_gives_zero_and_says_so(curvature: float) -> None:
    answer = run(ConjugateGradient(), curvature * np.eye(N), system()[1])
    assert not np.any(answer.solution) and answer.residual == 1
    assert answer.status == Status.INDEFINITE_CURVATURE


def test_singular_systems() -> None:
    H = symmetric([0.0, 0.0, *np.linspace(0.1, 1, N - 2)])
    v = system()[1]
    dense = run(DenseInverse(), H, v)
    np.testing.assert_allclose(dense.solution, np.linalg.pinv(H, rcond=1e-12) @ v, rtol=1e-9)
    assert dense.status == Status.INDEFINITE_CURVATURE
    solvable = run(ConjugateGradient(), H, H @ v)
    np.testing.assert_allclose(solvable.solution, np.linalg.pinv(H, rcond=1e-12) @ H @ v, rtol=1e-7, atol=1e-9)
    assert solvable.status == Status.CONVERGED
    assert run(ConjugateGradient(), H, v).status in (Status.INDEFINITE_CURVATURE, Status.NUDGED_NOT_CONVERGED)


def test_a_product_that_breaks_down_midway_keeps_the_best_iterate() -> None:
    H, v = system()
    # Conjugate directions shrink with the residual: from some step on this product overflows.
    hvp = lambda x: jnp.where(jnp.linalg.norm(x) < 0.1, jnp.nan, H @ x)  # noqa: E731
    answer = jax.jit(lambda v: ConjugateGradient().solve(hvp, v))(v)
    assert answer.status == Status.NOT_FINITE
    assert 0 < answer.residual < 1
    assert float(answer.residual) == pytest.approx(true_residual(H, answer.solution, v), rel=1e-10)


@pytest.mark.parametrize("num_terms", [1, 2, 5, 40])
def test_the_neumann_series_is_that_many_steps_of_gradient_descent(num_terms: int) -> None:
    H, v = system()
    u = np.zeros(N)
    for _ in range(num_terms):
        u = u - 0.7 * (H @ u - v)
    answer = run(NeumannSeries(0.7, num_terms), H, v)
    np.testing.assert_allclose(answer.solution, u, rtol=1e-12)
    left = np.linalg.matrix_power(np.eye(N) - 0.7 * H, num_terms) @ v
    assert float(answer.residual) == pytest.approx(np.linalg.norm(left) / np.linalg.norm(v), rel=1e-12)
    assert answer.num_hvps == num_terms and answer.status == Status.NUDGED_NOT_CONVERGED


@PRECISIONS
def test_one_neumann_term_is_the_step_size_times_the_vector(dtype: Any) -> None:
    H, v = (a.astype(dtype) for a in system())
    for answer in (run(NeumannSeries(0.37, 1), H, v), run(IdentityHessian(0.37), H, v)):
        np.testing.assert_array_equal(answer.solution, dtype(0.37) * v)


def test_the_neumann_series_converges_at_the_spectral_radius() -> None:
    H, v = system()
    exact = np.linalg.solve(H, v)
    errors = [relative(run(NeumannSeries(1.0, k), H, v).solution, exact) for k in (200, 300)]
    # The slowest mode, of eigenvalue 1/20, is all that is left after 200 terms.
    assert errors[1] / errors[0] == pytest.approx(0.95**100, rel=1e-3)


def test_a_diverging_neumann_series_says_so() -> None:
    H, v = system()
    answer = run(NeumannSeries(2.2, 60), H, v)  # 1 - 2.2 = -1.2
    assert answer.residual > 1 and answer.status == Status.NUDGED_NOT_CONVERGED
    assert run(NeumannSeries(2.2, 5000), H, v).status == Status.NOT_FINITE
    assert run(NeumannSeries(1.0, 20, tol=0.9), H, v).status == Status.CONVERGED


def test_nystrom_inverts_its_approximation_plus_damping() -> None:
    H, v = system()
    Q = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(3), (N, 4))))[0]
    approximation = H @ Q @ np.linalg.solve(Q.T @ H @ Q, Q.T @ H)
    answer = run(Nystrom(4, 0.05, 3, batch_size=3), H, v)
    np.testing.assert_allclose(answer.solution, np.linalg.solve(approximation + 0.05 * np.eye(N), v), rtol=1e-9)
    # The left-out eigenvalues are up to 20 times the damping: worse than no answer, and reported so.
    assert answer.num_hvps == 5 and answer.residual > 1 and answer.status == Status.NUDGED_NOT_CONVERGED
    assert run(Nystrom(4, 1.0, 3, batch_size=3), H, v).status == Status.APPROXIMATE
    np.testing.assert_allclose(run(Nystrom(4, 0.05, jax.random.key(3)), H, v).solution, answer.solution, rtol=1e-9)
    assert relative(run(Nystrom(4, 0.05, 4, batch_size=3), H, v).solution, answer.solution) > 1e-3


@PRECISIONS
def test_nystrom_of_a_low_rank_hessian_is_exact(dtype: Any) -> None:
    H, v = (a.astype(dtype) for a in (symmetric([0.0] * 8 + [0.5, 1.0, 2.0, 4.0]), system()[1]))
    expected = np.linalg.solve(H.astype(np.float64) + 0.01 * np.eye(N), v)
    # Rounding of the null space, eps ||H||, is felt against the damping: 400 eps.
    assert relative(run(Nystrom(4, 0.01, batch_size=3), H, v).solution, expected) < 400 * np.finfo(dtype).eps
    # Of a vector in the range nothing is left out but rounding; a small damping must not divide that into a residual.
    damping = 8 * float(np.finfo(dtype).eps)
    assert run(Nystrom(4, damping, batch_size=3), H, H @ v).residual < 1000 * damping


def test_mistakes_are_named() -> None:
    v = jnp.asarray(system()[1])
    with pytest.raises(TypeError, match=r"vector\['a'\] has dtype int"):
        ConjugateGradient().solve(lambda x: x, {"a": jnp.arange(3)})
    for strategy in ALL.values():
        for unlike in (lambda x: x[:-1], lambda x: x.astype(jnp.float32), lambda x: {"a": x}):
            with pytest.raises(ValueError, match="`hvp`: expected"):
                jax.eval_shape(lambda v, s=strategy, hvp=unlike: s.solve(hvp, v), v)
    bad: list[tuple[InverseHessian, str]] = [
        (NeumannSeries(0.0), "step_size"),
        (NeumannSeries(0.1, 0), "num_terms"),
        (Nystrom(3, 0.0), "damping"),
        (Nystrom(0, 0.1), "rank"),
        (DenseInverse(batch_size=0), "batch_size"),
        (IdentityHessian(-1.0), "scale"),
    ]
    for strategy, setting in bad:
        with pytest.raises(ValueError, match=f"`{setting}` must be positive"):
            jax.eval_shape(lambda v, s=strategy: s.solve(lambda x: x, v), v)
