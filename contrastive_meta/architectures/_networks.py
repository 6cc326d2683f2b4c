"""Networks with slow weights: gain modulation, fast head, context parameters, modular hypernetwork."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import Autodiff, Context, FastHead, GainModulation, ModuleBank
from contrastive_meta._problem import BilevelProblem, MetaParams, Params
from contrastive_meta._pytree import PyTree
from contrastive_meta._stages import in_two_stages
from contrastive_meta.architectures._split import Apply, Architecture, SplitTask, TargetLoss, fast_and_slow


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


def fast_head_on_features(
    features: Apply, loss: TargetLoss, body: PyTree, num_outputs: int, strength: float = 1.0
) -> Architecture:
    """An affine readout learns each task from features that are computed once; the body that makes them is learned.

        params       {"kernel": (features, outputs), "bias": (outputs,)}, zeros at first
        meta_params  {"slow": body}
        L_in       = loss(readout of features(body, x_train), y_train) + 1/2 strength |params|^2
        L_out      = loss(readout of features(body, x_val), y_val)

    The body runs forward once and backward once for each task, however many steps learning takes, see `in_two_stages`.
    The contrast is taken in the features: with a convex `loss`, learning is convex. The readout starts at zero and is
    pulled back there, not to a learned start as in `fast_head`: classes that change places from task to task have none.

    Args:
      features: `(body, x) -> features` of shape (..., number of features), any network. Examples to learn from and
        examples to judge by are seen apart.
      loss: `(outputs, targets) -> scalar`.
      body: its first parameters, any pytree.
      num_outputs: of the readout.
      strength: of the pull of the readout to zero; more than 0 for a solution that is unique.

    Reference:
      Bertinetto et al. (2019), R2D2, and Lee et al. (2019), MetaOptNet, for convex readouts on learned features.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> split = cm.architectures.fast_head_on_features(
      ...     lambda w, x: jnp.tanh(x @ w), lambda y, t: jnp.mean((y - t) ** 2), jnp.ones((3, 8)), 2
      ... )
      >>> task = cm.problems.SplitData(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.ones((5, 3)), jnp.ones((5, 2)))
      >>> cm.Contrastive(cm.LBFGS()).estimate(split.problem, split.meta_params, task).params["kernel"].shape
      (8, 2)
    """
    head = FastHead()

    def prepare(meta_params: MetaParams, task: SplitTask) -> dict[str, Any]:
        return {"train": features(meta_params["slow"], task.x_train), "val": features(meta_params["slow"], task.x_val)}

    def inner(params: Params, seen: Mapping[str, jax.Array], task: SplitTask) -> Any:
        pull = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)) / 2
        return loss(head.readout(params, seen["train"]), task.y_train) + strength * pull

    def outer(params: Params, seen: Mapping[str, jax.Array], task: SplitTask) -> Any:
        return loss(head.readout(params, seen["val"]), task.y_val)

    def init(seen: Mapping[str, jax.Array], task: SplitTask) -> Params:
        size = (seen["train"].shape[-1], num_outputs)
        return {"kernel": jnp.zeros(size, seen["train"].dtype), "bias": jnp.zeros(size[1:], seen["train"].dtype)}

    problem = in_two_stages(prepare, BilevelProblem(inner, outer, init))
    return Architecture(
        problem, Autodiff(), {"slow": body}, lambda params, meta: {"body": meta["slow"], "readout": params}
    )


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
