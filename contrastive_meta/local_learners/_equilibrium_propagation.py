"""Equilibrium propagation: a continuous Hopfield network that learns from two of its own equilibria."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta.local_learners._layers import Layer, layers_of
from contrastive_meta.local_learners._relaxation import Relaxation
from contrastive_meta.local_learners._settling import SettlingNetwork, States


class Equilibrium(NamedTuple):
    """Where the network rests.

    Attributes:
      states: activities of each layer, the outputs last; shapes (..., units).
      residual: how fast the fastest unit still moves.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.local_learners.Equilibrium._fields
      ('states', 'residual')
    """

    states: States
    residual: jax.Array


@strategy
class EquilibriumPropagation(SettlingNetwork):
    """A layered continuous Hopfield network; the derivative of its outputs is the contrast of two nudged equilibria.

        E(s) = sum_l [ G(s_l) - s_l . (s_{l-1} W_l + b_l) ],   s_0 = x,   G' = the inverse of the activation
        at rest  s_l = act(s_{l-1} W_l + b_l + s_{l+1} W_{l+1}^T),   without act for the outputs

    `apply` gives the outputs at rest. Its derivative is equilibrium propagation: the error v that arrives at an output,
    the derivative of any loss, squared error or cross-entropy alike, nudges it both ways,

        s_+- = rest of E +- beta v . s_out,   dL/dW_l = -( s_+ s_+^T - s_- s_-^T ) / (2 beta)

    products of pre- and postsynaptic activity in two phases, which start from the free equilibrium. So every solver
    that follows gradients runs this learner, every estimator takes it, and the loss may be a sum, nudged or weighted.

    The error is held at its value of the free phase, and scaled to a largest entry of 1 for each example (the contrast
    is scaled back): the update is proportional to the error whatever beta is, so that what the nudge of a meta-learning
    phase adds is not bent by the learner's own. The update is the gradient of the loss at equilibrium but for O(beta^2)
    and for rounding over beta, where the equilibria have settled; `equilibrium(params, x).residual` says whether.

    Strong weights act both ways, and then there are many equilibria, or none that the relaxation finds, and learning
    does not end: start from weaker ones than in a feedforward network, and hold them.

    To learn by it in all phases of `Contrastive`, give `nudged_solver=solver`. Second derivatives are those of the
    contrast, taken through the steps of the relaxation; reverse mode needs a fixed number of them.

    Args:
      beta: nudge of an output, in units of its activity.
      relaxation: of both phases.
      activation: of hidden units, increasing.

    Reference:
      Scellier & Bengio (2017), equilibrium propagation; Laborieux et al. (2021), both signs; Hopfield (1984).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.local_learners.EquilibriumPropagation()
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> update = jax.grad(lambda w: jnp.mean((network.apply(w, jnp.ones((5, 3))) - 1.0) ** 2))(params)
      >>> update["hidden_0"]["kernel"].shape
      (3, 8)
    """

    beta: float | jax.Array = 0.1
    relaxation: Relaxation = Relaxation()
    activation: Callable[[jax.Array], jax.Array] = static(default=jnp.tanh)

    def equilibrium(self, params: PyTree, x: jax.Array) -> Equilibrium:
        """The free phase. Its derivative is not local: it goes back through the relaxation.

        Args:
          params: as for `apply`.
          x: as for `apply`.
        """
        layers = layers_of(params, x, type(self).__name__)
        start = [jnp.zeros((*x.shape[:-1], bias.size), jnp.result_type(x, bias)) for _, bias in layers]
        end = self.relaxation.run(lambda states: self._direction(layers, x, states, 0.0), start)
        return Equilibrium(end.state, end.residual)

    def nudged(self, params: PyTree, x: jax.Array, free: States, force: jax.Array) -> Equilibrium:
        """The nudged phase: the outputs feel a constant force.

        Args:
          params: as for `apply`.
          x: as for `apply`.
          free: states of all layers, where it starts.
          force: on the outputs, shape (..., outputs); equilibrium propagation's is -beta v.
        """
        layers = layers_of(params, x, type(self).__name__)
        end = self.relaxation.run(
            lambda states: self._direction(layers, x, states, force), free, scale=tree.max_abs(force)
        )
        return Equilibrium(end.state, end.residual)

    def free(self, params: PyTree, x: jax.Array) -> States:
        """The states at rest."""
        return self.equilibrium(params, x).states

    def update(self, params: PyTree, x: jax.Array, free: States, error: jax.Array) -> tuple[PyTree, jax.Array]:
        """The contrast of two nudged equilibria, over the nudge."""
        size = jnp.max(jnp.abs(error), axis=-1, keepdims=True)
        force = self.beta * error / tree.or_one(size)
        both = jax.vmap(lambda nudge: self.nudged(params, x, free, nudge).states)(jnp.stack([-force, force]))
        plus, minus = tree.unstack(both, 2)
        weight = size[..., 0] / (2 * self.beta)

        def contrast(params: PyTree, x: jax.Array) -> jax.Array:
            return jnp.sum(weight * (_coupling(params, x, minus) - _coupling(params, x, plus)))

        grads: tuple[PyTree, jax.Array] = jax.grad(contrast, argnums=(0, 1))(params, x)
        return grads

    def _direction(self, layers: list[Layer], x: jax.Array, states: States, force: Any) -> States:
        """Each unit moves to what its inputs, from below and above, ask for."""
        *below, (kernel, bias) = layers
        before = [x, *states[:-1]]
        hidden = [
            self.activation(before[number] @ w + b + states[number + 1] @ layers[number + 1][0].T)
            for number, (w, b) in enumerate(below)
        ]
        asked_for = [*hidden, before[-1] @ kernel + bias + force]
        return [new - old for new, old in zip(asked_for, states, strict=True)]


def _coupling(params: PyTree, x: jax.Array, states: States) -> jax.Array:
    """-E without G, for each example: all of E that has parameters in it."""
    layers, before = layers_of(params, x, EquilibriumPropagation.__name__), [x, *states[:-1]]
    terms = [jnp.sum(s * (below @ w + b), axis=-1) for s, below, (w, b) in zip(states, before, layers, strict=True)]
    return sum(terms[1:], terms[0])
