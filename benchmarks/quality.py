"""How good are pruned models? Every method on SmolLM2-135M: same data, same budget, no training; and what each step adds.

    python benchmarks/quality.py --rows methods --keep 0.8            # published methods
    python benchmarks/quality.py --rows steps --keep 0.8 --keep 0.5   # from first-order Taylor to the default, step by step
    python benchmarks/quality.py --rows alike --keep 0.8              # what a stock config costs
    python benchmarks/quality.py --list

``keep`` is the share of attention and FFN parameters that stays, whatever is cut. Calibration: C4 documents (``--data``).
Perplexity in windows of 512 tokens on other C4 documents and, out of domain, on the Python language reference as pydoc ships it.
Figures are perplexities, mean over seeds ± half the spread; "excess" is the mean over both texts of pruned − dense, "of Taylor"
its ratio to the first row's.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

import graphprune
from graphprune import Calibration, Plan, calibrate, couple, open_source, propagate, trace
from graphprune.cost import parameters
from graphprune.data import read_texts
from graphprune.default import CALIBRATED, REPAIR
from graphprune.evaluate import perplexity
from graphprune.source import find_smollm2

BLOCKS = ("self_attn", "mlp")


@dataclass(frozen=True)
class Row:
    """One line of the table: arguments of ``graphprune.compile``, which without a method takes its default."""

    name: str
    method: str | None = None
    passes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("ffn",)
    scope: str | None = None
    alike: bool = False


ENDS = "protect_ends:first=4:last=2"
BIAS = "mean_bias:add=true"
TAYLOR = Row("first-order Taylor, first 4 and last 2 layers spared", "taylor", (ENDS,))
METHODS = (
    TAYLOR,
    Row("random", "random", (ENDS,)),
    Row("L2", "magnitude", (ENDS,)),
    Row("LLM-Pruner vector", "llm_pruner:order=vector", (ENDS,)),
    Row("LLM-Pruner second", "llm_pruner:order=second", (ENDS,)),
    Row("LLM-Pruner mixed", "llm_pruner:order=mixed", (ENDS,)),
    Row("LLM-Pruner first, product", "llm_pruner:aggregate=product", (ENDS,)),
    Row("LLM-Pruner first, max", "llm_pruner:aggregate=max", (ENDS,)),
    Row("LLM-Pruner first, last-only", "llm_pruner:aggregate=last-only", (ENDS,)),
    Row("group Fisher", "fisher", (ENDS,)),
    Row("group Fisher, global", "fisher", scope="global"),
    Row("Wanda-sp", "wanda_sp", (ENDS,)),
    Row("Wanda-sp, mean bias", "wanda_sp", (ENDS, BIAS)),
    Row("FLAP", "flap", (BIAS,), scope="rank"),
    Row("FLAP, ends spared", "flap", (ENDS, BIAS)),
    Row("Minitron", "minitron", (ENDS,)),
    Row("first-order Taylor, all layers", "taylor"),
    Row("first-order Taylor, heads too", "taylor", (ENDS,), kinds=("head", "ffn")),
)
DEFAULT = Row("the default", kinds=("head", "ffn"))
STEPS = (
    TAYLOR,
    Row("greedy OBS scores", "obs", (ENDS,)),
    Row("+ widths by its errors, no layer spared", "obs", scope="global"),
    Row("+ text that the model writes itself", "obs", ("self_written",), scope="global"),
    Row("+ least squares", "obs", ("self_written", REPAIR[0]), scope="global"),
    Row("+ heads", "obs", ("self_written", REPAIR[0]), scope="global", kinds=("head", "ffn")),
    Row("+ sensitivity (the default but for its last step)", "obs", CALIBRATED.passes[:-1], ("head", "ffn"), "global"),
    DEFAULT,
)
ALIKE = (
    TAYLOR,
    Row("first-order Taylor, layers alike", "taylor", alike=True),
    Row("greedy OBS, layers alike", "obs", alike=True),
    replace(DEFAULT, name="the default, layers alike", alike=True),
)
TABLES = {"methods": METHODS, "steps": STEPS, "alike": ALIKE}


class Bench:
    """A model with its texts: those to measure on, and one to calibrate on for each seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source = open_source(args.model or find_smollm2(), device=args.device, dtype=torch.float32)
        self.model = self.source.model.eval().requires_grad_(False)
        data = Path(args.data)
        self.texts = {"C4": read_texts(str(data / "c4_development.jsonl")), "pydoc": ["\n\n".join(topics.values())]}
        self.calibrations = [self.drawn(str(data / "c4_calibration.jsonl"), seed) for seed in range(args.seeds)]
        self.axes = propagate(trace(self.model, self.moved(torch.zeros(args.batch, args.length, dtype=torch.long))))
        self.groups = couple(self.axes)

    def moved(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": ids.to(self.args.device)}

    def drawn(self, text: str, seed: int) -> Calibration:
        a = self.args
        drawn = calibrate(text, self.source, samples=a.samples, length=a.length, batch=a.batch, seed=seed)
        return replace(drawn, inputs=tuple(self.moved(batch["input_ids"]) for batch in drawn.inputs))

    def share(self, kinds: Sequence[str], keep: float) -> float:
        """The share of the parameters of the groups of some kinds that leaves ``keep`` of all attention and FFN parameters."""
        inner = {m.name for g in self.groups if g.kind in kinds for m in g.members if m.name in self.axes.trace.parameters}
        every = [name for name in self.axes.trace.parameters if any(block in name for block in BLOCKS)]
        whole = parameters(self.axes, {}, every)
        return 1 - (1 - keep) * whole / parameters(self.axes, {}, sorted(inner))

    def prune(self, row: Row, keep: float, seed: int) -> tuple[nn.Module, Plan]:
        result = graphprune.compile(
            self.model, keep=self.share(row.kinds, keep), method=row.method, kinds=row.kinds, scope=row.scope, alike=row.alike,
            passes=row.passes, calibration=self.calibrations[seed], seed=seed, verify=self.args.verify,
        )  # fmt: skip
        return result.model, result.plan

    def measure(self, model: nn.Module) -> dict[str, float]:
        tokenizer, limit = self.source.tokenizer(), self.args.windows
        return {name: perplexity(model, tokenizer, texts, limit=limit).value for name, texts in self.texts.items()}


def measured(bench: Bench, rows: Sequence[Row], keeps: Sequence[float], seeds: int, deadline: float) -> Iterator[dict[str, Any]]:
    """One record a row, keep and seed, as they come."""
    for row in rows:
        for keep in keeps:
            for seed in range(seeds):
                if time.monotonic() > deadline:
                    return
                started = time.monotonic()
                try:
                    model, plan = bench.prune(row, keep, seed)
                    found = bench.measure(model)
                except Exception as error:  # noqa: BLE001  one row that fails must not cost the others
                    yield {"row": row.name, "keep": keep, "seed": seed, "error": f"{type(error).__name__}: {error}"[:300]}
                    continue
                widths = [len(cut.kept) for cut in plan.cuts if cut.kind == "ffn"]
                yield {
                    "row": row.name, "keep": keep, "seed": seed, "perplexity": found,
                    "seconds": round(time.monotonic() - started, 1), "widths": widths,
                }  # fmt: skip


def table(records: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """Markdown: perplexities, excess over dense, excess relative to the first row."""
    lines = []
    for keep in sorted({r["keep"] for r in records}, reverse=True):
        mine = [r for r in records if r["keep"] == keep and "perplexity" in r]
        names = list(dict.fromkeys(r["row"] for r in mine))
        lines += [f"\n{1 - keep:.0%} removed; dense {' / '.join(f'{v:.2f}' for v in dense.values())}\n"]
        lines += [f"| method | {' | '.join(dense)} | excess | of Taylor | s |", "|---" * (len(dense) + 4) + "|"]
        first = None
        for name in names:
            runs = [r for r in mine if r["row"] == name]
            cells = [_spread([r["perplexity"][text] for r in runs]) for text in dense]
            excess = [sum(r["perplexity"][t] - dense[t] for t in dense) / len(dense) for r in runs]
            mean = sum(excess) / len(excess)
            first = mean if first is None else first
            seconds = sum(r["seconds"] for r in runs) / len(runs)
            lines += [f"| {name} | {' | '.join(cells)} | {mean:.1f} | {mean / first:.0%} | {seconds:.0f} |"]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--rows", action="append", choices=TABLES, help="which tables; several add up")
    parse.add_argument("--only", help="rows whose name has a match of this regular expression (first row always)")
    parse.add_argument("--keep", action="append", type=float)
    parse.add_argument("--seeds", type=int, default=3)
    parse.add_argument("--samples", type=int, default=64)
    parse.add_argument("--length", type=int, default=512)
    parse.add_argument("--batch", type=int, default=4)
    parse.add_argument("--windows", type=int, help="evaluation windows a text (default: all)")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--threads", type=int, default=2)
    parse.add_argument("--model", help="a checkpoint; default the installed SmolLM2-135M")
    parse.add_argument("--data", default=str(Path(__file__).parents[2] / "shared" / "data"))
    parse.add_argument("--minutes", type=float, default=600, help="begin no run after this long")
    parse.add_argument("--out", help="records as JSON lines")
    parse.add_argument("--verify", action="store_true")
    parse.add_argument("--list", action="store_true")
    args = parse.parse_args()
    rows = dict.fromkeys(row for name in args.rows or ["methods"] for row in TABLES[name])
    picked = [row for i, row in enumerate(rows) if not args.only or i == 0 or re.search(args.only, row.name)]
    if args.list:
        print("\n".join(str(row) for row in picked))
        return
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    dense = bench.measure(bench.model)
    print(json.dumps({"dense": dense, "device": args.device, "samples": args.samples, "length": args.length}), flush=True)
    records = []
    for record in measured(bench, picked, args.keep or [0.8, 0.5], args.seeds, deadline):
        records.append(record)
        print(json.dumps(record), flush=True)
        if args.out:
            Path(args.out).write_text("\n".join(map(json.dumps, records)) + "\n")
    print(table(records, dense))


if __name__ == "__main__":
    main()
