"""Whether a set of tasks lets a modular learner find the modules that the tasks are made of."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components

# A module counts as outside of what the tasks span if the projection of its unit vector misses by more than this:
# rounding of a singular value decomposition of some hundred tasks is a millionth of it.
_OUTSIDE = 1e-8


class SupportReport(NamedTuple):
    """What the identifiability theory says of the training tasks of a linear hypernetwork.

    Attributes:
      num_modules: M.
      rank: dimension of what the tasks' coefficients span; M where the support is compositional.
      unused: modules that no task has.
      undetermined: modules that occur, but whose own contribution no combination of tasks tells from the others'.
      groups: the modules that occur, in groups of which no task combines two; one group where the support is connected.
      examples: further combinations of modules after which both conditions hold, none of them larger than the largest
        that there is, or than two. Their coefficients have to be generic, such as drawn at random, unless a combination
        is a single module.

    Example:
      >>> import numpy as np
      >>> from contrastive_meta.architectures import check_support
      >>> report = check_support(np.eye(3))  # each module alone
      >>> report.compositional, report.connected, report.groups
      (True, False, ((0,), (1,), (2,)))
    """

    num_modules: int
    rank: int
    unused: tuple[int, ...]
    undetermined: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    examples: tuple[tuple[int, ...], ...]

    @property
    def num_missing(self) -> int:
        """How many further tasks make both conditions hold."""
        return len(self.examples)

    @property
    def compositional(self) -> bool:
        """Whether the tasks' coefficients span all modules."""
        return self.rank == self.num_modules

    @property
    def connected(self) -> bool:
        """Whether the modules that occur cannot be split into two groups that never occur together."""
        return len(self.groups) <= 1

    @property
    def identifiable(self) -> bool:
        """Whether both conditions hold."""
        return self.compositional and self.connected

    def __str__(self) -> str:
        """The verdict, the modules in the way, and what would help; a sentence a line."""
        if self.identifiable:
            return f"Identifiable: the tasks span all {self.num_modules} modules and connect them."
        lines = ["Not identifiable."]
        if self.unused:
            lines.append(f"No task has {_listed('module', self.unused)}.")
        if self.undetermined:
            lines.append(
                f"The tasks span {self.rank} of {self.num_modules} dimensions: {_listed('module', self.undetermined)} "
                "cannot be told apart by them."
            )
        if not self.connected:
            groups = "; ".join(", ".join(map(str, group)) for group in self.groups)
            lines.append(f"No task combines modules of different groups: {groups}.")
        examples = "; ".join(", ".join(map(str, example)) for example in self.examples)
        tasks = "task" if self.num_missing == 1 else "tasks"
        lines.append(f"{self.num_missing} {tasks} missing, for example of these modules: {examples}.")
        return "\n".join(lines)


def check_support(tasks: Any, *, drawn_weights: bool = False) -> SupportReport:
    """Say whether training on these tasks determines the modules of a linear hypernetwork, and what is in the way.

    A student W = sum_m c_m Theta_m that fits all training tasks of a modular teacher has found the teacher's modules,
    up to an invertible linear map, if

    1. the support is compositional: the coefficients of the training tasks span R^M,
    2. the support is connected: the modules cannot be split into two groups that no task combines,
    3. the student has no units to spare: each unit of the teacher is one unit of the student.

    It then generalises to every combination of the modules. Condition 3 is about the student, and is not checked here.
    Both conditions need a number of tasks that grows linearly with M; there are exponentially many combinations.

    Args:
      tasks: shape (tasks, M): the coefficient of each module in each training task, 0 where the task lacks it; or
        booleans.
      drawn_weights: whether a row is a combination that is met many times, each time with coefficients of its own from
        a continuous distribution; then only which entries are nonzero matters.

    Returns:
      A report; `print` it for the verdict in words.

    Raises:
      ValueError: `tasks` is no matrix, has no row or no column, or has entries that are not finite.

    Reference:
      Schug, Kobayashi, Akram, Wolczyk, Proca, von Oswald, Pascanu, Sacramento & Steger (2024), Discovering modular
      solutions that generalize compositionally, theorem 1.

    Example:
      >>> import numpy as np
      >>> from contrastive_meta.architectures import check_support
      >>> pairs = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
      >>> print(check_support(pairs, drawn_weights=True))
      Not identifiable.
      No task combines modules of different groups: 0, 1; 2, 3.
      1 task missing, for example of these modules: 0, 2.
    """
    coefficients = np.asarray(tasks, np.float64)
    if coefficients.ndim != 2 or 0 in coefficients.shape:
        raise ValueError(
            "`tasks` must be a matrix with a row for each training task and a column for each module; got shape "
            f"{coefficients.shape}. A single task is a matrix of one row."
        )
    if not np.all(np.isfinite(coefficients)):
        raise ValueError("`tasks` has coefficients that are not finite; state 0 for modules that a task lacks.")
    present = coefficients != 0
    spanned = _units_of(present) if drawn_weights else coefficients
    rank, outside = _span(spanned)
    return SupportReport(
        num_modules=coefficients.shape[1],
        rank=rank,
        unused=_indices(~present.any(0)),
        undetermined=_indices(outside & present.any(0)),
        groups=tuple(group for group in _groups(present) if present[:, group].any()),
        examples=_missing(spanned, present, drawn_weights),
    )


def _units_of(present: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """What combinations with coefficients of their own each time span: the unit vectors of their modules."""
    return np.diag(present.any(0).astype(np.float64))


def _span(rows: npt.NDArray[np.float64]) -> tuple[int, npt.NDArray[np.bool_]]:
    """The dimension of the span of some rows, and which unit vectors lie outside of it."""
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    basis = directions[sizes > sizes.max(initial=0.0) * max(rows.shape) * np.finfo(np.float64).eps]
    return len(basis), 1 - np.sum(basis**2, 0) > _OUTSIDE


def _groups(present: npt.NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """Connected components of the graph that joins modules which occur together; an unused module is one of its own."""
    _, labels = connected_components(present.T.astype(int) @ present, directed=False)
    return tuple(_indices(labels == label) for label in np.unique(labels))


def _missing(
    spanned: npt.NDArray[np.float64], present: npt.NDArray[np.bool_], drawn: bool
) -> tuple[tuple[int, ...], ...]:
    """Combinations that connect and span: first what connects groups, through modules that are not determined yet.

    As many are needed as there are dimensions missing (unless weights are drawn), and as connect the groups. A
    combination through an undetermined module does both.
    """
    largest, generic = max(2, int(present.sum(1).max())), np.random.default_rng(0)
    examples: list[tuple[int, ...]] = []
    while True:
        _, outside = _span(spanned)
        groups = _groups(present)
        if not outside.any() and len(groups) == 1:
            return tuple(examples)
        # Of each group an undetermined module where it has one; such groups come first.
        chosen = [next((m for m in group if outside[m]), group[0]) for group in groups]
        chosen.sort(key=lambda module: not outside[module])
        example = np.isin(np.arange(present.shape[1]), chosen[:largest])
        present = np.vstack([present, example])
        new = _units_of(example[None]) if drawn else example * generic.uniform(0.5, 1.0, example.shape)
        spanned = np.vstack([spanned, new])
        examples.append(_indices(example))


def _indices(which: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(which).tolist())


def _listed(noun: str, numbers: tuple[int, ...]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
