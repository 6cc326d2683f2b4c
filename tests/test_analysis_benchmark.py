"""The experiment `analysis`: exact values are exact, the contrast is the package's, fits find known exponents."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks.__main__ import main
from benchmarks.experiments import analysis
from benchmarks.experiments.analysis_problems import build, contrast, descend, minimum
from benchmarks.harness import flatten
from benchmarks.methods import BACKPROP, CONTRASTIVE
from tests.oracles import finite_difference_meta_gradient, relative_error


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_phases_and_meta_gradient_are_exact(name: str) -> None:
    analysed = build(name, seed=0)
    for beta in (0.0, -0.1, 0.3):
        at = minimum(analysed, beta)
        grad = jax.grad(analysed.problem.nudged)(at, analysed.meta_params, analysed.task, beta)
        assert float(jnp.linalg.norm(grad)) < 1e-13
    differences = finite_difference_meta_gradient(
        analysed.problem, analysed.meta_params, analysed.task, minimum(analysed, 0.0)
    )
    # Extrapolated differences with a step of 1e-3.
    assert relative_error(analysed.exact, flatten(differences)) < 2e-10


def test_the_contrast_is_that_of_the_package() -> None:
    """The same phases, run by a Newton learner inside `Contrastive`, weighted by the package."""
    analysed = build("logistic", seed=0)

    def newton(loss: Any, init: jax.Array) -> jax.Array:
        def step(_: Any, w: jax.Array) -> jax.Array:
            return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

        return jax.lax.fori_loop(0, 12, step, init)

    scheme = cm.forward_difference(0.05, matched=False)
    learner = cm.CallableSolver(newton)
    estimator = cm.Contrastive(learner, learner, scheme, cm.LossNudge(), estimate_error=False)
    result = estimator.estimate(analysed.problem, analysed.meta_params, analysed.task)
    ours = contrast(analysed, scheme, [minimum(analysed, beta) for beta in scheme.nudges])
    # Two minima to rounding, 1e-15, over a strength of 0.05 and a condition number of 100.
    assert relative_error(np.asarray(ours), flatten(result.grad)) < 1e-11


def test_descent_arrives_and_its_marks_are_on_one_way() -> None:
    analysed = build("ridge", seed=1)
    start = analysed.problem.init(analysed.meta_params, analysed.task)
    ends = descend(analysed, start, 0.1, (5, 20, 4000))
    (again,) = descend(analysed, ends[0], 0.1, (15,))
    np.testing.assert_allclose(again, ends[1], rtol=1e-12)
    np.testing.assert_allclose(ends[2], minimum(analysed, 0.1), rtol=1e-9)


@pytest.mark.parametrize(("order", "of_beta", "of_error"), [(1, 1 / 2, 1 / 2), (2, 1 / 3, 2 / 3)])
def test_fits_find_the_exponents_and_constants_of_a_known_law(order: int, of_beta: float, of_error: float) -> None:
    deltas, betas = np.geomspace(1e-8, 1e-4, 5), np.geomspace(1e-6, 1.0, 97)
    errors = 2 * deltas / betas[:, None] + 3 * betas[:, None] ** order
    best = np.argmin(errors, axis=0)
    found = analysis._slope(deltas, analysis._refined(betas, errors, best))
    assert abs(found - of_beta) < 2e-3  # of a grid of 16 strengths to the decade, by parabolas
    assert abs(analysis._slope(deltas, errors[best, np.arange(5)]) - of_error) < 2e-3
    bound = analysis._bound(errors, betas, deltas, order)
    # Of what is left of the least residual, 2e-8 / 0.03, beside 3 * 0.03^2.
    assert bound["c2"] == pytest.approx(3, rel=5e-4) and bound["c1"] == pytest.approx(2, rel=1e-2)
    assert bound["below"] == 1.0 or bound["bound_over_error"] == pytest.approx(1, rel=1e-2)


def test_a_claim_that_fails_is_said() -> None:
    def row(slope: float, seed: int) -> dict[str, Any]:
        return {"kind": "beta", "case": "ridge", "scheme": "forward", "slope": slope, "cosine": 1.0, "seed": seed}

    held = list(analysis.claims([row(1.05, 0), row(0.99, 1)]))
    assert [claim["held"] for claim in held] == [True, True]
    missed = list(analysis.claims([row(1.4, 0), row(1.2, 1)]))
    assert missed[0]["held"] is False and missed[0]["measured"] == pytest.approx(1.3)
    text = analysis.show([row(1.4, 0), row(1.2, 1)])
    assert "NO" in text and "1 of 2 claims" in text


def test_memory_that_grows_with_the_steps_is_told_from_memory_that_does_not() -> None:
    def rows(method: str, size: Any) -> list[dict[str, Any]]:
        steps = (10, 100, 1000)
        return [{"kind": "memory", "method": method, "num_steps": n, "temp_bytes": size(n)} for n in steps]

    def linear(n: int) -> int:
        return 7000 + 124 * n

    told = {c["claim"]: c for c in analysis.claims([*rows(CONTRASTIVE, lambda n: 9000), *rows(BACKPROP, linear)])}
    assert told[f"memory of {CONTRASTIVE} is the same for all numbers of steps"]["held"] is True
    exponent = told[f"memory of {BACKPROP} beyond that of 10 steps: exponent in the further steps is 1.00 +- 0.1"]
    assert exponent["measured"] == pytest.approx(1) and exponent["held"] is True
    told = {c["claim"]: c for c in analysis.claims([*rows(CONTRASTIVE, linear), *rows(BACKPROP, lambda n: n**2)])}
    assert [c["held"] for c in told.values()] == [False, True, False]


@pytest.mark.benchmarks
@pytest.mark.slow
def test_analysis_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "analysis", "--smoke", "--cases", "beta,memory"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/analysis.jsonl").read_text().splitlines()]
    claims = {row["claim"]: row["held"] for row in rows if row["kind"] == "claim"}
    assert claims and all(claims.values())
    assert "claims that could be decided hold" in capsys.readouterr().out
