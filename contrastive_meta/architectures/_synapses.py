"""Every weight is fast, held by something slow: learned initialisation, complex synapse, plasticity mask."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._plasticity import AnchoredSynapse, PlasticityMask
from contrastive_meta._pytree import PyTree
from contrastive_meta.architectures._split import Apply, Architecture, TargetLoss, assemble


def learned_initialisation(apply: Apply, loss: TargetLoss, network: PyTree, strength: float = 1.0) -> Architecture:
    """All weights learn each task from a meta-learned start that they are also pulled back to (iMAML).

        meta_params {"anchor": like the network},   L_in = loss (train) + 1/2 strength |params - anchor|^2

    Args:
      apply: `(network, x) -> outputs`, any network.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, any pytree.
      strength: of the pull.

    Reference:
      Rajeswaran et al. (2019), iMAML.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> split = cm.architectures.learned_initialisation(
      ...     lambda w, x: x @ w, lambda y, t: jnp.mean((y - t) ** 2), jnp.zeros(3)
      ... )
      >>> split.rule
      AnchoredSynapse(strength=1.0, anchor=0.0)
    """
    return _held(apply, loss, AnchoredSynapse(strength), {"anchor": network})


def complex_synapse(apply: Apply, loss: TargetLoss, network: PyTree, strength: float = 1.0) -> Architecture:
    """Every weight has a meta-learned start and a meta-learned strength of the pull back to it.

        meta_params {"anchor", "log_strength"}, both like the network

    Args:
      apply: `(network, x) -> outputs`, any network.
      loss: `(outputs, targets) -> scalar`.
      network: first parameters, any pytree.
      strength: where all strengths start.

    Reference:
      Zucchet et al. (2022), section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> split = cm.architectures.complex_synapse(
      ...     lambda w, x: x @ w, lambda y, t: jnp.mean((y - t) ** 2), jnp.zeros(3), strength=2.0
      ... )
      >>> [round(float(s), 3) for s in split.meta_params["log_strength"]]
      [0.693, 0.693, 0.693]
    """
    log_strength = jax.tree.map(lambda w: jnp.full_like(w, jnp.log(jnp.asarray(strength))), network)
    return _held(apply, loss, AnchoredSynapse(), {"anchor": network, "log_strength": log_strength})


def plasticity_mask(
    apply: Apply, loss: TargetLoss, network: PyTree, mask: PyTree, strength: float = 1.0, graded: bool = False
) -> Architecture:
    """All weights may learn each task, as far as a meta-learned mask lets them.

    `params` are the changes that each weight would make, see `PlasticityMask`; `weights` gives those that it makes.

    Args:
      apply: `(network, x) -> outputs`, any network.
      loss: `(outputs, targets) -> scalar`.
      network: where the weights start, any pytree.
      mask: like `network`; open where positive.
      strength: of the pull back to the start.
      graded: whether an open mask is also a rate.

    Reference:
      Von Oswald et al. (2021), sparse-MAML.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> split = cm.architectures.plasticity_mask(
      ...     lambda w, x: x @ w, lambda y, t: jnp.mean((y - t) ** 2), jnp.zeros(3), mask=jnp.array([1.0, -1.0, 1.0])
      ... )
      >>> split.weights(jnp.ones(3), split.meta_params).tolist()
      [1.0, 0.0, 1.0]
    """
    rule = PlasticityMask(strength, graded)
    problem = assemble(
        apply, loss, rule.weights, rule.energy, lambda meta_params: tree.zeros_like(meta_params["start"])
    )  # fmt: skip
    return Architecture(problem, rule, {"start": network, "mask": mask}, rule.weights)


def _held(apply: Apply, loss: TargetLoss, rule: AnchoredSynapse, meta_params: dict[str, Any]) -> Architecture:
    def weights(params: PyTree, meta_params: PyTree) -> PyTree:
        return params

    problem = assemble(apply, loss, weights, rule.energy, lambda meta_params: meta_params["anchor"])
    return Architecture(problem, rule, meta_params, weights)
