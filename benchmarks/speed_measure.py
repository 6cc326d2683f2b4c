"""Times a grid of points in turn, compiling once what differs only by numbers.

`cm.measure_interleaved` compiles every call anew. A grid of two hundred points would be two hundred programs, more
than a process can hold; here all points of a method share one, as they do in use. Otherwise it is the same: compiled
ahead of time, warmed up, blocked on, in rounds in which all take turns.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Session
from benchmarks.speed_methods import Outcome, Point

# A call of so many seconds is timed from the first on, and at most once more.
_SLOW = 1.0


class Program(NamedTuple):
    """A compiled function with what it took and what it takes."""

    call: Callable[..., Any]
    compile_seconds: float | None
    temp_bytes: int | None


class Measured(NamedTuple):
    """What a point gave and cost.

    Attributes:
      outcome: of the call that is not timed.
      seconds: median over the rounds.
      spread: interquartile range of the same.
      compile_seconds: of the point's program where this point was the first to need it, else None.
      temp_bytes: of the program.
    """

    outcome: Outcome
    seconds: float
    spread: float
    compile_seconds: float | None
    temp_bytes: int | None


class Programs:
    """The programs of one problem, kept from seed to seed."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Program | Exception] = {}

    def find(self, point: Point, args: Any, session: Session) -> tuple[Program, bool]:
        """The program of a point, and whether it was compiled just now.

        Raises:
          Exception: what compiling it raised, now or before.
        """
        if point.on_host:
            return Program(point.function, None, None), True
        leaves, structure = jax.tree.flatten(args)
        key = (
            point.function,
            structure,
            tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves),
        )
        new = key not in self._compiled
        if new:
            session.progress.step(f"compiling {point.method}, {point.start}")
            try:
                self._compiled[key] = _compile(point.function, args)
            except Exception as error:
                self._compiled[key] = error
        program = self._compiled[key]
        if isinstance(program, Exception):
            raise program
        return program, new


def measure(
    session: Session, what: str, points: Mapping[str, Point], programs: Programs, repeats: int
) -> dict[str, Measured | Exception]:
    """Warm all points up, time each once a round, and let one that raises take nobody else along."""
    session.progress.begin(what, len(points))
    ready: dict[str, _Warm] = {}
    measured: dict[str, Measured | Exception] = {}
    seconds: dict[str, list[float]] = {}
    for key, point in points.items():
        args = tuple(point.args) if point.on_host else jax.tree.map(jnp.asarray, tuple(point.args))
        try:
            program, new = programs.find(point, args, session)
            with quiet():
                start = time.perf_counter()
                outcome = jax.block_until_ready(program.call(*args))
            took = time.perf_counter() - start
            ready[key] = _Warm(program, args, outcome, new, min(repeats, math.ceil(1.0 / max(took, 1e-6))))
            # Of a slow point the first call is as good as any.
            seconds[key] = [took] if took > _SLOW else []
        except Exception as error:
            measured[key] = error
    for number in range(repeats):
        for key, warm in ready.items():
            if number < warm.num_rounds:
                start = time.perf_counter()
                jax.block_until_ready(warm.program.call(*warm.args))
                seconds[key].append(time.perf_counter() - start)
    for key, warm in ready.items():
        lower, median, upper = (float(x) for x in np.percentile(seconds[key], [25, 50, 75]))
        told = warm.program.compile_seconds if warm.new else None
        measured[key] = Measured(warm.outcome, median, upper - lower, told, warm.program.temp_bytes)
    return {key: measured[key] for key in points}


class _Warm(NamedTuple):
    program: Program
    args: Any
    outcome: Outcome
    new: bool
    num_rounds: int


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the trace that JAX logs where a peer raises from inside a program: the record tells."""
    logger = logging.getLogger("jax._src.callback")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _compile(function: Callable[..., Any], args: Any) -> Program:
    # A function of its own: JAX would hand out the program of a function that it compiled before in no time.
    def fresh(*args: Any) -> Any:
        return function(*args)

    start = time.perf_counter()
    compiled = jax.jit(fresh).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    size = getattr(analysis, "temp_size_in_bytes", None)
    return Program(compiled, compile_seconds, None if size is None else int(size))
