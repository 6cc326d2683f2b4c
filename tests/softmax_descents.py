"""What `test_lbfgs_sizes` runs in a process that compiles as users do: prints JSON."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm


def data(rows: int, columns: int, dtype: Any) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    x = random.random((rows, columns)) * (random.random((rows, columns)) < 0.5)
    return jnp.asarray(x, dtype), jnp.asarray(np.eye(10)[random.integers(0, 10, rows)], dtype)


def loss(w: Any, strength: Any, task: Any) -> Any:
    x, y = task
    return -0.5 * jnp.mean(jnp.sum(y * jax.nn.log_softmax(x @ w), -1)) + 0.5e-3 * jnp.exp(strength) * jnp.sum(w**2)


def found(rows: int, columns: int) -> dict[str, Any]:
    """Losses after two steps in float32, by every way to run them, and in float64."""
    solver, zero = cm.LBFGS(tol=1e-9, max_steps=2), jnp.float32(0.0)
    single = data(rows, columns, jnp.float32)
    start = jnp.zeros((columns, 10), jnp.float32)

    def learned(w: Any, task: Any) -> Any:
        end = solver.solve(lambda at: loss(at, zero, task), w).params
        return loss(end, zero, task)

    captured = jax.jit(lambda w: learned(w, single))(start)
    passed = jax.jit(learned)(start, single)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), single)
    mapped = jax.jit(jax.vmap(lambda task: learned(start, task)))(pair)
    problem = cm.BilevelProblem(loss, loss, lambda strength, task: jnp.zeros((columns, 10), task[0].dtype))
    # Any estimator: the free phase is what is tested.
    step = cm.value_and_meta_grad(
        problem, cm.ImplicitDifferentiation(solver, cm.IdentityHessian(), estimate_error=False)
    )
    value, grad = jax.jit(step)(zero, pair)
    # Not before: as most users have it, float32 is all there is.
    jax.config.update("jax_enable_x64", True)
    double = jax.jit(learned)(jnp.zeros((columns, 10)), data(rows, columns, jnp.float64))
    jax.config.update("jax_enable_x64", False)
    return {
        "float32": [float(captured), float(passed), *map(float, mapped), float(value)],
        "grad": float(grad),
        "float64": float(double),
    }


if __name__ == "__main__":
    print(json.dumps([found(*map(int, size.split("x"))) for size in sys.argv[1:]]))
