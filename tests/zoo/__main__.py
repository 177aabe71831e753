"""Sweep model types, each pruned in a process of its own: ``python -m tests.zoo --family causal --jobs 2 [--only NAME …]``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.zoo.configs import FAMILIES, build, model_types
from tests.zoo.prune import stages

SECONDS = 120
FORK = multiprocessing.get_context("fork")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    families = FAMILIES if options.family == "all" else (options.family,)
    waiting = [(family, name) for family in families for name in (options.only or model_types(family))]
    running: list[Any] = []
    rows: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(start(*waiting.pop(0)))
        for job in list(running):
            if (row := finished(job)) is not None:
                running.remove(job)
                rows.append(row)
                print(shown(row), flush=True)
        time.sleep(0.05)
    options.out.write_text(json.dumps(rows, indent=1))
    print(Counter((row["family"], row["outcome"]) for row in rows))


def start(family: str, name: str) -> Any:
    answers = FORK.Queue()
    process = FORK.Process(target=outcome, args=(family, name, answers))
    process.start()
    return process, answers, family, name, time.monotonic()


def outcome(family: str, name: str, answers: Any) -> None:
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"family": family, "type": name, "stage": "build"}
    try:
        for found in stages(build(name, family), emit=False):
            row.update(found)
    except BaseException as error:
        row |= {"outcome": f"error in {row['stage']}", "error": f"{type(error).__name__}: {error}"[:300], "at": traceback.format_exc()[-900:]}
    answers.put(row)


def finished(job: Any) -> dict[str, Any] | None:
    process, answers, family, name, began = job
    if not answers.empty():
        row: dict[str, Any] = answers.get()
        process.join()
        return row
    if process.is_alive() and time.monotonic() - began < SECONDS:
        return None
    why = "timeout" if process.is_alive() else f"error: the process died ({process.exitcode})"
    process.kill()
    return {"family": family, "type": name, "stage": "?", "outcome": why}


def shown(row: dict[str, Any]) -> str:
    notes = row.get("wrong") or row.get("error") or row.get("kinds", "")
    return f"{row['family']:8} {row['type']:28} {row['outcome']:18} frozen {row.get('frozen_share', '?'):>7}  {notes}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--family", choices=(*FAMILIES, "all"), default="causal")
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("/tmp/graphprune-zoo.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
