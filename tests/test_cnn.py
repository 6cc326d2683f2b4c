"""The convolutional body computes convolutions, its rules are exact, and it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import architectures
from contrastive_meta.problems import SplitData
from tests.oracles import cast, relative_error

IMAGE = (6, 5, 2)


def images(seed, num=4):
    return jax.random.normal(jax.random.key(seed), (num, *IMAGE))


def loss(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def test_a_block_is_a_convolution_normalised_and_pooled():
    """Against XLA's own convolution and pooling."""
    params = architectures.cnn_params(jax.random.key(0), IMAGE, (3, 4), 2)
    params = jax.tree.map(lambda w: w + 0.1, params)
    x = images(1)
    for name in ("hidden_0", "hidden_1"):
        kernel = params[name]["kernel"].reshape(3, 3, x.shape[-1], -1)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x + params[name]["bias"]
        axes = (1, 2, 3)
        x = (x - x.mean(axes, keepdims=True)) / np.sqrt(np.asarray(x).var(axes, keepdims=True) + 1e-5)
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    expected = x.reshape(4, -1) @ params["readout"]["kernel"] + params["readout"]["bias"]
    got = architectures.cnn(params, images(1))
    assert relative_error(got, expected) < 1e-12
    # Leading axes are free, none or several; and an image does not know of the others.
    assert relative_error(architectures.cnn(params, images(1).reshape(2, 2, *IMAGE)), got.reshape(2, 2, -1)) < 1e-12
    assert relative_error(architectures.cnn(params, images(1)[0]), got[0]) < 1e-12


SPLITS = {
    "fast head": (architectures.fast_head, lambda p: p, IMAGE),
    "gain modulation": (architectures.gain_modulation, architectures.with_gains, IMAGE),
    "context": (architectures.context_parameters, lambda p: architectures.with_context(p, 1), (6, 5, 3)),
    "modules": (
        architectures.modular_hypernetwork, lambda p: architectures.with_modules(p, 2, jax.random.key(2)), IMAGE
    ),
    "learned initialisation": (architectures.learned_initialisation, lambda p: p, IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_rules_for_it_are_exact_and_local(name):
    make, prepare, image = SPLITS[name]
    network = prepare(architectures.cnn_params(jax.random.key(0), image, (3, 4), 2))
    split = make(architectures.cnn, loss, network)
    targets = jax.random.normal(jax.random.key(3), (2, 4, 2))
    task = SplitData(images(1), targets[0], images(2), targets[1])
    params = jax.tree.map(lambda w: 1.1 * w + 0.05, split.problem.init_params(split.meta_params, task))

    @jax.jit
    def statistics(params, meta_params, task):
        at = split.problem, params, meta_params, task, 0.3
        return split.rule.statistic(*at), cm.Autodiff().statistic(*at)

    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-4)):
        local, derived = statistics(*cast((params, split.meta_params, task), dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(local)} == {jnp.dtype(dtype)}
        assert relative_error(local, derived) < tolerance
    cm.check_local(split.rule, split.problem, params, split.meta_params, task)  # or raises


def test_it_learns_and_a_contrast_is_the_exact_meta_gradient():
    """A head on four blocks, down to one place: the head's problem is convex, so learning ends."""
    network = architectures.cnn_params(jax.random.key(0), (8, 8, 1), (3, 3, 3, 3), 2)
    split = architectures.fast_head(architectures.cnn, loss, network, strength=1.0)
    keys = jax.random.split(jax.random.key(1), 4)
    data = [jax.random.normal(k, s) for k, s in zip(keys, [(5, 8, 8, 1), (5, 2)] * 2, strict=True)]
    solver = cm.OptaxDescent(optax.sgd(0.2), num_steps=150)
    contrast = cm.Contrastive(solver, solver, cm.central_difference(1e-3), rule=split.rule, estimate_error=False)
    task = SplitData(*data)
    got = contrast.estimate(split.problem, split.meta_params, task)
    exact = cm.ImplicitDifferentiation(solver).estimate(split.problem, split.meta_params, task)
    # What is left is the truncation of the contrast, beta^2.
    assert relative_error(got.grad, exact.grad) < 1e-5
    start = split.problem.init_params(split.meta_params, task)
    before, after = (float(split.problem.inner_loss(w, split.meta_params, task)) for w in (start, got.params))
    assert after < 0.9 * before


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="images of shape"):
        architectures.cnn({}, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="channels of one block"):
        architectures.cnn_params(jax.random.key(0), IMAGE, ())
