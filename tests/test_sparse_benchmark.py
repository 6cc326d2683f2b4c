"""The benchmark `sparse`: its cases are the same for all who select, its table adds up, and it runs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks import report, sparse, sparse_methods
from benchmarks.__main__ import main
from benchmarks.sparse_cases import CASES
from benchmarks.speed_peers import imported, installed


def _record(**fields: Any) -> dict[str, Any]:
    row = {
        "benchmark": "sparse", "run": "a", "date": "2030-01-01", "seed": 0, "smoke": False, "precision": "float64",
        "case": "lasso", "title": "lasso, 200 x 50", "method": sparse.CONTRAST, "status": "",
        "losses": [3.0, 2.02, 2.04],
        "lowest_of_grid": 2.0, "best": 2.02, "excess": 0.01, "steps_to_target": 1, "num_steps": 3, "seconds": 0.5,
        "spread": 0.1, "compile_seconds": 9.0, "num_weights": 22, "statuses": {"CONVERGED": 2, "NOT_SMOOTH": 1},
        "environment": {"jax": "0.0", "cpu_count": 2, "device": "cpu"},
    }  # fmt: skip
    return row | fields


ROWS = [
    _record(method=sparse.GRID, losses=None, num_steps=200, excess=0.0, statuses=None, steps_to_target=None),
    _record(),
    _record(method=sparse.JAXOPT, seconds=1.0, statuses=None),
    _record(method=sparse.SPARHO, status="NOT_INSTALLED", error="not installed: pip install sparho", losses=None),
]


def test_the_table_says_how_close_and_how_fast(tmp_path: Path) -> None:
    text = sparse.show(ROWS)
    assert "grid of 200" in text and "1.000" in text and "within 1 % of the grid's minimum on 1 of 1" in text
    assert (
        "0.50 times the search time of jaxopt" in " ".join(text.split())
        and "sparho: not installed: pip install sparho." in text
    )
    contrast = next(line for line in text.splitlines() if line.lstrip().startswith("contrast") or " contrast " in line)
    # One of the three statuses is a failure.
    assert contrast.split()[-1] == "1"
    block = report.render_shown_block(ROWS, sparse)
    assert text in block and "python -m benchmarks run sparse" in block
    assert sparse.draw(ROWS, tmp_path)[0].read_bytes().startswith(b"\x89PNG")


def test_a_search_is_read_against_the_grid() -> None:
    searched = sparse_methods.Searched(
        np.array([[0.0], [1.0], [2.0]]), np.array([0, 0, cm.Status.NOT_SMOOTH]), [1, 2, 3]
    )
    row = sparse_methods.read(searched, np.array([3.0, 2.019, 2.1]), np.array([5, 6, 7]), lowest=2.0)
    assert (row["steps_to_target"], row["num_weights"], row["num_gradients"]) == (1, 6, 6)
    assert row["excess"] == pytest.approx(0.0095) and row["selected"] == [1.0]
    assert row["statuses"] == {"CONVERGED": 2, "NOT_SMOOTH": 1}
    assert sparse_methods.read(searched, np.full(3, 2.1), np.zeros(3), lowest=2.0)["steps_to_target"] is None


@pytest.mark.parametrize("name", [name for name in CASES if name != "logistic"])
def test_jaxopt_has_the_same_penalties(name: str) -> None:
    """The same proximal step from the same point; the newsgroups' is the lasso's, and their data are not here."""
    if not installed(sparse.JAXOPT):
        pytest.skip('needs pip install ".[peers]"')
    case = CASES[name]
    jaxopt = imported(sparse.JAXOPT)
    s, step = jnp.array([-0.3, 0.4])[: len(case.hyperparameters)], 0.7
    points = jnp.linspace(-4.0, 4.0, 33)
    operator = getattr(jaxopt.projection if case.peer.is_projection else jaxopt.prox, case.peer.prox)
    settings = case.peer.settings(s)
    theirs = operator(points, settings) if case.peer.is_projection else operator(points, settings, step)
    np.testing.assert_allclose(case.penalty.prox(points, s, step), theirs, atol=1e-14)


@pytest.mark.parametrize("name", ["lasso", "elastic net"])
def test_grid_and_search_of_sparho_have_the_same_models(name: str) -> None:
    """Coordinate descent and proximal descent end at the same validation loss."""
    if not installed(sparse.SPARHO):
        pytest.skip("needs pip install sparho")
    case = CASES[name]
    task = case.load(0, None, True)
    start = case.start(task) + 1.0
    search = sparse_methods.by_sparho(case, start, task)
    visited = search().visited[:3]
    judged = jax.jit(sparse_methods.judge(case))(jnp.asarray(visited), jax.tree.map(jnp.asarray, task))
    sparho = imported(sparse.SPARHO)
    adapter = getattr(sparho.adapters, case.peer.sparho[2])(tol=1e-12)
    penalty = sparho.L1() if name == "lasso" else sparho.ElasticNet(rho=0.5)
    problem = sparho.Problem(sparho.SquaredLoss(), penalty, task["x"], task["y"])
    for point, loss in zip(visited, judged.losses, strict=True):
        w = adapter(problem, float(np.exp(point[0]))).coef
        # The judge's residual, 1e-6, over the least curvature, 0.25, times an outer gradient below 1; a loss of 2.
        assert float(case.outer_loss(w, point, task)) == pytest.approx(float(loss), rel=2e-6)


def test_where_searches_start_all_weights_but_few_are_in() -> None:
    """A hundredth of the strength at which the last weight leaves: at that one, all are 0."""
    case = CASES["lasso"]
    task = case.load(0, None, True)
    start = case.start(task)
    points = jnp.asarray(start + np.log([[99.9], [100.1]]))
    judged = jax.jit(sparse_methods.judge(case))(points, jax.tree.map(jnp.asarray, task))
    assert judged.num_weights.tolist() == [1, 0]


@pytest.mark.benchmarks
@pytest.mark.slow
def test_sparse_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "sparse", "--smoke"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/sparse.jsonl").read_text().splitlines()]
    ours = next(row for row in rows if row["method"] == sparse.CONTRAST)
    # The grid in small is of 20 points, so that a search may well end below its minimum.
    assert ours["steps_to_target"] is not None and ours["num_steps"] == sparse.NUM_STEPS
    assert (tmp_path / "results/sparse.png").exists()
    assert "within 1 %" in capsys.readouterr().out
