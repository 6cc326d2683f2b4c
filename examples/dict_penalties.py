"""Decay by layer, label smoothing, a dropout rate and the weights of auxiliary tasks, tuned in one training run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import logit
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
# Few labels of digits. Of more images it is known whether the digit is even; a third task is pure noise.
few, many, val, test = slice(60), slice(300), slice(300, 500), slice(500, None)
targets = {"even": labels[many] % 2, "noise": jnp.asarray(np.random.default_rng(0).integers(0, 2, size=300))}
sizes = {"shared": (64, 32), "digit": (32, 10), "even": (32, 2), "noise": (32, 2)}
keys = dict(zip(sizes, jax.random.split(jax.random.key(0), 4), strict=True))
init_params = {name: 0.2 * jax.random.normal(keys[name], shape) for name, shape in sizes.items()}
hyper = {"decay": dict.fromkeys(sizes, jnp.log(1e-4)), "term": {"even": jnp.array(0.0), "noise": jnp.array(0.0)}}
hyper |= {"smoothing": logit(0.01), "dropout": logit(0.05)}


def loss(params, head, x, y, smoothing=0.0, keep=1.0):
    logits = (jax.nn.softplus(x @ params["shared"]) * keep) @ params[head]
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(y, sizes[head][1]), smoothing)).mean()


def inner_loss(params, hyper, uniform):
    # Dropout by a smooth relaxation (Gal, Hron & Kendall 2017): masks between 0 and 1 that move with the rate.
    keep = jax.nn.sigmoid(-(hyper["dropout"] + logit(uniform)) / 0.1) / jax.nn.sigmoid(-hyper["dropout"])
    total = loss(params, "digit", images[few], labels[few], jax.nn.sigmoid(hyper["smoothing"]), keep[few])
    total += sum(jnp.exp(hyper["term"][k]) * loss(params, k, images[many], targets[k], 0.0, keep) for k in targets)
    return total + sum(jnp.exp(hyper["decay"][name]) * jnp.sum(params[name] ** 2) for name in params) / 2


settings = {"problem": cm.BilevelProblem(
    inner_loss, lambda params, *_: loss(params, "digit", images[val], labels[val]), lambda *_: init_params
), "init_meta_params": hyper, "meta_optimizer": optax.adam(0.2)}  # fmt: skip


@jax.jit
def trained(every):
    tx = cm.tune_while_training(optax.sgd(0.1, momentum=0.9), every=lambda step: every, **settings)

    def step(carry, index):
        uniform = jax.random.uniform(jax.random.key(index), (300, 32), minval=1e-3, maxval=1 - 1e-3)
        grads = jax.grad(inner_loss)(carry[0], cm.current_meta_params(carry[1]), uniform)
        updates, state = tx.update(grads, carry[1], carry[0], task=uniform)
        return (optax.apply_updates(carry[0], updates), state), state._replace(optimizer=(), meta_optimizer=())

    (params, _), states = jax.lax.scan(step, (init_params, tx.init(init_params)), jnp.arange(400))
    return loss(params, "digit", images[test], labels[test]), states


(fixed, _), (tuned, states) = trained(10_000), trained(10)
print(report := cm.tuning_report(states), f"\ntest loss {fixed:.3f} untuned, {tuned:.3f} tuned")
assert tuned < 0.97 * fixed and report.last["['term']['noise']"] < report.last["['term']['even']"] - 1
