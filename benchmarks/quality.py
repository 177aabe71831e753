"""How good are pruned models? Every method on SmolLM2-135M: same data, same budget, no training; and what each step adds.

    python benchmarks/quality.py --rows methods --keep 0.8            # published methods
    python benchmarks/quality.py --rows steps --keep 0.8 --keep 0.5   # from first-order Taylor to the default, step by step
    python benchmarks/quality.py --rows search --seeds 1              # options of the default
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from graphprune import Budget, Calibration, Groups, Plan, Pruned, Scores, calibrate, couple, open_source, propagate, select, trace
from graphprune.compiler import rewrite
from graphprune.cost import parameters
from graphprune.data import read_texts
from graphprune.default import REPAIR
from graphprune.evaluate import perplexity
from graphprune.facts import Emission, Example, Notes
from graphprune.pipeline import Facts, Pass, find_pass, run
from graphprune.source import find_smollm2

BLOCKS = ("self_attn", "mlp")


@dataclass(frozen=True)
class Row:
    """One line of the table. ``repair`` are passes after the cut, ``before`` passes on scores or budget."""

    name: str
    method: str
    repair: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("ffn",)
    scope: str = "local"
    alike: bool = False
    mix: str = "c4"
    options: Mapping[str, Any] = field(default_factory=dict)


ENDS = ("protect_ends:first=4:last=2",)
TAYLOR = Row("first-order Taylor, first 4 and last 2 layers spared", "taylor", before=ENDS)
METHODS = (
    TAYLOR,
    Row("random", "random", before=ENDS),
    Row("L2", "magnitude", before=ENDS),
    Row("LLM-Pruner vector", "llm_pruner:order=vector", before=ENDS),
    Row("LLM-Pruner second", "llm_pruner:order=second", before=ENDS),
    Row("LLM-Pruner mixed", "llm_pruner:order=mixed", before=ENDS),
    Row("LLM-Pruner first, product", "llm_pruner:aggregate=product", before=ENDS),
    Row("LLM-Pruner first, max", "llm_pruner:aggregate=max", before=ENDS),
    Row("LLM-Pruner first, last-only", "llm_pruner:aggregate=last-only", before=ENDS),
    Row("group Fisher", "fisher", before=ENDS),
    Row("group Fisher, global", "fisher", scope="global"),
    Row("Wanda-sp", "wanda_sp", before=ENDS),
    Row("Wanda-sp, mean bias", "wanda_sp", ("mean_bias:add=true",), before=ENDS),
    Row("FLAP", "flap", ("mean_bias:add=true",), scope="rank"),
    Row("FLAP, ends spared", "flap", ("mean_bias:add=true",), before=ENDS),
    Row("Minitron", "minitron", before=ENDS),
    Row("first-order Taylor, all layers", "taylor"),
    Row("first-order Taylor, heads too", "taylor", kinds=("head", "ffn"), before=ENDS),
)
THEN = "least_squares:given=then:drift=0:where=readers:even=false:damping=0.01"
NOW = "least_squares:given=now:drift=0:where=readers:even=false:damping=0.01"
ALL = "least_squares:where=all"
MEASURED = ("sensitivity",)
DEFAULT = Row("the default", "obs", REPAIR, before=MEASURED, scope="global", kinds=("head", "ffn"), mix="both")
STEPS = (
    TAYLOR,
    Row("+ greedy OBS scores", "obs:gradients=false", before=ENDS),
    Row("+ errors weighted by gradients", "obs", before=ENDS),
    Row("+ least squares", "obs", (THEN,), before=ENDS),
    Row("+ half the calibration self-written", "obs", (THEN,), before=ENDS, mix="both"),
    Row("+ damping that carries over", "obs", (f"{THEN.removesuffix(':damping=0.01')}",), before=ENDS, mix="both"),
    Row("+ every weight, towards the original's stream", "obs", (ALL,), before=ENDS, mix="both"),
    Row("+ widths by the errors", "obs", (ALL,), scope="global", mix="both"),
    Row("+ heads", "obs", (ALL,), scope="global", kinds=("head", "ffn"), mix="both"),
    replace(DEFAULT, name="the default but for its last step", repair=REPAIR[:-1]),
    DEFAULT,
)
ALIKE = (
    Row("first-order Taylor, layers alike", "taylor", alike=True),
    Row("greedy OBS, layers alike", "obs", alike=True),
    Row("all weights, layers alike", "obs", (ALL,), alike=True),
    Row("all weights, layers alike, both texts", "obs", (ALL,), alike=True, mix="both"),
)
SEARCH = (
    TAYLOR,
    *(Row(f"{name} damping {d}", "obs", (f"{how}:damping={d}",), before=ENDS, mix="both")
      for name, how in (("all", ALL), ("now", NOW.removesuffix(":damping=0.01"))) for d in (0.01, 0.1, 1)),
    Row("writers", "obs", ("least_squares",), before=ENDS, mix="both"),
    Row("all, uneven", "obs", (f"{ALL}:even=false",), before=ENDS, mix="both"),
    Row("all, outputs only", "obs", (f"{ALL}:drift=0",), before=ENDS, mix="both"),
    Row("all, measured widths", "obs", (ALL,), before=MEASURED, scope="global", mix="both"),
    Row("all, measured, heads", "obs", (ALL,), before=MEASURED, scope="global", kinds=("head", "ffn"), mix="both"),
    Row("all, heads and queries", "obs", (ALL,), scope="global", kinds=("head", "query", "ffn"), mix="both"),
    Row("all, group Fisher global", "fisher", (ALL,), scope="global", mix="both"),
    Row("all, self-written", "obs", (ALL,), before=ENDS, mix="self"),
    Row("all, C4 only", "obs", (ALL,), before=ENDS),
)  # fmt: skip
TABLES = {"methods": METHODS, "steps": STEPS, "alike": ALIKE, "search": SEARCH}


class Bench:
    """A model with its texts; scores are kept, since many rows share them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source = open_source(args.model or find_smollm2(), device=args.device, dtype=torch.float32)
        self.model = self.source.model.eval().requires_grad_(False)
        data = Path(args.data)
        self.texts = {"C4": read_texts(str(data / "c4_development.jsonl")), "pydoc": ["\n\n".join(topics.values())]}
        self.calibration_text = str(data / "c4_calibration.jsonl")
        self.axes = propagate(trace(self.model, self.moved(torch.zeros(args.batch, args.length, dtype=torch.long))))
        self.groups = couple(self.axes)
        self.scored: dict[Any, Scores] = {}
        self.drawn: dict[tuple[str, int], Calibration] = {}

    def moved(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": ids.to(self.args.device)}

    def calibration(self, mix: str, seed: int) -> Calibration:
        """C4, text the model writes itself, or half of each, as many tokens either way."""
        if (mix, seed) not in self.drawn:
            spec = {"c4": self.calibration_text, "self": "self", "both": f"{self.calibration_text}+self"}[mix]
            a = self.args
            drawn = calibrate(spec, self.source, samples=a.samples, length=a.length, batch=a.batch, seed=seed)
            self.drawn[mix, seed] = replace(drawn, inputs=tuple(self.moved(batch["input_ids"]) for batch in drawn.inputs))
        return self.drawn[mix, seed]

    def facts(self, row: Row, keep: float, seed: int) -> Facts:
        groups = replace(self.groups, groups=tuple(g for g in self.groups if g.kind in row.kinds))
        calibration = self.calibration(row.mix, seed)
        budget = Budget(self.share(groups, keep), scope=row.scope, kinds=row.kinds, alike=row.alike)
        return {
            nn.Module: self.model, Groups: groups, Calibration: calibration, Budget: budget,
            Example: Example(calibration.inputs[0]), Emission: Emission(verify=self.args.verify), Notes: Notes([]),
        }  # fmt: skip

    def share(self, groups: Groups, keep: float) -> float:
        """The share of the parameters of the chosen groups that leaves ``keep`` of all attention and FFN parameters."""
        inner = {m.name for g in groups for m in g.members if m.name in self.axes.trace.parameters}
        every = [name for name in self.axes.trace.parameters if any(block in name for block in BLOCKS)]
        whole = parameters(self.axes, {}, every)
        return 1 - (1 - keep) * whole / parameters(self.axes, {}, sorted(inner))

    def scores(self, row: Row, facts: Facts, seed: int) -> Scores:
        """What the method and the passes on its scores make of the units."""
        steps = [find_pass(row.method), *(p for p in map(find_pass, row.before) if p.makes is Scores)]
        key = (row.method, tuple(p.name for p in steps), row.kinds, row.mix, seed)
        if key not in self.scored:
            self.scored[key] = run(steps, facts)[Scores]
        return self.scored[key]

    def prune(self, row: Row, keep: float, seed: int) -> tuple[nn.Module, Plan]:
        torch.manual_seed(seed)
        facts = self.facts(row, keep, seed)
        facts[Scores] = self.scores(row, facts, seed)
        budgets = [p for p in map(find_pass, row.before) if p.makes is Budget]
        found = run([*budgets, Pass(select), Pass(rewrite), *map(find_pass, row.repair)], facts)
        pruned: Pruned = found[Pruned]
        return pruned.model, found[Plan]

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
    rows = list(dict.fromkeys(row.name for name in args.rows or ["methods"] for row in TABLES[name]))
    chosen = {row.name: row for name in args.rows or ["methods"] for row in TABLES[name]}
    picked = [chosen[name] for i, name in enumerate(rows) if not args.only or i == 0 or re.search(args.only, name)]
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
