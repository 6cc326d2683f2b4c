"""Multi-head attention whose scores are the code of a hypernetwork: softmax, linear, and hypernetwork linear."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import transmit

# Added to the mean square of a code before its root is taken: a code of zeros stays one.
_LEAST_SQUARE = 1e-6


class Attended(NamedTuple):
    """What attention gives.

    Attributes:
      outputs: shape (..., queries, size).
      code: shape (..., queries, keys, heads): what configures the network that makes a key's value, for this query.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.architectures.Attended._fields
      ('outputs', 'code')
    """

    outputs: jax.Array
    code: jax.Array


def attention(
    params: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    kind: Literal["softmax", "linear", "hypernetwork"],
    num_heads: int,
    context: jax.Array | None = None,
    mask: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> Attended:
    """Multi-head attention, seen as a hypernetwork: a query and a key choose the network that is applied to the key.

        scores    s_hqk = q_hq . k_hk / sqrt(head size)
        softmax   a_hqk = exp(s_hqk) / sum_j exp(s_hqj)
        linear    a_hqk = s_hqk
        both      output_q = sum_k (sum_h a_hqk V_h O_h) x_k, a linear network of code a_qk for each key
        hypernetwork  a_hqk = s_hqk / rms_h(s_hqk), over heads,
                  output_q = sum_k sum_h a_hqk f(sum_g a_gqk V_g x_k) O_h, the same with a hidden layer

    Args:
      params: as `attention_params` makes them.
      x: what queries are made from, shape (..., queries, size).
      kind: of attention.
      num_heads: into which the columns of the kernels are divided.
      context: what keys and values are made from, shape (..., keys, size); None for `x` itself.
      mask: whether a query sees a key, shape (queries, keys) or with the leading axes of `x`; None shows all.
      activation: f, of the hypernetwork form; the identity makes its networks linear.

    Returns:
      Outputs and code. Nothing is added to the outputs: a residual stream is the caller's.

    Raises:
      ValueError: the kind is none of these, or the heads do not divide the columns.

    Reference:
      Vaswani et al. (2017); Katharopoulos et al. (2020), linear attention; Schug et al. (2025), attention as a
      hypernetwork.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.attention_params(jax.random.key(0), 6, num_heads=4, head_size=2)
      >>> x = jax.numpy.ones((5, 6))
      >>> outputs, code = cm.architectures.attention(params, x, kind="hypernetwork", num_heads=4)
      >>> outputs.shape, code.shape
      ((5, 6), (5, 5, 4))
    """
    if kind not in ("softmax", "linear", "hypernetwork"):
        raise ValueError(f'attention: expected `kind` "softmax", "linear" or "hypernetwork"; got {kind!r}.')
    if params["query"].shape[-1] % num_heads:
        raise ValueError(f"attention: {num_heads} heads do not divide kernels of shape {params['query'].shape}.")
    seen = x if context is None else context

    def by_head(of: jax.Array, name: str) -> jax.Array:
        projected = transmit(of, params[name], None)
        return projected.reshape(*projected.shape[:-1], num_heads, -1)

    queries, keys, values = by_head(x, "query"), by_head(seen, "key"), by_head(seen, "value")
    scores = jnp.einsum("...qhd,...khd->...qkh", queries, keys) / queries.shape[-1] ** 0.5
    shown = jnp.ones((), bool) if mask is None else mask[..., None]
    if kind == "softmax":
        code = jax.nn.softmax(scores, axis=-2, where=shown)
    else:
        code = jnp.where(shown, scores, 0)
    if kind == "hypernetwork":
        code = code * jax.lax.rsqrt(jnp.mean(jnp.square(code), -1, keepdims=True) + _LEAST_SQUARE)
        hidden = activation(jnp.einsum("...qkh,...khd->...qkd", code, values))
        mixed = jnp.einsum("...qkh,...qkd->...qhd", code, hidden)
    else:
        mixed = jnp.einsum("...qkh,...khd->...qhd", code, values)
    return Attended(transmit(mixed.reshape(*mixed.shape[:-2], -1), params["output"], None), code)


def attention_params(
    key: jax.Array, size: int, *, num_heads: int, head_size: int, dtype: Any = None
) -> dict[str, jax.Array]:
    """First parameters for `attention`: normal kernels of variance 1 / inputs.

    Args:
      key: PRNG key.
      size: of inputs and outputs.
      num_heads: numbers in the code of a query and a key.
      head_size: of the queries, keys and values of each head.
      dtype: of every array; None for JAX's default.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.attention_params(jax.random.key(0), 6, num_heads=4, head_size=2)
      >>> {name: kernel.shape for name, kernel in params.items()}
      {'query': (6, 8), 'key': (6, 8), 'value': (6, 8), 'output': (8, 6)}
    """
    inner = num_heads * head_size
    shapes = {"query": (size, inner), "key": (size, inner), "value": (size, inner), "output": (inner, size)}
    kind = dtype or jnp.result_type(float)
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape, kind) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
