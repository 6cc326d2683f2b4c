"""The experiment `where_to_learn`: masks and their gradients are right, streams add up, and it runs in small."""

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
from benchmarks.experiments import where_to_learn, where_to_learn_tables
from benchmarks.experiments.where_to_learn_methods import (
    ALL,
    CONTRAST,
    HEAD,
    RELU,
    SIGN,
    THROUGH,
    closed,
    masked_descent,
    masked_steps,
    methods,
    transformation,
)
from benchmarks.experiments.where_to_learn_settings import (
    PER_SEGMENT,
    SEGMENTS,
    SINUSOIDS,
    STEPS_PER_SEGMENT,
    STREAM,
    STREAM_RATE,
    Setting,
    segment,
    settings,
    streams,
)
from contrastive_meta.problems import SplitData

KEY = jax.random.key(0)
# A mask with open and closed entries: signs are what counts.
_SIGNS = jnp.array([0.3, -0.2, 0.1, -0.4])


@pytest.fixture(scope="module")
def table() -> dict[str, Setting]:
    return settings(where_to_learn.SMOKE.sizes, None, smoke=True, images=False)


def _linear() -> tuple[Setting, SplitData]:
    """A linear model, of which all gradients are known in closed form: only its losses are used."""
    keys = jax.random.split(jax.random.key(3), 4)
    task = SplitData(*(jax.random.normal(k, shape) for k, shape in zip(keys, ((6, 4), (6,)) * 2, strict=True)))
    made: Any = Setting(
        *([None] * len(Setting._fields))
    )._replace(apply=lambda w, x: x @ w, loss=lambda y, t: 0.5 * jnp.sum((y - t) ** 2))  # fmt: skip
    return made, task


@pytest.mark.parametrize("graded", [False, True])
def test_meta_gradient_of_a_mask_in_closed_form(graded: bool) -> None:
    """One step by rate a: w = start - a z g, so dL_out/dm = -a (dz/dm) g_out(w) g, and only open weights move."""
    setting, task = _linear()
    start, rate = jnp.array([0.5, -1.0, 0.2, 0.8]), 0.1
    split = masked_steps(setting, start, _SIGNS)
    result = cm.BackpropThroughLearning(masked_descent(rate, 1, graded)).estimate(
        split.problem, split.meta_params, task
    )
    z = np.maximum(_SIGNS, 0) if graded else (np.asarray(_SIGNS) > 0).astype(float)
    g = task.x_train.T @ (task.x_train @ start - task.y_train)
    w = start - rate * z * g
    g_out = task.x_val.T @ (task.x_val @ w - task.y_val)
    np.testing.assert_allclose(result.params, w, rtol=1e-12)
    np.testing.assert_allclose(result.grad["mask"], -rate * (1.0 if graded else 0.5) * g_out * g, rtol=1e-10)
    hessian = task.x_train.T @ task.x_train
    np.testing.assert_allclose(result.grad["start"], g_out - rate * hessian @ (z * g_out), rtol=1e-10)


def test_methods_start_alike_and_hold_what_they_say(table: dict[str, Setting]) -> None:
    made = methods(SINUSOIDS, table[SINUSOIDS])
    starts = {name: method.build(KEY).meta_params for name, method in made.items()}
    for meta in starts.values():
        for ours, theirs in zip(
            jax.tree.leaves(meta["start"]), jax.tree.leaves(starts[f"{ALL} {THROUGH}"]["start"]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    head = starts[f"{HEAD} {CONTRAST}"]["mask"]
    assert closed(jax.tree.leaves(head["hidden_0"])) == 1 and closed(jax.tree.leaves(head["readout"])) == 0
    assert closed(jax.tree.leaves(starts[f"{RELU} {THROUGH}"]["mask"])) == 0
    assert 0 < closed(jax.tree.leaves(starts[f"{SIGN} {THROUGH}"]["mask"])) < 1
    # The mask of "all plastic" has no rate: an update leaves it as it is, and moves the start.
    method = made[f"{ALL} {THROUGH}"]
    meta = starts[f"{ALL} {THROUGH}"]
    change = transformation(method)
    updates, _ = change.update(jax.tree.map(jnp.ones_like, meta), change.init(meta))
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(updates["mask"]))
    assert all(float(jnp.min(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(updates["start"]))


def test_streams_are_sinusoids_in_order() -> None:
    drawn = streams(KEY, 3, 10)
    assert drawn.x_train.shape == (3, SEGMENTS, PER_SEGMENT, 1) and drawn.y_val.shape == (3, SEGMENTS, 10)
    edges = np.linspace(-5, 5, SEGMENTS + 1)
    for number in range(SEGMENTS):
        x = np.asarray(drawn.x_val[:, number])
        assert np.all((x >= edges[number]) & (x <= edges[number + 1]))
    # Every stream is a cos x + b sin x for one a and b: the least squares fit of all its points is exact.
    for x, y in zip(drawn.x_val.reshape(3, -1), drawn.y_val.reshape(3, -1), strict=True):
        basis = np.stack([np.cos(x), np.sin(x)], 1)
        assert np.max(np.abs(basis @ np.linalg.lstsq(basis, np.asarray(y), rcond=None)[0] - y)) < 1e-10


def test_errors_along_a_stream_by_hand(table: dict[str, Setting]) -> None:
    setting = table[STREAM]
    method = methods(STREAM, setting)[f"{SIGN} {THROUGH}"]
    meta = method.build(KEY).meta_params
    task = jax.tree.map(lambda leaf: leaf[0], streams(KEY, 1, 10))
    z = jax.tree.map(lambda m: (m > 0).astype(m.dtype), meta["mask"])
    grad = jax.jit(jax.grad(lambda w, x, y: setting.loss(setting.apply(w, x), y)))
    w, at_once = meta["start"], []
    for number in range(SEGMENTS):
        for _ in range(STEPS_PER_SEGMENT):
            part = segment(task, number)
            g = grad(w, part.x_train, part.y_train)
            w = jax.tree.map(lambda a, zi, gi: a - STREAM_RATE * zi * gi, w, z, g)
        at_once.append(float(jnp.mean((setting.apply(w, task.x_val[number])[:, 0] - task.y_val[number]) ** 2)))
    end = [float(jnp.mean((setting.apply(w, x)[:, 0] - y) ** 2)) for x, y in zip(task.x_val, task.y_val, strict=True)]
    found = where_to_learn.segment_errors(setting, method, meta, task)
    np.testing.assert_allclose(found[0], at_once, rtol=1e-10)
    np.testing.assert_allclose(found[1], end, rtol=1e-10)


def _rows(method: str, errors: list[float], closed_by_layer: dict[str, float], kept: float) -> list[dict[str, Any]]:
    same = ("error", "error_at_equal_time", "error_at_equal_gradients", "error_unlearned")
    return [
        {
            "kind": "method", "case": f"{STREAM}: {method}", "setting": STREAM, "method": method, "seed": seed,
            **dict.fromkeys(same, error), "seconds": 1.0, "num_steps": 2, "num_gradients": 3, "passed": 1.0,
            "closed": 0.7 if closed_by_layer else None, "closed_at_first": 0.5 if closed_by_layer else None,
            "closed_by_layer": closed_by_layer, "stream_at_once": 1.0 + 0.1 * seed, "stream_at_the_end": kept,
            "stopped": "",
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


def test_claims_are_of_what_was_measured() -> None:
    layers = {"hidden_0": 0.9, "readout": 0.2}
    rows = _rows(f"{ALL} {THROUGH}", [1.0, 1.2], {}, 3.0) + _rows(f"{SIGN} {THROUGH}", [0.5, 0.5], layers, 2.0)
    told = {claim["claim"]: claim for claim in where_to_learn_tables.claims(rows)}
    where = f"{STREAM} {THROUGH}"
    better = told[f"{where}: {ALL} errs more than {SIGN}"]
    assert better["held"] is True and better["measured"] == pytest.approx((np.log(2) + np.log(2.4)) / 2)
    beyond = told[f"{where}: {SIGN} closes more than at first"]
    assert beyond["measured"] == pytest.approx(0.2) and beyond["held"] is True
    assert told[f"{where}: {SIGN} closes more of the first layer than of the last"]["measured"] == pytest.approx(0.7)
    forgets = told[f"{where}: {ALL} forgets more of a stream than {SIGN}"]
    assert forgets["measured"] == pytest.approx(1.0) and forgets["held"] is True
    assert told[f"{where}: {HEAD} errs more than {SIGN}"]["held"] is None
    text = where_to_learn_tables.show(rows)
    assert "0.90" in text and "ReLU" not in text and "4 of 4 claims that could be decided hold" in text


@pytest.mark.benchmarks
@pytest.mark.slow
def test_where_to_learn_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "where_to_learn", "--smoke"]) == 0
    lines = (tmp_path / "results/records/where_to_learn.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "method"]
    assert [row["case"] for row in rows] == [f"{SINUSOIDS}: {SIGN} {CONTRAST}", f"{STREAM}: {SIGN} {THROUGH}"]
    assert all(row["num_steps"] == 2 and row["error"] > 0 and not row["stopped"] for row in rows)
    assert all(0 < row["closed"] < 1 and len(row["closed_by_layer"]) == 2 for row in rows)
    assert "claims that could be decided hold" in capsys.readouterr().out
