"""Analysis without weights: from a config to a plan, seconds and resident memory stage by stage.

    python benchmarks/growth.py [70b 405b 8 16 32 64]

``70b`` and ``405b`` are Llama-like configs of that size, a number is a Llama of that many layers of hidden width 512. Each runs
in a process of its own. Limits: 70b 60 s and 1.5 GiB, 405b 100 s. CPU seconds do not depend on who else is busy.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from graphprune.passes.random import random
from transformers import LlamaConfig

import graphprune
from graphprune.facts import Emission, Notes
from graphprune.narrow import narrow, stock_steps

SIZES = {"70b": (80, 8192, 28672, 64, 8), "405b": (126, 16384, 53248, 128, 8)}


def main() -> None:
    """Measure each model named."""
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
        return
    for name in sys.argv[1:] or ["8", "16", "32", "64", "70b", "405b"]:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        stages = "  ".join(f"{stage} {seconds:.2f}" for stage, seconds in row["cpu"].items())
        print(
            f"{name:>5}: {row['wall']:.1f} s wall ({time.perf_counter() - start:.1f} with imports), "
            f"{sum(row['cpu'].values()):.1f} s CPU, {row['peak']:.2f} GiB peak, {row['groups']} groups\n       {stages}",
            flush=True,
        )


def measure(name: str) -> None:
    """One model, stage by stage."""
    torch.set_num_threads(1)
    layers, hidden, ffn, heads, kv = SIZES[name] if name in SIZES else (int(name), 512, 1408, 8, 8)
    cpu: dict[str, float] = {}
    last = time.process_time()

    def lap(stage: str) -> None:
        nonlocal last
        cpu[stage], last = time.process_time() - last, time.process_time()

    with TemporaryDirectory() as folder:
        LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=kv,
            vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)  # fmt: skip
        start, last = time.perf_counter(), time.process_time()
        source = graphprune.open_source(Path(folder), weights=False)
    lap("open")
    inputs = source.example_inputs()
    lap("inputs")
    traced = graphprune.trace(source.model, inputs)
    lap("trace")
    axes = graphprune.propagate(traced)
    lap("propagate")
    groups = graphprune.couple(axes)
    lap("couple")
    budget, count = graphprune.Budget(alike=True), len(groups.groups)
    groups = narrow(source.model, groups, budget, Emission(), Notes([]))
    budget = stock_steps(source.model, groups, budget, Emission())
    lap("stock")
    plan = graphprune.select(groups, random(groups), budget)
    lap("select")
    plan.dumps()
    lap("write")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"cpu": cpu, "wall": time.perf_counter() - start, "peak": peak, "groups": count}))


if __name__ == "__main__":
    main()
