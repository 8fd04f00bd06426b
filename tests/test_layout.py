"""The import graph of the package and of the recipes: imports point downward, between files and between folders."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"uc_adapters": "uc_adapters.", "recipes": ""}


def graph(folder: Path, prefix: str) -> dict[str, set[str]]:
    """The modules that each module of a folder imports, at run time, from the same folder."""
    files = {prefix + ".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    modules = {name.removesuffix("__init__").rstrip("."): path for name, path in files.items()}
    return {name: imported(name, path, set(modules)) - {name} for name, path in modules.items()}


def imported(module: str, path: Path, modules: set[str]) -> set[str]:
    tree = ast.parse(path.read_text())
    typing = {id(node) for test in ast.walk(tree) if is_type_checking(test) for node in ast.walk(test)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        above = module.split(".") + ["__init__"] * (path.name == "__init__.py")
        source = ".".join([*above[: -node.level], *filter(None, [node.module])]) if node.level else node.module
        names |= {f"{source}.{alias.name}" for alias in node.names} | {source}
    # `from package import module` is an import of the module, not of what the package's own file imports
    return {name for name in names if name in modules and not any(other.startswith(f"{name}.") for other in names & modules)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def by_folder(edges: dict[str, set[str]], depth: int) -> dict[str, set[str]]:
    """The same between folders; a file that is in none stands for itself."""
    folders: dict[str, set[str]] = {}
    for module, targets in edges.items():
        own = ".".join(module.split(".")[:depth])
        folders.setdefault(own, set()).update({".".join(target.split(".")[:depth]) for target in targets} - {own})
    return folders


@pytest.mark.parametrize(("tree", "prefix"), TREES.items())
def test_imports_have_no_circles(tree, prefix):
    edges = graph(ROOT / tree, prefix)
    assert len(edges) > 20
    for of_depth in (edges, by_folder(edges, 1 + prefix.count("."))):
        list(TopologicalSorter(of_depth).static_order())  # raises CycleError, which names the circle


def test_the_test_sees_a_circle(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/__init__.py").write_text("")
    (tmp_path / "a/one.py").write_text("from b import two")
    (tmp_path / "b.py").write_text("from a.one import x\ntwo = 2")
    edges = graph(tmp_path, "")
    assert edges == {"a": set(), "a.one": {"b"}, "b": {"a.one"}}
    assert by_folder(edges, 1) == {"a": {"b"}, "b": {"a"}}


def test_the_method_does_not_know_sharing_or_training():
    """Sharing and training are entries to the method: only the model, the command and the package's own file import them."""
    edges = by_folder(graph(ROOT / "uc_adapters", "uc_adapters."), 2)
    entries = {"uc_adapters", "uc_adapters.command", "uc_adapters.model"}
    assert {module for module, targets in edges.items() if "uc_adapters.hub" in targets} == entries
    assert not [module for module, targets in edges.items() if "uc_adapters.training" in targets]


def test_no_file_holds_a_merge_conflict():
    # A docstring that holds one is valid Python, so nothing else sees it.
    found = subprocess.run(["git", "grep", "-nE", "^(<{7}|>{7}) "], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 128:
        pytest.skip("not a git checkout")
    assert not found.stdout
