"""A weight for every training example, learned while a Haiku network trains: mislabelled examples lose theirs."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
wrong = rng.random(300) < 0.5
labels[:300] = np.where(wrong, (labels[:300] + rng.integers(1, 10, size=300)) % 10, labels[:300])
images, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
train, val, test = ({"x": images[at], "y": labels[at]} for at in (slice(300), slice(300, 400), slice(400, None)))
network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 10], activation=jax.nn.tanh)(2 * x - 1)))
init_params = network.init(jax.random.key(0), train["x"])  # a dict of dicts of arrays: `params`


def losses(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, data["x"]), data["y"])


def inner_loss(params, logits, batch):
    weighted = jax.nn.sigmoid(logits) * losses(params, batch)
    return jnp.mean(weighted) + 1e-3 * optax.tree.norm(params, squared=True)


problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: losses(params, val).mean(), lambda *_: init_params)


@jax.jit
def trained(every):
    settings = {"problem": problem, "init_meta_params": jnp.zeros(300), "every": lambda step: every}
    tx = cm.tune_while_training(optax.sgd(0.2, momentum=0.9), meta_optimizer=optax.adam(0.1), **settings)

    def step(_, carry):
        params, state = carry
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), train)
        updates, state = tx.update(grads, state, params, task=train)
        return optax.apply_updates(params, updates), state

    params, state = jax.lax.fori_loop(0, 1000, step, (init_params, tx.init(init_params)))
    accuracy = jnp.mean(jnp.argmax(network.apply(params, test["x"]), axis=1) == test["y"])
    return accuracy, jax.nn.sigmoid(cm.current_meta_params(state))


(plain, _), (weighted, weights) = trained(every=10_000), trained(every=10)
on_wrong, on_right = float(weights[wrong].mean()), float(weights[~wrong].mean())
print(f"mean weight of wrong labels {on_wrong:.2f}, of right ones {on_right:.2f}")
print(f"test accuracy unweighted {plain:.3f}, weighted {weighted:.3f}")
assert on_wrong < 0.5 * on_right and weighted > plain
