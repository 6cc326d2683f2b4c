"""Which synapses the inputs of a rule live at: by name and shape, or by what its signals say."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity._locations import Elsewhere, Here, Location, Walker
from contrastive_meta._plasticity.autodiff import PlasticityRule
from contrastive_meta._plasticity.by_group import ByGroup
from contrastive_meta._plasticity.local_rule import Signal
from contrastive_meta._problem import MetaParams, Params, Task
from contrastive_meta._pytree import PyTree

Path = tuple[Any, ...]


class Sites:
    """Which array of synapses each input belongs to."""

    def __init__(self, params: Params, meta_params: MetaParams) -> None:
        self.params = _shapes_by_path(params)
        self.meta = _shapes_by_path(meta_params)
        self.of_meta = {jax.tree_util.keystr(path): self._site(path, "meta_params") for path in self.meta}
        self._meta_params = meta_params

    def locate(self, walker: Walker, rule: PlasticityRule, signals: PyTree, task: Task) -> list[Location]:
        """Locations of the leaves of rule, params, meta-parameters, signals, task and beta, in this order."""

        def at(what: str, path: Path, shape: tuple[int, ...], site: str) -> Location:
            name = what + jax.tree_util.keystr(path)
            return Here(site, _own_axes(shape), walker.source(name), frozenset({name}))

        def unknown(what: str, path: Path, why: str) -> Location:
            name = what + jax.tree_util.keystr(path)
            return Elsewhere(f"{name}, {why}", walker.source(name))

        def held(path: Path, leaf: Any) -> Location:
            shape = jnp.shape(leaf)
            site = self._site(path, "rule", shape)
            if isinstance(leaf, jax.core.Tracer):
                return unknown("rule", path, "a traced value of unknown origin that the rule holds")
            if not shape:
                return Here(None, (), walker.source("rule" + jax.tree_util.keystr(path)))
            if site.startswith("params"):
                return at("rule", path, shape, site)
            return unknown("rule", path, "an array without a leaf of `params` of its name and shape")

        return [
            *(held(tuple(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(rule)),
            *(at("params", path, shape, "params" + jax.tree_util.keystr(path)) for path, shape in self.params.items()),
            *(at("meta_params", p, shape, self.of_meta[jax.tree_util.keystr(p)]) for p, shape in self.meta.items()),
            *self._heard(walker, rule, self._meta_params, signals, ()),
            *(unknown("task", p, "which is at no synapse: `signals` says what arrives") for p in _shapes_by_path(task)),
            Here(None, (), walker.source("beta")),
        ]

    def _site(self, path: Path, what: str, shape: tuple[int, ...] | None = None) -> str:
        """The leaf of params that the path ends with the name of, if of the same shape; else a site of its own."""
        shape = self.meta[path] if shape is None else shape
        for start in range(len(path) + 1):
            if self.params.get(path[start:]) == shape:
                return f"params{jax.tree_util.keystr(path[start:])}"
        return f"{what}{jax.tree_util.keystr(path)}"

    def _heard(
        self, walker: Walker, rule: PlasticityRule, meta_params: MetaParams, signals: PyTree, group: Path
    ) -> list[Location]:
        if isinstance(rule, ByGroup):
            names = sorted(rule.rules)
            parts = [(name, (*group, jax.tree_util.DictKey(name))) for name in names]
            found = [self._heard(walker, rule.rules[n], meta_params[n], signals[n], path) for n, path in parts]
            return [location for locations in found for location in locations]
        if not jax.tree.leaves(signals):
            return []
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(meta_params)]
        return [
            self._arrival(walker, (*group, *path), number, signal)
            for path, subtree in zip(paths, jax.tree.structure(meta_params).flatten_up_to(signals), strict=True)
            for number, signal in enumerate(jax.tree.leaves(subtree, is_leaf=lambda x: isinstance(x, Signal)))
        ]

    def _arrival(self, walker: Walker, path: Path, number: int, signal: Any) -> Location:
        name, shape = jax.tree_util.keystr(path), self.meta[path]
        arrives = f"signal {number} to {name or 'meta_params'}"
        if not isinstance(signal, Signal):
            raise ValueError(f"{arrives}: expected a `Signal`, which states its axes; got {signal}.")
        got = signal.value.shape
        fits = len(got) == len(signal.axes) and all(
            k is None or (k < len(shape) and shape[k] == size) for k, size in zip(signal.axes, got, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{arrives}: expected for each of its axes the axis of the leaf, of shape {shape}, that it runs along, "
                f"or None; got {signal.axes} for shape {got}."
            )
        axes = tuple(None if size == 1 else k for k, size in zip(signal.axes, got, strict=True))
        return Here(self.of_meta[name], axes, walker.source(arrives), frozenset({arrives}))


def _shapes_by_path(values: PyTree) -> dict[Path, tuple[int, ...]]:
    return {tuple(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


def _own_axes(shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """All axes along themselves, but for those of length 1: their only entry is at all synapses."""
    return tuple(None if size == 1 else k for k, size in enumerate(shape))
