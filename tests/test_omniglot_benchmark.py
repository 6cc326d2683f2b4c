"""The experiment `omniglot`: tasks and splits are what they say, network and bare contrast are right, it runs."""

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
from benchmarks.data import DataMissingError, load_omniglot
from benchmarks.experiments import omniglot_checks, omniglot_tables
from benchmarks.experiments.omniglot_methods import (
    ANCHOR,
    ANIL,
    ANIL_RIDGE,
    BANK,
    FOMAML,
    GAINS,
    HEAD,
    MAML,
    REPTILE,
    Steps,
    init_network,
    methods,
    modulated_split,
    nearest_neighbour,
)
from benchmarks.experiments.omniglot_network import LAYERS, SMALL, Layer, features, init_body, num_features
from benchmarks.experiments.omniglot_tasks import Shape, load, sample_tasks
from contrastive_meta.problems import SplitData
from tests.oracles import relative_error

KEY = jax.random.key(0)


def numbered(characters: int = 9, drawings: int = 6) -> jax.Array:
    """Drawings that say which they are: pixel (0, 0) has the character, pixel (0, 1) the drawing."""
    images = np.zeros((characters, drawings, 28, 28), np.uint8)
    images[:, :, 0, 0] = np.arange(characters)[:, None] + 1
    images[:, :, 0, 1] = np.arange(drawings) + 1
    return jnp.asarray(images)


def test_tasks_have_each_class_once_and_no_drawing_twice() -> None:
    shape = Shape(5, 2, 3)
    tasks = sample_tasks(KEY, numbered(), 4, shape, rotate=False)
    assert tasks.x_train.shape == (4, 10, 28, 28) and tasks.x_val.shape == (4, 15, 28, 28)
    x, y = (np.concatenate(parts, axis=1) for parts in ((tasks.x_train, tasks.x_val), (tasks.y_train, tasks.y_val)))
    codes = np.rint(255 * x[:, :, 0, :2]).astype(int)
    for code, label in zip(codes, y, strict=True):
        of_class = [set(code[label == k, 0]) for k in range(5)]
        assert all(len(one) == 1 for one in of_class) and len(set.union(*of_class)) == 5
        assert len({tuple(pair) for pair in code}) == 25
    again = sample_tasks(KEY, numbered(), 4, shape, rotate=False)
    np.testing.assert_array_equal(again.x_train, tasks.x_train)
    other = sample_tasks(jax.random.key(1), numbered(), 4, shape, rotate=False)
    assert not np.array_equal(other.x_train, tasks.x_train)


def test_a_class_is_turned_as_one_by_quarters() -> None:
    rng = np.random.default_rng(0)
    drawing = rng.integers(256, size=(28, 28)).astype(np.uint8)
    images = jnp.asarray(np.broadcast_to(drawing, (20, 4, 28, 28)))
    tasks = sample_tasks(KEY, images, 6, Shape(10, 1, 2), rotate=True)
    turned = np.stack([np.rot90(drawing / 255, k) for k in range(4)]).astype(np.float32)

    def quarters(x: Any) -> Any:
        same = np.abs(np.asarray(x)[:, None] - turned).max((-2, -1)) < 1e-6
        assert (same.sum(axis=1) == 1).all()
        return same.argmax(axis=1)

    seen = []
    for k in range(6):
        support, queries = quarters(tasks.x_train[k]), quarters(tasks.x_val[k])
        np.testing.assert_array_equal(np.repeat(support, 2), queries)
        seen += support.tolist()
    assert set(seen) == {0, 1, 2, 3}


def test_shifts_move_every_drawing_and_keep_its_ink() -> None:
    images = np.zeros((6, 3, 28, 28), np.uint8)
    images[..., 10:14, 10:14] = 255
    tasks = sample_tasks(KEY, jnp.asarray(images), 5, Shape(4, 1, 2), rotate=False, augment=2)
    x = np.asarray(tasks.x_val)
    np.testing.assert_allclose(x.sum((-2, -1)), 16)
    rows = x.max(-1).argmax(-1)
    assert set(np.unique(rows)) == {8, 9, 10, 11, 12}


def test_no_alphabet_is_in_two_splits() -> None:
    try:
        images, alphabets, evaluation = load_omniglot(None)
    except DataMissingError:
        pytest.skip("Omniglot is not there: `python -m benchmarks data omniglot`, or set CONTRASTIVE_META_DATA")
    splits = load(None, smoke=False)
    assert len(splits.train) + len(splits.select) == 964 and len(splits.test) == 659
    alphabet = {image.tobytes(): int(a) for image, a in zip(images[:, 0], alphabets, strict=True)}
    train, select, test = ({alphabet[x.tobytes()] for x in part[:, 0]} for part in splits[:3])
    assert not (train & select or train & test or select & test)
    assert len(train) == 24 and len(select) == 6 and len(test) == 20
    assert {alphabet[x.tobytes()] for x in images[evaluation][:, 0]} == test


@pytest.mark.parametrize("layers", [LAYERS, SMALL, (Layer(3, 2, 4),) * 4])
def test_a_layer_is_a_strided_convolution(layers: tuple[Layer, ...]) -> None:
    body = init_body(KEY, layers)
    x = jax.random.uniform(jax.random.key(1), (3, 28, 28))
    found = features(body, x, layers)
    assert found.shape == (3, num_features(layers))
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 10, rtol=1e-5)
    # The same by the compiler's convolution; a kernel's rows are ordered by column, row and channel.
    h = x[..., None]
    for number, layer in enumerate(layers):
        weights = body[f"layer_{number}"]
        kernel = weights["kernel"].reshape(layer.reach, layer.reach, -1, layer.channels).swapaxes(0, 1)
        places = -(-h.shape[1] // layer.stride)
        before = max((places - 1) * layer.stride + layer.reach - h.shape[1], 0) // 2
        after = (places - 1) * layer.stride + layer.reach - h.shape[1] - before
        padding = [(before, after)] * 2
        h = jax.lax.conv_general_dilated(
            h, kernel, (layer.stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = h + weights["bias"]
        h = (h - h.mean((1, 2, 3), keepdims=True)) / jnp.sqrt(h.var((1, 2, 3), keepdims=True) + 1e-5)
        h = jax.nn.relu(h)
    flat = h.reshape(3, -1)
    np.testing.assert_allclose(found, 10 * flat / jnp.linalg.norm(flat, axis=1, keepdims=True), atol=1e-5)


STEPS = Steps(8, 4, 4, Shape(4, 1, 2), 3, Shape(3, 1, 2), 2)


def test_the_bare_contrast_is_that_of_the_package() -> None:
    method = methods(STEPS, SMALL, 3)[HEAD]
    tasks = sample_tasks(KEY, numbered(), 3, method.shape, rotate=True)
    tasks = jax.tree.map(lambda x: x.astype(jnp.float64) if x.ndim > 2 else x, tasks)
    meta = method.meta_params(KEY)
    # Values differ: the package's is of the base point, which is nearer to the minimum than the free phase's end.
    _, grad = jax.jit(cm.value_and_meta_grad(method.problem, method.estimator))(meta, tasks)
    _, bare = jax.jit(lambda m, t: omniglot_checks._bare(m, t, SMALL, STEPS.head))(meta, tasks)
    # Rounding, 1e-15, over a strength of 0.03.
    assert relative_error(grad, bare) < 1e-12


@pytest.mark.parametrize("name", [GAINS, BANK])
def test_rules_of_gains_and_modules_measure_the_derivative_of_the_loss(name: str) -> None:
    split = modulated_split(name, KEY, SMALL[:1], 3)
    task = jax.tree.map(lambda x: x[0], sample_tasks(KEY, numbered(), 1, Shape(3, 1, 2), rotate=True))
    # Away from where they start: gains of 1 and coefficients of one module alone would hide a factor.
    start = split.problem.init(split.meta_params, task)
    keys = jax.random.split(KEY, len(start))
    params = {k: v + 0.3 * jax.random.normal(key, v.shape) for key, (k, v) in zip(keys, start.items(), strict=True)}
    rules = (split.rule, cm.Autodiff())
    found, expected = jax.jit(lambda p: [r.statistic(split.problem, p, split.meta_params, task, 0.1) for r in rules])(
        params
    )
    # The same sums in float64, in another order.
    assert relative_error(found["slow"], expected["slow"]) < 1e-12
    modulating = "gain" if name == GAINS else "coefficients"
    assert {k.split("/")[-1] for k in params} >= {modulating} and set(found["slow"]).isdisjoint(params)


def test_judges_learn_what_can_be_learned() -> None:
    """Classes that a pixel tells apart: whoever learns at all gets them right, and wrong where labels are swapped."""
    x = np.zeros((3, 28, 28))
    x[[0, 1, 2], [2, 14, 25], [2, 14, 25]] = 1
    y = jnp.arange(3)
    task = SplitData(jnp.asarray(x), y, jnp.asarray(np.repeat(x, 4, axis=0)), jnp.repeat(y, 4))
    assert float(nearest_neighbour(task)) == 1.0
    made = methods(STEPS._replace(free=60), LAYERS, 3)
    for name in (HEAD, ANIL, ANCHOR, MAML):
        assert float(jax.jit(made[name].judge)(made[name].meta_params(KEY), task)) == 1.0, name
    swapped = task._replace(y_val=(task.y_val + 1) % 3)
    assert float(jax.jit(made[HEAD].judge)(made[HEAD].meta_params(KEY), swapped)) == 0.0


def test_methods_share_their_start_and_tasks() -> None:
    made = methods(STEPS, SMALL, 3)
    first = init_network(KEY, SMALL, 3)
    for name in (ANCHOR, MAML, FOMAML, REPTILE):
        assert made[name].shape == Shape(3, 1, 2) and made[name].num_tasks == 2
        np.testing.assert_array_equal(
            made[name].meta_params(KEY)["anchor"]["body"]["layer_0"]["kernel"], first["body"]["layer_0"]["kernel"]
        )
    np.testing.assert_array_equal(
        made[HEAD].meta_params(KEY)["slow"]["layer_1"]["kernel"], first["body"]["layer_1"]["kernel"]
    )


def _row(case: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "kind": "method", "case": case, "seed": seed, "accuracy": accuracy, "accuracy_at_equal_gradients": accuracy,
        "shape": {"ways": 5, "shots": 1}, "passed": 0.5, "num_steps": 10, "seconds": 9.0, "compile_seconds": 1.0,
        "num_gradients": 100, "stopped": "", "data": "Omniglot",
    }  # fmt: skip


def test_a_difference_holds_beyond_its_spread_only() -> None:
    rows = [_row(HEAD, seed, a) for seed, a in enumerate((0.95, 0.94, 0.93))]
    rows += [_row(ANIL, seed, a) for seed, a in enumerate((0.90, 0.91, 0.92))]  # by .05, .03, .01: .03 +- .02
    rows += [_row(ANCHOR, seed, a) for seed, a in enumerate((0.80, 0.90, 0.85))]
    rows += [_row(MAML, seed, a) for seed, a in enumerate((0.85, 0.84, 0.82))]  # by -.05, .06, .03: .013 +- .057
    told = {claim["claim"]: claim for claim in omniglot_tables.claims(rows)}
    above = told[f"5-way 1-shot, 9 s: {HEAD} is above {ANIL} at equal time"]
    assert above["held"] is True and above["measured"] == pytest.approx(0.03) and above["spread"] == pytest.approx(0.02)
    assert told[f"5-way 1-shot, 9 s: {ANCHOR} is above {MAML} at equal gradients"]["held"] is False
    assert told[f"5-way 1-shot, 9 s: {HEAD} is at least 0.93"]["held"] is True
    assert told[f"5-way 1-shot, 9 s: {ANCHOR} is above {REPTILE} at equal time"]["held"] is None
    assert told[f"5-way 1-shot, 9 s: statuses of {HEAD} pass in 95 % of the tasks"]["held"] is False
    text = omniglot_tables.show(rows)
    assert "0.940 +- 0.010" in text and "NO" in text
    # Runs of other lengths are not at equal time.
    longer = [{**row, "seconds": 99.0} if row["case"] == ANIL else row for row in rows]
    told = {claim["claim"]: claim for claim in omniglot_tables.claims(longer)}
    assert told[f"5-way 1-shot, 9 s: {HEAD} is above {ANIL} at equal time"]["held"] is None


def test_a_body_is_compared_on_the_shape_it_was_tested_on() -> None:
    found = ((HEAD, (0.80, 0.81)), (ANIL_RIDGE, (0.70, 0.72)))
    rows = [
        {
            "kind": "other shape",
            "case": case,
            "seed": seed,
            "shape": {"ways": 20, "shots": 1},
            "accuracy": accuracy,
            "budget": 40.0,
        }
        for case, accuracies in found
        for seed, accuracy in enumerate(accuracies)
    ]
    told = {claim["claim"]: claim["held"] for claim in omniglot_tables.claims(rows)}
    start = f"20-way 1-shot, 40 s, bodies trained for another shape: {HEAD} is above"
    assert told[f"{start} {ANIL_RIDGE} at equal time"] is True
    assert told[f"{start} untrained body at equal time"] is None
    assert "0.805 +- 0.007" in omniglot_tables.show(rows)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_omniglot_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cases = f"{ANIL},{FOMAML}"
    assert main(["run", "omniglot", "--smoke", "--cases", cases]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/omniglot.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "method"]
    assert {row["case"] for row in trained} >= {ANIL, FOMAML}
    assert all(row["num_steps"] == 2 and 0 <= row["accuracy"] <= 1 and not row["stopped"] for row in trained)
    printed = capsys.readouterr().out
    # A row for each; what is claimed is of methods by contrast, which take long to compile.
    assert all(f"\n{name} " in printed for name in (ANIL, FOMAML))
