"""The only code that measures and records: all goes through `cm.measure_interleaved` and ends as JSON lines."""

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm

Record = dict[str, Any]
Vector = npt.NDArray[np.float64]
Calls = Mapping[str, tuple[Callable[..., Any], Sequence[Any]]]

PACKAGE_FOLDER = Path(__file__).resolve().parent
COMMITTED_RECORDS = PACKAGE_FOLDER / "results"
PICTURES = Path("results")
DEFAULT_RECORDS = PICTURES / "records"
# Programs that are compiled at a time: XLA keeps little more than one core busy with one of them.
NUM_COMPILING = min(4, os.cpu_count() or 1)
_QUIET = 10.0  # seconds between lines on a stage that tells of every step
# They take two thirds off the time of compiling programs that run for a millisecond (an estimate of the default: 7.3 s
# of CPU time, 4.1 by the first two flags, 2.2 by all). The passes look for what loops could leave out or do once, at a
# price that grows with the square of what a loop carries, and rewrite sums. XLA dies of a flag it does not know, and
# these are known until JAX 0.10.
_PASSES_LEFT_OUT = ("while-loop-invariant-code-motion", "simplify-while-loops", "tree_reduction_rewriter")
CHEAP_XLA_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    f"--xla_disable_hlo_passes={','.join(_PASSES_LEFT_OUT)}"
)


@contextlib.contextmanager
def precision(x64: bool) -> Iterator[None]:
    """Run in float64 or float32 whatever the process's default, which is left as it was."""
    # `jax.enable_x64` is the context manager of newer versions, where the experimental one is gone.
    enable_x64: Any = getattr(jax, "enable_x64", None)
    if enable_x64 is None:
        enable_x64 = importlib.import_module("jax.experimental").enable_x64
    with enable_x64(x64):
        yield


def use_cheap_xla_flags() -> None:
    """Where nobody has set XLA_FLAGS. XLA reads them once in a process, before its first program."""
    if jax.__version_info__ < (0, 11):
        os.environ.setdefault("XLA_FLAGS", CHEAP_XLA_FLAGS)


@contextlib.contextmanager
def compiling_cheaply(wanted: bool) -> Iterator[None]:
    """Compile without most optimisations, in a fraction of the time: where no time is measured, as in smoke runs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", wanted or before)
    if wanted:
        use_cheap_xla_flags()
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


class Progress:
    """What is going on, on stderr: a live line in a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._live: Any = None
        self._task: Any = None
        self._told = 0.0

    def __enter__(self) -> Self:
        """Start the live line where there is a terminal and rich."""
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Live

                columns = (
                    TimeElapsedColumn(),
                    BarColumn(bar_width=24),
                    MofNCompleteColumn(),
                    TextColumn("{task.description}"),
                )
                self._live = Live(*columns, console=Console(stderr=True), transient=True)
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def begin(self, what: str, total: int) -> None:
        """A new stage of `total` steps."""
        if self._live is None:
            self._say(what)
            return
        if self._task is not None:
            self._live.remove_task(self._task)
        self._task = self._live.add_task(what, total=total)

    def step(self, what: str) -> None:
        """One step further, to `what`."""
        if self._live is None:
            self._say(f"  {what}")
        elif self._task is not None:
            self._live.update(self._task, description=what, advance=1)

    def tell(self, what: str, fraction: float) -> None:
        """So far has a stage of 100 steps come; outside of a terminal a line every ten seconds."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=what, completed=round(100 * fraction))
        elif self.seconds - self._told > _QUIET:
            self._told = self.seconds
            self._say(f"  {what}")

    def _say(self, what: str) -> None:
        print(f"[{self.seconds:6.1f} s] {what}", file=sys.stderr, flush=True)


@dataclasses.dataclass
class Session:
    """One run of one benchmark: its settings, its progress and its records.

    Attributes:
      benchmark: name.
      progress: where to say what is going on.
      records: written so far by this run.
      folder: of the JSON lines; None writes nothing.
      seed: of data splits, corrupted labels and initialisations.
      x64: float64 or float32; None for the benchmark's own choice.
      smoke: small sizes that only show that it runs.
      data: folder given by `--data`.
      num_seeds: given by `--seeds`; None for the benchmark's own number.
      cases: names given by `--cases`; empty for all.
      half: given by `--half`; None for both.
      full: the sizes of the papers, given by `--full`.
      seconds: a budget of training, given by `--seconds`; None for the benchmark's own.
    """

    benchmark: str
    progress: Progress
    folder: Path | None = None
    seed: int = 0
    x64: bool | None = None
    smoke: bool = False
    data: Path | None = None
    num_seeds: int | None = None
    cases: tuple[str, ...] = ()
    half: str | None = None
    full: bool = False
    seconds: float | None = None
    records: list[Record] = dataclasses.field(default_factory=list)
    run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])
    date: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def refuse_unknown_cases(self, known: Iterable[str]) -> None:
        """End with the names that are known where `--cases` has another."""
        known = list(known)
        if unknown := sorted(set(self.cases) - set(known)):
            raise SystemExit(f"{self.benchmark} has no case {', '.join(unknown)}; known are: {', '.join(known)}")

    def seeds(self, first: int, number: int) -> range:
        """What is reported on: `--seed` and `--seeds`, where given, in the place of the first seed and their number."""
        first = self.seed or first
        return range(first, first + (self.num_seeds or number))

    def record(self, *, x64: bool, **fields: Any) -> Record:
        """Append one record, with all that is needed to know where it comes from."""
        record = {
            "benchmark": self.benchmark,
            "run": self.run,
            "date": self.date,
            "seed": self.seed,
            "smoke": self.smoke,
            "precision": "float64" if x64 else "float32",
            **{key: plain(value) for key, value in fields.items()},
            "environment": environment(),
        }
        self.records.append(record)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{self.benchmark}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        return record

    def measure(self, what: str, calls: Calls, repeats: int) -> dict[str, cm.Measurement | Exception]:
        """Compile all calls, some at a time, time them in turn, and let one that raises take nobody else along.

        Args:
          what: for the progress line.
          calls: `{name: (function, args)}`.
          repeats: timed rounds.

        Returns:
          For each name what `cm.measure_interleaved` measured, or the exception.
        """
        self.progress.begin(what, len(calls) + 1)
        announced = {name: (self._announced(name, function), args) for name, (function, args) in calls.items()}
        with warnings.catch_warnings():
            # An estimator that cannot see some of the meta-parameters says so in `result.unseen` as well.
            warnings.filterwarnings("ignore", message=".* cannot see the meta-parameters", category=UserWarning)
            try:
                return dict(cm.measure_interleaved(announced, repeats, num_compiling=NUM_COMPILING))
            except Exception:
                return {name: _alone(call, repeats) for name, call in announced.items()}

    def _announced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any) -> Any:
            # A side effect at trace time: that is when this function's turn to be compiled comes.
            self.progress.step(f"compiling {name}")
            return function(*args)

        return traced


def _alone(call: tuple[Callable[..., Any], Sequence[Any]], repeats: int) -> cm.Measurement | Exception:
    function, args = call
    try:
        return cm.measure(function, *args, repeats=repeats)
    except Exception as error:
        return error


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def flatten(values: Any) -> Vector:
    """All entries of a pytree as one float64 vector."""
    return np.concatenate([np.zeros(0), *(np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(values))])


def relative_error(grad: Any, reference: Vector) -> float:
    """||grad - reference|| / ||reference||."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm(flatten(grad) - reference) / np.linalg.norm(reference))


def cosine(grad: Any, reference: Vector) -> float:
    """Of the angle between a gradient and the reference."""
    flat = flatten(grad)
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(flat) * np.linalg.norm(reference)
        return float(flat @ reference / lengths) if lengths > 0 else math.nan


def plain(value: Any) -> Any:
    """JSON's own types; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> Record:
    """Versions, device and commit: what decides the numbers besides the seed."""
    if not _environment:
        names = ("jax", "jaxlib", "optax", "numpy", "scipy")
        device = jax.devices()[0]
        _environment.update(
            {name: importlib.metadata.version(name) for name in names},
            python=platform.python_version(),
            device=device.device_kind if device.platform != "cpu" else _cpu_name(),
            platform=device.platform,
            cpu_count=os.cpu_count(),
            default_matmul_precision=str(getattr(jax.config, "jax_default_matmul_precision", None) or "default"),
            version=_version(),
            commit=_commit(),
        )
    return dict(_environment)


_environment: Record = {}


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("contrastive_meta")
    return None


def _commit() -> str | None:
    """The commit of the clone that this package runs from, marked where its code was changed since; None elsewhere."""
    clone = PACKAGE_FOLDER.parent
    if not (clone / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "contrastive_meta", "benchmarks/*.py").strip()
        return git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
