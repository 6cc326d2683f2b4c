"""A hypernetwork over any body: an embedding of each layer learns a task, the templates it mixes are meta-learned."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import Autodiff
from contrastive_meta._pytree import PyTree
from contrastive_meta.architectures._mlp import mlp, mlp_params
from contrastive_meta.architectures._split import Apply, Architecture, TargetLoss, fast_and_slow, name_of


def hypernetwork(
    apply: Apply,
    loss: TargetLoss,
    body: PyTree,
    num_modules: int,
    key: jax.Array,
    *,
    hidden_sizes: Sequence[int] = (),
    generated: tuple[str, ...] = ("kernel",),
    fast: tuple[str, ...] = ("bias",),
    strength: float = 1.0,
) -> Architecture:
    """Weights of a body made from an embedding of each layer, linearly or through a network.

        W_l = W_l0 + sum_m c_m(e_l) Theta_lm,    c(e) = e, or an `mlp` of e that all layers share

    The embeddings e_l start at zero, where the body is the one that was given. Embeddings and the fast leaves learn
    each task; W_l0, the modules Theta_lm and the network are meta-learned. `modular_hypernetwork` is the linear form
    for bodies whose layers mix their own modules, with a local rule. This one takes any body, and its rule for what is
    slow is `Autodiff`.

    Args:
      apply: `(body, x) -> outputs`, any network.
      loss: `(outputs, targets) -> scalar`.
      body: its first parameters, any pytree.
      num_modules: of each generated leaf, and numbers in its embedding.
      key: PRNG key of the modules, each drawn with the root mean square of the leaf, and of the network.
      hidden_sizes: of the tanh network between embedding and coefficients; none for the linear form.
      generated: names of the leaves that are generated.
      fast: names of other leaves that learn each task.
      strength: of the pull of the fast parameters to where they start, which is meta-learned too.

    Raises:
      ValueError: no leaf has one of the names.

    Reference:
      Ha et al. (2017), hypernetworks; Schug et al. (2024), linear and nonlinear ones.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> body = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> split = cm.architectures.hypernetwork(
      ...     cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), body, 4, jax.random.key(1), hidden_sizes=(16,)
      ... )
      >>> split.meta_params["slow"]["modules/hidden_0/kernel"].shape
      (4, 3, 8)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(body)
    paths = [name_of(path) for path, _ in leaves]
    chosen = {"/".join(p): leaf for p, (_, leaf) in zip(paths, leaves, strict=True) if set(generated) & set(p)}
    if not chosen:
        raise ValueError(f"hypernetwork: none of {['/'.join(p) for p in paths]} is named one of {generated}.")
    of_network, *of_modules = jax.random.split(key, 1 + len(chosen))

    def drawn(key: jax.Array, leaf: jax.Array) -> jax.Array:
        return jax.random.normal(key, (num_modules, *leaf.shape), leaf.dtype) * jnp.sqrt(jnp.mean(jnp.square(leaf)))

    network: dict[str, Any] = {
        "body": body,
        "embedding": {name: jnp.zeros(num_modules, leaf.dtype) for name, leaf in chosen.items()},
        "modules": {name: drawn(k, leaf) for k, (name, leaf) in zip(of_modules, chosen.items(), strict=True)},
    }
    if hidden_sizes:
        dtype = jnp.result_type(*chosen.values())
        network["generator"] = mlp_params(of_network, (num_modules, *hidden_sizes, num_modules), dtype)

    def generate(network: Any, x: Any) -> Any:
        def weights(name: str, leaf: jax.Array) -> jax.Array:
            if name not in chosen:
                return leaf
            embedding = network["embedding"][name]
            coefficients = mlp(network["generator"], embedding) if hidden_sizes else embedding
            return leaf + jnp.tensordot(coefficients, network["modules"][name], axes=1)

        kept = structure.flatten_up_to(network["body"])
        made = [weights("/".join(path), leaf) for path, leaf in zip(paths, kept, strict=True)]
        return apply(structure.unflatten(made), x)

    def learns(path: tuple[str, ...]) -> bool:
        return path[0] == "embedding" or (path[0] == "body" and bool(set(fast) & set(path)))

    return fast_and_slow(generate, loss, network, learns, Autodiff(), strength)
