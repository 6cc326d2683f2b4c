"""The penalty of a lasso (an array of weights), selected by its meta-gradient: 30 steps, and where a grid would end."""

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm

# A nudge must not lift a weight off 0, nor push one there. It is far weaker in float64. In float32 a step or two of
# the 30 come so close that the status says `NUDGED_NOT_CONVERGED` or `FELL_BACK`.
jax.config.update("jax_enable_x64", True)

KEYS = jax.random.split(jax.random.key(0), 5)
truth = jnp.where(jnp.arange(50) < 8, jax.random.normal(KEYS[0], (50,)), 0.0)  # 8 of 50 weights matter
x, x_val = jax.random.normal(KEYS[1], (200, 50)), jax.random.normal(KEYS[2], (200, 50))
y = x @ truth + 2 * jax.random.normal(KEYS[3], (200,))
y_val = x_val @ truth + 2 * jax.random.normal(KEYS[4], (200,))

# The inner loss is the smooth part. The penalty is the learner's; the meta-parameter is the logarithm of its strength.
learner = cm.ProximalDescent(cm.prox.l1(jnp.exp), tol=1e-5)
problem = cm.BilevelProblem(
    inner_loss=lambda w, log_strength, task: 0.5 * jnp.mean((x @ w - y) ** 2),
    outer_loss=lambda w, log_strength, task: 0.5 * jnp.mean((x_val @ w - y_val) ** 2),
    init_params=lambda log_strength, task: jnp.zeros(50),
)
estimator = cm.Contrastive(learner)
estimate = jax.jit(lambda s, state: estimator.estimate(problem, s, None, state=state))

log_strength = jnp.array(-5.0)
optimizer = optax.adam(0.2)
memory, state = optimizer.init(log_strength), estimator.init_state(problem, log_strength, None)
for step in range(30):
    result = estimate(log_strength, state)
    cm.raise_if_failed(result)
    updates, memory = optimizer.update(result.grad, memory)
    if step % 10 == 0:
        print(f"step {step:2d}: strength {jnp.exp(log_strength):.4f}, validation loss {result.outer_loss:.4f}")
    log_strength, state = optax.apply_updates(log_strength, updates), result.state


def validation_loss(log_strength):
    w = learner.bind(log_strength).solve(lambda w: problem.inner_loss(w, log_strength, None), jnp.zeros(50)).params
    return problem.outer_loss(w, log_strength, None), jnp.sum(w != 0)


selected, kept = jax.jit(validation_loss)(log_strength)
best = float(jnp.min(jax.lax.map(lambda s: validation_loss(s)[0], jnp.linspace(-6.0, 1.0, 141))))
print(f"selected: strength {jnp.exp(log_strength):.4f}, {kept} weights, validation loss {selected:.4f}")
print(f"best of a grid of 141 strengths: {best:.4f}")
assert selected <= 1.01 * best
