"""A weight for every training example, learned while a Haiku network trains: mislabelled examples lose theirs."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import contrastive_meta as cm

NUM_TRAIN = 300
images, labels = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
noisy = rng.random(NUM_TRAIN) < 0.5  # these get a label drawn at random, a tenth of them the right one
given = np.where(noisy, rng.integers(10, size=NUM_TRAIN), labels[:NUM_TRAIN])
wrong, images = given != labels[:NUM_TRAIN], jnp.asarray(images, jnp.float32) / 16
train = {"x": images[:NUM_TRAIN], "y": jnp.asarray(given)}
val, test = ({"x": images[at], "y": jnp.asarray(labels[at])} for at in (slice(300, 400), slice(400, None)))
batch = {"train": train, "val": val}

network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 10], activation=jax.nn.tanh)(x)))
init_params = network.init(jax.random.key(0), train["x"])  # a dict of dicts of arrays: `params`


def losses(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, data["x"]), data["y"])


def inner_loss(params, logits, batch):
    decay = 1e-3 * optax.tree.norm(params, squared=True)
    return jnp.mean(jax.nn.sigmoid(logits) * losses(params, batch["train"])) + decay


def outer_loss(params, logits, batch):
    return losses(params, batch["val"]).mean()


problem = cm.BilevelProblem(inner_loss, outer_loss, lambda *_: init_params)


@jax.jit
def trained(every):
    optimizers = {"optimizer": optax.sgd(0.2, momentum=0.9), "meta_optimizer": optax.adam(0.1)}
    start = jnp.zeros(NUM_TRAIN)
    tx = cm.tune_while_training(**optimizers, problem=problem, init_meta_params=start, every=lambda step: every)

    def step(_, carry):
        params, state = carry
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
        updates, state = tx.update(grads, state, params, task=batch)
        return optax.apply_updates(params, updates), state

    params, state = jax.lax.fori_loop(0, 1000, step, (init_params, tx.init(init_params)))
    accuracy = jnp.mean(jnp.argmax(network.apply(params, test["x"]), axis=1) == test["y"])
    return accuracy, jax.nn.sigmoid(cm.current_meta_params(state))


(plain, _), (weighted, weights) = trained(every=10_000), trained(every=10)
on_wrong, on_right = float(weights[wrong].mean()), float(weights[~wrong].mean())
print(f"mean weight of wrong labels {on_wrong:.2f}, of right ones {on_right:.2f}")
print(f"test accuracy unweighted {plain:.3f}, weighted {weighted:.3f}")
assert on_wrong < 0.5 * on_right and weighted > plain
