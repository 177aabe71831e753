"""Sweep model types, each pruned in a process of its own: ``python -m tests.zoo --family causal --jobs 2 [--only NAME …]``.

Rows are merged into ``--rows`` (JSON, one a line), so that a sweep of a part updates that part; ``--report`` writes them out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path

from tests.zoo.apart import Limits, Row, apart
from tests.zoo.entries import FAMILIES, class_names, model_types
from tests.zoo.prune import stages, with_checkpoint
from tests.zoo.report import document, outcome

Rows = dict[tuple[str, str], Row]


def main() -> None:
    options = arguments()
    rows = read(options.rows)
    limits = Limits(options.seconds, int(options.gigabytes * 2**30))
    measured = {"date": date.today().isoformat(), "commit": revision()}
    for row in apart(with_checkpoint if options.checkpoint else stages, chosen(options, rows), options.jobs, limits):
        rows = read(options.rows) | {(row["family"], row["type"]): row | measured}
        print(shown(row), flush=True)
        write(options.rows, rows)
    print(Counter((family, outcome(row)) for (family, _), row in rows.items()))
    if options.report:
        options.report.write_text(document(list(rows.values())))


def revision() -> str:
    """The commit that is measured, marked where files differ from it."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()


def chosen(options: argparse.Namespace, rows: Rows) -> list[tuple[str, str]]:
    """What to sweep: the families, or of them the types named, or those that did not come out well."""
    if options.none:
        return []
    families = FAMILIES if options.family == "all" else (options.family,)
    items = [(family, name) for family in families for name in model_types(family) if name in (options.only or class_names(family))]
    return [item for item in items if item not in rows or outcome(rows[item]) != "ok"] if options.failed else items


def read(path: Path) -> Rows:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["family"], row["type"]): row for row in map(json.loads, lines)}


def write(path: Path, rows: Rows) -> None:
    place = {family: number for number, family in enumerate(FAMILIES)}
    order = sorted(rows, key=lambda item: (place.get(item[0], -1), item))
    path.write_text("".join(json.dumps(rows[item]) + "\n" for item in order))


def shown(row: Row) -> str:
    notes = row.get("wrong") or row.get("error") or row.get("kinds", "")
    heads = "/".join(map(str, row.get("attention", [])))
    figures = f"{row['seconds']:5.1f} s  frozen {row.get('frozen', '?'):>6}  heads {heads:6}"
    return f"{row['family']:8} {row['type']:28} {outcome(row):16} {figures} {notes}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--family", choices=(*FAMILIES, "all"), default="all")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these model types")
    parser.add_argument("--failed", action="store_true", help="only what has no row, or one that is not ok")
    parser.add_argument("--none", action="store_true", help="sweep nothing: report what is in the rows")
    parser.add_argument("--checkpoint", action="store_true", help="also prune each as a stranger would: from a directory, to one")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=4, help="limit for one model")
    parser.add_argument("--rows", type=Path, default=Path("docs/coverage.jsonl"))
    parser.add_argument("--report", type=Path, help="write the document here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
