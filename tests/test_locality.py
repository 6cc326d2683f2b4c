"""The proof of locality passes for local rules and never for a rule that mixes synapses, by whatever operation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from tests.test_rules import NAMES, architecture, random_task

W = jnp.zeros((3, 3))
META = {"anchor": W, "log_strength": W}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnchorUpdate(cm.LocalRule):
    """An update of the anchor that is any function of the weight and the anchor."""

    update: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})

    def measure(self, params, meta_params, signals):
        return {**meta_params, "anchor": self.update(params, meta_params["anchor"])}


PROBLEM = cm.BilevelProblem(
    lambda w, meta, task: jnp.sum(w), lambda w, meta, task: jnp.sum(w), lambda meta, task: meta["anchor"]
)


def check(update: Callable[[Any, Any], Any]) -> cm.LocalityReport:
    return cm.check_local(AnchorUpdate(update), PROBLEM, W, META, None)


@jax.custom_vjp
def sums_behind_custom_vjp(x):
    return x * jnp.sum(x)


sums_behind_custom_vjp.defvjp(lambda x: (x, None), lambda saved, ct: (ct,))


@jax.custom_jvp
def sums_behind_custom_jvp(x):
    return x * jnp.sum(x)


sums_behind_custom_jvp.defjvp(lambda at, moved: (at[0], moved[0]))


@jax.custom_batching.custom_vmap
def sums_when_mapped(x):
    return x


sums_when_mapped.def_vmap(lambda size, batched, x: (x * jnp.sum(x), True))

CAPTURED = jnp.arange(9.0).reshape(3, 3)
CONSTANT_CAPTURED = jnp.ones((3, 3))

# Each depends, somewhere, on another synapse; and the operation that the message must name.
DISTANT: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "sum": (lambda w, a: w * jnp.sum(a), "reduce_sum"),
    "mean over inputs": (lambda w, a: a - jnp.mean(w, axis=0), "reduce_sum"),
    "mean over outputs": (lambda w, a: a - jnp.mean(w, axis=1, keepdims=True), "reduce_sum"),
    "matmul": (lambda w, a: w @ a, "dot_general"),
    "einsum over one": (lambda w, a: jnp.einsum("ij,kj->ik", w, a), "dot_general"),
    "sort": (lambda w, a: jnp.sort(w), "sort"),
    "argsort": (lambda w, a: a * jnp.argsort(w, axis=0), "sort"),
    "gather": (lambda w, a: w[jnp.array([1, 2, 0])], "gather"),
    "take": (lambda w, a: jnp.take_along_axis(w, jnp.argmax(w, 0, keepdims=True), 0) * a, "argmax"),
    "scatter": (lambda w, a: a.at[0, 0].add(1.0), "scatter"),
    "norm": (lambda w, a: w / jnp.linalg.norm(w), "reduce_sum"),
    "max": (lambda w, a: w / jnp.max(w), "reduce_max"),
    "softmax": (lambda w, a: jax.nn.softmax(w), "reduce_max"),
    "scan": (lambda w, a: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(3), w)[1], "scan"),
    "while": (
        lambda w, a: jax.lax.while_loop(lambda c: jnp.sum(c) < 0, lambda c: c + w, a),
        "while",
    ),
    "fori": (lambda w, a: jax.lax.fori_loop(0, 3, lambda i, c: c + w[i], a), "scan"),
    "cond": (lambda w, a: jax.lax.cond(w[0, 0] > 0, lambda: w, lambda: a), "slice"),
    "branch": (lambda w, a: jax.lax.cond(True, lambda: w * jnp.sum(w), lambda: a), "cond"),
    "where": (lambda w, a: jnp.where(w[0, 0] > 0, w, a), "slice"),
    "custom_vjp": (lambda w, a: sums_behind_custom_vjp(w), "reduce_sum"),
    "custom_jvp": (lambda w, a: sums_behind_custom_jvp(w), "reduce_sum"),
    "custom_vmap": (lambda w, a: sums_when_mapped(w), "custom_vmap_call"),
    "jit": (lambda w, a: jax.jit(lambda x: x * jnp.sum(x))(w), "reduce_sum"),
    "checkpoint": (lambda w, a: jax.checkpoint(lambda x: x * jnp.sum(x))(w), "reduce_sum"),
    "vmap": (lambda w, a: jax.vmap(lambda row: row * jnp.sum(row))(w), "reduce_sum"),
    "grad": (lambda w, a: jax.grad(lambda x: jnp.sum(x) ** 2)(w), "reduce_sum"),
    "cumsum": (lambda w, a: jnp.cumsum(w, axis=1), "cumsum"),
    "roll": (lambda w, a: jnp.roll(w, 1, axis=0), "slice"),
    "flip": (lambda w, a: jnp.flip(w), "rev"),
    "slice": (lambda w, a: a + w[:1], "slice"),
    "dynamic slice": (lambda w, a: a + jax.lax.dynamic_slice(w, (1, 0), (1, 3)), "dynamic_slice"),
    "concatenate": (lambda w, a: jnp.concatenate([w[:1], a[1:]]), "slice"),
    "pad": (lambda w, a: jnp.pad(w, ((1, 0), (0, 0)))[:3], "pad"),
    "transpose": (lambda w, a: w.T, "transpose"),
    "symmetrised": (lambda w, a: w + w.T, "add"),
    "reshape": (lambda w, a: w.reshape(9).reshape(3, 3), "reshape"),
    "fft": (lambda w, a: jnp.real(jnp.fft.fft(w)), "fft"),
    "determinant": (lambda w, a: w * jnp.linalg.det(w), "det"),
    "callback": (lambda w, a: jax.pure_callback(lambda x: np.asarray(x) * np.sum(x), w, w), "pure_callback"),
    "captured array": (lambda w, a: w * CAPTURED, "captured"),
    "captured constant array": (lambda w, a: w * CONSTANT_CAPTURED, "captured"),
    "captured in jit": (lambda w, a: jax.jit(lambda x: x * CAPTURED)(w), "captured"),
    "hidden by zero": (lambda w, a: w + 0 * jnp.sum(w), "reduce_sum"),
    "outer product": (lambda w, a: jnp.einsum("ij,kl->ijkl", w, a)[:, :, 0, 0], "dot_general"),
    "diagonal": (lambda w, a: a * jnp.diag(w), "diag"),
}


@pytest.mark.parametrize("name", DISTANT)
def test_a_rule_that_mixes_synapses_is_refused_and_the_operation_named(name: str) -> None:
    update, operation = DISTANT[name]
    with pytest.raises(cm.NotLocalError, match=r"update of \['anchor'\] is not local") as caught:
        check(update)
    message = str(caught.value)
    assert operation in message, message
    assert "Path: " in message and message.index("Path: ") < message.index("-> update of ['anchor']")


LOCAL: dict[str, Callable[[Any, Any], Any]] = {
    "elementwise": lambda w, a: jnp.tanh(w - a) ** 2 / (1 + jnp.exp(a)),
    "where": lambda w, a: jnp.where(w > a, w, jnp.maximum(a, 0.0)),
    "jit": jax.jit(lambda w, a: w * a),
    "checkpoint": lambda w, a: jax.checkpoint(jnp.sin)(w),
    "custom_jvp": lambda w, a: jax.nn.relu(w) * a,
    "vmap": jax.vmap(jax.vmap(lambda w, a: w * a)),
    "grad": lambda w, a: jax.grad(lambda x: jnp.sum(jnp.square(x - a)))(w),
    "there and back": lambda w, a: w.T.T[:, None, :].reshape(3, 3) + jnp.squeeze(a[None], 0),
    "sum over a new axis": lambda w, a: jnp.sum(jnp.broadcast_to(w, (5, 3, 3)), axis=0),
    "constants": lambda w, a: w * jnp.arange(3.0) + jnp.ones((3, 3)) * 2.5,
    "nothing": lambda w, a: jnp.zeros_like(a),
}


@pytest.mark.parametrize("name", LOCAL)
def test_what_stays_at_the_synapse_passes(name: str) -> None:
    check(LOCAL[name])


OPERATIONS: tuple[Callable[[Any, Any], Any], ...] = (
    lambda x, y: x * y,
    lambda x, y: jnp.tanh(x) + y,
    lambda x, y: jnp.where(x > y, x, 0.5),
    lambda x, y: x.T,
    lambda x, y: x @ y,
    lambda x, y: x + jnp.sum(y, axis=0),
    lambda x, y: x * jnp.max(y, axis=1, keepdims=True),
    lambda x, y: jnp.sum(x[:, :, None] * jnp.ones(2), axis=2),
    lambda x, y: jnp.roll(y, 1, axis=1),
    lambda x, y: jnp.cumsum(x, axis=0) - y,
    lambda x, y: x.reshape(-1).reshape(3, 3) * y,
    lambda x, y: jnp.einsum("ij,ik->jk", x, y),
    lambda x, y: jnp.broadcast_to(x[:, None, :], (3, 4, 3)).reshape(12, 3).reshape(3, 4, 3).mean(axis=1),
    lambda x, y: x[::-1],
)


@hypothesis.settings(max_examples=60, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 9), st.integers(0, 9)), max_size=4)
)
def test_whatever_passes_has_a_diagonal_jacobian(steps: list[tuple[int, int, int]]) -> None:
    """Random programs: soundness against the numbers, not against an expectation."""

    def update(w: Any, a: Any) -> Any:
        values = [w, a]
        for operation, first, second in steps:
            values.append(OPERATIONS[operation](values[first % len(values)], values[second % len(values)]))
        return values[-1]

    try:
        check(update)
    except cm.NotLocalError:
        return
    points = jax.random.normal(jax.random.key(len(steps)), (2, 3, 3))
    for jacobian in jax.jacobian(update, argnums=(0, 1))(*points):
        of_pairs = np.asarray(jacobian).reshape(9, 9)
        assert np.all(of_pairs[~np.eye(9, dtype=bool)] == 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("shared strengths", "decay")])
def test_the_rules_of_the_package_are_local(name: str) -> None:
    split, task = architecture(name, jax.random.key(0), (3, 3, 3)), random_task(jax.random.key(1), (3, 3, 3))
    params = split.problem.init_params(split.meta_params, task)
    report = cm.check_local(split.rule, split.problem, params, split.meta_params, task)
    assert len(report.sources) == len(jax.tree.leaves(split.meta_params))
    assert all(report.sources.values())
    assert str(report).count("<-") == len(report.sources)


@pytest.mark.parametrize(
    # The one spreads over the anchors of all layers, the other adds up what the synapses of a layer measure.
    ("name", "why"),
    [("shared strengths", r"meta_params\['log_strength'\] and params"), ("decay", "reduce_sum")],
)
def test_a_strength_shared_by_synapses_is_not_local(name: str, why: str) -> None:
    split, task = architecture(name, jax.random.key(0)), random_task(jax.random.key(1))
    params = split.problem.init_params(split.meta_params, task)
    with pytest.raises(cm.NotLocalError, match=why):
        cm.check_local(split.rule, split.problem, params, split.meta_params, task)


def test_automatic_derivatives_are_local_where_the_loss_is() -> None:
    split, task = architecture("complex synapse", jax.random.key(0)), random_task(jax.random.key(1))
    params = split.meta_params["anchor"]
    cm.check_local(cm.Autodiff(), split.problem, params, split.meta_params, task)
    split = architecture("fast head", jax.random.key(0))
    params = split.problem.init_params(split.meta_params, task)
    with pytest.raises(cm.NotLocalError, match="task"):
        cm.check_local(cm.Autodiff(), split.problem, params, split.meta_params, task)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromSignals(cm.LocalRule):
    """The update of a kernel by any function of presynaptic activity and postsynaptic error."""

    combine: Callable[[Any, Any], Any] = dataclasses.field(metadata={"static": True})
    axes: Any = dataclasses.field(default=((None, 0), (None, 1)), metadata={"static": True})

    def signals(self, problem, params, meta_params, task, beta):
        return [cm.Signal(x, axes) for x, axes in zip((task, params), self.axes, strict=True)]

    def measure(self, params, meta_params, signals):
        before, after = (signal.value for signal in signals)
        return self.combine(before, after)


TIMES, PRE, POST = 6, jnp.zeros((6, 3)), jnp.zeros((6, 3))


def check_signals(combine: Callable[[Any, Any], Any], **stated: Any) -> cm.LocalityReport:
    return cm.check_local(FromSignals(combine, **stated), PROBLEM, POST, W, PRE)


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, e: x.T @ e,
        lambda x, e: jnp.einsum("ti,tj->ij", x**2, jnp.tanh(e)),
        lambda x, e: jnp.sum(x, 0)[:, None] * jnp.max(e, 0)[None, :],
        lambda x, e: jnp.mean(x[:, :, None] * e[:, None, :], axis=0),
        lambda x, e: jnp.cumsum(x, axis=0).T @ e,
        lambda x, e: jnp.broadcast_to(jnp.sum(e, 0), (3, 3)),
        lambda x, e: x.reshape(2, 3, 3).sum((0, 1))[:, None] * jnp.ones((3, 3)),
    ],
)
def test_signals_may_be_contracted_over_examples_and_time(combine: Callable[[Any, Any], Any]) -> None:
    check_signals(combine)


@pytest.mark.parametrize(
    ("combine", "word"),
    [
        (lambda x, e: e.T @ x, "transpose"),  # pre and post exchanged: the shapes agree
        (lambda x, e: x.T @ x, "same axis"),  # activity of two presynaptic neurons
        (lambda x, e: (x.T @ e) * jnp.sum(e), "reduce_sum"),
        (lambda x, e: x.T @ (e / jnp.sum(e**2, axis=1, keepdims=True)), "reduce_sum"),
        (lambda x, e: jnp.ones((3, 6)) @ (x @ e.T) @ jnp.ones((6, 3)), "dot_general"),
        (lambda x, e: x.T @ (x * e), "mul"),  # pairs neurons that only share a number
        (lambda x, e: x.T @ jnp.sort(e, axis=1), "sort"),
    ],
)
def test_signals_of_other_neurons_are_distant(combine: Callable[[Any, Any], Any], word: str) -> None:
    with pytest.raises(cm.NotLocalError, match=word):
        check_signals(combine)


def test_signals_must_fit_their_leaf() -> None:
    with pytest.raises(ValueError, match="that it runs along"):
        check_signals(lambda x, e: x.T @ e, axes=((0, 1), (None, 1)))
    with pytest.raises(ValueError, match="that it runs along"):
        check_signals(lambda x, e: x.T @ e, axes=((None, 2), (None, 1)))
    with pytest.raises(ValueError, match="No two axes"):
        cm.Signal(W, (0, 0))


def test_leaves_of_other_names_are_other_synapses() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Crossed(cm.LocalRule):
        source: str = dataclasses.field(metadata={"static": True})
        held: Any = 0.0

        def measure(self, params, meta_params, signals):
            return {"anchor": {"u": params[self.source] * self.held, "v": meta_params["anchor"]["v"]}}

    meta, params = {"anchor": {"u": W, "v": W}}, {"u": W, "v": W}
    cm.check_local(Crossed("u"), PROBLEM, params, meta, None)
    cm.check_local(Crossed("u", {"u": 1.0}["u"]), PROBLEM, params, meta, None)
    with pytest.raises(cm.NotLocalError, match=r"params\['v'\], which are other synapses"):
        cm.check_local(Crossed("v"), PROBLEM, params, meta, None)
    with pytest.raises(cm.NotLocalError, match="without a leaf of `params`"):
        cm.check_local(Crossed("u", {"x": W}["x"]), PROBLEM, params, meta, None)


def test_the_task_is_at_no_synapse() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Reads(cm.PlasticityRule):
        def statistic(self, problem, params, meta_params, task, beta):
            return meta_params * task

    with pytest.raises(cm.NotLocalError, match="task, which is at no synapse"):
        cm.check_local(Reads(), PROBLEM, W, W, W)


def test_a_statistic_put_in_place_of_the_measurement_is_what_counts() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Pretends(cm.AnchoredSynapse):
        def statistic(self, problem, params, meta_params, task, beta):
            return {"anchor": meta_params["anchor"] * jnp.sum(params)}

    with pytest.raises(cm.NotLocalError, match="reduce_sum"):
        cm.check_local(Pretends(), PROBLEM, W, {"anchor": W}, None)


def test_the_graph_can_be_drawn_on_anything_that_draws() -> None:
    class Axes:
        def __init__(self) -> None:
            self.lines: list[Any] = []
            self.texts: list[str] = []

        def plot(self, *args: Any, **style: Any) -> None:
            self.lines.append(args)

        def text(self, x: float, y: float, label: str, **style: Any) -> None:
            self.texts.append(label)

        def set_axis_off(self) -> None:
            pass

    axes, report = Axes(), check(lambda w, a: w - a)
    report.draw(axes, "['anchor']")
    assert sorted(axes.texts) == ["`sub`", "meta_params['anchor']", "params"]
    assert len(axes.lines) == 2
    assert report.sources["['anchor']"] == ("meta_params['anchor']", "params")


def test_shapes_are_enough() -> None:
    """Nothing is computed, so nothing need exist."""
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    meta = {"anchor": shape, "log_strength": shape}
    assert cm.check_local(cm.AnchoredSynapse(), PROBLEM, shape, meta, None).sources.keys() == {
        "['anchor']", "['log_strength']"
    }  # fmt: skip
