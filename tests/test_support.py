"""Which tasks determine the modules they are made of: the supports of the theory, and what is said to be missing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.composition.hyperteacher_supports import SUPPORTS
from contrastive_meta.architectures import check_support

# Schug et al. (2024), discrete and continuous experiments of the theory section: those that were found to generalise.
BLESSED = {
    "ring",
    "ring of triples",
    "sliding triples",
    "all at once",
    "equal weights: ring and singletons",
    "equal weights: triples and singletons",
    "equal weights: all at once and singletons",
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_supports_of_the_theory(name: str) -> None:
    assert SUPPORTS[name].check().identifiable == (name in BLESSED)


def test_a_ring_of_pairs_spans_an_odd_number_of_modules_only() -> None:
    # The incidence matrix of a cycle is singular if and only if the cycle is even.
    for number in range(3, 9):
        ring = np.eye(number) + np.roll(np.eye(number), 1, axis=1)
        report = check_support(ring)
        assert report.compositional == (number % 2 == 1)
        assert report.rank == np.linalg.matrix_rank(ring)
        assert report.undetermined == (() if number % 2 else tuple(range(number)))
        assert check_support(ring, drawn_weights=True).identifiable


def test_words() -> None:
    masks = np.zeros((2, 5), bool)
    masks[0, [0, 1]] = masks[1, [2, 3]] = True
    report = check_support(masks)
    assert (report.unused, report.groups, report.rank) == ((4,), ((0, 1), (2, 3)), 2)
    text = str(report)
    assert "No task has module 4." in text
    assert "span 2 of 5 dimensions: modules 0, 1, 2, 3 cannot be told apart" in text
    assert "different groups: 0, 1; 2, 3." in text
    assert f"{report.num_missing} tasks missing" in text


masks_of_tasks = st.integers(2, 6).flatmap(
    lambda number: st.lists(st.lists(st.booleans(), min_size=number, max_size=number), min_size=1, max_size=6)
)


@given(masks_of_tasks, st.booleans())
def test_what_is_said_to_be_missing_is_enough_and_none_too_many(masks: list[list[bool]], drawn: bool) -> None:
    present = np.array(masks)
    coefficients = present * np.random.default_rng(1).uniform(0.5, 1.0, present.shape)
    report = check_support(coefficients, drawn_weights=drawn)
    added = np.array([[m in example for m in range(present.shape[1])] for example in report.examples])
    more = added.reshape(-1, present.shape[1]) * np.random.default_rng(2).uniform(0.5, 1.0, (len(added), 1))
    more = more * np.random.default_rng(3).uniform(0.5, 1.0, more.shape)
    assert check_support(np.vstack([coefficients, more]), drawn_weights=drawn).identifiable
    assert report.identifiable == (report.num_missing == 0)
    # By hand: each task joins at most so many groups, and adds one dimension unless its weights are drawn.
    largest = max(2, int(present.sum(1).max()))
    apart = len(report.groups) + len(report.unused)
    least = max(-(-(apart - 1) // (largest - 1)), 0 if drawn else report.num_modules - report.rank)
    assert report.num_missing == max(least, 1 if not report.identifiable else 0)


@given(masks_of_tasks)
def test_groups_are_those_that_no_task_combines(masks: list[list[bool]]) -> None:
    present = np.array(masks)
    groups = check_support(present).groups
    of = {module: group for group in groups for module in group}
    assert sorted(of) == np.flatnonzero(present.any(0)).tolist()
    for task in present:
        assert len({of[m] for m in np.flatnonzero(task)}) <= 1
    # No finer split will do: every proper part of a group shares a task with the rest of it.
    for group in groups:
        for size in range(1, len(group)):
            for part in itertools.combinations(group, size):
                rest = [m for m in group if m not in part]
                assert any(task[list(part)].any() and task[rest].any() for task in present)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (np.ones(3), r"a matrix with a row for each training task.*\(3,\)"),
        (np.ones((0, 3)), r"got shape \(0, 3\)"),
        (np.array([[1.0, np.nan]]), r"not finite; state 0"),
    ],
)
def test_bad_tasks_are_refused(tasks: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_support(tasks)
