"""The experiment `spiking`: losses and claims are what they say, methods start alike, and it runs in small."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks.__main__ import main
from benchmarks.experiments import spiking
from benchmarks.experiments.spiking_methods import (
    ANCHOR,
    MAML_BPTT,
    MAML_EPROP,
    STRENGTHS,
    TRUNCATED,
    first_meta_params,
    methods,
    spiking_tasks,
    transformation,
)
from contrastive_meta.problems import sinusoid_tasks

KEY = jax.random.key(0)
SIZES = spiking.SMOKE.sizes


def _task() -> Any:
    return jax.tree.map(lambda leaf: leaf[0], spiking_tasks(KEY, 1, SIZES))


def test_tasks_are_sinusoids_seen_by_spikes() -> None:
    drawn = spiking_tasks(KEY, 3, SIZES)
    assert drawn.x_train.shape == (3, 10, SIZES.num_time, SIZES.num_inputs)
    assert set(np.unique(drawn.x_val)) <= {0.0, 1.0} and float(jnp.mean(drawn.x_train)) > 0
    expected = sinusoid_tasks(jax.random.split(KEY)[0], 3)
    np.testing.assert_array_equal(drawn.y_val, expected.y_val)


def test_losses_by_hand() -> None:
    """A network written out in numpy: leaky potentials that reset where they spike, and a leaky readout."""
    task, meta = _task(), first_meta_params(KEY, SIZES)
    # Strong enough that units fire, and away from the anchor.
    w = jax.tree.map(lambda leaf: 3 * leaf, meta["anchor"])
    weights = {name: np.asarray(leaf) for name, leaf in w.items()}
    rates, means = np.zeros(SIZES.num_units), []
    for x in np.asarray(task.x_train):
        v = z = np.zeros(SIZES.num_units)
        y, outputs = 0.0, []
        for t in range(SIZES.num_time):
            v = 0.967 * v + x[t] @ weights["input"] + z @ weights["recurrent"] - 0.1 * z
            z = (v > 0.1).astype(float)
            y = 0.967 * y + (z @ weights["readout"])[0]
            outputs.append(y)
            rates += z / SIZES.num_time / len(task.x_train)
        means.append(np.mean(outputs))
    assert rates.max() > 0
    error = np.mean((np.array(means) - task.y_train) ** 2)
    away = sum(np.sum((np.asarray(w[k]) - np.asarray(meta["anchor"][k])) ** 2) for k in w)
    expected = error + SIZES.silence * np.sum((rates - 0.2) ** 2) + 0.5 * SIZES.strength * away
    for name in (ANCHOR, MAML_BPTT):
        found = methods(SIZES)[name].problem.inner(w, meta, task)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_strengths_stand_still_where_they_are_not_learned() -> None:
    made, meta = methods(SIZES), first_meta_params(KEY, SIZES)
    for name in (ANCHOR, TRUNCATED, MAML_EPROP, STRENGTHS):
        change = transformation(made[name])
        updates, _ = change.update(jax.tree.map(jnp.ones_like, meta), change.init(meta))
        moved = [float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(updates["log_strength"])]
        assert all(moved) if name == STRENGTHS else not any(moved)
        assert all(float(jnp.min(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(updates["anchor"]))
    # They share a compiled program, so that their optimisers' states must have one structure.
    states = [jax.tree.structure(transformation(made[name]).init(meta)) for name in (ANCHOR, STRENGTHS)]
    assert states[0] == states[1] and made[ANCHOR].program == made[STRENGTHS].program


def _rows(case: str, errors: list[float]) -> list[dict[str, Any]]:
    same = ("error", "error_at_equal_time", "error_at_equal_gradients")
    return [
        {
            "kind": "method", "case": case, "seed": seed, "error_unlearned": 2.0, **dict.fromkeys(same, error),
            "seconds": 1.0, "num_steps": 2, "num_gradients": 3, "passed": 1.0, "stopped": "",
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


def test_claims_are_of_ratios_and_logarithms() -> None:
    rows = _rows(ANCHOR, [0.5, 0.7]) + _rows(TRUNCATED, [0.5, 1.4]) + _rows(MAML_BPTT, [1.0, 1.4])
    told = {claim["claim"]: claim for claim in spiking.claims(rows)}
    fallen = told[f"R9: error of {ANCHOR} over that of the unlearned anchor"]
    assert fallen["measured"] == pytest.approx(0.3) and fallen["held"] is True
    # By 0 and ln 2: 0.35 +- 0.49 holds for no one.
    assert told[f"R9: {TRUNCATED} errs more than {ANCHOR} at equal steps"]["held"] is False
    assert told[f"{MAML_BPTT} errs more than {ANCHOR} at equal time"]["measured"] == pytest.approx(np.log(2))
    assert told[f"{MAML_EPROP} errs more than {ANCHOR} at equal time"]["held"] is None
    assert "0.600 +- 0.141" in spiking.show(rows)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_spiking_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "spiking", "--smoke"]) == 0
    lines = (tmp_path / "results/records/spiking.jsonl").read_text().splitlines()
    (row,) = (row for row in map(json.loads, lines) if row["kind"] == "method")
    assert row["case"] == STRENGTHS and row["num_steps"] == 2 and row["error"] > 0 and not row["stopped"]
    assert "claims that could be decided hold" in capsys.readouterr().out
