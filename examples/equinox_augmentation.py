"""How far to shift images in training, learned while an Equinox network trains on augmented data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

import contrastive_meta as cm

images, labels = jnp.asarray(load_digits().images / 16), jnp.asarray(load_digits().target)


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


log_strength = jnp.log(jnp.array([0.2, 0.2]))  # of shifts down and sideways
problem = cm.BilevelProblem(inner_loss, lambda params, _, batch: loss(params, val), lambda *_: init_params)


@jax.jit
def trained(every):
    settings = {"problem": problem, "init_meta_params": log_strength, "every": lambda step: every}
    tx = cm.tune_while_training(optax.sgd(0.2, momentum=0.9), meta_optimizer=optax.adam(0.05), **settings)

    def step(i, carry):
        params, state = carry
        batch = {"normal": jax.random.normal(jax.random.key(i), (200, 2))}
        grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
        updates, state = tx.update(grads, state, params, task=batch)
        return optax.apply_updates(params, updates), state

    params, state = jax.lax.fori_loop(0, 600, step, (init_params, tx.init(init_params)))
    return loss(params, test), jnp.exp(cm.current_meta_params(state))


(fixed, _), (tuned, (down, sideways)) = trained(every=1000), trained(every=10)
print(f"test loss {fixed:.2f} at shifts of 0.2 pixels, {tuned:.2f} at {down:.2f} down and {sideways:.2f} sideways")
assert tuned < 0.9 * fixed and sideways > 2 * down
