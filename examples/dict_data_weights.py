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
noisy = np.where(rng.random(300) < 0.4, (labels[:300] + rng.integers(1, 10, size=300)) % 10, labels[:300])
rare = np.concatenate([np.flatnonzero(labels[:900] == k)[: 55 if k < 5 else 5] for k in range(10)])
mislabelled, imbalanced = (images[:300], jnp.asarray(noisy)), (images[rare], jnp.asarray(labels[rare]))
val, test = ((images[at], jnp.asarray(labels[at])) for at in (slice(900, 1000), slice(1000, None)))
keys = jax.random.split(jax.random.key(0), 3)
init_params = (0.2 * jax.random.normal(keys[0], (64, 64)), 0.2 * jax.random.normal(keys[1], (64, 10)))
# Tuned in both runs: the weight network (Shu et al. 2019) and logits of the classes' weights.
start = {"in": jax.random.normal(keys[2], (2, 16)), "out": jnp.zeros(16), "class": jnp.zeros(10)}


def losses(params, data):
    logits = jnp.tanh(data[0] @ params[0]) @ params[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1])


def weights_of(values, meta):
    inputs = jnp.stack([values, jnp.ones_like(values)], axis=1)
    return 2 * jax.nn.sigmoid(jnp.tanh(inputs @ meta["in"]) @ meta["out"])


def class_weights(meta):
    return 10 * jax.nn.softmax(meta["class"])


def inner_loss(params, meta, batch):
    weights = weights_of(batch["values"], meta) * class_weights(meta)[batch["data"][1]]
    return jnp.mean(weights * losses(params, batch["data"])) + 1e-3 * optax.tree.norm(params, squared=True)


problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: losses(params, val).mean(), lambda *_: init_params)


@jax.jit
def trained(data, every):
    settings = {"problem": problem, "init_meta_params": start, "every": lambda step: every, "mode": cm.SingleLoop()}
    tx = cm.tune_while_training(optax.sgd(0.1, momentum=0.9), meta_optimizer=optax.adam(0.02), **settings)

    def step(_, carry):
        params, state = carry
        batch = {"data": data, "values": losses(params, data)}  # held while the phases run, as in training
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
        updates, state = tx.update(grads, state, params, task=batch)
        return optax.apply_updates(params, updates), state

    params, state = jax.lax.fori_loop(0, 600, step, (init_params, tx.init(init_params)))
    meta = cm.current_meta_params(state)
    return losses(params, test).mean(), weights_of(jnp.array([0.1, 5.0]), meta), class_weights(meta)


(plain, *_), (weighted, (right, wrong), _) = trained(mislabelled, 10_000), trained(mislabelled, 1)
print(f"mislabelled: test loss {plain:.2f} to {weighted:.2f}, weights {right:.2f} of losses of 0.1, {wrong:.2f} of 5")
(equal, *_), (balanced, _, classes) = trained(imbalanced, 10_000), trained(imbalanced, 1)
print(f"imbalanced: test loss {equal:.2f} to {balanced:.2f}, weights", [f"{weight:.1f}" for weight in classes])
assert weighted < 0.9 * plain and balanced < 0.9 * equal and classes[5:].mean() > classes[:5].mean()
