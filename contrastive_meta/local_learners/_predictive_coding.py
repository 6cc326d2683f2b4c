"""Predictive coding: units settle between what the layer below predicts and what the layer above would have."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta.local_learners._layers import Layer, layers_of
from contrastive_meta.local_learners._relaxation import Relaxation
from contrastive_meta.local_learners._settling import SettlingNetwork, States


@strategy
class PredictiveCoding(SettlingNetwork):
    """A multilayer perceptron; the derivative of its outputs is what its synapses learn from local prediction errors.

        F(s) = 1/2 sum_l p_l |e_l|^2,   e_l = s_l - act(s_{l-1} W_l + b_l),   s_0 = x,   without act for the outputs

    with p_l = 1, but `precision` for the outputs. `apply` gives the outputs of the network run forwards, where all e_l
    are 0. Its derivative is predictive coding: the outputs are clamped to out - v, with v the error that arrives at
    them, the derivative of any loss; hidden units descend F, each moved by its own e_l and by what comes back of
    e_{l+1}; and

        dL/dW_l = dF/dW_l / precision = -s_{l-1} (p_l e_l act') / precision

    With L = 1/2 |out - target|^2, summed over examples, the outputs are clamped to the target. With `precision=1` that
    is as published: the update is then the gradient, in the weights, of F at rest, a loss of its own and not L. As
    precision goes to 0 it becomes the gradient of L, whatever L is, with an error of O(precision).

    To learn by it in all phases of `Contrastive`, give `nudged_solver=solver`. At finite precision and with another
    loss, or another weight of it, such as that of the nudge, the update is the gradient of no loss but near that of L.
    What is estimated then is the derivative of the statistic along -J^-1 g, with J the Jacobian of the update and g the
    update of the outer loss, where the exact meta-gradient has the transpose of J and the gradient of the outer loss.

    Args:
      precision: of the outputs' errors, in units of that of hidden units'.
      relaxation: of the hidden units.
      activation: of hidden units.

    Reference:
      Whittington & Bogacz (2017), predictive coding in place of backprop; Rao & Ballard (1999).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.local_learners.PredictiveCoding()
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> update = jax.grad(lambda w: jnp.sum((network.apply(w, jnp.ones((5, 3))) - 1.0) ** 2) / 2)(params)
      >>> update["hidden_0"]["kernel"].shape
      (3, 8)
    """

    precision: float | jax.Array = 1.0
    relaxation: Relaxation = Relaxation(step_size=0.2, num_steps=50)
    activation: Callable[[jax.Array], jax.Array] = static(default=jnp.tanh)

    def energy(self, params: PyTree, x: jax.Array, states: States) -> jax.Array:
        """F, summed over examples.

        Args:
          params: as for `apply`.
          x: as for `apply`.
          states: of all layers, the outputs last; shapes (..., units).
        """
        layers = layers_of(params, x, type(self).__name__)
        *hidden, last = tree.subtract(states, self._predictions(layers, x, states))
        squares = [*map(jnp.square, hidden), self.precision * jnp.square(last)]
        return jnp.asarray(sum(map(jnp.sum, squares))) / 2

    def settle(self, params: PyTree, x: jax.Array, free: States, target: jax.Array) -> States:
        """States at rest with the outputs clamped.

        Args:
          params: as for `apply`.
          x: as for `apply`.
          free: states of the network run forwards, where it starts.
          target: of the outputs, shape (..., outputs).
        """

        def direction(hidden: States) -> States:
            downhill: States = jax.grad(lambda at: -self.energy(params, x, [*at, target]))(hidden)
            return downhill

        end = self.relaxation.run(direction, free[:-1], scale=tree.max_abs(target - free[-1]))
        return [*end.state, target]

    def free(self, params: PyTree, x: jax.Array) -> States:
        """The states of the network run forwards, where all errors are 0."""
        *hidden, (kernel, bias) = layers_of(params, x, type(self).__name__)
        states: States = []
        for w, b in hidden:
            x = self.activation(x @ w + b)
            states.append(x)
        return [*states, x @ kernel + bias]

    def update(self, params: PyTree, x: jax.Array, free: States, error: jax.Array) -> tuple[PyTree, jax.Array]:
        """The derivative of F at rest with the outputs clamped to out - error, over the precision."""
        states = self.settle(params, x, free, free[-1] - error)
        grads = jax.grad(self.energy, argnums=(0, 1))(params, x, states)
        scaled: tuple[PyTree, jax.Array] = tree.scale(1 / self.precision, grads)
        return scaled

    def _predictions(self, layers: list[Layer], x: jax.Array, states: States) -> States:
        """What each layer would be from the one below."""
        *hidden, (kernel, bias) = layers
        before = [x, *states[:-1]]
        below = [self.activation(s @ w + b) for s, (w, b) in zip(before[:-1], hidden, strict=True)]
        return [*below, before[-1] @ kernel + bias]
