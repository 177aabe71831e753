"""Families and names in, for each model type in a process of its own: does it build, run and export; how large, how long."""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import resource
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, so that it is imported once and not in each child
import torch.export
from torch.utils import _pytree as pytree

from tests.zoo.entries import FAMILIES, Entry, build, model_types

SECONDS, BYTES = 60, 6 << 30
FORK = multiprocessing.get_context("fork")


def main() -> None:
    arguments = parser().parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES if arguments.family == "all" else (arguments.family,):
        for model_type in arguments.only or model_types(family):
            row = apart(model_type, family, arguments.seconds, not arguments.no_export)
            rows.append(row)
            print(line(row), flush=True)
    arguments.out.write_text(json.dumps(rows, indent=1))
    print(summary(rows), f"\nwritten to {arguments.out}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.zoo.configs", description=__doc__)
    options.add_argument("--family", choices=(*FAMILIES, "all"), default="causal")
    options.add_argument("--only", nargs="*", metavar="NAME", help="these model types instead of the whole family")
    options.add_argument("--seconds", type=float, default=SECONDS, help="limit for one model type")
    options.add_argument("--no-export", action="store_true", help="build and run only")
    options.add_argument("--out", type=Path, default=Path("/tmp/graphprune-zoo.json"))
    return options


def apart(model_type: str, family: str, seconds: float, export: bool) -> dict[str, Any]:
    """The outcome of one model type, from a forked process under a time and a memory limit."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(theirs, model_type, family, export))
    start = time.perf_counter()
    process.start()
    theirs.close()
    row: dict[str, Any] = {"type": model_type, "family": family, "stage": "build"}
    deadline = start + seconds
    while ours.poll(max(0.0, deadline - time.perf_counter())):
        try:
            row.update(ours.recv())
        except EOFError:
            break
    else:
        row["error"] = f"timeout after {seconds:.0f} s"
        process.kill()
    process.join()
    if row["stage"] != "done" and "error" not in row:
        row["error"] = f"process ended with code {process.exitcode}"
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def report(pipe: Connection, model_type: str, family: str, export: bool) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        for outcome in stages(model_type, family, export):
            pipe.send(outcome)
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:2000], "trace": traceback.format_exc()[-4000:]})
    pipe.close()


def stages(model_type: str, family: str, export: bool) -> Any:
    """Build, run, export: after each, what is known; `stage` names what comes next."""
    entry = build(model_type, family)
    parameters = sum(p.numel() for p in entry.model.parameters())
    yield {"stage": "forward", "class": type(entry.model).__name__, "parameters": parameters}
    outputs, again = outputs_of(entry), outputs_of(entry)
    if bad := [list(x.shape) for x in outputs if x.is_floating_point() and not x.isfinite().all()]:
        raise ValueError(f"outputs of shapes {bad} are not finite")
    if bad := [list(x.shape) for x, y in zip(outputs, again, strict=True) if not torch.equal(x, y)]:
        raise ValueError(f"outputs of shapes {bad} differ from one call to the next")
    yield {
        "stage": "export" if export else "done",
        "outputs": [list(x.shape) for x in outputs],
        "std": [round(float(x.float().std()), 3) for x in outputs if x.numel() > 1],
    }
    if export:
        with torch.no_grad():
            program = torch.export.export(entry.model, (), entry.inputs, strict=False)
        yield {"stage": "done", "nodes": len(program.graph.nodes), "unused": round(unused(program), 3)}


def unused(program: torch.export.ExportedProgram) -> float:
    """The share of the parameters that the outputs do not depend on, judged by the graph; tied ones are one."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    weights = {node: program.state_dict[name] for node, name in program.graph_signature.inputs_to_parameters.items()}
    every = {weight.data_ptr(): weight.numel() for weight in weights.values()}
    alive = {weight.data_ptr(): weight.numel() for node, weight in weights.items() if node in used}
    return 1 - sum(alive.values()) / max(1, sum(every.values()))


@torch.no_grad()
def outputs_of(entry: Entry) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(entry.model(**entry.inputs)) if isinstance(x, torch.Tensor)]


def line(row: dict[str, Any]) -> str:
    head = f"{row['type']:30s} {row.get('parameters', 0):>9,d} {row['seconds']:6.1f} s  "
    if row["stage"] != "done":
        return f"{head}{row['stage']} FAILED: {row['error'].strip().splitlines()[0][:300]}"
    return f"{head}ok {row['outputs']} {row['std']} unused {row.get('unused', '?')}"


def summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for family, group in groups(rows).items():
        runs = sum(row["stage"] in ("export", "done") for row in group)
        exports = sum(row["stage"] == "done" for row in group)
        shares = f"{runs} run ({runs / len(group):.1%}), {exports} export ({exports / len(group):.1%})"
        lines.append(f"{family}: {len(group)} types, {shares}")
    return "\n".join(lines)


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        found[row["family"]].append(row)
    return found
