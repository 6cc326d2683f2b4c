"""The benchmark `loops`: its exact answers are exact, it counts what is executed, its aims add up, and it runs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks import loops, loops_batch, loops_batch_cases, loops_cnn_network, loops_digits
from benchmarks.__main__ import main
from benchmarks.harness import Progress, Session
from benchmarks.loops_measure import ratio, time_in_turn
from benchmarks.loops_methods import DEFAULT, IMPLICIT_CG, JAXOPT, WITHOUT_ESTIMATE
from benchmarks.loops_problems import PROBLEMS, TEN_CLASSES, TWO_CLASSES, Task


def _session() -> Session:
    return Session("loops", Progress(), smoke=True)


@pytest.mark.parametrize("which", [TWO_CLASSES, TEN_CLASSES])
def test_the_exact_meta_gradient_is_that_of_another_estimator(which: str) -> None:
    problem = PROBLEMS[which]
    few = Task(*(leaf[:40] for leaf in problem.load(0)))
    log_strengths = jnp.full((64, problem.num_outputs), -1.0)
    solver = cm.LBFGS(tol=1e-11, max_steps=2000)
    estimator = cm.ImplicitDifferentiation(solver, cm.ConjugateGradient(tol=1e-12), estimate_error=False)
    implicit = jax.jit(lambda s: estimator.estimate(problem.losses, s, few))(log_strengths)
    exact = problem.exact(jnp.zeros_like(log_strengths), log_strengths, few)
    assert exact.rest < 1e-12 < exact.residual
    # The learner's 1e-11 over the smallest curvature, exp(-1), relative to a gradient of length 1e-2.
    np.testing.assert_allclose(implicit.grad, exact.grad, atol=1e-8 * float(jnp.max(jnp.abs(exact.grad))))


def test_two_classes_are_balanced_and_in_one_part_each() -> None:
    task = PROBLEMS[TWO_CLASSES].load(3)
    images = np.concatenate([task.x_train, task.x_val])
    assert images.shape == (361, 64) and len(np.unique(images, axis=0)) == 361
    assert set(np.asarray(task.y_train).tolist()) == {-1.0, 1.0}
    assert not np.array_equal(task.x_train, PROBLEMS[TWO_CLASSES].load(4).x_train)


def test_a_turn_that_raises_takes_nobody_along() -> None:
    calls: list[str] = []

    def fails() -> Any:
        raise ValueError("no")

    seconds, raised = time_in_turn(_session(), "test", {"good": lambda: calls.append("good"), "bad": fails}, 3)
    assert calls == ["good"] * 3 and len(seconds["good"]) == 3
    assert set(raised) == {"bad"} and set(seconds) == {"good"}
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_what_is_executed_is_counted_task_by_task() -> None:
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * jnp.sum((w - theta * task) ** 2),
        outer_loss=lambda w, theta, task: jnp.sum(w**2),
        init_params=lambda theta, task: jnp.zeros(3),
    )
    estimator = cm.FiniteDifference(cm.LBFGS(tol=0.0, max_steps=0))
    at = loops_batch_cases.Scenario(problem, estimator, jnp.array(1.0), jnp.arange(12.0).reshape(4, 3))
    counted = loops_batch.Counted(_session(), "test", at)
    one = counted.single(at.tasks[0])
    assert one > 0
    # Nothing depends on a task here: each executes the same.
    assert counted.batch(at.tasks) == 4 * one


def test_only_the_task_on_the_rim_falls_back() -> None:
    _, mixed = loops_batch_cases.wells(_session(), 4)
    at, _ = loops_batch_cases.wells(_session(), 4)
    apart = np.asarray(mixed["start"] - at.tasks["start"])
    np.testing.assert_allclose(np.abs(apart).max(axis=1), [0.0, 0.9, 0.0, 0.0])


def test_drawings_of_a_task_are_of_its_own_characters() -> None:
    images = loops_cnn_network.glyphs(0, num_characters=7, num_drawings=6, side=28)
    assert images.shape == (7, 6, 28, 28) and images.min() >= 0 and 0.5 < images.max() <= 1
    tasks = loops_cnn_network.draw_tasks(np.random.default_rng(0), images)
    assert tasks.x_train.shape == (4, 5, 28, 28, 1) and tasks.x_val.shape == (4, 25, 28, 28, 1)
    # The hand shakes less than characters differ: the nearest example tells the class, mostly.
    flat = np.asarray(tasks.x_train).reshape(4, 5, -1), np.asarray(tasks.x_val).reshape(4, 25, -1)
    nearest = np.argmin(((flat[1][:, :, None] - flat[0][:, None]) ** 2).sum(axis=-1), axis=-1)
    assert np.mean(nearest == np.asarray(tasks.y_val)) > 0.6
    params = loops_cnn_network.init_params(jax.random.key(0), loops_cnn_network.Size())
    assert jax.vmap(loops_cnn_network.logits, (None, 0))(params, tasks.x_train).shape == (4, 5, 5)


def _record(**fields: Any) -> dict[str, Any]:
    row = {
        "benchmark": "loops", "run": "a", "date": "2030-01-01", "seed": 0, "smoke": False, "precision": "float32",
        "case": "digits", "kind": "method", "problem": TEN_CLASSES, "method": DEFAULT, "seconds": 0.08,
        "all_seconds": [0.07, 0.09], "over": {IMPLICIT_CG: 2.0, JAXOPT: 0.3}, "compile_seconds": 10.0,
        "compile_cpu_seconds": 9.0, "operations": 18_000, "temp_bytes": 1000, "outer_loss": 0.1, "error": 1e-5,
        "statuses": {"CONVERGED": 2}, "all_num_gradients": [240, 600], "num_gradients": 600.0,
        "num_hvps": 0.0, "estimate": 2e-5,
        "estimate_over_error": 2.0,
        "environment": {"jax": "0.0", "cpu_count": 2, "device": "cpu", "commit": "0123456789"},
    }  # fmt: skip
    return row | fields


def test_aims_are_of_the_rows_and_shown_beside_what_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    rows = {
        DEFAULT: _record(),
        WITHOUT_ESTIMATE: _record(method=WITHOUT_ESTIMATE, all_num_gradients=[200, 500], estimate=None),
        IMPLICIT_CG: _record(method=IMPLICIT_CG, compile_cpu_seconds=4.5),
        JAXOPT: _record(method=JAXOPT, compile_cpu_seconds=3.0),
    }
    start = {(TEN_CLASSES, "float32"): {"seconds": 0.15, "compile_cpu_seconds": 1.5}}
    monkeypatch.setattr(loops_digits, "AT_START", start)
    aims = {aim: (target, measured) for aim, target, measured in loops_digits.aims(rows, TEN_CLASSES, "float32")}
    by_words = {words: pytest.approx(pair) for words, pair in aims.items()}
    assert by_words["time over jaxopt"] == (0.1, 0.3)
    # Twice as slow as implicit CG was: 0.3 of jaxopt's time, where that took 0.15.
    assert by_words["time over implicit CG at 66b8705, through jaxopt"] == (0.5, 2.0)
    assert by_words["gradients over those without an estimate"] == (1.3, 1.2)
    assert by_words["time to compile over implicit CG of the same commit"] == (1.3, 2.0)
    assert by_words["time to compile over implicit CG at 66b8705, through jaxopt"] == (1.3, 2.0)
    # Without the peers nothing is known of them.
    alone = {aim: m for aim, _, m in loops_digits.aims({DEFAULT: rows[DEFAULT]}, TEN_CLASSES, "float32")}
    assert set(alone.values()) == {None}
    told = [_record(kind="aim", aim=aim, target=pair[0], measured=pair[1]) for aim, pair in aims.items()]
    raised = _record(method="a peer", status="RAISED", error="ValueError: no")
    del raised["seconds"]
    text = loops.show([*rows.values(), raised, *told])
    assert "a peer: RAISED, ValueError: no" in text and "1 of 7 aims that could be measured are reached" in text
    assert "commit 0123456" in text and "over the true error 2.00" in text
    assert loops.draw(list(rows.values()), tmp_path)[0].read_bytes().startswith(b"\x89PNG")


def test_a_part_that_does_not_exist_is_refused() -> None:
    session = _session()
    session.cases = ("digit",)
    with pytest.raises(SystemExit, match="digits"):
        loops.run(session)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_loops_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "loops", "--smoke", "--only", "digits,batch"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/loops.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"digits", "batch"}
    assert {row["kind"] for row in rows} == {"method", "aim"}
    errors = {row["method"]: row["error"] for row in rows if row["case"] == "digits" and "errors" in row}
    assert errors[DEFAULT] < 1e-3 and errors[IMPLICIT_CG] < 3e-2
    assert "aimed at" in capsys.readouterr().out
