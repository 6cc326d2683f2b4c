"""How far to shift images in training, learned while an Equinox network trains on augmented data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8) / 16, jnp.asarray(labels)


@jax.vmap
def shifted(image, by):  # in pixels, down and to the right; differentiable in `by`
    return map_coordinates(image, list(jnp.indices((8, 8)) - by[:, None, None]), order=1)


# Seen later, but not in training: digits moved sideways, 1 pixel in the root of the mean square.
seen_later = shifted(images, jnp.array([0.0, 1.0]) * jax.random.normal(jax.random.key(0), (len(images), 2)))
val, test = ({"x": seen_later[at], "y": labels[at]} for at in (slice(200, 600), slice(600, None)))
model = eqx.nn.MLP(64, 10, width_size=64, depth=1, activation=jax.nn.gelu, key=jax.random.key(1))
init_params, static = eqx.partition(model, eqx.is_inexact_array)  # the arrays are `params`


def loss(params, data):
    logits = jax.vmap(eqx.combine(params, static))(data["x"].reshape(-1, 64))
    return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"]).mean()


def inner_loss(params, log_strength, batch):
    augmented = {"x": shifted(images[:200], jnp.exp(log_strength) * batch["normal"]), "y": labels[:200]}
    return loss(params, augmented) + 1e-3 * optax.tree.norm(params, squared=True)


problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: loss(params, val), lambda *_: init_params)
log_strength = jnp.log(jnp.array([0.2, 0.2]))  # of shifts down and sideways


@jax.jit
def trained(every):
    settings = {"problem": problem, "init_meta_params": log_strength, "every": lambda step: every}
    tx = cm.tune_while_training(optax.sgd(0.2, momentum=0.9), meta_optimizer=optax.adam(0.05), **settings)

    def step(_, carry):
        params, state, key = carry
        batch, key = {"normal": jax.random.normal(key, (200, 2))}, jax.random.fold_in(key, 0)
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
        updates, state = tx.update(grads, state, params, task=batch)
        return optax.apply_updates(params, updates), state, key

    carry = init_params, tx.init(init_params), jax.random.key(2)
    params, state, _ = jax.lax.fori_loop(0, 600, step, carry)
    return loss(params, test), jnp.exp(cm.current_meta_params(state))


(fixed, _), (tuned, (down, sideways)) = trained(every=1000), trained(every=10)
print(f"test loss {fixed:.2f} at shifts of 0.2 pixels, {tuned:.2f} at {down:.2f} down and {sideways:.2f} sideways")
assert tuned < 0.8 * fixed and sideways > 2 * down
