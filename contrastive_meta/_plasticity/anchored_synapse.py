"""The complex synapse: a fast weight held by a slow one, with a strength."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import PyTree, strategy

_LEARNED = ("anchor", "strength", "log_strength")


@strategy
class AnchoredSynapse(LocalRule):
    """Each weight phi_i is pulled to its anchor omega_i with strength lambda_i; both may be learned.

        E(phi, omega, lambda) = 1/2 sum_i lambda_i (phi_i - omega_i)^2                      (a sum, with the half)
        dE/domega_i = -lambda_i (phi_i - omega_i),   dE/dlambda_i = 1/2 (phi_i - omega_i)^2

    What is learned is decided by the meta-parameters, a dictionary with any of

    - `"anchor"`: omega, a pytree like `params`;
    - `"strength"`: lambda. Nothing here keeps it above zero: project it after each outer step;
    - `"log_strength"`: its logarithm, instead.

    A strength is a pytree like `params`, or stops short of it: one number for a leaf, or for a whole subtree, is shared
    by the synapses there. Shared ones are not local: the synapses would have to add up what they measure.

    The rule takes E to be where the meta-parameters enter: add `energy` to the inner loss, and let neither loss depend
    on them in another way.

    Args:
      strength: lambda where it is not learned.
      anchor: omega where it is not learned; 0 is weight decay.

    Reference:
      Zucchet et al. (2022), section 4 (complex synapse); Rajeswaran et al. (2019), the anchor as initialisation.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rule = cm.AnchoredSynapse(strength=2.0)
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, meta, task: jnp.sum((w - task) ** 2) + rule.energy(w, meta),
      ...     outer_loss=lambda w, meta, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda meta, task: meta["anchor"],
      ... )
      >>> meta_params = {"anchor": jnp.zeros(2)}
      >>> result = cm.Contrastive(cm.LBFGS(), rule=rule).estimate(problem, meta_params, jnp.array([4.0, 6.0]))
      >>> [round(float(g), 3) for g in result.grad["anchor"]]  # w = (task + anchor) / 2
      [0.5, 1.0]
    """

    strength: PyTree = 1.0
    anchor: PyTree = 0.0

    def energy(self, params: Params, meta_params: MetaParams) -> jax.Array:
        """E: the term of the inner loss that this rule is the rule for.

        Args:
          params: phi, any pytree of floating arrays.
          meta_params: what is learned of omega and lambda, see the class.
        """
        strength, displacement = self._strength(meta_params), self._displacement(params, meta_params)
        energies = jax.tree.map(
            lambda s, d: [jnp.sum(s * jnp.square(x)) / 2 for x in jax.tree.leaves(d)], strength, displacement
        )
        return jnp.asarray(sum(jax.tree.leaves(energies)))

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """dE/domega and dE/dlambda, or dE/dlog lambda, of each synapse."""
        strength, displacement = self._strength(meta_params), self._displacement(params, meta_params)
        statistic: dict[str, Any] = {}
        if "anchor" in meta_params:
            pulled = jax.tree.map(lambda s, d: jax.tree.map(lambda x: -s * x, d), strength, displacement)
            statistic["anchor"] = jax.tree.map(_shared_as, meta_params["anchor"], pulled)
        if "strength" in meta_params:
            statistic["strength"] = jax.tree.map(_half_squares, strength, displacement)
        if "log_strength" in meta_params:
            per_strength = jax.tree.map(_half_squares, strength, displacement)
            statistic["log_strength"] = jax.tree.map(jnp.multiply, strength, per_strength)
        return statistic

    def _strength(self, meta_params: MetaParams) -> PyTree:
        _check_names(meta_params)
        if "log_strength" in meta_params:
            return jax.tree.map(jnp.exp, meta_params["log_strength"])
        return meta_params.get("strength", self.strength)

    def _displacement(self, params: Params, meta_params: MetaParams) -> PyTree:
        if "anchor" in meta_params:
            return tree.subtract(params, meta_params["anchor"])
        return jax.tree.map(lambda omega, phi: jax.tree.map(lambda x: x - omega, phi), self.anchor, params)


def _half_squares(strength: Any, displacement: PyTree) -> jax.Array:
    """1/2 (phi - omega)^2, added up over the synapses that share a strength."""
    shares = [_shared_as(strength, jnp.square(x) / 2) for x in jax.tree.leaves(displacement)]
    return jnp.asarray(sum(shares[1:], shares[0]))


def _shared_as(like: Any, x: jax.Array) -> jax.Array:
    """The sum of `x` over the axes along which `like` broadcasts to it; `x` itself where there are none."""
    shape = jnp.shape(like)
    if shape == x.shape:
        return x
    first = x.ndim - len(shape)
    spread = tuple(first + k for k, size in enumerate(shape) if size == 1 and x.shape[first + k] != 1)
    return jnp.sum(x, axis=(*range(first), *spread)).reshape(shape)


def _check_names(meta_params: MetaParams) -> None:
    known = isinstance(meta_params, Mapping) and set(meta_params) <= set(_LEARNED) and len(meta_params) > 0
    if not known or ("strength" in meta_params and "log_strength" in meta_params):
        got = sorted(meta_params) if isinstance(meta_params, Mapping) else type(meta_params).__name__
        raise ValueError(
            f"AnchoredSynapse: expected meta-parameters in a dictionary with one or more of {', '.join(_LEARNED)}, and "
            f"one form of strength at most; got {got}. Let `ByGroup` give the others to another rule."
        )
