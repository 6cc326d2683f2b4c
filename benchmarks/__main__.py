"""The command line: `python -m benchmarks` runs the main job; `list`, `run NAME`, `data NAME`, `report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import datasets, report
from benchmarks.data import DATA_VARIABLE, DataMissingError
from benchmarks.download import DownloadError
from benchmarks.harness import COMMITTED_RECORDS, DEFAULT_RECORDS, PICTURES, Progress, Session, compiling_cheaply
from benchmarks.registry import BENCHMARKS, Benchmark
from benchmarks.trust_cases import HALVES

ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do as it says; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        _list(names_only=options.names)
        return 0
    if options.command == "report":
        return report.report(options.records or COMMITTED_RECORDS, PICTURES, check=options.check)
    if options.command == "data":
        return _download(options.names)
    if options.command == "run":
        if options.name not in (*BENCHMARKS, ALL):
            parser.error(f"there is no benchmark {options.name!r}; known are: {', '.join([*BENCHMARKS, ALL])}")
        chosen = [benchmark for name, benchmark in BENCHMARKS.items() if options.name in (name, ALL)]
    else:
        chosen = [benchmark for benchmark in BENCHMARKS.values() if benchmark.main_job]
    return _run(chosen, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare meta-gradient estimators on real data. Without a command: the main job, in about "
        "ten minutes on two cores.",
    )
    parser.set_defaults(
        seed=0,
        seeds=None,
        cases=None,
        half=None,
        x64=None,
        smoke=False,
        full=False,
        seconds=None,
        records=None,
        data=None,
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    listing = commands.add_parser("list", help="the benchmarks and what they show")
    listing.add_argument("--names", action="store_true", help="names only, one a line")
    run = commands.add_parser("run", help="run one benchmark")
    run.add_argument("name", metavar="NAME", help="one of: " + ", ".join([*BENCHMARKS, ALL]))
    run.add_argument("--smoke", action="store_true", help="small sizes that only show that it runs")
    run.add_argument("--full", action="store_true", help="the sizes of the papers, for a GPU (experiments)")
    run.add_argument("--seconds", type=float, default=None, help="of training, each method and seed (experiments)")
    run.add_argument("--seed", type=int, default=0, help="of data splits and initialisations (default 0)")
    run.add_argument("--seeds", type=int, default=None, help="how many, where a benchmark takes several (speed, trust)")
    run.add_argument(
        "--cases", "--only", default=None, help="parts or problems to run, comma-separated (speed, trust, loops)"
    )
    run.add_argument("--half", choices=HALVES, default=None, help="of the cases, where constants were chosen (trust)")
    run.add_argument("--x64", action=argparse.BooleanOptionalAction, default=None, help="float64 or float32")
    run.add_argument("--records", type=Path, default=None, help=f"folder to append records to ({DEFAULT_RECORDS})")
    run.add_argument("--data", type=Path, default=None, help=f"folder with other data (or ${DATA_VARIABLE})")
    get = commands.add_parser("data", help="download data sets from their public homes into the cache")
    get.add_argument("names", metavar="NAME", nargs="+", choices=datasets.SETS, help=", ".join(datasets.SETS))
    remake = commands.add_parser(
        "report", help="remake results/report.html, pictures and the numbers of the pages from records"
    )
    remake.add_argument("--records", type=Path, default=None, help="folder to read (default: the committed ones)")
    remake.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README.md or a page of docs/ is out of date"
    )
    return parser


def _list(*, names_only: bool) -> None:
    width = max(map(len, BENCHMARKS))
    for name, benchmark in BENCHMARKS.items():
        print(name if names_only else f"{name.ljust(width)}  {benchmark.about}")


def _download(names: Sequence[str]) -> int:
    try:
        for name in names:
            print(datasets.get(name))
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(chosen: Sequence[Benchmark], options: argparse.Namespace) -> int:
    folder: Path = options.records or DEFAULT_RECORDS
    pictures: list[Path] = []
    with Progress() as progress, compiling_cheaply(options.smoke):
        for benchmark in chosen:
            session = Session(
                benchmark.name,
                progress,
                folder,
                options.seed,
                options.x64,
                options.smoke,
                options.data,
                num_seeds=options.seeds,
                cases=tuple(options.cases.split(",")) if options.cases else (),
                half=options.half,
                full=options.full,
                seconds=options.seconds,
            )
            try:
                benchmark.run(session)
            except DataMissingError as error:
                print(f"{benchmark.name}: {error}", file=sys.stderr)
                return 2
            print(f"\n{benchmark.show(session.records)}\n", flush=True)
            pictures += report.draw(benchmark, session.records, PICTURES)
        seconds = progress.seconds
    for picture in pictures:
        print(f"picture  {picture}")
    for benchmark in chosen:
        print(f"records  {folder / benchmark.name}.jsonl")
    print(f"done in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
