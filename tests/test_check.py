"""`check`: right estimators agree, wrong ones are caught and named, noise is not taken for an error."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import cast

# Curvatures from 1.4 to 3.7: a step at least halves what is left to learn, and 60 leave rounding.
SOLVER = cm.OptaxDescent(optax.sgd(0.4), num_steps=60)
SHORT = cm.OptaxDescent(optax.sgd(0.1), num_steps=4)
ORACLE = "finite differences"


def _inner(w: Any, meta: Any, task: Any) -> Any:
    return jnp.sum((w - task) ** 2) / 2 + jnp.sum(jnp.exp(meta["log_decay"]) * w**2) / 2


def _outer(w: Any, meta: Any, task: Any) -> Any:
    """With a direct term of its own in `log_decay`, and nothing else in `drive`."""
    return jnp.sum((w - 1.0) ** 2) / 2 + jnp.sum(meta["log_decay"] ** 2) / 2 + jnp.sum(jnp.sin(meta["drive"]))


def _init(meta: Any, task: Any) -> Any:
    return meta["start"]


def _far_outer(w: Any, meta: Any, task: Any) -> Any:
    """An offset that leaves float32 no digits for differences: its spacing at 1e5 is 0.008."""
    return _outer(w, meta, task) + 1e5


PROBLEM = cm.BilevelProblem(_inner, _outer, _init)
FAR = cm.BilevelProblem(_inner, _far_outer, _init)
TASK = jnp.array([2.0, 3.0, -1.0, 0.5])


def _meta_params() -> Any:
    return {"drive": jnp.array([0.3, -0.4]), "log_decay": jnp.linspace(-1.0, 1.0, 4), "start": jnp.full(4, 0.3)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken(cm.MetaGradientEstimator):
    """Backprop through learning with mistakes that people make."""

    solver: cm.InnerSolver
    factor: float = 1.0
    drop_direct: bool = dataclasses.field(default=False, metadata={"static": True})
    hide_start: bool = dataclasses.field(default=False, metadata={"static": True})
    fail: bool = dataclasses.field(default=False, metadata={"static": True})

    def _estimate(self, instance: Any, state: Any) -> cm.MetaGradient:
        if self.fail:
            raise RuntimeError("out of luck\nsecond line")
        result = cm.BackpropThroughLearning(self.solver).estimate(
            instance.problem, instance.meta_params, instance.task, key=instance.key
        )
        grad = jax.tree.map(lambda g: self.factor * g, result.grad)
        if self.drop_direct:
            direct = jax.grad(instance.problem.outer, argnums=1)(result.params, instance.meta_params, instance.task)
            grad = jax.tree.map(jnp.subtract, grad, direct)
        if self.hide_start:
            grad = grad | {"start": jnp.zeros_like(grad["start"])}
        return dataclasses.replace(result, grad=grad)

    def _sees(self, problem: Any, params: Any, meta_params: Any, task: Any) -> list[bool]:
        paths = jax.tree_util.tree_leaves_with_path(meta_params)
        return [not (self.hide_start and "start" in jax.tree_util.keystr(path)) for path, _ in paths]


RIGHT = Broken(SOLVER)


def _row(report: cm.CheckReport, name: str) -> Any:
    return next(row for row in report.rows if row.name == name)


def _check(
    estimators: Any, problem: Any = PROBLEM, dtype: Any = jnp.float64, solver: Any = SOLVER, **options: Any
) -> Any:
    meta_params, task = cast((_meta_params(), TASK), dtype)
    return cm.check(problem, solver, meta_params, task, estimators=estimators, **options)


@pytest.fixture(scope="module")
def default() -> cm.CheckReport:
    """All that applies to a learner that stops at a tolerance."""
    return _check(None, solver=cm.OptaxDescent(optax.sgd(0.4), tol=1e-12))


@pytest.fixture(scope="module")
def mistakes() -> cm.CheckReport:
    estimators = {
        "right": RIGHT,
        "flipped": Broken(SOLVER, -1.0),
        "halved": Broken(SOLVER, 0.5),
        "indirect only": Broken(SOLVER, drop_direct=True),
    }
    return _check(estimators)


def _exact() -> dict[str, np.ndarray]:
    """Closed form at the end of learning, w = task / (1 + exp(log_decay))."""
    meta = {name: np.asarray(leaf) for name, leaf in _meta_params().items()}
    decay, task = np.exp(meta["log_decay"]), np.asarray(TASK)
    learned = task / (1 + decay)
    direct = meta["log_decay"]
    return {
        "drive": np.cos(meta["drive"]),
        "log_decay": direct - (learned - 1) * task * decay / (1 + decay) ** 2,
        "start": np.zeros(4),
    }


# Agreement


def test_all_that_apply_agree_and_the_rest_is_left_out_with_its_reason(default: cm.CheckReport) -> None:
    names = ["contrastive", "contrastive (linear nudge)", "implicit (CG)", "implicit (dense)"]
    assert [row.name for row in default.rows] == [*names, ORACLE]
    assert default.agree is True
    assert re.match(r"contrastive, .*implicit \(dense\) and finite differences agree to \d\.\de-\d+\.", default.verdict)
    assert list(default.left_out) == ["backprop"]
    assert default.left_out["backprop"].startswith("TypeError: OptaxDescent cannot be differentiated in reverse")
    assert {row.status for row in default.rows} == {cm.Status.CONVERGED}


def test_differences_are_relative_norms_and_finite_differences_are_right(default: cm.CheckReport) -> None:
    # The oracle takes the coordinates here, so it has a norm of its own, to 1e-8 of the closed form's.
    exact = np.concatenate([leaf.ravel() for leaf in _exact().values()])
    assert default.noise < 1e-6
    assert _row(default, "implicit (dense)").grad_norm == pytest.approx(np.linalg.norm(exact), rel=1e-9)
    table = default.differences
    assert set(table) == {row.name for row in default.rows}
    assert all(table[a][b] == pytest.approx(table[b][a]) for a in table for b in table)
    assert all(table[a][a] == 0 for a in table)
    assert all(table[a][ORACLE] == _row(default, a).difference for a in table)
    assert max(max(row.values()) for row in table.values()) < 1e-6


def test_pairwise_differences_are_those_of_the_gradients(mistakes: cm.CheckReport) -> None:
    exact = _exact()
    direct = {"drive": exact["drive"], "log_decay": np.linspace(-1.0, 1.0, 4), "start": np.zeros(4)}
    norm = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in exact.values()]))
    indirect = jax.tree.map(np.subtract, exact, direct)
    without = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in direct.values()]))
    size = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in indirect.values()]))
    pairs = mistakes.differences["right"]
    assert pairs["flipped"] == pytest.approx(2.0)
    assert pairs["halved"] == pytest.approx(0.5)
    assert pairs["indirect only"] == pytest.approx(without / max(norm, size), rel=1e-9)


# Mistakes


def test_mistakes_are_caught_and_named(mistakes: cm.CheckReport) -> None:
    assert mistakes.agree is False
    assert [_row(mistakes, name).agrees for name in ("right", "flipped", "halved", "indirect only")] == [
        True,
        False,
        False,
        False,
    ]
    verdict = mistakes.verdict
    assert "right and finite differences agree to " in verdict
    assert "flipped differs from right and finite differences by 200 % (-1 times that)." in verdict
    assert "halved differs from right and finite differences by 50 % (0.5 times that)." in verdict
    assert re.search(r"indirect only differs from right and finite differences by \d+ %[.,]", verdict)


@pytest.mark.parametrize("mistake", [{"factor": -1.0}, {"factor": 0.5}, {"drop_direct": True}], ids=str)
def test_a_mistake_is_caught_without_any_right_estimator_beside_it(mistake: dict[str, Any]) -> None:
    report = _check({"mine": Broken(SOLVER, **mistake)})
    assert report.agree is False
    assert report.verdict.startswith("mine differs from finite differences by ")


def test_a_mistake_is_caught_among_many_meta_parameters() -> None:
    # 306 meta-parameters along 5 random directions; half of the gradient's norm is wrong.
    def outer(w: Any, meta: Any, task: Any) -> Any:
        return _outer(w, meta, task) + jnp.sum(meta["many"] ** 2) / 20

    problem = cm.BilevelProblem(_inner, outer, _init)
    meta_params = _meta_params() | {"many": jnp.sin(jnp.arange(296.0)), "start": jnp.zeros(4)}
    estimators = {"right": RIGHT, "indirect only": Broken(SOLVER, drop_direct=True)}
    report = cm.check(problem, SOLVER, meta_params, TASK, estimators=estimators)
    assert _row(report, "right").agrees is True
    assert _row(report, "indirect only").agrees is False
    assert _row(report, ORACLE).grad_norm is None, "five directions do not measure a norm"


def test_a_gradient_that_is_not_finite_does_not_agree() -> None:
    report = _check({"nan": Broken(SOLVER, float("nan")), "right": RIGHT})
    assert report.agree is False
    assert "nan is not finite (NOT_FINITE)." in report.verdict
    assert "right and finite differences agree" in report.verdict


def test_learning_that_is_not_finite_cannot_decide_and_does_not_agree() -> None:
    report = cm.check(PROBLEM, SOLVER, _meta_params(), TASK * jnp.nan, estimators={"right": RIGHT})
    assert report.agree is False
    assert "right is not finite (NOT_FINITE)." in report.verdict
    assert "NOT_FINITE (right, finite differences): A loss, a gradient" in " ".join(str(report).split())


def test_an_estimator_that_was_asked_for_and_raises_does_not_agree() -> None:
    report = _check({"right": RIGHT, "unlucky": Broken(SOLVER, fail=True)})
    assert report.agree is False
    assert report.left_out == {"unlucky": "RuntimeError: out of luck"}
    assert "unlucky raised RuntimeError: out of luck" in report.verdict


# Learning that has not ended


def test_unfinished_learning_explains_a_disagreement() -> None:
    report = _check(
        {"implicit": cm.ImplicitDifferentiation(SHORT, cm.DenseInverse()), "backprop": Broken(SHORT)}, solver=SHORT
    )
    assert report.agree is False
    assert "backprop and finite differences agree to" in report.verdict
    residual = _row(report, "implicit").free_residual
    assert residual > 0.1
    assert f"Learning stopped early (free residual {residual:.2g}, noticed by implicit)" in report.verdict
    assert "The outer loss depends on ['start']" in report.verdict
    # Not so here: what implicit says of the minimum is wrong of these four steps, whatever it sees.
    assert "in what they see they agree" not in report.verdict


def test_finite_differences_see_what_the_estimators_cannot() -> None:
    report = _check({"blind": Broken(SHORT, hide_start=True)}, solver=SHORT)
    grad = cm.BackpropThroughLearning(SHORT).estimate(PROBLEM, _meta_params(), TASK).grad
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grad)))
    share = np.linalg.norm(grad["start"]) / total
    assert report.agree is False
    # Coordinates of the start and five random directions among the other six.
    (found,) = re.findall(
        r"depends on \['start'\] \(about (\d+) % of the gradient by finite differences\)", report.verdict
    )
    assert float(found) / 100 == pytest.approx(share, rel=0.3)
    assert "which blind cannot see; in what they see they agree with finite differences to " in report.verdict
    assert "use `BackpropThroughLearning`, which sees it" in report.verdict


def test_what_cannot_be_seen_does_no_harm_once_learning_has_ended(default: cm.CheckReport) -> None:
    assert re.search(
        r"cannot see \['start'\]; no harm: by finite differences that is (0|\d\.\de-\d+) of", default.verdict
    )


def test_finite_differences_see_the_settings_of_the_optimiser() -> None:
    problem = cm.BilevelProblem(
        lambda w, meta, task: jnp.sum((w - meta["target"]) ** 2) / 2,
        lambda w, meta, task: jnp.sum(w**2) / 2,
        lambda meta, task: jnp.zeros(2),
    )
    solver = cm.OptaxDescent(lambda meta: optax.sgd(meta["rate"]), num_steps=3)
    meta_params = {"rate": jnp.array(0.2), "target": jnp.array([1.0, 2.0])}
    estimators = {
        "implicit": cm.ImplicitDifferentiation(solver, cm.IdentityHessian()),
        "backprop": cm.BackpropThroughLearning(solver),
    }
    report = cm.check(problem, solver, meta_params, None, estimators=estimators)
    assert "backprop and finite differences agree to" in report.verdict
    assert "The outer loss depends on ['rate']" in report.verdict
    assert "which implicit cannot see" in report.verdict


# Noise


def test_float32_decides_where_it_can(mistakes: cm.CheckReport) -> None:
    report = _check({"right": RIGHT, "halved": Broken(SOLVER, 0.5)}, dtype=jnp.float32)
    assert 1e-6 < report.noise < 1e-2, "float32 shows, and is good enough for the tolerance"
    assert [_row(report, name).agrees for name in ("right", "halved")] == [True, False]


def test_float32_noise_is_not_taken_for_an_error() -> None:
    report = _check({"right": RIGHT}, FAR, dtype=jnp.float32)
    assert report.agree is None
    assert report.noise > 1e-2
    assert "Finite differences cannot decide: their own noise is" in report.verdict
    assert str(report).startswith("Check: cannot decide (tolerance 1 %).")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("problem", [PROBLEM, FAR], ids=["near", "far"])
def test_the_noise_of_finite_differences_is_estimated_honestly(problem: Any, dtype: Any) -> None:
    """A tolerance far below what differences can reach: the right gradient must not be called wrong."""
    for shift in range(4):
        meta_params, task = cast((_meta_params(), TASK * (1 + 0.1 * shift)), dtype)
        report = cm.check(problem, SOLVER, meta_params, task, estimators={"right": RIGHT}, tolerance=1e-14)
        assert report.agree is None
        assert _row(report, "right").difference < 3 * report.noise


def _rough_outer(w: Any, meta: Any, task: Any) -> Any:
    """Roughness of a thousandth that no derivative sees, as of a learner that stops at a loose tolerance."""
    return jnp.sum((w - 1.0) ** 2) / 2 + task[1] * jax.lax.stop_gradient(jnp.sin(1e8 * jnp.sum(w)))


def test_a_chance_agreement_of_two_steps_is_not_taken_for_accuracy() -> None:
    """One meta-parameter, one direction: with the gap to the next step alone, 5 of these 60 would be called wrong."""
    problem = cm.BilevelProblem(
        lambda w, log_decay, task: jnp.sum((w - task[0]) ** 2 + jnp.exp(log_decay) * w**2) / 2,
        _rough_outer,
        lambda log_decay, task: jnp.zeros(3),
    )
    random = np.random.default_rng(0)
    lucky: Any = (np.inf, 0.0, None)
    for _ in range(60):
        log_decay = jnp.asarray(0.3 * random.normal())
        task = (jnp.asarray(random.normal(size=3) + 2), jnp.asarray(1e-3))
        report = cm.check(problem, SOLVER, log_decay, task, estimators={"right": RIGHT})
        difference = _row(report, "right").difference
        assert report.agree is None
        assert difference < 3 * report.noise
        lucky = min(lucky, (difference / report.noise, difference, (log_decay, task)), key=lambda x: x[0])

    # Nor is a gradient called right because noise happens to fall on it.
    ratio, difference, arguments = lucky
    assert ratio < 0.1
    report = cm.check(problem, SOLVER, *arguments, estimators={"right": RIGHT}, tolerance=3 * difference)
    assert report.agree is None


def test_an_outer_loss_that_resolves_nothing_cannot_decide() -> None:
    """In float32 numbers of 1e8 are 8 apart: all differences are zero, and agree perfectly."""

    def outer(w: Any, meta: Any, task: Any) -> Any:
        return _outer(w, meta, task) + 1e8

    report = _check({"right": RIGHT}, cm.BilevelProblem(_inner, outer, _init), dtype=jnp.float32)
    assert report.agree is None
    assert report.noise == np.inf
    assert "The finite differences are nothing but noise." in str(report)


@pytest.mark.parametrize("kind", ["bends", "resolution"])
def test_steps_are_chosen_by_what_the_outer_loss_allows(kind: str) -> None:
    """Steps of 2e-3 are too long for a loss that bends within 1/300; those of 5e-7 drown in one of the size of 1e9."""

    def outer(w: Any, meta: Any, task: Any) -> Any:
        return jnp.sum(jnp.sin(300 * w)) if kind == "bends" else _outer(w, meta, task) + 1e9

    report = _check({"right": RIGHT}, cm.BilevelProblem(_inner, outer, _init))
    assert report.agree is True
    assert report.noise < 1e-2


def test_a_large_mistake_is_caught_through_the_noise() -> None:
    meta_params = _meta_params() | {"drive": jnp.array([0.0, 0.0])}
    meta_params, task = cast((meta_params, 30 * TASK), jnp.float32)
    estimators = {"right": RIGHT, "flipped": Broken(SOLVER, -1.0)}
    report = cm.check(FAR, SOLVER, meta_params, task, estimators=estimators, tolerance=1e-4)
    assert [_row(report, name).agrees for name in estimators] == [None, False]
    assert report.agree is False


# Arguments and text


def test_if_all_raise_so_does_the_check() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        _check({"unlucky": Broken(SOLVER, fail=True)})


@pytest.mark.parametrize(
    ("estimators", "options", "message"),
    [
        ({}, {}, "at least one estimator"),
        ({ORACLE: RIGHT}, {}, "by a name other than 'finite differences'"),
        ({"right": RIGHT}, {"tolerance": 0.0}, "`tolerance` must be positive; got 0.0"),
        ({"right": RIGHT}, {"tolerance": float("nan")}, "`tolerance` must be positive; got nan"),
    ],
)
def test_bad_arguments_are_refused(estimators: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _check(estimators, **options)


@pytest.mark.parametrize("num_rows", [5, 9])
def test_the_report_prints_aligned_columns(mistakes: cm.CheckReport, num_rows: int) -> None:
    rows = tuple(mistakes.rows[i % 5]._replace(name=f"{i} {'x' * 10 * i}") for i in range(num_rows))
    differences = {row.name: {other.name: 0.5 * (row != other) for other in rows} for row in rows}
    text = str(dataclasses.replace(mistakes, rows=rows, differences=differences))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    start = lines.index("") + 1
    body = lines[start : lines.index("", start)]
    assert len(body) == 2 + num_rows
    # Numbers are right-aligned, and the last column is one: every line ends where the headers end.
    assert len({len(line) for line in body}) == 1
    assert [line.split()[0] for line in body[2:]] == [str(i + 1) for i in range(num_rows)]


def test_the_report_says_what_statuses_mean(mistakes: cm.CheckReport) -> None:
    text = str(mistakes)
    assert text.startswith("Check: they do not all agree (tolerance 1 %).\n")
    assert "CONVERGED (right, flipped, halved, indirect only, finite differences): Every check passed." in text
