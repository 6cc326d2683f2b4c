"""Attention and its code are the formulas; with linear networks it is a hypernetwork over a bank of modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures
from contrastive_meta.problems import SplitData
from tests.oracles import relative_error

HEADS, SIZE, HEAD_SIZE = 3, 4, 2


def network():
    return architectures.attention_params(jax.random.key(0), SIZE, num_heads=HEADS, head_size=HEAD_SIZE)


def by_hand(params, x, context, kind, shown, activation):
    """One query, key and head at a time, in NumPy."""
    params = {name: np.asarray(kernel) for name, kernel in params.items()}
    heads = [slice(h * HEAD_SIZE, (h + 1) * HEAD_SIZE) for h in range(HEADS)]
    outputs, code = np.zeros((len(x), SIZE)), np.zeros((len(x), len(context), HEADS))
    for q in range(len(x)):
        for h, columns in enumerate(heads):
            query = x[q] @ params["query"][:, columns]
            scores = np.array([query @ (y @ params["key"][:, columns]) for y in context]) / HEAD_SIZE**0.5
            if kind == "softmax":
                scores = np.where(shown[q], np.exp(scores), 0) / np.sum(np.exp(scores[shown[q]]))
            code[q, :, h] = np.where(shown[q], scores, 0)
        for k in range(len(context)):
            values = [context[k] @ params["value"][:, columns] for columns in heads]
            if kind == "hypernetwork" and shown[q, k]:
                code[q, k] /= np.sqrt(np.mean(code[q, k] ** 2) + 1e-6)
                values = [activation(sum(code[q, k, g] * values[g] for g in range(HEADS)))] * HEADS
            outputs[q] += sum(code[q, k, h] * values[h] @ params["output"][heads[h]] for h in range(HEADS))
    return outputs, code


@pytest.mark.parametrize("kind", ["softmax", "linear", "hypernetwork"])
def test_outputs_and_code_are_the_formulas(kind):
    random = np.random.default_rng(1)
    x, context, shown = random.normal(size=(5, SIZE)), random.normal(size=(6, SIZE)), random.random((5, 6)) < 0.7
    shown[:, 0] = True
    outputs, code = by_hand(network(), x, context, kind, shown, lambda v: np.maximum(v, 0))
    found = architectures.attention(
        network(), jnp.asarray(x), kind=kind, num_heads=HEADS, context=jnp.asarray(context), mask=jnp.asarray(shown)
    )
    assert relative_error(found.outputs, outputs) < 1e-12
    assert relative_error(found.code, code) < 1e-12
    # Leading axes are free, and what a query sees of itself is the default.
    twice = architectures.attention(network(), jnp.stack([x, 2 * x]), kind=kind, num_heads=HEADS)
    alone, _ = by_hand(network(), x, x, kind, np.ones((5, 5), bool), lambda v: np.maximum(v, 0))
    assert relative_error(twice.outputs[0], alone) < 1e-12


def test_linear_attention_is_a_bank_of_modules_mixed_by_its_code():
    """Its value networks are linear: module h is V_h O_h, and its coefficient the code's number h."""
    params, x = network(), jax.random.normal(jax.random.key(2), (5, SIZE))
    value = params["value"].reshape(SIZE, HEADS, HEAD_SIZE)
    output = params["output"].reshape(HEADS, HEAD_SIZE, SIZE)
    bank = jnp.einsum("ihd,hdo->hio", value, output)
    for kind in ("linear", "softmax"):
        found = architectures.attention(params, x, kind=kind, num_heads=HEADS)
        of_pairs = jax.vmap(jax.vmap(lambda a, y: cm.ModuleBank().mix(y, bank, a), (0, 0)), (0, None))
        assert relative_error(found.outputs, of_pairs(found.code, x).sum(1)) < 1e-12
    # The hypernetwork form with linear networks mixes two layers: the same modules, squared in the code.
    linear = architectures.attention(params, x, kind="hypernetwork", num_heads=HEADS, activation=lambda v: v)
    two_layers = jnp.einsum("qkh,qkg,igd,hdo,ki->qo", linear.code, linear.code, value, output, x)
    assert relative_error(linear.outputs, two_layers) < 1e-12


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expected `kind`"):
        architectures.attention(network(), jnp.ones((2, SIZE)), kind="hyper", num_heads=HEADS)
    with pytest.raises(ValueError, match="4 heads do not divide"):
        architectures.attention(network(), jnp.ones((2, SIZE)), kind="linear", num_heads=4)


def loss(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def apply(body, x):
    """Attention over the examples, and a readout: no layers of an `mlp`."""
    return jnp.tanh(architectures.attention(body["attention"], x, kind="linear", num_heads=HEADS)[0]) @ body["readout"]


@pytest.mark.parametrize("hidden_sizes", [(), (5,)], ids=["linear", "nonlinear"])
def test_a_hypernetwork_makes_the_weights_of_any_body(hidden_sizes):
    body = {"attention": network(), "readout": jnp.ones((SIZE, 2))}
    split = architectures.hypernetwork(
        apply, loss, body, 3, jax.random.key(3), hidden_sizes=hidden_sizes, generated=("value",), fast=("readout",)
    )
    task = SplitData(*(jax.random.normal(jax.random.key(k), (6, n)) for k, n in enumerate((SIZE, 2, SIZE, 2))))
    start = split.problem.init_params(split.meta_params, task)
    assert sorted(start) == ["body/readout", "embedding/attention/value"]
    # At embeddings of zero the body is what it was.
    assert split.problem.outer_loss(start, split.meta_params, task) == loss(apply(body, task.x_val), task.y_val)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(4), leaf.shape), start)
    slow, embedding = split.meta_params["slow"], np.asarray(params["embedding/attention/value"])
    coefficients = embedding
    if hidden_sizes:
        layers = [np.asarray(slow[f"generator/{name}/kernel"]) for name in ("hidden_0", "readout")]
        coefficients = np.tanh(embedding @ layers[0]) @ layers[1]
    value = np.asarray(body["attention"]["value"])
    value = value + np.tensordot(coefficients, np.asarray(slow["modules/attention/value"]), axes=1)
    made = {"attention": {**body["attention"], "value": jnp.asarray(value)}, "readout": params["body/readout"]}
    expected = loss(apply(made, task.x_val), task.y_val)
    assert abs(split.problem.outer_loss(params, split.meta_params, task) - expected) < 1e-12 * expected
    with pytest.raises(ValueError, match="is named one of"):
        architectures.hypernetwork(apply, loss, body, 3, jax.random.key(3))
