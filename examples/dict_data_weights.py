"""A network that weighs examples by their loss, and a weight for each class: for wrong labels and rare classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = load_digits(return_X_y=True)
images, rng = jnp.asarray(images, jnp.float32) / 16, np.random.default_rng(0)
# 300 examples, 40 % of them mislabelled, and 300 of which the classes 5 to 9 are a tenth as frequent as the others.
noisy = (labels[:300] + (rng.random(300) < 0.4) * rng.integers(1, 10, size=300)) % 10
rare = np.concatenate([np.flatnonzero(labels[:900] == k)[: 55 if k < 5 else 5] for k in range(10)])
mislabelled, imbalanced = (images[:300], jnp.asarray(noisy)), (images[rare], jnp.asarray(labels[rare]))
val, test = ((images[at], jnp.asarray(labels[at])) for at in (slice(900, 1000), slice(1000, None)))
keys = jax.random.split(jax.random.key(0), 3)
init_params = (0.2 * jax.random.normal(keys[0], (64, 64)), 0.2 * jax.random.normal(keys[1], (64, 10)))
start = {"in": jax.random.normal(keys[2], (2, 16)), "out": jnp.zeros(16), "class": jnp.zeros(10)}


def losses(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(data[0] @ params[0]) @ params[1], data[1])


def weights_of(values, meta):  # a weight network (Shu et al. 2019)
    return 2 * jax.nn.sigmoid(jnp.tanh(jnp.stack([values, jnp.ones_like(values)], axis=1) @ meta["in"]) @ meta["out"])


def inner_loss(params, meta, batch):
    weights = weights_of(batch["values"], meta) * 10 * jax.nn.softmax(meta["class"])[batch["data"][1]]
    return jnp.mean(weights * losses(params, batch["data"])) + 1e-2 * optax.tree.norm(params, squared=True)


problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: losses(params, val).mean(), lambda *_: init_params)


@jax.jit
def trained(data, every):
    settings = {"problem": problem, "init_meta_params": start, "every": lambda step: every, "mode": cm.SingleLoop()}
    tx = cm.tune_while_training(optax.sgd(0.1, momentum=0.9), meta_optimizer=optax.adam(0.02), **settings)

    def step(_, carry):
        batch = {"data": data, "values": losses(carry[0], data)}  # held while the phases run, as in training
        grads = jax.grad(inner_loss)(carry[0], cm.current_meta_params(carry[1]), batch)
        updates, state = tx.update(grads, carry[1], carry[0], task=batch)
        return optax.apply_updates(carry[0], updates), state

    params, state = jax.lax.fori_loop(0, 600, step, (init_params, tx.init(init_params)))
    return losses(params, test).mean(), cm.current_meta_params(state)


runs = [trained(data, every) for data in (mislabelled, imbalanced) for every in (10_000, 1)]
(plain, _), (weighted, meta), (equal, _), (balanced, other) = runs
right, wrong, classes = *weights_of(jnp.array([0.1, 5.0]), meta), 10 * jax.nn.softmax(other["class"])
print(f"mislabelled: test loss {plain:.2f} to {weighted:.2f}, weights {right:.2f} of losses of 0.1, {wrong:.2f} of 5")
print(f"imbalanced: test loss {equal:.2f} to {balanced:.2f}, weights", [f"{weight:.1f}" for weight in classes])
assert weighted < 0.8 * plain and balanced < 0.8 * equal and right > wrong and classes[5:].mean() > classes[:5].mean()
