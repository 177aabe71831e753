"""Peak memory of first-order Taylor scoring, next to a plain forward and backward whose gradients are freed as they appear.

    python benchmarks/memory.py [--layers 8] [--hidden 768]

Each in a process of its own, above what the process holds once the model is built; prints both and the ratio with the weights
counted in: (weights + scoring) / (weights + plain).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune

ROWS, LENGTH, BATCHES = 4, 128, 3


def main() -> None:
    """Measure both and print the ratio."""
    options = arguments()
    if options.only:
        print(measure(options.only, options.layers, options.hidden))
        return
    same = [sys.executable, __file__, "--layers", str(options.layers), "--hidden", str(options.hidden), "--only"]
    runs = [subprocess.run([*same, what], capture_output=True, text=True, check=True) for what in ("plain", "taylor")]
    plain, scoring = (float(run.stdout) for run in runs)
    weights = 4 * sum(p.numel() for p in model(options.layers, options.hidden).parameters()) / 2**20
    print(f"weights {weights:.0f} MiB, plain forward/backward +{plain:.0f} MiB, taylor scoring +{scoring:.0f} MiB")
    print(f"ratio {(weights + scoring) / (weights + plain):.2f} (target 1.1)")


def model(layers: int, hidden: int) -> LlamaForCausalLM:
    """A Llama with grouped queries and random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
        )
    )  # fmt: skip


def measure(what: str, layers: int, hidden: int) -> float:
    """MiB the process grew by at its peak."""
    built = model(layers, hidden)
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 8192, (ROWS, LENGTH), generator=draw)} for _ in range(BATCHES)]
    start = peak()
    if what == "plain":
        graphprune.see_gradients(built, batches, lambda name, weight, gradient: None)
    else:
        graphprune.compile(built, keep=0.8, method="taylor", calibration=batches, verify=False)
    return peak() - start


def peak() -> float:
    """Peak resident size in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--only", choices=("plain", "taylor"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
