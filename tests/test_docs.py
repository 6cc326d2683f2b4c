"""The pages' Python runs: every fenced block of a page in order, in one namespace, as a reader would type it."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PAGES = [
    page for page in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))) if FENCED.search(page.read_text())
]


# Pages may show these without the tests needing them.
OPTIONAL = {"flax"}


def absent(code: str) -> list[str]:
    """The optional libraries that a block imports and that are not there."""
    modules = [node.module or "" for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    modules += [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    names = {module.split(".")[0] for module in modules} & OPTIONAL
    return sorted(name for name in names if not importlib.util.find_spec(name))


@pytest.fixture
def precision_of_the_reader() -> Iterator[None]:
    """JAX's default precision, in which a page's numbers are given."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.usefixtures("precision_of_the_reader")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_code_of_a_page_runs(path: Path) -> None:
    text = path.read_text()
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in FENCED.finditer(text):
        if lacking := absent(block.group(1)):
            pytest.skip(f'what follows on {path.name} needs {", ".join(lacking)}: pip install ".[examples]"')
        # Blank lines in front put the page's own line numbers into tracebacks.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(path), "exec"), namespace)
