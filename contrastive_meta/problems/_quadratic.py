"""A random quadratic problem: everything is known in closed form, the direct term included."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem, MetaParams
from contrastive_meta.problems._exact import vouch
from contrastive_meta.problems._instance import ExactMetaGradient, ProblemInstance


class QuadraticTask(NamedTuple):
    """The fixed coefficients of `quadratic`.

    Attributes:
      curvature: A, symmetric, shape (dim, dim).
      coupling: B, shape (dim, num_meta).
      offset: c, shape (dim,).
      target: t, shape (dim,).
      direct: M, shape (dim, num_meta).

    Example:
      >>> import jax
      >>> quadratic(jax.random.key(0), dim=10, num_meta=5).task.coupling.shape
      (10, 5)
    """

    curvature: jax.Array
    coupling: jax.Array
    offset: jax.Array
    target: jax.Array
    direct: jax.Array


def quadratic(
    key: jax.Array, dim: int = 10, num_meta: int = 5, condition_number: float = 10.0, dtype: Any = None
) -> ProblemInstance:
    """A random quadratic inner loss with three kinds of meta-parameter and an outer loss that sees one directly.

        L_in  = 1/2 phi'A phi - phi'(B drive + c) + 1/2 sum_i exp(log_strength_i) (phi_i - anchor_i)^2
        L_out = 1/2 |phi - t|^2 + phi'M drive + 1/2 |drive|^2

    Both are holomorphic everywhere. The meta-gradient is a closed form, exact to rounding times the condition
    number. The direct term dL_out/d drive is as large as the rest.

    Args:
      key: PRNG key that all coefficients are drawn from.
      dim: number of parameters.
      num_meta: length of `drive`.
      condition_number: of the inner loss's Hessian at the returned meta-parameters; its largest eigenvalue is 1.
      dtype: of every array; None for JAX's default.

    Returns:
      params of shape (dim,); meta_params {"anchor": (dim,), "drive": (num_meta,), "log_strength": (dim,)}.

    Raises:
      ValueError: a size below 1 or a condition number below 1.

    Example:
      >>> import jax
      >>> problem, meta_params, task, exact = quadratic(jax.random.key(0))
      >>> exact(meta_params, task).grad["drive"].shape
      (5,)
    """
    if dim < 1 or num_meta < 1 or condition_number < 1:
        raise ValueError(
            "`dim` and `num_meta` must be positive and `condition_number` at least 1; "
            f"got {dim}, {num_meta}, {condition_number}."
        )
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    keys = jax.random.split(key, 7)
    # Half of the smallest eigenvalue of the Hessian A + exp(log_strength) I comes from the strengths.
    strength = 0.5 / condition_number
    eigenvalues = jnp.geomspace(1 / condition_number, 1.0, dim, dtype=dtype) - strength
    basis, _ = jnp.linalg.qr(jax.random.normal(keys[0], (dim, dim), dtype))
    curvature = (basis * eigenvalues) @ basis.T
    task = QuadraticTask(
        curvature=(curvature + curvature.T) / 2,
        coupling=jax.random.normal(keys[1], (dim, num_meta), dtype),
        offset=jax.random.normal(keys[2], (dim,), dtype),
        target=jax.random.normal(keys[3], (dim,), dtype),
        direct=jax.random.normal(keys[4], (dim, num_meta), dtype),
    )
    meta_params = {
        "anchor": jax.random.normal(keys[5], (dim,), dtype),
        "drive": jax.random.normal(keys[6], (num_meta,), dtype),
        "log_strength": jnp.full((dim,), jnp.log(strength), dtype),
    }
    return ProblemInstance(BilevelProblem(_inner_loss, _outer_loss, _init_params), meta_params, task, _closed_form)


def _inner_loss(params: jax.Array, meta_params: MetaParams, task: QuadraticTask) -> jax.Array:
    curved = jnp.sum(params * (task.curvature @ params)) / 2
    driven = jnp.sum(params * (task.coupling @ meta_params["drive"] + task.offset))
    pulled = jnp.sum(jnp.exp(meta_params["log_strength"]) * jnp.square(params - meta_params["anchor"])) / 2
    return curved - driven + pulled


def _outer_loss(params: jax.Array, meta_params: MetaParams, task: QuadraticTask) -> jax.Array:
    drive = meta_params["drive"]
    missed = jnp.sum(jnp.square(params - task.target)) / 2
    return missed + jnp.sum(params * (task.direct @ drive)) + jnp.sum(jnp.square(drive)) / 2


def _init_params(meta_params: MetaParams, task: QuadraticTask) -> jax.Array:
    return jnp.zeros_like(task.offset)


def _closed_form(meta_params: MetaParams, task: QuadraticTask) -> ExactMetaGradient:
    """Solve phi = H^-1 (B drive + c + S anchor) with H = A + S, S = diag(exp(log_strength)); a = H^-1 dL_out/dphi."""
    with jax.default_matmul_precision("highest"):
        anchor, drive, strength = meta_params["anchor"], meta_params["drive"], jnp.exp(meta_params["log_strength"])
        hessian = task.curvature + jnp.diag(strength)
        force = task.coupling @ drive + task.offset + strength * anchor
        params = jnp.linalg.solve(hessian, force)
        adjoint = jnp.linalg.solve(hessian, params - task.target + task.direct @ drive)
        grad = {
            "anchor": strength * adjoint,
            "drive": task.direct.T @ params + drive + task.coupling.T @ adjoint,
            "log_strength": -strength * (params - anchor) * adjoint,
        }
        return vouch(grad, _outer_loss(params, meta_params, task), params, hessian @ params - force, hessian)
