"""Weight decay of each layer of a small CNN (Flax NNX), learned in the one training run that it is for."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = jnp.asarray(load_digits().images[..., None] / 16), jnp.asarray(load_digits().target)
parts = {"train": slice(100), "val": slice(100, 300), "test": slice(300, None)}
data = {name: {"x": images[at], "y": labels[at]} for name, at in parts.items()}


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.conv2(nnx.gelu(self.conv1(x)))).reshape(len(x), -1))


graphdef, init_params = nnx.split(CNN(nnx.Rngs(0)))  # the arrays are `params`; the rest is code


def loss(params, part):
    return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graphdef, params)(part["x"]), part["y"]).mean()


def inner_loss(params, log_decay, batch):
    penalty = sum(jnp.exp(log_decay[name]) * optax.tree.norm(params[name], squared=True) for name in log_decay)
    return loss(params, batch["train"]) + penalty / 2


log_decay = dict.fromkeys(("conv1", "conv2", "head"), jnp.log(1e-4))
problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: loss(params, batch["val"]), lambda *_: init_params)


@jax.jit
def trained(every):
    settings = {"problem": problem, "init_meta_params": log_decay, "every": lambda step: every}
    tx = cm.tune_while_training(optax.sgd(0.1, momentum=0.9), meta_optimizer=optax.adam(0.3), **settings)

    def step(_, carry):
        params, state = carry
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), data)
        updates, state = tx.update(grads, state, params, task=data)
        return optax.apply_updates(params, updates), state

    params, state = jax.lax.fori_loop(0, 250, step, (init_params, tx.init(init_params)))
    return loss(params, data["test"]), jax.tree.map(jnp.exp, cm.current_meta_params(state))


(fixed, _), (tuned, decays) = trained(every=1000), trained(every=10)
print(f"test loss {fixed:.2f} at decays of 0.0001, {tuned:.2f} at", {name: f"{decays[name]:.4f}" for name in decays})
assert tuned < 0.9 * fixed
