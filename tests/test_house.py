"""The house rules: data flows one way, no import hides in a function, every room says what it is for, the README runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

import graphprune

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "graphprune").rglob("*.py"))
PAGES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.name != "__init__.py")
LIBRARY_NAMES = set(graphprune.__all__)


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphprune"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_cycle() -> None:
    graph = nx.DiGraph()
    names = {module_name(path) for path in ROOMS}
    for path in ROOMS:
        own = module_name(path)
        graph.add_edges_from((own, name) for name in imports(path) & names - {"graphprune", own})
    assert list(nx.simple_cycles(graph)) == []


@pytest.mark.parametrize("path", [*ROOMS, *PAGES], ids=lambda path: path.name)
def test_no_function_hides_an_import_and_every_file_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f.name for f in functions if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(f))]
    assert len(path.read_text().splitlines()) < 5 or ast.get_docstring(tree)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_pass_is_one_function_of_its_files_name_on_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert path.stem in public
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "graphprune":
            assert {alias.name for alias in node.names} <= LIBRARY_NAMES


def test_the_package_never_imports_the_pass_library() -> None:
    assert not [path for path in ROOMS if any("graphprune.passes" in name for name in imports(path))]


def test_the_readmes_first_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "out_features=32" in capsys.readouterr().out
    assert (tmp_path / "smaller" / "model.safetensors").exists()


def test_the_readmes_criterion_works() -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[2]
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert callable(names["loudness"])
