"""Proof by tracing that a rule is local, or the path by which something distant enters."""

import dataclasses
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._plasticity._locations import Elsewhere, Here, Location, Node, Walker
from contrastive_meta._plasticity._sites import Sites
from contrastive_meta._plasticity.autodiff import PlasticityRule, measured_by
from contrastive_meta._plasticity.by_group import ByGroup
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task, check_same_structure
from contrastive_meta._pytree import PyTree
from contrastive_meta._tracing import CallSite, trace


class NotLocalError(ValueError):
    """A rule is not local, or cannot be proved to be; the message names the operation and the path to it.

    Example:
      >>> import contrastive_meta as cm
      >>> issubclass(cm.NotLocalError, ValueError)
      True
    """


@dataclasses.dataclass(frozen=True)
class LocalityReport:
    """What the updates of a local rule are made of; printing it shows a line for each leaf of the meta-parameters.

    Attributes:
      sources: for each leaf, by name, what its update is made of.
      nodes: the dependence graph, `(label, parents)`; parents are positions in this tuple and come first.
      updates: for each leaf, the position of its update in `nodes`.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rule = cm.AnchoredSynapse()
      >>> energy = lambda w, meta, task: rule.energy(w, meta)
      >>> problem = cm.BilevelProblem(energy, lambda w, meta, task: 0.0, lambda meta, task: meta["anchor"])
      >>> print(cm.check_local(rule, problem, jnp.ones(3), {"anchor": jnp.zeros(3)}, None))
      ['anchor'] <- meta_params['anchor'], params
    """

    sources: dict[str, tuple[str, ...]]
    nodes: tuple[Node, ...]
    updates: dict[str, int]

    def __str__(self) -> str:
        """One line for each leaf."""
        return "\n".join(f"{name} <- {', '.join(made_of) or 'nothing'}" for name, made_of in self.sources.items())

    def draw(self, axes: Any, leaf: str | None = None) -> None:
        """Draw the dependence graph: what goes in on the left, updates on the right.

        Args:
          axes: matplotlib axes, or anything with `plot`, `text` and `set_axis_off`.
          leaf: the name of one leaf; None for all.
        """
        wanted = set(self.updates.values()) if leaf is None else {self.updates[leaf]}
        for index in range(len(self.nodes) - 1, -1, -1):
            if index in wanted:
                wanted |= set(self.nodes[index].parents)
        depth: dict[int, int] = {}
        for index in sorted(wanted):
            depth[index] = 1 + max((depth[parent] for parent in self.nodes[index].parents), default=-1)
        rows: dict[int, int] = {}
        height: dict[int, int] = {}
        for index in sorted(wanted):
            height[index] = rows[depth[index]] = rows.get(depth[index], -1) + 1
        for index in sorted(wanted):
            for parent in self.nodes[index].parents:
                axes.plot([depth[parent], depth[index]], [height[parent], height[index]], color="0.7", zorder=0)
            axes.text(depth[index], height[index], self.nodes[index].label.split(" at ")[0], ha="center", va="center")
        axes.set_axis_off()


def check_local(
    rule: PlasticityRule, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task
) -> LocalityReport:
    """Prove by tracing that every entry of a rule's statistic is made of what is at its own synapse.

    Nothing is computed: the statistic is traced, and every axis of every value is followed back to the axis of the
    synapses that it runs along. Allowed are elementwise operations between values at the same synapses, spreading what
    a neuron knows over its synapses, and contractions over examples and time; everything else counts as mixing. So a
    rule that passes is local; one that is refused may be so in a way that this cannot see.

    What is at the synapse with index i of a leaf of the meta-parameters:

    - entry i of the leaf;
    - entry i of the leaf of `params` of the same name and shape: the name of the leaf of `params` is the end of that of
      the leaf of the meta-parameters, as `['w']` is of `['anchor']['w']` (the longest, where several are). All leaves
      of the meta-parameters with the same name and shape so share their synapses;
    - entry i of an array that the rule itself holds, likewise;
    - what the rule's `signals` say arrives there, see `Signal`: how they got there is not followed;
    - numbers, and the strength of the nudge.

    A `ByGroup` is local if each of its rules is. Rules without `signals` are traced whole, and may not look at `task`.

    Args:
      rule: any plasticity rule.
      problem: the problem it is for.
      params: a pytree of floating arrays or `jax.ShapeDtypeStruct`.
      meta_params: likewise.
      task: likewise, one task.

    Returns:
      What each update is made of.

    Raises:
      NotLocalError: naming the leaf, the operation, and the path by which something distant enters.
      ValueError: the statistic is not like `meta_params`, or a signal's axes do not fit its leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rule = cm.AnchoredSynapse()
      >>> energy = lambda w, meta, task: rule.energy(w, meta)
      >>> problem = cm.BilevelProblem(energy, lambda w, meta, task: jnp.sum(w), lambda meta, task: jnp.zeros(3))
      >>> report = cm.check_local(rule, problem, jnp.ones(3), {"log_strength": jnp.zeros(3)}, None)
      >>> cm.check_local(rule, problem, jnp.ones(3), {"log_strength": jnp.zeros(())}, None)  # shared
      Traceback (most recent call last):
      ...
      contrastive_meta...NotLocalError: The update of ['log_strength'] is not local: ...
    """
    beta = jax.ShapeDtypeStruct((), tree.float_dtype(params))

    def hear(*args: Any) -> PyTree:
        return _signals(rule, problem, *args)

    def measure(rule_: Any, params_: Any, meta: Any, signals: Any, task_: Any, beta_: Any) -> MetaParams:
        return _measured(rule_, problem, params_, meta, signals, task_, beta_)

    signals = jax.eval_shape(hear, params, meta_params, task, beta)
    args = (rule, params, meta_params, signals, task, beta)
    statistic = jax.eval_shape(measure, *args)
    check_same_structure(
        jax.tree.map(_shape, statistic), jax.tree.map(_shape, meta_params), "`statistic`",
        "Return zeros for meta-parameters that the rule leaves alone.",
    )  # fmt: skip
    walker = Walker()
    sites = Sites(params, meta_params)
    inputs = sites.locate(walker, rule, signals, task)
    outputs = walker.walk(trace(measure, *args), inputs, CallSite())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(meta_params)]
    for name, location in zip(names, outputs, strict=True):
        _classify(walker, name, sites.of_meta[name], location)
    return LocalityReport(
        {
            name: tuple(sorted(value.sources))
            for name, value in zip(names, outputs, strict=True)
            if isinstance(value, Here)
        },
        tuple(walker.nodes),
        {name: value.node for name, value in zip(names, outputs, strict=True)},
    )


def _signals(
    rule: PlasticityRule, problem: BilevelProblem, params: Params, meta: MetaParams, task: Task, beta: Number
) -> PyTree:
    if isinstance(rule, ByGroup):
        parts = rule.parts(problem, meta).items()
        return {name: _signals(part, held, params, own, task, beta) for name, (part, held, own) in parts}
    return rule.signals(problem, params, meta, task, beta) if _keeps_to_signals(rule) else ()


def _measured(
    rule: PlasticityRule, problem: BilevelProblem, params: Params, meta: MetaParams, signals: PyTree, task: Task,
    beta: Number,
) -> MetaParams:  # fmt: skip
    if isinstance(rule, ByGroup):
        parts = rule.parts(problem, meta).items()
        return {
            name: _measured(part, held, params, own, signals[name], task, beta) for name, (part, held, own) in parts
        }
    if _keeps_to_signals(rule):
        return rule.measure(params, meta, signals)
    return measured_by(rule, problem, params, meta, task, beta)


def _keeps_to_signals(rule: PlasticityRule) -> TypeGuard[LocalRule]:
    """Whether the statistic that estimators use is `measure` of `signals`, not something put in its place."""
    return isinstance(rule, LocalRule) and type(rule).statistic is LocalRule.statistic


def _classify(walker: Walker, name: str, site: str, location: Location) -> None:
    """Raise unless the update of the leaf `name` is known at each of its own synapses."""
    if isinstance(location, Elsewhere):
        why = location.why
    elif location.site not in (None, site):
        why = f"it is made of what is at {location.site}, which are other synapses"
    elif any(axis not in (None, k) for k, axis in enumerate(location.axes)):
        why = "its axes are not those of its synapses: an entry is made of what is at another, such as its transpose"
    else:
        return
    path = " -> ".join([*walker.path(location.node), f"update of {name or 'meta_params'}"])
    raise NotLocalError(
        f"The update of {name or 'meta_params'} is not local: {why}. Path: {path}. "
        "A local rule may combine what is at the same synapse, and sum over examples and time; let `signals` say what "
        "else arrives there."
    )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
