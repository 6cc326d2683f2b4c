"""The only code that times: compile ahead of time, warm up, block, take the median."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np


class Measurement(NamedTuple):
    """What running a function cost.

    Attributes:
      output: what the function returned in the warm-up run.
      compile_seconds: tracing, lowering and compiling together. What JAX keeps of a function that was traced or
        compiled before (inner `jax.jit`s, the persistent compilation cache) comes cheaper. Beside other compilations
        (`num_compiling`) the time is longer.
      seconds: wall time of a call of the compiled function, the median over the repeats.
      spread: interquartile range of the same, in seconds; NaN for a single repeat.
      temp_bytes: temporary memory that the compiled function allocates besides arguments and outputs; None where
        the backend does not tell.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.measure(lambda x: x + 1, 1.0).output.item()
      2.0
    """

    output: Any
    compile_seconds: float
    seconds: float
    spread: float
    temp_bytes: int | None


class Prepared(NamedTuple):
    """A function compiled for its arguments and warmed up.

    Attributes:
      call: runs it and waits until the result is there.
      output: of the warm-up.
      compile_seconds: as in `Measurement`.
      temp_bytes: as in `Measurement`.
    """

    call: Callable[[], Any]
    output: Any
    compile_seconds: float
    temp_bytes: int | None


def measure(function: Callable[..., Any], *args: Any, repeats: int = 5) -> Measurement:
    """Compile a function, run it `repeats` times and say what it cost.

    To compare several, use `measure_interleaved`: on a busy machine times taken minutes apart have no ratio.

    Args:
      function: traceable.
      *args: pytrees of arrays, moved to the device before the clock starts. What `function` closes over instead
        becomes a constant that the compiler may compute with.
      repeats: timed calls, at least 1, after one that is not timed.

    Returns:
      The output with compile time, time and temporary memory.

    Raises:
      ValueError: `repeats` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> measurement = cm.measure(lambda x: jnp.sum(x**2), jnp.arange(4.0))
      >>> float(measurement.output), measurement.seconds > 0
      (14.0, True)
    """
    return measure_interleaved({"": (function, args)}, repeats)[""]


def measure_interleaved(
    calls: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], repeats: int = 5, *, num_compiling: int = 1
) -> dict[str, Measurement]:
    """Measure several functions in turn, round after round, so that the machine's load is the same for all.

    All are compiled and warmed up before the first is timed.

    Args:
      calls: `{name: (function, args)}`, each as in `measure`.
      repeats: rounds, at least 1.
      num_compiling: programs that are compiled at a time, in threads. As many as there are cores come soonest; one at a
        time has compile times that do not depend on the others.

    Returns:
      `{name: measurement}`, in the order of `calls`.

    Raises:
      ValueError: `repeats` or `num_compiling` below 1.
      Exception: what the first function that fails raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> x = jnp.arange(4.0)
      >>> both = cm.measure_interleaved({"sum": (jnp.sum, (x,)), "max": (jnp.max, (x,))}, repeats=3)
      >>> {name: float(measurement.output) for name, measurement in both.items()}
      {'sum': 6.0, 'max': 3.0}
    """
    check_repeats(repeats)
    prepared: dict[str, Prepared] = {}
    for name, ready in prepare_each(calls, num_compiling).items():
        if isinstance(ready, Exception):
            raise ready
        prepared[name] = ready
    return time_interleaved(prepared, repeats)


def check_repeats(repeats: int) -> None:
    """Raise unless there is something to take a median of.

    Raises:
      ValueError: `repeats` below 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1; got {repeats}.")


def prepare_each(
    calls: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], num_compiling: int = 1
) -> dict[str, Prepared | Exception]:
    """Compile all functions for their arguments and call each once; an exception in the place of one that raises.

    Args:
      calls: `{name: (function, args)}`.
      num_compiling: programs that are compiled at a time. Tracing is Python's, one at a time.

    Raises:
      ValueError: `num_compiling` below 1.
    """
    if num_compiling < 1:
        raise ValueError(f"`num_compiling` must be at least 1; got {num_compiling}.")
    compiling: dict[str, Future[_Program]] = {}
    with ThreadPoolExecutor(num_compiling) as pool:
        for name, (function, args) in calls.items():
            while len(busy := [future for future in compiling.values() if not future.done()]) >= num_compiling:
                wait(busy, return_when=FIRST_COMPLETED)
            compiling[name] = _submit(pool, function, args)
    return {name: _warmed_up(future) for name, future in compiling.items()}


class _Program(NamedTuple):
    """A compiled function, its arguments, and the seconds that it took to get there."""

    compiled: Any
    args: Any
    seconds: float


def _submit(pool: ThreadPoolExecutor, function: Callable[..., Any], args: Sequence[Any]) -> "Future[_Program]":
    """Trace and lower here, where the caller's settings of JAX hold, and compile in a thread of the pool."""

    # A function of its own: JAX would hand out the program of a function that it compiled before in no time.
    def fresh(*args: Any) -> Any:
        return function(*args)

    try:
        on_device = jax.device_put(tuple(args))
        start = time.perf_counter()
        lowered = jax.jit(fresh).lower(*on_device)
    except Exception as error:
        failed: Future[_Program] = Future()
        failed.set_exception(error)
        return failed
    seconds = time.perf_counter() - start

    def compile_it() -> _Program:
        start = time.perf_counter()
        compiled = lowered.compile()
        return _Program(compiled, on_device, seconds + time.perf_counter() - start)

    return pool.submit(compile_it)


def _warmed_up(future: "Future[_Program]") -> Prepared | Exception:
    try:
        program = future.result()

        def call() -> Any:
            return jax.block_until_ready(program.compiled(*program.args))

        return Prepared(call, call(), program.seconds, _temp_bytes(program.compiled))
    except Exception as error:
        return error


def time_interleaved(prepared: Mapping[str, Prepared], repeats: int) -> dict[str, Measurement]:
    """Time each once a round, for `repeats` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(repeats):
        for name, function in prepared.items():
            start = time.perf_counter()
            function.call()
            seconds[name].append(time.perf_counter() - start)
    return {name: _summarise(function, seconds[name]) for name, function in prepared.items()}


def _summarise(function: Prepared, seconds: list[float]) -> Measurement:
    lower, median, upper = (float(x) for x in np.percentile(seconds, [25, 50, 75]))
    spread = upper - lower if len(seconds) > 1 else float("nan")
    return Measurement(function.output, function.compile_seconds, median, spread, function.temp_bytes)


def _temp_bytes(compiled: Any) -> int | None:
    try:
        analysis = compiled.memory_analysis()
    except NotImplementedError:
        return None
    size = getattr(analysis, "temp_size_in_bytes", None)
    return None if size is None else int(size)
