"""The experiment `regularisation`: losses are what they say, data do not overlap, claims add up, it runs in small."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks.__main__ import main
from benchmarks.data import DataMissingError
from benchmarks.experiments import regularisation
from benchmarks.experiments.regularisation_methods import CONTRAST, GRID, NONE, T1_T2, TRUNCATED
from benchmarks.experiments.regularisation_problems import (
    CIFAR,
    MNIST,
    NUISANCE,
    accuracy,
    cases,
    problem,
    strengths,
    told_apart,
)


def test_losses_written_out() -> None:
    case = cases(num=6, width=3)[NUISANCE]
    task = case.load(5, None)
    log_strengths = strengths(task, 0.2)
    log_strengths["readout"]["bias"] = log_strengths["readout"]["bias"].at[0].set(jnp.log(0.7))
    params = jax.tree.map(lambda leaf: leaf + 0.1, task.start)

    def scores(x: Any) -> Any:
        for name in ("hidden_0", "hidden_1"):
            x = np.tanh(x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"]))
        return x @ np.asarray(params["readout"]["kernel"]) + np.asarray(params["readout"]["bias"])

    def loss(x: Any, y: Any) -> Any:
        z = scores(np.asarray(x))
        return np.mean(np.log(np.sum(np.exp(z), axis=1)) - z[np.arange(len(y)), np.asarray(y)])

    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))
    penalty = 0.1 * squares + 0.25 * float(params["readout"]["bias"][0]) ** 2
    bilevel = problem(case)
    # Single precision throughout: sums of some 500 squares.
    np.testing.assert_allclose(
        bilevel.inner(params, log_strengths, task), loss(task.x_train, task.y_train) + penalty, rtol=1e-5
    )
    np.testing.assert_allclose(bilevel.outer(params, log_strengths, task), loss(task.x_val, task.y_val), rtol=1e-5)
    right = np.mean(np.argmax(scores(np.asarray(task.x_test)), axis=1) == np.asarray(task.y_test))
    np.testing.assert_allclose(accuracy(case, params, task.x_test, task.y_test), right)


def test_parts_do_not_overlap() -> None:
    tasks = [cases(num=20)[NUISANCE].load(seed, None) for seed in (1, 1, 2)]
    rows = [
        {part.tobytes() for part in np.asarray(x)[:, :64]} for x in (tasks[0].x_train, tasks[0].x_val, tasks[0].x_test)
    ]
    assert [len(part) for part in rows[:2]] == [20, 20] and tasks[0].x_test.shape == (1757, 128)
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    np.testing.assert_array_equal(tasks[0].x_train, tasks[1].x_train)
    assert not np.array_equal(tasks[0].x_train, tasks[2].x_train)
    # Standardised by what is learned from; noise has mean 0 and deviation 1 up to 1 / sqrt(1757 * 64).
    np.testing.assert_allclose(np.mean(tasks[0].x_train[:, :64], axis=0), 0, atol=1e-6)
    noise = np.asarray(tasks[0].x_test)[:, 64:]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize(("name", "shape"), [(MNIST, (196,)), (CIFAR, (32, 32, 3))])
def test_images_are_split_by_the_seed(name: str, shape: tuple[int, ...]) -> None:
    case = cases(num=10, width=3)[name]
    try:
        task = case.load(1, None)
    except DataMissingError as error:
        pytest.skip(str(error))
    assert task.x_train.shape == task.x_val.shape == (10, *shape) and task.x_test.shape == (2000, *shape)
    assert case.apply(task.start, task.x_val).shape == (10, 10)
    # Standardised pixels of two thousand images.
    assert abs(float(jnp.mean(task.x_test))) < 0.1 and 0.7 < float(jnp.std(task.x_test)) < 1.1


def test_nuisances_are_told_apart_by_the_mean_strength_of_their_synapses() -> None:
    case = cases(num=20, width=2)[NUISANCE]
    task = case.load(1, None)
    held = strengths(task, 1.0)
    assert told_apart(case, held, task) == 0.5
    kernel = jnp.zeros((128, 2)).at[64:].set(jnp.array([3.0, -1.0]))
    assert told_apart(case, {"hidden_0": {"kernel": kernel}}, task) == 1.0
    constant = int(np.argmin(np.std(np.asarray(task.x_train), axis=0)))
    assert told_apart(case, {"hidden_0": {"kernel": kernel.at[constant].set(9.0)}}, task) == 1.0
    assert told_apart(cases()[MNIST], held, task) is None


def _rows(method: str, accuracies: list[float], **fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "method", "case": NUISANCE, "method": method, "seed": seed, "test_accuracy": value,
            "val_accuracy": 0.9, "at_equal_time": {"test_accuracy": value}, "auc": None, "seconds": 1.0,
            "at_equal_gradients": {"test_accuracy": value}, "num_gradients": 7, "passed": 1.0, "stopped": "", **fields,
        }
        for seed, value in enumerate(accuracies)
    ]  # fmt: skip


def test_claims_are_of_differences_seed_by_seed() -> None:
    rows = _rows(CONTRAST, [0.90, 0.92], auc=0.95) + _rows(T1_T2, [0.89, 0.90]) + _rows(NONE, [0.95, 0.85])
    rows += _rows(GRID, [0.90, 0.924], best_test_accuracy=0.93)
    told = {claim["claim"]: claim for claim in regularisation.claims(rows)}
    by_grid = f"{NUISANCE}: test accuracy of contrast less that of"
    chosen = told[f"{by_grid} the strength chosen from the grid on validation data"]
    assert chosen["measured"] == pytest.approx(-0.002) and chosen["held"] is True
    assert told[f"{by_grid} the grid's best on the test data themselves"]["held"] is False
    assert told[f"{NUISANCE}: contrast tests better than {T1_T2}"]["held"] is True
    # By -5 and by 7 points: 1 +- 8.5.
    assert told[f"{NUISANCE}: contrast tests better than {NONE}"]["held"] is False
    assert told[f"{NUISANCE}: contrast tests better than {TRUNCATED} at equal time"]["held"] is None
    assert told[f"{NUISANCE}: contrast holds nuisances more strongly than signals (AUC)"]["held"] is True
    sizes = [(CONTRAST, 10, 100), (CONTRAST, 100, 101), ("backprop", 10, 100), ("backprop", 100, 400)]
    rows += [
        {"kind": "memory", "case": NUISANCE, "method": method, "num_steps": num, "temp_bytes": size}
        for method, num, size in sizes
    ]
    told = {claim["claim"]: claim["held"] for claim in regularisation.claims(rows)}
    assert told[f"{NUISANCE}: memory of {CONTRAST}, 100 steps over 10"] is True
    assert told[f"{NUISANCE}: memory of backprop, 100 steps over 10"] is False
    assert "91.0" in regularisation.show(rows)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_regularisation_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "regularisation", "--smoke"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/regularisation.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "method"]
    assert [row["method"] for row in trained] == [GRID, NONE, CONTRAST, TRUNCATED]
    assert all(0 <= row["test_accuracy"] <= 1 and row["num_gradients"] > 0 for row in trained)
    assert all(row["num_steps"] == 2 and not row["stopped"] for row in trained[2:])
    assert "claims that could be decided hold" in capsys.readouterr().out
