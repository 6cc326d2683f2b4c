"""How a rule hears what reaches the synapses of any network: meta-parameters that record who calls on them."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from contrastive_meta import _pytree as tree
from contrastive_meta._plasticity.local_rule import Signal
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, static, strategy


class Synapses(abc.ABC):
    """A piece of a network in which one leaf of the meta-parameters meets what arrives from elsewhere.

    Subclasses are final, stateless and compare equal, so that they can be static.
    """

    @abc.abstractmethod
    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """What the synapses hand on."""

    @abc.abstractmethod
    def axes(self, *ndims: int) -> tuple[tuple[int | None, ...], ...]:
        """Along which axes of the leaf what is incoming runs, and last the error, given their numbers of axes."""

    @abc.abstractmethod
    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """The derivative in `leaf` of the loss, from what was incoming and, last, the error of what was handed on."""


@strategy
class Message:
    """What reached a leaf when the network called on it once.

    Attributes:
      heard: what was incoming, and last the error: the derivative of the phase's loss in what was handed on.
      synapses: which piece of network it was.
    """

    heard: tuple[Signal, ...]
    synapses: Synapses = static()

    def learn(self, leaf: jax.Array) -> jax.Array:
        """What the synapses make of it."""
        return self.synapses.learn(leaf, *(signal.value for signal in self.heard))


class Call(NamedTuple):
    """A call on a leaf: the piece of network, and the shapes of what was incoming and handed on."""

    synapses: Synapses
    shapes: tuple[jax.ShapeDtypeStruct, ...]


class Listener:
    """Stands in for a leaf of the meta-parameters while a loss is traced.

    The derivative of the loss in a *receptor*, zeros that nothing depends on, is what reached the synapses: what was
    incoming as it was, and the error that came back. So one derivative of any loss brings all signals to their places.
    """

    def __init__(self, leaf: jax.Array, receptors: list[Any] | None = None) -> None:
        self.leaf = leaf
        self.calls: list[Call] = []
        self._receptors = receptors
        self._level = _level()

    def hear(self, synapses: Synapses, incoming: tuple[jax.Array, ...]) -> jax.Array:
        """Hand on what the synapses would, and let the receptors know."""
        if _level() != self._level:
            raise TypeError(
                "A rule cannot tell apart the signals of a network that is called inside `jit`, `vmap`, `scan`, `grad` "
                "or `checkpoint` of its own: call `transmit` and its like on whole batches, outside of them (the "
                "estimators compile everything), or use `rule=Autodiff()`."
            )
        shapes = (*incoming, jax.eval_shape(synapses.forward, self.leaf, *incoming))
        self.calls.append(Call(synapses, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes)))
        if self._receptors is None:
            return synapses.forward(self.leaf, *incoming)
        return _heard(synapses, self.leaf, incoming, self._receptors[len(self.calls) - 1])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NOT_HEARD)

    def _refuse(self, *args: Any) -> Any:
        raise TypeError(_NOT_HEARD)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __getitem__ = __iter__ = _refuse


_NOT_HEARD = (
    "A network's rule hears only what goes through `transmit`, or the layer of the rule: this loss uses one of its "
    "meta-parameters in another way. Write `transmit(x, kernel, bias)` for `x @ kernel + bias`, let `ByGroup` give the "
    "meta-parameter to another rule, or use `rule=Autodiff()`."
)


def _level() -> object:
    """Which transformation is tracing."""
    where: Any = core if hasattr(core, "get_opaque_trace_state") else jax.core  # moved after jax 0.6
    level: object = where.get_opaque_trace_state(convention="flax")
    return level


def call_on(synapses: Synapses, leaf: Any, *incoming: Any) -> jax.Array:
    """What the synapses hand on; where `leaf` is listening, it hears."""
    arrays = tuple(jnp.asarray(x) for x in incoming)
    return leaf.hear(synapses, arrays) if isinstance(leaf, Listener) else synapses.forward(leaf, *arrays)


def listen(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number) -> PyTree:
    """The messages to every leaf in one phase, in the order of the calls: a tuple where `meta_params` has a leaf.

    Raises:
      TypeError: a leaf is used by another way than `call_on`, or inside a transformation of the loss's own.
    """
    is_complex = tree.is_complex(params)
    leaves, structure = jax.tree.flatten(tree.to_complex(meta_params) if is_complex else meta_params)

    def loss(receptors: list[Any]) -> tuple[jax.Array, list[list[Call]]]:
        listeners = [Listener(*pair) for pair in zip(leaves, receptors, strict=True)]
        value = problem.nudged(params, structure.unflatten(listeners), task, beta)
        return value, [listener.calls for listener in listeners]

    # Who calls on whom is only known once the loss was traced; then there are receptors for every call.
    calls: list[list[Call]] = []

    def rehearsal() -> jax.Array:
        value, called = loss([None] * len(leaves))
        calls.extend(called)
        return value

    try:
        jax.eval_shape(rehearsal)
    except (TypeError, ValueError) as error:
        # JAX's functions name what they were given.
        if Listener.__name__ in str(error):
            raise TypeError(_NOT_HEARD) from error
        raise
    receptors = [[_receptors(call, is_complex) for call in of_leaf] for of_leaf in calls]
    heard = tree.grad(lambda zeros: loss(zeros)[0])(receptors) if jax.tree.leaves(receptors) else receptors
    return structure.unflatten(
        [
            tuple(_message(call, values) for call, values in zip(of_leaf, arrived, strict=True))
            for of_leaf, arrived in zip(calls, heard, strict=True)
        ]
    )


def learn(meta_params: MetaParams, messages: PyTree) -> MetaParams:
    """The statistic of a network's rule: each leaf adds up what it makes of its messages."""

    def of_leaf(leaf: jax.Array, received: tuple[Message, ...]) -> jax.Array:
        updates = [message.learn(leaf) for message in received]
        return jnp.asarray(sum(updates[1:], updates[0])) if updates else jnp.zeros_like(leaf)

    return jax.tree.map(of_leaf, meta_params, messages)


def _receptors(call: Call, is_complex: bool) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros(shape.shape, shape.dtype) for shape in call.shapes)
    return tree.to_complex(zeros) if is_complex else zeros


def _message(call: Call, values: tuple[jax.Array, ...]) -> Message:
    axes = call.synapses.axes(*(value.ndim for value in values))
    return Message(tuple(Signal(value, along) for value, along in zip(values, axes, strict=True)), call.synapses)


def _heard_forward(synapses: Synapses, leaf: Any, incoming: Any, receptors: Any) -> Any:
    return synapses.forward(leaf, *incoming), (leaf, incoming, receptors)


def _heard_backward(synapses: Synapses, saved: Any, error: jax.Array) -> Any:
    leaf, incoming, receptors = saved
    _, backward = jax.vjp(lambda *values: synapses.forward(leaf, *values), *incoming)
    arrived = jax.tree.map(lambda x, receptor: x.astype(receptor.dtype), (*incoming, error), tuple(receptors))
    return jnp.zeros_like(leaf), backward(error), arrived


def _transmitted(synapses: Synapses, leaf: jax.Array, incoming: Any, receptors: Any) -> jax.Array:
    return synapses.forward(leaf, *incoming)


_heard: Callable[..., jax.Array] = jax.custom_vjp(_transmitted, nondiff_argnums=(0,))
_heard.defvjp(_heard_forward, _heard_backward)  # type: ignore[attr-defined]
