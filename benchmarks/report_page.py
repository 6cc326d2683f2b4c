"""All tables and pictures of the records as one self-contained HTML page, for light and dark screens and for phones."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Record
from benchmarks.registry import Benchmark
from benchmarks.tables import seeds_of

_STYLE = """\
:root { color-scheme: light dark; --text: #1c1c1c; --paper: #fdfdfb; --faint: #666; --box: #f1f1ec; --link: #0060a8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --paper: #16181b; --faint: #a0a0a0; --box: #22252a; --link: #74b9f5 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif }
a { color: var(--link) } h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid var(--faint);
  padding-top: 1rem }
nav ul { columns: 14rem; padding-left: 1.2rem } .faint { color: var(--faint); font-size: .9rem }
code { background: var(--box); padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto; background: var(--box); border-radius: .4rem; margin: 1rem 0 }
pre { margin: 0; padding: .8rem; font: .8rem/1.35 ui-monospace, monospace; width: max-content; min-width: 100% }
figure { margin: 1rem 0; overflow-x: auto } figure img { width: 100%; height: auto; background: #fff;
  border-radius: .4rem }
@media (max-width: 40rem) { figure img { width: 52rem; max-width: none } }
"""
_CODE = re.compile("`([^`]*)`")


def render(
    runs: Mapping[str, Sequence[Sequence[Record]]],
    benchmarks: Mapping[str, Benchmark],
    pictures: Mapping[str, Sequence[Path]],
) -> str:
    """The page.

    Args:
      runs: of each benchmark with records, the newest runs, as `report.newest_runs` gives them.
      benchmarks: by name.
      pictures: PNG files of each benchmark; benchmarks without pictures may be left out.

    Returns:
      HTML that refers to no other file.
    """
    names = [name for name, rows in runs.items() if rows]
    contents = "".join(f'<li><a href="#{name}">{html.escape(name)}</a></li>' for name in names)
    sections = [_section(benchmarks[name], runs[name], pictures.get(name, ())) for name in names]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>contrastive_meta: records</title><style>\n{_STYLE}</style></head>",
            "<body><h1>contrastive_meta: records</h1>",
            "<p>Every table and picture of the committed records. <code>python -m benchmarks report</code> made this "
            "page; the command of each section measures anew.</p>",
            f"<nav><ul>{contents}</ul></nav>",
            *sections,
            "</body></html>\n",
        ]
    )


def _section(benchmark: Benchmark, runs: Sequence[Sequence[Record]], pictures: Sequence[Path]) -> str:
    about = _CODE.sub(r"<code>\1</code>", html.escape(benchmark.about))
    tables = [f'<div class="scroll"><pre>{html.escape(benchmark.show(rows))}</pre></div>' for rows in runs]
    return "\n".join(
        [
            f'<section id="{benchmark.name}"><h2>{html.escape(benchmark.name)}</h2>',
            f"<p>{about}</p>",
            f"<p>Remake: <code>python -m benchmarks run {benchmark.name}</code></p>",
            f'<p class="faint">{html.escape(_origin([row for rows in runs for row in rows]))}</p>',
            *tables,
            *(_figure(path) for path in pictures),
            "</section>",
        ]
    )


def _origin(rows: Sequence[Record]) -> str:
    newest = max(rows, key=lambda row: str(row["date"]))
    days = sorted({str(row["date"])[:10] for row in rows})
    environment = newest["environment"]
    measured = " to ".join(dict.fromkeys([days[0], days[-1]]))
    by_seed = [row for row in rows if row.get("seed") is not None]
    seeds = f", {seeds_of(by_seed)}" if by_seed else ""
    return (
        f"Measured {measured} with jax {environment['jax']} on {environment['cpu_count']} cores of "
        f"{environment['device']}{seeds}."
    )


def _figure(path: Path) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.stem.replace("_", " "))
    source = f"data:image/png;base64,{image}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'
