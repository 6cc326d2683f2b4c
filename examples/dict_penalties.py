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
keys = jax.random.split(jax.random.key(0), 4)
init_params = {name: 0.2 * jax.random.normal(key, sizes[name]) for name, key in zip(sizes, keys, strict=True)}
hyper = {"decay": dict.fromkeys(sizes, jnp.log(1e-4)), "term": {"even": jnp.array(0.0), "noise": jnp.array(0.0)}}
hyper |= {"smoothing": logit(0.01), "dropout": logit(0.05)}


def loss(params, head, x, y, smoothing=0.0, keep=1.0):
    logits = (jax.nn.softplus(x @ params["shared"]) * keep) @ params[head]
    smooth = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[1]), smoothing)
    return optax.softmax_cross_entropy(logits, smooth).mean()


def inner_loss(params, hyper, uniform):
    # Dropout by a smooth relaxation (Gal, Hron & Kendall 2017): masks between 0 and 1 that move with the rate.
    keep = jax.nn.sigmoid(-(hyper["dropout"] + logit(uniform)) / 0.1) / jax.nn.sigmoid(-hyper["dropout"])
    total = loss(params, "digit", images[few], labels[few], jax.nn.sigmoid(hyper["smoothing"]), keep[few])
    total += sum(jnp.exp(hyper["term"][k]) * loss(params, k, images[many], targets[k], 0.0, keep) for k in targets)
    return total + sum(jnp.exp(hyper["decay"][name]) * jnp.sum(params[name] ** 2) for name in params) / 2


def outer_loss(params, hyper, uniform):
    return loss(params, "digit", images[val], labels[val])


problem = cm.BilevelProblem(
    inner_loss, lambda p, *_: loss(p, "digit", images[val], labels[val]), lambda *_: init_params
)


@jax.jit
def trained(every):
    settings = {"problem": problem, "init_meta_params": hyper, "every": lambda step: every}
    tx = cm.tune_while_training(optax.sgd(0.1, momentum=0.9), meta_optimizer=optax.adam(0.2), **settings)

    def step(carry, index):
        params, state = carry
        uniform = jax.random.uniform(jax.random.key(index), (300, 32), minval=1e-3, maxval=1 - 1e-3)
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), uniform)
        updates, state = tx.update(grads, state, params, task=uniform)
        return (optax.apply_updates(params, updates), state), state._replace(optimizer=(), meta_optimizer=())

    (params, _), states = jax.lax.scan(step, (init_params, tx.init(init_params)), jnp.arange(400))
    return loss(params, "digit", images[test], labels[test]), cm.current_meta_params(states)["term"], states


(fixed, *_), (tuned, terms, states) = trained(10_000), trained(10)
print(cm.tuning_report(states), f"\ntest loss {fixed:.3f} untuned, {tuned:.3f} tuned")
assert tuned < 0.95 * fixed and terms["noise"][-1] < terms["even"][-1]
