"""The experiment `bilevel_suite`: every method heads for the true minimum, calls are what is counted, it runs small."""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks.__main__ import main
from benchmarks.experiments import bilevel_suite
from benchmarks.experiments.bilevel_suite_methods import F2SA, METHODS, OURS, SABA, SOBA, STOCBIO, Choice
from benchmarks.experiments.bilevel_suite_problems import QUADRATIC, Sizes, quadratic

SUITE = quadratic(0, Sizes(40, 10), None)


def _minimum() -> tuple[Any, Any]:
    """Of the quadratic, in closed form: H z = g - E x, and the outer least squares in x."""
    train, val = SUITE.whole
    a, e = np.asarray(train.x[:, :20]), np.asarray(train.x[:, 20:])
    hessian = a.T @ a / 40 + 0.1 * np.eye(20)
    offset, slope = np.linalg.solve(hessian, a.T @ train.y / 40), -np.linalg.solve(hessian, a.T @ e / 40)
    c = np.asarray(val.x)
    x = np.linalg.solve(slope.T @ c.T @ c @ slope / 40 + 0.1 * np.eye(10), slope.T @ c.T @ (val.y - c @ offset) / 40)
    return offset + slope @ x, x


def test_the_norm_is_zero_at_the_minimum_alone() -> None:
    z, x = _minimum()
    norms = bilevel_suite._Norms(SUITE)(SUITE, jnp.stack([jnp.asarray(x), SUITE.meta_params, jnp.full(10, jnp.nan)]))
    assert norms[0] < 1e-6 < norms[1] and norms[2] == np.inf
    gradients = jax.grad(SUITE.problem.inner)(jnp.asarray(z), jnp.asarray(x), SUITE.whole)
    assert jnp.linalg.norm(gradients) < 1e-10


@pytest.mark.parametrize("name", [OURS, SOBA, SABA, STOCBIO, F2SA, "F2SA-2", "F2SA-4"])
def test_methods_approach_the_minimum(name: str) -> None:
    """With whole batches there is no noise: SOBA and SABA find it, finite differences and ten terms are biased."""
    _, x = _minimum()
    train, val = jax.tree.map(lambda leaf: leaf[None], SUITE.whole)
    full = SUITE._replace(train=train, val=val)
    method = METHODS[name]
    # A penalty of 10 is a nudge of .1; the meta-steps of F2SA are multiplied by it.
    inner, outer, strength = {F2SA: (0.4, 0.03, 10.0)}.get(name, (0.2, 0.01 if method.is_normalised else 0.1, 0.01))
    choice = Choice(*map(jnp.asarray, (inner, outer, strength)))
    num_steps = {F2SA: 8000, STOCBIO: 1000}.get(name, 4000)

    @jax.jit
    def run() -> Any:
        def step(state: Any, number: jax.Array) -> Any:
            return method.step(
                full, choice, num_steps, state, number, jax.random.fold_in(jax.random.key(1), number)
            ), None

        state, _ = jax.lax.scan(step, method.start(full, choice, num_steps), jnp.arange(num_steps))
        return state[0]

    error = float(np.linalg.norm(run() - x) / np.linalg.norm(x))
    assert error < {SOBA: 1e-3, SABA: 1e-3, STOCBIO: 0.3, F2SA: 0.1}.get(name, 3e-2)


def test_calls_are_counted() -> None:
    assert {name: METHODS[name].calls for name in (OURS, SOBA, STOCBIO, F2SA)} == {
        OURS: 6,
        SOBA: 5,
        STOCBIO: 23,
        F2SA: 6,
    }
    assert METHODS["F2SA-2"].calls == 2 * (2 * 5 + 2) and METHODS[SABA].first_calls(4, 3) == 3 * 4 + 2 * 3


def test_claims_at_equal_calls_and_time() -> None:
    def row(name: str, seed: int, norms: list[float], seconds: float) -> dict[str, Any]:
        return {
            "kind": "method", "problem": QUADRATIC, "method": name, "seed": seed, "norms": norms,
            "seconds": [0.0, seconds / 2, seconds], "calls": [0, 5, 10], "chosen": [0.1, 1.0, 0.0],
        }  # fmt: skip

    rows = [row(OURS, s, [1.0, 0.5, 0.1], 2.0) for s in (1, 2)] + [row(SOBA, s, [1.0, 0.4, 0.2], 1.0) for s in (1, 2)]
    told = [*bilevel_suite.claims(rows)]
    assert [claim["held"] for claim in told] == [True, False]
    np.testing.assert_allclose([claim["measured"] for claim in told], [np.log(2), np.log(0.2 / 0.5)])
    assert "single loop" in bilevel_suite.show(rows)


def test_the_solver_file_runs_against_a_stand_in_of_the_suite(monkeypatch: Any) -> None:
    """Benchopt is not installed here: its base class is a stand-in, and losses are as its suite hands them over."""
    stand_in: Any = types.ModuleType("benchopt")
    stand_in.BaseSolver = object
    monkeypatch.setitem(sys.modules, "benchopt", stand_in)
    sys.modules.pop("benchmarks.experiments.bilevel_suite_solver", None)
    module: Any = importlib.import_module("benchmarks.experiments.bilevel_suite_solver")
    solver = module.Solver()
    for name, values in (module.Solver.parameters | {"batch_size": [10], "eval_freq": [50]}).items():
        setattr(solver, name, values[0])

    def loss(function: Any) -> Any:
        def of(z: Any, x: Any, start: Any = 0, batch_size: int = 40) -> Any:
            rows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), SUITE.whole)
            return function(z, x, rows)

        return of

    inner, outer = loss(SUITE.problem.inner), loss(SUITE.problem.outer)
    solver.set_objective(
        f_inner=inner, f_outer=outer, n_inner_samples=40, n_outer_samples=40, inner_var0=SUITE.params,
        outer_var0=SUITE.meta_params, f_inner_fb=inner, f_outer_fb=outer,
    )  # fmt: skip
    left = iter([True] * 20 + [False])
    solver.run(lambda: next(left))
    result = solver.get_result()
    _, x = _minimum()
    assert np.linalg.norm(result["outer_var"] - x) < 0.5 * np.linalg.norm(x)
    assert np.isfinite(result["inner_var"]).all()


@pytest.mark.benchmarks
@pytest.mark.slow
def test_bilevel_suite_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "bilevel_suite", "--smoke", "--cases", f"{QUADRATIC},{SOBA}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/bilevel_suite.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == [SOBA] and len(rows[0]["norms"]) == 3
    assert "quadratic" in capsys.readouterr().out
