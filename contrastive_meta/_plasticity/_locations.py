"""Where the entries of a traced value live: which synapses each axis runs along, or the operation that mixes them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from contrastive_meta._tracing import CALLS, CallSite, open_jaxpr, place_of, site_of_call

# Entry i of what these give is made of entries i of what they take.
_OF_ONE = """
    abs acos acosh asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p cos cosh digamma erf erf_inv
    erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p logistic neg not real reduce_precision round
    rsqrt sign sin sinh sqrt square stop_gradient tan tanh
"""
_OF_SEVERAL = """
    add add_any and atan2 clamp complex div eq ge gt le lt max min mul ne nextafter or pow rem select_n sub xor
"""
_ELEMENTWISE = frozenset(f"{_OF_ONE} {_OF_SEVERAL}".split())
_REDUCTIONS = frozenset(["reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or"])
_CUMULATIVE = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
# What these make of constants alone is a constant.
_OF_CONSTANTS = frozenset(["iota", "concatenate", "slice", "pad", "rev", "gather", "platform_index"])
# What a call computes under `vmap`, by a rule of its own, is another function: estimators map over phases.
_CALLS = {name: key for name, key in CALLS.items() if name != "custom_vmap_call"}

# Of several ways back, a message shows one through what went wrong, else one to something that varies.
_CONSTANT, _VARIES, _LOST = range(3)
_SHOWN = 12

# An axis runs along an axis of the synapses' array, or along none: then every entry of it is at the same synapse.
Axis = int | None


class Node(NamedTuple):
    """A step of the dependence graph: an input or an operation, and the numbers of the steps it works on."""

    label: str
    parents: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Here:
    """Each entry is known at the synapses that its labelled axes point to.

    Attributes:
      site: which array of synapses; None for constants, which are known everywhere.
      axes: for each axis of the value, the axis of the synapses that it runs along.
      node: the step it comes from.
      sources: what it is made of.
    """

    site: str | None
    axes: tuple[Axis, ...]
    node: int
    sources: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Entries depend on what is at other synapses, or nothing proves that they do not.

    Attributes:
      why: the operation and what it does, in words.
      node: the step where it happened.
    """

    why: str
    node: int


Location = Here | Elsewhere


class Walker:
    """Follows locations through a jaxpr. Operations that are not known to keep entries apart mix them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._weight: list[int] = []

    def source(self, label: str) -> int:
        """A step without parents."""
        return self._step(label, ())

    def walk(self, traced: core.ClosedJaxpr | core.Jaxpr, inputs: Iterable[Location], site: CallSite) -> list[Location]:
        """Locations of the outputs, given those of the inputs."""
        jaxpr = open_jaxpr(traced)
        consts = traced.consts if isinstance(traced, core.ClosedJaxpr) else []
        known: dict[core.Var, Location] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update(zip(jaxpr.constvars, map(self._constant, consts), strict=True))

        def read(atom: core.Var | core.Literal) -> Location:
            return self._constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, [read(atom) for atom in eqn.invars], site), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def short(self, node: int) -> str:
        """The label of a step without its place."""
        return self.nodes[node].label.split(" at ")[0]

    def path(self, node: int) -> list[str]:
        """Labels from an input to `node`: through what went wrong where something did, and not from a constant."""
        labels = [self.short(node)]
        while self.nodes[node].parents:
            node = max(self.nodes[node].parents, key=lambda parent: self._weight[parent])
            labels.append(self.short(node))
        labels.reverse()
        return labels if len(labels) <= _SHOWN else [*labels[: _SHOWN // 2], "...", *labels[-_SHOWN // 2 :]]

    def _step(self, label: str, parents: tuple[int, ...]) -> int:
        self.nodes.append(Node(label, parents))
        weights = [self._weight[parent] for parent in parents]
        self._weight.append(max(weights, default=_CONSTANT if label in ("a constant", "beta") else _VARIES))
        return len(self.nodes) - 1

    def _lose(self, why: str, step: int) -> Elsewhere:
        self._weight[step] = _LOST
        return Elsewhere(why, step)

    def _constant(self, value: Any) -> Location:
        """A number is known everywhere; an array, or what was traced elsewhere, may hold what is not known here."""
        if isinstance(value, jax.core.Tracer) or getattr(value, "ndim", 0) > 0:
            shape = getattr(value, "shape", ())
            return Elsewhere(
                f"an array of shape {shape} that the rule captured: nothing says where its entries live",
                self.source("a captured array"),
            )
        return Here(None, (), self.source("a constant"))

    def _equation(self, eqn: core.JaxprEqn, values: list[Location], site: CallSite) -> Sequence[Location]:
        name = eqn.primitive.name
        if name in _CALLS:
            called = eqn.params[_CALLS[name]]
            return self.walk(called, values, site_of_call(eqn, called, site))
        step = self._step(f"`{name}`{place_of(eqn, site)}", tuple(value.node for value in values))
        lost = [value for value in values if isinstance(value, Elsewhere)]
        if lost:
            return [self._lose(lost[0].why, step)] * len(eqn.outvars)
        here = [value for value in values if isinstance(value, Here)]
        located = self._locate(eqn, here)
        if isinstance(located, str):
            return [self._lose(f"{self.nodes[step].label} {located}", step)] * len(eqn.outvars)
        found_site, axes = located
        if len({axis for axis in axes if axis is not None}) < sum(axis is not None for axis in axes):
            why = f"{self.nodes[step].label} brings together entries of different synapses along the same axis"
            return [self._lose(why, step)]
        sources = frozenset().union(*(value.sources for value in here))
        return [Here(found_site, axes, step, sources)]

    def _locate(self, eqn: core.JaxprEqn, values: list[Here]) -> tuple[str | None, tuple[Axis, ...]] | str:
        """Site and axes of an equation's output, or what is wrong with it."""
        name, params = eqn.primitive.name, eqn.params
        if eqn.effects or len(eqn.outvars) != 1:
            return "is not known to keep synapses apart"
        sites = sorted({value.site for value in values if value.site is not None})
        if len(sites) > 1:
            return f"brings together {' and '.join(sites)}, which are different synapses"
        site, shape = (sites[0] if sites else None), eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
        axes: tuple[Axis, ...] | str
        if name in _OF_CONSTANTS and not any(value.sources for value in values):
            axes = (None,) * len(shape)
        elif name in _ELEMENTWISE:
            axes = _join([value.axes for value in values if value.axes], len(shape))
        elif name == "broadcast_in_dim":
            axes = _broadcast(eqn, values[0].axes)
        elif name in ("reshape", "squeeze", "expand_dims"):
            axes = _reshape(eqn, values[0].axes)
        elif name == "transpose":
            axes = tuple(values[0].axes[k] for k in params["permutation"])
        elif name in _REDUCTIONS:
            axes = _reduce(params["axes"], values[0].axes)
        elif name in _CUMULATIVE:
            along = values[0].axes[params["axis"]]
            axes = values[0].axes if along is None else "runs along the synapses, from one to the next"
        elif name == "dot_general":
            axes = _dot(params["dimension_numbers"], values[0].axes, values[1].axes)
        else:
            axes = "is not known to keep synapses apart"
        return axes if isinstance(axes, str) else (site, axes)


_SUMS = "adds up, or otherwise contracts, over synapses"


def _join(operands: list[tuple[Axis, ...]], ndim: int) -> tuple[Axis, ...] | str:
    """Elementwise: along each axis all operands run along the same axis of the synapses, or along none."""
    joined: list[Axis] = []
    for k in range(ndim):
        labels = {axes[k] for axes in operands} - {None}
        if len(labels) > 1:
            return "pairs entries of different axes of the synapses, such as a synapse with its transpose"
        joined.append(next(iter(labels), None))
    return tuple(joined)


def _broadcast(eqn: core.JaxprEqn, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """New axes run along none; those that are spread had length 1 and so ran along none."""
    spread: list[Axis] = [None] * len(eqn.params["shape"])
    for source, target in enumerate(eqn.params["broadcast_dimensions"]):
        spread[target] = axes[source]
    return tuple(spread)


def _reduce(reduced: Sequence[int], axes: tuple[Axis, ...]) -> tuple[Axis, ...] | str:
    if any(axes[k] is not None for k in reduced):
        return _SUMS
    return tuple(axis for k, axis in enumerate(axes) if k not in reduced)


def _dot(dimension_numbers: Any, left: tuple[Axis, ...], right: tuple[Axis, ...]) -> tuple[Axis, ...] | str:
    """Batch axes are elementwise, contracted ones must run along none, the others are free."""
    (left_sum, right_sum), (left_batch, right_batch) = dimension_numbers
    if any(left[k] is not None for k in left_sum) or any(right[k] is not None for k in right_sum):
        return _SUMS
    pairs = [tuple(left[k] for k in left_batch), tuple(right[k] for k in right_batch)]
    batch = _join(pairs, len(left_batch))
    if isinstance(batch, str):
        return batch
    free = [axis for k, axis in enumerate(left) if k not in (*left_sum, *left_batch)]
    return (*batch, *free, *(axis for k, axis in enumerate(right) if k not in (*right_sum, *right_batch)))


def _reshape(eqn: core.JaxprEqn, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | str:
    """An axis of the synapses stays whole; axes that run along none may be merged and split."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape  # type: ignore[attr-defined]
    mixes = "merges or splits axes of the synapses"
    permuted = eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None
    if 0 in old or permuted:
        return mixes
    result: list[Axis] = [None] * len(new)
    before = [k for k, size in enumerate(old) if size != 1]
    after = [k for k, size in enumerate(new) if size != 1]
    # Both shapes cut into the shortest runs of equal products, from the left.
    while before and after:
        take_old, take_new = [before.pop(0)], [after.pop(0)]
        while (a := math.prod(old[k] for k in take_old)) != (b := math.prod(new[k] for k in take_new)):
            (take_old if a < b else take_new).append((before if a < b else after).pop(0))
        if len(take_old) == len(take_new) == 1:
            result[take_new[0]] = axes[take_old[0]]
        elif any(axes[k] is not None for k in take_old):
            return mixes
    return tuple(result)
