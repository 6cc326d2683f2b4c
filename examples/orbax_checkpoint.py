"""Save and resume meta-learning with Orbax, warm starts included; what resumes is the same to the bit."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import contrastive_meta as cm

# Two regressions, five inputs; learned is how strongly to shrink the weight of each input.
x, x_val = jax.random.normal(jax.random.key(0), (2, 2, 20, 5))
w = jnp.array([[2.0, -1.0, 0.0, 0.0, 0.0], [-1.0, 3.0, 0.0, 0.0, 0.0]])
noise = jax.random.normal(jax.random.key(1), (2, 20))
tasks = {
    "x": x,
    "y": jnp.einsum("tni,ti->tn", x, w) + noise,
    "x_val": x_val,
    "y_val": jnp.einsum("tni,ti->tn", x_val, w),
}
problem = cm.BilevelProblem(
    inner_loss=lambda w, s, t: jnp.mean((t["x"] @ w - t["y"]) ** 2) + jnp.sum(5 * jax.nn.sigmoid(s) * w**2),
    outer_loss=lambda w, s, t: jnp.mean((t["x_val"] @ w - t["y_val"]) ** 2),
    init_params=lambda s, t: jnp.zeros(5),
)
estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.1, momentum=0.9), num_steps=50))
tx = cm.meta_optimizer(optax.adam(0.2), problem, estimator, warm_start=tasks)


@jax.jit
def step(meta_params, state):
    updates, state = tx.update(None, state, meta_params, tasks=tasks)
    return optax.apply_updates(meta_params, updates), state


fresh = carry = jnp.zeros(5), tx.init(jnp.zeros(5))
path, losses = Path(tempfile.mkdtemp()) / "checkpoint", []
with ocp.StandardCheckpointer() as checkpointer:
    for i in range(40):
        if i == 20:
            checkpointer.save(path, carry)  # a plain tree of arrays: meta-parameters and the wrapper's state
        carry = step(*carry)
        losses.append(float(carry[1].meta_gradient.outer_loss))
    checkpointer.wait_until_finished()
    resumed = checkpointer.restore(path, fresh)
for _ in range(20, 40):
    resumed = step(*resumed)
print(f"held-out loss {losses[0]:.4f} first, {losses[-1]:.4f} last, {resumed[1].meta_gradient.outer_loss:.4f} resumed")
bits, resumed_bits = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (carry, resumed))
assert bits == resumed_bits and losses[-1] < 0.9 * losses[0]
