"""Save and resume with NumPy alone: every array under its name, no pickle; what resumes is the same to the bit."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
batch = {name: {"x": images[at], "y": labels[at]} for name, at in (("train", slice(100)), ("val", slice(100, 500)))}


def loss(params, data):
    return optax.softmax_cross_entropy_with_integer_labels(data["x"] @ params["w"] + params["b"], data["y"]).mean()


def inner_loss(params, log_decay, batch):
    return loss(params, batch["train"]) + jnp.sum(jnp.exp(log_decay) * params["w"] ** 2)


init_params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: loss(params, batch["val"]), lambda *_: init_params)
settings = {"problem": problem, "init_meta_params": jnp.full(10, -3.0), "mode": cm.SingleLoop(beta=0.1)}
tx = cm.tune_while_training(optax.adam(0.02), meta_optimizer=optax.adam(0.05), **settings)


@jax.jit
def step(params, state):
    grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
    updates, state = tx.update(grads, state, params, task=batch)
    return optax.apply_updates(params, updates), state


def save(path, tree):
    np.savez(path, **{jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(tree)})


def restore(path, like):  # `like` brings the structure, and the file the numbers
    with np.load(path, allow_pickle=False) as saved:
        return jax.tree_util.tree_map_with_path(lambda name, _: jnp.asarray(saved[jax.tree_util.keystr(name)]), like)


fresh = carry = init_params, tx.init(init_params)
path = Path(tempfile.mkdtemp()) / "checkpoint.npz"
for _ in range(100):
    carry = step(*carry)
save(path, carry)
resumed = restore(path, fresh)
for _ in range(100):
    carry, resumed = step(*carry), step(*resumed)
print(f"held-out loss {loss(carry[0], batch['val']):.4f}, resumed {loss(resumed[0], batch['val']):.4f}")
bits, resumed_bits = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (carry, resumed))
assert bits == resumed_bits
