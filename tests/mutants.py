"""Break every rule on purpose and see whether the law notices: ``python -m tests.mutants [file …]`` lists the survivors.

A mutant is one small change to one rule: a statement dropped, a number off by one, a comparison or a condition turned, two
neighbours swapped. It is killed when some row has another type, breaks its law, or cannot run at all.
"""

from __future__ import annotations

import ast
import copy
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from graphprune.propagate import propagate
from graphprune.rules.table import RULES
from tests.cases import CASES
from tests.test_law import RULE_FILES, Row, Visited, check, roles, row_of, signature, subsets

TURNED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.And: ast.Or, ast.Or: ast.And, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
}  # fmt: skip


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Each mutant with the line it is on and what was done."""
    same = {id(child) for node in ast.walk(tree) if _symmetric(node) for child in ast.walk(node)}
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in same:
            continue
        for number, (what, _) in enumerate(_changes(node)):
            mutant = copy.deepcopy(tree)
            victim = list(ast.walk(mutant))[place]
            list(_changes(victim))[number][1]()
            yield getattr(node, "lineno", 0), f"{what}: {ast.unparse(node)[:90]}", ast.fix_missing_locations(mutant)


def _symmetric(node: ast.AST) -> bool:
    """What means the same either way round: a strict ``zip``, an annotation, names in a row."""
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.Tuple) and all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in node.elts)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "dropped", lambda: setattr(node, "value", ast.Constant(None))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "one more", lambda: setattr(node, "value", node.value + 1)
        yield "one less", lambda: setattr(node, "value", node.value - 1)
    if isinstance(node, ast.Constant) and node.value == "contracted":
        yield "free", lambda: setattr(node, "value", "free")
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "turned", lambda: setattr(node, "value", not node.value)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
        yield "turned", lambda: node.ops.__setitem__(0, TURNED[type(node.ops[0])]())
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in TURNED:
        yield "turned", lambda: setattr(node, "op", TURNED[type(node.op)]())
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negated", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for field in ("elts", "args"):
        items = getattr(node, field, None)
        if not isinstance(items, list) or _called(node) in ("equal", "zip", "_same"):
            continue
        for i in range(len(items) - 1):
            if ast.dump(items[i]) != ast.dump(items[i + 1]):
                yield f"swapped {i}", lambda items=items, i=i: items.__setitem__(slice(i, i + 2), [items[i + 1], items[i]])


def _called(node: ast.AST) -> str:
    function = getattr(node, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def survives(rows: list[Row], before: dict[str, tuple[str, str]]) -> bool:
    """Whether no row notices."""
    try:
        changed = [copy.copy(row) for row in rows]
        for row in changed:
            row.axes = propagate(row.axes.trace, open_ends=True)
            if (signature(row), roles(row)) != before[row.model.case.name]:
                return False
        for row in changed:
            for keep in subsets(row):
                check(row, keep)
    except Exception:
        return False
    return True


def rows_by_line() -> dict[tuple[str, int], list[Row]]:
    """Which rows run which line."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for case in CASES:
        row = row_of(case)
        with Visited() as visited:
            propagate(row.axes.trace, open_ends=True)
        for line in visited.lines:
            found[line].append(row)
    return found


def main(names: list[str]) -> None:
    """Report on the named rule files, all of them by default."""
    warnings.simplefilter("ignore")
    by_line, before = rows_by_line(), {case.name: (signature(row_of(case)), roles(row_of(case))) for case in CASES}
    files = [path for path in sorted(Path(RULE_FILES).glob("*.py")) if path.name != "__init__.py"]
    for path in [path for path in files if not names or path.name in names]:
        total, alive = 0, []
        for line, what, mutant in mutants(ast.parse(path.read_text())):
            rows = by_line.get((str(path), line), [])
            if not rows or path.name == "table.py":
                continue
            saved = dict(RULES)
            total += 1
            try:
                exec(compile(mutant, str(path), "exec"), {"__name__": f"graphprune.rules.{path.stem}"})
                if survives(rows, before):
                    alive.append(f"{path.name}:{line}  {what}")
            except Exception:
                continue
            finally:
                RULES.clear()
                RULES.update(saved)
        print(f"{path.name}: {total - len(alive)} of {total} killed", *alive, sep="\n  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
