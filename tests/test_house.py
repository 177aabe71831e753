"""The house rules: data flows one way, no import hides in a function, every room says what it is for, what the pages show runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import transformers
from torch import nn

import graphprune
from graphprune.pipeline import find_pass
from graphprune.rules.table import RULES, Op, Typed, aten, rule
from tests.cases import CASES
from tests.models import llama
from tests.test_data import WORDS, word_tokenizer
from tests.test_law import Row, check, signature, subsets

ROOT = Path(__file__).parent.parent
ROOMS = sorted((ROOT / "graphprune").rglob("*.py"))
PAGES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.name != "__init__.py")
LIBRARY_NAMES = set(graphprune.__all__)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in ROOMS}


def imports(path: Path) -> set[str]:
    """Every module of ours that runs before a file does: a name of a package is its module, if it has one of that name."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in named}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "graphprune"}


def rows() -> dict[str, int]:
    """Each room by its row in the table of CONTRIBUTING.md, where each stands once; ``rules/`` is all files of the package."""
    cells = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    found: list[tuple[str, int]] = []
    for place, name in ((place, name) for place, cell in enumerate(cells) for name in re.findall(r"`([^`]+)`", cell)):
        files = list((ROOT / "graphprune").glob(f"{name}*.py" if name.endswith("/") else name))
        assert files, name
        found += [(module_name(path), place) for path in files]
    assert len(found) == len(dict(found))
    return dict(found)


def test_no_import_cycle() -> None:
    graph = nx.DiGraph()
    for path in ROOMS:
        own = module_name(path)
        graph.add_node(own)
        graph.add_edges_from((own, name) for name in imports(path) & NAMES - {own})
    assert len(graph) > 90
    assert list(nx.simple_cycles(graph)) == []


def test_every_room_has_a_row_and_imports_only_its_own_or_those_above_it() -> None:
    row = rows()
    assert row.keys() == NAMES - {"graphprune.rewrite"}
    taken = [(own, name) for path in ROOMS if (own := module_name(path)) in row for name in imports(path) & row.keys()]
    assert len(taken) > 300
    assert [(own, name) for own, name in taken if row[name] > row[own]] == []


@pytest.mark.parametrize("path", [*ROOMS, *PAGES], ids=lambda path: path.name)
def test_no_function_hides_an_import_and_every_file_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f.name for f in functions if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(f))]
    assert len(path.read_text().splitlines()) < 5 or ast.get_docstring(tree)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_pass_is_one_function_of_its_files_name_and_the_rest_its_leaves(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert [node.name for node in public if node.name not in used] == [path.stem]
    assert all(ast.get_docstring(node) for node in public)
    assert find_pass(path.stem).name == path.stem


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_pass_imports_public_names_and_of_rooms_only_those_above_the_compiler(path: Path) -> None:
    row, tree = rows(), ast.parse(path.read_text())
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphprune")]
    for node in taken:
        names = {alias.name for alias in node.names}
        assert names <= LIBRARY_NAMES if node.module == "graphprune" else row[node.module or ""] < row["graphprune.compiler"]
        assert not [name for name in names if name.startswith("_")]


def test_the_package_never_imports_the_pass_library() -> None:
    assert not [path for path in ROOMS if any("graphprune.passes" in name for name in imports(path))]


# ── what the pages show runs ─────────────────────────────────────────────────────────────────────────────────────────


def blocks(page: str, count: int) -> list[str]:
    """Every python block of a page; as many as there are tests for."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(found) == count
    return found


def test_the_readmes_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks("README.md", 3)[0], "README.md", "exec"), names)
    assert "out_features=32" in capsys.readouterr().out
    x = torch.randn(5, 16)
    loaded = graphprune.load("smaller", names["model"])
    assert torch.equal(loaded(x), names["result"].model(x)) and loaded(x).shape == (5, 4)


def test_the_readmes_lines_for_a_transformers_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small checkpoint and a small corpus in place of those it names."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("checkpoint")
    word_tokenizer().save_pretrained("checkpoint")
    texts = [" ".join(WORDS[(7 * i + i * j * j) % len(WORDS)] for j in range(200)) for i in range(40)]
    Path("words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    block = blocks("README.md", 3)[1]
    for shown, there in (("path/to/checkpoint", "checkpoint"), ("corpus.jsonl", "words.jsonl")):
        assert block.count(f'"{shown}"') == 1
        block = block.replace(shown, there)
    names: dict[str, Any] = {"graphprune": graphprune}
    exec(compile(block, "README.md", "exec"), names)
    result, calibration = names["result"], names["text"]
    assert sum(len(batch["input_ids"]) for batch in calibration.inputs) == 32
    assert {cut.kind for cut in result.plan.cuts} == {"ffn"} and result.plan.method.startswith("taylor")
    loaded = transformers.AutoModelForCausalLM.from_pretrained("smaller").eval()
    assert loaded.config.intermediate_size < 88
    with torch.no_grad():
        torch.testing.assert_close(loaded(calibration.inputs[0]["input_ids"]).logits, result.model(**calibration.inputs[0]).logits)
    assert transformers.AutoTokenizer.from_pretrained("smaller")("w3")["input_ids"] == word_tokenizer()("w3")["input_ids"]


def test_the_readmes_criterion_scores_as_it_says(tmp_path: Path) -> None:
    """From a file, with its option: the units that stay are those whose weights' powers add up to most."""
    (tmp_path / "my.py").write_text(blocks("README.md", 3)[2])
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    result = graphprune.compile(net, torch.randn(4, 6), keep=0.5, method=f"{tmp_path}/my.py:loudness:power=4")
    rows, columns = net[0].weight.detach(), net[2].weight.detach().T
    loud = torch.cat([rows, net[0].bias.detach()[:, None], columns], 1).pow(4).sum(1)
    torch.testing.assert_close(result.facts[graphprune.Scores][next(iter(result.groups)).name], loud.double())
    assert result.plan.method == "loudness 4"
    assert [cut.kept for cut in result.plan.cuts] == [tuple(sorted(loud.topk(5).indices.tolist()))]


def test_the_rule_that_contributing_shows_obeys_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"rule": rule, "aten": aten, "Op": Op, "Typed": Typed}
    monkeypatch.setitem(RULES, "aten::glu", RULES["aten::glu"])
    exec(compile(blocks("CONTRIBUTING.md", 1)[0], "CONTRIBUTING.md", "exec"), names)
    assert RULES["aten::glu"] is names["glu"]
    cases = [case for case in CASES if case.name.startswith("glu")]
    assert len(cases) >= 3
    for row, case in ((Row(case), case) for case in cases):
        assert signature(row) == case.type
        for keep in subsets(row):
            check(row, keep)
