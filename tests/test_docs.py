"""The pages' Python runs, in order and in one namespace, as a reader would type it; links and names lead somewhere."""

import ast
import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import contrastive_meta as cm

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
PAGES = [page for page in ALL_PAGES if FENCED.search(page.read_text())]
# Modules of the package that users name; the reference has a page for each.
MODULES = ("prox", "problems", "architectures", "local_learners")


# What a page says that it prints; numbers differ from machine to machine, words do not.
SHOWN = re.compile(r"^The whole page prints[^\n]*:\n\n```text\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d.,]*(?:e[-+]?\d+)?")

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
    """JAX's default precision, in which a page's numbers are given. Pages share no program: none is kept."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)
    jax.clear_caches()


@pytest.mark.usefixtures("precision_of_the_reader")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in FENCED.finditer(text):
        if lacking := absent(block.group(1)):
            pytest.skip(f'what follows on {path.name} needs {", ".join(lacking)}: pip install ".[examples]"')
        # Blank lines in front put the page's own line numbers into tracebacks.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(path), "exec"), namespace)
    printed = without_numbers(capsys.readouterr().out)
    assert all(without_numbers(shown) in printed for shown in SHOWN.findall(text)), printed


def without_numbers(text: str) -> str:
    """Words and signs in one line, a mark for each number."""
    return " ".join(NUMBER.sub("#", text).split())


def anchors(page: Path) -> set[str]:
    """What links within a page may point to, as mkdocs names its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_package_exist(page: Path) -> None:
    names = set(re.findall(r"\bcm\.((?:\w+\.)*\w+)", page.read_text()))
    absent = [name for name in sorted(names) if not reachable(name)]
    assert not absent


def reachable(name: str) -> bool:
    """Whether `contrastive_meta.NAME` is there; behind a class or function anything may follow."""
    try:
        functools.reduce(getattr, name.split("."), cm)
    except AttributeError:
        first = name.partition(".")[0]
        return hasattr(cm, first) and first not in MODULES
    return True


def test_the_reference_has_every_public_name_once() -> None:
    pages = [page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md"))]
    shown = Counter(name for text in pages for name in re.findall(r"^::: contrastive_meta\.(\w+)$", text, flags=re.M))
    public = [name for name in vars(cm) if not name.startswith("_")]
    assert shown == Counter(public)
    (index,) = (text for text in pages if text.startswith("# Reference by topic"))
    listed = set(re.findall(r"`([\w.]+)`", index)) - {"cm", "contrastive_meta"}
    of_modules = {f"{module}.{name}" for module in MODULES for name in vars(getattr(cm, module)) if name[0] != "_"}
    assert listed == (set(public) - set(MODULES)) | of_modules
