"""An `argmin` as the last layer of a network (a dict of arrays): it denoises, and learns where not to smooth."""

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm

LENGTH = 32


def signals(key, number):
    """Steps at random places and of random heights, in noise."""
    keys = jax.random.split(key, 3)
    jumps = jax.random.bernoulli(keys[0], 0.1, (number, LENGTH)) * jax.random.normal(keys[1], (number, LENGTH))
    clean = jnp.cumsum(2 * jumps, axis=1)
    return clean + 0.3 * jax.random.normal(keys[2], clean.shape), clean


def energy(z, logits, noisy):  # springs hold the signal to the data, and neighbours to each other
    return jnp.sum((z - noisy) ** 2) + jnp.sum(20 * jax.nn.sigmoid(logits) * jnp.diff(z) ** 2)


def network(params, noisy):  # from the neighbourhood of each gap to its stiffness
    padded = jnp.pad(noisy, 2, mode="edge")
    windows = jnp.stack([padded[i : i + LENGTH - 1] for i in range(6)], axis=1)
    hidden = jnp.tanh((windows[:, 1:] - windows[:, :-1]) @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


learner = cm.OptaxDescent(optax.sgd(0.02, momentum=0.64), num_steps=80)


def loss(params, data, adjoint):
    solve = cm.argmin(energy, learner, init=lambda logits, noisy: noisy, adjoint=adjoint)
    return jnp.mean((jax.vmap(lambda noisy: solve(network(params, noisy), noisy))(data[0]) - data[1]) ** 2)


init = {"w1": jax.random.normal(jax.random.key(0), (5, 16)), "b1": jax.random.normal(jax.random.key(1), (16,))}
params = init | {"w2": jnp.zeros(16), "b2": jnp.array(-2.0)}
value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
optimizer, by_contrast = optax.adam(0.05), cm.ContrastiveAdjoint()
state = optimizer.init(params)
for i in range(100):
    _, grads = value_and_grad(params, signals(jax.random.key(i), 64), by_contrast)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)

held_out = signals(jax.random.key(1000), 64)
learned, grads = value_and_grad(params, held_out, by_contrast)
_, implicit = value_and_grad(params, held_out, cm.ImplicitAdjoint())
flat = [{**params, "w2": jnp.zeros(16), "b2": logit} for logit in jnp.arange(-5.0, 3.0)]
uniform = min(float(value_and_grad(p, held_out, by_contrast)[0]) for p in flat)
apart = optax.tree.norm(optax.tree.sub(grads, implicit)) / optax.tree.norm(implicit)
print(f"squared error on held-out signals {learned:.4f}; of the best uniform stiffness {uniform:.4f}")
print(f"the gradient by contrast and by implicit differentiation differ by {apart:.1e}")
assert learned < 0.8 * uniform and apart < 1e-3
