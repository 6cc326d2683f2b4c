"""Networks with slow weights: gain modulation, fast head, context parameters, modular hypernetwork."""

from collections.abc import Callable

from contrastive_meta._plasticity import Context, FastHead, GainModulation, ModuleBank
from contrastive_meta._pytree import PyTree
from contrastive_meta.architectures._split import Apply, Architecture, TargetLoss, fast_and_slow


def gain_modulation(
    apply: Apply,
    loss: TargetLoss,
    network: PyTree,
    strength: float = 1.0,
    fast: tuple[str, ...] = ("gain", "shift", "readout"),
) -> Architecture:
    """Gains, shifts and the readout learn each task; the weights that they modulate are meta-learned.

    Args:
      apply: `(network, x) -> outputs`; slow weights act through `transmit`.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, such as `with_gains(mlp_params(...))`.
      strength: of the pull of the fast parameters to where they start, which is meta-learned too.
      fast: names of what is fast.

    Reference:
      Zucchet et al. (2022), section 4.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.architectures.with_gains(cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2)))
      >>> split = cm.architectures.gain_modulation(cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), network)
      >>> sorted(split.meta_params["slow"])
      ['hidden_0/bias', 'hidden_0/kernel']
    """
    return fast_and_slow(apply, loss, network, _named(fast), GainModulation(), strength)


def fast_head(
    apply: Apply, loss: TargetLoss, network: PyTree, strength: float = 1.0, fast: tuple[str, ...] = ("readout",)
) -> Architecture:
    """The readout learns each task; the features below it are meta-learned (ANIL).

    Args:
      apply: `(network, x) -> outputs`; slow weights act through `transmit`.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, such as `mlp_params(...)`.
      strength: of the pull of the readout to where it starts, which is meta-learned too.
      fast: names of what is fast.

    Reference:
      Raghu et al. (2020), ANIL.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> split = cm.architectures.fast_head(cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), network)
      >>> sorted(split.meta_params["fast"]["anchor"])
      ['readout/bias', 'readout/kernel']
    """
    return fast_and_slow(apply, loss, network, _named(fast), FastHead(), strength)


def context_parameters(
    apply: Apply, loss: TargetLoss, network: PyTree, strength: float = 1.0, fast: tuple[str, ...] = ("context",)
) -> Architecture:
    """A context among the inputs learns each task; the network that reads it is meta-learned (CAVIA).

    Args:
      apply: `(network, x) -> outputs`; slow weights act through `transmit`.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, such as `with_context(mlp_params(...), size)`.
      strength: of the pull of the context to where it starts, which is meta-learned too.
      fast: names of what is fast.

    Reference:
      Zintgraf et al. (2019), CAVIA.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.architectures.with_context(cm.architectures.mlp_params(jax.random.key(0), (5, 8, 2)), 2)
      >>> split = cm.architectures.context_parameters(
      ...     cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), network
      ... )
      >>> split.meta_params["fast"]["anchor"]["context"].shape
      (2,)
    """
    return fast_and_slow(apply, loss, network, _named(fast), Context(), strength)


def modular_hypernetwork(
    apply: Apply,
    loss: TargetLoss,
    network: PyTree,
    strength: float = 1.0,
    fast: tuple[str, ...] = ("coefficients", "readout"),
) -> Architecture:
    """How modules are mixed, and the readout, learn each task; the modules are meta-learned.

    Args:
      apply: `(network, x) -> outputs`; modules act through `ModuleBank().mix`, other slow weights through `transmit`.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, such as `with_modules(mlp_params(...), num_modules, key)`.
      strength: of the pull of the fast parameters to where they start, which is meta-learned too.
      fast: names of what is fast.

    Reference:
      Zucchet et al. (2022), section 5; Schug et al. (2024), modular hypernetworks.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> network = cm.architectures.with_modules(network, 4, jax.random.key(1))
      >>> split = cm.architectures.modular_hypernetwork(
      ...     cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), network
      ... )
      >>> split.meta_params["slow"]["hidden_0/bank"].shape
      (4, 3, 8)
    """
    return fast_and_slow(apply, loss, network, _named(fast), ModuleBank(), strength)


def _named(names: tuple[str, ...]) -> Callable[[tuple[str, ...]], bool]:
    return lambda path: any(name in path for name in names)
