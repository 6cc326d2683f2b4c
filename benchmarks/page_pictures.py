"""Runs the pages of docs/ that draw, and keeps their pictures in docs/figures: `python -m benchmarks.page_pictures`."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

from benchmarks.harness import PACKAGE_FOLDER

DOCS = PACKAGE_FOLDER.parent / "docs"
FENCED = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SAVED = re.compile(r'savefig\("([\w.]+)"\)')


def pages_that_draw() -> list[Path]:
    """Pages whose code saves a picture."""
    return [page for page in sorted(DOCS.rglob("*.md")) if SAVED.search(page.read_text(encoding="utf-8"))]


def blocks(page: Path) -> Iterator[str]:
    """The Python of a page, block by block; blank lines in front put the page's line numbers into tracebacks."""
    text = page.read_text(encoding="utf-8")
    for block in FENCED.finditer(text):
        yield "\n" * text.count("\n", 0, block.start(1)) + block.group(1)


def drawn_alike() -> None:
    """From here on equal pictures are equal files, and their words are text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "docs", "svg.fonttype": "none"})
    os.environ["SOURCE_DATE_EPOCH"] = "0"


def main(names: list[str]) -> None:
    """Run the pages of these names, or all that draw, one after another in docs/figures."""
    drawn_alike()
    for page in pages_that_draw():
        if names and page.stem not in names:
            continue
        namespace: dict[str, Any] = {"__name__": page.stem}
        with chdir(DOCS / "figures"):
            for source in blocks(page):
                exec(compile(source, str(page), "exec"), namespace)
        print(f"pictures of {page}")


if __name__ == "__main__":
    main(sys.argv[1:])
