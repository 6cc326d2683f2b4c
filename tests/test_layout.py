"""The package's layout: imports go one way, the outside sees public names only, and those explain themselves."""

import ast
import doctest
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners, problems

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "contrastive_meta"

# Each unit (a module or a folder of modules) may import itself and the units before it.
ORDER = (
    "_pytree",
    "_control",
    "_tracing",
    "_holomorphic",
    "_problem",
    "_result",
    "_dependence",
    "_response",
    "_solvers",
    "_instance",
    "_base_point",
    "_nudging",
    "_plasticity",
    "_linear",
    "_inverse_hessian",
    "_estimators",
    "_contrastive",
    "_argmin",
    "_layout",
    "_front",
    "_optax",
    "_compare",
    "problems",
    "architectures",
    "local_learners",
)
# Problems are examples of what a user writes, so they get no more of the package than a user has.
SEEN_BY_PROBLEMS = {"_pytree", "_problem", "problems"}
DEPENDENCIES = {"jax", "optax", "numpy", "scipy"}

# The only files outside the package that may name its private modules: tests of those modules' own promises, which
# no public name exposes.
PRIVATE_TESTED_BY: dict[str, set[str]] = {
    "tests/test_holomorphic.py": {"_holomorphic"},
    "tests/test_conjugate_gradient.py": {"_linear"},
}


def package_files() -> list[Path]:
    """Every module of the package."""
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name of the module in `path`, `__init__` left out."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str | None:
    """The part of `contrastive_meta.UNIT...` that the order ranks; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(syntax: ast.AST, package: str = "") -> Iterator[str]:
    """The dotted name of everything imported anywhere in `syntax`: `from a import b` gives `a.b`."""
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def private_names(syntax: ast.AST) -> set[str]:
    """Private modules and names of the package that `syntax` imports or reaches through a name it is bound to."""
    bound = {PACKAGE}
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            bound |= {alias.asname for alias in node.names if alias.name == PACKAGE and alias.asname}
    reached = {name.split(".", 1)[1] for name in imports(syntax) if name.startswith(f"{PACKAGE}.")}
    for node in ast.walk(syntax):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            reached.add(node.attr)
    private = {name for name in reached if any(part.startswith("_") for part in name.split("."))}
    return {name for name in private if not name.startswith("__")}


def python_in_markdown(text: str) -> Iterator[ast.AST]:
    """The syntax of every fenced Python block, plain or with prompts."""
    for block in re.findall(r"^```(?:python|pycon|py)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        examples = doctest.DocTestParser().get_examples(block)
        yield ast.parse("".join(example.source for example in examples) if examples else block)


def public_names() -> Iterator[tuple[str, Any]]:
    """What `import contrastive_meta` and `contrastive_meta.problems` offer, by the name a user types."""
    for prefix, module in (
        ("", cm),
        ("problems.", problems),
        ("architectures.", architectures),
        ("local_learners.", local_learners),
    ):
        syntax = ast.parse(Path(inspect.getfile(module)).read_text())
        for node in ast.walk(syntax):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name
                    yield prefix + name, getattr(module, name)


def wrong_way(module: str, imported: str) -> bool:
    """Whether `module` imports a unit that the order puts after its own."""
    here, there = unit(module), unit(imported)
    if here is None or there is None or here == there:
        return False
    return ORDER.index(there) > ORDER.index(here) or (here == "problems" and there not in SEEN_BY_PROBLEMS)


def test_every_module_has_a_place_in_the_order() -> None:
    units = {unit(module_name(path)) for path in package_files()} - {None}
    assert units <= set(ORDER), f"give {units - set(ORDER)} a place in ORDER"


def test_the_order_is_read_as_meant() -> None:
    """The check itself can fail: in both directions, for relative imports, and for the narrower view of problems."""
    assert wrong_way(f"{PACKAGE}._solvers.base", f"{PACKAGE}._compare.compare")
    assert not wrong_way(f"{PACKAGE}._compare", f"{PACKAGE}._solvers.base")
    assert wrong_way(f"{PACKAGE}.problems._ridge", f"{PACKAGE}._solvers.base")
    relative = ast.parse("from .._nudging import circle\nfrom . import base")
    assert list(imports(relative, f"{PACKAGE}._solvers")) == [f"{PACKAGE}._nudging.circle", f"{PACKAGE}._solvers.base"]
    assert private_names(ast.parse("import contrastive_meta as cm\ncm._pytree.norm(cm.__name__)")) == {"_pytree"}
    assert private_names(ast.parse("from contrastive_meta._pytree import norm")) == {"_pytree.norm"}


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_imports_go_one_way_and_reach_only_the_dependencies(path: Path) -> None:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = list(imports(ast.parse(path.read_text()), package))
    backwards = [name for name in found if name.startswith(f"{PACKAGE}.") and wrong_way(module, name)]
    foreign = {name.split(".")[0] for name in found} - DEPENDENCIES - set(sys.stdlib_module_names) - {PACKAGE}
    assert not backwards, f"{module} imports later units: {backwards}"
    assert not foreign, f"{module} imports {foreign}; the package depends on {DEPENDENCIES} only"


def outside_files() -> list[Path]:
    """Code and pages that stand where a user stands."""
    scripts = [path for folder in ("tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        *scripts,
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "examples").glob("*.md")),
    ]


@pytest.mark.parametrize("path", outside_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_outside_uses_public_names_only(path: Path) -> None:
    text = path.read_text()
    syntaxes = python_in_markdown(text) if path.suffix == ".md" else [ast.parse(text)]
    found = {name for syntax in syntaxes for name in private_names(syntax)}
    allowed = PRIVATE_TESTED_BY.get(str(path.relative_to(ROOT)), set())
    assert {name.split(".")[0] for name in found} <= allowed, f"{path.name} uses private names: {sorted(found)}"


def test_no_exception_is_left_behind() -> None:
    for name, allowed in PRIVATE_TESTED_BY.items():
        used = {private.split(".")[0] for private in private_names(ast.parse((ROOT / name).read_text()))}
        assert used == allowed, f"PRIVATE_TESTED_BY[{name!r}] allows {allowed}, the file uses {used}"


@pytest.mark.parametrize(("name", "value"), list(public_names()))
def test_a_public_name_has_a_docstring_with_an_example(name: str, value: Any) -> None:
    if isinstance(value, ModuleType):
        assert value.__doc__
        return
    assert inspect.isclass(value) or inspect.isroutine(value), (
        f"{name} is a {type(value).__name__}: document it in docs/"
    )
    # Of the object itself: an inherited docstring describes something else.
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text, f"{name} has no docstring"
    assert re.search(r"^\s*Example:\n\s+>>> ", text, flags=re.MULTILINE), f"{name}'s docstring has no runnable Example"


@pytest.mark.parametrize("path", package_files(), ids=module_name)
def test_a_file_begins_with_its_reason_to_exist(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"
