"""A stage or a result in, what a person sees of it in the terminal out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel

from graphprune.bench import disk_bytes
from graphprune.compiler import Result
from graphprune.output import PROGRAM
from graphprune.ranks import leads
from graphprune.removed import removals
from graphprune.report import Amount, before_after, strips
from graphprune.rewrite.graph import PrunedGraph
from graphprune.streamed import Streamed

out = Console()
err = Console(stderr=True)


class progress:
    """A spinner with the stage that is running."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.bar = Progress(*columns, console=err, transient=True)

    def __enter__(self) -> Any:
        self.bar.__enter__()
        task = self.bar.add_task("starting", total=None)
        return lambda stage: self.bar.update(task, description=stage)

    def __exit__(self, *problem: Any) -> None:
        self.bar.__exit__(*problem)


def shown(result: Result | Streamed, output: Path, more: str | None = None) -> None:
    """Print what a compile removed, what there is to note, ``more`` among it, and what was written."""
    before, after = result.plan.cost["before"], result.plan.cost["after"]
    rows: dict[str, tuple[Any, Any]] = {
        "parameters": (before["parameters"], after["parameters"]),
        "bytes": (Amount(before["bytes"], "B"), Amount(after["bytes"], "B")),
        "FLOPs of a traced forward": (Amount(before["flops"]), Amount(after["flops"])),
    }
    out.print(before_after(rows))
    out.print(strips(removals(result.groups, result.plan)))
    for note in (*result.notes, *filter(None, [more])):
        out.print(f"note  {note}", markup=False, highlight=False)
    if leads():
        out.print(f"{output} ({Amount(disk_bytes(output), 'B')}), {_what_it_is(result)}", markup=False, highlight=False)


def _what_it_is(result: Result | Streamed) -> str:
    """What was written, and how it is loaded."""
    if isinstance(result, Streamed) or result.pruned.config is not None:
        return "a stock checkpoint: from_pretrained loads it"
    if isinstance(result.model, PrunedGraph):
        outputs = ", after import transformers.modeling_outputs" if isinstance(result.facts[nn.Module], PreTrainedModel) else ""
        return f"an exported program: torch.export.load reads {PROGRAM}{outputs}"
    if not isinstance(result.model, PreTrainedModel):
        return "a plain module: graphprune.load(folder, original)"
    why = (result.pruned.obstacle or "").splitlines()[0]
    return f"not a stock checkpoint: {why}. Every command opens it; graphprune.load, or from_pretrained with trust_remote_code=True"
