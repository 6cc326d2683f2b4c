"""Compiles, and times in turn: one step of each of several training loops, round after round."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import Session
from benchmarks.speed_measure import quiet


class Program(NamedTuple):
    """A compiled function and its size.

    Attributes:
      call: the function.
      compile_seconds: tracing, lowering and compiling together.
      compile_cpu_seconds: the same as time of the processor, which other processes change little.
      operations: instructions of the compiled program, which depend on no machine's load.
      temp_bytes: temporary memory that it allocates.
    """

    call: Callable[..., Any]
    compile_seconds: float
    compile_cpu_seconds: float
    operations: int
    temp_bytes: int | None

    def size(self) -> dict[str, Any]:
        """What a record tells of the program."""
        return {
            "compile_seconds": self.compile_seconds,
            "compile_cpu_seconds": self.compile_cpu_seconds,
            "operations": self.operations,
            "temp_bytes": self.temp_bytes,
        }


def compiled(session: Session, what: str, function: Callable[..., Any], *args: Any) -> Program:
    """Trace, lower and compile for such arguments."""

    # A function of its own: JAX would hand out the program of a function that it compiled before in no time.
    def fresh(*args: Any) -> Any:
        return function(*args)

    session.progress.step(f"compiling {what}")
    start, cpu = time.perf_counter(), time.process_time()
    program = jax.jit(fresh).lower(*args).compile()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    size = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
    return Program(
        program, seconds, cpu_seconds, (program.as_text() or "").count(" = "), None if size is None else int(size)
    )


def time_in_turn(
    session: Session, what: str, turns: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of each round of each turn, waited for; one that raises takes no turns any more, and is told apart.

    All turns of a round see the same load of the machine: compare times of the same round.
    """
    session.progress.begin(what, rounds)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    raised: dict[str, Exception] = {}
    for number in range(rounds):
        for name, turn in turns.items():
            if name in raised:
                continue
            start = time.perf_counter()
            try:
                with quiet():
                    jax.block_until_ready(turn())
            except Exception as error:
                raised[name] = error
            seconds[name].append(time.perf_counter() - start)
        session.progress.step(f"round {number + 1} of {rounds}")
    return {name: times for name, times in seconds.items() if name not in raised}, raised


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over the rounds of one time over another."""
    return float(np.median(np.asarray(numerator) / np.asarray(denominator)))


def median(values: Sequence[float]) -> float:
    """As a Python number."""
    return float(np.median(np.asarray(values, np.float64)))


def record_aim(session: Session, *, x64: bool, case: str, aim: str, target: float, measured: float | None) -> None:
    """An aim, at most `target`, with what was measured: a record of its own."""
    session.record(x64=x64, case=case, kind="aim", aim=aim, target=target, measured=measured)
