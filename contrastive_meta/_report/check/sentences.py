"""The evidence of a check put into sentences."""

import math

import numpy as np

from contrastive_meta._report.check.agreement import FINITE_DIFFERENCES, NOISE_FACTOR, Evidence, Relation
from contrastive_meta._report.text import listing, share
from contrastive_meta._result import Status


def sentences(evidence: Evidence) -> list[str]:
    """Who agrees with whom, who differs from them and how, and what explains it."""
    clusters = evidence.clusters()
    trusted = _trusted(clusters)
    said = [_agreement(evidence, cluster) for cluster in clusters if len(cluster) > 1]
    if FINITE_DIFFERENCES not in trusted:
        said.append(_about_finite_differences(evidence, trusted))
    said += [_difference(evidence, c, trusted) for c in clusters if c != trusted and FINITE_DIFFERENCES not in c]
    said += [
        f"{name} is not finite ({estimate.status.name})."
        for name, estimate in evidence.estimates.items()
        if not np.isfinite(estimate.grad).all()
    ]
    if evidence.agreement() is False:
        said += _explanations(evidence)
    return [sentence for sentence in [*said, *_blindness(evidence)] if sentence]


def _trusted(clusters: list[list[str]]) -> list[str]:
    """The cluster that others are compared with: that of finite differences, else the largest."""
    with_finite_differences = next(cluster for cluster in clusters if FINITE_DIFFERENCES in cluster)
    others = [cluster for cluster in clusters if FINITE_DIFFERENCES not in cluster]
    return with_finite_differences if len(with_finite_differences) > 1 or not others else max(others, key=len)


def _agreement(evidence: Evidence, cluster: list[str]) -> str:
    largest = max(evidence.relation(a, b).difference for a in cluster for b in cluster)
    return f"{listing(cluster)} agree to {share(largest)}."


def _about_finite_differences(evidence: Evidence, trusted: list[str]) -> str:
    """Why the finite differences are not among the trusted: contradiction, or too noisy to tell."""
    name = next((name for name in trusted if name != FINITE_DIFFERENCES), None)
    if name is None:
        return ""
    relation = evidence.to_finite_differences(name)
    if relation.agrees is False:
        verb = "differs" if len(trusted) == 1 else "differ"
        return (
            f"{listing(trusted)} {verb} from finite differences by {share(relation.difference)}{_multiple(relation)}."
        )
    if not math.isfinite(relation.difference):
        return "Finite differences cannot decide: learning did not stay finite at perturbed meta-parameters."
    if relation.noise <= evidence.tolerance:
        return (
            f"Finite differences cannot decide: they differ from {name} by {share(relation.difference)}, too close to "
            f"the tolerance of {share(evidence.tolerance)} given their own noise of {share(relation.noise)}."
        )
    return (
        f"Finite differences cannot decide: their own noise is {share(relation.noise)} of the gradient, above the "
        f"tolerance of {share(evidence.tolerance)}. Work in float64, let the solver converge further, or raise "
        "`tolerance`."
    )


def _difference(evidence: Evidence, cluster: list[str], trusted: list[str]) -> str:
    """How those of one cluster differ from the trusted."""
    name, verb = cluster[0], "differs" if len(cluster) == 1 else "differ"
    others = [other for other in trusted if evidence.relation(name, other).agrees is False]
    if not others:
        relation = evidence.relation(name, FINITE_DIFFERENCES)
        return (
            f"{listing(cluster)} cannot be told from {FINITE_DIFFERENCES}: they differ by "
            f"{share(relation.difference)}, of which {share(relation.noise)} may be noise of the latter."
        )
    # Finite differences come last: the difference between two estimators is exact, not that along a few directions.
    against, relation = others[0], evidence.relation(name, others[0])
    leaf = evidence.leaf_of(name, against) if against != FINITE_DIFFERENCES else None
    where = _multiple(relation) or (f", mostly in {leaf}" if leaf else "")
    rest = f"{against} and {len(others) - 1} more" if len(others) > 2 else listing(others)
    return f"{listing(cluster)} {verb} from {rest} by {share(relation.difference)}{where}."


def _multiple(relation: Relation) -> str:
    return "" if math.isnan(relation.factor) else f" ({relation.factor:.3g} times that)"


def _explanations(evidence: Evidence) -> list[str]:
    """What may explain a disagreement: the statuses, of which learning that stopped early is the usual one."""
    said = []
    for status in sorted({estimate.status for estimate in evidence.estimates.values()} - {Status.CONVERGED}):
        names = [name for name, estimate in evidence.estimates.items() if estimate.status == status]
        if status == Status.FREE_NOT_CONVERGED:
            residual = max(evidence.estimates[name].free_residual for name in names)
            said.append(
                f"Learning stopped early (free residual {residual:.2g}, noticed by {listing(names)}): contrastive and "
                "implicit estimators describe the minimum, which it had not reached; backprop and finite differences "
                "follow the steps it took."
            )
        else:
            said.append(f"{listing(names)} reported {status.name}.")
    return said


def _blindness(evidence: Evidence) -> list[str]:
    """Whether meta-parameters that some cannot see matter, as far as the finite differences can tell."""
    slopes, said = evidence.slopes, []
    total = slopes.norm(slopes.values)
    for number, group in enumerate(evidence.groups):
        if not group.blind:
            continue
        effect, noise = slopes.norm(slopes.values, number), slopes.norm(slopes.noise, number)
        leaves, blind = listing(group.leaves), listing(group.blind)
        if not math.isfinite(total + noise):
            said.append(f"{blind} cannot see {leaves}, and finite differences cannot tell whether it matters.")
        elif effect > evidence.tolerance * total + NOISE_FACTOR * noise:
            said.append(
                f"The outer loss depends on {leaves} (about {share(effect / total)} of the gradient by finite "
                f"differences), which {blind} cannot see{_otherwise(evidence, group.blind)}. Such an effect lasts only "
                "while learning is unfinished: learn for longer, or use `BackpropThroughLearning`, which sees it."
            )
        elif effect + noise <= evidence.tolerance * total or effect + noise == 0:
            bound = share((effect + noise) / total) if total > 0 else "0"
            said.append(f"{blind} cannot see {leaves}; no harm: by finite differences that is {bound} of the gradient.")
        else:
            said.append(
                f"{blind} cannot see {leaves}, and finite differences are too noisy to tell whether it matters."
            )
    return said


def _otherwise(evidence: Evidence, blind: tuple[str, ...]) -> str:
    """Whether the blind are right about all that they see."""
    relations = [evidence.to_finite_differences(name, only_visible=True) for name in blind]
    if all(relation.agrees for relation in relations):
        return f"; in what they see they agree with finite differences to {share(max(r.difference for r in relations))}"
    return ""
