"""The experiment `sinusoids`: errors are what they say, claims add up, and it runs in small."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks.__main__ import main
from benchmarks.experiments import sinusoids
from benchmarks.experiments.sinusoids_methods import (
    ANCHOR,
    ANIL,
    CAVIA,
    CONSTANT,
    FOMAML,
    GAINS,
    MAML,
    REPTILE,
    WEAK,
    Steps,
    mean_squared_error,
    methods,
)
from benchmarks.meta_training import Snapshot, within
from contrastive_meta.problems import sinusoid_tasks

KEY = jax.random.key(0)


def test_methods_start_from_the_same_network() -> None:
    made = methods(Steps(4, 3), widths=(4, 4))
    anchor = made[ANCHOR].build(KEY).meta_params["anchor"]
    for name in (MAML, FOMAML, REPTILE, WEAK, CONSTANT):
        for ours, theirs in zip(
            jax.tree.leaves(made[name].build(KEY).meta_params["anchor"]), jax.tree.leaves(anchor), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert sorted(made[CAVIA].build(KEY).meta_params["fast"]["anchor"]) == ["context"]
    assert sorted(made[ANIL].build(KEY).meta_params["fast"]["anchor"]) == ["readout/bias", "readout/kernel"]
    assert "hidden_1/gain" in made[GAINS].build(KEY).meta_params["fast"]["anchor"]


def test_the_error_is_of_the_learned_task() -> None:
    """Written out: ten steps of gradient descent on the sum of squares of a ReLU network, then the mean of squares."""
    made = methods(Steps(4, 3), widths=(4, 4))[MAML]
    split = made.build(KEY)
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid_tasks(KEY, 1))

    def network(w: Any, x: jax.Array) -> jax.Array:
        for name in ("hidden_0", "hidden_1"):
            x = jnp.maximum(x @ w[name]["kernel"] + w[name]["bias"], 0)
        return (x @ w["readout"]["kernel"] + w["readout"]["bias"])[:, 0]

    w = split.meta_params["anchor"]
    for _ in range(10):
        grad = jax.grad(lambda w: jnp.sum((network(w, task.x_train) - task.y_train) ** 2))(w)
        w = jax.tree.map(lambda a, g: a - 1e-3 * g, w, grad)
    expected = jnp.mean((network(w, task.x_val) - task.y_val) ** 2)
    found = mean_squared_error(split, made.learner, split.meta_params, task)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_snapshot_within_a_budget() -> None:
    snapshots = [Snapshot(k, 10 * k, 2.0 * k, None) for k in range(1, 6)]
    assert within(snapshots, seconds=7.9).step == 3
    assert within(snapshots, num_gradients=20).step == 2
    assert within(snapshots, seconds=8, num_gradients=30).step == 3
    assert within(snapshots, seconds=1).step == 1


def _rows(case: str, errors: list[float]) -> list[dict[str, Any]]:
    same = ("error", "error_at_equal_time", "error_at_equal_gradients")
    return [
        {
            "kind": "method", "case": case, "seed": seed, "error_unlearned": 4.0, **dict.fromkeys(same, error),
            "seconds": 1.0, "num_steps": 2, "passed": 1.0, "stopped": "",
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


def test_claims_are_of_ratios_and_logarithms() -> None:
    rows = _rows(ANCHOR, [0.2, 0.25]) + _rows(MAML, [0.2, 0.2]) + _rows(FOMAML, [0.8, 0.8]) + _rows(WEAK, [0.2, 2.0])
    told = {claim["claim"]: claim for claim in sinusoids.claims(rows)}
    fallen = told["R6: error of the unlearned anchor over the learned one"]
    assert fallen["measured"] == pytest.approx((20 + 16) / 2) and fallen["held"] is True
    assert told["R6: error of the anchor over MAML's, each at its own budget"]["measured"] == pytest.approx(1.125)
    assert told["R6: FOMAML errs more than MAML (logarithms)"]["measured"] == pytest.approx(np.log(4))
    # By ln 1 and ln 8: 1.04 +- 1.47 holds for no one.
    assert told[f"R7: {WEAK} errs more than the anchor (logarithms)"]["held"] is False
    assert told["R8: fast head errs more than gains (logarithms)"]["held"] is None
    text = sinusoids.show(rows)
    assert "1.1e0" in text and "NO" in text


@pytest.mark.benchmarks
@pytest.mark.slow
def test_sinusoids_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "sinusoids", "--smoke", "--cases", f"{GAINS},{MAML},{CAVIA},{REPTILE}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/sinusoids.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "method"]
    assert [row["case"] for row in trained] == [GAINS, MAML, REPTILE, CAVIA]
    assert all(row["num_steps"] == 2 and row["error"] > 0 and not row["stopped"] for row in trained)
    (checked,) = (row for row in rows if row["kind"] == "gradients")
    assert len(checked["cosines"]) == 2 and all(abs(c) <= 1 + 1e-9 for c in checked["cosines"])
    assert "claims that could be decided hold" in capsys.readouterr().out
