"""The benchmark `trust`: its cases and their two halves, its exact answers, and the verdicts from records."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks import trust, trust_figures, trust_tables
from benchmarks.__main__ import main
from benchmarks.harness import precision, relative_error
from benchmarks.trust_cases import (
    CALIBRATION,
    FAMILIES,
    HALVES,
    HELD_OUT,
    SCALINGS,
    SMOKE_FAMILIES,
    TOLERANCES,
    Case,
    ScaledTask,
    cases,
    scaled,
)
from benchmarks.trust_reference import Minimum, Ready, prepare

ALL = [case for family in FAMILIES for case in cases(family, trust.NUM_SEEDS, (False, True))]


def _row(**fields: Any) -> dict[str, Any]:
    row = {
        "benchmark": "trust", "kind": "case", "case": "ridge", "title": "Ridge", "half": HELD_OUT, "convex": True,
        "data_seed": 0, "meta_seed": 0, "tolerance": 1e-2, "scaling": "as it is", "warm": False,
        "precision": "float64", "reference_converged": True, "floor": 1e-12, "free_gradients": 10,
        "status": "CONVERGED", "error": 1e-6, "estimate": 1e-6, "cost": 30, "displacement": 1e-6,
        "displacements": [1e-6, 1e-3, 1.0], "target": None,
        "swept": {"error": [1e-5, 1e-6, None], "cost": [20, 30, 40], "status": ["CONVERGED"] * 3},
    }  # fmt: skip
    return row | fields


def _promise(rows: list[dict[str, Any]], text: str, of: str = "convex") -> trust_tables.Promise:
    (found,) = [p for p in trust_tables.promises(rows) if p.of == of and text in p.text]
    return found


def test_there_are_enough_cases_also_without_data_files() -> None:
    at_hand = [case for case in ALL if case.family.name not in ("ijcnn1", "a9a", "newsgroups", "MLP ijcnn1")]
    assert sum(case.family.convex for case in at_hand) >= 200
    assert sum(not case.family.convex for case in at_hand) >= 100
    assert len(set(map(_identity, ALL))) == len(ALL)
    varied = {(c.x64, c.tolerance, c.scaling.name) for c in ALL if c.family is FAMILIES[0]}
    assert varied == set(itertools.product((False, True), TOLERANCES, [scaling.name for scaling in SCALINGS]))
    # Networks start from scratch and from an outer loop's last solution; half of them each.
    assert {case.warm for case in ALL if not case.family.convex} == {False, True}
    assert not any(case.warm for case in ALL if case.family.convex)


def _identity(case: Case) -> tuple[Any, ...]:
    return (case.family.name, *case[1:5], case.scaling.name)


def test_the_halves_share_no_problem_and_no_seed() -> None:
    names, seeds = ({half: {get(c) for c in ALL if c.family.half == half} for half in HALVES} for get in (
        lambda case: case.family.name, lambda case: case.data_seed))  # fmt: skip
    for found in (names, seeds):
        assert found[CALIBRATION] and found[HELD_OUT] and not found[CALIBRATION] & found[HELD_OUT]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.name)
def test_other_units_are_the_same_problem(scaling: Any) -> None:
    instance = cm.problems.quadratic(jax.random.key(0), dim=4, num_meta=2)
    start = jnp.arange(4.0)
    task = ScaledTask(instance.task, start, jnp.asarray(scaling.outer), jnp.asarray(scaling.unit))
    problem = scaled(instance.problem)
    exact = cm.problems.exact_meta_gradient(problem, instance.meta_params, task)
    closed = instance.exact(instance.meta_params, instance.task)
    # The numbers that the benchmark converts by. The condition number is 10: rounding of 1e-14 and less.
    assert relative_error(exact.params, np.asarray(closed.params) / scaling.unit) < 1e-12
    assert relative_error(exact.grad, scaling.outer * trust.flatten(closed.grad)) < 1e-12
    np.testing.assert_allclose(problem.init(instance.meta_params, task) * scaling.unit, start, rtol=1e-15)


def test_the_exact_answer_is_of_the_rounded_numbers() -> None:
    family = SMOKE_FAMILIES[0]
    case = next(cases(family, 1, (False,)))
    ready = prepare(case, None)
    assert {leaf.dtype for leaf in jax.tree.leaves((ready.meta_params, ready.data, ready.start))} == {
        np.dtype(np.float32)
    }
    minimum = ready.minimum(ready.start)
    assert minimum.converged and len(ready.minima) == 1
    # In closed form, of float64 copies of the float32 numbers; those of the unrounded problem are 1e-8 away.
    upcast = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (ready.meta_params, ready.data))
    quadratic = cm.problems.quadratic(jax.random.key(0), dim=5).exact
    assert quadratic is not None
    assert relative_error(quadratic(*upcast).grad, minimum.grad) < 1e-12
    assert not jnp.allclose(ready.meta_params["drive"], family.build(0, None).meta_params["drive"])
    # 1.01 and 0.1 are the eigenvalues before the strengths are moved.
    assert minimum.largest / minimum.least == pytest.approx(10, rel=0.5)
    assert ready.step_size * minimum.largest < 1


def _double_well() -> Ready:
    """L_in = (w^2 - 1)^2 / 4 - theta w: minima near 1 and -1, a maximum near 0."""
    losses = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w**2 - 1) ** 2 / 4 - theta * w),
        outer_loss=lambda w, theta, task: jnp.sum(w),
        init_params=lambda theta, task: jnp.ones(1),
    )
    return Ready(losses, jnp.zeros(1), None, jnp.ones(1), convex=False)


def test_a_network_is_held_to_the_minimum_that_its_own_learning_approaches() -> None:
    ready = _double_well()
    right, left, again = (ready.minimum(jnp.array([start])) for start in (0.8, -1.3, 1.1))
    # Curvature 3 w^2 - 1 = 2 at both, so dw/dtheta = 1/2.
    np.testing.assert_allclose([right.params[0], left.params[0]], [1.0, -1.0], atol=1e-9)
    np.testing.assert_allclose([right.grad[0], left.grad[0]], 0.5, rtol=1e-9)
    assert again is right and len(ready.minima) == 2
    # Learning that stopped on top of the hill: a point, but no minimum.
    hill = ready.minimum(jnp.zeros(1))
    assert not hill.converged and hill.least < 0 and math.isinf(hill.floor(x64=True))


def test_floors() -> None:
    flat, steep = (Minimum(np.ones(1), np.ones(1), True, least, 1.0) for least in (1.0, 1e-4))
    eps = np.finfo(np.float32).eps
    assert flat.floor(x64=False) == pytest.approx(10 * eps)
    assert steep.floor(x64=False) == pytest.approx(1e4 * eps)


def test_errors_below_the_floor_count_as_the_floor() -> None:
    assert trust_tables.regret(_row()) == 1.0
    assert trust_tables.regret(_row(error=4e-6)) == pytest.approx(4.0)
    assert trust_tables.regret(_row(error=4e-6, floor=2e-6)) == pytest.approx(2.0)
    assert trust_tables.regret(_row(error=None)) == math.inf
    assert trust_tables.told(_row(estimate=2e-7, floor=1e-6)) == 1.0
    assert trust_tables.told(_row(estimate=2e-7, floor=1e-6), floored=False) == pytest.approx(0.2)
    assert math.isnan(trust_tables.told(_row(estimate=None)))
    # A gradient of NaN that was called good: nothing could be further below.
    assert trust_tables.told(_row(error=None)) == 0.0


def test_hindsight_does_not_count_on_luck() -> None:
    """Errors fall to 2e-8 and rise again; that a noisy one of 1e-9 was lucky nobody could know."""
    errors = [1e-6, 1e-9, 1e-7, 3e-8, 2e-8, 2.5e-8, None]
    row = _row(swept={"error": errors, "cost": [1] * 7, "status": ["CONVERGED"] * 7})
    assert trust_tables.regret_by_hindsight(row) == pytest.approx(20.0)
    assert trust_tables.regret_by_hindsight(row | {"floor": 1e-8}) == pytest.approx(2.0)


def test_a_low_estimate_must_be_flagged() -> None:
    rows = [_row() for _ in range(100)] + [_row(estimate=1e-7, status="LOST_IN_NOISE")]
    low, silent = (_promise(rows, text) for text in ("below a third", "flagged by no status"))
    assert low.value == pytest.approx(1 / 101) and low.verdict == "kept"
    assert (silent.value, silent.verdict) == (0.0, "kept")
    rows[-1]["status"] = "FELL_BACK"
    assert _promise(rows, "flagged by no status").verdict == "MISSED"
    assert _promise(rows, "within a factor 3").value == pytest.approx(100 / 101)


def test_a_target_is_met_where_the_status_says_so() -> None:
    """One of ten is called converged and is not accurate: 9 of 10 right is too few, 10 of 10 called is enough."""
    met = {"status": "CONVERGED", "error": 1e-3, "estimate": 9e-4, "cost": 40}
    rows = [_row(target=met) for _ in range(9)] + [_row(target=met | {"error": 3e-3})]
    assert _promise(rows, "asked for 1e-3", "convex float64").value == pytest.approx(0.9)
    assert _promise(rows, "asked for 1e-3", "convex float64").verdict == "MISSED"
    assert _promise(rows, "called converged, share", "convex float64").verdict == "kept"
    # Said not to be reached, it is not held against the first promise, but against the second.
    rows[-1]["target"] = met | {"error": 3e-3, "status": "NUDGED_NOT_CONVERGED"}
    assert _promise(rows, "asked for 1e-3", "convex float64").verdict == "kept"
    assert _promise(rows, "called converged, share", "convex float64").value == pytest.approx(0.9)
    # Without the option there is a number and no verdict.
    assert _promise([_row()], "not asked for 1e-3", "convex float64").verdict == ""


def test_cost_is_against_the_best_strength() -> None:
    row = _row(cost=45, trained={"num_steps": 50, "cost": 110, "oracle_cost": 100})
    assert _promise([row], "of the best strength").value == pytest.approx(1.5)
    assert _promise([row], "nudged phases alone").value == pytest.approx(35 / 20)
    assert _promise([row], "training loop").value == pytest.approx(1.1)


def test_what_is_left_out_is_said_and_verdicts_are_for_the_held_out_half() -> None:
    failed = _row(kind="failed", error_text="ValueError: no")
    saddle = _row(reference_converged=False, case="MLP")
    text = trust_tables.show([_row(error=1e-3), _row(half=CALIBRATION), failed, saddle])
    assert "the calibration half: 1 cases" in text and "the held-out half: 1 cases" in text
    assert text.index("MISSED") > text.index("held-out")
    assert "ValueError: no" in text and "left out: MLP 0" in text and "1 cases stand out" in text


def test_pictures_show_every_case_also_those_that_are_not_finite(tmp_path: Path) -> None:
    rows = [_row(), _row(error=None, estimate=None, status="NOT_FINITE"), _row(half=CALIBRATION, convex=False)]
    assert trust_figures._point(rows[1]) == (10.0, 10.0)
    for path in trust.draw(rows, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert trust.draw([_row(kind="failed")], tmp_path) == []


@pytest.mark.benchmarks
def test_trust_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "trust", "--smoke", "--half", "calibration"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/trust.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"case"} and {row["half"] for row in rows} == {CALIBRATION}
    assert len(rows) == len(TOLERANCES) * len(SCALINGS)
    for row in rows:
        # A quadratic in float32: every strength but those lost in rounding is right, and so is the default.
        assert row["precision"] == "float32" and row["reference_converged"]
        assert row["error"] < 1e-3 and min(row["swept"]["error"]) < 1e-4
        assert row["swept"]["error"][0] > 10 * min(row["swept"]["error"])
        assert row["free_distance"] > row["base_distance"]
    trained = [row["trained"] for row in rows if row.get("trained")]
    assert len(trained) == 1 and trained[0]["cost"] > rows[0]["cost"]
    assert "Trust, the calibration half: 6 cases" in capsys.readouterr().out
    with precision(False), pytest.raises(SystemExit, match="trust has no problem nope"):
        main(["run", "trust", "--smoke", "--cases", "nope"])
