"""A network split in two: what learns each task, and what is meta-learned."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from contrastive_meta._plasticity import AnchoredSynapse, ByGroup, PlasticityRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Params
from contrastive_meta._pytree import PyTree

Apply = Callable[[PyTree, Any], Any]
TargetLoss = Callable[[Any, Any], Any]


class SplitTask(Protocol):
    """A task with data to learn from and data to judge by, such as `problems.SplitData`."""

    @property
    def x_train(self) -> Any:
        """Inputs to learn from."""

    @property
    def y_train(self) -> Any:
        """Targets to learn from."""

    @property
    def x_val(self) -> Any:
        """Inputs to judge by."""

    @property
    def y_val(self) -> Any:
        """Targets to judge by."""


class Architecture(NamedTuple):
    """A bilevel problem with the rule that fits it and its first meta-parameters.

    Attributes:
      problem: for tasks with fields x_train, y_train, x_val, y_val, such as `problems.SplitData`.
      rule: the local rule: `Contrastive(solver, rule=architecture.rule)`.
      meta_params: where meta-learning starts.
      weights: `(params, meta_params) -> parameters of the network`.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.architectures.Architecture._fields
      ('problem', 'rule', 'meta_params', 'weights')
    """

    problem: BilevelProblem
    rule: PlasticityRule
    meta_params: MetaParams
    weights: Callable[[Params, MetaParams], PyTree]


def assemble(
    apply: Apply,
    loss: TargetLoss,
    weights: Callable[[Params, MetaParams], PyTree],
    energy: Callable[[Params, MetaParams], jax.Array],
    init: Callable[[MetaParams], Params],
) -> BilevelProblem:
    """L_in = loss on the data to learn from + energy; L_out = loss on the data to judge by."""

    def inner(params: Params, meta_params: MetaParams, task: SplitTask) -> Any:
        return loss(apply(weights(params, meta_params), task.x_train), task.y_train) + energy(params, meta_params)

    def outer(params: Params, meta_params: MetaParams, task: SplitTask) -> Any:
        return loss(apply(weights(params, meta_params), task.x_val), task.y_val)

    return BilevelProblem(inner, outer, lambda meta_params, task: init(meta_params))


def fast_and_slow(
    apply: Apply,
    loss: TargetLoss,
    network: PyTree,
    fast: Callable[[tuple[str, ...]], bool],
    slow_rule: PlasticityRule,
    strength: float = 1.0,
) -> Architecture:
    """Some of a network's parameters learn each task, anchored to where they start; the others are meta-learned.

        params       the fast ones: {name: array}, a name being the path of a leaf, such as "hidden_0/gain"
        meta_params  {"slow": {name: array}, "fast": {"anchor": {name: array}}}
        L_in       = loss(apply(network, x_train), y_train) + 1/2 strength |params - anchor|^2
        L_out      = loss(apply(network, x_val), y_val)

    Args:
      apply: `(network, x) -> outputs`, any network; for a local `slow_rule` its slow weights act through `transmit`.
      loss: `(outputs, targets) -> scalar`.
      network: the network's first parameters, any pytree.
      fast: whether the leaf with this path, a tuple of keys, is fast.
      slow_rule: of the slow ones.
      strength: of the pull to the anchor; more than 0, for the anchors of the fast parameters are learned by it.

    Raises:
      ValueError: no leaf is fast, or none is slow.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> network = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> split = cm.architectures.fast_and_slow(
      ...     cm.architectures.mlp, lambda y, t: jnp.mean((y - t) ** 2), network,
      ...     fast=lambda path: "bias" in path, slow_rule=cm.Autodiff(),
      ... )
      >>> sorted(split.meta_params["slow"])
      ['hidden_0/kernel', 'readout/kernel']
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(network)
    paths = [name_of(path) for path, _ in leaves]
    names = ["/".join(path) for path in paths]
    is_fast = [fast(path) for path in paths]
    if all(is_fast) or not any(is_fast):
        many = "all" if all(is_fast) else "none"
        raise ValueError(
            f"fast_and_slow: expected some leaves to be fast and some slow; got {many} fast of {names}. Name others."
        )
    named = {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
    anchor = {name: named[name] for name, quick in zip(names, is_fast, strict=True) if quick}
    slow = {name: leaf for name, leaf in named.items() if name not in anchor}
    pull = AnchoredSynapse(strength)

    def weights(params: Params, meta_params: MetaParams) -> PyTree:
        merged = {**params, **meta_params["slow"]}
        return structure.unflatten([merged[name] for name in names])

    problem = assemble(
        apply,
        loss,
        weights,
        lambda params, meta_params: pull.energy(params, meta_params["fast"]),
        lambda meta_params: meta_params["fast"]["anchor"],
    )
    rule = ByGroup({"slow": slow_rule, "fast": pull})
    return Architecture(problem, rule, {"slow": slow, "fast": {"anchor": anchor}}, weights)


def name_of(path: Sequence[Any]) -> tuple[str, ...]:
    """The keys of a leaf's path as words."""
    return tuple(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)
